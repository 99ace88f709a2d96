"""The gap between training and held-out loss over a run, and in plain words what it says."""

import math
from bisect import bisect_left, bisect_right
from typing import Any, NamedTuple

from pipeline.symptoms import causes

# What counts as a change, as a fraction of the loss. Three seeds of the quickstart end within 0.7 %
# of their mean: less than 1 % is what another seed could have done as well.
NOISE = 0.01
# A run goes on improving if its last quarter still did.
LAST_PART = 0.25
# Of the held-out loss, seen once: the quickstart, which does not overfit, ends with 8 %; sixty
# updates over one short story, which it then knows by heart, with 51 %.
LARGE_GAP = 0.25


class Verdict(NamedTuple):
    """What the curves say."""

    kind: str
    """improving, flat, overfitting, unstable (both losses rose) or unknown."""
    sentence: str
    seen: str = ""
    """Of overfitting: the sentence without what treats it."""


class _Point(NamedTuple):
    update: int
    held_out: float
    training: float | None


def verdict(history: list[dict[str, Any]], *, keeps_best: bool = False) -> Verdict:
    """Return what a run's logs say about overfitting.

    Overfitting: since its best evaluation the held-out loss rose by more than NOISE and the
    training loss fell. Improving: it fell by more than NOISE in the last quarter of the updates.

    Args:
        history: Trainer's logs, in nats per token.
        keeps_best: whether the saved weights are those of the best evaluation.
    """
    points = _points(history)
    if not points:
        return Verdict(
            "unknown",
            "Nothing was evaluated while training, so that nothing can be said about overfitting: "
            "training.eval_strategy: steps with training.eval_steps does it.",
        )
    best, last = min(points, key=lambda point: point.held_out), points[-1]
    gap = f"At update {last.update:,} the held-out loss is {last.held_out:.4f}"
    if last.training is not None:
        difference = last.held_out - last.training
        side = "above" if difference >= 0 else "below"
        gap += f", {abs(difference):.4f} {side} the training loss around it ({last.training:.4f})"
    if len(points) == 1:
        if last.training is not None and last.training < (1 - LARGE_GAP) * last.held_out:
            return Verdict(
                "unknown",
                f"{gap}. One evaluation shows no trend; so wide a gap is overfitting, or held-out "
                "text of another kind.",
            )
        return Verdict("unknown", f"{gap}. One evaluation shows no trend.")
    if last.held_out > best.held_out * (1 + NOISE):
        return _risen(best, last, gap, keeps_best)
    before = [p for p in points[:-1] if p.update <= last.update * (1 - LAST_PART)] or points[:1]
    fell = before[-1].held_out - last.held_out
    if fell > NOISE * last.held_out:
        return Verdict(
            "improving",
            f"{gap}. No overfitting: since update {before[-1].update:,} the held-out loss still "
            f"fell by {fell:.4f}; a longer run (training.max_steps) should go lower.",
        )
    return Verdict(
        "flat",
        f"{gap}. No overfitting: since update {before[-1].update:,} the held-out loss has stayed "
        f"within {NOISE:.0%}; more updates alone will hardly lower it.",
    )


def _risen(best: _Point, last: _Point, gap: str, keeps_best: bool) -> Verdict:
    rose = (
        f"the held-out loss rose from {best.held_out:.4f} (update {best.update:,}) to "
        f"{last.held_out:.4f} (update {last.update:,})"
    )
    kept = " The saved weights are those of the best evaluation." if keeps_best else ""
    falling = None not in (best.training, last.training) and last.training < best.training
    if falling:
        return _overfitting(
            f"{gap}. Overfitting: {rose} while the training loss fell from {best.training:.4f} to "
            f"{last.training:.4f}",
            kept,
        )
    return Verdict(
        "unstable",
        f"{gap}. Unstable: {rose}, and the training loss did not fall. What treats it: a lower "
        f"training.learning_rate, a longer schedule.warmup_steps, training.max_grad_norm.{kept}",
    )


def _overfitting(seen: str, kept: str = "") -> Verdict:
    treated = f"Likely, in this order: {causes('overfitting')}."
    return Verdict("overfitting", f"{seen}. {treated}{kept}", seen)


def _points(history: list[dict[str, Any]]) -> list[_Point]:
    """Return the evaluations, each with the mean of the training logs that lie around it.

    Around: nearer than half way to the next evaluation on either side; else the nearest log.
    """
    evaluations, training = _finite(history, "eval_loss"), _finite(history, "loss")
    steps, logged = list(evaluations), list(training)
    found = []
    for number, step in enumerate(steps):
        others = steps[max(0, number - 1) : number] + steps[number + 1 : number + 2]
        reach = min((abs(step - other) for other in others), default=0) / 2
        near = logged[bisect_left(logged, step - reach) : bisect_right(logged, step + reach)]
        near = near or sorted(logged, key=lambda update: abs(update - step))[:1]
        mean = sum(training[update] for update in near) / len(near) if near else None
        found.append(_Point(step, evaluations[step], mean))
    return found


def _finite(history: list[dict[str, Any]], key: str) -> dict[int, float]:
    """Return by update, in their order, the last finite value that was logged after each."""
    found = {
        log["step"]: log[key]
        for log in history
        if isinstance(log.get(key), int | float) and math.isfinite(log[key]) and "step" in log
    }
    return dict(sorted(found.items()))
