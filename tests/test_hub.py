"""A push is there whole or not at all, is never sent twice, and fails in one sentence."""

import re
import threading
import time

import pytest
from huggingface_hub import constants
from loopback_hub import READ, USER, WRITE, Fault, LoopbackHub

from pipeline import hub, hub_client
from pipeline.recipe import InputError

NAME = f"{USER}/model"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights\0" * 1000,
    "README.md": b"---\nlicense: mit\n---\n# card\n",
}
OURS = {**FILES, "pipeline_run.json": b'{"run": "one"}\n'}


@pytest.fixture
def server(monkeypatch):
    with LoopbackHub() as running:
        running.seen_by(monkeypatch)
        monkeypatch.setattr(hub_client, "time", Clock())
        yield running
    for thread in threading.enumerate():
        if thread.name == "asks the Hub":  # given up by us; it would ask the next test's server
            thread.join(10)


class Clock:
    """Waits that are noted instead of waited."""

    def __init__(self):
        self.waits = []

    def sleep(self, seconds):
        self.waits.append(seconds)


def push(files=FILES, **more):
    return hub.push(files, NAME, **({"identity": "one", "title": "first"} | more))


def check(name=NAME, **more):
    with hub.at_the_start():
        return hub.access(name, **({"identity": "one"} | more))


def test_a_repository_is_made_private_and_filled_in_one_commit(server):
    access = check()
    assert access == (USER, f"{server.url}/{NAME}", True, "nothing")
    assert server.repository(NAME).private
    head = push()
    assert server.files(NAME) == OURS and server.titles(NAME) == ["initial commit", "first"]
    assert server.repository(NAME).branches == {"main": head}
    assert check().holds == "ours"
    assert server.counted("POST .*/commit/") == 1


def test_what_is_there_is_not_sent_again_and_what_is_gone_goes(server, tmp_path):
    check()
    head = push({**FILES, "optimizer.pt": b"state\0"}, title="whole")
    server.put(NAME, {"LICENSE": b"words", "notes/a.md": b"a stranger's"})
    before = server.repository(NAME).branches["main"]
    log = len(server.log)
    assert push({**FILES, "optimizer.pt": b"state\0"}, title="again") == before != head
    assert not any(r["method"] == "POST" for r in server.log[log:])
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(FILES["model.safetensors"])
    push({"config.json": b"{1}", "model.safetensors": weights}, title="smaller")
    strangers = {"LICENSE": b"words", "notes/a.md": b"a stranger's"}
    kept = {n: OURS[n] for n in ("model.safetensors", "pipeline_run.json")}
    assert server.files(NAME) == kept | strangers | {"config.json": b"{1}"}
    assert server.counted("PUT /_store") == 2


def test_a_branch_is_made_for_a_checkpoint(server):
    check()
    push(title="on main")
    changed = {**FILES, "config.json": b"[2]"}
    head = push(changed, revision="step-000000002", title="after 2")
    assert server.files(NAME, "step-000000002") == {**OURS, "config.json": b"[2]"}
    assert server.files(NAME) == OURS
    assert push(changed, revision="step-000000002") == head
    assert check(revision="step-000000002").holds == "ours"


def test_another_model_is_not_replaced_unless_that_is_said(server):
    server.put(NAME, {"config.json": b"theirs", "pytorch_model.bin": b"0"}, private=True)
    for attempt in (check, push):
        with pytest.raises(InputError, match="holds another model, which this would replace"):
            attempt()
    assert server.files(NAME)["config.json"] == b"theirs"
    assert check(overwrite=True).holds == "another's"
    push(overwrite=True)
    with pytest.raises(InputError, match="holds another model"):
        push(identity="two")
    assert check().holds == "ours"


def test_a_card_alone_is_no_model(server):
    server.put(NAME, {"README.md": b"soon", "LICENSE": b"mit"}, private=True)
    assert check().holds == "nothing"
    push()
    assert server.files(NAME) == {**OURS, "LICENSE": b"mit"}


def test_only_files_of_the_list_are_sent(server):
    for name in ("training_args.bin", ".env", "train.arrow", "data/config.json", "report.html"):
        assert not hub.is_sent(name, whole=True)
        with pytest.raises(AssertionError):
            push({name: b"x"})
    assert hub.is_sent("rng_state_1.pth", whole=True) and not hub.is_sent("optimizer.pt")
    assert hub.is_sent("model-00001-of-00002.safetensors") and not server.log


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        ("model", "main", "'model': no name of a repository; write it USER/NAME"),
        ("a/b/c", "main", "no name of a repository"),
        ("user/a--b", "main", "no name of a repository: Cannot have -- or .."),
        ("user/so so", "main", "no name of a repository"),
        (NAME, "a..b", "'a..b': no name of a branch"),
        (NAME, "refs/pr/1", "no name of a branch"),
    ],
)
def test_malformed_names_are_told_before_anybody_is_asked(server, name, revision, words):
    with pytest.raises(InputError, match=re.escape(words)):
        check(name, revision=revision)
    assert not server.log


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (None, "user/model: there is no token; make one that may write at http://127"),
        ("hf_" + "x" * 34, "refuses the token (401); make one"),
        (READ, "the token may only read; make one that may write"),
    ],
)
def test_a_token_that_cannot_write_is_told_at_the_start(server, monkeypatch, token, words):
    server.seen_by(monkeypatch, token=token)
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        check()
    assert not server.repositories and str(token) not in str(caught.value)


def test_a_right_that_is_missing_for_this_repository_is_told_at_the_start(server):
    server.put("stranger/model", {"README.md": b""})
    with pytest.raises(InputError, match="may not write there .403: You don't have the rights"):
        check("stranger/new")
    with pytest.raises(InputError, match="may not write there .403"):
        check("stranger/model", private=False)
    assert check("org/new").is_private


