"""Where documents come from: files of every kind, the Hub, cut into shards that can be read alone.

A shard is a run of small files, or a range of bytes, row groups or rows of a large one. Which
shards there are follows from the sources alone, so whoever reads them, in whatever number of
processes, finds the same documents in the same order. Reading is bounded in memory: a text file is
read in windows, a table row by row.
"""

import codecs
import contextlib
import csv
import functools
import glob
import gzip
import hashlib
import io
import json
import os
import re
import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet

from pipeline.recipe import InputError, first_line, not_loaded
from pipeline.sections import SourceSection

STANDARD_LIBRARY = "python:stdlib"
PACKAGES = "python:packages"
NOT_THE_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
KINDS = (".txt", ".jsonl", ".csv", ".parquet")
COMPRESSED = (".gz", ".zst")
# Bounds that follow from the whole alone; between them a corpus makes about 64 shards.
SHARD_BYTES = (16 << 20, 256 << 20)
WINDOW = 1 << 20  # bytes of a text file in memory at once
LONGEST_ROW = 64 << 20  # bytes of a line or of a separated document: it is in memory several times
# White space after something else. What Python calls white space besides Unicode's (0x1c to 0x1f)
# is none for a tokenizer.
BOUNDARY = re.compile(r"(?<=[\S\x1c-\x1f])[^\S\x1c-\x1f]")
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


def find_files(source: SourceSection) -> list[tuple[str, Path]]:
    """Return names and paths of a source's files, in a fixed order; none for a Hub data set.

    Raises:
        InputError: a file or folder is missing or empty.
    """
    found = []
    for item in source.files or []:
        found += _found(item)
    return found


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
        if kind == "text":
            together.append((name, str(path)))
            together_size += length
            if together_size >= size:
                close()
            continue
        close()
        _check_column(path, kind, source)
        for start, stop in _ranges(path, kind, source, size):
            shards.append(Shard(number, kind, ((name, str(path)),), start, stop, min(size, length)))
    close()
    return shards


def read_shard(shard: Shard, source: SourceSection) -> Iterator[Document]:
    """Yield the documents of a shard, empty ones too.

    Raises:
        InputError: bytes that are not UTF-8 (file and offset), a value that is not text, a file
            that is cut off or not what its name says, or a row that does not fit in memory.
    """
    if source.join_rows and shard.kind != "text":
        name = shard.files[0][0] if shard.files else source.dataset

        def joined() -> Iterator[str]:
            return (row.text for row in _read_rows(shard, source))

        yield Document(name, joined)
    else:
        yield from _read_rows(shard, source)


def _read_rows(shard: Shard, source: SourceSection) -> Iterator[Document]:
    if shard.kind.startswith("hub"):
        yield from _hub_rows(shard, source)
    for name, path in shard.files:
        with _named_errors(path):
            if shard.kind == "text":
                yield Document(name, functools.partial(_text_windows, path, source.errors))
            elif shard.kind in ("separated", "jsonl"):
                yield from _pieces(name, path, shard, source)
            elif shard.kind == "csv":
                yield from _csv_rows(name, path, source)
            else:
                yield from _parquet_rows(name, path, shard, source)


def safe_windows(windows: Iterator[str], name: str) -> Iterator[str]:
    """Yield the same text in pieces of at most `WINDOW` characters that tokenise as the whole does.

    Raises:
        InputError: so many characters on end without white space after something else.
    """
    rest, begin = "", 0
    for window in windows:
        rest, begin = rest[begin:] + window, 0
        while len(rest) - begin > WINDOW:
            cut = _last_boundary(rest[begin : begin + WINDOW])
            if cut is None:
                raise InputError(
                    f"{name}: no word ends in {WINDOW:,} characters on end: this is not text that "
                    "a tokenizer can cut into words; leave the file out"
                )
            yield rest[begin : begin + cut]
            begin += cut
    if begin < len(rest):
        yield rest[begin:]


