"""Rows to batches: what is predicted, from what, and what is counted.

A batch is copied straight out of the memory-mapped rows into one tensor. Training rows follow the
recipe's packing; held-out rows overlap by one token, so that every token that has a context is
predicted exactly once.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from pipeline import artifact, packing
from pipeline.corpus import SPLITS
from pipeline.data_sections import DataSection
from pipeline.encoder import Encoder
from pipeline.marks import PREDICTED
from pipeline.packing import mixture
from pipeline.recipe import InputError
from pipeline.row_file import RowFile
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
        is_marked: whether they are of examples, whose ids say what is predicted (see `marks`); then
            that is what is scored.
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
        is_marked: bool = False,
        is_stream: bool = False,
    ) -> None:
        """Take rows; of a mixture, (first row, rows, rows taken) of each source.

        Of a source that is not needed whole, rows spread evenly over it are taken.
        """
        self._rows, self._mixture = rows, mixture
        self._length = len(rows) if mixture is None else sum(taken for _, _, taken in mixture)
        self.attend_across, self.fingerprint = attend_across, fingerprint
        self.is_marked, self.is_stream = is_marked, is_stream
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
        scored, scored_bytes = facts["tokens"] - first, facts["bytes"] - first_bytes
        if is_marked := "format" in manifest["made_from"]["data"]:
            scored, scored_bytes = facts["predicted_tokens"], facts["predicted_bytes"]
        return cls(
            RowFile.open(folder / f"{split}.arrow"),
            tokens=facts["tokens"],
            bytes=facts["bytes"],
            scored_tokens=scored,
            scored_bytes=scored_bytes,
            attend_across=attend_across,
            mixture=mixture,
            fingerprint=manifest["files"][f"{split}.arrow"]["sha256"],
            is_marked=is_marked,
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
        in_a_row = self.scored_tokens / len(self) if self.is_marked else self.block_size - 1
        count = max(1, int(tokens / in_a_row))
        if count >= len(self):
            return self
        # Whole rows only: the last one may be filled up (of examples, any).
        last = len(self) - (1 if self.is_marked else 2)
        wanted = np.linspace(0, last, count).round().astype(np.int64)
        found = [self._rows.row(int(index)) for index in wanted]
        rows = packing.Rows(
            np.stack([ids for ids, _, _ in found]),
            np.concatenate([starts for _, starts, _ in found]),
            np.cumsum([0, *(len(starts) for _, starts, _ in found)]),
            np.array([used for _, _, used in found], np.int64),
        )
        part = Rows(
            RowFile([rows]), tokens=int(rows.used.sum()), bytes=0, scored_tokens=0, scored_bytes=0,
            attend_across=self.attend_across, is_marked=self.is_marked,
        )  # fmt: skip
        batch = part.__getitems__(list(range(count)))
        labels = batch["labels"][:, 1:].numpy()
        part.scored_tokens = int((labels != NO_LABEL).sum())
        lengths = token_bytes(tokenizer)
        part.scored_bytes = int(lengths[labels[labels != NO_LABEL]].sum())
        part.bytes = int(lengths[batch["input_ids"].numpy()].sum())
        return part

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Return ids [block_size], columns in which documents begin, and how many ids are text."""
        return self._rows.row(self._place(index))

    def documents_before(self, stride: int) -> np.ndarray:
        """Return how many documents begin before each row, see `RowFile.documents_before`."""
        return self._rows.documents_before(stride)

    @property
    def overlap(self) -> int:
        """Tokens that a held-out row has in common with the row before it."""
        return 0 if self.is_marked else 1

    @property
    def bytes_per_token(self) -> float:
        """Bytes that a token stands for, of examples a predicted one."""
        if self.is_marked:
            return self.scored_bytes / self.scored_tokens
        return self.bytes / self.tokens

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
        `attend_across` false also that of a document's first token, which has no context; of
        examples that of all that is not predicted. From position_ids that begin anew with each
        document follows the mask that keeps attention in it.
        """
        found = [self.row(index) for index in indices]
        ids = np.empty((len(indices), self.block_size), np.int64)
        for place, (row, _, _) in enumerate(found):
            ids[place] = row
        if self.is_marked:
            predicted, ids = ids >= PREDICTED, ids & ~PREDICTED
        input_ids = torch.from_numpy(ids)
        labels = input_ids
        if self.is_marked:
            labels = input_ids.masked_fill(torch.from_numpy(~predicted), NO_LABEL)
        elif any(used < self.block_size for _, _, used in found):
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
