"""Documents to fixed-length rows of ids on disk, and rows to batches.

Documents, each followed by end-of-text, are laid end to end. The training stream is cut into rows
of `block_size`; only its last, partial row is lost. The held-out streams are cut into rows that
overlap by one token, the last one filled up and masked, so that every token after the first is
predicted exactly once. A split is one Arrow file of one record batch, 2 bytes a token (4 above
65,536 entries), memory-mapped: a batch is one slice of the file, not a list of Python rows.
"""

import collections
import contextlib
import logging
import math
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from pipeline import artifact
from pipeline.corpus import SPLITS, Corpus, Document
from pipeline.recipe import DataSection, InputError
from pipeline.tokenizer import text_encoder, token_bytes, tokenizer_fingerprint

logger = logging.getLogger(__name__)

COLUMN = "input_ids"
NO_LABEL = -100  # the id that PyTorch's cross-entropy ignores
CHARACTERS_PER_CALL = 1 << 20  # keeps every thread busy, and the progress bar moving


class Rows(torch.utils.data.Dataset):
    """The rows of one split, [rows, block_size], handed out as finished tensors.

    Attributes:
        tokens: length of the stream that the rows were cut from.
        bytes: UTF-8 bytes of its text.
        scored_bytes: the same without those of the first token, which has no context.
        fingerprint: sha256 of the file, None in memory.
    """

    def __init__(
        self,
        ids: np.ndarray,
        *,
        tokens: int,
        bytes: int,
        scored_bytes: int,
        fingerprint: str | None = None,
    ) -> None:
        self._ids = ids
        self.fingerprint = fingerprint
        self.tokens, self.bytes, self.scored_bytes = tokens, bytes, scored_bytes

    @classmethod
    def open(cls, folder: Path, split: str) -> "Rows":
        """Return a prepared split, memory-mapped."""
        manifest = artifact.read_manifest(folder)
        facts = manifest["facts"][split]
        column = datasets.Dataset.from_file(str(folder / f"{split}.arrow")).data.column(COLUMN)
        # One record batch per file (see `_write_arrow`), so this is a view and not a copy.
        ids = column.chunk(0).flatten().to_numpy().reshape(column.length(), -1)
        return cls(
            ids,
            tokens=facts["tokens"],
            bytes=facts["bytes"],
            scored_bytes=facts["scored_bytes"],
            fingerprint=manifest["files"][f"{split}.arrow"]["sha256"],
        )

    @classmethod
    def held_out(
        cls, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, block_size: int
    ) -> "Rows":
        """Return rows over `texts` in memory, cut as those of a held-out split.

        Raises:
            InputError: fewer than two tokens, so that nothing can be predicted.
        """
        encoder = text_encoder(tokenizer)
        stream: list[int] = []
        size = 0
        for text in texts:
            stream += [*_encode([text], encoder)[0], tokenizer.eos_token_id]
            size += len(text.encode())
        if len(stream) < 2:
            raise InputError("the texts have no token to predict: give more than an empty text")
        first = int(token_bytes(tokenizer)[stream[0]])
        ids = overlapping_rows(np.array(stream, np.int64), block_size, fill=tokenizer.eos_token_id)
        return cls(ids, tokens=len(stream), bytes=size, scored_bytes=size - first)

    def part(self, tokens: int, tokenizer: PreTrainedTokenizerBase) -> "Rows":
        """Return rows spread evenly over a held-out split, in which about `tokens` are predicted.

        Its first rows would be its first documents, and speak for no others.
        """
        count = max(1, tokens // (self.block_size - 1))
        if count >= len(self):
            return self
        # Whole rows only: the last one may be filled up.
        ids = self._ids[np.linspace(0, len(self) - 2, count).round().astype(np.int64)]
        scored = int(token_bytes(tokenizer)[ids[:, 1:]].sum())
        first = int(token_bytes(tokenizer)[ids[0, 0]])
        size = count * (self.block_size - 1) + 1
        return Rows(ids, tokens=size, bytes=scored + first, scored_bytes=scored)

    @property
    def block_size(self) -> int:
        """Tokens in a row."""
        return self._ids.shape[1]

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        """Return rows as int64 [len(indices), block_size]."""
        return torch.from_numpy(self._ids[indices].astype(np.int64))


class HeldOutBatches:
    """One process's batches of a held-out split; all processes together score each token once.

    Every batch has the same shape [batch_size, block_size] (a compiled model sees no other), and
    every process has the same number of batches; what is filled up is masked.
    """

    def __init__(self, rows: Rows, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.dataset = rows
        self.batch_size = batch_size
        self._rank, self._world_size = rank, world_size

    def __len__(self) -> int:
        return math.ceil(math.ceil(len(self.dataset) / self.batch_size) / self._world_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        rows = self.dataset
        for number in range(len(self)):
            start = (number * self._world_size + self._rank) * self.batch_size
            wanted = np.arange(start, start + self.batch_size)
            ids = rows.__getitems__(np.minimum(wanted, len(rows) - 1))
            # Row r holds the stream from r * (block_size - 1) on; a row beyond the last one has all
            # its predicted places beyond the stream.
            places = wanted[:, None] * (rows.block_size - 1) + np.arange(rows.block_size)
            beyond = places >= rows.tokens
            labels = ids.masked_fill(torch.from_numpy(beyond), NO_LABEL)
            yield {"input_ids": ids, "labels": labels}


def collate(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a training batch from finished rows [batch, block_size]: labels are the ids.

    No label is ever masked, end-of-text included: the model must learn to stop.
    """
    return {"input_ids": rows, "labels": rows}


def obtain_blocks(
    section: DataSection,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    num_proc: int = 1,
) -> dict[str, Rows]:
    """Return the rows of each split (an empty split is absent), prepared now if they are not yet.

    Raises:
        InputError: training text shorter than one row, an empty validation split, or a folder
            that holds rows made by another recipe.
    """
    made_from = {
        "corpus": corpus.identity,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "data": {"block_size": section.block_size},
    }
    if not artifact.reusable(folder, made_from):
        with artifact.staged(folder, made_from) as (staging, facts):
            facts |= _write_splits(corpus, tokenizer, staging, section.block_size, num_proc)
            _check_enough(facts, section)
        logger.info("%s", describe(folder))
    facts = artifact.read_manifest(folder)["facts"]
    return {split: Rows.open(folder, split) for split in SPLITS if facts[split]["rows"]}


def describe(folder: Path) -> str:
    """Return a table of what the folder's splits hold and what was left out."""
    facts = artifact.read_manifest(folder)["facts"]
    lines = [
        f"{'split':<12}{'documents':>10}{'bytes':>14}{'tokens':>13}{'rows':>10}{'left out':>10}"
    ]
    for split in SPLITS:
        f = facts[split]
        lines.append(
            f"{split:<12}{f['documents']:>10,}{f['bytes']:>14,}{f['tokens']:>13,}"
            f"{f['rows']:>10,}{f['left_out']:>10,}"
        )
    return "\n".join(lines)


def _write_splits(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    block_size: int,
    num_proc: int,
) -> dict[str, Any]:
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    end = np.array([tokenizer.eos_token_id], dtype)
    lengths = token_bytes(tokenizer)
    raw = {split: folder / f"{split}.raw" for split in SPLITS}
    counts = {split: {"documents": 0, "bytes": 0, "tokens": 0, "names": []} for split in SPLITS}
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(path.open("wb")) for split, path in raw.items()}
        bar = stack.enter_context(
            tqdm(
                desc="tokenising",
                total=corpus.size,
                unit="B",
                unit_scale=True,
                delay=2,
                disable=None,
            )  # fmt: skip
        )
        for documents, encodings in _encoded(corpus, text_encoder(tokenizer), num_proc):
            for document, ids in zip(documents, encodings, strict=True):
                size = len(document.text.encode())
                count = counts[document.split]
                count["documents"] += 1
                count["bytes"] += size
                count["tokens"] += len(ids) + 1
                if document.split != "train":
                    count["names"].append(document.name)
                # np.array raises where an id does not fit the type; astype would wrap around.
                np.array(ids, dtype).tofile(files[document.split])
                end.tofile(files[document.split])
                bar.update(size)
    for split, path in raw.items():
        count = counts[split]
        stream = np.memmap(path, dtype, mode="r") if count["tokens"] else np.empty(0, dtype)
        # The first token has no context and is never scored, so its bytes do not count either.
        count["scored_bytes"] = count["bytes"] - int(lengths[stream[:1]].sum())
        if split == "train":
            count["rows"] = len(stream) // block_size
            count["left_out"] = len(stream) - count["rows"] * block_size
            rows = stream[: count["rows"] * block_size].reshape(-1, block_size)
        else:
            count["rows"] = max(0, math.ceil((len(stream) - 1) / (block_size - 1)))
            count["left_out"] = 0
            rows = overlapping_rows(stream, block_size, fill=int(end[0]))
        _write_arrow(folder / f"{split}.arrow", rows)
        path.unlink()
    return counts


def overlapping_rows(stream: np.ndarray, block_size: int, *, fill: int) -> np.ndarray:
    """Return [rows, block_size]: row r holds the stream from r * (block_size - 1) on.

    Each token after the first is thus the label of exactly one position; the last row is filled
    up with `fill`.
    """
    count = max(0, math.ceil((len(stream) - 1) / (block_size - 1)))
    if count == 0:
        return np.empty((0, block_size), stream.dtype)
    padded = np.full(count * (block_size - 1) + 1, fill, stream.dtype)
    padded[: len(stream)] = stream
    return np.lib.stride_tricks.sliding_window_view(padded, block_size)[:: block_size - 1]


def _encoded(
    corpus: Corpus, encoder: Tokenizer, num_proc: int
) -> Iterator[tuple[list[Document], list[list[int]]]]:
    """Yield batches of documents with their ids, in the corpus's order for any `num_proc`."""
    if num_proc == 1:
        for documents in _batches(corpus):
            yield documents, _encode([d.text for d in documents], encoder)
        return
    # A forked worker shares the loaded libraries; elsewhere than on Linux forking is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(num_proc, context, _start_worker, (encoder,)) as pool:
        waiting: collections.deque = collections.deque()
        try:
            for documents in _batches(corpus):
                waiting.append((documents, pool.submit(_encode, [d.text for d in documents])))
                if len(waiting) > 2 * num_proc:  # bounded, however large the corpus
                    documents, task = waiting.popleft()
                    yield documents, task.result()
            for documents, task in waiting:
                yield documents, task.result()
        except BrokenProcessPool:
            raise InputError(
                "a process that tokenises died (out of memory?): use a smaller --num_proc"
            ) from None


def _batches(corpus: Corpus) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in corpus.documents():
        batch.append(document)
        size += len(document.text)
        if size >= CHARACTERS_PER_CALL:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_worker_encoder: Tokenizer | None = None


def _start_worker(encoder: Tokenizer) -> None:
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    _worker_encoder = encoder


def _encode(texts: list[str], encoder: Tokenizer | None = None) -> list[list[int]]:
    encoder = encoder or _worker_encoder
    return [e.ids for e in encoder.encode_batch_fast(texts, add_special_tokens=False)]


def _write_arrow(path: Path, rows: np.ndarray) -> None:
    """Write rows [n, block_size] as one record batch that `datasets.Dataset.from_file` opens."""
    block_size = rows.shape[1]
    feature = datasets.List(datasets.Value(str(rows.dtype)), length=block_size)
    flat = pa.array(np.ascontiguousarray(rows).reshape(-1))  # shares the memory
    column = pa.FixedSizeListArray.from_arrays(flat, block_size)
    schema = datasets.Features({COLUMN: feature}).arrow_schema
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        writer.write_batch(pa.record_batch([column.cast(schema.field(COLUMN).type)], schema=schema))


def _check_enough(facts: dict[str, Any], section: DataSection) -> None:
    if not facts["train"]["rows"]:
        raise InputError(
            f"the training text has {facts['train']['tokens']} tokens and a row needs "
            f"{section.block_size}: give more text in data.files or a smaller data.block_size"
        )
    if not facts["validation"]["rows"]:
        raise InputError(
            "no text is held out for validation "
            f"({facts['train']['documents']} documents, data.validation_fraction "
            f"{section.validation_fraction}): raise the fraction, give more documents, or set "
            "data.hold_out to tail"
        )