def _last_boundary(text: str) -> int | None:
    """Return the last place that no token reaches across, or None.

    A space between two letters or digits is one for the pattern of every byte-level tokenizer;
    where there is none, so is, for GPT-2's pattern, white space after anything else.
    """
    end = len(text) - 1
    while (end := text.rfind(" ", 1, end)) > 0:
        if text[end - 1].isalnum() and text[end + 1].isalnum():
            return end
    places = [match.start() for match in BOUNDARY.finditer(text)]
    return places[-1] if places else None


@functools.lru_cache(maxsize=4)
def load_hub(source: SourceSection, *, streaming: bool = False) -> Any:
    """Return a `datasets.Dataset` (memory-mapped), or an `IterableDataset` that is read as needed.

    Raises:
        InputError: it cannot be found or reached, or it has no such column.
    """
    import datasets  # not before: it takes seconds, and workers rarely need it

    try:
        data = datasets.load_dataset(
            source.dataset,
            source.dataset_config,
            split=source.dataset_split,
            revision=_commit(source) if streaming else source.dataset_revision,
            streaming=streaming,
        )
        names = data.column_names or list(next(iter(data), {}))
    except Exception as error:  # network, name, configuration, split, permission
        raise not_loaded(f"data.dataset {source.dataset}", "data set", error) from None
    _has_column(source.dataset, names, source)
    return data


