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
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from pipeline import artifact, cleaning, packing, raw_documents, sources, text_files
from pipeline.cleaning import Kept
from pipeline.corpus import SPLITS, Corpus
from pipeline.encoder import Encoder, choose_encoder
from pipeline.packing import mixture
from pipeline.recipe import InputError
from pipeline.row_file import RowFile, RowWriter
from pipeline.sections import CleaningSection, DataSection, SourceSection
from pipeline.streaming import TOKENS_PER_SEGMENT, Stream
from pipeline.token_shards import TokenShard, Work, make_token_shards
from pipeline.tokenizer import FolderTokenizer, token_bytes, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# The fast encoder is compared with `tokenizers` on that much of the corpus: a fifth of a second.
SAMPLED_SHARDS, SAMPLED_CHARACTERS = 32, 16_000
GIVEN = "given_documents.txt"
SAMPLED_BYTES = 1 << 20  # of a stream's training text, for the bytes that a token stands for


COUNTED = ("empty", "short", "long", "copies", "dropped", "cut")


class Texts(NamedTuple):
    """What rows are made from and with."""

    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase | FolderTokenizer
    section: DataSection
    cleaning: CleaningSection


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
        with artifact.locked(shards, "--data.path or --training.output_dir"):
            # Another process may have finished while this one came to the lock.
            if not artifact.reusable(folder, made_from):
                if section.streaming:
                    _prepare_held_out(texts, folder, made_from)
                else:
                    _prepare(texts, folder, made_from, shards, num_proc, world_size)
            shutil.rmtree(shards)
        logger.info("%s", describe(folder, section))
        return
    if rank == 0:  # what a process left that was killed when it was done
        shutil.rmtree(folder.parent / f"_shards-{folder.name}", ignore_errors=True)
    if section.is_weighted and not section.streaming:  # weights may change, the rows stay
        _check_mixture(artifact.read_manifest(folder)["facts"], section)
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


def describe(folder: Path, section: DataSection) -> str:
    """Return tables of what the splits hold, where it came from, and what was left out."""
    facts = artifact.read_manifest(folder)["facts"]
    lines = [_line("split", "documents", "bytes", "tokens", "rows", "left out")]
    for split in SPLITS:
        f = facts[split]
        lines.append(
            _line(split, f["documents"], f["bytes"], f["tokens"], f["rows"], f["left_out"])
        )
    if section.streaming:
        return "\n".join(lines[:1] + lines[2:])
    train = facts["train"]
    if section.packing == "best_fit":
        lines.append(
            f"best_fit: {train['padding']:.2%} of the room in the rows is padding, "
            f"{train['truncation']:.2%} of the documents are longer than a row and cut"
        )
    sources = facts["sources"]
    shares = mixture([source["rows"] for source in sources], section)
    total = max(1, sum(taken for _, _, taken in shares))
    lines += ["", _line("source", "documents", "bytes", "tokens", "copies", "dropped", "B/token")]
    lines[-1] += f"{'share':>8}"
    for number, source in enumerate(sources):
        dropped = sum(source[name] for name in ("empty", "short", "long", "dropped"))
        ratio = source["bytes"] / max(1, source["tokens"] - source["documents"])
        row = _line(
            source["name"], source["documents"], source["bytes"], source["tokens"],
            source["copies"], dropped, f"{ratio:.3f}",
        )  # fmt: skip
        held_out = number >= len(shares)
        lines.append(row + ("" if held_out else f"{shares[number][2] / total:>8.1%}"))
    counted = {n: f"{sum(s[n] for s in sources):,}" for n in COUNTED}
    lines.append(
        f"dropped: {counted['empty']} empty, {counted['short']} short, {counted['long']} long, "
        f"{counted['dropped']} for text that is held out; cut for such text: {counted['cut']}"
    )
    return "\n".join(lines + _used_up(facts, section))


