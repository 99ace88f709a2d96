"""Every door has a pulse, in the order a user walks through them, and as it is typed."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT, make_texts

from pipeline import artifact, generate, measure_perplexity, prepare_data, pretrain, train_tokenizer
from pipeline.corpus import SPLITS
from pipeline.recipe import InputError, read_recipe
from pipeline.row_file import RowFile
from pipeline.row_tables import describe


def test_from_text_to_text(smoke_recipe, tmp_path, capsys):
    common = ["--config", str(smoke_recipe), "--training.output_dir", str(tmp_path)]
    train_tokenizer.main(common)
    assert "tokenizer of 512 entries" in capsys.readouterr().out
    before = (tmp_path / "tokenizer" / "tokenizer.json").stat().st_mtime_ns

    prepare_data.main([*common, "--num_proc", "2"])
    table = capsys.readouterr().out
    assert "rows in" in table
    blocks = (tmp_path / "blocks" / "train.arrow").stat().st_mtime_ns

    pretrain.main(common)
    assert "bits per byte" in capsys.readouterr().out
    # What the earlier doors made was used, not made again.
    assert (tmp_path / "tokenizer" / "tokenizer.json").stat().st_mtime_ns == before
    assert (tmp_path / "blocks" / "train.arrow").stat().st_mtime_ns == blocks

    text = tmp_path / "a.txt"
    text.write_text("the model reads text and learns what comes next.\n")
    numbers = tmp_path / "numbers.json"
    measure_perplexity.main(
        ["--model", str(tmp_path), "--files", str(text), "--json", str(numbers)]
    )
    assert json.loads(numbers.read_text())["models"][str(tmp_path)]["bytes"] < 50
    capsys.readouterr()

    arguments = ["--model", str(tmp_path), "--prompt", "the model", "--max_new_tokens", "8"]
    generate.main([*arguments, "--temperature", "0"])
    one = capsys.readouterr().out
    generate.main([*arguments, "--temperature", "0"])
    assert one.startswith("the model") and capsys.readouterr().out == one


def arguments_of(recipe, folder, **values):
    """A command line; `data__block_size=16` says --data.block_size 16."""
    words = ["--config", str(recipe), "--training.output_dir", str(folder)]
    for name, value in values.items():
        words += [f"--{name.replace('__', '.')}", str(value)]
    return words


def test_rows_are_shown_with_their_documents_apart(smoke_recipe, corpus_folder, tmp_path, capsys):
    common = arguments_of(smoke_recipe, tmp_path)
    prepare_data.main([*common, "--show", "3"])
    lines = capsys.readouterr().out.split(f"rows in {tmp_path / 'blocks'}\n")[1].splitlines()
    heads = [line for line in lines if line.startswith("--- row ")]
    count = len(RowFile.open(tmp_path / "blocks" / "train.arrow"))
    assert len(heads) == 3 and heads[0].startswith("--- row 0: ")
    assert heads[-1].startswith(f"--- row {count - 1:,}: ")
    assert all(re.fullmatch(r"--- row [\d,]+: \d+ document\(s\)", head) for head in heads)
    corpus = "".join(path.read_text() for path in sorted(corpus_folder.iterdir()))
    shown = "\n".join(lines).split(heads[1] + "\n")[1].split("\n--- row")[0]
    for part in re.split(r"\[a document (?:begins|goes on)\]\n", shown)[1:]:
        part = part.removesuffix("\n")
        assert part.removesuffix("<|endoftext|>").strip("\ufffd") in corpus


def test_a_second_time_nothing_is_prepared_again(smoke_recipe, tmp_path, capsys):
    common = arguments_of(smoke_recipe, tmp_path)
    prepare_data.main(common)
    assert capsys.readouterr().out.endswith(f"rows in {tmp_path / 'blocks'}\n")
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in tmp_path.rglob("*.*")}
    assert any(path.name == "train.arrow" for path in before)
    prepare_data.main(common)
    assert capsys.readouterr().out == f"rows in {tmp_path / 'blocks'}\n"
    after = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in tmp_path.rglob("*.*")}
    digests = tmp_path / "_digests-blocks.json"  # time stamps may have become old enough to trust
    before.pop(digests, None), after.pop(digests, None)
    assert after == before


def test_tokenizers_are_compared_by_bytes_per_token(
    smoke_recipe, corpus_folder, tokenizer, tmp_path, capsys
):
    other = tmp_path / "other"
    tokenizer.save_pretrained(other)
    common = arguments_of(smoke_recipe, tmp_path / "run")
    train_tokenizer.main([*common, "--compare", str(other)])
    out = capsys.readouterr().out
    assert f"tokenizer of 512 entries: {tmp_path / 'run' / 'tokenizer'}\n" in out
    head, line = out.splitlines()[-2:]
    assert head.split()[:3] == ["bytes", "per", "token"]
    assert head.endswith(str(other)[-24:]) and "this one" in head
    assert line.startswith(str(corpus_folder))
    texts = [path.read_text() for path in sorted(corpus_folder.iterdir())]
    size = sum(len(text.encode()) for text in texts)
    tokens = sum(map(len, tokenizer(texts)["input_ids"]))
    ours, theirs = map(float, line.split()[-2:])
    assert theirs == pytest.approx(size / tokens, abs=5e-4)
    assert ours > theirs > 1  # 512 entries against 384


@pytest.mark.slow
def test_a_mixture_is_trained_on_by_its_weights(smoke_recipe, corpus_folder, tmp_path, capsys):
    values = yaml.safe_load(smoke_recipe.read_text())
    files = sorted(map(str, corpus_folder.iterdir()))
    del values["data"]["files"]
    values["data"]["sources"] = [
        {"files": files[:80], "weight": 0.75, "name": "many"},
        {"files": files[80:], "weight": 0.25, "name": "few"},
    ]
    recipe = tmp_path / "mixture.yaml"
    recipe.write_text(yaml.safe_dump(values))
    pretrain.main(arguments_of(recipe, tmp_path / "run"))
    assert "bits per byte" in capsys.readouterr().out
    facts = artifact.read_manifest(tmp_path / "run" / "blocks")["facts"]
    rows = [source["rows"] for source in facts["sources"]]
    assert [source["name"] for source in facts["sources"]] == ["many", "few"] and min(rows) > 20
    table = describe(tmp_path / "run" / "blocks", read_recipe(recipe).data)
    shares = re.findall(r"^(?:many|few) .* ([\d.]+)%$", table, re.MULTILINE)
    assert list(map(float, shares)) == pytest.approx([75, 25], abs=1)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_run_with_documents_apart_is_measured_as_it_was_trained(
    smoke_recipe, tmp_path, monkeypatch, streaming
):
    """measure_perplexity.py repeats the numbers of the run on the files that were held out."""
    monkeypatch.setattr("pipeline.preparation.TOKENS_PER_SEGMENT", 32)
    files = []
    for number, text in enumerate(make_texts(6, seed=9)):
        files.append(tmp_path / f"held-{number}.txt")
        files[-1].write_text(text)
    common = arguments_of(
        smoke_recipe, tmp_path / "run", data__attend_across="false", data__streaming=streaming,
        data__packing="concatenate" if streaming == "true" else "best_fit", data__test_fraction=0,
        data__hold_out="documents",
    )  # fmt: skip
    pretrain.main([*common, "--data.validation_files", *map(str, files)])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["attend_across"] is False
    numbers = tmp_path / "numbers.json"
    measure_perplexity.main(
        ["--model", str(tmp_path / "run"), "--files", *map(str, files), "--json", str(numbers)]
    )
    found = json.loads(numbers.read_text())["models"][str(tmp_path / "run")]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for name in ("perplexity", "bits_per_byte", "word_perplexity", "accuracy", "mean_perplexity"):
        assert found[name] == pytest.approx(metrics[f"eval_{name}"], rel=1e-6)
    for name in ("tokens", "bytes", "words", "documents"):
        assert found[name] == metrics[f"eval_{name}"]


@pytest.mark.slow
def test_as_typed(smoke_recipe, tmp_path):
    launcher = Path(sys.executable).with_name("accelerate")
    config = "accelerate_configs/single_gpu.yaml"
    start = [str(launcher), "launch", "--quiet", "--config_file", config]
    done = subprocess.run(
        [*start, "pipeline/pretrain.py", "--config", str(smoke_recipe), "--training.max_steps",
         "10", "--training.output_dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "update 10/10: held-out text: loss" in done.stdout
    assert "In " + str(tmp_path) in done.stdout
    for noise in ("Warning", "warning", "Traceback", "Writing model shards"):
        assert noise not in done.stderr + done.stdout
    assert json.loads((tmp_path / "run_status.json").read_text())["state"] == "finished"
    # accelerate sets OMP_NUM_THREADS to 1, which would leave every core but one idle.
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    if metrics["device"] == "cpu":
        cores = min(psutil.cpu_count(logical=False), len(os.sched_getaffinity(0)))
        assert metrics["threads"] == cores


@pytest.mark.slow
def test_fine_tuning_goes_on_from_a_folder(finished_run, corpus_folder, tmp_path, capsys):
    recipe = ROOT / "recipes" / "gpt2_finetune.yaml"
    pretrain.main(
        ["--config", str(recipe), "--model.pretrained", str(finished_run), "--data.files",
         str(corpus_folder), "--data.block_size", "16", "--tokens_per_update", "256",
         "--training.max_steps", "20", "--training.output_dir", str(tmp_path)]
    )  # fmt: skip
    before = json.loads((finished_run / "metrics.json").read_text())
    after = json.loads((tmp_path / "metrics.json").read_text())
    assert after["tokenizer_fingerprint"] == before["tokenizer_fingerprint"]
    assert f"from {finished_run.name}" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["n_positions"] == 32
    assert "- fine-tuning\n" in (tmp_path / "README.md").read_text()


def test_weights_that_are_torn_are_one_sentence(run_copy, corpus_folder, tmp_path):
    path = run_copy / "model.safetensors"
    recipe = ROOT / "recipes" / "gpt2_finetune.yaml"
    argv = [
        "--config", str(recipe), "--model.pretrained", str(run_copy), "--data.files",
        str(corpus_folder), "--data.block_size", "16", "--tokens_per_update", "256",
        "--training.output_dir", str(tmp_path / "new"),
    ]  # fmt: skip
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be loaded as a model"):
        pretrain.main(argv)
    path.unlink()
    with pytest.raises(InputError, match="cannot be loaded as a model"):
        pretrain.main(argv)


def test_a_tokenizer_that_is_not_the_model_s_is_refused(
    finished_run, corpus_folder, tokenizer, tmp_path
):
    tokenizer.save_pretrained(tmp_path / "other")
    recipe = ROOT / "recipes" / "gpt2_finetune.yaml"
    with pytest.raises(InputError, match="its entries are not those that .* was trained with"):
        pretrain.main(
            ["--config", str(recipe), "--model.pretrained", str(finished_run),
             "--tokenizer.pretrained", str(tmp_path / "other"), "--data.files",
             str(corpus_folder), "--data.block_size", "16", "--tokens_per_update", "256",
             "--training.output_dir", str(tmp_path / "new")]
        )  # fmt: skip


def test_a_dead_worker_is_one_sentence(smoke_recipe, tmp_path, monkeypatch):
    """Out of memory kills a worker without a word; a plain pool would wait for it for ever."""
    monkeypatch.setattr("pipeline.sources.SHARD_BYTES", (2000, 2000))
    monkeypatch.setattr("pipeline.token_shards._work_on", _die)
    with pytest.raises(InputError, match="a process that tokenises died"):
        prepare_data.main(
            ["--config", str(smoke_recipe), "--training.output_dir", str(tmp_path),
             "--num_proc", "2"]
        )  # fmt: skip


def _die(*spec):
    os._exit(9)


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one_from_a_stream(smoke_recipe, tmp_path):
    """torchrun on gloo: same global batch, same losses, same held-out number."""
    script = tmp_path / "pretrain.py"
    script.write_text(SMALL.format(door="pretrain"))
    given = arguments_of(
        smoke_recipe,
        "",
        training__use_cpu="true",
        training__logging_steps=1,
        data__streaming="true",
    )
    given, histories = [*given[:2], *given[4:]], []
    for count, workers in ((1, 0), (2, 0), (2, 2)):
        folder = tmp_path / f"{count}-{workers}"
        subprocess.run(
            [str(Path(sys.executable).with_name("torchrun")), f"--nproc_per_node={count}",
             "--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0",
             str(script), *given, "--training.output_dir", str(folder),
             "--training.dataloader_num_workers", str(workers)],
            cwd=ROOT, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        state = json.loads((folder / "checkpoint-20" / "trainer_state.json").read_text())
        histories.append(state["log_history"])
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["world_size"] == count
    for name in ("loss", "eval_loss"):
        one, *others = ([e[name] for e in h if name in e] for h in histories)
        for other in others:
            assert len(one) == len(other) > 1
            assert other == pytest.approx(one, rel=1e-5)


# A door with small shards and segments, so that a small text has many.
SMALL = """
from pipeline import preparation, sources
from pipeline.command_line import enter

