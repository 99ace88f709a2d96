"""Pushing while a run trains: every revision gets there, and nothing at the Hub costs a run."""

import io
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from forked import forked, pretraining
from huggingface_hub import constants
from loopback_hub import READ, USER, WRITE, Fault, LoopbackHub
from safetensors.torch import load

from pipeline import hub_client, pretrain, publish, push_process, pushing
from pipeline import push_list as push_list_room
from pipeline.push_list import PLACE, PushList, Revision
from pipeline.recipe import InputError

NAME = f"{USER}/run"
SECRET = "hf_CANARY" + "q" * 28
PUSH = ["--training.push_to_hub", "true", "--training.hub_model_id", NAME]


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub that this process and those that it starts see."""
    with LoopbackHub() as running:
        _see(running, monkeypatch, tmp_path / "home")
        yield running


def _see(running, monkeypatch, home, token=WRITE):
    running.seen_by(monkeypatch, token=token)
    for name, value in running.environment(home, token=token).items():
        monkeypatch.setenv(name, value)
    # A process of ours finds the package as this one does.
    monkeypatch.setenv("PYTHONPATH", str(Path(pushing.__file__).parent.parent))


@pytest.fixture(scope="module")
def pushed(smoke_recipe, tmp_path_factory):
    """A run that pushed each checkpoint whole to a branch of its own: its Hub, folder and words."""
    folder = tmp_path_factory.mktemp("pushed") / "run"
    said, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, LoopbackHub(keeps_bodies=True) as running:
        running.tokens[SECRET] = (USER, "write", [])
        _see(running, patch, folder.parent / "home", token=SECRET)
        patch.setattr(sys, "stdout", said)
        patch.setattr(sys, "stderr", errors)
        _train(smoke_recipe, folder, *PUSH, "--training.hub_strategy", "all_checkpoints")
        yield running, folder, errors.getvalue() + said.getvalue()


def _train(recipe, folder, *more):
    pretrain.main(["--config", str(recipe), "--training.output_dir", str(folder), *more])


def _weights(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_each_checkpoint_is_a_commit_and_the_result_is_main(pushed, finished_run):
    server, folder, said = pushed
    assert _weights(folder) == _weights(finished_run)  # as without pushing
    assert server.repository(NAME).private
    assert server.titles(NAME)[1:] == [
        "After 10 of 20 updates", "After 20 updates", "The result after 20 updates"
    ]  # fmt: skip
    main = server.files(NAME)
    assert main["model.safetensors"] == _weights(folder)
    assert {"README.md", "config.json", "tokenizer.json", "metrics.json"} <= set(main)
    assert not {"optimizer.pt", "trainer_state.json", "training_args.bin"} & set(main)
    for step in (10, 20):
        there = server.files(NAME, f"step-{step:09}")
        checkpoint = folder / f"checkpoint-{step}"
        kept = {p.name: p.read_bytes() for p in checkpoint.iterdir()}
        assert kept.items() <= there.items()
        assert f"after {step}" in there["README.md"].decode().lower()
    assert not (folder / PLACE).exists() and not PushList(folder).waiting
    assert said.splitlines()[-1] == (
        f"on the Hub, {NAME}: checkpoint-10 (main), checkpoint-10 (step-000000010), "
        "checkpoint-20 (main), checkpoint-20 (step-000000020), the result (main)"
    )


def test_no_token_is_in_any_byte_that_the_run_wrote_or_sent(pushed):
    server, folder, said = pushed
    assert len(server.bodies) > 10 and SECRET not in said
    sent = [*server.bodies, *server.blobs.values()]
    assert not any(SECRET.encode() in content for content in sent)
    files = [path for path in folder.parent.rglob("*") if path.is_file()]
    assert len(files) > 30
    assert not any(SECRET.encode() in path.read_bytes() for path in files)
    assert not any(str(folder.parent).encode() in content for content in server.bodies)
    asked = [r for r in server.log if SECRET in json.dumps({**r, "headers": {}})]
    assert not asked  # it stands in the header that is for it, and nowhere else


def test_a_finished_run_asks_the_hub_for_nothing_more(pushed, smoke_recipe, monkeypatch, capsys):
    server, folder, _ = pushed
    asked = len(server.log)
    _train(smoke_recipe, folder, *PUSH, "--training.hub_strategy", "all_checkpoints")
    assert len(server.log) == asked
    assert f"on the Hub, {NAME}: checkpoint-10 (main)" in capsys.readouterr().out


def test_a_run_goes_on_from_the_hub_as_if_it_had_not_stopped(
    pushed, smoke_recipe, finished_run, tmp_path, monkeypatch, caplog
):
    server, _, _ = pushed
    caplog.set_level("INFO", logger="pipeline")
    _see(server, monkeypatch, tmp_path / "home", token=SECRET)
    folder = tmp_path / "elsewhere"
    _train(smoke_recipe, folder, "--resume", f"hub:{NAME}@step-000000010")
    assert f"fetching {NAME}@step-000000010" in caplog.text
    assert f"resuming from {folder / '_fetched' / 'checkpoint-10'}" in caplog.text
    assert _weights(folder) == _weights(finished_run)
    # It has the name under which the Hub knows the run: it may be pushed there again.
    server.repository(NAME)
    publish.main(["--run", str(folder), "--repo_id", NAME])
    assert server.titles(NAME)[-1] == "The result after 20 updates"


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("main", "holds no checkpoint that was pushed whole .*branches there: main, step-0000000"),
        ("step-99", "the branch step-99 holds no checkpoint .*branches there: main, step-0000000"),
        ("a..b", "no name of a branch"),
    ],
)
def test_what_is_no_whole_checkpoint_is_one_sentence(
    pushed, smoke_recipe, tmp_path, monkeypatch, name, sentence
):
    server, _, _ = pushed
    _see(server, monkeypatch, tmp_path / "home", token=SECRET)
    with pytest.raises(InputError, match=f"--resume hub:{NAME}@{name}: .*{sentence}"):
        _train(smoke_recipe, tmp_path / "run", "--resume", f"hub:{NAME}@{name}")


def test_a_checkpoint_that_arrives_damaged_is_not_gone_on_from(
    pushed, smoke_recipe, tmp_path, monkeypatch
):
    server, _, _ = pushed
    _see(server, monkeypatch, tmp_path / "home", token=SECRET)
    there = server.files(NAME, "step-000000010")
    there["optimizer.pt"] = there["optimizer.pt"][:-1] + b"x"
    server.put(f"{USER}/damaged", there)
    with pytest.raises(InputError, match="arrived damaged: .*optimizer.pt differs"):
        _train(smoke_recipe, tmp_path / "run", "--resume", f"hub:{USER}/damaged")
    assert not list((tmp_path / "run").rglob("*checkpoint*"))


# -- before it begins -----------------------------------------------------------------------------


def _no_token(server, patch):
    patch.setenv("HF_TOKEN", "")


def _refused(server, patch):
    patch.setenv("HF_TOKEN", "hf_nobody")


def _reader(server, patch):
    patch.setenv("HF_TOKEN", READ)


def _gone(server, patch):
    patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def _forbidden(server, patch):
    server.faults = [Fault("POST /api/repos/create", 403, times=9)]


def _anothers(server, patch):
    server.put(NAME, {"config.json": b"{}"}, private=True)


def _public(server, patch):
    server.put(NAME, {"x.txt": b""}, private=False)


@pytest.mark.parametrize(
    "arrange, sentence",
    [
        (_no_token, "there is no token; make one .*HF_TOKEN or log in with `hf auth login`"),
        (_refused, r"refuses the token \(401\)"),
        (_reader, "the token may only read"),
        (_gone, "127.0.0.1:9 cannot be reached.*train without it .*publish.py"),
        (_forbidden, r"the token may not write there \(403"),
        (_anothers, "holds another model, which this would replace"),
        (_public, "is public; make it private"),
    ],
)
def test_what_cannot_be_pushed_is_found_out_before_anything_is_read(
    server, smoke_recipe, tmp_path, monkeypatch, arrange, sentence
):
    monkeypatch.setattr(hub_client, "time", _Clock())
    arrange(server, monkeypatch)
    with pytest.raises(InputError, match=sentence):
        _train(smoke_recipe, tmp_path / "run", *PUSH)
    assert not (tmp_path / "run" / "blocks").exists()


class _Clock:
    """No time passes."""

    @staticmethod
    def sleep(seconds):
        pass


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--training.hub_strategy", "often"], "hub_strategy: .*not one of end, every_save, ch"),
        (["--training.hub_token", "hf_x"], "training.hub_token: leave it out; set HF_TOKEN"),
        (
            ["--training.push_to_hub", "null"],
            "hub_model_id has a meaning with training.push",
        ),
        (["--training.hub_always_push", "true"], "hub_always_push: leave it out"),
        (["--training.hub_model_id", "a/b/c"], "no name of a repository"),
    ],
)
def test_what_the_recipe_says_of_pushing_is_checked(server, smoke_recipe, tmp_path, more, sentence):
    argv = [word for word in [*PUSH, *more]]
    given = {argv[i]: argv[i + 1] for i in range(0, len(argv), 2)}
    with pytest.raises(InputError, match=sentence) as raised:
        _train(smoke_recipe, tmp_path / "run", *[w for pair in given.items() for w in pair])
    assert "hf_x" not in str(raised.value)


@pytest.mark.slow
def test_a_name_without_an_owner_is_the_token_s(server, smoke_recipe, tmp_path):
    folder = tmp_path / "mine"
    _train(
        smoke_recipe, folder, "--training.push_to_hub", "true", "--training.hub_strategy", "end",
        "--training.max_steps", "2", "--training.hub_private_repo", "false",
    )  # fmt: skip
    assert server.titles(f"{USER}/mine") == ["initial commit", "The result after 2 updates"]
    assert not server.repository(f"{USER}/mine").private


# -- faults ---------------------------------------------------------------------------------------

ALL = (401, 403, 409, (429, {"Retry-After": "1"}), 500, 503, "drop", "drop_after", "cut")


@pytest.mark.slow
def test_faults_cost_a_run_nothing_and_the_printed_command_sends_the_rest(
    server, smoke_recipe, finished_run, tmp_path, monkeypatch, capsys, caplog
):
    caplog.set_level("INFO", logger="pipeline")
    monkeypatch.setattr(pushing, "ATTEMPTS_OF_A_PROCESS", 1)

    def begin(*given, made=pushing.Pusher._start):
        server.faults = [Fault("", "hang")]
        server.random_faults(1, 0.4, ALL)
        made(*given)

    monkeypatch.setattr(pushing.Pusher, "_start", begin)
    folder = tmp_path / "run"
    more = ["--hub.branches", "true", "--hub.timeout_seconds", "3", "--hub.attempts", "2"]
    _train(smoke_recipe, folder, *PUSH, *more)
    server.random_faults(0, 0)
    server.faults = []
    server.release()
    assert _weights(folder) == _weights(finished_run)
    assert "it took longer than hub.timeout_seconds (3)" in caplog.text
    out = capsys.readouterr().out
    waiting = PushList(folder).waiting
    assert [revision.said in out.partition("not on the Hub: ")[2] for revision in waiting]
    if waiting:
        assert f"Send them: python pipeline/publish.py --run {folder}" in out
    assert publish.main(["--run", str(folder)]) == 0
    assert not PushList(folder).waiting and not (folder / PLACE).exists()
    titles = ["After 10 of 20 updates", "After 20 updates", "The result after 20 updates"]
    assert server.titles(NAME)[1:] == titles
    assert server.files(NAME)["model.safetensors"] == _weights(finished_run)
    for step, title in ((10, titles[0]), (20, titles[1])):
        assert server.titles(NAME, f"step-{step:09}")[-1] == title
        there = load(server.files(NAME, f"step-{step:09}")["model.safetensors"])
        kept = load((folder / f"checkpoint-{step}" / "model.safetensors").read_bytes())
        assert there.keys() == kept.keys() and all((there[n] == kept[n]).all() for n in kept)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["terminated", "killed"])
def test_a_run_that_is_stopped_waits_for_no_push_and_the_next_one_sends_it(
    server, smoke_recipe, finished_run, tmp_path, how
):
    """The Hub hangs; checkpoints that are gone from the run by then are sent all the same."""
    server.faults = [Fault("POST .*/commit/", "hang", times=99)]
    folder, log = tmp_path / "run", tmp_path / "log"
    argv = [
        "--config", str(smoke_recipe), "--training.output_dir", str(folder), *PUSH,
        "--training.save_steps", "4",
    ]  # fmt: skip
    with forked() as starter:
        pid = starter.start(pretraining([*argv, "--training.max_steps", "5000"], _see_again), log)
        end = time.monotonic() + 60
        while not list((folder / PLACE).glob("checkpoint-20@main.*/pipeline_run.json")):
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.02)
        started = time.monotonic()
        os.kill(pid, signal.SIGKILL if how == "killed" else signal.SIGTERM)
        assert starter.code(pid) == (-signal.SIGKILL if how == "killed" else 75), log.read_text()
        assert time.monotonic() - started < 10
    held = {place.name for place in (folder / PLACE).iterdir()}
    assert {"checkpoint-4@main", "checkpoint-20@main"} <= {name.partition(".")[0] for name in held}
    assert not (folder / "checkpoint-4").exists()
    if how == "terminated":
        assert "not on the Hub: checkpoint-4 (main), checkpoint-8 (main)" in log.read_text()
    server.faults = []
    server.release()
    step = max(int(p.name.partition("-")[2]) for p in folder.glob("checkpoint-*"))
    _train(*argv[1::2][:2], *argv[4:], "--training.max_steps", str(step + 4))
    titles = server.titles(NAME)[1:]
    assert [title.split()[1] for title in titles[:5]] == ["4", "8", "12", "16", "20"]
    assert titles[-1] == f"The result after {step + 4} updates"


def _see_again():
    """A forked process reads the environment anew."""
    constants.ENDPOINT = os.environ["HF_ENDPOINT"]
    constants.HF_HUB_OFFLINE = False


@pytest.mark.slow
def test_a_run_of_the_hub_may_be_pushed_there_again_and_goes_on_from_its_own(
    pushed, smoke_recipe, tmp_path, monkeypatch, caplog
):
    """Also when it is requeued with the same words."""
    server, _, _ = pushed
    caplog.set_level("INFO", logger="pipeline")
    _see(server, monkeypatch, tmp_path / "home", token=SECRET)
    folder, more = tmp_path / "run", ["--resume", f"hub:{NAME}@step-000000010", *PUSH]
    _train(smoke_recipe, folder, *more, "--training.hub_revision", "again", "--training.max_steps",
           "12", "--allow_change", "training.max_steps")  # fmt: skip
    assert server.titles(NAME, "again")[-1] == "The result after 12 updates"
    assert not (folder / "_fetched").exists()
    caplog.clear()
    _train(smoke_recipe, folder, *more, "--training.hub_revision", "again", "--training.max_steps",
           "14", "--allow_change", "training.max_steps")  # fmt: skip
    assert "has checkpoints of its own: nothing is fetched" in caplog.text
    assert f"resuming from {folder / 'checkpoint-12'}" in caplog.text


@pytest.mark.slow
def test_a_refused_checkpoint_of_the_hub_leaves_the_folder_as_it_was(
    pushed, smoke_recipe, tmp_path, monkeypatch
):
    server, _, _ = pushed
    _see(server, monkeypatch, tmp_path / "home", token=SECRET)
    more = ["--resume", f"hub:{NAME}@step-000000010", "--training.seed", "5"]
    with pytest.raises(InputError, match="is a checkpoint of another run: training.seed"):
        _train(smoke_recipe, tmp_path / "run", *more)
    _train(smoke_recipe, tmp_path / "run", "--training.max_steps", "2")


@pytest.mark.parametrize(
    "change",
    [
        {"facts": {"step": "1/../../escaped"}},
        {"facts": {"step": True}},
        {"facts": {}},
        {"files": {"../model.safetensors": {"size": 1, "sha256": ""}}},
        {"files": {"trainer_state.json": {}}},
        {"made_from": {"recipe": "x"}},
        [],
        b"{",
        b"\xff",
    ],
)
def test_a_stranger_s_manifest_is_not_trusted(pushed, smoke_recipe, tmp_path, monkeypatch, change):
    server, _, _ = pushed
    _see(server, monkeypatch, tmp_path / "home", token=SECRET)
    there = server.files(NAME, "step-000000010")
    manifest = json.loads(there["manifest.json"])
    if isinstance(change, dict):
        change = manifest | change
    there["manifest.json"] = change if isinstance(change, bytes) else json.dumps(change).encode()
    server.put(f"{USER}/strange", there)
    with pytest.raises(InputError, match="its manifest.json is not that of a checkpoint of ours"):
        _train(smoke_recipe, tmp_path / "run", "--resume", f"hub:{USER}/strange")
    assert not (tmp_path / "escaped").exists() and not list(tmp_path.rglob("checkpoint*"))


@pytest.mark.slow
def test_what_cannot_be_sent_lets_the_others_pass(
    server, smoke_recipe, tmp_path, monkeypatch, capsys, caplog
):
    """Its files were removed by hand, or the Hub refuses it."""
    hold = PushList.hold

    def broken(self, revision, files):
        hold(self, revision, files)
        if revision.branch == "step-000000010":
            shutil.rmtree(self.place_of(revision))

    monkeypatch.setattr(PushList, "hold", broken)
    server.faults = [Fault("POST .*/commit/step-000000020", 403, times=9)]
    folder = tmp_path / "run"
    _train(smoke_recipe, folder, *PUSH, "--hub.branches", "true")
    out = capsys.readouterr().out
    assert "checkpoint-10 (step-000000010): its files are gone, and it will not be" in caplog.text
    assert "not on the Hub: checkpoint-20 (step-000000020)\n" in out
    assert server.titles(NAME)[-1] == "The result after 20 updates"
    server.faults = []
    assert publish.main(["--run", str(folder)]) == 0
    assert server.titles(NAME, "step-000000020")[-1] == "After 20 updates"


@pytest.mark.slow
def test_a_run_that_had_finished_is_pushed_when_it_is_asked_for(
    server, smoke_recipe, run_copy, capsys
):
    for name in ("run", "renamed"):
        _train(
            smoke_recipe, run_copy, "--training.push_to_hub", "true",
            "--training.hub_model_id", f"{USER}/{name}",
        )  # fmt: skip
        assert server.titles(f"{USER}/{name}")[-1] == "The result after 20 updates"
        assert f"on the Hub, {USER}/{name}: checkpoint-10 (main)" in capsys.readouterr().out


@pytest.mark.slow
def test_checkpoints_that_were_never_offered_are_sent_by_the_next_start(
    server, smoke_recipe, tmp_path, monkeypatch
):
    """Its process was killed between the two."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(pushing.Pusher, "offer", lambda *_: None)
        _train(smoke_recipe, folder, *PUSH, "--training.max_steps", "10")
    assert server.titles(NAME)[1:] == ["The result after 10 updates"]
    _train(smoke_recipe, folder, *PUSH, "--hub.branches", "true")
    assert server.titles(NAME, "step-000000010")[-1].startswith("After 10")


