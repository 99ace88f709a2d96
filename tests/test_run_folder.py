"""Nothing of another run is overwritten, and the status file tells the truth."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from pipeline import pretrain, run_folder
from pipeline.command_line import PretrainOptions
from pipeline.recipe import InputError, read_recipe

AUTO = PretrainOptions()


def recipe_for(path, folder, **overrides):
    return read_recipe(path, {"training.output_dir": str(folder), **overrides})


def claim(recipe, **options):
    return run_folder.claim(recipe, PretrainOptions(**options), is_main_process=True)


def test_a_fresh_folder_is_new(smoke_recipe, tmp_path):
    assert claim(recipe_for(smoke_recipe, tmp_path / "new" / "run")) == "new"


def test_a_finished_identical_run_is_finished_wherever_it_was_moved(run_copy):
    recipe = read_recipe(run_copy / "config.yaml", {"training.output_dir": str(run_copy)})
    assert claim(recipe) == "finished"


def test_another_run_is_refused_with_the_difference(run_copy):
    recipe = read_recipe(
        run_copy / "config.yaml",
        {"training.output_dir": str(run_copy), "training.max_steps": 30},
    )
    before = {p: p.stat().st_mtime_ns for p in run_copy.rglob("*")}
    with pytest.raises(InputError, match=r"training\.max_steps: 20 -> 30.*--overwrite"):
        claim(recipe)
    assert {p: p.stat().st_mtime_ns for p in run_copy.rglob("*")} == before


def test_never_does_not_mean_overwrite(run_copy):
    recipe = read_recipe(run_copy / "config.yaml", {"training.output_dir": str(run_copy)})
    with pytest.raises(InputError, match="--resume never starts a fresh one; add --overwrite"):
        claim(recipe, resume="never")


def test_overwrite_removes_ours_and_nothing_else(run_copy):
    (run_copy / "notes.txt").write_text("mine")
    (run_copy / "checkpoint-7").mkdir()
    recipe = read_recipe(
        run_copy / "config.yaml",
        {"training.output_dir": str(run_copy), "training.max_steps": 30},
    )
    assert claim(recipe, overwrite=True) == "new"
    assert {p.name for p in run_copy.iterdir()} == {"notes.txt", "checkpoint-7"}


def test_a_stranger_s_model_is_not_overwritten(smoke_recipe, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(InputError, match="holds model.safetensors that no run of ours wrote"):
        claim(recipe_for(smoke_recipe, tmp_path))


def test_a_folder_that_cannot_be_written(smoke_recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/run: cannot be written \(Not a directory\)"):
        claim(recipe_for(smoke_recipe, tmp_path / "file" / "run"))


def test_a_failed_run_without_a_checkpoint_holds_nothing_to_lose(smoke_recipe, tmp_path):
    recipe = recipe_for(smoke_recipe, tmp_path)
    with pytest.raises(RuntimeError), run_folder.running(recipe, is_main_process=True):
        assert run_folder.read_status(tmp_path)["state"] == "running"
        raise RuntimeError("out of memory")
    status = run_folder.read_status(tmp_path)
    assert (status["state"], status["why"]) == ("failed", "RuntimeError: out of memory")
    assert claim(recipe_for(smoke_recipe, tmp_path, **{"training.max_steps": 3})) == "new"


def test_an_unfinished_run_goes_on(run_copy):
    status = json.loads((run_copy / "run_status.json").read_text())
    (run_copy / "run_status.json").write_text(json.dumps({**status, "state": "failed"}))
    recipe = read_recipe(run_copy / "config.yaml", {"training.output_dir": str(run_copy)})
    assert claim(recipe) == "unfinished"


def test_a_folder_in_use_is_refused_and_a_dead_user_is_not(run_copy):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    status = json.loads((run_copy / "run_status.json").read_text())
    status |= {"state": "running", "pid": other.pid}
    (run_copy / "run_status.json").write_text(json.dumps(status))
    recipe = read_recipe(run_copy / "config.yaml", {"training.output_dir": str(run_copy)})
    try:
        with pytest.raises(InputError, match=f"process {other.pid} is training in it now"):
            claim(recipe)
    finally:
        other.kill()
        other.wait()
    assert claim(recipe) == "unfinished"


def test_a_finished_run_reprints_its_summary(smoke_recipe, run_copy, capsys):
    pretrain.main(["--config", str(smoke_recipe), "--training.output_dir", str(run_copy)])
    assert "bits per byte" in capsys.readouterr().out


def test_another_recipe_s_rows_are_refused(smoke_recipe, run_copy):
    for name in run_folder.RESULTS:
        (run_copy / name).unlink(missing_ok=True)
    for folder in run_copy.glob("checkpoint-*"):
        shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"blocks: was made by another recipe \(data.block_size"):
        pretrain.main(
            ["--config", str(smoke_recipe), "--training.output_dir", str(run_copy),
             "--data.block_size", "16"]
        )  # fmt: skip
    assert not (run_copy / "run_status.json").exists()
    assert os.path.exists(run_copy / "blocks" / "train.arrow")