sources.SHARD_BYTES = (3000, 3000)
preparation.TOKENS_PER_SEGMENT = 32
if __name__ == "__main__":
    from pipeline.{door} import main

    enter(main)
"""


@pytest.mark.slow
def test_two_machines_prepare_what_one_does(smoke_recipe, tmp_path):
    prepare_data.main(arguments_of(smoke_recipe, tmp_path / "alone"))
    script = tmp_path / "prepare.py"
    script.write_text(SMALL.format(door="prepare_data"))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    launcher = str(Path(sys.executable).with_name("accelerate"))
    machines = [
        subprocess.Popen(
            [launcher, "launch", "--multi_gpu", "--num_machines", "2", "--num_processes", "2",
             "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port",
             str(port), "--mixed_precision", "no", "--dynamo_backend", "no", str(script),
             *arguments_of(smoke_recipe, tmp_path / "two")],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        said = [machine.communicate(timeout=120)[0] for machine in machines]
    finally:
        for machine in machines:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(machine.pid, signal.SIGKILL)
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(said)
    assert "rows in" in said[0] and "rows in" not in said[1]
    for split in SPLITS:
        one, two = (tmp_path / name / "blocks" / f"{split}.arrow" for name in ("alone", "two"))
        assert one.read_bytes() == two.read_bytes()
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == [
        "_digests-blocks.json", "blocks", "tokenizer"
    ]  # fmt: skip


@pytest.mark.slow
def test_preparing_that_is_killed_again_and_again_gives_the_same_bytes(smoke_recipe, tmp_path):
    """Killed -9 at any time, the same command goes on; no process stays behind."""
    prepare_data.main(arguments_of(smoke_recipe, tmp_path / "straight"))
    script = tmp_path / "prepare.py"
    script.write_text(SMALL.format(door="prepare_data"))
    command = [sys.executable, str(script), *arguments_of(smoke_recipe, tmp_path / "killed")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OF_THIS_TEST": str(tmp_path)}
    options = {"cwd": ROOT, "env": environment, "start_new_session": True}
    shards, dice, kills = tmp_path / "killed" / "_shards-blocks", random.Random(0), 0
    # When the processes are starting up, when some shards are done, and then not at all.
    for done in (0, 0, dice.randint(1, 5), dice.randint(6, 12), 10**6):
        victim = subprocess.Popen(
            [*command, "--num_proc", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            **options,
        )  # fmt: skip
        while victim.poll() is None and not (
            shards.exists() and len(list(shards.glob("*/manifest.json"))) >= done
        ):
            time.sleep(0.01)
        time.sleep(dice.random() / 2 if done == 0 else 0)
        if victim.poll() is not None:
            break
        victim.kill()  # it alone, as the kernel would where memory runs out
        victim.wait()
        kills += 1
        assert left_behind(tmp_path) == []
    assert victim.returncode == 0 and kills == 4
    for split in SPLITS:
        one, other = (tmp_path / n / "blocks" / f"{split}.arrow" for n in ("straight", "killed"))
        assert one.read_bytes() == other.read_bytes()
    assert left_behind(tmp_path) == []
    assert not [p for p in (tmp_path / "killed").iterdir() if p.name.startswith("_staging")]


def left_behind(folder: Path, seconds: float = 10) -> list[int]:
    """Return the processes with this test's mark in their environment that do not end soon."""
    end = time.monotonic() + seconds
    while True:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_ours = process.environ().get("OF_THIS_TEST") == str(folder)
                if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.05)


