"""Streams of ids to rows of fixed length: where a row begins, and which documents it holds.

Three ways. `windows` lays documents end to end and cuts: at every `block_size` tokens, or, with a
smaller stride, so that rows overlap. `best_fit` keeps documents whole where they fit (Ding et al.
2024, "Fewer truncations improve language modeling": best fit, longest first).
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from pipeline.data_sections import DataSection

# Documents of about this many tokens are placed together: enough that rows fill up (below 0.1 % is
# left empty at 1,024 tokens a row), few enough to fit in memory.
TOKENS_PLACED_TOGETHER = 1 << 22


class Chunk(NamedTuple):
    """A stretch of whole documents, laid end to end."""

    ids: np.ndarray
    """[tokens], the end-of-text of each document included."""
    starts: np.ndarray
    """int64 [documents]: places in `ids` where they begin."""
    bytes: int = 0
    """Of the text that the ids stand for."""


class Rows(NamedTuple):
    """Rows ready to be written."""

    ids: np.ndarray
    """[rows, block_size]"""
    starts: np.ndarray
    """int64 [documents]: columns in which documents begin, row after row."""
    offsets: np.ndarray
    """int64 [rows + 1]: the starts of row r are starts[offsets[r] : offsets[r + 1]]."""
    used: np.ndarray
    """int64 [rows]: tokens before what is filled up."""


def windows(
    chunks: Iterable[Chunk], block_size: int, *, stride: int, fill: int | None = None
) -> Iterator[Rows]:
    """Yield rows that begin every `stride` tokens of the stream.

    With `fill` the last row is filled up with that id, so that the stream's last token is in it;
    without, the tokens after the last whole row are left out.
    """
    ids: np.ndarray | None = None
    starts = np.empty(0, np.int64)
    begun = False  # whether a row has been given out, which holds the first tokens of `ids`
    for chunk in chunks:
        for part in _first_row_apart(chunk, 0 if ids is None else len(ids), block_size, stride):
            if ids is None or not len(ids):
                ids, starts = part.ids, part.starts
            else:
                starts = np.concatenate([starts, part.starts + len(ids)])
                ids = np.concatenate([ids, part.ids])
            count = max(0, (len(ids) - block_size) // stride + 1)
            if count:
                yield cut(ids, starts, block_size, stride, count)
                starts = starts[starts >= count * stride] - count * stride
                ids = ids[count * stride :]
                begun = True
    if fill is None or ids is None:
        return
    # What is left begins a row unless all of it but nothing new was in the row before.
    seen = block_size - stride if begun else 1
    if len(ids) > seen:
        padded = np.full(block_size, fill, ids.dtype)
        padded[: len(ids)] = ids
        rows = cut(padded, starts, block_size, stride, 1)
        yield rows._replace(used=np.array([len(ids)], np.int64))


def held_out(chunks: Iterable[Chunk], block_size: int, *, fill: int) -> Iterator[Rows]:
    """Yield rows that overlap by one token: each after the first is predicted exactly once."""
    return windows(chunks, block_size, stride=block_size - 1, fill=fill)


def mixture(rows: list[int], section: DataSection) -> list[tuple[int, int, int]]:
    """Return (first row, rows, rows taken) of each source of the training text.

    Without weights everything is taken; with weights as much as leaves them true, or what
    `mixture_tokens` asks for, as far as a source reaches.
    """
    rows = rows[: len(section.all_sources)]
    first = [0, *itertools.accumulate(rows)]
    if not section.is_weighted:
        return [(first[n], count, count) for n, count in enumerate(rows)]
    weights = [source.weight for source in section.all_sources]
    if section.mixture_tokens is not None:
        total = section.mixture_tokens / section.block_size
    else:
        total = min(count / weight for count, weight in zip(rows, weights, strict=True) if weight)
    return [
        (first[n], count, min(count, int(total * weights[n] + 0.5))) for n, count in enumerate(rows)
    ]


def best_fit(chunks: Iterable[Chunk], block_size: int, *, fill: int) -> Iterator[Rows]:
    """Yield rows of whole documents, placed where they leave the least room.

    A document longer than a row is cut into whole rows and a remainder, which is placed like a
    document. What stays empty is filled up with `fill`.
    """
    waiting: list[Chunk] = []
    size = 0
    for chunk in chunks:
        waiting.append(chunk)
        size += len(chunk.ids)
        if size >= TOKENS_PLACED_TOGETHER:
            yield _placed(waiting, block_size, fill)
            waiting, size = [], 0
    if waiting:
        yield _placed(waiting, block_size, fill)


def place(lengths: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return for pieces of these lengths (1 to `block_size`) the row and the column of each.

    Best fit decreasing: the longest piece first, each into the fullest row that has room for it.
    """
    rows, columns = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    with_room: list[list[int]] = [[] for _ in range(block_size + 1)]  # rows by their room
    occupied = 0  # bit r is set where with_room[r] is not empty
    count = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = occupied >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                occupied &= ~(1 << room)
        else:
            row, room, count = count, block_size, count + 1
        rows[piece], columns[piece] = row, block_size - room
        left = room - length
        if left:
            with_room[left].append(row)
            occupied |= 1 << left
    return rows, columns