@pytest.mark.slow
def test_the_printed_command_sends_what_a_stopped_run_could_not(
    server, smoke_recipe, tmp_path, monkeypatch, capsys
):
    server.faults = [Fault("POST .*/commit/", "drop", times=99)]
    folder = tmp_path / "run"

    def stop(*_):
        raise RuntimeError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.trainer.PretrainingTrainer.save_result", stop)
        with pytest.raises(RuntimeError, match="stopped here"):
            _train(smoke_recipe, folder, *PUSH)
    assert len(PushList(folder).waiting) == 2
    server.faults = []
    assert publish.main(["--run", str(folder)]) == 0
    assert server.titles(NAME)[1:] == ["After 10 of 20 updates", "After 20 updates"]
    assert not PushList(folder).waiting and len(PushList(folder).sent) == 2
    with pytest.raises(InputError, match="the run is not finished"):
        publish.main(["--run", str(folder)])
    _train(smoke_recipe, folder, *PUSH)
    assert server.titles(NAME)[-1] == "The result after 20 updates"
    assert len(server.titles(NAME)) == 4


# -- the list -------------------------------------------------------------------------------------


@pytest.fixture
def push_list(tmp_path):
    found = PushList(tmp_path)
    found.name_place("user/model", is_private=True)
    return found


