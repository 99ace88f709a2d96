"""What is left out of the training text, against sets of tuples and plain loops."""

import itertools
import json
import random

import numpy as np
import pytest

from pipeline import cleaning
from pipeline.cleaning import NGrams, decontaminated, held_out_copies, without_copies
from pipeline.corpus import SPLITS
from pipeline.recipe import InputError
from pipeline.token_shards import TABLE, TokenShard

END = 9  # stands for end-of-text; other ids are below


def random_documents(source, count, longest, vocabulary=2):
    return [
        [source.randrange(vocabulary) for _ in range(source.randint(1, longest))] + [END]
        for _ in range(count)
    ]


def stream(documents, dtype=np.uint16):
    ids = np.array([i for document in documents for i in document], dtype)
    return ids, np.array([len(document) for document in documents], np.int64)


def plain_n_grams(document):
    """Return place and tokens of every n-gram of a document, its end-of-text left out."""
    return [(n, tuple(document[n : n + 13])) for n in range(len(document) - 13)]


def known_of(documents):
    return {gram for document in documents for _, gram in plain_n_grams(document)}


def plain_spans(known, document):
    """Return the stretches of a document that n-grams in `known` cover; those that touch joined."""
    spans = []
    for place, gram in plain_n_grams(document):
        if gram in known:
            if spans and place <= spans[-1][1]:
                spans[-1][1] = place + 13
            else:
                spans.append([place, place + 13])
    return spans


def all_plain_spans(known, documents):
    begins = itertools.accumulate(map(len, documents), initial=0)
    return [
        [begin + a, begin + b]
        for begin, document in zip(begins, documents, strict=False)
        for a, b in plain_spans(known, document)
    ]


def sharing(source, documents, count, longest):
    """Return documents that hold stretches of others, some just too short to be shared n-grams."""
    found = []
    for _ in range(count):
        document = []
        for _ in range(source.randint(1, 4)):
            other = source.choice(documents)[:-1]
            start = source.randrange(len(other))
            document += other[start : start + source.choice([5, 12, 13, 14, 30])]
            document += [source.randrange(8) for _ in range(source.choice([0, 1, 12, 13, 20]))]
        found.append(document[:longest] + [END])
    return found


# -- n-grams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("vocabulary, longest", [(1, 30), (2, 60), (3, 200), (8, 80)])
def test_spans_are_those_of_a_set_of_tuples(vocabulary, longest, dtype):
    source = random.Random(vocabulary)
    hits = misses = 0
    for _ in range(12):
        held_out = random_documents(source, source.randint(1, 8), longest, vocabulary)
        documents = random_documents(source, source.randint(1, 8), longest, vocabulary)
        documents += sharing(source, held_out, 4, longest)
        source.shuffle(documents)
        half = len(held_out) // 2
        n_grams = NGrams([stream(held_out[:half], dtype), stream(held_out[half:], dtype)])
        known = known_of(held_out)
        assert len(n_grams) == len(known)
        expected = all_plain_spans(known, documents)
        assert n_grams.spans(*stream(documents, dtype)).tolist() == expected
        hits += len(expected)
        misses += sum(not plain_spans(known, document) for document in documents)
    assert hits and misses


def test_an_n_gram_lies_within_one_document_and_has_no_end_of_text():
    held_out = [[*range(8), *range(8), END]]
    n_grams = NGrams([stream(held_out)])
    assert len(n_grams) == 4
    apart = [[*range(8), END], [*range(8), END]]
    assert len(n_grams.spans(*stream(apart))) == 0
    # The same tokens with the same end: the 13 that end with end-of-text are no n-gram.
    assert len(n_grams.spans(*stream([[*range(4, 8), *range(8), END]]))) == 0
    assert len(NGrams([stream([[*range(4, 8), *range(8), END]])])) == 0
    assert n_grams.spans(*stream([[7, *range(8), *range(8), 3, END]])).tolist() == [[1, 17]]
    # Neighbours that are covered up to their ends are two stretches.
    both = n_grams.spans(*stream([held_out[0], held_out[0]]))
    assert both.tolist() == [[0, 16], [17, 33]]


def test_one_token_more_or_less_decides():
    n_grams = NGrams([stream([[*range(8), *range(8), END]])])
    twelve, thirteen = [*range(8), *range(4)], [*range(8), *range(5)]
    assert len(n_grams.spans(*stream([[*twelve, 0, END]]))) == 0
    assert n_grams.spans(*stream([[0, *thirteen, 0, END]])).tolist() == [[1, 14]]


@pytest.mark.parametrize("streams", [[], [[]], [[[END]]], [[[1, 2, 3, END]]]])
def test_where_nothing_is_forbidden_nothing_is_shared(streams):
    n_grams = NGrams([stream(documents) for documents in streams])
    assert len(n_grams) == 0
    assert n_grams.spans(*stream([[*range(8)] * 4 + [END]])).shape == (0, 2)
    assert n_grams.spans(*stream([[END]])).shape == (0, 2)
    assert n_grams.spans(*stream([])).shape == (0, 2)


# -- copies ---------------------------------------------------------------------------------------


def write_shard(folder, documents, splits=None, digests=None):
    """Write a shard as token_shards.py does; a document's digest is that of its number."""
    folder.mkdir()
    ids, lengths = stream(documents)
    (folder / "tokens.bin").write_bytes(ids.tobytes())
    table = np.zeros(len(documents), TABLE)
    table["tokens"] = lengths
    table["split"] = [SPLITS.index(s) for s in splits or ["train"] * len(documents)]
    if digests is not None:
        table["digest"] = digests
    (folder / "documents.bin").write_bytes(table.tobytes())
    names = [json.dumps(f"{folder.name}-{number}") for number in range(len(documents))]
    (folder / "names.jsonl").write_text("".join(f"{name}\n" for name in names))
    return TokenShard(folder, 0, {})


