"""Every door has a pulse, in the order a user walks through them, and as it is typed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

from pipeline import generate, measure_perplexity, prepare_data, pretrain, train_tokenizer
from pipeline.recipe import InputError


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
    assert json.loads(numbers.read_text())["bytes"] < 50
    capsys.readouterr()

    arguments = ["--model", str(tmp_path), "--prompt", "the model", "--max_new_tokens", "8"]
    generate.main([*arguments, "--temperature", "0"])
    one = capsys.readouterr().out
    generate.main([*arguments, "--temperature", "0"])
    assert one.startswith("the model") and capsys.readouterr().out == one


@pytest.mark.parametrize("how", ["python", "accelerate"])
def test_as_typed(smoke_recipe, tmp_path, how):
    start = [sys.executable]
    if how == "accelerate":
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
    assert f"from {finished_run}" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["n_positions"] == 32


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
def test_two_processes_give_the_curve_of_one(smoke_recipe, tmp_path):
    """torchrun on gloo: same global batch, same losses, same held-out number."""
    histories = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        subprocess.run(
            [str(Path(sys.executable).with_name("torchrun")), f"--nproc_per_node={count}",
             "--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0",
             "pipeline/pretrain.py", "--config", str(smoke_recipe), "--training.output_dir",
             str(folder), "--training.use_cpu", "true", "--training.logging_steps", "1"],
            cwd=ROOT, check=True, capture_output=True,
        )  # fmt: skip
        state = json.loads((folder / "checkpoint-20" / "trainer_state.json").read_text())
        histories.append(state["log_history"])
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["world_size"] == count
    for name in ("loss", "eval_loss"):
        one, two = ([e[name] for e in h if name in e] for h in histories)
        assert len(one) == len(two) > 1
        assert two == pytest.approx(one, rel=1e-5)


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
        (measure_perplexity, ["--model", "RUN", "--files", "."], "a folder; name the files in it"),
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
