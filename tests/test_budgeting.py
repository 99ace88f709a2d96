"""What is made of a budget: the law of size and text, rates and batches by size."""

import itertools

import pytest

from pipeline.budgeting import data_constrained_loss
from pipeline.planning import SIZES, parameters
from pipeline.size_ladder import gpt3_batch_tokens, gpt3_learning_rate, shapes


def best(flops: float, text_tokens: float | None) -> tuple[float, float]:
    """Return the parameters and tokens of the least loss for 6 N D operations."""
    sizes = [10 ** (n / 200) for n in range(800, 2400)]
    count = min(sizes, key=lambda n: data_constrained_loss(n, flops / 6 / n, text_tokens))
    return count, flops / 6 / count


@pytest.mark.parametrize("flops", [1e17, 1e19, 5.76e23])
def test_enough_text_is_worth_twenty_tokens_a_parameter(flops):
    count, tokens = best(flops, None)
    assert 18 < tokens / count < 22
    assert best(flops, 2 * tokens) == (count, tokens)


def test_text_read_again_counts_less_and_less():
    """Muennighoff et al. 2023: four times are nearly as good as new, past forty nothing comes."""
    count, text = 1e8, 1e9
    losses = [data_constrained_loss(count, times * text, text) for times in (1, 4, 16, 40, 400)]
    assert losses == sorted(losses, reverse=True)
    fresh = [data_constrained_loss(count, times * text, None) for times in (1, 4, 16, 40, 400)]
    assert losses[0] == fresh[0] and losses[1] == pytest.approx(fresh[1], rel=0.01)
    assert losses[3] - losses[4] < 0.1 * (losses[0] - losses[1])
    # For short text the best is a smaller model that reads it more often.
    assert best(1e19, 1e8)[0] < best(1e19, None)[0]


def test_the_ladder_of_sizes_goes_up_and_has_gpt_2_s_own():
    found = shapes(50_257, 1024)
    counts = [parameters(shape) for shape in found]
    assert counts == sorted(counts)
    assert all(high < 2.3 * low for low, high in itertools.pairwise(counts))
    assert all(shape.width == 64 * shape.heads for shape in found)
    assert set(SIZES.values()) <= set(found)


@pytest.mark.parametrize(
    ("parameters", "rate", "batch"),
    [
        (124.4e6, 6e-4, 2**19),
        (350e6, 3e-4, 2**19),
        (1.3e9, 2e-4, 2**20),
        (175e9, 0.6e-4, 3.2e6),
        (10**13, 0.6e-4, 3.2e6),
    ],
)
def test_rates_and_batches_are_gpt_3_s(parameters, rate, batch):
    found, source = gpt3_learning_rate(parameters, inside=parameters)
    assert found == pytest.approx(rate) and "table 2.1" in source
    assert gpt3_batch_tokens(parameters) == pytest.approx(batch)


def test_small_sizes_have_kaplan_s_rate():
    rates = [gpt3_learning_rate(n, inside=n)[0] for n in (1e5, 1e6, 1e7, 1e8)]
    assert rates == sorted(rates, reverse=True)
    assert rates[1] == pytest.approx(0.003239 - 0.0001395 * 13.8155, rel=1e-4)
