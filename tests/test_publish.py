"""What is published is what the list says, where it was told to, and nothing that is secret."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from huggingface_hub import ModelCard
from loopback_hub import USER, WRITE, Fault, LoopbackHub
from run_folders import history, make_unfinished, write_run

from pipeline import artifact, hub_client, publish
from pipeline.model_card import model_card
from pipeline.recipe import InputError
from pipeline.run_record import read_run

NAME = f"{USER}/model"
MODEL = {
    "config.json": b'{"n_layer": 4, "n_embd": 128}',
    "generation_config.json": b"{}",
    "model.safetensors": b"weights\0" * 100,
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
}
STATE = {
    "optimizer.pt": b"moments\0",
    "scheduler.pt": b"place\0",
    "rng_state.pth": b"dice\0",
    "trainer_state.json": json.dumps({"log_history": history(20)}).encode(),
}


@pytest.fixture
def server(monkeypatch):
    with LoopbackHub(keeps_bodies=True) as running:
        running.seen_by(monkeypatch)
        monkeypatch.setattr(hub_client.time, "sleep", lambda _: None)
        yield running


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run with one checkpoint."""
    folder = write_run(tmp_path / "run")
    for name, content in MODEL.items():
        (folder / name).write_bytes(content)
    (folder / "curves.png").write_bytes(b"\x89PNG\0")
    (folder / "report.html").write_text("a page")
    (folder / "README.md").write_text(model_card(read_run(folder)))
    with artifact.staged(folder / "checkpoint-20", {"recipe": {}}) as (staging, _):
        for name, content in {**MODEL, **STATE}.items():
            (staging / name).write_bytes(content)
    return folder


def published(run: Path, *options: str, name: str | None = NAME) -> int:
    where = [] if name is None else ["--repo_id", name]
    return publish.main(["--run", str(run), *where, *options])


def test_a_finished_run_is_sent_with_its_card(server, run, capsys):
    assert published(run, "--license", "mit", "--language", "en", "code") == 0
    files = server.files(NAME)
    assert set(files) == {
        *MODEL, "README.md", "curves.png", "metrics.json", "history.json", "config.yaml",
        "samples.txt", "pipeline_run.json",
    }  # fmt: skip
    for name in ("model.safetensors", "metrics.json", "curves.png", "pipeline_run.json"):
        assert files[name] == (run / name).read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit" and card.data.language == ["en", "code"]
    assert f'pipeline("text-generation", "{NAME}")' in card.text
    assert len(card.data.eval_results) == 6 and "## Repeat it" in card.text
    recipe = yaml.safe_load(files["config.yaml"])
    assert recipe["data"]["files"] == ["book.txt"] and "output_dir" not in recipe["training"]
    assert server.repository(NAME).private
    assert server.titles(NAME)[1:] == ["The result after 40 updates"]
    said = capsys.readouterr().out
    assert f"{run} -> {server.url}/{NAME} (private, branch main)" in said
    assert "stays here: blocks/, checkpoint-20/, report.html, run_status.json\n" in said
    assert f"{server.url}/{NAME} (private: who loads it needs HF_TOKEN or a login; " in said
    assert f'write = pipeline("text-generation", "{NAME}")\n' in said
    assert said.splitlines()[-1] == f"main: {server.history(NAME)[0].oid}"
    # Once more: it is there.
    assert published(run, "--license", "mit", "--language", "en", "code") == 0
    assert capsys.readouterr().out == said and len(server.history(NAME)) == 2


