"""The sha256 of many files, kept beside what was made of them, so that none is read twice."""

import contextlib
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm

from pipeline import artifact
from pipeline.recipe import InputError

# A file that changed within this time of being read may change again without a newer time stamp.
RACY_SECONDS = 2.0
SMALL_FILE = 1 << 20


def file_digests(stats: list[tuple[str, os.stat_result]], kept: Path | None) -> dict[str, str]:
    """Return the sha256 of every file, of an untouched one as it was kept."""
    known: dict[str, list] = {}
    if kept is not None:
        try:
            found = json.loads(kept.read_text())
            known = found if isinstance(found, dict) else {}
        except (OSError, ValueError):
            pass
    marks = {
        path: [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev] for path, s in stats
    }
    changed = [path for path in marks if known.get(path, [None])[:-1] != marks[path]]
    size = sum(marks[path][0] for path in changed)
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,  # hashlib lets other threads run
        tqdm(
            desc="fingerprint", total=size, unit="B", unit_scale=True, delay=2, disable=None
        ) as bar,
    ):
        digests = {path: entry[-1] for path, entry in known.items() if path in marks}
        parts = [changed[start : start + 256] for start in range(0, len(changed), 256)]
        for part, found in zip(parts, pool.map(_sha256, parts), strict=True):
            digests |= zip(part, found, strict=True)
            bar.update(sum(marks[path][0] for path in part))
    if kept is not None and changed:
        settled = time.time_ns() - int(RACY_SECONDS * 1e9)
        entries = {p: [*m, digests[p]] for p, m in marks.items() if m[2] < settled}
        with contextlib.suppress(OSError):  # it only saves time
            kept.parent.mkdir(parents=True, exist_ok=True)
            artifact.write_whole(kept, json.dumps(entries))
    return digests


def _sha256(paths: list[str]) -> list[str]:
    digests = []
    for path in paths:
        try:
            with open(path, "rb", buffering=0) as file:
                first = file.read(SMALL_FILE)  # one call less for each of many small files
                digest = hashlib.sha256(first)
                while len(first) == SMALL_FILE and (more := file.read(SMALL_FILE)):
                    digest.update(more)
            digests.append(digest.hexdigest())
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    return digests
