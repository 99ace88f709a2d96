"""Documents out of files of every kind and of the Hub, shard by shard.

A shard can be read alone: a run of small files, or a range of bytes, row groups or rows of a large
one. Reading is bounded in memory: a text file is read in windows, a table row by row.
"""

import codecs
import contextlib
import csv
import functools
import io
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow.parquet

from pipeline import completions, text_files
from pipeline.data_sections import SourceSection
from pipeline.file_search import COMPRESSED
from pipeline.reach import not_loaded, see_hub
from pipeline.recipe import InputError
from pipeline.text_files import named_errors, not_utf8, opened, text_windows

LONGEST_ROW = 64 << 20  # bytes of a line or of a separated document: it is in memory several times
LONE_SURROGATES = re.compile("[\ud800-\udfff]")


class Shard(NamedTuple):
    """A part of a source that can be read alone."""

    source: int
    kind: str
    """One of text, separated, jsonl, csv, parquet, hub, hub_stream."""
    files: tuple[tuple[str, str], ...]
    """Names and paths."""
    start: int = 0
    stop: int = 0
    """Range of bytes (separated, jsonl), row groups (parquet) or rows (hub), 0, 0 being all; or
    which of how many shards of the data set (hub_stream)."""
    size: int = 0
    """Bytes on disk, for progress."""


class Document(NamedTuple):
    """A text that can be read again, in windows where it is long."""

    name: str
    read: Callable[[], Iterator[str]]

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.read())


def read_shard(shard: Shard, source: SourceSection) -> Iterator[Document]:
    """Yield the documents of a shard, empty ones too.

    Raises:
        InputError: bytes that are not UTF-8 (file and offset), a value that is not text, a file
            that is cut off or not what its name says, or a row that does not fit in memory.
    """
    if source.join_rows and shard.kind != "text":
        name = shard.files[0][0] if shard.files else source.dataset

        def joined() -> Iterator[str]:
            between = (source.separator_bytes or b"").decode()
            parts: list[str] = []
            size = 0
            for number, row in enumerate(_read_rows(shard, source)):
                parts.append((between if number else "") + row.text)
                size += len(parts[-1])
                if size >= text_files.WINDOW:  # not row by row: each is copied until it is used
                    yield "".join(parts)
                    parts, size = [], 0
            yield "".join(parts)

        yield Document(name, joined)
    else:
        yield from _read_rows(shard, source)


def _read_rows(shard: Shard, source: SourceSection) -> Iterator[Document]:
    if shard.kind.startswith("hub"):
        yield from _hub_rows(shard, source)
    for name, path in shard.files:
        with named_errors(path):
            if shard.kind == "text":
                yield Document(name, functools.partial(text_windows, path, source.errors))
            elif shard.kind in ("separated", "jsonl"):
                yield from _pieces(name, path, shard, source)
            elif shard.kind == "csv":
                yield from _csv_rows(name, path, source)
            else:
                yield from _parquet_rows(name, path, shard, source)


@functools.lru_cache(maxsize=4)
def load_hub(source: SourceSection, *, streaming: bool = False) -> Any:
    """Return a `datasets.Dataset` (memory-mapped), or an `IterableDataset` that is read as needed.

    Raises:
        InputError: it cannot be found or reached, or it has no such column.
    """
    if not Path(source.dataset).exists():
        see_hub()
    import datasets  # not before: it takes seconds, and workers rarely need it

    try:
        data = datasets.load_dataset(
            source.dataset,
            source.dataset_config,
            split=source.dataset_split,
            revision=commit_of(source) if streaming else source.dataset_revision,
            streaming=streaming,
        )
        names = data.column_names or list(next(iter(data), {}))
    except Exception as error:  # network, name, configuration, split, permission
        raise not_loaded(f"data.dataset {source.dataset}", "data set", error) from None
    _has_column(source.dataset, names, source)
    return data


@functools.lru_cache(maxsize=8)
def commit_of(source: SourceSection) -> str | None:
    """Return the commit that a data set's revision is now: resumed, the text must be the same."""
    if Path(source.dataset).is_dir():
        return source.dataset_revision
    import huggingface_hub

    see_hub()
    try:
        api = huggingface_hub.HfApi()
        return api.dataset_info(source.dataset, revision=source.dataset_revision).sha
    except Exception as error:  # network, name, permission
        raise not_loaded(f"data.dataset {source.dataset}", "data set", error) from None


