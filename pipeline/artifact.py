"""A folder that is whole or absent and says what made it.

Tokenizer, rows and checkpoints are written the same way: into a staging folder beside their place,
every file synced to disk, a manifest with size and sha256 of each written last, one rename. A
folder without a manifest is not ours; a file that differs from it is damage, and is named.
"""

import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.recipe import InputError

MANIFEST = "manifest.json"
STAGING, LEAVING = "_staging-", "_leaving-"  # what such a name begins with is not whole
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota, size limit
HASHED_AT_ONCE = 4  # threads; sha256 makes 1.5 GB/s on one of them, a disk less than four
LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "evaluate")


@contextlib.contextmanager
def staged(folder: Path, made_from: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield an empty staging folder and a dict; after the block they are `folder` and its facts.

    `made_from` decides later whether the artifact is still the one a recipe asks for; the facts
    (counts, say) are kept beside it in the manifest. If the block raises, `folder` is as before.

    Raises:
        InputError: the place cannot be written to.
    """
    # A name of its own: a process that outlives a killed parent for a moment is in nobody's way.
    staging = staging_of(folder)
    facts: dict[str, Any] = {}
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        of_this = re.compile(rf"{STAGING}{re.escape(folder.name)}-\d+")
        for old in folder.parent.iterdir():
            if of_this.fullmatch(old.name) and old != staging:
                shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from None
    try:
        with full_disk_said(folder):
            yield staging, facts
            commit(staging, folder, made_from, facts)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def full_disk_said(folder: Path) -> Iterator[None]:
    """Write below `folder`.

    Raises:
        InputError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        code = getattr(error, "errno", None)
        if said := re.search(r"\(os error (\d+)\)", str(error)):  # the Rust libraries'
            code = int(said[1])
        if code not in FULL:
            raise
        raise InputError(
            f"{folder}: cannot be written, the disk is full ({os.strerror(code)}); make room there "
            "or name another place, and start again: what was finished is kept"
        ) from None


def staging_of(folder: Path) -> Path:
    """Return where this process writes what becomes `folder`."""
    return folder.with_name(f"{STAGING}{folder.name}-{os.getpid()}")


def commit(staging: Path, folder: Path, made_from: dict[str, Any], facts: dict[str, Any]) -> None:
    """Sync and list every file of `staging`, then rename it to `folder`.

    A damaged folder that stands in the way is kept beside it under a name of its own.
    """
    files = {}
    for path in sorted(p for p in staging.rglob("*") if p.is_file()):
        files[str(path.relative_to(staging))] = {
            "size": path.stat().st_size,
            "sha256": _sha256(path),
        }
        _sync(path)
    manifest = {
        "format": 1,
        "made_from": made_from,
        "facts": facts,
        "versions": versions(),
        "git_commit": git_commit(),
        "files": files,
    }
    path = staging / MANIFEST
    path.write_text(json.dumps(manifest, indent=1))
    _sync(path)
    for subfolder in {staging, *(p for p in staging.rglob("*") if p.is_dir())}:
        _sync(subfolder)
    if folder.exists():
        if damage(folder) is None:
            remove(folder)
        else:
            os.rename(folder, free_name(folder, "damaged"))
    os.rename(staging, folder)
    _sync(folder.parent)


def as_json(value: Any, *, indent: int | None = 1) -> str:
    """Return a value as JSON, which knows no NaN and no infinity: null instead."""

    def known(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: known(inner) for key, inner in part.items()}
        if isinstance(part, list | tuple):
            return [known(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(known(value), indent=indent, ensure_ascii=False, allow_nan=False)


def write_whole(path: Path, text: str, *, synced: bool = False) -> None:
    """Write a file that is there whole, as it was before, or not at all.

    `synced`: a loss of power does not change that either.
    """
    # A thread of the same process may be at it too.
    staging = path.with_name(f"{STAGING}{path.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        staging.write_text(text, encoding="utf-8")
        if synced:
            _sync(staging)
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def remove(folder: Path) -> None:
    """Remove an artifact: at any instant it is there whole or has another name."""
    leaving = folder.with_name(f"{LEAVING}{folder.name}-{os.getpid()}")
    shutil.rmtree(leaving, ignore_errors=True)
    os.rename(folder, leaving)
    _sync(folder.parent)
    shutil.rmtree(leaving, ignore_errors=True)


def clear_leftovers(parent: Path) -> None:
    """Remove what processes that were killed left half written or half removed in `parent`."""
    for path in parent.iterdir():
        if path.name.startswith((STAGING, LEAVING)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of an artifact, or None where there is none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        is_ours = all(isinstance(manifest[key], dict) for key in ("made_from", "facts", "files"))
        is_ours = is_ours and all(
            isinstance(file["size"], int) and isinstance(file["sha256"], str)
            for file in manifest["files"].values()
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return manifest if is_ours else None


def damage(folder: Path, *, contents: bool = True) -> str | None:
    """Return what is wrong with an artifact (file and how), or None if it is whole.

    Without `contents` only names and sizes are looked at.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{folder / MANIFEST} is missing or unreadable"
    files = manifest["files"]
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{path} has {path.stat().st_size} bytes instead of {expected['size']}"
    if not contents:
        return None
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        found = {name: pool.submit(_sha256, folder / name) for name in files}
    for name, digest in found.items():
        try:
            if digest.result() != files[name]["sha256"]:
                return f"{folder / name} differs from what was written"
        except OSError as error:
            return f"{folder / name} cannot be read ({error.strerror})"
    return None


def reusable(folder: Path, made_from: dict[str, Any]) -> bool:
    """Tell whether `folder` holds the artifact that `made_from` describes.

    Raises:
        InputError: it holds a damaged one, one made from something else, or foreign files.
    """
    if not folder.exists():
        return False
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder}: holds files that are not ours; move them or name another path")
    changes = differences(manifest["made_from"], made_from)
    if changes:
        raise InputError(
            f"{folder}: was made by another recipe ({'; '.join(changes)}); "
            "remove that folder, or choose another --training.output_dir"
        )
    wrong = damage(folder)
    if wrong:
        raise InputError(f"{wrong}; remove {folder} to have it made again")
    return True


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Return `key: old -> new` for every leaf in which two nested mappings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for name in dict.fromkeys([*old, *new]):
            inner = f"{key}.{name}" if key else str(name)
            found += differences(old.get(name), new.get(name), inner)
        return found
    return [] if old == new else [f"{key}: {_short(old)} -> {_short(new)}"]


def fingerprint(folder: Path) -> str:
    """Return one sha256 over the contents that an artifact's manifest lists."""
    files = read_manifest(folder)["files"]
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def fingerprint_of(paths: list[Path]) -> str:
    """Return one sha256 over the contents of files, in this order."""
    return hashlib.sha256("".join(_sha256(path) for path in paths).encode()).hexdigest()


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries a result depends on."""
    found = {"python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in LIBRARIES}


@functools.cache
def git_commit() -> str | None:
    """Return the commit of this project's checkout, `+dirty` if it was changed, else None."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+dirty", "--abbrev=40", "--exclude=*"],
            cwd=here, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else f"{text[:12]}...{text[-4:]}"


def free_name(folder: Path, why: str) -> Path:
    """Return a name beside `folder`, made from it, that nothing has yet."""
    number = 1
    while (name := folder.with_name(f"{folder.name}.{why}-{number}")).exists():
        number += 1
    return name


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
