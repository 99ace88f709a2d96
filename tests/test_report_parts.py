"""What is said of a run, and how numbers are put into words."""

from run_folders import make_unfinished, write_run

from pipeline.report_parts import (
    Table,
    headlines,
    made_from,
    run_parts,
    state_sentence,
)
from pipeline.run_record import read_run
from pipeline.wording import NOTHING


def parts_of(folder):
    return {part.title: part for part in run_parts(read_run(folder))}


def rows_of(part):
    return {row[0]: row[1:] for table in part.tables for row in table.rows}


def test_the_parts_come_in_their_order_and_say_what_was_asked(tmp_path):
    parts = parts_of(
        write_run(
            tmp_path / "run", tasks={"arc": {"acc": 0.25, "acc_stderr": 0.02, "samples": 1000}}
        )
    )
    assert list(parts) == [
        "Results on held-out text", "Tasks", "Curves", "What it wrote", "Data", "Cost",
        "Made with", "Recipe",
    ]  # fmt: skip
    results = rows_of(parts["Results on held-out text"])
    assert results["bits per byte"] == ["1.7500 (1.7000 to 1.8000)", "1.8000"]
    assert results["next token right"] == ["31.00%", NOTHING]
    notes = " ".join(parts["Results on held-out text"].notes)
    assert "95 % intervals for other documents like these (by a bootstrap" in notes
    assert "The test text is one document: no interval." in notes
    assert rows_of(parts["Tasks"]) == {"arc": ["acc", "0.25 \N{PLUS-MINUS SIGN} 0.02", "1,000"]}
    assert [label for label, _ in parts["What it wrote"].texts] == [
        "update 10", "update 30", "update 40",
    ]  # fmt: skip
    data = rows_of(parts["Data"])
    assert data["train"] == ["7", "2,901", "1,000"] and data["book.txt"] == data["test"]
    assert data["prepared rows"] == ["d" * 64] and data["validation rows"] == ["a" * 64]
    cost = rows_of(parts["Cost"])
    assert cost["time"] == ["1 h 2 min"] and cost["tokens"] == ["40,960"]
    assert cost["floating-point operations"] == ["2.96e+11"]
    assert "g CO2e" in cost["CO2 (estimate)"][0] and "Green Algo" in parts["Cost"].notes[-1]
    made = rows_of(parts["Made with"])
    assert made["processor"] == ["A Processor"] and made["git commit"] == ["c" * 40]
    assert "max_steps: 40" in parts["Recipe"].code


def test_what_is_not_known_is_left_out(tmp_path):
    folder = write_run(
        tmp_path / "run", test_loss=None, test_perplexity=None, test_bits_per_byte=None,
        eval_confidence_intervals=None, hardware=None, versions=None, mfu=None, device=None,
    )  # fmt: skip
    (folder / "samples.txt").unlink()
    (folder / "blocks" / "manifest.json").unlink()
    parts = parts_of(folder)
    assert "What it wrote" not in parts
    assert parts["Results on held-out text"].tables[0].head == ["", "validation"]
    assert "energy (estimate)" not in rows_of(parts["Cost"])
    assert "not where the run had them" in parts["Data"].sentences[0]


def test_a_streamed_run_counts_only_what_was_held_out(tmp_path):
    folder = write_run(tmp_path / "run", recipe={"data": {"dataset": "a/b", "streaming": True}})
    part = parts_of(folder)["Data"]
    assert "streamed" in part.sentences[0]
    assert "from scratch, trained on 99,000 bytes of a/b" in made_from(read_run(folder))


def test_several_sources_are_all_named(tmp_path):
    sources = [
        {"files": ["/x/a.txt"], "weight": 0.5},
        {"dataset": "b/c", "name": "B", "weight": 0.5},
    ]
    folder = write_run(tmp_path / "run", recipe={"data": {"sources": sources}})
    assert "of a.txt, B; held out: 2,900 bytes (7 document(s))" in made_from(read_run(folder))


def test_the_numbers_that_come_first(tmp_path):
    found = headlines(read_run(write_run(tmp_path / "run")))
    assert found[0] == ("bits per byte", "1.7500", "95 %: 1.7000 to 1.8000")
    assert ("tokens trained on", "41 k", "40 updates") in found
    assert ("tokens per second", "9 k", "1 h 2 min in all") in found


def test_an_unfinished_run_says_so(tmp_path):
    run = read_run(make_unfinished(write_run(tmp_path / "run")))
    said = state_sentence(run)
    assert "not finished: preempted (SIGTERM, in blocks, after update 20)" in said
    assert said.endswith("after update 20 of 40.")
    titles = [part.title for part in run_parts(run)]
    assert "Cost" not in titles and "Curves" in titles


def test_overfitting_wants_to_be_seen(tmp_path):
    import json

    from run_folders import history

    folder = write_run(tmp_path / "run")
    assert not parts_of(folder)["Curves"].is_warning
    (folder / "history.json").write_text(json.dumps(history(best=20)))
    part = parts_of(folder)["Curves"]
    assert part.is_warning and "Overfitting" in part.sentences[0]


def test_columns_of_numbers_are_known():
    table = Table(
        ["", "n", "hash", "text"], [["a", "1,000", "1" * 64, "b"], ["b", NOTHING, "", ""]]
    )
    assert [table.is_numeric(column) for column in range(4)] == [False, True, False, False]
    assert not Table([], [["a", "1"]]).is_numeric(1)
