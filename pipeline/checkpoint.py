"""Write, verify, find and rotate checkpoints: each is whole or absent, at every instant.

The training loop hands over what a checkpoint holds as it was at one update; a thread writes it
into a staging folder, syncs it, lists it in a manifest with the sha256 of every file and renames
it to `checkpoint-N`. Only then an old one goes. Writing and hashing let go of Python's lock
(measured: no other thread waited for more than 4 ms), so that training goes on meanwhile.
"""

import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import artifact
from pipeline.recipe import InputError, first_line
from pipeline.run_files import ASIDE

logger = logging.getLogger(__name__)

# The newest may turn out damaged when it is read, so the one before it must still be there.
FEWEST_KEPT = 2

STATE = "trainer_state.json"
LOWEST_PRIORITY = 19

_NAME = re.compile(r"checkpoint-(\d+)")


def step_of(folder: Path) -> int | None:
    """Return the update that a folder name such as checkpoint-100 stands for, else None."""
    match = _NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else None


def checkpoints(run_folder: Path) -> list[Path]:
    """Return the folders named like checkpoints, oldest first, whole or not."""
    found = [p for p in run_folder.glob("checkpoint-*") if p.is_dir() and step_of(p) is not None]
    return sorted(found, key=step_of)


def newest_whole(run_folder: Path, *, before: int | None = None) -> Path | None:
    """Return the newest whole checkpoint; damaged ones are named, skipped and kept.

    `before`: only those of earlier updates.
    """
    for folder in reversed(checkpoints(run_folder)):
        if before is not None and step_of(folder) >= before:
            continue
        wrong = artifact.damage(folder)
        if wrong is None:
            made = artifact.read_manifest(folder)["facts"].get("step", step_of(folder))
            if made == step_of(folder):
                return folder
            wrong = f"{folder} was made after update {made}, and renamed"
        logger.warning("checkpoint skipped: %s", wrong)
    return None


def chosen(run_folder: Path, resume: str) -> Path | None:
    """Return the checkpoint that `--resume auto|must|never|PATH` means, None for a fresh start.

    Raises:
        InputError: `must` and there is none, or the named one is damaged or not a checkpoint.
    """
    if resume == "never":
        return None
    if resume in ("auto", "must"):
        found = newest_whole(run_folder)
        if found is None and resume == "must":
            raise InputError(f"--resume must: no whole checkpoint in {run_folder}")
        return found
    check_named(Path(resume))
    return Path(resume)


def check_named(folder: Path, *, contents: bool = True) -> None:
    """See that a folder that a person named is a whole checkpoint.

    Raises:
        InputError: it is not.
    """
    choices = "name a whole checkpoint, or use auto, must or never"
    if not folder.is_dir():
        raise InputError(f"--resume {folder}: no such folder; {choices}")
    if inside := checkpoints(folder):
        raise InputError(f"--resume {folder}: holds checkpoints; name one, such as {inside[-1]}")
    wrong = artifact.damage(folder, contents=contents)
    if wrong is None and STATE not in artifact.read_manifest(folder)["files"]:
        wrong = "it is an artifact of another kind"
    if wrong:
        raise InputError(f"--resume {folder}: {wrong}; {choices}")


# Of each file of a checkpoint by name: its bytes, or what writes it.
Files = dict[str, bytes | Callable[[Path], Any]]


