"""From text to rows on disk: encode the shards, leave out what the recipe leaves out, pack, count.

Encoding is done shard by shard, in parallel, and kept; the rest is a quick pass over ids. What the
rows hold follows from the recipe and the text alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from pipeline import artifact, cleaning, file_search, locks, marks, packing
from pipeline.cleaning import Kept
from pipeline.corpus import SPLITS, Corpus
from pipeline.data_sections import CleaningSection, DataSection
from pipeline.encoder import Encoder, choose_encoder
from pipeline.recipe import InputError
from pipeline.row_file import RowWriter
from pipeline.row_tables import check_enough, check_mixture, describe
from pipeline.selection import Texts, benchmarks, chunks_of, dtype_of, select, write_names
from pipeline.stream import Stream
from pipeline.stream_beginning import GIVEN, prepare_held_out
from pipeline.streaming import TOKENS_PER_SEGMENT
from pipeline.token_shards import TokenShard, Work, make_token_shards
from pipeline.tokenizer import FolderTokenizer, token_bytes, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# The fast encoder is compared with `tokenizers` on that much of the corpus: a fifth of a second.
SAMPLED_SHARDS, SAMPLED_CHARACTERS = 32, 16_000
# What is counted of examples besides: those that lost their beginning, or do not fit into a row.
EXAMPLE_COUNTS = ("predicted_tokens", "predicted_bytes", "shortened", "too_long", "left_out")


def prepare_blocks(
    section: DataSection,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase | FolderTokenizer,
    folder: Path,
    *,
    cleaning: CleaningSection | None = None,
    num_proc: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Have the rows of each split in `folder`, written now if they are not there yet.

    `num_proc` processes encode (default: one for each core if that pays). Several machines share
    the work with a `rank` each; all but the first return when their shards are done.

    Raises:
        InputError: training text shorter than one row, an empty validation split, a folder that
            holds rows made by another recipe or is being written, text on two sides, a full disk,
            and what reading the corpus raises.
    """
    texts = Texts(corpus, tokenizer, section, cleaning or CleaningSection())
    made_from = _origin(texts)
    if not artifact.reusable(folder, made_from):
        if rank and section.streaming:  # there is nothing to help with
            return
        shards = folder.parent / f"_shards-{folder.name}"
        try:
            shards.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: cannot be written: {error.strerror}") from None
        if rank:
            _help_along(texts, shards, num_proc, rank, world_size)
            return
        with locks.locked(shards, "--data.path or --training.output_dir"):
            # Another process may have finished while this one came to the lock.
            if not artifact.reusable(folder, made_from):
                if section.streaming:
                    prepare_held_out(texts, _encoder(texts), folder, made_from)
                else:
                    _prepare(texts, folder, made_from, shards, num_proc, world_size)
            shutil.rmtree(shards)
        logger.info("%s", describe(folder, section))
        return
    if rank == 0:  # what a process left that was killed when it was done
        shutil.rmtree(folder.parent / f"_shards-{folder.name}", ignore_errors=True)
    if section.is_weighted and not section.streaming:  # weights may change, the rows stay
        check_mixture(artifact.read_manifest(folder)["facts"], section)
        logger.info("%s", describe(folder, section))


