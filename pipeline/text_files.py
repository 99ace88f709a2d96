"""Files of text: opened whatever compresses them, decoded, read in windows that cut no word.

Reading is bounded in memory: a window at a time.
"""

import codecs
import contextlib
import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from pipeline.file_search import COMPRESSED, suffix_of
from pipeline.recipe import InputError, first_line

WINDOW = 1 << 20  # bytes of a text file in memory at once
# White space after something else. What Python calls white space besides Unicode's (0x1c to 0x1f)
# is none for a tokenizer.
BOUNDARY = re.compile(r"(?<=[\S\x1c-\x1f])[^\S\x1c-\x1f]")


def read_text(path: Path, *, errors: str = "strict") -> str:
    """Return a file's text, UTF-8, a byte-order mark removed, line endings as they are.

    Raises:
        InputError: the file cannot be read, or holds other bytes and `errors` is "strict".
    """
    with named_errors(str(path)):
        return "".join(text_windows(str(path), errors))


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


@contextlib.contextmanager
def named_errors(path: str) -> Iterator[None]:
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
        raise InputError(f"{path}: not a {suffix_of(Path(path))} table: {said}") from None
    except csv.Error as error:
        raise InputError(f"{path}: not a .csv table: {first_line(error)}") from None


@contextlib.contextmanager
def opened(path: str, start: int = 0) -> Iterator[BinaryIO]:
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


def text_windows(path: str, errors: str) -> Iterator[str]:
    """Yield a file's text in windows, a byte-order mark removed, line endings as they are.

    Raises:
        InputError: see `read_text`.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    with named_errors(path), opened(path) as file:
        offset, first = 0, True
        while True:
            content = file.read(WINDOW)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(content, final=not content)
            except UnicodeDecodeError as error:
                raise not_utf8(path, error, offset - pending) from None
            offset += len(content)
            if first:
                text, first = text.removeprefix("\ufeff"), not text
            if text:
                yield text
            if not content:
                return


def not_utf8(path: str, error: UnicodeDecodeError, offset: int) -> InputError:
    """Return the error that names the byte, what was decoded having begun at `offset`."""
    return InputError(
        f"{path}: byte {error.object[error.start]:#04x} at offset {offset + error.start} is not "
        "UTF-8; convert the file, or replace such bytes with --data.errors replace"
    )