def _placed(chunks: list[Chunk], block_size: int, fill: int) -> Rows:
    ids = np.concatenate([chunk.ids for chunk in chunks])
    before = np.cumsum([0, *(len(chunk.ids) for chunk in chunks)])[:-1]
    # A document that goes on from the chunk before was cut at a multiple of `block_size`.
    starts = np.unique(
        np.concatenate([before, *(c.starts + b for c, b in zip(chunks, before, strict=True))])
    )
    lengths = np.diff(np.append(starts, len(ids)))
    # Cut every document into pieces of at most a row.
    pieces = -(-lengths // block_size)
    document = np.repeat(np.arange(len(lengths)), pieces)
    number = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = starts[document] + number * block_size
    length = np.minimum(lengths[document] - number * block_size, block_size)
    rows, columns = place(length, block_size)
    count = int(rows.max()) + 1
    packed = np.full(count * block_size, fill, ids.dtype)
    target = rows * block_size + columns
    within = np.arange(int(length.sum())) - np.repeat(np.cumsum(length) - length, length)
    packed[np.repeat(target, length) + within] = ids[np.repeat(begin, length) + within]
    order = np.argsort(target)
    offsets = np.searchsorted(rows[order], np.arange(count + 1))
    used = np.bincount(rows, weights=length, minlength=count).astype(np.int64)
    return Rows(packed.reshape(count, block_size), columns[order], offsets, used)


def _first_row_apart(chunk: Chunk, before: int, block_size: int, stride: int) -> Iterator[Chunk]:
    """Yield what completes the row begun before, then the rest, which need not be copied."""
    needed = block_size - before
    if stride == block_size and before and needed < len(chunk.ids):
        is_first = chunk.starts < needed
        yield Chunk(chunk.ids[:needed], chunk.starts[is_first])
        chunk = Chunk(chunk.ids[needed:], chunk.starts[~is_first] - needed)
    yield chunk


def cut(ids: np.ndarray, starts: np.ndarray, block_size: int, stride: int, count: int) -> Rows:
    """Return the `count` rows that begin at every `stride`th token; `ids` reaches that far."""
    if stride == block_size:
        rows = ids[: count * block_size].reshape(count, block_size)
    else:
        rows = np.lib.stride_tricks.sliding_window_view(ids, block_size)[: count * stride : stride]
    begin = np.arange(count) * stride
    low, high = np.searchsorted(starts, begin), np.searchsorted(starts, begin + block_size)
    offsets = np.append(0, np.cumsum(high - low))
    # Place k of all starts belongs to row r and is the (k - offsets[r])th from low[r] on.
    row = np.repeat(np.arange(count), high - low)
    found = starts[low[row] + np.arange(int(offsets[-1])) - offsets[row]]
    return Rows(rows, found - begin[row], offsets, np.full(count, block_size, np.int64))