def test_a_card_that_was_edited_keeps_the_edits(server, run):
    card = (run / "README.md").read_text()
    (run / "README.md").write_text(card.replace("# run\n", "# My model\n\nAbout it.\n"))
    published(run)
    sent = server.files(NAME)["README.md"].decode()
    assert "# My model\n\nAbout it.\n" in sent and f'"{NAME}"' in sent and "path/to" not in sent
    (run / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(InputError, match="README.md: its metadata cannot be read"):
        published(run)


def test_a_dry_run_shows_all_and_contacts_nobody(server, run, capsys):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert published(run, "--dry_run") == 0
    said = capsys.readouterr().out
    assert re.search(r"^ +800  model.safetensors$", said, re.MULTILINE)
    total, count = re.search(r"([\d,]+)  bytes in (\d+) files", said).groups()
    sizes = re.findall(r"^ +([\d,]+)  \S+$", said, re.MULTILINE)
    assert len(sizes) == int(count) == 12
    assert sum(int(s.replace(",", "")) for s in sizes) == int(total.replace(",", ""))
    assert "no license is stated" in said and "## Results on held-out text" in said
    assert said.endswith("nothing was sent (--dry_run)\n") and not server.log
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_checkpoint_goes_to_a_branch_and_says_how_far_it_is(server, run, capsys):
    published(run)
    assert published(run, "--checkpoint", "checkpoint-20") == 0
    files = server.files(NAME, "step-000000020")
    assert set(files) == {*MODEL, "README.md", "config.yaml", "pipeline_run.json"}
    card = ModelCard(files["README.md"].decode())
    assert "A checkpoint after 20 of 40 updates, before training had ended." in card.text
    assert f'"{NAME}", revision="step-000000020")' in card.text
    assert "/usr/bin is 20" in card.text and "/usr/bin is 30" not in card.text
    assert {r.dataset_split for r in card.data.eval_results} == {"validation"}
    assert server.titles(NAME, "step-000000020")[-1] == "After 20 of 40 updates"
    assert "curves.png" in server.files(NAME)
    capsys.readouterr()


def test_a_whole_checkpoint_can_be_gone_on_from(server, run, tmp_path, capsys):
    published(run, "--checkpoint", "checkpoint-20", "--whole", "--revision", "main")
    assert "manifest.json names the files of the text" in capsys.readouterr().out
    folder = tmp_path / "back" / "checkpoint-20"
    folder.mkdir(parents=True)
    for name, content in server.files(NAME).items():
        (folder / name).write_bytes(content)
    assert artifact.damage(folder) is None and set(STATE) <= {p.name for p in folder.iterdir()}
    # The result takes its place: no state of the optimizer stays beside it.
    published(run)
    assert not set(STATE) & set(server.files(NAME))


def test_what_cannot_be_published_is_told_before_anybody_is_asked(server, run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    unfinished = make_unfinished(write_run(tmp_path / "unfinished"))
    bare = make_unfinished(write_run(tmp_path / "bare"))
    (bare / "checkpoint-20" / "trainer_state.json").unlink()
    (bare / "checkpoint-20").rmdir()
    (run / "checkpoint-20" / "optimizer.pt").write_bytes(b"xxxxxxx\0")
    for folder, options, words in [
        (tmp_path / "none", [], "none: no such folder; name that of a finished run"),
        (empty, [], "empty: holds no model (model.safetensors is missing)"),
        (empty, ["--checkpoint", "checkpoint-1"], "holds no run"),
        (unfinished, [], "the run is not finished (preempted); publish what it has with "
         "--checkpoint checkpoint-20, or let it end"),
        (bare, [], "(preempted); it has no checkpoint that could be published either"),
        (run, ["--checkpoint", "checkpoint-7"], "no checkpoint of"),
        (run, ["--checkpoint", "checkpoint-20"], "optimizer.pt differs from what was written"),
        (run / "checkpoint-20", [], "is a checkpoint; publish it with --run"),
        (run, ["--whole"], "--whole has a meaning with --checkpoint only"),
        (run, ["--space", "--checkpoint", "checkpoint-20"], "--space shows a finished model"),
        (run, ["--license", "MIT"], "license 'MIT' is none that the Hub knows; did you mean mit?"),
        (run, ["--language", "English"], "language 'English' is no code of one"),
        (run, ["--revision", "a b"], "'a b': no name of a branch"),
    ]:  # fmt: skip
        with pytest.raises(InputError) as caught:
            published(folder, *options)
        assert words in str(caught.value)
    with pytest.raises(InputError, match="--repo_id is missing: where to, USER/NAME"):
        published(run, name=None)
    assert not server.log


def test_the_recipe_says_where_to(server, run):
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe["training"] |= {
        "push_to_hub": True, "hub_model_id": "org/of-the-recipe", "hub_private_repo": False,
    }  # fmt: skip
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    published(run, name=None)
    assert not server.repository("org/of-the-recipe").private
    sent = yaml.safe_load(server.files("org/of-the-recipe")["config.yaml"])
    assert sent["training"] == {"max_steps": 40, "learning_rate": 1e-3}


def test_another_run_s_repository_is_left_alone(server, run, tmp_path):
    published(run)
    other = write_run(tmp_path / "other")
    (other / "model.safetensors").write_bytes(b"others\0")
    with pytest.raises(InputError, match="holds another model.*publish.py --force"):
        published(other)
    assert server.files(NAME)["model.safetensors"] == MODEL["model.safetensors"]
    published(other, "--force")
    assert server.files(NAME)["model.safetensors"] == b"others\0"
    assert "curves.png" not in server.files(NAME)


def test_a_model_s_folder_is_sent_as_it_is(server, tmp_path, capsys):
    folder = tmp_path / "converted"
    folder.mkdir()
    for name, content in MODEL.items():
        (folder / name).write_bytes(content)
    (folder / "notes.txt").write_text("mine")
    published(folder, "--license", "apache-2.0", "--private", "false")
    assert set(server.files(NAME)) == {*MODEL, "README.md", "pipeline_run.json"}
    assert ModelCard(server.files(NAME)["README.md"].decode()).data.license == "apache-2.0"
    assert not server.repository(NAME).private and "private" not in capsys.readouterr().out
    assert not (folder / "pipeline_run.json").exists()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# By hand\n")
    published(folder, "--private", "false")  # the same weights are the same model
    assert server.files(NAME)["README.md"] == b"---\nlicense: mit\n---\n# By hand\n"
    (folder / "model.safetensors").write_bytes(b"new\0")
    with pytest.raises(InputError, match="holds another model"):
        published(folder, "--private", "false")


def test_a_prepared_revision_is_sent_at_once(server, run, tmp_path, capsys):
    published(run)
    folder = tmp_path / "prepared"
    folder.mkdir()
    for name, content in {**MODEL, **STATE, "config.yaml": b"{}"}.items():
        (folder / name).write_bytes(content)
    (folder / "pipeline_run.json").write_bytes((run / "pipeline_run.json").read_bytes())
    asked = len(server.log)
    options = ["--prepared", "--whole", "--revision", "step-000000030", "--title", "after 30"]
    assert published(folder, *options) == 0
    assert server.titles(NAME, "step-000000030")[-1] == "after 30"
    assert set(STATE) <= set(server.files(NAME, "step-000000030"))
    assert not any("whoami" in r["path"] or "create" in r["path"] for r in server.log[asked:])
    assert capsys.readouterr().out.endswith(
        f"step-000000030: {server.history(NAME, 'step-000000030')[0].oid}\n"
    )


def test_a_page_to_try_the_model_is_made_beside_it(server, run, monkeypatch, capsys):
    asked = []

    def space_files(model_repo_id, **more):
        asked.append((model_repo_id, more))
        return {"app.py": b"import gradio", "README.md": b"---\nsdk: gradio\n---\n"}

    stand_in = types.SimpleNamespace(space_files=space_files)
    monkeypatch.setitem(sys.modules, "pipeline.space", stand_in)
    published(run, "--space", "--license", "mit")
    assert asked == [
        (NAME, {"title": "model", "prompts": ["/usr/bin is", "Once"], "is_adapter": False,
                "is_private": True, "license": "mit"})
    ]  # fmt: skip
    space = server.repository(f"{NAME}-demo", "spaces")
    assert space.private and space.sdk == "gradio"
    assert set(server.files(space.name, kind="spaces")) == {
        "app.py", "README.md", "pipeline_run.json",
    }  # fmt: skip
    said = capsys.readouterr().out.splitlines()
    page = f"{server.url}/spaces/{NAME}-demo"
    assert said[-2] == (
        f"the page to try it: {page} (the model is private: it works when {page}/settings has a "
        "secret HF_TOKEN that may read it)"
    )
    assert said[-1].startswith("main: ")
    server.put(f"{USER}/second-demo", {"app.py": b"a stranger's"}, kind="spaces", private=True)
    with pytest.raises(InputError, match="second-demo: holds another space"):
        published(run, "--space", name=f"{USER}/second")
    assert "model.safetensors" in server.files(f"{USER}/second")


@pytest.mark.slow
def test_exit_codes_tell_what_may_work_later(run, tmp_path):
    """As a child of a run that goes on: one sentence, a code, the commit in the last line."""
    (run / "config.yaml").unlink()  # a model's folder: no torch is imported for it
    with LoopbackHub() as server:

        def started(*options: str, token: str = WRITE) -> subprocess.CompletedProcess:
            return subprocess.run(
                [sys.executable, "-m", "pipeline.publish", "--run", run, "--repo_id", NAME,
                 "--attempts", "1", *options],
                env=os.environ | {"PYTHONPATH": str(ROOT)}
                | server.environment(tmp_path / "home", token=token),
                capture_output=True, text=True, timeout=60,
            )  # fmt: skip

        server.faults = [Fault("POST .*/commit/", (429, {"Retry-After": "9"}))]
        found = started()
        assert found.returncode == 75 and found.stderr == (
            f"error: {NAME}: {server.url[7:]} answers 429 (fault 429); the same command tries it "
            "again\n"
        )
        assert found.stdout.splitlines()[-1] == "retry_after: 9"
        found = started()
        assert found.returncode == 0 and found.stderr == ""
        assert found.stdout.splitlines()[-1] == f"main: {server.history(NAME)[0].oid}"
        found = started(token="hf_" + "x" * 34)
        assert found.returncode == 2 and found.stderr.startswith(f"error: {NAME}: 127.0.0.1")
        assert "refuses the token (401)" in found.stderr and found.stderr.count("\n") == 1


def test_nothing_secret_leaves_or_is_left(server, run, monkeypatch, capfd, caplog):
    canary = "hf_CANARY" + "0" * 26
    server.tokens[canary] = server.tokens[WRITE]
    monkeypatch.setenv("HF_TOKEN", canary)
    secret = b"the corpus's CANARY"
    for name in (".env", "training_args.bin", "data.txt", "wandb.json", "run_status.json"):
        (run / name).write_bytes(b'{"state": "finished", "why": "CANARY"}')
    (run / "blocks" / "train.arrow").write_bytes(secret)
    (run / "checkpoint-20" / "training_args.bin").write_bytes(b"CANARY")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    server.faults = [
        Fault("POST .*/commit/", (503, {"X-Error-Message": f"Bearer {canary} is tired"})),
        Fault("POST .*/commit/", (403, {"X-Error-Message": f"Bearer {canary} may not"})),
    ]
    with pytest.raises(InputError, match="Bearer hf_... may not"):
        published(run)
    published(run)
    published(run, "--checkpoint", "checkpoint-20", "--whole")
    said = capfd.readouterr()
    assert "Bearer hf_... is tired" in caplog.text
    sent = [
        f"{r['path']} { {k: v for k, v in r['headers'].items() if k.lower() != 'authorization'} }"
        for r in server.log
    ]
    assert server.bodies and any(b"weights" in body for body in server.bodies)
    for place in (*server.bodies, *server.blobs.values(), said.out, said.err, caplog.text, *sent):
        assert "CANARY" not in (place if isinstance(place, str) else place.decode("latin-1"))
    after = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    new = {p.name: data for p, data in after.items() if p not in before}
    assert set(new) == {"pipeline_run.json"} and b"CANARY" not in new["pipeline_run.json"]
    assert {p: data for p, data in after.items() if p in before} == before
    for request in server.log:
        if "/_store" in request["path"]:
            assert "authorization" not in {name.lower() for name in request["headers"]}


LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
name, *revisions = sys.argv[1:]
for revision in revisions:
    model = AutoModelForCausalLM.from_pretrained(name, revision=revision)
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    ids = tokenizer("def read(self):", return_tensors="pt").input_ids
    print(model(ids, labels=ids).loss.item())
"""


@pytest.mark.slow
def test_a_published_run_and_checkpoint_can_be_loaded(server, run_copy, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    published(run_copy)
    published(run_copy, "--checkpoint", "checkpoint-10")
    found = subprocess.run(
        [sys.executable, "-c", LOAD, NAME, "main", "step-000000010"],
        env=os.environ | server.environment(tmp_path / "home"),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    losses = list(map(float, found.stdout.split()))
    for folder, loss in zip((run_copy, run_copy / "checkpoint-10"), losses, strict=True):
        ids = AutoTokenizer.from_pretrained(folder)(
            "def read(self):", return_tensors="pt"
        ).input_ids
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert loss == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)
    assert losses[0] != losses[1]
