"""Where the time of a run goes: updates apart from compilation, evaluation and saving.

Of the updates' time, what they waited for data and for logging is counted besides.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

WAITS = ("data", "logging")


class Clock:
    """Counts the seconds of one run, those before a resume included.

    Attributes:
        first_step: the update after which this process began, None before its first one.
        compile_seconds: what its first update took: it holds the compilation.
    """

    def __init__(self, tokens_per_update: int, before: dict[str, Any] | None = None) -> None:
        """Begin to count; `before` is the `spent` of the checkpoint that the run goes on from."""
        self._tokens_per_update, self._before = tokens_per_update, before or {}
        self.compile_seconds = 0.0
        self.first_step: int | None = None
        self._last_log = (0.0, 0)
        self._waited, self._waited_at_log = dict.fromkeys(WAITS, 0.0), dict.fromkeys(WAITS, 0.0)
        self._started = self._updates_started = time.perf_counter()
        self._paused_at: float | None = None
        self._left_out = self._evaluated = 0.0

    @contextlib.contextmanager
    def batch(self, step: int) -> Iterator[None]:
        """Go through a batch of the update after `step`; the first update counts apart."""
        if self.first_step is None:
            self.first_step = step
        if step > self.first_step:
            yield
            return
        started = time.perf_counter()
        yield
        self.compile_seconds += time.perf_counter() - started
        self._updates_started, self._left_out = time.perf_counter(), 0.0
        self._last_log = (0.0, self.first_step + 1)
        self._waited, self._waited_at_log = dict.fromkeys(WAITS, 0.0), dict.fromkeys(WAITS, 0.0)

    @contextlib.contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Do something that an update waits for: data or logging."""
        started = time.perf_counter()
        yield
        if self._paused_at is None:
            self._waited[what] += time.perf_counter() - started

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do something that is no update."""
        self.pause()
        try:
            yield
        finally:
            if self._paused_at is not None:
                self._left_out += time.perf_counter() - self._paused_at
                self._paused_at = None

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Measure held-out text, which is no update and is counted besides."""
        started = time.perf_counter()
        with self.paused():
            yield
        self._evaluated += time.perf_counter() - started

    def pause(self) -> None:
        """Stop counting updates (again: no effect)."""
        self._paused_at = self._paused_at or time.perf_counter()

    def rate(self, step: int) -> float:
        """Return tokens per second of updates since this process began."""
        if self.first_step is None:  # nothing has been trained here yet
            return 0.0
        updates = step - self.first_step - 1
        if updates < 1:
            return self._tokens_per_update / self.compile_seconds if self.compile_seconds else 0.0
        return updates * self._tokens_per_update / self._update_seconds

    def since_last(self, step: int) -> dict[str, float]:
        """Return what was so since this was last asked.

        tokens_per_second of updates, and of their time data_wait_fraction and logging_fraction.
        """
        (seconds, last), now = self._last_log, self._update_seconds
        waited = {what: self._waited[what] - self._waited_at_log[what] for what in WAITS}
        self._last_log, self._waited_at_log = (now, step), dict(self._waited)
        passed = now - seconds
        if step <= last or passed <= 0:
            return {"tokens_per_second": self.rate(step), **_fractions(waited, 0.0)}
        rate = (step - last) * self._tokens_per_update / passed
        return {"tokens_per_second": rate, **_fractions(waited, passed)}

    def spent(self, step: int) -> dict[str, float]:
        """Return seconds and updates up to now, those before a resume included."""
        before = self._before
        seconds = self._update_seconds + before.get("update_seconds", 0.0)
        updates = before.get("timed_updates", 0)
        train_seconds = before.get("train_seconds", 0.0)
        if self.first_step is not None:
            updates += max(0, step - self.first_step - 1)
            train_seconds += time.perf_counter() - self._started
        rate = updates * self._tokens_per_update / seconds if updates else 0.0
        waited = {w: self._waited[w] + before.get(f"{w}_seconds", 0.0) for w in WAITS}
        return {
            "train_seconds": train_seconds,
            "compile_seconds": before.get("compile_seconds", 0.0) + self.compile_seconds,
            "evaluation_seconds": before.get("evaluation_seconds", 0.0) + self._evaluated,
            "update_seconds": seconds,
            "timed_updates": updates,
            "tokens_per_second": rate or self.rate(step),
            **{f"{what}_seconds": waited[what] for what in WAITS},
            **_fractions(waited, seconds),
        }

    @property
    def _update_seconds(self) -> float:
        return (self._paused_at or time.perf_counter()) - self._updates_started - self._left_out


def _fractions(waited: dict[str, float], seconds: float) -> dict[str, float]:
    data, logging = (min(1.0, waited[w] / seconds) if seconds > 0 else 0.0 for w in WAITS)
    return {"data_wait_fraction": data, "logging_fraction": logging}
