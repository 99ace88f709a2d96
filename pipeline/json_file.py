"""The file in which a door keeps its numbers."""

import json
import os
from pathlib import Path
from typing import Any

from pipeline import artifact
from pipeline.recipe import InputError


def check_target(path: str | None) -> None:
    """Check before the work that numbers can be written to `path` without harm.

    Raises:
        InputError: its folder cannot be written to, or it holds something other than JSON.
    """
    if path is None:
        return
    target = Path(path)
    if not os.access(target.parent, os.W_OK) or target.is_dir():
        raise InputError(f"--json {path}: cannot be written; give a file in a folder that can")
    if target.exists():
        try:
            json.loads(target.read_text())
        except ValueError:
            raise InputError(
                f"--json {path}: holds something other than JSON; name another"
            ) from None


def write(found: dict[str, Any], path: str | None) -> None:
    """Keep the numbers as JSON, if a path is given."""
    if path is not None:
        with artifact.full_disk_said(Path(path).parent):
            artifact.write_whole(Path(path), artifact.as_json(found) + "\n")