def stream_of(
    section: DataSection,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase | FolderTokenizer,
    *,
    cleaning: CleaningSection,
    rows_per_update: int,
    seed: int,
    folder: Path | None = None,
) -> Stream | None:
    """Return what decides the rows of a streamed corpus, None where rows are prepared.

    `folder` holds its held-out text (see `prepare_blocks`): what was given there may not come
    again.
    """
    if not section.streaming:
        return None
    texts = Texts(corpus, tokenizer, section, cleaning)
    rows = max(TOKENS_PER_SEGMENT // section.block_size, 4 * rows_per_update)
    shards = [
        [shard for shard in corpus.shards if shard.source == number]
        for number in range(len(section.all_sources))
    ]
    weights = [s.weight if section.is_weighted else 1.0 for s in section.all_sources]
    origin = [_origin(texts), weights, rows, seed, [[s.start for s in g] for g in shards]]
    identity = hashlib.sha256(json.dumps(origin).encode()).hexdigest()
    work = _work(texts, _encoder(texts))
    known = (folder / GIVEN).read_text().split() if folder is not None else []
    given = frozenset(map(bytes.fromhex, known))
    return Stream(work, shards, weights, section.block_size, rows, seed, identity, given)


def _origin(texts: Texts) -> dict[str, Any]:
    section, rules = texts.section, texts.cleaning
    origin: dict[str, Any] = {
        "corpus": texts.corpus.identity,
        "tokenizer": tokenizer_fingerprint(texts.tokenizer),
        "data": {
            "block_size": section.block_size,
            "packing": section.packing,
            "stride": section.stride,
        },
        "cleaning": rules.model_dump(mode="json", exclude={"benchmark_files", "normalization"}),
    }
    if section.example_format is not None:
        origin["data"]["format"] = section.example_format
    if section.streaming:
        origin["data"]["held_out_from_bytes"] = section.held_out_from_bytes
    if rules.benchmark_files:
        names = file_search.find_files(benchmarks(texts))
        origin["cleaning"]["benchmarks"] = artifact.fingerprint_of([path for _, path in names])
    return origin


def _work(texts: Texts, encoder: Encoder) -> Work:
    return Work(texts.corpus.reader, encoder, texts.tokenizer.eos_token_id, dtype_of(texts))


def _encoder(texts: Texts) -> Encoder:
    shards = texts.corpus.shards
    spread = {round(n) for n in np.linspace(0, len(shards) - 1, min(SAMPLED_SHARDS, len(shards)))}
    size = max(1, SAMPLED_CHARACTERS * SAMPLED_SHARDS // max(1, len(spread)))

    def sample() -> Iterator[str]:
        for number in sorted(spread):
            left = size
            for document in texts.corpus.reader.documents(shards[number]):
                text = next(document.read(), "")[: min(left, SAMPLED_CHARACTERS)]
                yield text
                left -= len(text)
                if left <= 0:
                    break

    return choose_encoder(texts.tokenizer.backend_tokenizer.to_str(), sample())


def _help_along(
    texts: Texts, shards: Path, num_proc: int | None, rank: int, world_size: int
) -> None:
    report, own = shards / f"failed-{rank}.txt", shards / f"_machine-{rank}"
    own.mkdir(exist_ok=True)
    with locks.locked(own, "--machine_rank"):
        report.unlink(missing_ok=True)
        _make_shards_of(texts, shards, num_proc, rank, world_size, report)


def _make_shards_of(
    texts: Texts, shards: Path, num_proc: int | None, rank: int, world_size: int, report: Path
) -> None:
    try:
        make_token_shards(
            texts.corpus, lambda: _work(texts, _encoder(texts)), shards,
            tokenizer=tokenizer_fingerprint(texts.tokenizer), num_proc=num_proc, rank=rank,
            world_size=world_size,
        )  # fmt: skip
    except InputError as error:
        report.write_text(str(error))  # the first machine waits for these shards, and looks
        raise


def _prepare(
    texts: Texts,
    folder: Path,
    made_from: dict[str, Any],
    place: Path,
    num_proc: int | None,
    world_size: int,
) -> None:
    shards = make_token_shards(
        texts.corpus, lambda: _work(texts, _encoder(texts)), place,
        tokenizer=made_from["tokenizer"], num_proc=num_proc, world_size=world_size,
    )  # fmt: skip
    _warn_of_separators(texts, shards)
    with artifact.staged(folder, made_from) as (staging, facts):
        kept, found = select(texts, shards)
        facts["encoder"] = ", ".join(sorted({shard.facts["encoder"] for shard in shards}))
        facts["sources"] = [
            {"name": name, "documents": 0, "bytes": 0, "tokens": 0, "rows": 0, **found[n]}
            for n, name in enumerate(texts.corpus.source_names())
        ]
        total = sum(int(shard.table["tokens"].sum()) for shard in shards)
        with tqdm(
            desc="packing", total=total, unit="token", unit_scale=True, delay=2, disable=None
        ) as bar:
            for split in SPLITS:
                _write_split(
                    texts, list(zip(shards, kept, strict=True)), split, staging, facts, bar
                )
        check_enough(facts, texts.section)


def _warn_of_separators(texts: Texts, shards: list[TokenShard]) -> None:
    """Say where a separator was found nowhere: lines may end otherwise than it says."""
    for number, source in enumerate(texts.section.all_sources):
        if source.separator is None:
            continue
        tables = [shard.table for shard in shards if shard.group == number]
        if texts.corpus.hold_out == "tail":  # one head for each document
            tables = [table[table["split"] == 0] for table in tables]
        documents = sum(map(len, tables))
        files = {s.files for s in texts.corpus.shards if s.source == number}
        if documents <= len(files):
            logger.info(
                "data.separator %r stands in none of the %d file(s) of %s", source.separator,
                len(files), texts.corpus.source_names()[number],
            )  # fmt: skip


def _bounded(chunk: packing.Chunk, size: int) -> Iterator[packing.Chunk]:
    """Yield a chunk in parts: a single document can be larger than what fits in memory twice."""
    if len(chunk.ids) <= 2 * size:
        yield chunk
        return
    known, zero = chunk.bytes, np.zeros(1, np.int64)
    for start, stop in itertools.pairwise([*chunk.starts.tolist(), len(chunk.ids)]):
        for begin in range(start, stop, size):
            is_start = zero if begin == start else zero[:0]
            yield packing.Chunk(chunk.ids[begin : min(begin + size, stop)], is_start, known)
            known = 0


def _fitted(
    chunks: Iterator[packing.Chunk], block_size: int, lengths: np.ndarray, counts: dict[str, Any]
) -> Iterator[packing.Chunk]:
    """Yield examples that fit into a row each, and count what is predicted and what left out."""
    for chunk in chunks:
        found = marks.fit(chunk, block_size)
        marked = found.chunk.ids
        ids, predicted = marks.bare(marked), marked >= marks.PREDICTED
        counts["predicted_tokens"] += int(predicted.sum())
        counts["predicted_bytes"] += int(lengths[ids[predicted]].sum())
        counts["shortened"] += found.shortened
        counts["too_long"] += found.left_out
        counts["left_out"] += len(chunk.ids) - len(ids)
        if len(ids):
            yield found.chunk._replace(bytes=int(lengths[ids].sum()))


def _write_split(
    texts: Texts,
    shards: list[tuple[TokenShard, Kept]],
    split: str,
    staging: Path,
    facts: dict[str, Any],
    bar: tqdm,
) -> None:
    section, end = texts.section, texts.tokenizer.eos_token_id
    lengths = token_bytes(texts.tokenizer)
    counts: dict[str, Any] = {"documents": 0, "bytes": 0, "tokens": 0}
    # What has no context: the first token of the stream, or those of all documents.
    counts |= {"first_token_bytes": 0, "first_tokens_bytes": 0}
    if section.example_format is not None:
        counts |= dict.fromkeys(EXAMPLE_COUNTS, 0)
    dtype = np.dtype(dtype_of(texts))
    writer = RowWriter(staging / f"{split}.arrow", block_size=section.block_size, dtype=dtype)

    cut = 0  # documents longer than a row
    is_tail = texts.corpus.hold_out == "tail"
    if split != "train":
        write_names(staging, split, [])

    def stream(group: int | None) -> Iterator[packing.Chunk]:
        nonlocal cut
        for shard, kept in shards:
            if group is not None and shard.group != group:
                continue
            if split != "train":
                mask = kept.documents & (shard.table["split"] == SPLITS.index(split))
                if mask.any():
                    write_names(staging, split, shard.names(np.flatnonzero(mask)))
            source = facts["sources"][shard.group]
            step = max(1, cleaning.TOKENS_AT_ONCE // section.block_size) * section.block_size
            chunks = chunks_of(texts, shard, kept, split)
            if section.example_format is not None:
                chunks = _fitted(chunks, section.block_size, lengths, counts)
            for chunk in itertools.chain.from_iterable(_bounded(whole, step) for whole in chunks):
                first_bytes = lengths[chunk.ids[chunk.starts]]
                if not counts["tokens"]:
                    counts["first_token_bytes"] = int(first_bytes[0])
                for where in (counts, source):
                    # Of a document whose end is held out its head counts, once.
                    if where is counts or split == "train" or not is_tail:
                        where["documents"] += len(chunk.starts)
                    where["bytes"] += chunk.bytes
                    where["tokens"] += len(chunk.ids)
                counts["first_tokens_bytes"] += int(first_bytes.sum())
                if len(chunk.starts):
                    ends = np.append(chunk.starts[1:], len(chunk.ids))
                    cut += int((ends - chunk.starts > section.block_size).sum())
                bar.update(len(chunk.ids))
                yield chunk

    if split == "train":
        for group in range(len(section.all_sources)):
            before = writer.count
            for rows in _packed(stream(group), section, end):
                writer.write(rows)
            facts["sources"][group]["rows"] = writer.count - before
    else:
        is_whole = section.example_format is not None
        packed = packing.best_fit if is_whole else packing.held_out
        for rows in packed(stream(None), section.block_size, fill=end):
            writer.write(rows)
    writer.close()
    counts["rows"] = writer.count
    counts.setdefault("left_out", 0)
    if split == "train":
        capacity = max(1, writer.count * section.block_size)
        counts["padding"] = 1 - writer.used / capacity
        if section.packing == "concatenate":
            counts["left_out"] = counts["tokens"] - writer.used
        elif section.packing == "sliding":
            per_source = [s["rows"] for s in facts["sources"] if s["rows"]]
            reached = sum((r - 1) * section.stride + section.block_size for r in per_source)
            counts["left_out"] = counts["tokens"] - reached
        else:
            counts["truncation"] = cut / max(1, counts["documents"])
    facts[split] = counts


def _packed(
    stream: Iterator[packing.Chunk], section: DataSection, end: int
) -> Iterator[packing.Rows]:
    if section.packing == "best_fit":
        return packing.best_fit(stream, section.block_size, fill=end)
    return packing.windows(stream, section.block_size, stride=section.stride or section.block_size)
