"""Folders that one process at a time works in."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from pipeline import artifact
from pipeline.recipe import InputError


@contextlib.contextmanager
def locked(folder: Path, key: str) -> Iterator[None]:
    """Hold a folder that exists; the lock goes with the process, however it ends.

    Raises:
        InputError: another process holds it; `key` is the setting that names another folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(
            f"{folder}: another process is at work in it; wait for it, end it, or choose another "
            f"{key}"
        ) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)


@contextlib.contextmanager
def held(folder: Path, *, is_main_process: bool = True) -> Iterator[None]:
    """Make a run folder where there is none, and hold it; other processes than the main do nothing.

    Raises:
        InputError: it cannot be written to, or another process holds it.
    """
    if not is_main_process:
        yield
        return
    probe = folder / f"{artifact.STAGING}probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror}); choose another --training.output_dir"
        ) from None
    with locked(folder, "--training.output_dir"):
        yield