def streamed_identity(source: SourceSection) -> str:
    """Return what decides the text of a streamed data set: its commit, or a folder's files."""
    place = Path(source.dataset)
    found: list[Any] = [source.dataset, source.dataset_config, source.dataset_split]
    if place.is_dir():
        for path in _below(place, set()):
            stat = os.stat(path)
            found.append([path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    else:
        found.append(_commit(source))
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


@functools.lru_cache(maxsize=8)
def _commit(source: SourceSection) -> str | None:
    """Return the commit that a data set's revision is now: resumed, the text must be the same."""
    if Path(source.dataset).is_dir():
        return source.dataset_revision
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        return api.dataset_info(source.dataset, revision=source.dataset_revision).sha
    except Exception as error:  # network, name, permission
        raise not_loaded(f"data.dataset {source.dataset}", "data set", error) from None


def read_text(path: Path, *, errors: str = "strict") -> str:
    """Return a file's text, UTF-8, a byte-order mark removed, line endings as they are.

    Raises:
        InputError: the file cannot be read, or holds other bytes and `errors` is "strict".
    """
    with _named_errors(str(path)):
        return "".join(_text_windows(str(path), errors))


def read_files(names: list[str], *, errors: str = "strict") -> list[str]:
    """Return the texts of files in the order given.

    Raises:
        InputError: a file is missing, empty, or not UTF-8.
    """
    texts = []
    for name in names:
        if not Path(name).is_file():
            kind = "a folder; name the files in it" if Path(name).is_dir() else "no such file"
            raise InputError(f"{name}: {kind}; looked in {Path.cwd()}")
        texts.append(read_text(Path(name), errors=errors))
        if not texts[-1]:
            raise InputError(f"{name}: the file is empty; there is nothing to score")
    return texts


def _found(item: str) -> list[tuple[str, Path]]:
    if item in (STANDARD_LIBRARY, PACKAGES):
        library = item == STANDARD_LIBRARY
        root = Path(sysconfig.get_path("stdlib" if library else "purelib"))
        left_out = NOT_THE_LIBRARY if library else {"__pycache__"}
        paths = _below(root, left_out, ".py")
        if not paths:
            raise InputError(f"{item}: no .py file in {root}")
        return [(path[len(str(root)) + 1 :], Path(path)) for path in paths]
    path = Path(item)
    if path.is_dir():
        found = [p for p in map(Path, _below(path, set())) if _suffix(p) in KINDS]
        remedy = f"for other files give a pattern, such as '{item}/**/*.md'"
    elif path.exists():
        if path.stat().st_size == 0:
            raise InputError(f"{item}: the file is empty; there is nothing to train on")
        found = [path]
    else:
        found = [Path(p) for p in sorted(glob.glob(item, recursive=True))]
        found = [p for p in found if p.is_file()]
        remedy = f"looked in {Path.cwd()}; check data.files"
    if not found:
        kind = "no .txt, .jsonl, .csv or .parquet in this folder"
        raise InputError(f"{item}: {kind if path.is_dir() else 'no such file'}; {remedy}")
    return [(str(path), path) for path in found]


def _below(root: Path, left_out: set[str], ending: str = "") -> list[str]:
    """Return the files below a folder that end so, in the order of their parts."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out]
        found += [f"{folder}/{name}" for name in files if name.endswith(ending)]
    return sorted(found, key=lambda path: path.split("/"))


def _suffix(path: Path) -> str:
    """Return the ending that says what a file is, .gz and .zst taken off."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def kind_of(path: Path, source: SourceSection) -> str:
    """Return how a file is read: text, separated, jsonl, csv or parquet."""
    suffix = _suffix(path)
    if suffix in KINDS[1:]:
        return suffix[1:]
    return "text" if source.separator is None else "separated"


def _ranges(path: Path, kind: str, source: SourceSection, size: int) -> list[tuple[int, int]]:
    """Return the ranges in which a large file can be read, or one for all of it."""
    whole = [(0, 0)]
    if path.suffix in COMPRESSED or kind == "csv" or source.join_rows:
        return whole
    if kind == "parquet":
        with _named_errors(str(path)), pyarrow.parquet.ParquetFile(path) as file:
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


@contextlib.contextmanager
def _named_errors(path: str) -> Iterator[None]:
    """Turn what a library says of a file into a sentence that names it."""
    try:
        yield
    except InputError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{path}: the compressed file is cut off or damaged ({first_line(error)}); fetch or "
            "write it again"
        ) from None
    except (OSError, pa.ArrowException) as error:
        said = first_line(error)
        if getattr(error, "errno", None) is not None:
            raise InputError(f"{path}: cannot be read: {error.strerror or said}") from None
        if path.endswith(COMPRESSED) and isinstance(error, OSError):
            raise InputError(
                f"{path}: the compressed file is cut off or damaged ({said}); fetch or write it "
                "again"
            ) from None
        raise InputError(f"{path}: not a {_suffix(Path(path))} table: {said}") from None
    except csv.Error as error:
        raise InputError(f"{path}: not a .csv table: {first_line(error)}") from None


@contextlib.contextmanager
def _opened(path: str, start: int = 0) -> Iterator[BinaryIO]:
    """Open a file for reading bytes, decompressed by its suffix."""
    if path.endswith(".gz"):
        with gzip.open(path, "rb") as file:
            yield file
    elif path.endswith(".zst"):
        with pa.input_stream(path, compression="zstd") as file:
            yield io.BufferedReader(file)
    else:
        with open(path, "rb") as file:
            file.seek(start)
            yield file


def _text_windows(path: str, errors: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    with _named_errors(path), _opened(path) as file:
        offset, first = 0, True
        while True:
            content = file.read(WINDOW)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(content, final=not content)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error, offset - pending) from None
            offset += len(content)
            if first:
                text, first = text.removeprefix("\ufeff"), not text
            if text:
                yield text
            if not content:
                return


def _not_utf8(path: str, error: UnicodeDecodeError, offset: int) -> InputError:
    return InputError(
        f"{path}: byte {error.object[error.start]:#04x} at offset {offset + error.start} is not "
        "UTF-8; convert the file, or replace such bytes with --data.errors replace"
    )


def _pieces(name: str, path: str, shard: Shard, source: SourceSection) -> Iterator[Document]:
    """Yield the documents that begin in the shard's range, between separators or one a line."""
    is_lines = shard.kind == "jsonl"
    separator = b"\n" if is_lines else source.separator_bytes
    # The separator before the first document may itself begin before the range.
    start = max(0, shard.start - len(separator))
    with _opened(path, start) as file:
        places = _split(file, separator, path, start)
        if shard.start:
            next(places, None)  # it belongs to the range before
        for offset, content in places:
            if shard.stop and offset >= shard.stop:
                return
            if is_lines:
                content = content.removesuffix(b"\r")
                if content and not content.isspace():
                    yield _json_row(name, path, offset, content, source)
                continue
            try:
                text = content.decode("utf-8", source.errors)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error, offset) from None
            yield _document(f"{name}:{offset}", text.removeprefix("\ufeff") if not offset else text)