def check_column(path: Path, kind: str, source: SourceSection) -> None:
    """Look at a table's head before anything is prepared."""
    with named_errors(str(path)):
        if kind == "csv":
            with opened(str(path)) as file:
                lines = io.TextIOWrapper(file, "utf-8-sig", errors="replace", newline="")
                _has_column(str(path), next(csv.reader(lines), []), source)
        elif kind == "jsonl":
            next(_read_rows(Shard(0, kind, ((str(path), str(path)),)), source), None)
        elif path.suffix == ".parquet":
            names = pyarrow.parquet.read_schema(path).names
            _has_column(str(path), names, source)


def _pieces(name: str, path: str, shard: Shard, source: SourceSection) -> Iterator[Document]:
    """Yield the documents that begin in the shard's range, between separators or one a line."""
    is_lines, columns = shard.kind == "jsonl", {*_columns(source)}
    separator = b"\n" if is_lines else source.separator_bytes
    # The separator before the first document may itself begin before the range.
    start = max(0, shard.start - len(separator))
    with opened(path, start) as file:
        places = _split(file, separator, path, start)
        if shard.start:
            next(places, None)  # it belongs to the range before
        for offset, content in places:
            if shard.stop and offset >= shard.stop:
                return
            if is_lines:
                content = content.removesuffix(b"\r")
                if content and not content.isspace():
                    yield _json_row(name, path, offset, content, source, columns)
                continue
            try:
                text = content.decode("utf-8", source.errors)
            except UnicodeDecodeError as error:
                raise not_utf8(path, error, offset) from None
            yield _document(f"{name}:{offset}", text.removeprefix("\ufeff") if not offset else text)


def _split(file: BinaryIO, separator: bytes, path: str, offset: int) -> Iterator[tuple[int, bytes]]:
    """Yield offset and content of everything between separators; the last may lack one."""
    buffer, searched = bytearray(), 0  # it grows without being copied each time
    while content := file.read(text_files.WINDOW):
        buffer += content
        begin = 0
        while (end := buffer.find(separator, max(begin, searched))) >= 0:
            yield offset + begin, bytes(buffer[begin:end])
            begin, searched = end + len(separator), 0
        del buffer[:begin]
        offset += begin
        searched = max(0, len(buffer) - len(separator) + 1)
        if len(buffer) > LONGEST_ROW:
            shown = separator.decode()
            raise InputError(
                f"{path}: more than {LONGEST_ROW >> 20} MB from byte {offset} on without "
                f"{shown!r}, which should stand between documents; check the file and its kind"
            )
    if buffer:
        yield offset, bytes(buffer)


def _columns(source: SourceSection) -> tuple[str, ...]:
    """Return the columns of a table that are read."""
    return completions.COLUMNS.get(source.format) or (source.text_column,)


def _json_row(
    name: str, path: str, offset: int, content: bytes, source: SourceSection, columns: set[str]
) -> Document:
    text = content.removeprefix(codecs.BOM_UTF8)
    try:
        row = json.loads(text.decode("utf-8", source.errors))
    except UnicodeDecodeError as error:
        raise not_utf8(path, error, offset + len(content) - len(text)) from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not a .jsonl table: the line at byte {offset} is no JSON ({error})"
        ) from None
    if not isinstance(row, dict) or not row.keys() >= columns:
        names = list(row) if isinstance(row, dict) else []
        raise _no_column(path, names, source, f" in the line at byte {offset}")
    return _cell(f"{name}:{offset}", path, f"the line at byte {offset}", row, source)


def _csv_rows(name: str, path: str, source: SourceSection) -> Iterator[Document]:
    csv.field_size_limit(LONGEST_ROW)
    with opened(path) as file:
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors=source.errors, newline="")
        try:
            reader = csv.DictReader(lines, strict=True)
            for number, row in enumerate(reader):
                yield _cell(f"{name}:{number}", path, f"row {number}", row, source)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: byte {error.object[error.start]:#04x} is not UTF-8; convert the file, or "
                "replace such bytes with --data.errors replace"
            ) from None


