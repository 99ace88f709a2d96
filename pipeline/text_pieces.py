"""Texts to stretches of ids, read and encoded as they come, with what is counted on the way."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.completions import Example
from pipeline.encoder import Encoder
from pipeline.marks import PREDICTED, ExampleEncoder, fitted, predicted_text
from pipeline.recipe import InputError
from pipeline.text_files import safe_windows
from pipeline.tokenizer import token_bytes

# Characters that are encoded together.
ENCODED_TOGETHER = 1 << 20


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
    target: Literal["all", "last_word", "completion"] = "all"
    """last_word: only the tokens of each text's last word are scored; completion: texts are
    examples, of which that alone is."""
    prepare: Callable[[str], str] | None = None
    """What is done to a whole text before it is encoded; bytes and words stay those before."""


class Piece(NamedTuple):
    """A stretch of one text, encoded."""

    document: int
    ids: np.ndarray
    """With target completion marked, see `marks`."""
    begins: bool
    ends: bool
    is_cut: bool = False
    """Whether the rest of the text is left out."""
    scored: int | None = None
    """Of its last tokens, with target last_word."""


class TextPieces:
    """Pieces of texts, in order; read once, and only when done it knows what it has counted.

    Attributes:
        bytes: UTF-8 bytes of each text's scored tokens.
        words: white-space separated words of which at least a part is scored, of each text.
        truncated: texts that were cut at `max_length`, or of which, with target last_word or
            completion, the beginning does not fit into the window.
    """

    def __init__(
        self,
        texts: Iterable[str | Iterator[str]],
        tokenizer: PreTrainedTokenizerBase,
        options: WindowOptions,
        *,
        after_read: Callable[[int], object] = lambda size: None,
    ) -> None:
        """Take texts, whole or in pieces that tokenise as the whole does.

        `after_read` is told the bytes of each piece of text that was read.
        """
        self.bytes: list[int] = []
        self.words: list[int] = []
        self.truncated = 0
        self._texts, self._options, self._after_read = texts, options, after_read
        self._tokenizer = tokenizer
        self._encoder = Encoder(tokenizer.backend_tokenizer.to_str()).open()
        self._lengths = token_bytes(tokenizer)
        self._length = 0  # tokens of the text that is being read
        self._has_begun = self._has_any = False  # whether it, or any text, has a token yet

    def __iter__(self) -> Iterator[Piece]:
        waiting: list[tuple[int, str, bool, bool]] = []
        size = 0
        for document, text in enumerate(self._texts):
            self.bytes.append(0)
            self.words.append(0)
            if self._options.target == "completion":  # whole by nature
                text = iter([text]) if isinstance(text, str) else text
            elif isinstance(text, str):
                text = safe_windows(iter([text]), f"text {document}")
            if self._options.prepare or self._options.target == "last_word":  # wanted whole
                text = iter(["".join(text)])
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

    def _encoded(self, parts: list[tuple[int, str, bool, bool]]) -> Iterator[Piece]:
        options = self._options
        prepare = options.prepare or (lambda text: text)
        if options.target == "completion":
            yield from self._examples([part[0] for part in parts], [part[1] for part in parts])
            return
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
            yield Piece(document, ids, begins, ends, is_cut)

    def _examples(self, documents: list[int], examples: list[Example]) -> Iterator[Piece]:
        if not all(isinstance(example, Example) for example in examples):
            raise InputError("target completion: the texts have to be examples, see `completions`")
        end = self._tokenizer.eos_token_id
        encoded = ExampleEncoder(self._encoder, end).encode(examples)
        for document, example, ids in zip(documents, examples, encoded, strict=True):
            self._after_read(len(example.encode()))
            whole = np.append(ids, np.uint32(end) | PREDICTED)
            found = fitted(whole, self._options.block_size)
            if found is not None:
                self.truncated += found is not whole
                content = predicted_text(found, self._tokenizer)
                self.bytes[document] = len(content.encode())
                self.words[document] = len(content.split())
                yield Piece(document, found, True, True)

    def _last_words(self, texts: list[tuple[int, str]]) -> Iterator[Piece]:
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
                yield Piece(document, all_ids, True, True, scored=len(ids))

    def _lacks_context(self) -> bool:
        """Whether the first token of the text that begins now is not scored."""
        if self._options.joined:
            return self._options.apart or not self._has_any
        return not self._options.start_token
