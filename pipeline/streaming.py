"""Rows made on the way to the device: a process that encodes ahead, and a bounded ring on disk.

The stream is cut into segments of rows. A producer writes segments ahead of the training process
and removes those that were used; with every segment it keeps the stream's bookmarks, so that any
segment can be made again, to the token. Rows are shuffled within a segment, by seed and segment:
which row is the n-th follows from the recipe and the text alone, whoever reads it, resumed or not.
"""

import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from pipeline import artifact, interruption, packing
from pipeline.recipe import InputError, first_line
from pipeline.row_file import RowFile, RowWriter
from pipeline.row_order import permuted
from pipeline.stream import Source, Stream
from pipeline.token_shards import end_with

logger = logging.getLogger(__name__)

TOKENS_PER_SEGMENT = 1 << 22  # shuffled together: 4,096 rows of 1,024, 8 MB
SEGMENTS_AHEAD = 2
SECONDS_BETWEEN_LOOKS = 0.02
BOOKMARKS, FAILED, WANTED, PRODUCER = "bookmarks.jsonl", "failed.txt", "wanted", "producer"


class Ring:
    """The rows of a stream by their place in training, waiting for those not made yet."""

    def __init__(self, stream: Stream, folder: Path, *, length: int) -> None:
        """Take `length` rows of the stream that a producer writes into `folder`."""
        self.block_size, self._length = stream.block_size, length
        self._rows_per_segment, self._seed = stream.rows_per_segment, stream.seed
        self._folder = folder
        self._open: dict[int, tuple[RowFile, np.ndarray]] = {}

    def __len__(self) -> int:
        return self._length

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Return ids [block_size], columns in which documents begin, and how many ids are text.

        Raises:
            InputError: the producer found text that it cannot read, or is gone.
        """
        segment, place = divmod(index, self._rows_per_segment)
        rows, order = self._segment(segment)
        return rows.row(int(order[place]))

    def _segment(self, number: int) -> tuple[RowFile, np.ndarray]:
        if number not in self._open:
            self._ask_for(number)
            path = self._folder / _name(number)
            while not path.exists():
                _check_producer(self._folder)
                time.sleep(SECONDS_BETWEEN_LOOKS)
            while len(self._open) >= 2:
                del self._open[min(self._open)]
            size = self._rows_per_segment
            order = permuted(np.arange(size), size, self._seed, number)
            self._open[number] = (RowFile.open(path), order)
        return self._open[number]

    def _ask_for(self, number: int) -> None:
        artifact.write_whole(self._folder / WANTED, str(number))


@contextlib.contextmanager
def producing(stream: Stream | None, folder: Path, *, is_main_process: bool) -> Iterator[None]:
    """Keep a producer at work on the stream's ring in `folder` until the block ends.

    Nothing happens without a stream, or in other processes than the main one.
    """
    if stream is None or not is_main_process:
        yield
        return
    bookmarks = folder / BOOKMARKS
    if bookmarks.exists() and _read_bookmarks(folder, stream.identity) is None:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name != BOOKMARKS:
            path.unlink()
    # Spawned, not forked: the parent has threads. The producer imports no torch.
    process = multiprocessing.get_context("spawn").Process(
        target=_produce, args=(stream, folder, os.getpid()), daemon=True
    )
    process.start()
    artifact.write_whole(folder / PRODUCER, json.dumps([socket.gethostname(), process.pid]))
    try:
        yield
    except Exception:
        # What a worker of a DataLoader raised comes back with a traceback in its message.
        _check_failed(folder)
        raise
    finally:
        process.kill()  # it heeds no signal; what it was writing is not there
        process.join()
        _say_passes(folder, stream)
        for path in folder.iterdir():
            if path.name != BOOKMARKS:
                path.unlink(missing_ok=True)


def _say_passes(folder: Path, stream: Stream) -> None:
    """Say which sources were read more than once."""
    kept = _read_bookmarks(folder, stream.identity) or {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        reached = int((folder / WANTED).read_text())  # the producer itself is further
        for number, mark in enumerate(kept.get(reached, [])):
            if not mark["pass"]:
                continue
            logger.info("source %d of the stream ran out and was begun again", number + 1)


def _produce(stream: Stream, folder: Path, parent: int) -> None:
    """Write the segments that are wanted; end with the parent, however it ends."""
    end_with(parent)
    if multiprocessing.parent_process() is not None:
        # What asks the whole process group to stop is for the parent: it still needs its rows.
        interruption.ignore()
    try:
        while True:
            _produce_from(stream, folder, _wanted(folder))
    except InputError as error:
        _report(folder, str(error))
    except Exception as error:  # a full disk, the network: whoever waits for rows must hear of it
        _report(
            folder,
            f"the stream stopped ({type(error).__name__}: {first_line(error)}); see to that and "
            "start the same command again, it goes on at the same token",
        )


def _produce_from(stream: Stream, folder: Path, wanted: int) -> None:
    """Write segments from the wanted one on, until one is wanted that is no longer there."""
    # Of an update that spans two segments the second may be asked for first.
    first = max(0, wanted - 1)
    begin, bookmark = _nearest(folder, stream, first)
    made = [Source(stream, n, mark) for n, mark in enumerate(bookmark)]
    for segment in itertools.count(begin):
        _keep_bookmark(folder, stream, segment, [source.bookmark() for source in made])
        counts = stream.rows_of(segment)
        rows = [source.take(count) for source, count in zip(made, counts, strict=True)]
        if segment < first:
            continue
        _write(folder, stream, segment, rows)
        while segment - _wanted(folder) >= SEGMENTS_AHEAD:
            if _is_behind(folder, segment):
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)
        if _is_behind(folder, segment):
            return
        _remove_used(folder, _wanted(folder))


def _is_behind(folder: Path, made: int) -> bool:
    """Whether a segment is wanted that was made and removed: training went back."""
    wanted = _wanted(folder)
    return wanted <= made and not (folder / _name(wanted)).exists()


def _report(folder: Path, sentence: str) -> None:
    artifact.write_whole(folder / FAILED, sentence)


def _wanted(folder: Path) -> int:
    """Return the segment that was last asked for, waiting for the first request."""
    while True:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return int((folder / WANTED).read_text())
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _write(folder: Path, stream: Stream, segment: int, parts: list[packing.Rows]) -> None:
    staging = folder / f"_{_name(segment)}"
    dtype = np.dtype(stream.work.dtype)
    writer = RowWriter(staging, block_size=stream.block_size, dtype=dtype)
    for rows in parts:
        writer.write(rows)
    writer.close()
    os.replace(staging, folder / _name(segment))


def _remove_used(folder: Path, wanted: int) -> None:
    """Remove what no process can still be reading: they are never a whole segment apart."""
    for path in folder.glob("segment-*.arrow"):
        if int(path.stem.split("-")[1]) < wanted - 1:
            path.unlink()


def _nearest(folder: Path, stream: Stream, number: int) -> tuple[int, list[dict[str, int]]]:
    kept = _read_bookmarks(folder, stream.identity) or {}
    before = [segment for segment in kept if segment <= number]
    start = {"pass": 0, "shard": 0, "document": 0, "token": 0}
    if not before:
        return 0, [dict(start) for _ in stream.shards]
    return max(before), kept[max(before)]


def _keep_bookmark(folder: Path, stream: Stream, segment: int, marks: list[dict]) -> None:
    kept = _read_bookmarks(folder, stream.identity)
    with (folder / BOOKMARKS).open("a+") as file:
        file.seek(0)
        if not file.read().endswith("\n") and file.tell():  # the last line was cut off
            file.write("\n")
        if kept is None:
            file.write(json.dumps({"stream": stream.identity}) + "\n")
        if kept is None or segment not in kept:
            file.write(json.dumps({"segment": segment, "sources": marks}) + "\n")


def _read_bookmarks(folder: Path, identity: str) -> dict[int, list[dict[str, int]]] | None:
    """Return the bookmarks of this stream, None where there are none of it."""
    try:
        lines = (folder / BOOKMARKS).read_text().splitlines()
    except FileNotFoundError:
        return None
    found: dict[int, list[dict[str, int]]] = {}
    for number, line in enumerate(lines):
        try:
            entry: dict[str, Any] = json.loads(line)
        except ValueError:  # cut off when the process was killed
            if number == 0:  # nobody knows whose they are
                return None
            continue
        if number == 0:
            if entry.get("stream") != identity:
                return None
        else:
            found[entry["segment"]] = entry["sources"]
    return found if lines else None


def _check_producer(folder: Path) -> None:
    """Raise InputError if the producer stopped, with what it said or that it is gone."""
    is_gone = _is_gone(folder)  # looked at first: the producer's last act may be to say why
    _check_failed(folder)
    if is_gone:
        raise InputError(
            "the process that encodes the stream is gone (killed, or out of memory); start the "
            "same command again, it goes on at the same token"
        )


def _check_failed(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        raise InputError((folder / FAILED).read_text())


def _is_gone(folder: Path) -> bool:
    """Tell whether the producer ended; on another machine the main process there sees it."""
    try:
        host, pid = json.loads((folder / PRODUCER).read_text())
        # Killed, it is a zombie until its parent asks for it.
        return host == socket.gethostname() and (
            psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        )
    except psutil.NoSuchProcess:
        return True
    except (FileNotFoundError, psutil.AccessDenied):
        return False


def _name(segment: int) -> str:
    return f"segment-{segment:09}.arrow"
