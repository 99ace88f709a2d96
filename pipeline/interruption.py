"""Requests to stop, by a signal or the launcher's death: noticed at once, heeded where it is safe.

SIGTERM, SIGINT and SIGUSR1 (what schedulers, Ctrl-C and Slurm's --signal send) raise `Preempted`
in the main thread; inside of `deferred` they are only noted, and whoever deferred them asks
`reason`. A thread watches as well, because the main one may be waiting in C++, in a collective for
instance: it ends the process at a second signal, and when the time that was granted is over.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later

# Launchers send a signal on that has already reached the process group, and again as they end.
SAME_SECONDS = 5.0
SECONDS_BETWEEN_LOOKS = 0.5

# `accelerate launch` and torchrun set these for the processes that they start.
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")


class Preempted(BaseException):
    """The run was asked to stop. No `Exception`: nothing that handles errors should handle it."""


class _Watch:
    """What one process has noticed, and the thread that notices it."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.seconds: float | None = None  # granted from the first signal on; None: no limit
        self.last_words: Callable[[str], None] = lambda why: None
        self.depth = 0
        self._noticed = 0.0
        self._raised = False
        self._reader, self._writer = socket.socketpair()
        self._reader.settimeout(SECONDS_BETWEEN_LOOKS)
        self._writer.setblocking(False)
        self._parent = os.getppid() if any(name in os.environ for name in LAUNCHED) else None
        self._pid = os.getpid()
        self._ended = False

    def start(self) -> None:
        self._before = {number: signal.signal(number, self._heed) for number in SIGNALS}
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._look, name="interruption", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended = True
        with contextlib.suppress(OSError):
            self._writer.send(b"\0")  # it need not look once more
        self._thread.join()
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._reader.close()
        self._writer.close()

    def _heed(self, number: int, frame: object) -> None:
        """Run by Python in the main thread, when that is not in C++."""
        self._note(signal.Signals(number).name)
        if not self.depth and not self._raised:  # not again while the first one unwinds
            self._raised = True
            raise Preempted(self.reason)

    def _note(self, reason: str) -> None:
        if self.reason is None:
            self.reason, self._noticed = reason, time.monotonic()

    def _look(self) -> None:
        while not self._ended:
            try:
                numbers = self._reader.recv(64)
            except TimeoutError:
                numbers = b""
            except OSError:
                return
            for number in set(numbers).intersection(SIGNALS):
                if self.reason is not None and self._passed > SAME_SECONDS:
                    self._end(f"{self.reason}, and {signal.Signals(number).name} after it")
                self._note(signal.Signals(number).name)
            if self._parent is not None and os.getppid() != self._parent:
                self._parent = None
                if self.reason is None:
                    self._note("the launcher is gone")
                    os.kill(self._pid, signal.SIGTERM)
            if self.reason is not None and self.seconds is not None:
                if self._passed > self.seconds:
                    self._end(f"{self.reason}, and {self.seconds:g} seconds were not enough")

    @property
    def _passed(self) -> float:
        return time.monotonic() - self._noticed

    def _end(self, why: str) -> None:
        if os.getpid() == self._pid:
            with contextlib.suppress(Exception):
                self.last_words(why)
            os._exit(EXIT_CODE)


_watch: _Watch | None = None


@contextlib.contextmanager
def heeded() -> Iterator[None]:
    """Heed signals until the block ends; where Python allows no handlers, nothing happens."""
    global _watch
    if _watch is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _watch = watch = _Watch()
    watch.start()
    try:
        yield
    finally:
        _watch = None
        watch.stop()


def _let_go_in_a_forked_process() -> None:
    """A worker of a DataLoader: signals sent to the whole group are its parent's to heed."""
    global _watch
    if _watch is not None:
        _watch = None
        signal.set_wakeup_fd(-1)
        ignore()


os.register_at_fork(after_in_child=_let_go_in_a_forked_process)


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """If the block is asked to stop, say so, and what that means."""
    try:
        yield
    except Preempted as why:
        logger.info("\nstopped (%s); %s", why, what)
        raise


def ignore() -> None:
    """Heed no signal any more: the process is ending, and whoever asked for it may ask again."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def grant(seconds: float, last_words: Callable[[str], None]) -> None:
    """From the first signal on the process has so long; then `last_words(why)`, and it ends."""
    if _watch is not None:
        _watch.seconds, _watch.last_words = seconds, last_words


def reason() -> str | None:
    """What has asked for a stop (a signal's name, the launcher's death), None so far."""
    return None if _watch is None else _watch.reason


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Only note signals inside of the block; whoever opens it asks for `reason`, and stops."""
    watch = _watch
    if watch is None:
        yield
        return
    watch.depth += 1
    try:
        yield
    finally:
        watch.depth -= 1
