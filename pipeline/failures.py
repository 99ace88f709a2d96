"""How one of several processes says what ended it: once, and where its launcher looks for it."""

import contextlib
import json
import os
import socket
import sys
import time
import traceback
from pathlib import Path

# What gloo, NCCL and torch's store say when the process at the other end is gone.
CONNECTION_LOST = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited",
    "Connection was likely closed", "failed to recv, got 0 bytes",
)  # fmt: skip

# What gloo says when a collective has taken `training.ddp_timeout`.
NO_ANSWER = "Timed out waiting"

# The number of a process, as torchrun and `accelerate`, or MPI, give it.
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")

# So much later than the main process another may come to the same mistake: the libraries that both
# import take as long.
SECONDS_FOR_MAIN = 3.0


def rank() -> int:
    """Return the number that the launcher has given this process; 0 is the main one."""
    return next((int(os.environ[name]) for name in RANKS if name in os.environ), 0)


def another_has_ended(error: BaseException) -> bool:
    """Tell whether an error only says that the process at the other end is gone."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, RuntimeError) and any(words in str(seen) for words in CONNECTION_LOST):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def say(text: str, error: BaseException, *, is_common: bool = False) -> None:
    """Write what ended this process to the screen, and its error for the launcher's own table.

    What goes wrong in all processes alike goes wrong in the main one, too: that says so, ends, and
    its launcher ends the others. They wait for that, and say only what it does not. On another
    machine, with a screen of its own, the first one there does.

    Args:
        is_common: all processes know it, and the main one says it.
    """
    if rank() > 0 and is_common:
        return
    _write_for_launcher(error)
    if rank() > 0:
        end = time.monotonic() + SECONDS_FOR_MAIN
        while time.monotonic() < end:
            if _first_here_has_failed():
                return
            time.sleep(0.05)
        text = f"process {rank()} ({socket.gethostname()}): {text}"
    sys.stderr.write(text)
    sys.stderr.flush()


def say_unexpected(error: BaseException) -> None:
    """Write the traceback of an error that nobody has foreseen, or that another process ended."""
    if "RANK" in os.environ and another_has_ended(error):
        # That one has a traceback of its own; ours would only hide it.
        sys.stderr.write(
            f"process {rank()}: ends because another process has ended; its output, or the "
            "launcher's, says why\n"
        )
        return
    text = "".join(traceback.format_exception(error))
    if "RANK" in os.environ and NO_ANSWER in str(error):
        text += f"process {rank()}: another process has not answered for training.ddp_timeout\n"
    say(text, error)  # at once: the lines of several processes must not mix


def _write_for_launcher(error: BaseException) -> None:
    """Leave the error where torch's launcher reads it, as torch's own `record` does."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is not None:
        text = f"{type(error).__name__}: {error}"
        about = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": about}), encoding="utf-8")


def _first_here_has_failed() -> bool:
    """Tell whether the first process of this machine has left its own error for the launcher."""
    file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))  # .../LOCAL_RANK/error.json
    first = file.parent.parent / "0" / file.name
    return file.parent.name not in ("", "0") and first.exists()