def write_bad_texts(folder: Path) -> None:
    (folder / "bytes.txt").write_bytes(b"good\xff bad\n" * 50)
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("the model reads.\n")
    (folder / "rows.jsonl").write_text('{"body": "a text"}\n{"body": "another"}\n')


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--data.files nowhere.txt", "nowhere.txt: no such file; looked in"),
        ("--data.files empty.txt", "empty.txt: the file is empty"),
        ("--data.files bytes.txt", "bytes.txt: byte 0xff at offset 4 is not UTF-8"),
        ("--data.files rows.jsonl", "no column 'text' in the line at byte 0; it has body"),
        ("--tokenizer.vocab_size 9999", "gives only"),
        ("--data.files short.txt --tokenizer.vocab_size 257", "a row needs 32"),
        ("--data.validation_fraction 0", "greater than 0"),
        ("--data.validation_fraction 1e-9 --data.hold_out documents", "no text is held out"),
        ("--resume atuo", "name a whole checkpoint, or use auto"),
        ("--model.config.resid_pdrop 2", "is a probability, at least 0 and below 1"),
        ("--model.config.vocab_size 512", "is derived, leave it out"),
        ("--training.gradient_accumulation_steps 2", "is derived from"),
        ("--precision fp16 --training.use_cpu true", "needs a CUDA GPU"),
        ("--tokens_per_update 500", "the nearest that are: 256 and 512"),
        ("--model.config.n_head 3", "32 is not a multiple of n_head 3"),
        ("--tokenizer.vocab_size null --tokenizer.pretrained .", "no tokenizer in"),
        ("--resume must", "no whole checkpoint in"),
        ("--evaluation.texts {book:\u00a0nowhere.txt}", "nowhere.txt: cannot be read"),
        ("--model.attn_implementation flsh", "model.attn_implementation: "),
        (
            "--model.pretrained . --model.config null --tokenizer.vocab_size null",
            "no model in this folder",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    smoke_recipe, tmp_path, monkeypatch, argv, words
):
    monkeypatch.chdir(tmp_path)
    write_bad_texts(tmp_path)
    folder = tmp_path / "run"
    given = [word.replace("\u00a0", " ") for word in argv.split(" ")]
    with pytest.raises(InputError) as caught:
        pretrain.main(["--config", str(smoke_recipe), "--training.output_dir", str(folder), *given])
    sentence = str(caught.value)
    assert words in sentence and "\n" not in sentence
    assert not (folder / "model.safetensors").exists()
    assert not list(folder.glob("checkpoint-*"))


