"""Texts to batches of windows in which a model scores every token once.

Each text by itself, in windows that slide over it, or all laid end to end as held-out text is in
training. Texts are read and encoded as they come: one may be larger than memory.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from pipeline import packing
from pipeline.blocks import NO_LABEL, Rows
from pipeline.encoder import Encoder
from pipeline.held_out import document_numbers
from pipeline.row_file import RowFile
from pipeline.text_files import safe_windows
from pipeline.tokenizer import token_bytes

# Characters that are encoded together, and tokens whose windows are sorted by length together: few
# enough for memory, enough that batches of one length are full.
ENCODED_TOGETHER, SORTED_TOGETHER = 1 << 20, 1 << 18


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """How texts become windows."""

    block_size: int
    """Tokens in a window."""
    stride: int
    """Tokens from the start of one window to that of the next, below block_size: the first token
    of every window is context only."""
    joined: bool = False
    """Lay the texts end to end, end-of-text after each, and slide over them as one; else each is
    by itself."""
    apart: bool = False
    """joined only: attention and positions are kept within each text."""
    start_token: bool = False
    """End-of-text stands before each text as a context for its first token (not joined)."""
    end_token: bool = False
    """The end-of-text after each text is predicted, too (when joined it always is)."""
    packed: bool = False
    """Several windows share a row, attention kept within each, instead of being filled up."""
    max_length: int | None = None
    """Tokens of a text, the start token included, after which the rest is left out; of a text that
    is cut no end is predicted."""
    target: Literal["all", "last_word"] = "all"
    """last_word: only the tokens of each text's last word are scored."""
    prepare: Callable[[str], str] | None = None
    """What is done to a whole text before it is encoded; bytes and words stay those before."""


class _Window(NamedTuple):
    ids: np.ndarray
    context: int
    """Tokens at its beginning that are not scored."""
    document: int


class _Piece(NamedTuple):
    """A stretch of one text, encoded."""

    document: int
    ids: np.ndarray
    begins: bool
    ends: bool
    is_cut: bool = False
    """Whether the rest of the text is left out."""
    scored: int | None = None
    """Of its last tokens, with target last_word."""


class TextBatches:
    """Batches of texts; read once, and only when done it knows what it has counted.

    Every process reads all texts and yields its share of the batches.

    Attributes:
        bytes: UTF-8 bytes of each text's scored tokens.
        words: white-space separated words of which at least a part is scored, of each text.
        truncated: texts that were cut at `max_length`, or of which, with target last_word, the
            beginning does not fit into the window.
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
        """Take texts, whole or in pieces that tokenise as the whole does.

        Args:
            batch_size: windows in a batch; of shorter ones as many as have as many tokens.
            after_read: is told the bytes of each piece of text that was read.
        """
        self.bytes: list[int] = []
        self.words: list[int] = []
        self.truncated = 0
        self._texts, self._options, self._after_read = texts, options, after_read
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._encoder = Encoder(tokenizer.backend_tokenizer.to_str()).open()
        self._end, self._lengths = tokenizer.eos_token_id, token_bytes(tokenizer)
        self._length = 0  # tokens of the text that is being read
        self._has_begun = self._has_any = False  # whether it, or any text, has a token yet

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        batches = self._of_all() if self._options.joined else self._of_each()
        for number, batch in enumerate(batches):
            if number % self._world_size == self._rank:
                yield batch()

    # -- texts to ids -----------------------------------------------------------------------------

    def _pieces(self) -> Iterator[_Piece]:
        waiting: list[tuple[int, str, bool, bool]] = []
        size = 0
        for document, text in enumerate(self._texts):
            self.bytes.append(0)
            self.words.append(0)
            options = self._options
            if not isinstance(text, str) and (options.prepare or options.target == "last_word"):
                text = "".join(text)
            if isinstance(text, str):
                is_long = len(text) > ENCODED_TOGETHER
                text = safe_windows(iter([text]), f"text {document}") if is_long else iter([text])
            parts = text
            part, begins = next(parts, ""), True
            while part is not None:
                following = next(parts, None)
                waiting.append((document, part, begins, following is None))
                size += len(part)
                part, begins = following, False
                if size >= ENCODED_TOGETHER:
                    yield from self._encoded(waiting)
                    waiting, size = [], 0
        yield from self._encoded(waiting)

    def _encoded(self, parts: list[tuple[int, str, bool, bool]]) -> Iterator[_Piece]:
        options = self._options
        prepare = options.prepare or (lambda text: text)
        if options.target == "last_word":
            yield from self._last_words([(part[0], prepare(part[1])) for part in parts])
            return
        found = self._encoder.encode([prepare(part[1]) for part in parts])
        for (document, text, begins, ends), ids in zip(parts, found, strict=True):
            content, is_cut = text.encode(), False
            self._after_read(len(content))
            if begins:
                self._length, self._has_begun = int(options.start_token), False
            if options.max_length is not None:
                before = self._length
                self._length += len(ids)
                if is_cut := self._length > options.max_length:
                    self.truncated += before <= options.max_length
                    ids = ids[: max(0, options.max_length - before)]
                    content = content[: int(self._lengths[ids].sum())]
            if len(ids) and not self._has_begun:
                if self._lacks_context():
                    content = content[int(self._lengths[ids[0]]) :]
                self._has_begun = self._has_any = True
            self.bytes[document] += len(content)
            self.words[document] += len(content.decode(errors="replace").split())
            yield _Piece(document, ids, begins, ends, is_cut)

    def _last_words(self, texts: list[tuple[int, str]]) -> Iterator[_Piece]:
        bare = [text.rstrip() for _, text in texts]
        cuts = [len(text) - len((text.split() or [""])[-1]) for text in bare]
        # The space before a word is a part of its first token.
        cuts = [c - (t[c - 1 : c] == " ") for t, c in zip(bare, cuts, strict=True)]
        words = [text[cut:] for text, cut in zip(bare, cuts, strict=True)]
        before = self._encoder.encode([t[:cut] for t, cut in zip(bare, cuts, strict=True)])
        for (document, text), word, context, ids in zip(
            texts, words, before, self._encoder.encode(words), strict=True
        ):
            self._after_read(len(text.encode()))
            if len(ids) and (len(context) or self._options.start_token):
                self.bytes[document], self.words[document] = len(word.encode()), 1
                all_ids = np.append(context, ids)
                self.truncated += (
                    len(all_ids) + self._options.start_token > self._options.block_size
                )
                yield _Piece(document, all_ids, True, True, scored=len(ids))

    def _lacks_context(self) -> bool:
        """Whether the first token of the text that begins now is not scored."""
        if self._options.joined:
            return self._options.apart or not self._has_any
        return not self._options.start_token

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
        for piece in self._pieces():
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
                yield _Window(held[:block_size], context, piece.document)
                held, context = held[stride:], block_size - stride
            if piece.ends and len(held) > context:
                yield _Window(held, context, piece.document)

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
                labels[number, column + window.context : here.stop] = window.ids[window.context :]
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
        for piece in self._pieces():
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


def _packed(windows: list[_Window], block_size: int) -> list[list[tuple[_Window, int]]]:
    """Return rows of windows and the columns in which they begin."""
    places, columns = packing.place(np.array([len(w.ids) for w in windows]), block_size)
    rows: list[list[tuple[_Window, int]]] = [[] for _ in range(int(places.max()) + 1)]
    for window, row, column in zip(windows, places.tolist(), columns.tolist(), strict=True):
        rows[row].append((window, column))
    return rows
