"""What the numbers mean: arithmetic by table, intervals against brute force."""

import json
import math

import numpy as np
import pytest

from pipeline.perplexity import MEASURES, Score, bits_per_byte, perplexity


def score_of(nats, tokens, correct=None, size=None, words=None):
    count = len(nats)
    given = [correct or [0] * count, size or [1] * count, words or [1] * count]
    return Score(np.array(nats, float), np.array(tokens), *(np.array(each) for each in given))


@pytest.mark.parametrize(
    "loss, value",
    [(0, 1), (math.log(50257), 50257), (1, math.e), (800, math.inf), (math.inf, math.inf)],
)
def test_perplexity(loss, value):
    assert perplexity(loss) == pytest.approx(value)
    assert math.isnan(perplexity(math.nan))


@pytest.mark.parametrize(
    "nats, count, bits", [(0, 1, 0), (8 * math.log(2), 1, 8), (5545.177444479562, 1000, 8)]
)
def test_bits_per_byte(nats, count, bits):
    assert bits_per_byte(nats, count) == pytest.approx(bits, rel=1e-12)
    assert bits_per_byte(2 * nats, 2 * count) == pytest.approx(bits, rel=1e-12)
    assert math.isnan(bits_per_byte(nats, 0))


def test_a_score_names_its_numbers():
    score = score_of([20 * math.log(4), 0], [15, 5], [3, 2], [60, 20])
    assert score.as_metrics("held_out") == {
        "held_out_loss": pytest.approx(math.log(4)),
        "held_out_perplexity": pytest.approx(4),
        "held_out_bits_per_byte": pytest.approx(0.5),
        "held_out_accuracy": 0.25,
        "held_out_tokens": 20,
        "held_out_bytes": 80,
    }


def test_measures_are_of_the_corpus_and_the_mean_is_of_the_texts():
    """One long easy text and one short hard one: the corpus is not the mean of the two."""
    score = score_of([100 * math.log(2), 2 * math.log(32)], [100, 2], [90, 0], [400, 8], [50, 1])
    found = score.measures()
    nats = 110 * math.log(2)
    assert found == {
        "perplexity": pytest.approx(2 ** (110 / 102)),
        "mean_perplexity": pytest.approx((2 + 32) / 2),
        "bits_per_byte": pytest.approx(110 / 408),
        "nats_per_token": pytest.approx(nats / 102),
        "word_perplexity": pytest.approx(2 ** (110 / 51)),
        "accuracy": pytest.approx(90 / 102),
    }
    assert tuple(found) == MEASURES


def test_texts_in_which_nothing_is_predicted_do_not_count():
    some = score_of([1.0, 0, 2.0, 0], [3, 0, 4, 0], size=[5, 0, 6, 0], words=[1, 0, 2, 0])
    only = score_of([1.0, 2.0], [3, 4], size=[5, 6], words=[1, 2])
    assert some.measures() == only.measures()
    assert some.intervals() == only.intervals()


def test_what_cannot_be_said_is_none_and_no_nan():
    found = score_of([1.0, 2.0], [3, 4], size=[0, 0], words=[0, 0])
    assert found.measures()["bits_per_byte"] is None
    assert found.measures()["word_perplexity"] is None
    assert found.intervals()["word_perplexity"] is None
    assert found.intervals()["perplexity"] is not None
    json.dumps([found.measures(), found.intervals()], allow_nan=False)


def test_a_model_that_has_diverged_has_an_infinite_perplexity():
    found = score_of([9000.0, 9000.0], [3, 4])
    assert found.measures()["perplexity"] == math.inf
    assert found.measures()["nats_per_token"] == pytest.approx(18000 / 7)
    found.intervals()


@pytest.mark.parametrize("count", [0, 1])
def test_one_document_says_nothing_of_others(count):
    found = score_of([1.0] * count + [0.0], [2] * count + [0]).intervals()
    assert found == dict.fromkeys(MEASURES)


def test_intervals_equal_those_of_resampling_document_by_document():
    """The same resamples, each measured as a score of its own."""
    source = np.random.default_rng(5)
    count = 30
    tokens = source.integers(5, 200, count)
    nats = tokens * source.gamma(9, 0.3, count)
    fields = [nats, tokens, source.binomial(tokens, 0.3), tokens * 4, tokens // 2 + 1]
    score = Score(*fields)
    found = score.intervals(seed=3)
    again = np.random.default_rng(3)
    drawn = []
    for _ in range(1000):
        chosen = again.integers(count, size=count)
        drawn.append(Score(*(field[chosen] for field in fields)).measures())
    for name in MEASURES:
        expected = np.percentile([measures[name] for measures in drawn], [2.5, 97.5])
        assert found[name] == pytest.approx(expected.tolist(), rel=1e-9)
    assert found == score.intervals(seed=3) != score.intervals(seed=4)


@pytest.mark.slow
def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """200 corpora of 60 documents from one population, of which the loss per token is known."""
    source = np.random.default_rng(0)
    held = 0
    for number in range(200):
        tokens = source.integers(20, 400, 60)
        nats = tokens * source.normal(3.0, 0.5, 60)  # 3 nats per token, whatever the length
        low, high = Score(nats, tokens, tokens, tokens, tokens).intervals(seed=number)[
            "nats_per_token"
        ]
        held += low <= 3.0 <= high
    # 190 are wanted; of 200 with a chance of 0.93 each (a bootstrap of 60 is a little narrow) fewer
    # than 175 come once in 1,000 times.
    assert 175 <= held <= 200


@pytest.mark.slow
def test_of_very_many_documents_fewer_resamples_are_drawn():
    count = 400_000
    tokens = np.full(count, 10)
    nats = tokens * np.random.default_rng(1).normal(3.0, 0.5, count)
    low, high = Score(nats, tokens, tokens, tokens, tokens).intervals()["nats_per_token"]
    assert low < nats.sum() / tokens.sum() < high
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / count**0.5, rel=0.15)
