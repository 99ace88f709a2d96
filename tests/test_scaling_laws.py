"""Published scaling laws give the figures that their papers print."""

import math
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from pipeline import scaling_laws as laws
from pipeline.planning import SIZES, Shape, parameters, parameters_by_part

LADDER = sorted((ROOT / "recipes" / "ladder").glob("*.yaml"))

# Hoffmann et al. 2022: parameters, FLOPs, tokens of table 3 (approach 1) and table A3 (approach 2).
TABLE_3 = [(400e6, 1.92e19, 8.0e9), (1e9, 1.21e20, 20.2e9), (10e9, 1.23e22, 205.1e9),
           (67e9, 5.76e23, 1.5e12), (175e9, 3.85e24, 3.7e12), (1e12, 1.27e26, 21.2e12)]  # fmt: skip
TABLE_A3 = [(400e6, 1.84e19, 7.7e9), (1e9, 1.20e20, 20.0e9), (10e9, 1.32e22, 219.5e9),
            (67e9, 6.88e23, 1.7e12), (175e9, 4.54e24, 4.3e12),
            (1e12, 1.59e26, 26.5e12)]  # fmt: skip


@pytest.mark.parametrize(
    ("approach", "row"),
    [("1: training curves", row) for row in TABLE_3]
    + [("2: isoFLOP curves", row) for row in TABLE_A3],
)
def test_the_first_two_approaches_repeat_their_tables(approach, row):
    """Within 6 %: the exponents are rounded to two digits, the anchor to a billion."""
    size, flops, tokens = row
    found = laws.compute_optimal(flops)[approach]
    assert found.parameters == pytest.approx(size, rel=0.06)
    assert found.tokens == pytest.approx(tokens, rel=0.06)


def test_chinchilla_and_gpt3():
    # Brown et al. 2020, tables 2.1 and D.1: 174.6 billion parameters, 300 billion tokens, 3.14e23.
    gpt3 = parameters(Shape(96, 12_288, 96, 50_257, 2_048))
    assert gpt3 == pytest.approx(174_600e6, rel=1e-4)
    assert laws.FLOPS * gpt3 * 300e9 == pytest.approx(3.14e23, rel=0.002)
    found = laws.compute_optimal(laws.FLOPS * 70e9 * 1.4e12)
    for name in ("1: training curves", "2: isoFLOP curves", "3: fitted again"):
        assert 17 < found[name].tokens_per_parameter < 25
    assert found["3: parametric loss"].tokens_per_parameter > 60  # why both are shown
    for optimum in found.values():
        assert laws.FLOPS * optimum.parameters * optimum.tokens == pytest.approx(
            laws.FLOPS * 70e9 * 1.4e12
        )
        assert optimum.source
    at_gopher = laws.compute_optimal(laws.GOPHER_FLOPS)
    told = [float(f"{one.tokens_per_parameter:.2g}") for one in at_gopher.values()]
    assert told == [21, 24, 93, 18]
    assert all(f" {ratio:.0f}" in laws.WHY_BOTH for ratio in told)


@pytest.mark.parametrize("law", [laws.HOFFMANN, laws.BESIROGLU])
@pytest.mark.parametrize("flops", [1e15, 1e20, 5.76e23])
def test_the_optimum_is_the_lowest_loss_for_its_operations(law, flops):
    best = law.optimum(flops)
    sizes = [best.parameters * 1.02**step for step in range(-200, 201)]
    losses = [law.loss(size, flops / (6 * size)) for size in sizes]
    assert min(losses) == pytest.approx(best.loss, rel=1e-12)
    exponent = law.beta / (law.alpha + law.beta)
    more = law.optimum(10 * flops).parameters / best.parameters
    assert more == pytest.approx(10**exponent)


def test_the_exponents_of_the_third_approach():
    exponents = [one.beta / (one.alpha + one.beta) for one in (laws.HOFFMANN, laws.BESIROGLU)]
    assert exponents == pytest.approx([0.46, 0.5126], abs=0.01)  # table 2; the re-fit's text


def test_a_ratio_twice_or_half_the_best_costs_next_to_nothing():
    """The reason for `ABOUT`."""
    costs = []
    for law in (laws.HOFFMANN, laws.BESIROGLU):
        for flops in (1.92e19, 5.76e23):
            best = law.optimum(flops)
            for factor in (laws.ABOUT**-0.5, laws.ABOUT**0.5):
                loss = law.loss(best.parameters * factor, best.tokens / factor)
                costs.append(loss / best.loss - 1)
    assert 0.0006 < min(costs) < max(costs) < 0.00275


def test_kaplan():
    assert laws.KAPLAN_OF_PARAMETERS.loss(1e9) == pytest.approx(2.376, abs=0.001)
    assert laws.KAPLAN_OF_PARAMETERS.loss(2e9) / laws.KAPLAN_OF_PARAMETERS.loss(
        1e9
    ) == pytest.approx(0.95, abs=0.002)  # their section 1.2
    # With endless text the joint law is a power of N alone; with an endless model, of D.
    assert laws.kaplan_loss(1e8, math.inf) == pytest.approx((6.4e13 / 1e8) ** 0.076)
    assert laws.kaplan_loss(math.inf, 1e9) == pytest.approx((1.8e13 / 1e9) ** 0.103)
    # GPT-2 small on OpenWebText comes to 2.85 (nanoGPT); its parameters without embeddings:
    parts = parameters_by_part(SIZES["124M"])
    inner = parameters(SIZES["124M"]) - parts["embedding"] - parts["positions"]
    assert laws.kaplan_loss(inner, 9e9) == pytest.approx(2.85, abs=0.06)


