"""Rows of fixed length, against plain-Python packers; every id says its own place in the text."""

import itertools
import random

import datasets
import numpy as np
import pytest

from pipeline import packing, row_file
from pipeline.packing import Chunk
from pipeline.recipe import DataSection
from pipeline.row_file import RowFile, RowWriter

FILL = 999_999


def random_documents(source, count, longest):
    """Return documents whose ids are 0, 1, 2, ... over all of them."""
    lengths = [source.randint(1, longest) for _ in range(count)]
    ends = list(itertools.accumulate(lengths))
    return [list(range(end - length, end)) for length, end in zip(lengths, ends, strict=True)]


def chunk_of(documents):
    starts = list(itertools.accumulate(map(len, documents), initial=0))[:-1]
    ids = np.array([i for document in documents for i in document], np.int32)
    return Chunk(ids, np.array(starts, np.int64))


def between_documents(source, documents):
    """Return chunks of one or several whole documents."""
    chunks, first = [], 0
    while first < len(documents):
        stop = first + source.randint(1, 5)
        chunks.append(chunk_of(documents[first:stop]))
        first = stop
    return chunks


def anywhere(source, documents):
    """Return chunks cut at any place, also within documents."""
    whole = chunk_of(documents)
    count = min(len(whole.ids), source.randint(0, 6))
    cuts = sorted(source.sample(range(len(whole.ids)), count))
    chunks = []
    for begin, stop in itertools.pairwise([0, *cuts, len(whole.ids)]):
        inside = whole.starts[(whole.starts >= begin) & (whole.starts < stop)]
        chunks.append(Chunk(whole.ids[begin:stop], inside - begin))
    return chunks


def listed(batches):
    """Return (ids, columns in which documents begin, tokens used) of each row."""
    rows = []
    for batch in batches:
        assert len(batch.offsets) == len(batch.ids) + 1 and len(batch.used) == len(batch.ids)
        assert batch.offsets[0] == 0 and batch.offsets[-1] == len(batch.starts)
        for number, ids in enumerate(batch.ids.tolist()):
            starts = batch.starts[batch.offsets[number] : batch.offsets[number + 1]].tolist()
            rows.append((ids, starts, int(batch.used[number])))
    return rows


def plain_windows(documents, block_size, stride, fill=None):
    stream = [i for document in documents for i in document]
    starts = {document[0] for document in documents}
    rows, place, covered = [], 0, 1  # a row has to bring something to predict
    while place + block_size <= len(stream):
        ids = stream[place : place + block_size]
        rows.append((ids, [k for k, i in enumerate(ids) if i in starts], block_size))
        covered = place + block_size
        place += stride
    if fill is not None and covered < len(stream):
        ids = stream[place:]
        begins = [k for k, i in enumerate(ids) if i in starts]
        rows.append((ids + [fill] * (block_size - len(ids)), begins, len(ids)))
    return rows


# -- windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [between_documents, anywhere])
@pytest.mark.parametrize("fill", [None, FILL])
@pytest.mark.parametrize("block_size", [2, 3, 8, 16])
def test_windows_are_those_of_the_plain_way_however_the_stream_comes(block_size, fill, cut):
    source = random.Random(block_size)
    for _ in range(100):
        documents = random_documents(source, source.randint(1, 12), source.choice([2, 9, 40]))
        stride = source.choice([block_size, block_size - 1, 1, source.randint(1, block_size)])
        expected = plain_windows(documents, block_size, stride, fill)
        found = packing.windows(cut(source, documents), block_size, stride=stride, fill=fill)
        assert listed(found) == expected


def test_rows_side_by_side_are_the_stream_less_its_last_partial_row():
    source = random.Random(0)
    for _ in range(100):
        documents = random_documents(source, source.randint(1, 20), 30)
        length = sum(map(len, documents))
        rows = listed(packing.windows(anywhere(source, documents), 8, stride=8))
        assert sum((ids for ids, _, _ in rows), []) == list(range(length - length % 8))
        assert {used for _, _, used in rows} <= {8}


