"""What is left out of the training text: copies, and what the held-out text also says.

Both look at ids on disk, a stretch at a time: what stays in memory is 16 bytes a document (several
times that while they are sorted) to find copies, 8 bytes a held-out token to find shared n-grams.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from pipeline.corpus import SPLITS
from pipeline.marks import bare
from pipeline.recipe import InputError
from pipeline.token_shards import TokenShard

N_GRAM = 13  # tokens; Brown et al. 2020 (GPT-3), appendix C, look for 13-grams of words
TOKENS_AT_ONCE = 1 << 22
# A bit table in front of the search: all but about 1 % of the misses end there.
TABLE_BITS = 27
TRAIN = SPLITS.index("train")
# Weights of the polynomial that stands for an n-gram, modulo 2^64: powers of an odd number that
# mixes well (the 64-bit golden ratio). 64 bits make a chance hit among 10^10 x 10^8 pairs unlikely
# (about 1 in 20).
_FACTORS = np.array([pow(0x9E3779B97F4A7C15, k + 1, 1 << 64) for k in range(N_GRAM)], np.uint64)


class Kept(NamedTuple):
    """What stays of one shard."""

    documents: np.ndarray
    """bool [documents]."""
    spans: np.ndarray
    """int64 [spans, 2]: places of tokens to cut out, from and to, in order."""
    contaminated: int
    """Documents dropped or cut because of them."""


def without_copies(shards: list[TokenShard], keep: list[np.ndarray]) -> list[np.ndarray]:
    """Return bool [documents] for each shard: of those in `keep`, all but later copies.

    The text decides the side, so that copies are on one. Where the ends of documents are held out,
    each side has its part of each copy, and keeps one.
    """
    tables = [shard.table for shard in shards]
    digests = np.concatenate([table["digest"] for table in tables])
    splits = np.concatenate([table["split"] for table in tables])
    left = np.concatenate(keep)
    places = np.flatnonzero(left)
    order = places[  # stable: the first of equals comes first
        np.lexsort((splits[places], digests[places, 1], digests[places, 0]))
    ]
    same = (digests[order[1:]] == digests[order[:-1]]).all(axis=1)
    left[order[1:][same & (splits[order[1:]] == splits[order[:-1]])]] = False
    return np.split(left, np.cumsum([len(table) for table in tables])[:-1])


def held_out_copies(shards: list[TokenShard], sources: int) -> list[np.ndarray]:
    """Return bool [documents] for each shard, true for documents that were given as held-out text.

    Such text has files of its own: the groups from `sources` on.

    Raises:
        InputError: a document was given for validation and for the test.
    """
    sides: dict[bytes, int] = {}
    for shard in shards:
        if shard.group >= sources:
            table = shard.table
            for place, (digest, split) in enumerate(table[["digest", "split"]]):
                if sides.setdefault(digest.tobytes(), int(split)) != split:
                    raise InputError(
                        f"{shard.names([place])[0]}: the same document is in validation and in "
                        "test; take it out of one"
                    )
    known = np.frombuffer(b"".join(sides), np.uint64).reshape(-1, 2)
    copies = []
    for shard in shards:
        table = shard.table
        found = np.zeros(len(table), bool)
        if shard.group < sources:
            for place in np.flatnonzero(np.isin(table["digest"][:, 0], known[:, 0])):
                found[place] = table["digest"][place].tobytes() in sides
        copies.append(found)
    return copies


def on_two_sides(name: str) -> InputError:
    """Return the error for a document that is trained on and was given as held-out text."""
    return InputError(
        f"{name}: this training document is also held-out text (data.validation_files or such), "
        "whose number would be worth nothing; take it out of one side, or set "
        "--cleaning.decontaminate copies"
    )


class NGrams:
    """The n-grams of texts that must not be trained on.

    Attributes:
        too_short: documents that have none.
    """

    def __init__(self, streams: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """Collect them from streams of ids and the lengths of their documents."""
        found = [np.empty(0, np.uint64)]
        self.too_short = 0
        for ids, lengths in streams:
            self.too_short += int((lengths <= N_GRAM).sum())  # end-of-text included
            for _, hashes, inside in _hashes(ids, lengths):
                found.append(hashes[inside])
        self._sorted = np.unique(np.concatenate(found))
        self._table = np.zeros(1 << TABLE_BITS >> 3, np.uint8)
        places = self._places(self._sorted)
        np.bitwise_or.at(self._table, places >> 3, (1 << (places & 7)).astype(np.uint8))

    def __len__(self) -> int:
        return len(self._sorted)

    def spans(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return int64 [spans, 2]: the stretches of `ids` that shared n-grams cover, joined.

        `lengths` are those of the documents, end-of-text included, which is in no n-gram.
        """
        hits = [np.empty(0, np.int64)]
        for begin, hashes, inside in _hashes(ids, lengths):
            places = self._places(hashes)
            maybe = inside & (self._table[places >> 3] >> (places & 7) & 1).astype(bool)
            candidates = np.flatnonzero(maybe)
            at = np.searchsorted(self._sorted, hashes[candidates])
            at = np.minimum(at, len(self._sorted) - 1)
            hits.append(candidates[self._sorted[at] == hashes[candidates]] + begin)
        hit = np.concatenate(hits)
        if not len(hit):
            return np.empty((0, 2), np.int64)
        # N-grams that touch or overlap are one stretch; end-of-text, which is in none, stands
        # between those of two documents.
        first = np.flatnonzero(np.diff(hit, prepend=-N_GRAM - 1) > N_GRAM)
        last = np.append(first[1:], len(hit)) - 1
        return np.stack([hit[first], hit[last] + N_GRAM], axis=1)

    @staticmethod
    def _places(hashes: np.ndarray) -> np.ndarray:
        return (hashes >> np.uint64(64 - TABLE_BITS)).astype(np.int64)