def _split(file: BinaryIO, separator: bytes, path: str, offset: int) -> Iterator[tuple[int, bytes]]:
    """Yield offset and content of everything between separators; the last may lack one."""
    buffer, searched = bytearray(), 0  # it grows without being copied each time
    while content := file.read(WINDOW):
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


def _json_row(name: str, path: str, offset: int, content: bytes, source: SourceSection) -> Document:
    text = content.removeprefix(codecs.BOM_UTF8)
    try:
        row = json.loads(text.decode("utf-8", source.errors))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error, offset + len(content) - len(text)) from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not a .jsonl table: the line at byte {offset} is no JSON ({error})"
        ) from None
    if not isinstance(row, dict) or source.text_column not in row:
        names = list(row) if isinstance(row, dict) else []
        raise InputError(
            f"{path}: no column {source.text_column!r} in the line at byte {offset}; it has "
            f"{', '.join(names) or 'none'}; set data.text_column"
        )
    return _cell(f"{name}:{offset}", path, f"the line at byte {offset}", row, source)


def _csv_rows(name: str, path: str, source: SourceSection) -> Iterator[Document]:
    csv.field_size_limit(LONGEST_ROW)
    with _opened(path) as file:
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
            with _opened(path) as content:
                while part := content.read(WINDOW):
                    file.write(part)
            file.seek(0)
        table = stack.enter_context(pyarrow.parquet.ParquetFile(file))
        _has_column(path, table.schema_arrow.names, source)
        stop = shard.stop or table.num_row_groups
        number = sum(table.metadata.row_group(g).num_rows for g in range(shard.start))
        for batch in table.iter_batches(
            64, row_groups=list(range(shard.start, stop)), columns=[source.text_column]
        ):
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


def _hub_rows(shard: Shard, source: SourceSection) -> Iterator[Document]:
    if shard.kind == "hub_stream":
        data = load_hub(source, streaming=True).select_columns([source.text_column])
        rows = enumerate(data.shard(num_shards=shard.stop, index=shard.start))
        prefix = f"{source.dataset}:{shard.start}"
    else:
        data = load_hub(source).select_columns([source.text_column])
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


def _document(name: str, text: str) -> Document:
    return Document(name, lambda: iter([text]))


def _has_column(name: str, columns: list[str], source: SourceSection) -> None:
    if source.text_column not in columns:
        raise InputError(
            f"{name}: no column {source.text_column!r}; it has {', '.join(columns) or 'none'}; set "
            "data.text_column"
        )


def _check_column(path: Path, kind: str, source: SourceSection) -> None:
    """Look at a table's head before anything is prepared."""
    with _named_errors(str(path)):
        if kind == "csv":
            with _opened(str(path)) as file:
                lines = io.TextIOWrapper(file, "utf-8-sig", errors="replace", newline="")
                _has_column(str(path), next(csv.reader(lines), []), source)
        elif kind == "jsonl":
            next(_read_rows(Shard(0, kind, ((str(path), str(path)),)), source), None)
        elif path.suffix == ".parquet":
            names = pyarrow.parquet.read_schema(path).names
            _has_column(str(path), names, source)
