"""What is told of a fit in the terminal."""

import pytest
from ladders import BUDGETS, SIZES, TRUE, ladder, without_largest

from pipeline.law_fit import fit
from pipeline.law_forms import joint
from pipeline.law_table import table
from pipeline.scaling_laws import kaplan_loss


def test_the_law_its_runs_and_what_they_predict():
    kept, left_out = without_largest(ladder(noise=0.003, seed=1))
    found = fit(kept)
    text = table(found, left_out, planned=(12e6, 60e6))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 95  # names of 15 letters; 80 with those of the recipes
    assert lines[1] == "fitted to 14 runs of 5 sizes and 3 budgets of tokens"
    (alpha,) = (line.split() for line in lines if line.startswith("alpha"))
    assert alpha == [
        "alpha", f"{found.law.alpha:.3g}", f"{found.ranges['alpha'][0]:.3g}", "to",
        f"{found.ranges['alpha'][1]:.3g}", "0.34", "0.3478",
    ]  # fmt: skip
    (row,) = (line.split() for line in lines if line.startswith(f"{SIZES[0]}_{BUDGETS[0]}"))
    expected = found.law.loss(SIZES[0], BUDGETS[0])
    assert row[1:] == [
        f"{SIZES[0]:,}", f"{BUDGETS[0]:,}", f"{kept[0].loss:.4f}", f"{expected:.4f}",
        f"{expected / kept[0].loss - 1:+.2%}",
    ]  # fmt: skip
    start = next(place for place, line in enumerate(lines) if line.startswith("predicted"))
    largest, recipe, best = (line.split() for line in lines[start + 1 : start + 4])
    estimate = found.predicted(SIZES[-1], BUDGETS[-1])
    assert largest == [
        f"{SIZES[-1]}_{BUDGETS[-1]}", "3.09", "M", "2.87", "M", f"{estimate.loss:.3f}",
        f"{estimate.low:.3f}", "to", f"{estimate.high:.3f}", f"{left_out[0].loss:.3f}",
        f"{estimate.loss / left_out[0].loss - 1:+.2%}",
        f"{joint(kept).loss(SIZES[-1], BUDGETS[-1]):.3f}",
        f"{joint(kept).loss(SIZES[-1], BUDGETS[-1]) / left_out[0].loss - 1:+.2%}",
    ]  # fmt: skip
    assert recipe[:6] == ["this", "recipe", "12", "M", "60", "M"]
    assert float(recipe[6]) == pytest.approx(found.law.loss(12e6, 60e6), abs=6e-4)
    assert float(best[7]) == pytest.approx(found.law.optimum(6 * 12e6 * 60e6).loss, abs=6e-4)
    assert "this recipe: extrapolated: fitted up to 3.09 M parameters and 2.87 M tokens" in lines


def test_what_the_runs_do_not_determine_is_said():
    assert "Not determined" not in table(fit(ladder(noise=0, seed=1)))
    text = table(fit(ladder(noise=0.02, seed=2)))
    assert "Not determined by these runs: E" in text
    assert "The interval is that of one more run" not in text  # nothing is predicted


def test_a_law_that_fits_exactly():
    text = table(fit(ladder(noise=0, seed=0)))
    assert f"{TRUE.E:.3g}" in text
    assert "scatter of the runs about the law: 0.00%" in text
    assert "Kaplan's form (" not in text


@pytest.mark.slow
def test_runs_that_follow_no_sum_are_said_to():
    runs = [
        run._replace(loss=kaplan_loss(run.parameters, run.tokens) * run.loss / TRUE.loss(*run[1:3]))
        for run in ladder(noise=0.003, seed=1)
    ]
    kept, left_out = without_largest(runs)
    text = table(fit(kept), left_out)
    assert "Kaplan's form (Kaplan et al. 2020, equation 1.5) lies much closer to these runs" in text
