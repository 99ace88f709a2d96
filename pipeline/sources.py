"""Where documents come from: files, folders, the Hub, and the shards that they are cut into.

Which shards there are follows from the sources alone, so whoever reads them, in whatever number of
processes, finds the same documents in the same order.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet

from pipeline.data_sections import SourceSection
from pipeline.file_search import COMPRESSED, KINDS, files_below, find_files, suffix_of
from pipeline.raw_documents import Document, Shard, check_column, commit_of, load_hub, read_shard
from pipeline.recipe import InputError
from pipeline.text_files import named_errors, safe_windows

# Bounds that follow from the whole alone; between them a corpus makes about 64 shards.
SHARD_BYTES = (16 << 20, 256 << 20)


def shards_of(
    number: int,
    source: SourceSection,
    files: list[tuple[str, Path]],
    *,
    total_bytes: int,
    streaming: bool = False,
) -> list[Shard]:
    """Return the shards of one source, its place in the list of sources being `number`.

    With `streaming` a Hub data set is read over the network as it is needed.

    Raises:
        InputError: a table without the text column, or a file that is not the table it says.
    """
    smallest, largest = SHARD_BYTES
    size = min(max(total_bytes // 64, smallest), largest)
    if source.dataset is not None and streaming:
        count = load_hub(source, streaming=True).num_shards
        return [Shard(number, "hub_stream", (), n, count) for n in range(count)]
    if source.dataset is not None:
        rows, length = len(load_hub(source)), load_hub(source).data.nbytes
        if source.join_rows:
            return [Shard(number, "hub", (), 0, rows, length)]
        step = max(1, rows * size // max(1, length))
        starts = range(0, rows, step)
        return [
            Shard(number, "hub", (), start, min(start + step, rows), length // len(starts))
            for start in starts
        ]
    shards: list[Shard] = []
    together: list[tuple[str, str]] = []
    together_size = 0

    def close() -> None:
        nonlocal together, together_size
        if together:
            shards.append(Shard(number, "text", tuple(together), size=together_size))
        together, together_size = [], 0

    for name, path in files:
        kind, length = kind_of(path, source), path.stat().st_size
        if kind == "text" and source.format != "text":
            raise InputError(
                f"{path}: a file of text has no columns; data.format {source.format} is for "
                ".jsonl, .csv and .parquet files and data sets"
            )
        if kind == "text":
            together.append((name, str(path)))
            together_size += length
            if together_size >= size:
                close()
            continue
        close()
        check_column(path, kind, source)
        for start, stop in _ranges(path, kind, source, size):
            shards.append(Shard(number, kind, ((name, str(path)),), start, stop, min(size, length)))
    close()
    return shards


def documents_of(source: SourceSection) -> tuple[int, Iterator[Document]]:
    """Return the bytes of a source's files and all its documents, of no split, in order.

    Each is read in windows that tokenise as the whole does, or is an `Example`.

    Raises:
        InputError: see `find_files`, `shards_of` and `raw_documents.read_shard`.
    """
    files = find_files(source)
    size = sum(path.stat().st_size for _, path in files)

    def documents() -> Iterator[Document]:
        for shard in shards_of(0, source, files, total_bytes=size):
            for document in read_shard(shard, source):
                if source.format == "text":
                    document = document._replace(read=functools.partial(_windows, document))
                yield document

    return size, documents()


def _windows(document: Document) -> Iterator[str]:
    return safe_windows(document.read(), document.name)


def streamed_identity(source: SourceSection) -> str:
    """Return what decides the text of a streamed data set: its commit, or a folder's files."""
    place = Path(source.dataset)
    found: list[Any] = [source.dataset, source.dataset_config, source.dataset_split]
    if place.is_dir():
        for path in files_below(place, set()):
            stat = os.stat(path)
            found.append([path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    else:
        found.append(commit_of(source))
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def kind_of(path: Path, source: SourceSection) -> str:
    """Return how a file is read: text, separated, jsonl, csv or parquet."""
    suffix = suffix_of(path)
    if suffix in KINDS[1:]:
        return suffix[1:]
    return "text" if source.separator is None else "separated"


def _ranges(path: Path, kind: str, source: SourceSection, size: int) -> list[tuple[int, int]]:
    """Return the ranges in which a large file can be read, or one for all of it."""
    whole = [(0, 0)]
    if path.suffix in COMPRESSED or kind == "csv" or source.join_rows:
        return whole
    if kind == "parquet":
        with named_errors(str(path)), pyarrow.parquet.ParquetFile(path) as file:
            metadata = file.metadata
            ranges, start, length = [], 0, 0
            for group in range(metadata.num_row_groups):
                length += metadata.row_group(group).total_byte_size
                if length >= size or group == metadata.num_row_groups - 1:
                    ranges.append((start, group + 1))
                    start, length = group + 1, 0
            return ranges or whole
    separator = b"\n" if kind == "jsonl" else source.separator_bytes
    # Entered in the middle, "\n\n\n" could be read as another separator than from its beginning.
    if any(separator.endswith(separator[:n]) for n in range(1, len(separator))):
        return whole
    length = path.stat().st_size
    return [(start, min(start + size, length)) for start in range(0, length, size)] or whole