def test_bytes_can_be_replaced(smoke_recipe, tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"good\xff bad, and the model reads on\n" * 300)
    prepare_data.main(
        ["--config", str(smoke_recipe), "--data.files", str(tmp_path / "bytes.txt"),
         "--data.errors", "replace", "--tokenizer.vocab_size", "280",
         "--training.output_dir", str(tmp_path / "run")]
    )  # fmt: skip
    assert (tmp_path / "run" / "blocks" / "train.arrow").exists()


@pytest.mark.parametrize(
    ("door", "argv", "words"),
    [
        (generate, ["--model", "nowhere", "--prompt", "x"], "cannot be loaded as a model"),
        (generate, ["--model", ".", "--prompt", "x"], "no model in this folder"),
        (generate, ["--model", "./nowhere", "--prompt", "x"], "./nowhere: no such folder"),
        (generate, ["--model", "/nowhere/at/all", "--prompt", "x"], "no such folder; looked in"),
        (measure_perplexity, ["--model", "RUN", "--files", "nowhere.txt"], "no such file"),
        (measure_perplexity, ["--model", "RUN", "--files", "empty.txt"], "the file is empty"),
        (
            measure_perplexity,
            ["--model", "RUN", "--files", "a.txt", "--block_size", "64"],
            "the model has 32 positions",
        ),
        (
            measure_perplexity,
            ["--model", "RUN", "--files", "a.txt", "--json", "no/where.json"],
            "no/where.json: cannot be written",
        ),
    ],
)
def test_mistakes_at_the_other_doors(finished_run, tmp_path, monkeypatch, door, argv, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "a.txt").write_text("the model reads text")
    argv = [str(finished_run) if word == "RUN" else word for word in argv]
    with pytest.raises(InputError) as caught:
        door.main(argv)
    assert words in str(caught.value)
