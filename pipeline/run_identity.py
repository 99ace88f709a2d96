"""Whose a repository on the Hub is: the name of a run, in its folder and in every commit."""

import json
import uuid
from pathlib import Path

from pipeline import artifact
from pipeline.recipe import InputError

IDENTITY = "pipeline_run.json"


def run_identity(folder: Path) -> str:
    """Return the name by which the Hub knows a run, made and kept where there is none yet.

    Raises:
        InputError: it cannot be read or kept.
    """
    found = kept_identity(folder)
    if found is None:
        found = uuid.uuid4().hex
        try:
            text = identity_file(found).decode()
            artifact.write_whole(folder / IDENTITY, text, synced=True)
        except OSError as error:
            raise InputError(f"{folder / IDENTITY}: cannot be written: {error.strerror}") from None
    return found


def kept_identity(folder: Path) -> str | None:
    """Return the name that a folder holds, None where it holds none.

    Raises:
        InputError: it cannot be read.
    """
    path = folder / IDENTITY
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["run"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError):
        raise InputError(
            f"{path}: cannot be read; remove it, and the run counts as a new one on the Hub"
        ) from None


def identity_file(identity: str) -> bytes:
    """Return the contents of the file."""
    return json.dumps({"run": identity}).encode() + b"\n"