def _parquet_rows(name: str, path: str, shard: Shard, source: SourceSection) -> Iterator[Document]:
    with contextlib.ExitStack() as stack:
        file: Any = path
        if path.endswith(COMPRESSED):  # Parquet is read from its end
            file = stack.enter_context(tempfile.TemporaryFile())
            with opened(path) as content:
                while part := content.read(text_files.WINDOW):
                    file.write(part)
            file.seek(0)
        table = stack.enter_context(pyarrow.parquet.ParquetFile(file))
        _has_column(path, table.schema_arrow.names, source)
        stop = shard.stop or table.num_row_groups
        number = sum(table.metadata.row_group(g).num_rows for g in range(shard.start))
        for batch in table.iter_batches(
            64, row_groups=list(range(shard.start, stop)), columns=list(_columns(source))
        ):
            if source.format != "text":
                for one in range(len(batch)):
                    row = _parquet_row(batch, one, path, number)
                    yield _cell(f"{name}:{number}", path, f"row {number}", row, source)
                    number += 1
                continue
            for value in batch.column(0):
                try:
                    text = value.as_py()
                except UnicodeDecodeError as error:
                    if source.errors == "strict":
                        raise _row_not_utf8(path, number, error) from None
                    text = value.as_buffer().to_pybytes().decode("utf-8", source.errors)
                row = {source.text_column: text}
                yield _cell(f"{name}:{number}", path, f"row {number}", row, source)
                number += 1


def _parquet_row(batch: Any, place: int, path: str, number: int) -> dict[str, Any]:
    try:
        return batch.slice(place, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        raise _row_not_utf8(path, number, error) from None


def _hub_rows(shard: Shard, source: SourceSection) -> Iterator[Document]:
    if shard.kind == "hub_stream":
        data = load_hub(source, streaming=True).select_columns(list(_columns(source)))
        rows = enumerate(data.shard(num_shards=shard.stop, index=shard.start))
        prefix = f"{source.dataset}:{shard.start}"
    else:
        data = load_hub(source).select_columns(list(_columns(source)))
        rows = ((number, data[number]) for number in range(shard.start, shard.stop))
        prefix = source.dataset
    number = -1
    while True:
        try:
            number, row = next(rows)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            raise _row_not_utf8(source.dataset, number + 1, error) from None
        yield _cell(f"{prefix}:{number}", source.dataset, f"row {number}", row, source)


def _row_not_utf8(path: str, number: int, error: UnicodeDecodeError) -> InputError:
    return InputError(
        f"{path}: row {number} holds byte {error.object[error.start]:#04x}, which is not UTF-8; "
        "write the table again, or, of a Parquet file, replace such bytes with "
        "--data.errors replace"
    )


def _cell(name: str, path: str, place: str, row: dict, source: SourceSection) -> Document:
    """Return a table's document; null is an empty one."""
    if source.format != "text":
        return _document(name, _example(path, place, row, source))
    text = row[source.text_column]
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise InputError(
            f"{path}: {place} of column {source.text_column!r} is {text!r} and not text; clean the "
            "table or set data.text_column"
        )
    if not text.isascii() and LONE_SURROGATES.search(text):
        if source.errors == "strict":
            raise InputError(
                f"{path}: {place} of column {source.text_column!r} holds half of a surrogate pair, "
                "which is no Unicode text; clean the table, or --data.errors replace"
            )
        text = LONE_SURROGATES.sub("\ufffd", text)
    return _document(name, text)


def _example(path: str, place: str, row: dict, source: SourceSection) -> completions.Example:
    example = completions.example_of(row, source.format, f"{path}: {place}")
    if not example.isascii() and LONE_SURROGATES.search(example):
        if source.errors == "strict":
            raise InputError(
                f"{path}: {place} holds half of a surrogate pair, which is no Unicode text; clean "
                "the table, or --data.errors replace"
            )
        example = example.mapped(lambda piece: LONE_SURROGATES.sub("\ufffd", piece))
    return example


def _document(name: str, text: str) -> Document:
    return Document(name, lambda: iter([text]))


def _has_column(name: str, columns: list[str], source: SourceSection) -> None:
    if not {*_columns(source)} <= {*columns}:
        raise _no_column(name, columns, source)


def _no_column(name: str, columns: list[str], source: SourceSection, place: str = "") -> InputError:
    """Return the error for a table that lacks a column, `place` being where it does."""
    wanted, found = _columns(source), completions.format_of(columns)
    missing = next(column for column in wanted if column not in columns)
    remedy = "set data.text_column"
    if found is not None:
        remedy = f"set data.format {found}"
    elif source.format != "text":
        remedy = f"data.format {source.format} reads {' and '.join(wanted)}"
    return InputError(
        f"{name}: no column {missing!r}{place}; it has {', '.join(columns) or 'none'}; {remedy}"
    )
