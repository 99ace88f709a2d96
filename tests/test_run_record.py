"""A run as its folder tells it: finished, unfinished, of an earlier version, damaged."""

import json
import math

import pytest
from run_folders import history, make_unfinished, write_run

from pipeline.recipe import InputError
from pipeline.run_record import read_run, without_folders


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run")


def test_a_finished_run(folder):
    run = read_run(folder)
    assert run.name == "run" and run.is_finished and run.metrics["eval_loss"] == 3.5
    assert len(run.history) == 16 and run.verdict.kind == "improving"
    assert [update for update, _ in run.samples] == [10, 30, 40]
    assert run.samples[0][1] == "/usr/bin is 10\n\nOnce 10"
    assert run.data["held_out_rows"] == {"validation": "a" * 64, "test": "a" * 64}
    assert run.flops == (6 * 1_071_872 + 12 * 4 * 128 * 128) * 40960
    assert run.seconds == 3735 and run.footprint.kwh > 0


def test_nothing_in_it_names_a_folder(folder):
    run = read_run(folder)
    assert run.recipe["data"]["files"] == ["book.txt"]
    assert run.recipe["evaluation"]["texts"] == {"book": "other.txt"}
    assert run.recipe["generation"]["prompts"][0] == "/usr/bin is"  # text, not a file
    assert "output_dir" not in run.recipe["training"]
    assert run.data["sources"][0]["name"] == "book.txt"
    shown = json.dumps([run.recipe, run.data, run.why])
    assert "somebody" not in shown and str(folder.parent) not in shown


def test_a_run_that_is_not_finished_tells_what_its_newest_checkpoint_knows(folder):
    run = read_run(make_unfinished(folder))
    assert (run.state, run.is_finished) == ("preempted", False)
    assert run.why == "SIGTERM, in blocks, after update 20"
    assert run.metrics["updates"] == 20 and run.metrics["train_tokens"] == 20480
    assert run.metrics["eval_loss"] == pytest.approx(4.1) and len(run.panels) == 6
    assert run.seconds is None and run.footprint is None and run.flops is None


def test_numbers_of_an_earlier_update_are_not_those_of_a_run_that_goes_on(folder):
    (folder / "checkpoint-60").mkdir()
    state = {"log_history": history(60)}
    (folder / "checkpoint-60" / "trainer_state.json").write_text(json.dumps(state))
    (folder / "run_status.json").write_text(json.dumps({"state": "running"}))
    run = read_run(folder)
    assert run.state == "running" and run.metrics["updates"] == 60


def test_a_run_of_an_earlier_version_lacks_much_and_is_read(folder):
    for name in ("history.json", "samples.txt", "config.json", "run_status.json"):
        (folder / name).unlink()
    (folder / "blocks" / "manifest.json").unlink()
    numbers = {"eval_loss": 3.5, "eval_perplexity": math.inf, "train_tokens": 1, "train_seconds": 2}
    (folder / "metrics.json").write_text(json.dumps(numbers))
    run = read_run(folder)
    assert run.is_finished and run.history == [] and run.samples == [] and run.data == {}
    assert run.flops is None and run.footprint is None and run.verdict.kind == "unknown"


def test_a_finished_run_without_its_numbers_is_not_called_finished(folder):
    (folder / "metrics.json").unlink()
    run = read_run(folder)
    assert (run.state, run.why) == ("unknown", "metrics.json is gone")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.json", "{"), ("metrics.json", "[1]"), ("history.json", '{"a": 1}'),
        ("config.yaml", "a: [b"), ("config.yaml", "text"), ("config.json", ""),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=rf"{name}: damaged, or .*; put a whole one there, or"):
        read_run(folder)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such folder; name the training.output_dir"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no run \(config.yaml and run_status.json are mis"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("InputError: /home/me/run: is full", "InputError: run: is full"),
        ("in '/a/b/c.txt' and ~/d/e, ../f/g", "in 'c.txt' and e, g"),
        (r"C:\me\run: gone", "run: gone"),
        ("https://a.b/c and 3/4 of a/b", "https://a.b/c and 3/4 of a/b"),
    ],
)
def test_of_a_path_in_a_sentence_only_its_name_is_left(text, left):
    assert without_folders(text) == left