def show(folder: Path, tokenizer: PreTrainedTokenizerBase | FolderTokenizer, count: int) -> str:
    """Return `count` rows, spread evenly, as text with their documents set apart.

    They are training rows; of a stream, which has none yet, validation rows.
    """
    manifest, lines = artifact.read_manifest(folder), []
    facts, is_cut = manifest["facts"], manifest["made_from"]["data"]["packing"] == "best_fit"
    rows = RowFile.open(folder / f"{'train' if facts['train']['rows'] else 'validation'}.arrow")
    for index in np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int).tolist():
        documents, begins = rows.documents_of(index), rows.row(index)[1][:1].tolist() == [0]
        used = sum(len(document) for document in documents)
        filled = f", {rows.block_size - used} filled up" if used < rows.block_size else ""
        lines.append(f"--- row {index:,}: {len(documents)} document(s){filled}")
        for number, document in enumerate(documents):
            mark = "[a document begins]" if number or begins else "[a document goes on]"
            # Where long documents are cut, their parts are placed like documents.
            lines.append("[a document, or a part of a long one]" if is_cut else mark)
            lines.append(tokenizer.decode(document))
    return "\n".join(lines)


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
    if section.streaming:
        origin["data"]["held_out_from_bytes"] = section.held_out_from_bytes
    if rules.benchmark_files:
        names = sources.find_files(_benchmarks(texts))
        origin["cleaning"]["benchmarks"] = artifact.fingerprint_of([path for _, path in names])
    return origin


def _work(texts: Texts, encoder: Encoder) -> Work:
    return Work(texts.corpus.reader, encoder, texts.tokenizer.eos_token_id, _dtype(texts))


def _dtype(texts: Texts) -> str:
    return "uint16" if len(texts.tokenizer) <= 1 << 16 else "uint32"


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
    with artifact.locked(own, "--machine_rank"):
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
        kept, found = _select(texts, shards)
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
        _check_enough(facts, texts.section)


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


def _prepare_held_out(texts: Texts, folder: Path, made_from: dict[str, Any]) -> None:
    """Write the held-out rows of a stream, from the documents at its beginning."""
    section, end = texts.section, texts.tokenizer.eos_token_id
    encoder = _encoder(texts)
    is_open = encoder.open()
    sources_read = texts.corpus.source_names()
    given: dict[bytes, str] = {}
    names: dict[str, list[str]] = {split: [] for split in SPLITS}
    found: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    sizes = {split: {"documents": 0, "bytes": 0} for split in SPLITS}
    read, sampled = [0] * len(sources_read), [0] * len(sources_read)
    limit = section.held_out_from_bytes // len(section.all_sources)
    with (
        artifact.staged(folder, made_from) as (staging, facts),
        tqdm(
            desc="held-out text", total=sum(limit for s in section.all_sources), unit="B",
            unit_scale=True, delay=2, disable=None,
        ) as bar,
    ):  # fmt: skip
        # Text given for a held-out split comes first: no other may repeat it.
        for shard in sorted(texts.corpus.shards, key=lambda shard: shard.source >= 0):
            group, is_given = texts.corpus.group_of(shard), shard.source < 0
            if not is_given and read[group] >= limit and sampled[group]:
                continue
            for document in texts.corpus.reader.documents(shard):
                text, digest = document.text, document.digest[:16]
                size = len(text.encode())
                read[group] += size
                bar.update(size)
                if not document.is_within(texts.cleaning):
                    continue
                split = document.split
                if is_given and given.setdefault(digest, split) != split:
                    raise InputError(
                        f"{document.name}: the same document is in validation and in test; take "
                        "it out of one"
                    )
                if not is_given and digest in given:
                    if texts.cleaning.decontaminate is None:
                        raise cleaning.on_two_sides(document.name)
                    continue
                # Training text is only sampled, for the bytes that a token stands for.
                if text and (split != "train" or sampled[group] < SAMPLED_BYTES):
                    if split == "train":
                        sampled[group] += size
                    else:
                        names[split].append(document.name)
                    found[split].append(np.append(is_open.encode([text])[0], np.uint32(end)))
                    sizes[split]["documents"] += 1
                    sizes[split]["bytes"] += size
                # What a token stands for has to be known, however long the first documents are.
                if not is_given and read[group] >= limit and sampled[group]:
                    break
        (staging / GIVEN).write_text("\n".join(digest.hex() for digest in given))
        facts |= {"encoder": encoder.name, "sources": [{"name": name} for name in sources_read]}
        lengths = token_bytes(texts.tokenizer)
        for split in SPLITS:
            ids = np.concatenate([*found[split], np.empty(0, np.uint32)])
            counts = np.array([len(part) for part in found[split]], np.int64)
            starts = np.cumsum(counts) - counts
            firsts = lengths[ids[starts]]
            dtype = np.dtype(_dtype(texts))
            _write_names(staging, split, names[split])
            path = staging / f"{split}.arrow"
            writer = RowWriter(path, block_size=section.block_size, dtype=dtype)
            if split != "train":
                chunks = [packing.Chunk(ids, starts)] if len(ids) else []
                for rows in packing.held_out(chunks, section.block_size, fill=end):
                    writer.write(rows)
            writer.close()
            facts[split] = sizes[split] | {
                "tokens": len(ids), "rows": writer.count, "left_out": 0,
                "first_token_bytes": int(firsts[:1].sum()), "first_tokens_bytes": int(firsts.sum()),
            }  # fmt: skip
        _check_held_out(facts, section)


