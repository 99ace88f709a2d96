"""Real sweeps over learning rates: the recipe's own updates, and nothing else is touched."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import ROOT
from forked import differences, outcome, with_data_of
from runs import contents
from safetensors.torch import load_file, save_file
from test_trainer import make_trainer

from pipeline import find_learning_rate, locks, pretrain
from pipeline.arguments import training_arguments
from pipeline.checkpoint import checkpoints
from pipeline.command_line import read_command_line
from pipeline.plan_options import FindOptions
from pipeline.processes import Processes
from pipeline.rate_suggestion import rate_at
from pipeline.rate_sweep import SweepingTrainer, sweeps, swept
from pipeline.recipe import InputError
from pipeline.run_files import STATUS

SHORT = ("--updates", "48", "--seeds", "1")


def arguments_of(recipe: Path, folder: Path, *more: str) -> list[str]:
    return ["--config", str(recipe), "--training.output_dir", str(folder), *more]


def fine_tuning(model: Path, corpus: Path, folder: Path) -> list[str]:
    return arguments_of(
        ROOT / "recipes" / "gpt2_finetune.yaml", folder, *SHORT, "--model.pretrained", str(model),
        "--data.files", str(corpus), "--data.block_size", "16", "--tokens_per_update", "256",
    )  # fmt: skip


def found_in(folder: Path) -> dict:
    return json.loads((folder / "learning_rate" / "learning_rate.json").read_text())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, finished_run) -> Path:
    """A folder with the rows of the smoke recipe and no run."""
    return with_data_of(finished_run, tmp_path_factory.mktemp("prepared"))


def swept_of(argv: list[str]):
    recipe, options = read_command_line(argv, FindOptions, doc="A door.")
    recipe, arguments = training_arguments(swept(recipe, options))
    return sweeps(recipe, arguments, options, Processes(arguments)), options


@pytest.mark.slow
def test_the_first_sweep_is_the_recipe_s_model_rows_and_updates(smoke_recipe, prepared, tmp_path):
    """At one rate all the way it has the losses of a run at that rate, to the last bit."""
    given = arguments_of(smoke_recipe, prepared, *SHORT, "--optimizer.name", "muon")
    (one,), options = swept_of(given)
    wanted = [rate_at(n, start=1e-6, end=1.0, updates=48) for n in range(len(one.points))]
    assert [p.rate for p in one.points] == pytest.approx(wanted, rel=1e-12)
    assert one.ended == "diverged" and len(one.points) > 40
    (again,), _ = swept_of(given)
    assert again == one  # nothing in a sweep is left to chance
    run = make_trainer(
        smoke_recipe, with_data_of(prepared, tmp_path / "run"), training__logging_steps=1,
        training__max_steps=48, training__eval_strategy="no", optimizer__name="muon",
    )  # fmt: skip
    run.create_scheduler = lambda num_training_steps, optimizer=None: (
        SweepingTrainer.create_scheduler(run, num_training_steps, optimizer)
    )
    run._options = options
    run.train()
    logs = [log for log in run.state.log_history if "loss" in log]
    assert [log["loss"] for log in logs][: len(one.points)] == [p.loss for p in one.points]
    groups = {group["parts"]: group["lr"] for group in run.optimizer.param_groups}
    assert groups[0] == pytest.approx(1.0)
    assert groups[1] == pytest.approx(run.recipe.optimizer.matrix_rate)


def test_seeds_change_weights_and_order(smoke_recipe, prepared):
    found, _ = swept_of(
        arguments_of(smoke_recipe, prepared, "--updates", "24", "--seeds", "2", "--start", "1e-3")
    )
    assert [one.seed for one in found] == [42, 43]
    assert found[0].points[0].loss != found[1].points[0].loss


def test_a_run_after_a_sweep_is_the_run_without(smoke_recipe, finished_run, tmp_path, capsys):
    folder = with_data_of(finished_run, tmp_path / "run")
    find_learning_rate.main(arguments_of(smoke_recipe, folder, *SHORT))
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == [
        "blocks", "learning_rate", "tokenizer"
    ]  # fmt: skip
    assert not (folder / STATUS).exists()
    left = sorted(path.name for path in (folder / "learning_rate").iterdir())
    assert left == ["learning_rate.json", "learning_rate.png"]
    pretrain.main(arguments_of(smoke_recipe, folder))
    assert differences(outcome(folder), outcome(finished_run)) == []


@pytest.mark.slow
def test_an_unfinished_run_is_left_as_it_is_and_goes_on(
    smoke_recipe, finished_run, tmp_path, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    shutil.rmtree(checkpoints(folder)[-1])
    (folder / STATUS).write_text(json.dumps({"state": "preempted", "why": "SIGTERM"}))
    before = contents(folder)
    with locks.held(folder):  # as if the run were going on
        find_learning_rate.main(arguments_of(smoke_recipe, folder, *SHORT))
    after = {k: v for k, v in contents(folder).items() if not k.startswith("learning_rate/")}
    assert after == before
    pretrain.main(arguments_of(smoke_recipe, folder))
    assert differences(outcome(folder), outcome(finished_run)) == []


def test_what_is_said_drawn_and_kept(smoke_recipe, prepared, tmp_path, capsys):
    picture = tmp_path / "sweep.svg"
    given = arguments_of(smoke_recipe, prepared, "--updates", "48", "--seeds", "2")
    find_learning_rate.main([*given, "--picture", str(picture)])
    said, found = capsys.readouterr().out, found_in(prepared)
    first, second = (one["suggestion"] for one in found["sweeps"])
    assert found["learning_rate"] == pytest.approx((first + second) / 2)
    assert found["spread_factor"] == pytest.approx(max(first, second) / min(first, second))
    assert found["range"][0] < found["learning_rate"] < found["range"][1]
    assert found["recipe_learning_rate"] == 1e-3
    assert f"learning rate    {found['learning_rate']:.1e}   median of 2 seeds" in said
    assert "the recipe says  1.0e-03   1/" in said and "(rule: the lowest rate at which" in said
    root = ElementTree.parse(picture).getroot()
    assert root.tag.endswith("svg") and picture.stat().st_size > 10_000
    for one in found["sweeps"]:
        points = (one["learning_rates"], one["losses"], one["smoothed_losses"])
        assert len(set(map(len, points))) == 1 and 30 < len(one["losses"]) <= 48


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--end", "1e-4"], "widen the range, --end 0.01"),
        (["--start", "0.01", "--end", "10"], "begin lower, --start 1e-05"),
    ],
)
def test_a_range_too_narrow_is_said_with_the_option(smoke_recipe, prepared, capsys, more, words):
    find_learning_rate.main(arguments_of(smoke_recipe, prepared, *SHORT, *more))
    said = capsys.readouterr().out
    assert "no suggestion: the loss " in said and words in said
    assert found_in(prepared)["learning_rate"] is None


def test_a_loss_that_is_not_finite_ends_a_sweep(run_copy, corpus_folder, tmp_path, capsys):
    path = run_copy / "model.safetensors"
    weights = load_file(path)
    weights["transformer.ln_f.weight"][0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    find_learning_rate.main(fine_tuning(run_copy, corpus_folder, tmp_path / "new"))
    (one,) = found_in(tmp_path / "new")["sweeps"]
    assert one["ended"] == "not finite" and one["losses"] == []
    said = capsys.readouterr().out
    assert "not finite at the first update" in said
    assert "no suggestion: the loss never falls by more than its scatter; begin lower" in said


@pytest.mark.slow
def test_a_stream_has_a_ring_of_its_own(smoke_recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pipeline.preparation.TOKENS_PER_SEGMENT", 32)
    ring = tmp_path / "_ring"
    ring.mkdir()
    (ring / "bookmarks.jsonl").write_text("a run's\n")
    find_learning_rate.main(
        arguments_of(smoke_recipe, tmp_path, *SHORT, "--data.streaming", "true",
                     "--data.hold_out", "documents")
    )  # fmt: skip
    assert [p.read_text() for p in ring.iterdir()] == ["a run's\n"]
    assert not (tmp_path / "learning_rate" / "_ring").exists()
    assert len(found_in(tmp_path)["sweeps"][0]["losses"]) > 30


@pytest.mark.slow
def test_a_pretrained_model_has_its_own_words(finished_run, corpus_folder, tmp_path, capsys):
    given = fine_tuning(finished_run, corpus_folder, tmp_path)
    find_learning_rate.main([*given, "--model.lora_r", "4"])
    found, said = found_in(tmp_path), capsys.readouterr().out
    assert found["is_pretrained"] and found["sweeps"][0]["losses"][0] < 6
    assert ("no suggestion" if found["learning_rate"] is None else "what is forgotten") in said


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--start 0", "--start: input should be greater than 0; got '0'"),
        ("--start -1e-3", "--start: input should be greater than 0"),
        ("--start 1 --end 1e-3", "the end must be at least ten times the start"),
        ("--start 1e-3 --end 2e-3", "the end must be at least ten times the start"),
        ("--end 1e6", "--end: input should be less than or equal to 100"),
        ("--updates 3", "--updates: input should be greater than or equal to 20"),
        ("--updates 20", "takes at least 48; give more, or a narrower range"),
        ("--seeds 0", "--seeds: input should be greater than or equal to 1"),
        ("--picture sweep.gif", "name a file that ends in .png, .svg, .pdf"),
        ("--picture no/where.png", "no/where.png: cannot be written; give a file in a folder"),
        ("--model.pretrained gone/model --tokenizer.vocab_size null --model.config null", "gone/"),
        ("--tokens_per_update 500", "the nearest that are: 256 and 512"),
        ("--data.files short.txt --tokenizer.vocab_size 257", "a row needs 32"),
        ("--strat 1e-5", "did you mean --start?"),
    ],
)
def test_a_mistake_is_one_sentence(smoke_recipe, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("the model reads.\n")
    with pytest.raises(InputError) as caught:
        find_learning_rate.main(arguments_of(smoke_recipe, tmp_path / "run", *argv.split()))
    sentence = str(caught.value)
    assert words in sentence and "\n" not in sentence
    assert not list((tmp_path / "run").glob("learning_rate/*"))


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_divided_model_is_refused(smoke_recipe, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "true")
    with pytest.raises(InputError, match=r"shards the model .* use accelerate_configs/ddp\.yaml"):
        find_learning_rate.main(arguments_of(smoke_recipe, tmp_path))


@pytest.mark.slow
def test_two_processes_sweep_as_one_does(smoke_recipe, prepared, tmp_path, capsys):
    folder = with_data_of(prepared, tmp_path / "two")
    more = ["--training.use_cpu", "true", *SHORT]
    subprocess.run(
        [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node=2",
         "--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0",
         "pipeline/find_learning_rate.py", *arguments_of(smoke_recipe, folder, *more)],
        cwd=ROOT, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    find_learning_rate.main(arguments_of(smoke_recipe, prepared, *more))
    ((one,), (two,)) = (found_in(each)["sweeps"] for each in (prepared, folder))
    assert two["learning_rates"][:40] == one["learning_rates"][:40]
    assert two["losses"][:40] == pytest.approx(one["losses"][:40], rel=1e-4)
