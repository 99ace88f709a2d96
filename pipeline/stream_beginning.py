"""The held-out rows of a stream, and the bytes that its tokens stand for, from its beginning."""

from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from pipeline import artifact, cleaning, packing
from pipeline.corpus import SPLITS
from pipeline.encoder import Encoder
from pipeline.recipe import InputError
from pipeline.row_file import RowWriter
from pipeline.row_tables import check_held_out
from pipeline.selection import Texts, dtype_of, write_names
from pipeline.tokenizer import token_bytes

GIVEN = "given_documents.txt"
SAMPLED_BYTES = 1 << 20  # of a stream's training text, for the bytes that a token stands for


def prepare_held_out(
    texts: Texts, encoder: Encoder, folder: Path, made_from: dict[str, Any]
) -> None:
    """Write the held-out rows of a stream, from the documents at its beginning.

    Raises:
        InputError: a document is on two sides of the split, or none is held out.
    """
    section, end = texts.section, texts.tokenizer.eos_token_id
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
            dtype = np.dtype(dtype_of(texts))
            write_names(staging, split, names[split])
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
        check_held_out(facts, section)
