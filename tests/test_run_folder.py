"""Nothing of another run is overwritten, and the status file tells the truth."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from pipeline import pretrain, run_folder
from pipeline.interruption import Preempted
from pipeline.options import PretrainOptions
from pipeline.processes import Processes
from pipeline.recipe import InputError, read_recipe

ALONE = Processes(SimpleNamespace(process_index=0, world_size=1))


def recipe_for(path, folder, **overrides):
    return read_recipe(path, {"training.output_dir": str(folder), **overrides})


def saved(folder, **overrides):
    values = {"training.output_dir": str(folder)} | {
        key.replace("__", "."): value for key, value in overrides.items()
    }
    return read_recipe(folder / "config.yaml", values)


def claim(recipe, **options):
    """Return new, unfinished or finished, without training anything."""
    return run_folder._claim(recipe, PretrainOptions(**options))


def opened(recipe, **options):
    return run_folder.opened(recipe, PretrainOptions(**options), ALONE)


def contents(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_fresh_folder_is_new(smoke_recipe, tmp_path):
    assert claim(recipe_for(smoke_recipe, tmp_path / "new" / "run")) == "new"


def test_a_finished_identical_run_is_finished_wherever_it_was_moved(run_copy):
    assert claim(saved(run_copy)) == "finished"
    # A default that is spelled out makes no other run.
    assert claim(saved(run_copy, schedule__cycles=4)) == "finished"


def test_another_run_is_refused_with_the_difference(run_copy):
    before = contents(run_copy)
    with pytest.raises(InputError, match=r"training\.seed: null -> 3 \(the rows.*--overwrite"):
        with opened(saved(run_copy, training__seed=3)):
            pass
    assert contents(run_copy) == before


def test_never_does_not_mean_overwrite(run_copy):
    with pytest.raises(InputError, match="--resume never starts a fresh one; add --overwrite"):
        claim(saved(run_copy), resume="never")


def test_overwrite_removes_ours_and_nothing_else_when_training_begins(run_copy):
    (run_copy / "notes.txt").write_text("mine")
    (run_copy / "pipeline_run.json").write_text("{}")  # the new run is another one on the Hub
    (run_copy / "checkpoint-7").mkdir()
    recipe = saved(run_copy, training__max_steps=30)
    with opened(recipe, overwrite=True) as run:
        assert not (run_copy / "model.safetensors").exists()
        run.begin(recipe)
    left = {p.name for p in run_copy.iterdir()}
    assert left == {"notes.txt", "checkpoint-7", "config.yaml", "run_status.json"}


def test_overwrite_that_fails_before_training_gives_the_old_run_back(smoke_recipe, run_copy):
    before = contents(run_copy)
    with pytest.raises(InputError, match="nowhere.txt: no such file"):
        pretrain.main(
            ["--config", str(smoke_recipe), "--training.output_dir", str(run_copy),
             "--overwrite", "--data.files", "nowhere.txt"]
        )  # fmt: skip
    with pytest.raises(InputError, match="gives only"):
        pretrain.main(
            ["--config", str(smoke_recipe), "--training.output_dir", str(run_copy),
             "--overwrite", "--tokenizer.vocab_size", "9999"]
        )  # fmt: skip
    assert contents(run_copy) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_stranger_s_model_is_not_overwritten(smoke_recipe, tmp_path, overwrite):
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(InputError, match="holds model.safetensors that no run of ours wrote"):
        with opened(recipe_for(smoke_recipe, tmp_path), overwrite=overwrite):
            pass
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"


def test_a_folder_that_cannot_be_written(smoke_recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/run: cannot be written \(Not a directory\)"):
        with opened(recipe_for(smoke_recipe, tmp_path / "file" / "run")):
            pass


def test_a_failed_run_without_a_checkpoint_holds_nothing_to_lose(smoke_recipe, tmp_path):
    recipe = recipe_for(smoke_recipe, tmp_path)
    with pytest.raises(RuntimeError), opened(recipe) as run:
        run.begin(recipe)
        assert run_folder.read_status(tmp_path)["state"] == "running"
        raise RuntimeError("out of memory")
    status = run_folder.read_status(tmp_path)
    assert (status["state"], status["why"]) == ("failed", "RuntimeError: out of memory")
    assert claim(recipe_for(smoke_recipe, tmp_path, **{"training.max_steps": 3})) == "new"


def test_a_mistake_in_a_new_folder_leaves_its_reason(smoke_recipe, tmp_path):
    with pytest.raises(InputError):
        pretrain.main(
            ["--config", str(smoke_recipe), "--training.output_dir", str(tmp_path),
             "--data.files", "nowhere.txt"]
        )  # fmt: skip
    status = run_folder.read_status(tmp_path)
    assert status["state"] == "failed" and "nowhere.txt: no such file" in status["why"]


def test_an_interrupted_run_says_how_it_goes_on(smoke_recipe, tmp_path, caplog):
    recipe = recipe_for(smoke_recipe, tmp_path)
    caplog.set_level("INFO", "pipeline")
    with pytest.raises(Preempted), opened(recipe) as run:
        run.begin(recipe)
        raise KeyboardInterrupt
    assert run_folder.read_status(tmp_path)["state"] == "preempted"
    assert "the same command goes on anew" in caplog.text


def test_overwriting_again_after_a_kill_in_the_middle(run_copy):
    """What a killed process had set aside neither stops the next one nor outlives it."""
    recipe = saved(run_copy, training__max_steps=30)
    shutil.copytree(run_copy, run_copy.parent / "aside")
    shutil.move(run_copy.parent / "aside", run_copy / "_overwritten")
    with opened(recipe, overwrite=True) as run:
        run.begin(recipe)
    assert {p.name for p in run_copy.iterdir()} == {"config.yaml", "run_status.json"}


def test_a_run_that_lost_its_numbers_is_unfinished(run_copy):
    (run_copy / "metrics.json").unlink()
    assert claim(saved(run_copy)) == "unfinished"


def test_a_run_that_lost_its_recipe_is_said_to_have(smoke_recipe, run_copy):
    (run_copy / "config.yaml").unlink()
    with pytest.raises(InputError, match="its config.yaml is gone.*--overwrite"):
        claim(recipe_for(smoke_recipe, run_copy))


@pytest.mark.parametrize("resume", ["atuo", "elsewhere/checkpoint-3"])
def test_resume_names_nothing(smoke_recipe, tmp_path, resume):
    with pytest.raises(InputError, match=f"--resume {resume}: .* name a whole checkpoint"):
        claim(recipe_for(smoke_recipe, tmp_path), resume=resume)


def test_an_unfinished_run_goes_on(run_copy):
    status = json.loads((run_copy / "run_status.json").read_text())
    (run_copy / "run_status.json").write_text(json.dumps({**status, "state": "failed"}))
    assert claim(saved(run_copy)) == "unfinished"


@pytest.mark.slow
def test_two_at_once_in_one_folder(smoke_recipe, tmp_path):
    """The second is refused while the first lives, however early it is in its work."""
    code = (
        "import sys, time; from pathlib import Path; from pipeline import run_folder\n"
        "from types import SimpleNamespace; from pipeline.processes import Processes\n"
        "from pipeline.options import PretrainOptions\n"
        "from pipeline.recipe import read_recipe\n"
        "alone = Processes(SimpleNamespace(process_index=0, world_size=1))\n"
        "recipe = read_recipe(Path(sys.argv[1]), {'training.output_dir': sys.argv[2]})\n"
        "with run_folder.opened(recipe, PretrainOptions(), alone):\n"
        "    print('in', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(smoke_recipe), str(tmp_path)], stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(InputError, match="another process is at work in it"):
            with opened(recipe_for(smoke_recipe, tmp_path)):
                pass
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    with opened(recipe_for(smoke_recipe, tmp_path)) as run:
        assert not run.finished


def test_a_finished_run_reprints_its_summary(smoke_recipe, run_copy, capsys, monkeypatch):
    monkeypatch.setattr(
        "pipeline.machine.warm_compiler", lambda _, **__: pytest.fail("for nothing")
    )
    pretrain.main(["--config", str(smoke_recipe), "--training.output_dir", str(run_copy)])
    assert "bits per byte" in capsys.readouterr().out


def test_another_recipe_s_rows_are_refused(smoke_recipe, run_copy, monkeypatch):
    warmed = []
    monkeypatch.setattr("pipeline.machine.warm_compiler", lambda given, **_: warmed.append(given))
    for name in run_folder.RESULTS:
        (run_copy / name).unlink(missing_ok=True)
    for folder in run_copy.glob("checkpoint-*"):
        shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"blocks: was made by another recipe \(data.block_size"):
        pretrain.main(
            ["--config", str(smoke_recipe), "--training.output_dir", str(run_copy),
             "--data.block_size", "16"]
        )  # fmt: skip
    assert not (run_copy / "model.safetensors").exists()
    assert os.path.exists(run_copy / "blocks" / "train.arrow")
    assert len(warmed) == 1  # before the text is prepared, which is where this run has come to


def test_overwriting_and_going_on_contradict_each_other(run_copy):
    for resume in ("must", str(run_copy / "checkpoint-10")):
        with pytest.raises(InputError, match="take only one of them"):
            claim(saved(run_copy), resume=resume, overwrite=True)


def test_must_of_a_finished_run_that_kept_no_checkpoint_does_nothing(run_copy):
    for folder in run_copy.glob("checkpoint-*"):
        shutil.rmtree(folder)
    assert claim(saved(run_copy), resume="must") == "finished"


def test_a_recipe_of_another_version_is_said_with_a_remedy(smoke_recipe, run_copy):
    with (run_copy / "config.yaml").open("a") as file:
        file.write("wibble: 1\n")
    with pytest.raises(InputError, match="written by another version .*wibble.*--overwrite"):
        claim(recipe_for(smoke_recipe, run_copy))


def test_a_lost_status_does_not_make_a_run_nobody_s(run_copy):
    """Its checkpoints would be counted with those of a fresh run, and removed."""
    recipe = saved(run_copy)
    for name in run_folder.RESULTS:
        (run_copy / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match="--resume never starts a fresh one"):
        claim(recipe, resume="never")


def test_the_status_says_running_while_text_is_prepared(smoke_recipe, tmp_path):
    recipe = recipe_for(smoke_recipe, tmp_path)
    with opened(recipe):
        assert run_folder.read_status(tmp_path)["state"] == "running"