def test_a_power_law_of_one_alone_says_what_it_supposes():
    of_size, of_text = laws.KAPLAN_OF_PARAMETERS, laws.KAPLAN_OF_TOKENS
    assert of_size.said(1e8) == "on endless text; within what it was fitted from"
    assert of_size.said(1e10).endswith("; extrapolated: fitted up to 1.5 B parameters")
    assert of_text.said(3e6) == (
        "in a model large enough; extrapolated: fitted from 22 M tokens on"
    )
    assert of_text.formula == "(5.4e13 / D)^0.095"
    assert of_text.constants == {"D_c": 5.4e13, "alpha_D": 0.095}


def test_a_law_is_told_with_its_constants():
    assert laws.HOFFMANN.formula == "1.69 + 406.4 / N^0.34 + 410.7 / D^0.28"
    assert laws.BESIROGLU.formula == "1.8172 + 482.01 / N^0.3478 + 2085.43 / D^0.3658"
    for value in laws.KAPLAN_CONSTANTS.values():
        assert f"{value:g}".replace("e+", "e") in laws.KAPLAN_FORMULA
    first = laws.compute_optimal(1e20)["1: training curves"]
    assert first.law == "N = 67 B x (C / 5.76e23)^0.50"
    assert first.constants == {"N": 67e9, "C": 5.76e23, "exponent": 0.50}


def test_the_critical_batch():
    """1 to 2 million tokens for the largest models at the end (their section 5.1)."""
    assert laws.critical_batch_tokens(3.0) == pytest.approx(1.07e6, rel=0.01)
    # The loss falls by 13 % while the batch doubles (their figure 10).
    assert laws.critical_batch_tokens(3 * 0.8646) == pytest.approx(
        2 * laws.critical_batch_tokens(3.0), rel=0.01
    )


@pytest.mark.parametrize(
    ("size", "tokens", "beginning"),
    [
        (70e9, 1.4e12, "about as many tokens as compute-optimal for this size (20 per parameter, "
         "Hoffmann et al. 2022): 20 per parameter"),
        (70e9, 0.35e12, "4x fewer tokens than compute-optimal for this size (20 per parameter, "
         "Hoffmann et al. 2022): a smaller model on more text would reach a lower loss for the "
         "same compute"),
        (1_071_872, 2_867_200, "7.5x fewer tokens than"),
        (8e9, 15e12, "94x more tokens than"),
        (1e6, 1e12, "50,000x more tokens than"),
    ],
)  # fmt: skip
def test_the_verdict(size, tokens, beginning):
    assert laws.verdict(size, tokens).startswith(beginning)


def test_more_tokens_are_cheaper_afterwards():
    assert laws.verdict(8e9, 15e12).endswith("this one is cheaper to use afterwards")


@pytest.mark.parametrize(
    ("size", "tokens", "said"),
    [
        (1e9, 20e9, "within what it was fitted from"),
        (1e6, 20e9, "extrapolated: fitted from 70 M parameters on"),
        (1e6, 3e6, "extrapolated: fitted from 70 M parameters and 5 B tokens on"),
        (70e9, 1.4e12, "extrapolated: fitted up to 16 B parameters and 500 B tokens"),
        (1e6, 1e12, "extrapolated: fitted from 70 M parameters on, up to 500 B tokens"),
    ],
)
def test_validity_is_said(size, tokens, said):
    assert laws.HOFFMANN.validity.said(size, tokens) == said


# -- from one size to another ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "tokens_per_update", "learning_rate"),
    [
        (2_867_200, 2048, 1e-2),
        (716_800, 1024, 0.0070711),
        (1_433_600, 1536, 0.0086603),  # 1,448 rounds to 12 rows
        (11_468_800, 4096, 0.0141421),
        (1_000, 512, 0.005),  # four rows at least
    ],
)
def test_batch_and_rate_go_with_the_root_of_the_tokens(tokens, tokens_per_update, learning_rate):
    found = laws.carried(laws.QUICKSTART, tokens=tokens)
    assert found.tokens_per_update == tokens_per_update
    assert found.learning_rate == pytest.approx(learning_rate, rel=1e-4)


def test_rows_of_another_length():
    found = laws.carried(laws.QUICKSTART, tokens=2_867_200, block_size=1024)
    assert found.tokens_per_update == 4096  # four rows at least
    assert found.block_size == 1024


def settings(path: Path) -> laws.Settings:
    recipe = yaml.safe_load(path.read_text())
    training, update = recipe["training"], recipe["tokens_per_update"]
    return laws.Settings(
        training["max_steps"] * update, update, float(training["learning_rate"]),
        recipe["data"]["block_size"],
    )  # fmt: skip


def test_the_reference_is_the_quickstart():
    assert settings(ROOT / "recipes" / "quickstart.yaml") == laws.QUICKSTART


@pytest.mark.parametrize("path", LADDER, ids=lambda path: path.stem)
def test_the_ladder_follows_the_rule(path):
    rung = settings(path)
    wanted = laws.carried(laws.QUICKSTART, tokens=rung.tokens)
    assert rung.tokens_per_update == wanted.tokens_per_update
    assert rung.learning_rate == pytest.approx(wanted.learning_rate, rel=5e-3)  # three digits
