"""Runs of a ladder are read from what real runs leave, and refused where they do not compare."""

import json
import shutil

import pytest
from ladders import write_metrics

from pipeline.ladder import Run, points
from pipeline.recipe import InputError

RUN = Run("a", 1000, 5000, 4.0)


def test_a_finished_run_by_its_folder_or_its_file(finished_run):
    metrics = json.loads((finished_run / "metrics.json").read_text())
    expected = Run(
        finished_run.name, metrics["parameters"], metrics["train_tokens"], metrics["eval_loss"]
    )
    assert points([finished_run]) == points([finished_run / "metrics.json"]) == [expected]
    assert expected.flops == 6 * expected.parameters * expected.tokens


def test_runs_come_in_the_order_of_their_operations_with_names_that_tell_them_apart(tmp_path):
    for name, size in (("one/run", 3000), ("two/run", 1000), ("two/other", 2000)):
        write_metrics(tmp_path / name, RUN._replace(parameters=size))
    found = points([tmp_path / name for name in ("one/run", "two/run", "two/other")])
    assert [run.name for run in found] == ["two/run", "two/other", "one/run"]


def test_files_of_one_folder(tmp_path):
    first = write_metrics(tmp_path, RUN).rename(tmp_path / "first.json")
    second = write_metrics(tmp_path, RUN._replace(tokens=9000))
    names = [f"{tmp_path.name}/first.json", f"{tmp_path.name}/metrics.json"]
    assert [run.name for run in points([first, second])] == names


def refused(*paths) -> str:
    with pytest.raises(InputError) as refusal:
        points(paths)
    return str(refusal.value)


def test_a_file_that_is_not_there(tmp_path):
    assert refused(tmp_path / "a.json") == (
        f"{tmp_path / 'a.json'}: no such file; name metrics.json of finished runs, or their folders"
    )


def test_a_folder_without_a_run(tmp_path):
    assert refused(tmp_path) == (
        f"{tmp_path}: holds no run; name the training.output_dir of finished runs"
    )


def test_a_run_that_is_not_finished(tmp_path):
    (tmp_path / "run_status.json").write_text('{"state": "preempted"}')
    assert refused(tmp_path) == (
        f"{tmp_path}: its run is not finished (preempted), so there is no metrics.json; finish it "
        "with the command that began it, or leave it out"
    )


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"])
def test_a_file_of_something_else(tmp_path, content):
    path = tmp_path / "metrics.json"
    path.write_bytes(content)
    assert refused(path) == (
        f"{path}: cannot be read as JSON; name the metrics.json of a finished run"
    )


@pytest.mark.parametrize("key", ["eval_loss", "parameters", "train_tokens", "data_fingerprint"])
def test_a_number_that_is_missing(tmp_path, key):
    path = write_metrics(tmp_path, RUN, **{key: ...})
    assert refused(path) == f"{path}: has no {key}; name the metrics.json of a finished run"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "nan"), (None, "None"), (0, "0"), ("3.1", "'3.1'"),
        (10**400, "100000000000000000...0000000000000000000"),
    ],
)  # fmt: skip
def test_a_loss_that_is_none(tmp_path, value, said):
    path = write_metrics(tmp_path, RUN, eval_loss=value)
    assert refused(path) == (
        f"{path}: eval_loss is {said}, which no law can be fitted to; leave the run out"
    )


def test_the_same_file_twice(tmp_path):
    path = write_metrics(tmp_path, RUN)
    assert refused(path, tmp_path) == (f"{path}: named 2 times; name each run of a ladder once")


def test_two_runs_of_one_size_and_length(tmp_path, finished_run):
    copy = shutil.copytree(finished_run, tmp_path / "again")
    size, tokens = points([copy])[0][1:3]
    assert refused(finished_run, copy) == (
        f"finished and again: both have {size:,} parameters and {tokens:,} tokens; a ladder has "
        "each size and length once, leave one out"
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tokenizer_fingerprint": "x"}, "tokenizer (tokenizer_fingerprint)"),
        ({"eval_tokens": 999}, "held-out text (eval_tokens)"),
        ({"eval_bytes": 999}, "held-out text (eval_bytes)"),
        ({"data_fingerprint": "x"}, "prepared text (data_fingerprint)"),
    ],
)
def test_losses_that_cannot_be_compared(tmp_path, changed, said):
    names = ("a", "b", "c", "d")
    for place, name in enumerate(names):
        others = changed if name == "b" else {}
        write_metrics(tmp_path / name, RUN._replace(tokens=1000 + place), **others)
    assert refused(*(tmp_path / name for name in names)) == (
        f"b: another {said} than the other runs', so that the losses cannot be compared; train all "
        "rungs on the same prepared text (data.path)"
    )
