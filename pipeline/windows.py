"""Texts to batches of windows in which a model scores every token once.

Each text by itself, in windows that slide over it, or all laid end to end as held-out text is in
training. A text may be larger than memory.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from pipeline import packing
from pipeline.blocks import NO_LABEL, Rows
from pipeline.held_out import document_numbers
from pipeline.marks import PREDICTED, bare
from pipeline.row_file import RowFile
from pipeline.text_pieces import TextPieces, WindowOptions

# Tokens whose windows are sorted by length together: few enough for memory, enough that batches of
# one length are full.
SORTED_TOGETHER = 1 << 18


class _Window(NamedTuple):
    ids: np.ndarray
    labels: np.ndarray
    """The same where a token is scored, else -100."""
    document: int


class TextBatches:
    """Batches of texts; every process reads all texts and yields its share of the batches.

    Attributes:
        pieces: what was counted of the texts, once the batches are read.
    """

    def __init__(
        self,
        texts: Iterable[str | Iterator[str]],
        tokenizer: PreTrainedTokenizerBase,
        options: WindowOptions,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        after_read: Callable[[int], object] = lambda size: None,
    ) -> None:
        """Take texts, see `TextPieces`.

        Args:
            batch_size: windows in a batch; of shorter ones as many as have as many tokens.
        """
        self.pieces = TextPieces(texts, tokenizer, options, after_read=after_read)
        self._options, self._end = options, tokenizer.eos_token_id
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        batches = self._of_all() if self._options.joined else self._of_each()
        for number, batch in enumerate(batches):
            if number % self._world_size == self._rank:
                yield batch()

    # -- each by itself ---------------------------------------------------------------------------

    def _of_each(self) -> Iterator[Callable[[], dict[str, torch.Tensor]]]:
        waiting: list[_Window] = []
        size = 0
        for window in self._slid():
            waiting.append(window)
            size += len(window.ids)
            if size >= SORTED_TOGETHER:
                yield from self._batched(waiting)
                waiting, size = [], 0
        yield from self._batched(waiting)

    def _slid(self) -> Iterator[_Window]:
        """Yield the windows of each text."""
        options = self._options
        block_size, stride = options.block_size, options.stride
        end = np.array([self._end], np.uint32)
        held, context, has_text = end[:0], 1, False
        for piece in self.pieces:
            if options.target == "completion":
                ids = bare(piece.ids).astype(np.int64)
                labels = np.where(piece.ids >= PREDICTED, ids, NO_LABEL)
                yield _Window(ids, labels, piece.document)
                continue
            if piece.begins:
                held, context, has_text = end[: int(options.start_token)], 1, False
            has_text = has_text or len(piece.ids) > 0
            held = np.concatenate([held, piece.ids])
            if piece.scored is not None:
                # A word that is longer than a window is scored in several.
                held = held[-max(block_size, piece.scored + 1) :]
                context = len(held) - piece.scored
            elif piece.ends and options.end_token and has_text and not piece.is_cut:
                held = np.append(held, end)
            while len(held) >= block_size:
                yield _window(held[:block_size], context, piece.document)
                held, context = held[stride:], block_size - stride
            if piece.ends and len(held) > context:
                yield _window(held, context, piece.document)

    def _batched(self, windows: list[_Window]) -> Iterator[Callable[[], dict[str, torch.Tensor]]]:
        """Yield batches of windows, longest first, so that little is filled up."""
        windows = sorted(windows, key=lambda window: -len(window.ids))
        rows = [[(window, 0)] for window in windows]
        if self._options.packed and windows:
            rows = _packed(windows, self._options.block_size)
        while rows:
            width = rows[0][-1][1] + len(rows[0][-1][0].ids)
            if self._options.packed:
                width = self._options.block_size
            count = max(1, self._batch_size * self._options.block_size // width)
            batch, rows = rows[:count], rows[count:]
            yield functools.partial(self._filled, batch, width)

    def _filled(self, rows: list[list[tuple[_Window, int]]], width: int) -> dict[str, torch.Tensor]:
        ids = np.full((len(rows), width), self._end, np.int64)
        labels = np.full(ids.shape, NO_LABEL, np.int64)
        documents, positions = np.zeros_like(ids), np.zeros_like(ids)
        for number, row in enumerate(rows):
            for window, column in row:
                here = slice(column, column + len(window.ids))
                ids[number, here], documents[number, here] = window.ids, window.document
                labels[number, here] = window.labels
                positions[number, here] = np.arange(len(window.ids))
        batch = {"input_ids": ids, "labels": labels, "documents": documents}
        if self._options.packed:
            # What is filled up begins anew at every column, so that it is nobody's context.
            batch["position_ids"] = positions
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    # -- laid end to end --------------------------------------------------------------------------

    def _of_all(self) -> Iterator[Callable[[], dict[str, torch.Tensor]]]:
        options = self._options
        numbers: list[int] = []  # of the texts that are not empty
        begun, is_first = 0, True
        for part in packing.windows(
            self._chunks(numbers), options.block_size, stride=options.stride, fill=self._end
        ):
            rows = Rows(
                RowFile([part]), tokens=0, bytes=0, scored_tokens=0, scored_bytes=0,
                attend_across=not options.apart,
            )  # fmt: skip
            before, known = begun + rows.documents_before(options.stride), np.array(numbers)
            for start in range(0, len(rows), self._batch_size):
                indices = range(start, min(start + self._batch_size, len(rows)))
                yield functools.partial(self._cut, rows, indices, before, known, is_first)
                is_first = False
            begun = int(before[-1])

    def _cut(
        self, rows: Rows, indices: range, before: np.ndarray, known: np.ndarray, is_first: bool
    ) -> dict[str, torch.Tensor]:
        batch = rows.__getitems__(list(indices))
        labels = batch["labels"].clone()
        labels[int(is_first) :, : self._options.block_size - self._options.stride] = NO_LABEL
        documents = known[document_numbers(rows, list(indices), before)]
        return batch | {"labels": labels, "documents": torch.from_numpy(documents)}

    def _chunks(self, numbers: list[int]) -> Iterator[packing.Chunk]:
        """Yield the ids of texts laid end to end; an empty text is none."""
        end = np.array([self._end], np.uint32)
        parts: list[np.ndarray] = []
        starts: list[int] = []
        size, is_open = 0, False
        for piece in self.pieces:
            if len(piece.ids) and not is_open:
                numbers.append(piece.document)
                starts.append(size)
                is_open = True
            parts.append(piece.ids)
            size += len(piece.ids)
            if piece.ends and is_open:
                parts.append(end)
                size, is_open = size + 1, False
            if size >= SORTED_TOGETHER:
                yield packing.Chunk(np.concatenate(parts), np.array(starts, np.int64))
                parts, starts, size = [], [], 0
        if size:
            yield packing.Chunk(np.concatenate(parts), np.array(starts, np.int64))


def _window(ids: np.ndarray, context: int, document: int) -> _Window:
    """Return a window whose first `context` tokens are not scored."""
    labels = ids.astype(np.int64)
    labels[:context] = NO_LABEL
    return _Window(ids, labels, document)


def _packed(windows: list[_Window], block_size: int) -> list[list[tuple[_Window, int]]]:
    """Return rows of windows and the columns in which they begin."""
    places, columns = packing.place(np.array([len(w.ids) for w in windows]), block_size)
    rows: list[list[tuple[_Window, int]]] = [[] for _ in range(int(places.max()) + 1)]
    for window, row, column in zip(windows, places.tolist(), columns.tolist(), strict=True):
        rows[row].append((window, column))
    return rows
