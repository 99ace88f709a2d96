"""Ids that say whether they are predicted: examples encoded, cut to fit a row, taken apart.

The mark is the highest bit of a 32-bit id. The first token of an example has none: it has no
context. The last one is the end-of-text of its last completion, and has one.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.completions import Example
from pipeline.encoder import OpenEncoder
from pipeline.packing import Chunk

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.tokenizer import FolderTokenizer

PREDICTED = np.uint32(1 << 31)


class ExampleEncoder:
    """Encodes lists of examples, piece by piece: a prompt has the ids that it has when typed."""

    def __init__(self, encoder: OpenEncoder, end_of_text: int) -> None:
        self._encoder, self._end = encoder, np.array([end_of_text], np.uint32)

    def encode(self, examples: list[Example]) -> list[np.ndarray]:
        """Return the marked ids of each example, uint32, but for the end-of-text at its end.

        Before an empty prompt stands end-of-text, as at generation.
        """
        unknown = [example for example in examples if example.ids is None]
        encoded = iter(self._encoder.encode([p for example in unknown for p in example.pieces]))
        found = []
        for example in examples:
            if example.ids is not None:
                found.append(example.ids[:-1])
                continue
            parts: list[np.ndarray] = []
            for _ in range(0, len(example.pieces), 2):
                given, predicted = next(encoded), next(encoded)
                parts += [given if len(given) else self._end, predicted | PREDICTED]
                parts.append(self._end | PREDICTED)
            found.append(np.concatenate(parts[:-1]))
        return found


class Fitted(NamedTuple):
    """Examples that fit into a row each."""

    chunk: Chunk
    shortened: int
    """Examples that lost their beginning."""
    left_out: int
    """Examples whose last completion does not fit."""


def bare(ids: np.ndarray) -> np.ndarray:
    """Return ids without marks; what is not 32 bits wide has none."""
    return ids & ~PREDICTED if ids.dtype == np.uint32 else ids


def fitted(ids: np.ndarray, block_size: int) -> np.ndarray | None:
    """Return the end of an example that fits into a row, None if its last completion does not.

    The beginning is what is left out, as of a long prompt at generation. What is left of a
    completion that lost its own beginning is predicted no more.
    """
    if len(ids) <= block_size:
        return ids
    ids = ids[-block_size:].copy()
    given = np.flatnonzero(ids < PREDICTED)
    if not len(given):
        return None
    ids[: given[0]] &= ~PREDICTED
    return ids


def fit(chunk: Chunk, block_size: int) -> Fitted:
    """Cut every example of a chunk to a row, or leave it out."""
    lengths = np.diff(np.append(chunk.starts, len(chunk.ids)))
    if not (lengths > block_size).any():
        return Fitted(chunk, 0, 0)
    examples = [fitted(ids, block_size) for ids in np.split(chunk.ids, chunk.starts[1:])]
    kept = [ids for ids in examples if ids is not None]
    ids = np.concatenate([chunk.ids[:0], *kept])
    counts = np.array([len(ids) for ids in kept], np.int64)
    left_out = len(examples) - len(kept)
    shortened = int((lengths > block_size).sum()) - left_out
    return Fitted(Chunk(ids, np.cumsum(counts) - counts), shortened, left_out)


def runs(ids: np.ndarray) -> list[np.ndarray]:
    """Return the ids of an example, by turns what is given and what is predicted, marked still."""
    return np.split(ids, np.flatnonzero(np.diff(ids >= PREDICTED)) + 1)


def predicted_text(ids: np.ndarray, tokenizer: "PreTrainedTokenizerBase | FolderTokenizer") -> str:
    """Return the completions of an example, end to end."""
    return _text(ids[ids >= PREDICTED], tokenizer)


def decoded(
    ids: np.ndarray,
    tokenizer: "PreTrainedTokenizerBase | FolderTokenizer",
    *,
    keep_ids: bool = False,
) -> Example:
    """Return the example that marked ids stand for; with `keep_ids` it knows them."""
    pieces = [_text(part, tokenizer) for part in runs(ids)]
    return Example(pieces, ids if keep_ids else None)


def _text(ids: np.ndarray, tokenizer: "PreTrainedTokenizerBase | FolderTokenizer") -> str:
    # Whatever the text spells, a special token in it is one of ours.
    return tokenizer.backend_tokenizer.decode(bare(ids).tolist(), skip_special_tokens=True)
