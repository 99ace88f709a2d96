"""What is drawn of a run's logs: which curves, how many points, and that all of it is numbers."""

import json
import math

from run_folders import history

from pipeline.curves import MOST_POINTS, draw, figure, overlaid, panels


def by_title(logs):
    return {panel.title: panel for panel in panels(logs)}


def test_every_curve_has_its_panel():
    found = by_title(history())
    assert list(found) == [
        "Loss", "Perplexity of held-out texts", "Bits per byte", "Learning rate", "Gradient norm",
        "Speed",
    ]  # fmt: skip
    assert [s.name for s in found["Loss"].series] == ["training", "held-out"]
    assert [s.name for s in found["Perplexity of held-out texts"].series] == ["held-out", "book"]
    held_out = found["Loss"].series[1]
    assert held_out.updates == [10, 20, 30, 40] and held_out.tokens[0] == 10240
    assert len(found["Speed"].series[0].values) == 8  # not those of evaluations, too


def test_a_text_has_one_colour_in_all_panels():
    colours = {}
    for panel in panels(history())[:3]:
        for series in panel.series:
            assert colours.setdefault(series.name, series.colour) == series.colour
    assert len(set(colours.values())) == 3


def test_measures_are_no_texts_and_a_text_may_be_called_like_one():
    logs = [{"step": 1, "tokens_seen": 1, "eval_loss": 1.0, "eval_word_perplexity": 99.0,
             "eval_perplexity": 3.0}]  # fmt: skip
    assert [s.name for s in by_title(logs)["Perplexity of held-out texts"].series] == ["held-out"]
    logs.append({"step": 1, "tokens_seen": 1, "eval_word_loss": 2.0, "eval_word_perplexity": 7.4})
    assert by_title(logs)["Perplexity of held-out texts"].series[1].values == [7.4]


def test_tasks_have_a_panel():
    logs = [{"step": 1, "tokens_seen": 1, "eval_task_arc_acc": 0.25, "eval_task_arc_loss": 2.0,
             "eval_task_arc_acc_stderr": 0.1, "eval_task_arc_samples": 50}]  # fmt: skip
    assert [s.name for s in by_title(logs)["Tasks"].series] == ["arc_acc", "arc_loss"]
    assert len(panels(logs)) == 1


def test_the_first_update_s_speed_is_left_out_for_it_compiles():
    logs = [
        {"step": n, "tokens_seen": n, "loss": 1.0, "tokens_per_second": 10.0 * n} for n in (1, 2)
    ]
    logs[0]["compile_seconds"] = 30.0
    assert by_title(logs)["Speed"].series[0].values == [20.0]


def test_what_is_no_number_is_left_out_and_the_figure_is_json():
    logs = history()
    for value in (math.nan, math.inf, None, "x"):
        logs.append({"step": 41, "tokens_seen": 42000, "loss": value, "eval_loss": value})
    logs.append({"loss": 1.0})  # from before tokens were counted
    found = by_title(logs)["Loss"]
    assert len(found.series[0].values) == 8
    json.dumps([figure(panel) for panel in panels(logs)], allow_nan=False)
    assert panels([]) == []


def test_a_long_history_is_thinned_and_keeps_its_ends_and_spikes():
    logs = [{"step": n, "tokens_seen": n, "loss": 2.0 + n % 3} for n in range(1, 100_001)]
    logs[54_321]["loss"], logs[77_777]["loss"] = 99.0, 0.5
    series = by_title(logs)["Loss"].series[0]
    assert len(series.values) <= MOST_POINTS
    assert series.updates == sorted(set(series.updates))
    assert series.updates[0] == 1 and series.updates[-1] == 100_000
    assert max(series.values) == 99.0 and min(series.values) == 0.5


def test_an_axis_is_logarithmic_where_perplexity_spans_a_decade():
    def perplexity(first, last):
        logs = [{"step": n, "tokens_seen": n, "eval_loss": 1.0, "eval_perplexity": value}
                for n, value in ((1, first), (2, last))]  # fmt: skip
        return figure(by_title(logs)["Perplexity of held-out texts"])["layout"]["yaxis"]

    assert perplexity(2000.0, 20.0)["type"] == "log"
    assert {20, 50, 100, 2000} <= set(perplexity(2000.0, 20.0)["tickvals"])
    assert "2,000" in perplexity(2000.0, 20.0)["ticktext"]
    assert "type" not in perplexity(24.0, 20.0)
    for lowest, highest in ((1.1, 5e21), (1e-9, 1.0), (2.0, 1e300)):  # a run that has diverged
        assert 3 <= len(perplexity(highest, lowest)["tickvals"]) <= 13
    assert figure(by_title(history())["Loss"])["layout"]["hovermode"] == "x unified"


def test_runs_are_laid_over_each_other():
    one, other = panels(history()), panels(history(20))
    found = {panel.title: panel for panel in overlaid({"a": one, "b": other, "empty": []})}
    loss, rate = found["Loss"].series, found["Learning rate"].series
    assert [s.name for s in loss] == ["a: training", "a: held-out", "b: training", "b: held-out"]
    assert [s.is_dotted for s in loss] == [True, False, True, False]
    assert [s.name for s in rate] == ["a", "b"] and not any(s.is_dotted for s in rate)
    assert loss[0].colour == loss[1].colour != loss[2].colour


def test_the_picture_is_a_picture_also_of_nothing(tmp_path):
    for logs in (history(), []):
        draw(panels(logs), tmp_path / "curves.png")
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
