"""Endless text as rows, from any bookmark on.

Each source is read again and again, its shards in an order that follows from seed and pass. A
bookmark (pass, shard, document, tokens already used) is where a row begins; from it the rows that
follow are made again, to the token.
"""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pipeline import packing
from pipeline.cleaning import on_two_sides
from pipeline.corpus import Document
from pipeline.raw_documents import Shard
from pipeline.recipe import InputError
from pipeline.row_order import permuted
from pipeline.token_shards import Work

CHARACTERS_AT_ONCE = 1 << 18
GOLDEN_RATIO = (5**0.5 - 1) / 2


class Stream(NamedTuple):
    """Everything that decides the rows; it can be sent to another process."""

    work: Work
    shards: list[list[Shard]]
    """Of each source."""
    weights: list[float]
    block_size: int
    rows_per_segment: int
    seed: int
    identity: str
    held_out: frozenset[bytes] = frozenset()
    """First 16 bytes of the sha256 of documents that were given as held-out text."""

    def rows_of(self, segment: int) -> list[int]:
        """Return how many rows of a segment each source gives.

        Row n comes from the source in whose share of [0, 1) the fraction of n golden ratios lies:
        over any number of rows the shares are those of the weights, as evenly as can be.
        """
        places = np.arange(self.rows_per_segment) + segment * self.rows_per_segment
        shares = np.cumsum(self.weights) / sum(self.weights)
        source = np.searchsorted(shares[:-1], places * GOLDEN_RATIO % 1, side="right")
        return np.bincount(source, minlength=len(self.weights)).tolist()


class Source:
    """The rows of one source from a bookmark on."""

    def __init__(self, stream: Stream, number: int, bookmark: dict[str, int]) -> None:
        self._stream, self._number = stream, number
        self._encoder = stream.work.encoder.open()
        self._pieces = self._encoded(bookmark["pass"], bookmark["shard"], bookmark["document"])
        self._ids = np.empty(0, stream.work.dtype)
        self._starts = np.empty(0, np.int64)
        # (place in self._ids, bookmark) of the documents in it, the first one begun before it.
        self._documents: deque[tuple[int, dict[str, int]]] = deque()
        self._skip(bookmark["token"])

    def take(self, rows: int) -> packing.Rows:
        """Return the next rows."""
        size = self._stream.block_size
        need = rows * size
        self._fill(need)
        taken = packing.cut(self._ids, self._starts, size, size, rows)
        self._drop(need)
        return taken

    def bookmark(self) -> dict[str, int]:
        """Return where the next row begins."""
        self._fill(1)
        place, mark = self._documents[0]
        return {**mark, "token": -place}

    def _skip(self, tokens: int) -> None:
        self._fill(tokens + 1)
        self._drop(tokens)

    def _drop(self, count: int) -> None:
        self._ids = self._ids[count:]
        self._starts = self._starts[self._starts >= count] - count
        self._documents = deque((place - count, mark) for place, mark in self._documents)
        while len(self._documents) > 1 and self._documents[1][0] <= 0:
            self._documents.popleft()

    def _fill(self, need: int) -> None:
        parts, size = [self._ids], len(self._ids)
        starts = [self._starts]
        while size < need:
            ids, begins = next(self._pieces)
            starts.append(np.array([place + size for place, _ in begins], np.int64))
            self._documents += [(place + size, mark) for place, mark in begins]
            parts.append(ids)
            size += len(ids)
        if len(parts) > 1:
            self._ids, self._starts = np.concatenate(parts), np.concatenate(starts)

    def _encoded(
        self, number: int, shard: int, document: int
    ) -> Iterator[tuple[np.ndarray, list[tuple[int, dict[str, int]]]]]:
        """Yield stretches of ids with the places and bookmarks of the documents in them."""
        end = np.array([self._stream.work.end_of_text], np.uint32)
        texts: list[tuple[str, dict[str, int] | None, bool]] = []
        size = 0
        for text, mark, is_last in self._windows(number, shard, document):
            texts.append((text, mark, is_last))
            size += len(text)
            if size < CHARACTERS_AT_ONCE:
                continue
            ids, begins, place = [], [], 0
            encoded = self._encoder.encode([text for text, _, _ in texts])
            for part, (_, begun, last) in zip(encoded, texts, strict=True):
                if begun is not None:
                    begins.append((place, begun))
                ids += [part, end] if last else [part]
                place += len(part) + last
            yield np.concatenate(ids).astype(self._stream.work.dtype), begins
            texts, size = [], 0

    def _windows(
        self, number: int, shard: int, document: int
    ) -> Iterator[tuple[str, dict[str, int] | None, bool]]:
        """Yield windows of training text, with a bookmark where a document begins, for ever."""
        shards = self._stream.shards[self._number]
        while True:
            order = permuted(np.arange(len(shards)), len(shards), self._stream.seed, number)
            found = False
            for place in range(shard, len(shards)):
                documents = self._stream.work.reader.documents(shards[order[place]])
                for count, one in enumerate(documents):
                    if count < document or not self._is_wanted(one):
                        continue
                    found = True
                    mark = {"pass": number, "shard": place, "document": count}
                    windows = one.read()
                    text = next(windows)
                    for following in windows:
                        yield text, mark, False
                        text, mark = following, None
                    yield text, mark, True
                document = 0
            if not found and shard == 0:
                raise InputError("the stream has no training text: check data.files and cleaning")
            number, shard = number + 1, 0

    def _is_wanted(self, document: Document) -> bool:
        rules = self._stream.work.reader.cleaning
        if not document.is_within(rules):
            return False
        if self._stream.held_out and document.digest[:16] in self._stream.held_out:
            if rules.decontaminate is None:
                raise on_two_sides(document.name)
            return False
        return document.split == "train"
