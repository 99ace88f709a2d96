"""Write, verify, find and rotate checkpoints: each is whole or absent.

Trainer writes into a staging folder; when all processes are done it becomes `checkpoint-N` in one
rename, with a manifest that holds the sha256 of every file (see `artifact`).
"""

import logging
import re
import shutil
from pathlib import Path

from pipeline import artifact
from pipeline.recipe import InputError

logger = logging.getLogger(__name__)

# The newest may turn out damaged when it is read, so the one before it must still be there.
FEWEST_KEPT = 2

_NAME = re.compile(r"checkpoint-(\d+)")


def step_of(folder: Path) -> int | None:
    """Return the update that a folder name such as checkpoint-100 stands for, else None."""
    match = _NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else None


def checkpoints(run_folder: Path) -> list[Path]:
    """Return the folders named like checkpoints, oldest first, whole or not."""
    found = [p for p in run_folder.glob("checkpoint-*") if p.is_dir() and step_of(p) is not None]
    return sorted(found, key=step_of)


def newest_whole(run_folder: Path) -> Path | None:
    """Return the newest whole checkpoint; damaged ones are named, skipped and kept."""
    for folder in reversed(checkpoints(run_folder)):
        wrong = artifact.damage(folder)
        if wrong is None:
            return folder
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
    folder = Path(resume)
    wrong = artifact.damage(folder)
    if wrong:
        raise InputError(f"--resume {resume}: {wrong}; name a whole checkpoint, or use auto")
    return folder


def rotate(run_folder: Path, *, keep: int | None, best: str | None) -> None:
    """Remove old checkpoints beyond the newest `keep` (None: all stay) and the best one.

    Only whole checkpoints of ours count and are removed: a folder without our manifest stays.
    """
    if keep is None:
        return
    ours = [f for f in checkpoints(run_folder) if artifact.read_manifest(f) is not None]
    for folder in ours[: -max(keep, FEWEST_KEPT)]:
        if best is None or folder.resolve() != Path(best).resolve():
            shutil.rmtree(folder)
