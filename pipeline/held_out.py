"""Held-out rows to batches that score every token once, and back to the documents they hold."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from pipeline.blocks import NO_LABEL, Rows
from pipeline.marks import predicted_text
from pipeline.tokenizer import token_bytes


class HeldOutBatches:
    """One process's batches of a held-out split; all processes together score each token once.

    Every batch has the same shape [batch_size, block_size] (a compiled model sees no other), and
    every process has the same number of batches; what is filled up is masked.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        by_document: bool = False,
    ) -> None:
        """With `by_document` a batch says for each token which document it belongs to."""
        self.dataset = rows
        self.batch_size = batch_size
        self._rank, self._world_size = rank, world_size
        self._before = (
            rows.documents_before(rows.block_size - rows.overlap) if by_document else None
        )

    def __len__(self) -> int:
        return math.ceil(math.ceil(len(self.dataset) / self.batch_size) / self._world_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        rows = self.dataset
        for number in range(len(self)):
            start = (number * self._world_size + self._rank) * self.batch_size
            wanted = np.arange(start, start + self.batch_size)
            indices = np.minimum(wanted, len(rows) - 1).tolist()
            batch = rows.__getitems__(indices)
            beyond = torch.from_numpy(wanted >= len(rows))[:, None]
            batch["labels"] = batch["labels"].masked_fill(beyond, NO_LABEL)
            if self._before is not None:
                found = document_numbers(rows, indices, self._before)
                batch["documents"] = torch.from_numpy(found)
            yield batch


def document_numbers(rows: Rows, indices: list[int], before: np.ndarray) -> np.ndarray:
    """Return which document each token of some rows belongs to, int64 [len(indices), block_size].

    Args:
        before: how many documents begin before each row (`Rows.documents_before`).
    """
    begins = np.zeros((len(indices), rows.block_size), np.int64)
    for place, index in enumerate(indices):
        begins[place, rows.row(index)[1]] = 1
    return np.maximum(0, before[indices, None] + begins.cumsum(1) - 1)


def held_out_texts(
    rows: Rows, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield text and ids of each document of a held-out split, without its end-of-text."""
    for ids in held_out_ids(rows):
        ids = ids[:-1] if len(ids) and ids[-1] == tokenizer.eos_token_id else ids
        text = tokenizer.backend_tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        yield text, ids


def held_out_ids(rows: Rows) -> Iterator[np.ndarray]:
    """Yield the ids of each document of a held-out split; those of examples are marked."""
    parts: list[np.ndarray] = []
    for index in range(len(rows)):
        ids, starts, used = rows.row(index)
        # The first token of a row after the first may be the last one of the row before.
        begin = min(index, rows.overlap)
        for start in starts[starts >= begin].tolist():
            parts.append(ids[begin:start])
            if index or start:
                yield np.concatenate(parts)
            parts, begin = [], start
        parts.append(ids[begin:used])
    if parts:
        yield np.concatenate(parts)


def scored_texts(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Iterator[bytes]:
    """Yield what is scored of each document of a held-out split: of examples the completions."""
    if rows.is_marked:
        for ids in held_out_ids(rows):
            yield predicted_text(ids, tokenizer).encode()
        return
    lengths = token_bytes(tokenizer)
    for number, (text, ids) in enumerate(held_out_texts(rows, tokenizer)):
        is_without_context = number == 0 or not rows.attend_across
        yield text.encode()[int(lengths[ids[: int(is_without_context)]].sum()) :]