def write_file(path: Path, content: bytes | Callable[[Path], Any]) -> None:
    """Write one file of a checkpoint."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)


class Contents(NamedTuple):
    """What one checkpoint holds, as it was when the update ended."""

    files: Files
    size: int
    """About how many bytes they are."""
    made_from: dict[str, Any]
    facts: dict[str, Any]


class Writer:
    """Writes the checkpoints of a run one after the other, in a thread of its own.

    Attributes:
        failure: why the last checkpoint could not be written, None if it was.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        keep: int | None,
        written: Callable[[Path], None] = lambda folder: None,
        make_room: Callable[[], bool] = lambda: False,
    ) -> None:
        """Keep the newest `keep` checkpoints, at least two whole ones (None: all).

        Args:
            written: called with each that is whole, before an old one goes.
            make_room: called when the disk is full, until it returns False.
        """
        self.failure: str | None = None
        self._written, self._make_room = written, make_room
        self._folder, self._keep = run_folder, keep
        self._thread: threading.Thread | None = None
        self._seen_whole: set[Path] = set()

    def write(self, step: int, contents: Contents, *, best: Path | None = None) -> None:
        """Begin to write a checkpoint; an earlier one is finished first, the best one stays.

        What goes wrong is logged and kept in `failure`: a full disk ends no run.
        """
        self.wait()
        work = (step, contents, best)
        self._thread = threading.Thread(target=self._write, args=work, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, step: int, contents: Contents, best: Path | None) -> None:
        folder = self._folder / f"checkpoint-{step}"
        staging = artifact.staging_of(folder)
        if sys.platform == "linux":  # where a thread has a priority of its own
            # What computes comes first.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        try:
            while shutil.disk_usage(self._folder).free < contents.size:
                if not self._make_room():
                    raise OSError(artifact.FULL[0], os.strerror(artifact.FULL[0]))
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            for name, content in contents.files.items():
                write_file(staging / name, content)
            artifact.commit(staging, folder, contents.made_from, contents.facts)
        except Exception as error:  # whatever a library makes of a disk's refusal
            self.failure = _failure(folder, contents.size, error)
            logger.error("%s; training goes on, and the next save tries again", self.failure)
            shutil.rmtree(staging, ignore_errors=True)
            return
        self._seen_whole.add(folder)
        self.failure = None
        self._written(folder)
        try:
            rotate(self._folder, keep=self._keep, best=best, whole=self._seen_whole)
        except OSError as error:
            logger.error("%s: an old checkpoint could not be removed: %s", self._folder, error)


def rotate(
    run_folder: Path, *, keep: int | None, best: Path | None, whole: set[Path] | None = None
) -> None:
    """Remove old checkpoints beyond the newest `keep` (None: all stay) and the best one.

    Only whole checkpoints of ours count and are removed: damaged ones, and folders without our
    manifest, stay. Those in `whole` have been read before, of others the contents are verified.
    """
    if keep is None:
        return
    whole = set() if whole is None else whole
    kept = 0
    for folder in reversed(checkpoints(run_folder)):
        if artifact.damage(folder, contents=folder not in whole):
            continue
        whole.add(folder)
        kept += 1
        is_best = best is not None and folder.resolve() == best.resolve()
        if kept > max(keep, FEWEST_KEPT) and not is_best:
            artifact.remove(folder)


def set_aside_after(run_folder: Path, step: int, *, but: Path) -> None:
    """Rename the checkpoints after an update to which a run goes back: they are another history's.

    `but` is the one that it goes on from.
    """
    for folder in checkpoints(run_folder):
        is_it = folder.resolve() == but.resolve()
        if step_of(folder) > step and not is_it and artifact.damage(folder, contents=False) is None:
            aside = artifact.free_name(folder, "superseded")
            os.rename(folder, aside)
            logger.info("going back to update %d: %s is now %s", step, folder, aside.name)


def check_room(
    run_folder: Path, *, size: int, planned: int, keep: int | None, has_best: bool
) -> str:
    """See that the disk has room for the checkpoints to come, and say how much that is.

    Args:
        size: bytes of one.
        planned: how many will be written.
        keep: how many of the newest stay (None: all).
        has_best: whether the best one stays as well.

    Raises:
        InputError: it has not.
    """
    count = planned
    if keep is not None:  # an old one goes when the new one is whole
        found = checkpoints(run_folder)
        there = sum(artifact.damage(folder, contents=False) is None for folder in found)
        count = max(0, min(planned, keep + 1 + has_best - there))
    # A run that this one replaces is removed before it begins.
    leaving = [path for path in (run_folder / ASIDE).rglob("*") if path.is_file()]
    free = shutil.disk_usage(run_folder).free + sum(path.stat().st_size for path in leaving)
    if free < count * size:
        raise InputError(
            f"{run_folder}: the checkpoints that the recipe wants need {_amount(count * size)} "
            f"there ({count} more of {_amount(size)}), and {_amount(free)} are free; make room, "
            "lower training.save_total_limit, or choose another --training.output_dir"
        )
    return (
        f"{count} more checkpoint(s) of {_amount(size)} need {_amount(count * size)}, and "
        f"{_amount(free)} are free"
    )


def _failure(folder: Path, size: int, error: Exception) -> str:
    why = first_line(error)
    if isinstance(error, OSError) and error.strerror:
        why = error.strerror + (f" ({error.filename})" if error.filename else "")
    try:
        free = f"{_amount(shutil.disk_usage(folder.parent).free)} are free"
    except OSError as unreadable:
        free = f"the folder cannot be looked at ({unreadable.strerror})"
    return f"{folder}: not saved: {why}; it needs about {_amount(size)}, {free}"


def _amount(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
