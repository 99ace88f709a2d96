"""What a run's guards noticed: said once, kept in its history, and known after a resume."""

import math
from collections import deque
from collections.abc import Callable
from typing import Any

from pipeline.gap import Verdict
from pipeline.safety_sections import GuardSection
from pipeline.symptoms import (
    LEAST_LOSS_SPREAD,
    LEAST_NORM_SPREAD,
    Score,
    beside_guessing,
    enough,
    listed,
    score,
    typical,
)


class Notices:
    """Watches the losses and gradient norms of a run; every process sees the same ones.

    A symptom is said when it appears, and once more each time that it comes back after it was
    gone, but of these only the second, fourth, eighth ... time: a run that is ill all along fills
    no screen. A spike is gone after a window of updates without one.

    Attributes:
        skipped: updates that were not made because of a spike.
    """

    def __init__(
        self,
        section: GuardSection,
        *,
        vocabulary: int,
        is_fresh: bool,
        warmup_updates: int,
        tell: Callable[[dict[str, Any], str], None],
        before: dict[str, Any] | None = None,
    ) -> None:
        """Begin, or go on from the `state` of a checkpoint.

        Args:
            vocabulary: of the model.
            is_fresh: whether it begins by guessing.
            warmup_updates: updates whose norms no later ones are compared with.
            tell: is given a notice for the history and its sentence with causes, for a person.
            before: a `state`.
        """
        self.section = section
        self._vocabulary, self._is_fresh = vocabulary, is_fresh
        self._warmup_updates, self._tell = warmup_updates, tell
        known = before or {}
        window = section.spike_window
        self.losses = deque(known.get("losses", []), window)
        self.norms = deque(known.get("norms", []), window)
        self.skipped: int = known.get("skipped_updates", 0)
        self._lowest_norm: float | None = known.get("lowest_norm")
        self._spiked_at: int | None = known.get("spiked_at")
        self._times: dict[str, int] = dict(known.get("times", {}))
        self._present: set[str] = set(known.get("present", []))

    def state(self) -> dict[str, Any]:
        """Return all that an interrupted run must know to notice what an uninterrupted one does."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "skipped_updates": self.skipped,
            "lowest_norm": self._lowest_norm,
            "spiked_at": self._spiked_at,
            "times": self._times.copy(),
            "present": sorted(self._present),
        }

    def update(self, step: int, *, loss: float, norm: float, is_spike: bool | None = None) -> bool:
        """Look at the finite loss and the gradient norm of an update before it is made.

        Args:
            step: the update, counted from 1.
            loss: nats per token, over all processes.
            norm: before clipping; what is not finite is not known, or the gradient scaler's.
            is_spike: what the device has decided, if it had to.

        Returns:
            Whether the update must not be made.
        """
        scores = self._scores(loss, norm)
        if is_spike is None:
            is_spike = any(one.z > self.section.spike_sigmas for one in scores.values())
        must_skip = is_spike and self.section.skip_spikes
        self.skipped += must_skip
        if is_spike:
            self._spiked_at = step
            highest = max(one.z for one in scores.values())
            beyond = min(self.section.spike_sigmas, highest)
            seen = " and ".join(_above(name, s) for name, s in scores.items() if s.z >= beyond)
            seen += "; the update was not made" if must_skip else ""
            self._notice("spike", step, seen, is_there=True)
        elif self._spiked_at is None or step - self._spiked_at >= self.section.spike_window:
            self._present.discard("spike")
        self.losses.append(loss)
        if math.isfinite(norm):
            self.norms.append(norm)
        self._look_at_trends(step)
        return must_skip

    def evaluated(self, step: int, verdict: Verdict) -> None:
        """Take what the curves say after an evaluation."""
        if self.section.gap and verdict.kind != "unknown":
            is_there = verdict.kind == "overfitting"
            self._notice("overfitting", step, verdict.seen, is_there=is_there)

    def _scores(self, loss: float, norm: float) -> dict[str, Score]:
        found = {}
        if self.section.spike_sigmas:
            for name, value, before, least in (
                ("loss", loss, self.losses, LEAST_LOSS_SPREAD),
                ("gradient norm", norm, self.norms, LEAST_NORM_SPREAD),
            ):
                if math.isfinite(value) and len(before) >= enough(self.section.spike_window):
                    found[name] = score(value, before, least_spread=least)
        return found

    def _look_at_trends(self, step: int) -> None:
        section, window = self.section, self.section.spike_window
        if section.stuck_updates:
            found = beside_guessing(self.losses, self._vocabulary)
            guessing = f"ln({self._vocabulary:,}) = {math.log(self._vocabulary):.3f}"
            seen = f"the loss is {self.losses[-1]:.4g}, and guessing gives {guessing}"
            is_late = self._is_fresh and step >= section.stuck_updates
            self._notice("stuck", step, seen, is_there=found == "stuck" and is_late)
            self._notice("diverged", step, seen, is_there=found == "diverged")
        is_due = section.norm_growth and step % window == 0 and len(self.norms) == window
        if not is_due or step - window < self._warmup_updates:
            return
        median, lowest = typical(self.norms), self._lowest_norm
        self._lowest_norm = median if lowest is None else min(lowest, median)
        if lowest is not None:
            self._notice(
                "growing_norms", step,
                f"the median gradient norm of the last {window} updates is {median:.3g}, and was "
                f"{self._lowest_norm:.3g} in an earlier {window}",
                is_there=median > section.norm_growth * self._lowest_norm,
            )  # fmt: skip

    def _notice(self, name: str, step: int, seen: str, *, is_there: bool) -> None:
        if not is_there:
            self._present.discard(name)
            return
        if name in self._present:
            return
        self._present.add(name)
        times = self._times[name] = self._times.get(name, 0) + 1
        if times & (times - 1):
            return
        head = f"update {step}: again, " if times > 1 else f"update {step}: "
        sentence = f"{head}{seen}\n  likely, in this order:{listed(name)}"
        self._tell({"notice": name, "update": step, "seen": seen}, sentence)


def _above(name: str, one: Score) -> str:
    how = f"{one.z:.1f} standard deviations above"
    if name != "loss":
        how = f"{one.value / one.mean:.1f} times"
    return f"the {name} is {one.value:.4g}, {how} the mean before ({one.mean:.4g})"