def _hold(push_list, name, branch="main", content=b"weights"):
    revision = Revision(name, branch, 1, "title")
    push_list.hold(revision, {"model.safetensors": content})
    return revision


def test_what_waits_is_known_to_whoever_comes_next(push_list, tmp_path):
    first, second = (_hold(push_list, f"checkpoint-{n}") for n in (1, 2))
    again = PushList(tmp_path)
    assert again.waiting == [first, second] and again.repo_id == "user/model"
    again.mark_sent(again.waiting[0], "abc")
    assert [r.name for r in PushList(tmp_path).waiting] == ["checkpoint-2"]
    assert list((tmp_path / PLACE).iterdir()) == [push_list.place_of(second)]
    assert PushList(tmp_path).said() == (
        "on the Hub, user/model: checkpoint-1 (main)\nnot on the Hub: checkpoint-2 (main)\n"
        f"Send them: python pipeline/publish.py --run {tmp_path}"
    )


def test_a_file_that_training_removes_is_held_and_takes_no_other_place(push_list, tmp_path):
    source = tmp_path / "model.safetensors"
    source.write_bytes(b"weights")
    revision = _hold(push_list, "checkpoint-1", content=source)
    held = push_list.place_of(revision) / "model.safetensors"
    assert held.stat().st_ino == source.stat().st_ino
    source.unlink()
    assert held.read_bytes() == b"weights"


