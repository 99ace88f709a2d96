"""A process that hangs, or waits for one that does, ends with its stack instead of silence."""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist

# After one process has said where it hangs, the others get so long to say it too.
SECONDS_FOR_OTHERS = 3.0

# A thread that wakes so much later than it asked for was not allowed to run at all.
SECONDS_LATE = 5.0


class Watchdog:
    """Ends the process when nothing has been heard of its training for some time.

    Each process posts where it is; the one that has not posted for long, or is furthest behind, is
    the one that the others wait for.

    Attributes:
        last_words: called with what happened before the process ends.
    """

    def __init__(self, seconds: float, *, rank: int, count: int) -> None:
        """Watch `rank` of `count` processes, from when it is entered until it is left."""
        self._seconds, self._rank, self._count = seconds, rank, count
        self.last_words: Callable[[str], None] = lambda why: None
        self._heard, self._beats, self._where = time.monotonic(), 0, "the start of training"
        self._paused = False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._store = None
        if count > 1:
            # A connection of its own: the training's is in use while that waits for another.
            store = dist.distributed_c10d._get_default_store().clone()
            self._store = dist.PrefixStore("watchdog", store)

    def beat(self, where: str) -> None:
        """Say that the process goes on, and with what."""
        self._heard, self._where = time.monotonic(), where
        self._beats += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do something that takes as long as it takes, and waits for no other process."""
        self._paused = True
        try:
            yield
        finally:
            self._paused, self._heard = False, time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.beat("the start")
        self._ended.clear()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(timeout=5)

    def _watch(self) -> None:
        self._post()
        interval = min(5.0, self._seconds / 4)
        slept = time.monotonic()
        while not self._ended.wait(interval):
            self._post()
            slept, before = time.monotonic(), slept
            if self._paused or slept - before > interval + SECONDS_LATE:
                self._heard = slept  # the whole process was suspended, and goes on now
            elif slept - self._heard > self._seconds:
                self._end(slept - self._heard)

    def _post(self) -> None:
        if self._store is not None:
            with contextlib.suppress(Exception):  # its host may be gone: then all are ending
                self._store.set(str(self._rank), f"{time.time()} {self._beats} {self._where}")

    def _end(self, silent: float) -> None:
        why = (
            f"process {self._rank} of {self._count} ({socket.gethostname()}, pid {os.getpid()}): "
            f"nothing has happened for {silent:.0f} s, in {self._where}"
        )
        sys.stderr.write(f"\nerror: {why}; where each of its threads is:\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        said: list[str] = []
        # The store may be kept by the very process that is frozen, or beyond a broken network.
        _try(lambda: said.append(self._others()))
        others = said[0] if said else "; the process that keeps the store does not answer"
        sys.stderr.write(f"process {self._rank}{others or ': no other is behind'}\n")
        sys.stderr.flush()
        why += others
        _try(lambda: self.last_words(why))  # the folder may be beyond the network, too
        if self._count > 1:
            time.sleep(SECONDS_FOR_OTHERS)
        os._exit(1)

    def _others(self) -> str:
        """Return which processes are gone quiet or behind."""
        said = []
        for rank in set(range(self._count)) - {self._rank}:
            try:
                if not self._store.check([str(rank)]):
                    continue
                posted, beats, where = self._store.get(str(rank)).decode().split(" ", 2)
            except Exception:
                return "; the other processes cannot be asked"
            ago = time.time() - float(posted)
            if ago > self._seconds / 2:
                said.append(f"process {rank} was last heard of {ago:.0f} s ago, in {where}")
            elif int(beats) < self._beats:
                said.append(f"process {rank} is behind, in {where}")
        return "".join(f"; {one}" for one in said)


def _try(act: Callable[[], None]) -> None:
    """Do what may fail, or never return."""

    def attempt() -> None:
        with contextlib.suppress(Exception):
            act()

    trying = threading.Thread(target=attempt, daemon=True)
    trying.start()
    trying.join(SECONDS_FOR_OTHERS)
