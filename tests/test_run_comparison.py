"""Several runs side by side: which is best, which is surely not, what may be compared."""

import pytest
from run_folders import make_unfinished, write_run

from pipeline.run_comparison import APART, BEST, comparable, comparison_parts, warnings
from pipeline.run_record import read_run


def between(low, high):
    return {name: [low, high] for name in ("loss", "perplexity", "bits_per_byte")}


@pytest.fixture
def make(tmp_path):
    def made(name, **changes):
        return read_run(write_run(tmp_path / name, **changes))

    return made


def rows_of(records, title):
    parts = {part.title: part for part in comparison_parts(records)}
    return {row[0]: row[1:] for row in parts[title].tables[0].rows}


def test_the_best_and_the_surely_worse_are_marked(make):
    records = [
        make("a", eval_loss=3.0, eval_confidence_intervals=between(2.9, 3.1)),
        make("b", eval_loss=3.05, eval_confidence_intervals=between(2.95, 3.15)),
        make("c", eval_loss=4.0, eval_confidence_intervals=between(3.9, 4.1)),
        make("d", eval_loss=5.0, eval_confidence_intervals=None),
    ]
    assert rows_of(records, "Results on held-out text")["validation: loss (nats per token)"] == [
        f"3.0000 {BEST} (2.9000 to 3.1000)", "3.0500 (2.9500 to 3.1500)",
        f"4.0000 {APART} (3.9000 to 4.1000)", "5.0000",
    ]  # fmt: skip
    assert warnings(records) == []


def test_numbers_of_different_parts_of_a_text_are_not_compared(make):
    records = [make("a", eval_bytes=100), make("b", eval_bits_per_byte=1.0)]
    rows = rows_of(records, "Results on held-out text")
    assert not any(BEST in cell for name, row in rows.items() for cell in row if "valid" in name)
    alone = [make("c"), make("d", eval_accuracy=None)]
    found = rows_of(alone, "Results on held-out text")["validation: next token right"]
    assert not any(BEST in cell for cell in found)


def test_of_accuracy_the_highest_is_best(make):
    records = [make("a", eval_accuracy=0.3), make("b", eval_accuracy=0.4)]
    found = rows_of(records, "Results on held-out text")["validation: next token right"]
    assert found == ["30.00%", f"40.00% {BEST}"]


def test_the_same_text_in_other_tokens_compares_by_byte_only(make):
    records = [make("a"), make("b", rows="b" * 64, eval_loss=1.0, eval_bits_per_byte=1.0)]
    assert comparable(records, "eval") == "text"
    assert "only bits per byte and perplexity per word can be compared" in warnings(records)[0]
    found = rows_of(records, "Results on held-out text")
    assert BEST in found["validation: bits per byte"][1]
    assert BEST not in "".join(found["validation: loss (nats per token)"])


def test_another_text_compares_not_at_all(make):
    records = [make("a"), make("b", rows="b" * 64)]
    records[1].data["validation"] = {"documents": 9, "bytes": 1}
    assert comparable(records, "eval") == "none" and comparable(records, "test") == "text"
    assert "The validation text differs" in warnings(records)[0]
    found = rows_of(records, "Results on held-out text")
    assert BEST not in "".join(found["validation: bits per byte"])


def test_rows_that_are_gone_are_said(make):
    one = make("a")
    records = [one, make("b")._replace(data={})]
    assert comparable(records, "eval") == "unknown"
    assert "nobody knows" in warnings(records)[0]


def test_differences_of_the_recipes_stand_key_by_key(make):
    other = {"training": {"max_steps": 80, "learning_rate": 0.5, "seed": 3}}
    found = rows_of([make("a"), make("b", recipe=other, git_commit="f" * 40)], "What differs")
    assert found["training.max_steps"] == ["40", "80"]
    assert found["training.seed"] == ["\N{EM DASH}", "3"]
    assert found["git_commit"][1] == "f" * 40
    assert "data.block_size" not in found and "training.output_dir" not in found


def test_equal_runs_differ_in_nothing(make):
    parts = {part.title: part for part in comparison_parts([make("a"), make("b")])}
    assert not parts["What differs"].tables and "are the same" in parts["What differs"].notes[0]
    assert [s.name for s in parts["Curves"].panels[0].series][::2] == ["a: training", "b: training"]


def test_an_unfinished_run_beside_a_finished_one(make, tmp_path):
    make("b")
    records = [make("a"), read_run(make_unfinished(tmp_path / "b"))]
    assert warnings(records)[0].startswith("b: This run is not finished: preempted")
    assert rows_of(records, "Cost")["updates"] == ["40", "20"]
    assert "\N{EM DASH}" == rows_of(records, "Cost")["time"][1]
