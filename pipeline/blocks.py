"""Rows to batches: what is predicted, from what, and what is counted.

A batch is copied straight out of the memory-mapped rows into one tensor. Training rows follow the
recipe's packing; held-out rows overlap by one token, so that every token that has a context is
predicted exactly once.
"""

import functools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from pipeline import artifact, packing
from pipeline.corpus import SPLITS
from pipeline.encoder import Encoder
from pipeline.packing import mixture
from pipeline.recipe import InputError
from pipeline.row_file import RowFile
from pipeline.sections import DataSection
from pipeline.stream import Stream
from pipeline.streaming import Ring
from pipeline.tokenizer import token_bytes

NO_LABEL = -100  # the id that PyTorch's cross-entropy ignores


class Rows(torch.utils.data.Dataset):
    """Rows of one split, handed out as finished batches.

    Attributes:
        tokens: length of the stream that the rows were cut from.
        bytes: UTF-8 bytes of its text.
        scored_tokens: those that have a context: all but the first, or, with `attend_across`
            false, all but the first of each document.
        scored_bytes: the bytes that those stand for.
        fingerprint: sha256 of the file, None in memory.
        is_stream: whether they are made while they are read, in an order of their own; then
            `tokens` and `bytes` are those of a sample.
    """

    def __init__(
        self,
        rows: RowFile | Ring,
        *,
        tokens: int,
        bytes: int,
        scored_tokens: int,
        scored_bytes: int,
        attend_across: bool = True,
        mixture: list[tuple[int, int, int]] | None = None,
        fingerprint: str | None = None,
        is_stream: bool = False,
    ) -> None:
        """Take rows; of a mixture, (first row, rows, rows taken) of each source.

        Of a source that is not needed whole, rows spread evenly over it are taken.
        """
        self._rows, self._mixture = rows, mixture
        self._length = len(rows) if mixture is None else sum(taken for _, _, taken in mixture)
        self.attend_across, self.fingerprint = attend_across, fingerprint
        self.is_stream = is_stream
        self.tokens, self.bytes = tokens, bytes
        self.scored_tokens, self.scored_bytes = scored_tokens, scored_bytes

    @classmethod
    def open(
        cls,
        folder: Path,
        split: str,
        *,
        attend_across: bool = True,
        mixture: list[tuple[int, int, int]] | None = None,
    ) -> "Rows":
        """Return a prepared split, memory-mapped."""
        manifest = artifact.read_manifest(folder)
        facts = manifest["facts"][split]
        # The first token of the stream, or of each document, has no context.
        first = min(facts["documents"], 1) if attend_across else facts["documents"]
        first_bytes = facts["first_token_bytes"] if attend_across else facts["first_tokens_bytes"]
        return cls(
            RowFile.open(folder / f"{split}.arrow"),
            tokens=facts["tokens"],
            bytes=facts["bytes"],
            scored_tokens=facts["tokens"] - first,
            scored_bytes=facts["bytes"] - first_bytes,
            attend_across=attend_across,
            mixture=mixture,
            fingerprint=manifest["files"][f"{split}.arrow"]["sha256"],
        )

    @classmethod
    def held_out(
        cls,
        texts: Iterable[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        block_size: int,
        attend_across: bool = True,
    ) -> "Rows":
        """Return rows over `texts` in memory, cut as those of a held-out split.

        Raises:
            InputError: fewer than two tokens, so that nothing can be predicted.
        """
        encoder = Encoder(tokenizer.backend_tokenizer.to_str()).open()
        end = np.array([tokenizer.eos_token_id], np.uint32)
        parts, starts, place, size = [], [], 0, 0
        for text in texts:
            if not text:
                continue
            parts += [encoder.encode([text])[0], end]
            starts.append(place)
            place += len(parts[-2]) + 1
            size += len(text.encode())
        ids = np.concatenate([*parts, end[:0]])
        lengths = token_bytes(tokenizer)
        firsts = ids[starts] if not attend_across else ids[:1]
        if place - len(firsts) < 1:
            raise InputError("the texts have no token to predict: give more than an empty text")
        chunks = [packing.Chunk(ids, np.array(starts, np.int64))]
        return cls(
            RowFile(list(packing.held_out(chunks, block_size, fill=tokenizer.eos_token_id))),
            tokens=place,
            bytes=size,
            scored_tokens=place - len(firsts),
            scored_bytes=size - int(lengths[firsts].sum()),
            attend_across=attend_across,
        )

    def part(self, tokens: int, tokenizer: PreTrainedTokenizerBase) -> "Rows":
        """Return rows spread evenly over a held-out split, in which about `tokens` are predicted.

        Its first rows would be its first documents, and speak for no others.
        """
        count = max(1, tokens // (self.block_size - 1))
        if count >= len(self):
            return self
        # Whole rows only: the last one may be filled up.
        wanted = np.linspace(0, len(self) - 2, count).round().astype(np.int64)
        found = [self._rows.row(int(index)) for index in wanted]
        rows = packing.Rows(
            np.stack([ids for ids, _, _ in found]),
            np.concatenate([starts for _, starts, _ in found]),
            np.cumsum([0, *(len(starts) for _, starts, _ in found)]),
            np.full(count, self.block_size, np.int64),
        )
        part = Rows(
            RowFile([rows]), tokens=rows.ids.size, bytes=0, scored_tokens=0, scored_bytes=0,
            attend_across=self.attend_across,
        )  # fmt: skip
        labels = part.__getitems__(list(range(count)))["labels"][:, 1:].numpy()
        part.scored_tokens = int((labels != NO_LABEL).sum())
        lengths = token_bytes(tokenizer)
        part.scored_bytes = int(lengths[labels[labels != NO_LABEL]].sum())
        part.bytes = int(lengths[rows.ids.ravel()].sum())
        return part

    def documents(self, indices: list[int], before: np.ndarray) -> np.ndarray:
        """Return the number of the document that each token belongs to, as `__getitems__` lies.

        Args:
            before: how many documents begin before each row (`RowFile.documents_before`).
        """
        begins = np.zeros((len(indices), self.block_size), np.int64)
        for place, index in enumerate(indices):
            begins[place, self._rows.row(self._place(index))[1]] = 1
        return np.maximum(0, before[indices, None] + begins.cumsum(1) - 1)

    def held_out_texts(
        self, tokenizer: PreTrainedTokenizerBase
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yield text and ids of each document of a held-out split, without its end-of-text."""
        parts: list[np.ndarray] = []
        for index in range(len(self)):
            ids, starts, used = self._rows.row(index)
            # The first token of every row but the first is the last one of the row before.
            begin = min(index, 1)
            for start in starts[starts >= begin].tolist():
                parts.append(ids[begin:start])
                if index or start:
                    yield _decoded(parts, tokenizer)
                parts, begin = [], start
            parts.append(ids[begin:used])
        if parts:
            yield _decoded(parts, tokenizer)

    @functools.cached_property
    def documents_before(self) -> np.ndarray:
        """How many documents begin before each row of a held-out split, and in all."""
        return self._rows.documents_before(self.block_size - 1)

    @property
    def block_size(self) -> int:
        """Tokens in a row."""
        return self._rows.block_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Return a batch: input_ids and labels, and with `attend_across` false position_ids.

        All are int64 [len(indices), block_size]. The label of what is filled up is -100; with
        `attend_across` false also that of a document's first token, which has no context. From
        position_ids that begin anew with each document follows the mask that keeps attention in it.
        """
        found = [self._rows.row(self._place(index)) for index in indices]
        ids = np.empty((len(indices), self.block_size), np.int64)
        for place, (row, _, _) in enumerate(found):
            ids[place] = row
        input_ids = torch.from_numpy(ids)
        labels = input_ids
        if any(used < self.block_size for _, _, used in found):
            labels = input_ids.clone()
            for place, (_, _, used) in enumerate(found):
                labels[place, used:] = NO_LABEL
        if self.attend_across:
            return {"input_ids": input_ids, "labels": labels}
        begins = np.zeros(ids.shape, np.int64)
        for place, (_, starts, _) in enumerate(found):
            begins[place, starts] = starts
        begin = torch.from_numpy(np.maximum.accumulate(begins, axis=1))
        labels = labels.masked_fill(torch.from_numpy(begins > 0), NO_LABEL)
        positions = torch.arange(self.block_size) - begin
        return {"input_ids": input_ids, "labels": labels, "position_ids": positions}

    def _place(self, index: int) -> int:
        if index < 0 or index >= self._length:
            raise IndexError(f"row {index} of {self._length}")
        for first, available, taken in self._mixture or ():
            if index < taken:
                return first + index * available // taken
            index -= taken
        return index


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
        self._rank, self._world_size, self._by_document = rank, world_size, by_document

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
            if self._by_document:
                found = rows.documents(indices, rows.documents_before)
                batch["documents"] = torch.from_numpy(found)
            yield batch


def _decoded(parts: list[np.ndarray], tokenizer: PreTrainedTokenizerBase) -> tuple[str, np.ndarray]:
    ids = np.concatenate(parts)
    ids = ids[:-1] if len(ids) and ids[-1] == tokenizer.eos_token_id else ids
    return tokenizer.backend_tokenizer.decode(ids.tolist(), skip_special_tokens=False), ids


def open_blocks(
    folder: Path,
    section: DataSection,
    *,
    stream: Stream | None = None,
    ring: Path | None = None,
    length: int = 0,
) -> dict[str, Rows]:
    """Return the rows of each prepared split; an empty one is absent.

    The training rows of a stream are the first `length` that come through `ring`.
    """
    facts = artifact.read_manifest(folder)["facts"]
    options = {"attend_across": section.attend_across}
    blocks = {s: Rows.open(folder, s, **options) for s in SPLITS if facts[s]["rows"]}
    if stream is not None:
        train = facts["train"]
        blocks["train"] = Rows(
            Ring(stream, ring, length=length), tokens=train["tokens"], bytes=train["bytes"],
            scored_tokens=0, scored_bytes=0, fingerprint=stream.identity, is_stream=True, **options,
        )  # fmt: skip
    elif section.is_weighted:
        mixed = mixture([source["rows"] for source in facts["sources"]], section)
        train = Rows.open(folder, "train", mixture=mixed, **options)
        share = len(train) / facts["train"]["rows"]
        train.tokens, train.bytes = round(train.tokens * share), round(train.bytes * share)
        blocks["train"] = train
    return blocks


def collate(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the batch as `Rows` made it.

    The label of an end-of-text is never masked: the model must learn to stop.
    """
    return batch