@pytest.mark.parametrize("block_size", [2, 3, 8, 100])
def test_held_out_every_token_after_the_first_is_a_label_exactly_once(block_size):
    source = random.Random(block_size)
    for _ in range(100):
        documents = random_documents(source, source.randint(1, 20), 12)
        length = sum(map(len, documents))
        batches = packing.held_out(anywhere(source, documents), block_size, fill=FILL)
        rows = listed(batches)
        labels = [i for ids, _, used in rows for i in ids[1:used]]
        assert labels == list(range(1, length))
        assert len(rows) == -(-(length - 1) // (block_size - 1))
        assert all(used == block_size for _, _, used in rows[:-1])
        assert all(used >= 2 and set(ids[used:]) <= {FILL} for ids, _, used in rows)


@pytest.mark.parametrize("length, rows", [(0, 0), (1, 0), (2, 1), (8, 1), (9, 2), (15, 2), (16, 3)])
def test_held_out_rows_fill_up_the_last(length, rows):
    chunks = [Chunk(np.arange(10, 10 + length, dtype=np.uint16), np.zeros(1, np.int64))]
    found = listed(packing.held_out(chunks, 8, fill=3))
    assert len(found) == rows
    if rows:
        spread = found[0][0] + sum((ids[1:] for ids, _, _ in found[1:]), [])
        assert spread == [*range(10, 10 + length), *[3] * (rows * 7 + 1 - length)]


@pytest.mark.parametrize("fill", [None, FILL])
def test_of_nothing_there_is_no_row(fill):
    assert listed(packing.windows([], 8, stride=8, fill=fill)) == []
    assert listed(packing.best_fit([], 8, fill=FILL)) == []


# -- best fit -------------------------------------------------------------------------------------


def pieces_of(documents, block_size):
    """Return the pieces that documents are cut into: whole rows and a remainder."""
    return [
        document[start : start + block_size]
        for document in documents
        for start in range(0, len(document), block_size)
    ]


def plain_rooms(lengths, block_size):
    """Return the rooms that best fit decreasing leaves, by looking at all rows each time."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        room = min(fitting, default=block_size)
        if fitting:
            rooms.remove(room)
        rooms.append(room - length)
    return rooms


@pytest.mark.parametrize("together", [1, 50, 1 << 22])
@pytest.mark.parametrize("block_size", [2, 8, 16])
def test_best_fit_has_every_token_once_and_cuts_no_document_that_fits(
    block_size, together, monkeypatch
):
    monkeypatch.setattr(packing, "TOKENS_PLACED_TOGETHER", together)
    source = random.Random(block_size)
    for _ in range(60):
        documents = random_documents(source, source.randint(1, 25), source.choice([3, 12, 60]))
        chunks = between_documents(source, documents)
        batches = list(packing.best_fit(chunks, block_size, fill=FILL))
        found = []
        for ids, starts, used in listed(batches):
            assert len(ids) == block_size and 0 < used <= block_size
            assert set(ids[used:]) <= {FILL} and FILL not in ids[:used]  # only at the end
            assert starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < used
            found += [ids[a:b] for a, b in itertools.pairwise([*starts, used])]
        # The starts of pieces tell them apart, and the pieces are those of the documents.
        assert sorted(found) == pieces_of(documents, block_size)
        if together == 1 << 22:
            rooms = plain_rooms(map(len, found), block_size)
            assert sorted(block_size - used for _, _, used in listed(batches)) == sorted(rooms)


def test_a_document_that_comes_in_several_chunks_is_cut_at_whole_rows():
    """Where it is too large for memory twice, it comes in parts of whole rows."""
    ids = np.arange(83, dtype=np.int32)
    chunks = [
        Chunk(ids[:7], np.array([0, 3])),
        Chunk(ids[7:39], np.array([0])),
        Chunk(ids[39:55], np.array([], np.int64)),
        Chunk(ids[55:80], np.array([20])),
        Chunk(ids[80:], np.array([0])),
    ]
    rows = listed(packing.best_fit(chunks, 8, fill=FILL))
    documents = [list(range(a, b)) for a, b in itertools.pairwise([0, 3, 7, 75, 80, 83])]
    found = [i[a:b] for i, starts, used in rows for a, b in itertools.pairwise([*starts, used])]
    assert sorted(found) == pieces_of(documents, 8)


def test_each_piece_goes_where_it_leaves_the_least_room():
    source = random.Random(0)
    for _ in range(150):
        block_size = source.choice([1, 2, 7, 32])
        longest = source.randint(1, block_size)
        lengths = [source.randint(1, longest) for _ in range(source.randint(0, 40))]
        rows, columns = packing.place(np.array(lengths, np.int64), block_size)
        filled: dict[int, int] = {}
        for piece in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
            row, length = int(rows[piece]), lengths[piece]
            fitting = [used for used in filled.values() if used + length <= block_size]
            if fitting:
                assert filled[row] == max(fitting)  # the fullest that has room
            else:
                assert row == len(filled)  # a new one
            assert columns[piece] == filled.get(row, 0)
            filled[row] = filled.get(row, 0) + length
        assert max(filled.values(), default=0) <= block_size
        assert sorted(block_size - used for used in filled.values()) == sorted(
            plain_rooms(lengths, block_size)
        )


def test_little_is_left_empty():
    """What packing.py says of documents as long as those of the web."""
    lengths = np.random.default_rng(0).lognormal(6, 1, 10_000).astype(np.int64).clip(2, 1024)
    rows, _ = packing.place(lengths, 1024)
    assert 1 - lengths.sum() / ((rows.max() + 1) * 1024) < 0.001


# -- mixtures -------------------------------------------------------------------------------------


def mixed(weights, **values):
    sources = [
        {"files": ["x"]} if weight is None else {"files": ["x"], "weight": weight}
        for weight in weights
    ]
    return DataSection(sources=sources, **({"block_size": 10} | values))


@pytest.mark.parametrize(
    "rows, weights, tokens, taken",
    [
        ([5, 0, 7], [None, None, None], None, [5, 0, 7]),
        ([100, 100], [0.5, 0.5], None, [100, 100]),
        ([100, 100], [0.75, 0.25], None, [100, 33]),
        ([100, 100], [0.6, 0.4], None, [100, 67]),
        ([100, 900], [0.5, 0.5], None, [100, 100]),
        ([30, 100, 1000], [0.1, 0.2, 0.7], None, [30, 60, 210]),
        ([7, 3], [0.7, 0.3], None, [7, 3]),
        ([50, 100], [0, 1], None, [0, 100]),
        ([0, 100], [0, 1], None, [0, 100]),
        ([0, 100], [0.5, 0.5], None, [0, 0]),
        ([100, 100], [0.5, 0.5], 1000, [50, 50]),
        ([100, 100], [0.9, 0.1], 1000, [90, 10]),
        ([20, 100], [0.5, 0.5], 1000, [20, 50]),
        ([20, 30], [0.5, 0.5], 10**9, [20, 30]),
        ([0, 30], [0.5, 0.5], 200, [0, 10]),
        ([50, 100], [0, 1], 500, [0, 50]),
    ],
)
def test_what_a_mixture_takes_of_each_source(rows, weights, tokens, taken):
    values = {} if tokens is None else {"mixture_tokens": tokens}
    found = packing.mixture(rows, mixed(weights, **values))
    firsts = [sum(rows[:n]) for n in range(len(rows))]
    assert found == list(zip(firsts, rows, taken, strict=True))


def test_the_weights_are_kept_within_a_row():
    source = random.Random(0)
    for _ in range(200):
        parts = [source.random() for _ in range(source.randint(2, 5))]
        weights = [part / sum(parts) for part in parts]
        rows = [source.randint(1, 5000) for _ in weights]
        found = packing.mixture(rows, mixed(weights))
        total = sum(taken for _, _, taken in found)
        for (_, available, taken), weight in zip(found, weights, strict=True):
            rounding = 0.5 + weight * len(rows) / 2
            assert taken <= available and abs(taken - weight * total) <= rounding + 1e-6
        # ... and one source is used up, so no larger mixture would have kept them.
        assert any(taken == available for _, available, taken in found)


def test_rows_of_held_out_files_are_no_part_of_a_mixture():
    wanted = mixed([0.5, 0.5], validation_files=["v"])
    assert packing.mixture([10, 10, 99], wanted) == [(0, 10, 10), (10, 10, 10)]


# -- rows on disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize("per_batch", [1, 40, 1 << 22])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_rows_are_read_as_they_were_written(tmp_path, monkeypatch, per_batch, dtype):
    monkeypatch.setattr(row_file, "TOKENS_PER_RECORD_BATCH", per_batch)
    source = random.Random(per_batch)
    documents = random_documents(source, 60, 30)
    monkeypatch.setattr(packing, "TOKENS_PLACED_TOGETHER", 100)
    batches = list(packing.best_fit(between_documents(source, documents), 8, fill=9999))
    writer = RowWriter(tmp_path / "rows.arrow", block_size=8, dtype=np.dtype(dtype))
    for rows in batches:
        writer.write(rows)
    writer.close()
    expected = listed(batches)
    assert writer.count == len(expected) and writer.used == sum(map(len, documents))
    for file in (RowFile.open(tmp_path / "rows.arrow"), RowFile(batches)):
        assert len(file) == len(expected) and file.block_size == 8
        for index, (ids, starts, used) in enumerate(expected):
            found = file.row(index)
            assert (found[0].tolist(), found[1].tolist(), found[2]) == (ids, starts, used)
            pieces = [ids[a:b] for a, b in itertools.pairwise([*starts, used])]
            assert [piece.tolist() for piece in file.documents_of(index)] == pieces
    opened = datasets.Dataset.from_file(str(tmp_path / "rows.arrow"))
    assert opened.features["input_ids"].feature.dtype == np.dtype(dtype).name
    assert opened["input_ids"][:] == [ids for ids, _, _ in expected]
    assert opened["document_starts"][:] == [starts for _, starts, _ in expected]
    assert opened["tokens"][:] == [used for _, _, used in expected]


def test_a_row_that_begins_within_a_document_holds_its_rest_too(tmp_path):
    chunk = Chunk(np.arange(24), np.array([0, 11, 14]))
    file = RowFile(list(packing.windows([chunk], 8, stride=8)))
    parts = [[part.tolist() for part in file.documents_of(n)] for n in range(3)]
    assert parts == [
        [list(range(8))],
        [[8, 9, 10], [11, 12, 13], [14, 15]],
        [list(range(16, 24))],
    ]