def shards_of(tmp_path, digests, splits=None):
    shards = []
    for number, part in enumerate(digests):
        documents = [[1, END]] * len(part)
        chosen = None if splits is None else splits[number]
        shards.append(write_shard(tmp_path / f"{number}", documents, chosen, part or None))
    return shards


def test_of_copies_the_first_stays(tmp_path):
    source = random.Random(0)
    for case in range(20):
        folder = tmp_path / f"{case}"
        folder.mkdir()
        # The halves are few, so that many digests have one half in common.
        parts = [
            [(source.randrange(3), source.randrange(3)) for _ in range(source.randint(0, 8))]
            for _ in range(4)
        ]
        seen, expected = set(), []
        for part in parts:
            expected.append([])
            for digest in part:
                expected[-1].append(digest not in seen)
                seen.add(digest)
        everything = [np.ones(len(part), bool) for part in parts]
        found = without_copies(shards_of(folder, parts), everything)
        assert [mask.tolist() for mask in found] == expected


def test_a_copy_that_was_left_out_before_is_not_the_first(tmp_path):
    shards = shards_of(tmp_path, [[(1, 1), (2, 2)], [(1, 1), (2, 2)]])
    keep = [np.array([False, True]), np.array([True, True])]
    assert [m.tolist() for m in without_copies(shards, keep)] == [[False, True], [True, False]]


def test_each_side_keeps_its_part_of_documents_whose_ends_are_held_out(tmp_path):
    splits = [["train", "validation"], ["train", "validation"]]
    shards = shards_of(tmp_path, [[(1, 1), (1, 1)], [(1, 1), (1, 1)]], splits)
    keep = [np.ones(2, bool), np.ones(2, bool)]
    assert [m.tolist() for m in without_copies(shards, keep)] == [[True, True], [False, False]]


def test_training_documents_that_are_in_files_given_for_the_held_out_text(tmp_path):
    source = random.Random(0)
    for case in range(20):
        folder = tmp_path / f"{case}"
        folder.mkdir()
        digests = [(a, b) for a in range(4) for b in range(4)]
        parts = [[source.choice(digests) for _ in range(6)] for _ in range(3)]
        splits = [["train"] * 6, ["train", "validation"] * 3, ["validation"] * 6]
        given = set(parts[2])
        expected = [
            [digest in given for digest in part]  # those that their hash holds out are copies too
            for part in parts[:2]
        ]
        shards = [
            shard._replace(group=number // 2)
            for number, shard in enumerate(shards_of(folder, parts, splits))
        ]
        found = held_out_copies(shards, 1)
        assert [mask.tolist() for mask in found] == [*expected, [False] * 6]


def test_a_document_given_for_validation_and_for_the_test_is_named(tmp_path):
    parts = [[(1, 1), (2, 2)], [(3, 3), (4, 4)], [(5, 5), (3, 3)]]
    splits = [["train", "test"], ["validation"] * 2, ["test"] * 2]
    shards = shards_of(tmp_path, parts, splits)
    with pytest.raises(InputError) as caught:
        held_out_copies([shard._replace(group=n) for n, shard in enumerate(shards)], 1)
    message = str(caught.value)
    assert message.startswith("2-1: ") and "in validation and in test" in message
    assert "\n" not in message


# -- shared text ----------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 40, 1 << 22])
@pytest.mark.parametrize("cut", [False, True])
def test_what_stays_of_a_shard(tmp_path, monkeypatch, cut, at_once):
    monkeypatch.setattr(cleaning, "TOKENS_AT_ONCE", at_once)
    source = random.Random(0)
    for case in range(15):
        held_out = random_documents(source, 4, 60, 8)
        documents = random_documents(source, 6, 60, 8) + sharing(source, held_out, 8, 80)
        source.shuffle(documents)
        splits = [source.choice(["train", "train", *SPLITS]) for _ in documents]
        keep = np.array([source.random() < 0.8 for _ in documents])
        before = keep.tolist()
        shard = write_shard(tmp_path / f"{case}", documents, splits)
        known = known_of(held_out)
        kept = decontaminated(shard, NGrams([stream(held_out)]), keep, dtype="uint16", cut=cut)
        concerned = [
            bool(k) and split == "train" and bool(plain_spans(known, document))
            for k, split, document in zip(keep, splits, documents, strict=True)
        ]
        assert kept.contaminated == sum(concerned)
        if cut:
            assert kept.documents.tolist() == keep.tolist()
            begins = itertools.accumulate(map(len, documents), initial=0)
            expected = [
                [begin + a, begin + b]
                for begin, document, is_shared in zip(begins, documents, concerned, strict=False)
                if is_shared
                for a, b in plain_spans(known, document)
            ]
            assert kept.spans.tolist() == expected
        else:
            assert kept.spans.shape == (0, 2)
            expected = [bool(k) and not c for k, c in zip(keep, concerned, strict=True)]
            assert kept.documents.tolist() == expected
        assert keep.tolist() == before  # it is the caller's


def test_batches_of_documents_are_all_documents_in_bounded_stretches(monkeypatch):
    source = random.Random(0)
    monkeypatch.setattr(cleaning, "TOKENS_AT_ONCE", 20)
    for _ in range(50):
        tokens = np.array([source.randint(1, 30) for _ in range(source.randint(0, 30))], np.int64)
        ranges = list(cleaning.batches_of_documents(tokens))
        assert [n for first, stop in ranges for n in range(first, stop)] == list(range(len(tokens)))
        for first, stop in ranges:
            assert stop - first == 1 or tokens[first:stop].sum() <= 20
