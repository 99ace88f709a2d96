"""Which documents of the shards become rows, and their ids with what was cut out."""

from __future__ import annotations

import json
import logging
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from pipeline import cleaning, file_search, packing, raw_documents, sources, text_files
from pipeline.cleaning import Kept
from pipeline.corpus import SPLITS, Corpus
from pipeline.data_sections import CleaningSection, DataSection, SourceSection
from pipeline.encoder import Encoder
from pipeline.marks import bare
from pipeline.row_tables import COUNTED
from pipeline.token_shards import TokenShard
from pipeline.tokenizer import FolderTokenizer, token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Texts(NamedTuple):
    """What rows are made from and with."""

    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase | FolderTokenizer
    section: DataSection
    cleaning: CleaningSection


def dtype_of(texts: Texts) -> str:
    """Return the type of an id on disk; of examples it has room for a mark."""
    is_narrow = len(texts.tokenizer) <= 1 << 16 and texts.section.example_format is None
    return "uint16" if is_narrow else "uint32"


def select(texts: Texts, shards: list[TokenShard]) -> tuple[list[Kept], list[dict[str, int]]]:
    """Return what stays of each shard, and for each source what was counted.

    Raises:
        InputError: a document is on two sides of the split, and nothing is to be dropped.
    """
    rules = texts.cleaning
    counts = [dict.fromkeys(COUNTED, 0) for _ in texts.corpus.source_names()]
    for shard in shards:
        for name in ("empty", "short", "long"):
            counts[shard.group][name] += shard.facts[name]
    keep = [np.ones(len(shard.table), bool) for shard in shards]
    if any(texts.section.has_own(split) for split in SPLITS[1:]):
        for number, copies in enumerate(
            cleaning.held_out_copies(shards, len(texts.section.all_sources))
        ):
            if copies.any() and rules.decontaminate is None:
                raise cleaning.on_two_sides(shards[number].names(np.flatnonzero(copies)[:1])[0])
            keep[number] &= ~copies
            counts[shards[number].group]["dropped"] += int(copies.sum())
    if rules.deduplicate:
        left = cleaning.without_copies(shards, keep)
        for shard, before, after in zip(shards, keep, left, strict=True):
            counts[shard.group]["copies"] += int((before & ~after).sum())
        keep = left
    none = np.empty((0, 2), np.int64)
    if rules.decontaminate in (None, "copies"):
        return [Kept(k, none, 0) for k in keep], counts
    n_grams = cleaning.NGrams(_forbidden(texts, shards, keep))
    if n_grams.too_short:
        logger.info(
            "%s held-out or benchmark documents are shorter than %d tokens: what shares them stays",
            f"{n_grams.too_short:,}", cleaning.N_GRAM,
        )  # fmt: skip
    kept = []
    with tqdm(desc="comparing", total=len(shards), unit="shard", delay=2, disable=None) as bar:
        for shard, mask in zip(shards, keep, strict=True):
            is_cut = rules.decontaminate == "cut"
            kept.append(
                cleaning.decontaminated(shard, n_grams, mask, dtype=dtype_of(texts), cut=is_cut)
            )
            counts[shard.group]["cut" if is_cut else "dropped"] += kept[-1].contaminated
            bar.update()
    return kept, counts


def benchmarks(texts: Texts) -> SourceSection | None:
    """Return the files that the training text must share nothing with, as a source."""
    if not texts.cleaning.benchmark_files:
        return None
    first = texts.section.all_sources[0]
    return SourceSection(
        files=texts.cleaning.benchmark_files, text_column=first.text_column, errors=first.errors
    )


def chunks_of(texts: Texts, shard: TokenShard, kept: Kept, split: str) -> Iterator[packing.Chunk]:
    """Yield what stays of a shard's documents of one split, a few whole ones at a time."""
    table, end = shard.table, texts.tokenizer.eos_token_id
    wanted = kept.documents & (table["split"] == SPLITS.index(split))
    if not wanted.any():
        return
    ids, begins = shard.tokens(dtype_of(texts)), np.cumsum(table["tokens"]) - table["tokens"]
    for first, stop in cleaning.batches_of_documents(table["tokens"]):
        chosen, lengths = wanted[first:stop], table["tokens"][first:stop]
        if not chosen.any():
            continue
        begin = int(begins[first])
        finish = begin + int(lengths.sum())
        spans = kept.spans[(kept.spans[:, 0] >= begin) & (kept.spans[:, 0] < finish)] - begin
        part = ids[begin:finish]
        if not chosen.all():
            part = part[np.repeat(chosen, lengths)]
        size = int(table["bytes"][first:stop][chosen].sum())
        chunk = packing.Chunk(np.asarray(part), np.cumsum(lengths[chosen]) - lengths[chosen], size)
        if len(spans):
            # Places among all tokens of the stretch -> places among those that were chosen.
            left_out = np.append(0, np.cumsum(np.where(chosen, 0, lengths)))
            document = np.searchsorted(begins[first:stop] - begin, spans[:, 0], side="right") - 1
            spans, document = spans[chosen[document]], document[chosen[document]]
            chunk = _without(chunk, spans - left_out[document][:, None], end)
            chunk = chunk._replace(bytes=int(token_bytes(texts.tokenizer)[chunk.ids].sum()))
        yield chunk


def _forbidden(
    texts: Texts, shards: list[TokenShard], keep: list[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the ids and the document lengths of held-out text and benchmarks."""
    for shard, mask in zip(shards, keep, strict=True):
        for split in SPLITS[1:]:
            for chunk in chunks_of(texts, shard, Kept(mask, np.empty((0, 2), np.int64), 0), split):
                yield bare(chunk.ids), np.diff(np.append(chunk.starts, len(chunk.ids)))
    source = benchmarks(texts)
    encoder = Encoder(texts.tokenizer.backend_tokenizer.to_str()).open()
    if source is not None:
        files = file_search.find_files(source)
        for shard in sources.shards_of(0, source, files, total_bytes=0):
            for document in raw_documents.read_shard(shard, source):
                parts = [np.empty(0, np.uint32)]
                for window in text_files.safe_windows(document.read(), document.name):
                    if texts.cleaning.normalization is not None:
                        window = unicodedata.normalize(texts.cleaning.normalization, window)
                    parts += encoder.encode([window])
                ids = np.append(np.concatenate(parts), np.uint32(texts.tokenizer.eos_token_id))
                yield ids, np.array([len(ids)])


def _without(chunk: packing.Chunk, spans: np.ndarray, end: int) -> packing.Chunk:
    """Cut stretches out: what stood before one ends there, what stood after begins anew."""
    ids, stays = chunk.ids.copy(), np.ones(len(chunk.ids), bool)
    for begin, stop in spans.tolist():
        ids[begin] = end
        stays[begin + 1 : stop] = False
    starts = np.union1d(chunk.starts, spans[:, 1])
    counts = np.add.reduceat(stays.astype(np.int64), starts)
    # What is left of a document may be nothing but its end.
    stays[np.repeat(counts == 1, np.diff(np.append(starts, len(ids))))] = False
    counts = counts[counts > 1]
    return packing.Chunk(ids[stays], np.cumsum(counts) - counts)


def write_names(folder: Path, split: str, names: list[str]) -> None:
    """Put on record which documents are held out."""
    with (folder / f"{split}_documents.jsonl").open("a") as file:
        file.writelines(json.dumps(name) + "\n" for name in names)