def decontaminated(
    shard: TokenShard, n_grams: NGrams, keep: np.ndarray, *, dtype: str, cut: bool
) -> Kept:
    """Return what stays of a shard whose training documents share no n-gram.

    `keep` is what earlier steps left of its documents; `cut` takes out the shared stretches and
    leaves the rest of the document.
    """
    table = shard.table
    keep = keep.copy()
    train = keep & (table["split"] == TRAIN)
    ids, starts = shard.tokens(dtype), np.cumsum(table["tokens"]) - table["tokens"]
    spans, hit_documents = [], 0
    for first, stop in batches_of_documents(table["tokens"]):
        if not train[first:stop].any():
            continue
        begin = int(starts[first])
        lengths = table["tokens"][first:stop]
        part = bare(ids[begin : begin + int(lengths.sum())])
        found = n_grams.spans(part, lengths) + begin
        document = np.searchsorted(starts, found[:, 0], side="right") - 1
        found, document = found[train[document]], document[train[document]]
        hit_documents += len(np.unique(document))
        if cut:
            spans.append(found)
        else:
            keep[document] = False
    joined = np.concatenate([np.empty((0, 2), np.int64), *spans])
    return Kept(keep, joined, hit_documents)


def batches_of_documents(tokens: np.ndarray) -> Iterable[tuple[int, int]]:
    """Yield ranges of documents that together have about `TOKENS_AT_ONCE` tokens."""
    ends, first = np.cumsum(tokens), 0
    while first < len(tokens):
        before = ends[first - 1] if first else 0
        stop = int(np.searchsorted(ends, before + TOKENS_AT_ONCE, side="right"))
        stop = max(stop, first + 1)
        yield first, stop
        first = stop


def _hashes(ids: np.ndarray, lengths: np.ndarray) -> Iterable[tuple[int, np.ndarray, np.ndarray]]:
    """Yield, a stretch at a time, its first place, the hash of the n-gram at every place, and
    whether that lies within its document."""
    ends = np.cumsum(lengths)
    for begin in range(0, len(ids) - N_GRAM + 1, TOKENS_AT_ONCE):
        count = min(TOKENS_AT_ONCE, len(ids) - N_GRAM + 1 - begin)
        part = np.asarray(ids[begin : begin + count + N_GRAM - 1])
        wide = part.astype(np.uint64) + np.uint64(1)
        hashes = np.zeros(count, np.uint64)
        for k, factor in enumerate(_FACTORS):
            hashes += wide[k : k + count] * factor
        hashes ^= hashes >> np.uint64(32)
        hashes *= np.uint64(0xD6E8FEB86659FD93)  # the table takes the upper bits (rrxmrrxmsx)
        # Places too near to the end of their document: the n-gram would hold its end-of-text.
        inside = np.ones(count, bool)
        near_ends = ends[(ends > begin) & (ends - N_GRAM < begin + count)]
        for k in range(N_GRAM):
            near = near_ends - 1 - k - begin
            inside[near[(near >= 0) & (near < count)]] = False
        yield begin, hashes, inside
