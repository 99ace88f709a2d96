"""What goes wrong in a run: how losses and norms show it, what it means, and what treats it."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

# The loss of a model that finds all entries of a vocabulary equally likely is ln(vocabulary). The
# quickstart is 9 % below it after 10 updates, shakespeare 10 %. A fresh one begins somewhat above
# it (of logits with a deviation of s by s * s / 2: GPT-2 small by 1.4 %, xl by 3 %), and the smoke
# recipe at a rate of 1e-9 stays within 0.4 %; far above it no model begins: too high a rate leads
# there.
BETTER_THAN_GUESSING, WORSE_THAN_GUESSING = 0.98, 1.1
GUESSING_OVER = 20  # updates, so that no single one counts; guards.spike_window holds them

# A series that hardly varies has spikes everywhere. Of a loss a thousandth of its mean counts as
# spread at least: with 6 sigmas a spike is then 0.6 % above it. Gradient norms do vary: in healthy
# runs (quickstart, shakespeare) single norms lay 11 deviations above the mean, and never above 1.7
# times it; with a third a spike is 3 times the mean at least.
LEAST_LOSS_SPREAD, LEAST_NORM_SPREAD = 1e-3, 1 / 3


class Treatment(NamedTuple):
    """One cause, and the keys and commands (in backticks) that treat it."""

    cause: str
    remedy: str


class Symptom(NamedTuple):
    """What can be seen of a run that goes wrong; the likeliest cause stands first."""

    title: str
    meaning: str
    treatments: tuple[Treatment, ...]


_LOOK_AT_ROWS = "`prepare_data.py --show 20`"
_LOWER_RATE = Treatment("too high a rate", "`training.learning_rate` x 0.1")
_WARM_UP = Treatment("too short a warm-up", "longer `schedule.warmup_steps`")
_CLIP = Treatment("gradients that are not clipped", "`training.max_grad_norm: 1.0`")
_NO_FP16 = Treatment("fp16", "`precision: bf16`")

SYMPTOMS = {
    "spike": Symptom(
        "a spike",
        "the loss is `guards.spike_sigmas` standard deviations above the `guards.spike_window` "
        "updates before, or the gradient norm as far and three times their mean",
        (
            Treatment(
                "rows unlike the rest",
                f"{_LOOK_AT_ROWS}, `cleaning.deduplicate`, `guards.skip_spikes: true`",
            ),
            _LOWER_RATE,
            _WARM_UP,
            _CLIP,
            Treatment("AdamW that adapts slowly", "`training.adam_beta2: 0.95`"),
        ),
    ),
    "stuck": Symptom(
        "a loss stuck at ln(vocabulary)",
        "after `guards.stuck_updates` updates the loss is still what guessing gives: nothing is "
        "learnt",
        (
            Treatment("too low a rate", "`training.learning_rate` x 10 (`find_learning_rate.py`)"),
            Treatment("too long a warm-up", "shorter `schedule.warmup_steps`"),
            Treatment("text without order", _LOOK_AT_ROWS),
        ),
    ),
    "diverged": Symptom(
        "a loss far above ln(vocabulary)",
        "20 losses in a row are more than 10 % above what guessing gives: the run has diverged",
        (_LOWER_RATE, _WARM_UP, _CLIP),
    ),
    "growing_norms": Symptom(
        "growing gradient norms",
        "the median norm of a window is `guards.norm_growth` times the lowest since the warm-up: "
        "the run is about to diverge",
        (
            _LOWER_RATE,
            _WARM_UP,
            _CLIP,
            Treatment("weights that grow", "`training.weight_decay: 0.1`"),
            _NO_FP16,
        ),
    ),
    "overfitting": Symptom(
        "a gap between training and held-out loss",
        "the held-out loss rises while the training loss falls: the text is learnt by heart",
        (
            Treatment("too little text", "more or more varied `data.files`"),
            Treatment("too many passes over it", "fewer `training.max_steps`"),
            Treatment("too large a model", "smaller `model.config`"),
            Treatment("too little decay", "more `training.weight_decay`"),
            Treatment(
                "training beyond the best",
                "`evaluation.early_stopping_patience`, `training.load_best_model_at_end`",
            ),
        ),
    ),
    "not_finite": Symptom(
        "a loss or gradient that is not finite",
        "the numbers have left what the precision can hold; the update is not made",
        (
            _LOWER_RATE,
            _WARM_UP,
            _CLIP,
            _NO_FP16,
            Treatment("rows unlike the rest", f"{_LOOK_AT_ROWS}, `faults.rollbacks: 3`"),
        ),
    ),
    "rows_not_finite": Symptom(
        "a loss that is not finite, of single rows",
        "the message names them; the rest of the update was sound",
        (
            Treatment("rows unlike the rest", f"{_LOOK_AT_ROWS}, `faults.rollbacks: 3`"),
            _NO_FP16,
            _LOWER_RATE,
        ),
    ),
}


def causes(name: str) -> str:
    """Return a symptom's causes in their order, each with what treats it, for a terminal."""
    listed = [f"{cause} ({remedy})" for cause, remedy in SYMPTOMS[name].treatments]
    return "; ".join(listed).replace("`", "")


def listed(name: str) -> str:
    """Return the same, each cause on a line of its own."""
    return "".join(f"\n  - {one}" for one in causes(name).split("; "))


def table() -> list[str]:
    """Return the lines of the README's table: the symptoms as Markdown."""
    lines = ["| what is seen | what it means | likely causes in this order, and what treats each |"]
    lines.append("|---|---|---|")
    for symptom in SYMPTOMS.values():
        listed = "; ".join(f"{cause}: {remedy}" for cause, remedy in symptom.treatments)
        lines.append(f"| {symptom.title} | {symptom.meaning} | {listed} |")
    return lines


class Score(NamedTuple):
    """How a value lies to those before it."""

    value: float
    mean: float
    z: float
    """Standard deviations above the mean; negative below it."""


def score(value: float, before: Sequence[float], *, least_spread: float) -> Score:
    """Return how far `value` lies from the mean of finite values `before` it.

    llm.c's outlier_detector.h and OLMo-core's SkipStepOptimizer measure in deviations, too.

    Args:
        least_spread: fraction of the mean that a deviation is at least.
    """
    mean = sum(before) / len(before)
    deviation = math.sqrt(sum((one - mean) ** 2 for one in before) / len(before))
    spread = max(deviation, least_spread * abs(mean))
    return Score(value, mean, (value - mean) / spread if spread else 0.0)


def enough(window: int) -> int:
    """Return how many values make a window that can be measured by: half, as in OLMo-core."""
    return max(window // 2, 2)


def beside_guessing(losses: Sequence[float], vocabulary: int) -> str | None:
    """Return `stuck` or `diverged` if the last GUESSING_OVER losses are that, None if neither.

    Stuck: each is about what a model has that finds all of the vocabulary equally likely.
    Diverged: each is far above it.
    """
    last = [loss / math.log(vocabulary) for loss in list(losses)[-GUESSING_OVER:]]
    if len(last) < GUESSING_OVER or min(last) < BETTER_THAN_GUESSING:
        return None
    if min(last) > WORSE_THAN_GUESSING:
        return "diverged"
    return "stuck" if max(last) <= WORSE_THAN_GUESSING else None


def typical(norms: Sequence[float]) -> float:
    """Return the median of a window's gradient norms: single spikes do not move it."""
    return statistics.median(norms)