def test_a_revision_that_is_being_held_is_not_removed_by_one_that_is_sent(push_list, monkeypatch):
    first, linked = _hold(push_list, "checkpoint-1"), []

    def slowly(source, target):
        sender = threading.Thread(target=push_list.mark_sent, args=(first, "abc"))
        sender.start()
        sender.join(0.1)
        linked.append(sender)
        shutil.copyfile(source, target)

    monkeypatch.setattr(push_list_room, "_link", slowly)
    second = _hold(push_list, "checkpoint-2", content=Path(__file__))
    linked[0].join()
    assert push_list.place_of(second).is_dir() and not push_list.place_of(first).exists()
    assert push_list.waiting == [second]


def test_without_hard_links_files_are_copied(push_list, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("not here")

    monkeypatch.setattr(os, "link", refuse)
    source = tmp_path / "model.safetensors"
    source.write_bytes(b"weights")
    revision = _hold(push_list, "checkpoint-1", content=source)
    assert (push_list.place_of(revision) / "model.safetensors").read_bytes() == b"weights"


def test_of_the_branch_of_the_newest_only_the_newest_waits(push_list):
    for number in (1, 2, 3):
        _hold(push_list, f"checkpoint-{number}", "last-checkpoint")
        _hold(push_list, f"checkpoint-{number}", "main")
    assert [r.said for r in push_list.waiting] == [
        "checkpoint-3 (last-checkpoint)", "checkpoint-1 (main)", "checkpoint-2 (main)",
        "checkpoint-3 (main)",
    ]  # fmt: skip


def test_a_full_disk_lets_the_oldest_go_but_never_the_only_one(push_list, tmp_path):
    for number in (1, 2):
        _hold(push_list, f"checkpoint-{number}")
        _hold(push_list, f"checkpoint-{number}", f"step-{number}")
    assert push_list.give_up_oldest().said == "checkpoint-1 (main)"
    assert push_list.give_up_oldest().said == "checkpoint-1 (step-1)"
    assert {r.name for r in push_list.waiting} == {"checkpoint-2"}
    assert push_list.give_up_oldest() is None
    assert len(list((tmp_path / PLACE).iterdir())) == 2


def test_what_was_sent_elsewhere_does_not_count(push_list):
    push_list.mark_sent(_hold(push_list, "checkpoint-1"), "abc")
    waits = _hold(push_list, "checkpoint-2")
    push_list.name_place("user/other", is_private=False)
    assert push_list.sent == [] and push_list.waiting == [waits]
    assert not push_list.has("checkpoint-1", 1) and push_list.has("checkpoint-2", 1)


def test_a_list_that_cannot_be_read_is_set_aside_with_its_files(push_list, tmp_path, caplog):
    held = push_list.place_of(_hold(push_list, "checkpoint-1")).name
    (tmp_path / "hub_status.json").write_text('{"repo_id": 3}')
    assert PushList(tmp_path).repo_id is None and not PushList(tmp_path).waiting
    assert (tmp_path / "_hub.damaged-1" / held / "model.safetensors").exists()
    assert "hub_status.json cannot be read, and is now hub_status.json.damaged-1" in caplog.text


def test_what_is_being_sent_stays_whatever_comes_after_it(push_list):
    """The newest of a branch, the same checkpoint after a rollback, a full disk."""
    newest = _hold(push_list, "checkpoint-1", "last-checkpoint")
    push_list.in_flight = newest
    _hold(push_list, "checkpoint-2", "last-checkpoint")
    assert push_list.place_of(newest).is_dir()
    push_list.mark_sent(newest, "abc")
    old = push_list.in_flight = push_list.waiting[0]
    again = _hold(push_list, "checkpoint-2", "last-checkpoint")
    assert push_list.place_of(old).is_dir() and push_list.place_of(again).is_dir()
    assert push_list.give_up_oldest() is None
    push_list.mark_sent(old, "def")
    assert push_list.waiting == [again] and push_list.place_of(again).is_dir()


def test_what_is_given_up_makes_room_before_the_list_is_written(push_list, monkeypatch):
    old = [_hold(push_list, f"checkpoint-{number}") for number in (1, 2)][0]

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.artifact.write_whole", full)
    with pytest.raises(OSError):
        push_list.give_up_oldest()
    assert not push_list.place_of(old).exists()


@pytest.mark.parametrize(
    "code, out, errors, expected",
    [
        (0, "x\nmain: abc\n", "", "abc"),
        (75, "retry_after: 7\n", "error: no luck; later\n", ("no luck; later", 7.0, False)),
        (2, "", "error: refused\n", ("refused", None, True)),
        (-9, "", "", ("the process that sends it ended with code -9", None, False)),
        (0, "nothing", "", ("the process that sends it ended with code 0", None, False)),
    ],
)
def test_how_a_push_ended(code, out, errors, expected):
    assert push_process.outcome(code, out, errors, "main") == expected
