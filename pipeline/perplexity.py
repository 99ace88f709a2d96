"""What perplexity, bits per byte, accuracy and their intervals mean here, and the metric itself.

All follow from sums over the predicted tokens of each document: nats (natural-log units), tokens,
those that were the most likely ones, the UTF-8 bytes and the words that they stand for. The sums
are fp64 and divided once; no mean of batch means, no dependence on batch size.
"""

import dataclasses
import math
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

    def measures(self) -> dict[str, float | None]:
        """Return `MEASURES` over all documents; None where bytes or words are none.

        `mean_perplexity` is the mean of each document's perplexity, as `evaluate`'s own metric
        averages: it hangs on how the text is cut into documents, and is there to be compared.
        """
        sums = np.array([field.sum() for field in self._fields()], np.float64)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            own = np.exp(self.nats[self.tokens > 0] / self.tokens[self.tokens > 0])
            found = _measures(sums[None], np.array([own.mean()]))
        return {name: _defined(found[name][0]) for name in MEASURES}

    def intervals(self, *, seed: int = 0) -> dict[str, list[float] | None]:
        """Return a 95 % interval [low, high] of each measure: how it might fall for other text.

        Documents are drawn with replacement, as many as there are, and measured again; the
        interval holds the middle 95 % (percentile bootstrap, Efron 1979). Fewer than two documents
        say nothing of others: None.
        """
        scored = self.tokens > 0
        count = int(scored.sum())
        if count < 2:
            return dict.fromkeys(MEASURES)
        fields = np.stack([field[scored].astype(np.float64) for field in self._fields()], 1)
        resamples = min(RESAMPLES, max(FEWEST_RESAMPLES, MOST_DRAWN // count))
        source = np.random.default_rng(seed)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            fields = np.column_stack([fields, np.exp(fields[:, 0] / fields[:, 1])])
            drawn = np.stack(
                [
                    np.bincount(source.integers(count, size=count), minlength=count) @ fields
                    for _ in range(resamples)
                ]
            )
            found = _measures(drawn[:, :-1], drawn[:, -1] / count)
            tail = 100 * (1 - LEVEL) / 2
            ends = {n: np.percentile(found[n], [tail, 100 - tail]).tolist() for n in MEASURES}
        return {n: None if np.isnan(found[n]).any() else ends[n] for n in MEASURES}

    def part(self, documents: np.ndarray) -> "Score":
        """Return the score of some of the documents."""
        return Score(*(field[documents] for field in self._fields()))

    def _fields(self) -> tuple[np.ndarray, ...]:
        return self.nats, self.tokens, self.correct, self.bytes, self.words


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


def _measures(sums: np.ndarray, mean_perplexity: np.ndarray) -> dict[str, np.ndarray]:
    """Return each measure [samples] from sums [samples, 5] in the order of a score's fields."""
    nats, tokens, correct, size, words = sums.T
    loss = nats / tokens
    return {
        "perplexity": np.exp(loss),
        "mean_perplexity": mean_perplexity,
        "bits_per_byte": nats / math.log(2) / np.where(size, size, np.nan),
        "nats_per_token": loss,
        "word_perplexity": np.exp(nats / np.where(words, words, np.nan)),
        "accuracy": correct / tokens,
    }


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _ratio(value: float, count: float) -> float:
    return float(value) / float(count) if count else math.nan