def _select(texts: Texts, shards: list[TokenShard]) -> tuple[list[Kept], list[dict[str, int]]]:
    """Return what stays of each shard, and for each source what was counted."""
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
                cleaning.decontaminated(shard, n_grams, mask, dtype=_dtype(texts), cut=is_cut)
            )
            counts[shard.group]["cut" if is_cut else "dropped"] += kept[-1].contaminated
            bar.update()
    return kept, counts


def _forbidden(
    texts: Texts, shards: list[TokenShard], keep: list[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the ids and the document lengths of held-out text and benchmarks."""
    for shard, mask in zip(shards, keep, strict=True):
        for split in SPLITS[1:]:
            for chunk in _chunks(texts, shard, Kept(mask, np.empty((0, 2), np.int64), 0), split):
                yield chunk.ids, np.diff(np.append(chunk.starts, len(chunk.ids)))
    source = _benchmarks(texts)
    encoder = Encoder(texts.tokenizer.backend_tokenizer.to_str()).open()
    if source is not None:
        files = sources.find_files(source)
        for shard in sources.shards_of(0, source, files, total_bytes=0):
            for document in raw_documents.read_shard(shard, source):
                parts = [np.empty(0, np.uint32)]
                for window in text_files.safe_windows(document.read(), document.name):
                    if texts.cleaning.normalization is not None:
                        window = unicodedata.normalize(texts.cleaning.normalization, window)
                    parts += encoder.encode([window])
                ids = np.append(np.concatenate(parts), np.uint32(texts.tokenizer.eos_token_id))
                yield ids, np.array([len(ids)])


def _benchmarks(texts: Texts) -> SourceSection | None:
    if not texts.cleaning.benchmark_files:
        return None
    first = texts.section.all_sources[0]
    return SourceSection(
        files=texts.cleaning.benchmark_files, text_column=first.text_column, errors=first.errors
    )


def _chunks(texts: Texts, shard: TokenShard, kept: Kept, split: str) -> Iterator[packing.Chunk]:
    """Yield what stays of a shard's documents of one split, a few whole ones at a time."""
    table, end = shard.table, texts.tokenizer.eos_token_id
    wanted = kept.documents & (table["split"] == SPLITS.index(split))
    if not wanted.any():
        return
    ids, begins = shard.tokens(_dtype(texts)), np.cumsum(table["tokens"]) - table["tokens"]
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
    dtype = np.dtype(_dtype(texts))
    writer = RowWriter(staging / f"{split}.arrow", block_size=section.block_size, dtype=dtype)

    cut = 0  # documents longer than a row
    is_tail = texts.corpus.hold_out == "tail"
    if split != "train":
        _write_names(staging, split, [])

    def stream(group: int | None) -> Iterator[packing.Chunk]:
        nonlocal cut
        for shard, kept in shards:
            if group is not None and shard.group != group:
                continue
            if split != "train":
                mask = kept.documents & (shard.table["split"] == SPLITS.index(split))
                if mask.any():
                    _write_names(staging, split, shard.names(np.flatnonzero(mask)))
            source = facts["sources"][shard.group]
            step = max(1, cleaning.TOKENS_AT_ONCE // section.block_size) * section.block_size
            for chunk in itertools.chain.from_iterable(
                _bounded(whole, step) for whole in _chunks(texts, shard, kept, split)
            ):
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
        for rows in packing.held_out(stream(None), section.block_size, fill=end):
            writer.write(rows)
    writer.close()
    counts["rows"] = writer.count
    counts["left_out"] = 0
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


def _write_names(folder: Path, split: str, names: list[str]) -> None:
    """Put on record which documents are held out."""
    with (folder / f"{split}_documents.jsonl").open("a") as file:
        file.writelines(json.dumps(name) + "\n" for name in names)


def _packed(
    stream: Iterator[packing.Chunk], section: DataSection, end: int
) -> Iterator[packing.Rows]:
    if section.packing == "best_fit":
        return packing.best_fit(stream, section.block_size, fill=end)
    return packing.windows(stream, section.block_size, stride=section.stride or section.block_size)


def _used_up(facts: dict[str, Any], section: DataSection) -> list[str]:
    """Say which source ran out before its share."""
    if not section.is_weighted:
        return []
    weights = [source.weight for source in section.all_sources]
    taken = mixture([source["rows"] for source in facts["sources"]], section)
    total = max(1, sum(t for _, _, t in taken))
    lines = [
        f"mixture: {total:,} of the {facts['train']['rows']:,} rows, "
        f"{total * section.block_size:,} tokens"
    ]
    for number, (_, available, used) in enumerate(taken):
        name, wanted = facts["sources"][number]["name"], weights[number]
        if section.mixture_tokens is not None:
            asked = wanted * section.mixture_tokens
            if used * section.block_size < asked - section.block_size:
                lines.append(
                    f"{name} ran out: {used * section.block_size:,} tokens of the "
                    f"{asked:,.0f} that its weight {wanted:g} asks for ({used / total:.1%} of all)"
                )
        elif used < available:
            lines.append(f"{name}: {1 - used / available:.1%} is left out to keep the weights")
        elif wanted:
            lines.append(
                f"{name} is used up: it limits the mixture; data.mixture_tokens lifts that"
            )
    return lines


def _line(name: str, *values: Any) -> str:
    name = name if len(name) < 24 else f"...{name[-20:]}"
    return f"{name:<24}" + "".join(
        f"{value:>14,}" if isinstance(value, int) else f"{value:>14}" for value in values
    )


def _check_enough(facts: dict[str, Any], section: DataSection) -> None:
    train = facts["train"]
    if not train["rows"]:
        counts = (source[name] for source in facts["sources"] for name in COUNTED[1:-1])
        left_out = sum(counts)
        cleaned = f" ({left_out:,} documents were left out by cleaning)" if left_out else ""
        raise InputError(
            f"the training text has {train['tokens']} tokens{cleaned} and a row needs "
            f"{section.block_size}: give more text in data.files or a smaller data.block_size"
        )
    _check_held_out(facts, section)
    _check_mixture(facts, section)


def _check_mixture(facts: dict[str, Any], section: DataSection) -> None:
    shares = mixture([source["rows"] for source in facts["sources"]], section)
    if not sum(taken for _, _, taken in shares):
        raise InputError(
            "the mixture is empty: the sources that have a weight above 0 hold less than a row "
            f"of {section.block_size} tokens; check data.sources"
        )


def _check_held_out(facts: dict[str, Any], section: DataSection) -> None:
    if not facts["validation"]["rows"]:
        raise InputError(
            f"no text is held out for validation ({facts['train']['documents']} documents, "
            f"data.validation_fraction {section.validation_fraction}): raise the fraction, give "
            "more documents, or set data.hold_out to tail"
        )
