"""What perplexity, bits per byte, accuracy and their intervals mean here, and the metric itself.

All follow from sums over the predicted tokens of each document: nats (natural-log units), tokens,
those that were the most likely ones, the UTF-8 bytes and the words that they stand for. The sums
are fp64 and divided once; no mean of batch means, no dependence on batch size.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evaluate
import numpy as np

# Enough for two digits of an interval's ends (Efron and Tibshirani 1993, chapter 13).
RESAMPLES = 1000
# Documents drawn in all: about two seconds. With more documents than a hundredth of it, fewer
# resamples are drawn, which then no longer matters: the interval is narrow.
MOST_DRAWN = 100_000_000
FEWEST_RESAMPLES = 200
LEVEL = 0.95

# What a score's numbers are called where they stand with an interval.
MEASURES = (
    "perplexity", "mean_perplexity", "bits_per_byte", "nats_per_token", "word_perplexity",
    "accuracy",
)  # fmt: skip
# Of documents in which only the last word is predicted; LAMBADA's accuracy.
LAST_WORD_MEASURES = (*MEASURES, "last_word_accuracy")


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """Sums over the predicted tokens of each document, [documents] each.

    Attributes:
        nats: cross-entropy, fp64.
        tokens: how many were predicted.
        correct: how many of them were the most likely token.
        bytes: UTF-8 bytes that they stand for; end-of-text stands for none.
        words: white-space separated words of which at least a part was predicted; zeros where
            they were not counted.
    """

    nats: np.ndarray
    tokens: np.ndarray
    correct: np.ndarray
    bytes: np.ndarray
    words: np.ndarray

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per predicted token."""
        return _ratio(self.nats.sum(), self.tokens.sum())

    def as_metrics(self, prefix: str) -> dict[str, float]:
        """Return loss, perplexity, bits per byte, accuracy and the counts under `<prefix>_...`."""
        tokens, size = int(self.tokens.sum()), int(self.bytes.sum())
        return {
            f"{prefix}_loss": self.loss,
            f"{prefix}_perplexity": perplexity(self.loss),
            f"{prefix}_bits_per_byte": bits_per_byte(self.nats.sum(), size),
            f"{prefix}_accuracy": _ratio(self.correct.sum(), tokens),
            f"{prefix}_tokens": tokens,
            f"{prefix}_bytes": size,
        }

    def measures(self, names: Sequence[str] = MEASURES) -> dict[str, float | None]:
        """Return `names` over all documents; None where bytes or words are none.

        `mean_perplexity` is the mean of each document's perplexity, as `evaluate`'s own metric
        averages: it hangs on how the text is cut into documents, and is there to be compared.
        """
        fields = self._fields()
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            found = _measures(fields.sum(0)[None], len(fields))
        return {n: None if math.isnan(found[n][0]) else float(found[n][0]) for n in names}

    def intervals(
        self, names: Sequence[str] = MEASURES, *, seed: int = 0
    ) -> dict[str, list[float] | None]:
        """Return a 95 % interval [low, high] of each measure: how it might fall for other text.

        Documents are drawn with replacement, as many as there are, and measured again; the
        interval holds the middle 95 % (percentile bootstrap, Efron 1979). Fewer than two documents
        say nothing of others: None.
        """
        fields = self._fields()
        count = len(fields)
        if count < 2:
            return dict.fromkeys(names)
        resamples = min(RESAMPLES, max(FEWEST_RESAMPLES, MOST_DRAWN // count))
        source = np.random.default_rng(seed)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            drawn = np.stack(
                [
                    np.bincount(source.integers(count, size=count), minlength=count) @ fields
                    for _ in range(resamples)
                ]
            )
            found = _measures(drawn, count)
            tail = 100 * (1 - LEVEL) / 2
            ends = {n: np.percentile(found[n], [tail, 100 - tail]).tolist() for n in names}
        return {n: None if np.isnan([*found[n], *ends[n]]).any() else ends[n] for n in names}

    def _fields(self) -> np.ndarray:
        """Return what the measures are made of, fp64 [documents with a predicted token, 7]."""
        scored = self.tokens > 0
        fields = (self.nats, self.tokens, self.correct, self.bytes, self.words)
        found = np.stack([field[scored].astype(np.float64) for field in fields], 1)
        with np.errstate(over="ignore"):
            own = np.exp(found[:, 0] / found[:, 1])
        return np.column_stack([found, own, found[:, 2] == found[:, 1]])


def perplexity(loss: float) -> float:
    """Return exp(loss) for a loss in nats per token; infinity where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(nats: float, byte_count: float) -> float:
    """Return nats / ln 2 / bytes: comparable between tokenizers, unlike perplexity."""
    return _ratio(nats / math.log(2), byte_count)


def load_metric(**options: Any) -> evaluate.Metric:
    """Return the package's own `evaluate` metric; loading it needs no network.

    `options` are those of `evaluate.load`.
    """
    return evaluate.load(str(Path(__file__).parent / "metrics" / "token_perplexity"), **options)


def _measures(sums: np.ndarray, documents: int) -> dict[str, np.ndarray]:
    """Return each measure [samples] from the sums [samples, 7] of the fields of `documents`."""
    nats, tokens, correct, size, words, own, exact = sums.T
    loss = nats / tokens
    return {
        "perplexity": np.exp(loss),
        "mean_perplexity": own / documents,
        "bits_per_byte": nats / math.log(2) / np.where(size, size, np.nan),
        "nats_per_token": loss,
        "word_perplexity": np.exp(nats / np.where(words, words, np.nan)),
        "accuracy": correct / tokens,
        "last_word_accuracy": exact / documents,
    }


def _ratio(value: float, count: float) -> float:
    return float(value) / float(count) if count else math.nan