def test_a_public_repository_is_not_filled_by_a_private_run(server):
    server.put(NAME, {"README.md": b""})
    with pytest.raises(InputError, match="is public; make it private at .*hub_private_repo false"):
        check()
    assert not check(private=False).is_private


def test_a_hub_out_of_reach_is_told_with_the_way_out(server, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError) as caught:
        check()
    assert re.fullmatch(
        r"user/model: 127.0.0.1:9 cannot be reached \(.*refused.*\); start again later, or train "
        r"without it \(--training.push_to_hub false\) and send the result afterwards with "
        r"publish.py",
        str(caught.value),
    )
    assert hub_client.time.waits == [1, 2]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set, so that nothing can be sent"):
        check()


@pytest.mark.parametrize("where", ["whoami", "repos/create", "preupload", "tree"])
@pytest.mark.parametrize("how", ["hang", "slow:20"])
def test_a_server_that_says_nothing_costs_the_stated_time(server, monkeypatch, where, how):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the library's own waits, afterwards
    server.faults = [Fault(where, how, times=9)]
    began = time.monotonic()
    with pytest.raises(InputError, match="has not answered within 0.3 s; start again later"):
        check(seconds=0.3)
    assert time.monotonic() - began < 2


def test_what_passes_is_waited_for(server):
    check()
    server.faults = [
        Fault("POST .*/commit/", 503),
        Fault("POST .*/commit/", (429, {"Retry-After": "7"})),
        Fault("GET .*/revision/", "drop"),
    ]
    push()
    assert server.files(NAME) == OURS and hub_client.time.waits == [1, 2, 7]
    server.faults = [Fault("GET .*/revision", (429, {"Retry-After": "3600"}))]
    with pytest.raises(hub.Temporary, match="answers 429") as caught:
        push()
    assert caught.value.retry_after == 3600 and len(hub_client.time.waits) == 3


@pytest.mark.parametrize("fault", ["drop", "cut", "drop_after", 500, 409, 412])
def test_a_push_that_goes_wrong_is_there_once(server, fault):
    check()
    server.faults = [Fault("POST .*/commit/", fault)]
    head = push()
    assert server.titles(NAME) == ["initial commit", "first"] and server.files(NAME) == OURS
    assert server.repository(NAME).branches["main"] == head == push()
    server.faults = [Fault("POST .*/commit/", fault)]
    with pytest.raises(hub.Temporary):
        push({**FILES, "config.json": b"new"}, attempts=1)


def test_two_writers_at_once_do_not_mix(server):
    check()
    server.faults = [Fault("POST .*/commit/", "slow:2000")]  # the body takes long to arrive
    found = []
    slow = threading.Thread(target=lambda: found.append(push(title="slow")))
    slow.start()
    while not server.counted("POST .*/commit/"):
        time.sleep(0.01)
    server.put(NAME, {"LICENSE": b"meanwhile"})
    slow.join()
    assert server.titles(NAME) == ["initial commit", "by hand", "slow"]
    assert server.files(NAME) == {**OURS, "LICENSE": b"meanwhile"}
    assert server.counted("POST .*/commit/") == 2 and found == [server.history(NAME)[0].oid]


@pytest.mark.parametrize("fault", ["wrong_sha", 403])
def test_a_store_that_refuses_bytes_gets_them_again(server, fault):
    check()
    server.faults = [Fault("PUT /_store", fault)]
    push()
    assert server.files(NAME) == OURS and hub_client.time.waits == [1]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (400, "answers 400 (fault 400)"),
        (401, "refuses the token (401)"),
        (403, "the token may not write there (403: fault 403)"),
        (413, "answers 413 (fault 413)"),
    ],
)
def test_what_does_not_pass_is_not_tried_again(server, fault, words):
    check()
    server.faults = [Fault("POST .*/commit/", fault)]
    with pytest.raises(hub.Permanent, match=re.escape(words)):
        push()
    assert server.counted("POST .*/commit/") == 1 and not hub_client.time.waits


def test_a_repository_that_is_gone_and_a_card_that_is_refused_are_told(server, tmp_path):
    with pytest.raises(hub.Permanent, match="404 .Repository not found.; see whether the name"):
        push()
    check()
    with pytest.raises(hub.Permanent, match="README.md: .license. must be a string"):
        push({"README.md": b"---\nlicense: [mit]\n---\n"})
    with pytest.raises(hub.Permanent, match="gone.json. is not a file"):
        push({"config.json": tmp_path / "gone.json"})
    assert server.titles(NAME) == ["initial commit"]


def test_no_token_stands_in_what_is_said(server):
    check()
    echo = {"X-Error-Message": f"bad header: Bearer {WRITE}, hf_{'o' * 20}"}
    for status in (400, 403, 500):
        server.faults = [Fault("POST .*/commit/", (status, echo))]
        with pytest.raises((hub.Permanent, hub.Temporary)) as caught:
            push(attempts=1)
        assert "bad header: Bearer hf_... hf_... fault" in str(caught.value)
        assert caught.value.__cause__ is None and caught.value.__context__ is None


def test_any_mix_of_faults_leaves_one_commit_of_each_push(server, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the library's own waits
    check()
    for seed in range(12):
        server.random_faults(seed, 0.3)
        files = {**FILES, "config.json": str(seed).encode(), "model.safetensors": b"%d\0" % seed}
        for _ in range(50):
            try:
                head = push(files, title=f"push {seed}")
                break
            except hub.Temporary:
                pass
        server.random_faults(seed, 0)
        assert server.files(NAME) == {**OURS, **files} and server.history(NAME)[0].oid == head
    assert server.titles(NAME)[1:] == [f"push {seed}" for seed in range(12)]
