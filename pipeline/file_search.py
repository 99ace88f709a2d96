"""The files that `data.files` names: files, folders, patterns, the standard library, packages."""

import glob
import os
import sysconfig
from pathlib import Path

from pipeline.data_sections import SourceSection
from pipeline.recipe import InputError

STANDARD_LIBRARY = "python:stdlib"
PACKAGES = "python:packages"
NOT_THE_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
COMPRESSED = (".gz", ".zst")
KINDS = (".txt", ".jsonl", ".csv", ".parquet")


def find_files(source: SourceSection) -> list[tuple[str, Path]]:
    """Return names and paths of a source's files, in a fixed order; none for a Hub data set.

    Raises:
        InputError: a file or folder is missing or empty.
    """
    found = []
    for item in source.files or []:
        found += _found(item)
    return found


def _found(item: str) -> list[tuple[str, Path]]:
    if not item:
        raise InputError("data.files: an empty name; name a file, a folder or a pattern")
    if item in (STANDARD_LIBRARY, PACKAGES):
        library = item == STANDARD_LIBRARY
        root = Path(sysconfig.get_path("stdlib" if library else "purelib"))
        left_out = NOT_THE_LIBRARY if library else {"__pycache__"}
        paths = files_below(root, left_out, ".py")
        if not paths:
            raise InputError(f"{item}: no .py file in {root}")
        return [(path[len(str(root)) + 1 :], Path(path)) for path in paths]
    path = Path(item)
    if path.is_dir():
        found = [p for p in map(Path, files_below(path, set())) if suffix_of(p) in KINDS]
        remedy = f"for other files give a pattern, such as '{item}/**/*.md'"
    elif path.exists():
        if path.stat().st_size == 0:
            raise InputError(f"{item}: the file is empty; give one with text")
        found = [path]
    else:
        found = [Path(p) for p in sorted(glob.glob(item, recursive=True))]
        found = [p for p in found if p.is_file()]
        remedy = f"looked in {Path.cwd()}"
    if not found:
        kind = "no .txt, .jsonl, .csv or .parquet in this folder"
        raise InputError(f"{item}: {kind if path.is_dir() else 'no such file'}; {remedy}")
    return [(str(path), path) for path in found]


def files_below(root: Path, left_out: set[str], ending: str = "") -> list[str]:
    """Return the files below a folder that end so, in the order of their parts."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out]
        found += [f"{folder}/{name}" for name in files if name.endswith(ending)]
    return sorted(found, key=lambda path: path.split("/"))


def suffix_of(path: Path) -> str:
    """Return the ending that says what a file is, .gz and .zst taken off."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
