"""Runs that follow no sum of powers are told from those that do."""

import pytest
from ladders import ladder

from pipeline.ladder import Run
from pipeline.law_fit import fit
from pipeline.law_forms import joint
from pipeline.scaling_laws import (
    KAPLAN_ALPHA_D,
    KAPLAN_ALPHA_N,
    KAPLAN_D,
    KAPLAN_N,
    kaplan_loss,
)


def test_kaplans_constants_come_back():
    runs = [r._replace(loss=kaplan_loss(*r[1:3])) for r in ladder(noise=0, seed=0)]
    found = joint(runs)
    constants = (KAPLAN_N, KAPLAN_D, KAPLAN_ALPHA_N, KAPLAN_ALPHA_D)
    assert found[:4] == pytest.approx(constants, rel=1e-3)
    assert found.loss(1e9, 1e10) == pytest.approx(kaplan_loss(1e9, 1e10), rel=1e-4)
    assert found.scatter < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_runs_that_follow_the_sum_are_left_to_it(seed):
    runs = ladder(noise=0.006, seed=seed)
    assert not joint(runs).suits_better(fit(runs))


# The first ladder of recipes/ladder, on 0.7, 1.4 and 2.9 million tokens: parameters, tokens, loss.
@pytest.fixture
def measured():
    rows = [
        (95104, 716800, 4.4879), (95104, 1433088, 4.1846), (95104, 2867200, 4.0358),
        (161088, 716800, 4.2383), (239360, 716800, 4.1049), (239360, 1433088, 3.7435),
        (544608, 716800, 3.9194), (544608, 1433088, 3.5495), (544608, 2867200, 3.2505),
        (1071872, 716800, 3.8250), (1071872, 2867200, 3.0767), (1894880, 716800, 3.7866),
        (1894880, 1433088, 3.3659), (3087360, 716800, 3.7468), (3087360, 1433088, 3.3180),
    ]  # fmt: skip
    return [Run(f"{size}_{tokens}", size, tokens, loss) for size, tokens, loss in rows]


def test_runs_of_few_tokens_per_parameter_do_not_follow_the_sum(measured):
    """By the sum the run of most operations is missed by 7 %, by Kaplan's form by 1.4 %."""
    law, other, largest = fit(measured), joint(measured), (3087360, 2867200, 2.8676)
    assert other.suits_better(law)
    assert other.loss(*largest[:2]) == pytest.approx(largest[2], rel=0.02)
    assert law.law.loss(*largest[:2]) > 1.05 * largest[2]
