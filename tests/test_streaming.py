"""Streamed rows: the training text end to end, again from any bookmark, through a bounded ring."""

import contextlib
import itertools
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from pipeline import (
    preparation,
    raw_documents,
    sources,
    stream_beginning,
    streaming,
    text_files,
)
from pipeline import stream as stream_room
from pipeline.blocks import open_blocks
from pipeline.corpus import Corpus, split_of
from pipeline.preparation import prepare_blocks, stream_of
from pipeline.recipe import CleaningSection, DataSection, InputError
from pipeline.row_file import RowFile
from pipeline.row_order import permuted
from pipeline.row_tables import describe, show
from pipeline.stream import Source
from pipeline.streaming import Ring, producing

BLOCK, SEGMENT = 16, 32
START = {"pass": 0, "shard": 0, "document": 0, "token": 0}


def write_texts(folder, texts):
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
    return folder


def section_of(folder, **values):
    held = {"hold_out": "documents", "validation_fraction": 0.2, "test_fraction": 0.1}
    if "sources" not in values and "dataset" not in values:
        values["files"] = [str(folder)]
    return DataSection(**({"block_size": BLOCK, "streaming": True} | held | values))


@pytest.fixture
def make(tokenizer, monkeypatch):
    """Return streams of segments of 32 rows, over shards of about 2 kB."""

    def stream(folder, *, seed=0, rules=None, rows=SEGMENT, shard_bytes=2000, **values):
        monkeypatch.setattr(sources, "SHARD_BYTES", (shard_bytes, shard_bytes))
        section, rules = section_of(folder, **values), CleaningSection(**(rules or {}))
        monkeypatch.setattr(preparation, "TOKENS_PER_SEGMENT", rows * section.block_size)
        corpus = Corpus(section, rules)
        options = {"cleaning": rules, "rows_per_update": 1, "seed": seed}
        return stream_of(section, corpus, tokenizer, **options)

    return stream


@pytest.fixture
def varied(tmp_path, texts):
    """A folder of documents of all lengths, some empty, some longer than several rows."""
    source = random.Random(1)
    found = ["", "x", *texts[:12], "", "".join(texts[12:24]), "the end", texts[0][:15], texts[30]]
    found += ["a " * count for count in range(1, 40, 3)]
    source.shuffle(found)
    return write_texts(tmp_path / "varied", found)


def training_texts(stream, shard, rules=None):
    """The training documents of a shard of files, each file one, read the plain way."""
    rules = rules or CleaningSection()
    texts = [open(path, encoding="utf-8").read() for _, path in shard.files]
    longest = rules.longest or 10**9
    texts = [text for text in texts if rules.shortest <= len(text) <= longest]
    return [text for text in texts if split_of(text, stream.work.reader.section) == "train"]


def endless(stream, tokenizer, number=0, rules=None):
    """Yield (id, whether a document begins there) of one source, pass after pass, for ever."""
    shards = stream.shards[number]
    for n_pass in itertools.count():
        for shard in permuted(np.arange(len(shards)), len(shards), stream.seed, n_pass):
            for text in training_texts(stream, shards[shard], rules):
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                yield from ((id_, place == 0) for place, id_ in enumerate(ids))
                yield tokenizer.eos_token_id, False


def expected_rows(stream, tokenizer, count, **options):
    """The first rows as (ids, columns in which documents begin)."""
    size = stream.block_size
    ids = list(itertools.islice(endless(stream, tokenizer, **options), count * size))
    rows = [ids[place : place + size] for place in range(0, len(ids), size)]
    return [([i for i, _ in row], [c for c, (_, b) in enumerate(row) if b]) for row in rows]


def listed(rows):
    """Rows as (ids, columns in which documents begin)."""
    count = len(rows.ids)
    found = [RowFile([rows]).row(number) for number in range(count)] if count else []
    return [(ids.tolist(), starts.tolist()) for ids, starts, _ in found]


def rows_in_a_pass(stream, tokenizer, number=0):
    texts = [t for shard in stream.shards[number] for t in training_texts(stream, shard)]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return sum(len(one) + 1 for one in ids) // stream.block_size


# -- the rows of a source -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize(("window", "characters"), [(1 << 20, 1 << 18), (40, 1), (120, 300)])
def test_the_rows_are_the_training_text_end_to_end_pass_after_pass(
    make, varied, tokenizer, monkeypatch, window, characters, seed
):
    monkeypatch.setattr(text_files, "WINDOW", window)
    monkeypatch.setattr(stream_room, "CHARACTERS_AT_ONCE", characters)
    stream = make(varied, seed=seed)
    assert len(stream.shards[0]) > 3
    count = int(2.5 * rows_in_a_pass(stream, tokenizer))
    found = Source(stream, 0, START).take(count)
    assert listed(found) == expected_rows(stream, tokenizer, count)
    assert found.used.tolist() == [BLOCK] * count and found.ids.dtype == np.uint16


def test_each_pass_has_an_order_of_its_own(make, varied, tokenizer):
    stream = make(varied)
    orders = [permuted(np.arange(6), 6, stream.seed, n).tolist() for n in range(4)]
    assert len(set(map(tuple, orders))) > 1
    count = rows_in_a_pass(stream, tokenizer)
    rows = Source(stream, 0, START).take(3 * count).ids.ravel()
    assert not np.array_equal(rows[: count * BLOCK], rows[count * BLOCK : 2 * count * BLOCK])


@pytest.mark.parametrize("seed", range(4))
def test_rows_taken_in_pieces_of_any_size_are_the_same(make, varied, monkeypatch, seed):
    monkeypatch.setattr(stream_room, "CHARACTERS_AT_ONCE", 200)
    stream, dice = make(varied), random.Random(seed)
    expected = listed(Source(stream, 0, START).take(600))
    source, found = Source(stream, 0, START), []
    while len(found) < 600:
        found += listed(source.take(dice.choice([0, 1, 1, 2, 3, 17, 100])))
        if dice.random() < 0.5:
            source.bookmark()  # looking changes nothing
    assert found[:600] == expected


@pytest.mark.parametrize(("window", "characters"), [(1 << 20, 1 << 12), (40, 1), (90, 300)])
@pytest.mark.parametrize("size", [1, BLOCK])
def test_from_the_bookmark_of_any_row_the_next_rows_are_the_same(
    make, varied, tokenizer, monkeypatch, window, characters, size
):
    """With rows of one token, any token may be the first."""
    monkeypatch.setattr(text_files, "WINDOW", window)
    monkeypatch.setattr(stream_room, "CHARACTERS_AT_ONCE", characters)
    stream = make(varied)._replace(block_size=size)
    count = int(2.3 * rows_in_a_pass(stream, tokenizer))
    expected = listed(Source(stream, 0, START).take(count + 40))
    source, dice = Source(stream, 0, START), random.Random(0)
    marked = {*dice.sample(range(count), 24), *range(8)}
    passes = set()
    for place in range(count):
        if place in marked:
            mark = json.loads(json.dumps(source.bookmark()))
            assert sorted(mark) == sorted(START)
            passes.add(mark["pass"])
            again = Source(stream, 0, mark)
            assert listed(again.take(40)) == expected[place : place + 40], (place, mark)
        assert listed(source.take(1)) == expected[place : place + 1]
    assert passes == {0, 1, 2}


def test_a_document_longer_than_many_windows_has_a_bookmark_in_it(
    tmp_path, make, texts, tokenizer, monkeypatch
):
    folder = write_texts(tmp_path / "t", ["".join(texts)])
    monkeypatch.setattr(text_files, "WINDOW", 50)
    monkeypatch.setattr(stream_room, "CHARACTERS_AT_ONCE", 100)
    stream = make(folder, validation_fraction=1e-9, test_fraction=0)
    count = rows_in_a_pass(stream, tokenizer) + 5
    expected = expected_rows(stream, tokenizer, count)
    source = Source(stream, 0, START)
    for place in range(0, count - 1, 50):
        mark = source.bookmark()
        assert mark == {"pass": 0, "shard": 0, "document": 0, "token": place * BLOCK}
        assert listed(Source(stream, 0, mark).take(1)) == [expected[place]]
        source.take(50)


@pytest.mark.slow
@pytest.mark.parametrize("rules", [{"shortest": 300}, {"longest": 300}, {"shortest": 5}])
def test_what_is_too_short_or_too_long_is_not_streamed(make, varied, tokenizer, rules):
    stream = make(varied, rules=rules)
    found = listed(Source(stream, 0, START).take(150))
    rules = CleaningSection(**rules)
    assert found == expected_rows(stream, tokenizer, 150, rules=rules)


@pytest.mark.parametrize("rules", [{}, {"shortest": 400}, {"longest": 390}])
def test_where_the_ends_are_held_out_the_rows_are_those_prepared_beforehand(
    tmp_path, make, texts, tokenizer, rules
):
    """A document's length is that of the whole, not of the part that is trained on."""
    texts = ["the model reads " * 25, *texts[:10]]  # 400 characters, 320 of them for training
    folder = write_texts(tmp_path / "t", texts)
    values = {"hold_out": "tail", "validation_fraction": 0.1}
    stream = make(folder, rules=rules, shard_bytes=10**6, **values)
    assert len(stream.shards[0]) == 1  # so that the order is that of the files
    section, rules = section_of(folder, streaming=False, **values), CleaningSection(**rules)
    prepare_blocks(section, Corpus(section, rules), tokenizer, tmp_path / "b", cleaning=rules)
    rows = RowFile.open(tmp_path / "b" / "train.arrow")
    expected = [rows.row(number)[0].tolist() for number in range(len(rows))]
    assert Source(stream, 0, START).take(len(rows)).ids.tolist() == expected


@pytest.mark.parametrize("rules", [{"shortest": 10**6}, {}])
def test_a_stream_without_training_text_is_refused_and_does_not_search_for_ever(
    tmp_path, make, rules
):
    folder = write_texts(tmp_path / "t", ["", ""] if not rules else ["a text"])
    with contextlib.suppress(OSError):
        (folder / "001.txt").write_text("\ufeff")
    stream = make(folder, rules=rules, validation_fraction=1e-9, test_fraction=0)
    with pytest.raises(InputError, match="the stream has no training text: check data.files"):
        Source(stream, 0, START)


# -- several sources ------------------------------------------------------------------------------


def stream_of_weights(make, varied, weights, rows):
    return make(varied)._replace(weights=list(weights), rows_per_segment=rows)


@pytest.mark.parametrize("rows", [1, 7, 32, 4096])
@pytest.mark.parametrize(
    "weights", [(1.0,), (0.5, 0.5), (0.7, 0.3), (1 / 3, 1 / 3, 1 / 3), (0, 1), (0.001, 0.999)]
)
def test_segments_are_shared_by_weight(make, varied, weights, rows):
    """However small a weight, over the run its share comes: rounding is not the same each time."""
    stream = stream_of_weights(make, varied, weights, rows)
    totals = [0] * len(weights)
    for segment in range(40_000 // rows if rows < 4096 else 10):
        shares = stream.rows_of(segment)
        assert sum(shares) == rows and min(shares) >= 0
        totals = [total + share for total, share in zip(totals, shares, strict=True)]
    for total, weight in zip(totals, weights, strict=True):
        assert abs(total - weight * sum(totals)) < 10 and (weight or not total)


@pytest.fixture
def two(tmp_path, texts, monkeypatch):
    """The values of a section with two sources."""
    one, other = write_texts(tmp_path / "1", texts[:25]), write_texts(tmp_path / "2", texts[25:])
    return {
        "sources": [
            {"files": [str(one)], "weight": 0.7, "name": "one"},
            {"files": [str(other)], "weight": 0.3, "name": "other"},
        ]
    }


def test_each_source_gives_its_own_text(make, two, tokenizer):
    stream = make(None, **two)
    assert [len(shards) > 1 for shards in stream.shards] == [True, True]
    for number in (0, 1):
        found = Source(stream, number, START).take(200)
        assert listed(found) == expected_rows(stream, tokenizer, 200, number=number)


# -- the producer, without a process of its own ---------------------------------------------------


class Enough(Exception):
    pass


@pytest.fixture
def produce(monkeypatch):
    """Make segments up to `last` as if a reader who began at `first` had asked for each in turn."""

    def run(stream, folder, first, last):
        folder.mkdir(exist_ok=True)

        def wanted(folder):
            made = [int(p.stem.split("-")[1]) for p in folder.glob("segment-*.arrow")]
            if made and max(made) >= last:
                raise Enough
            return max([first, *made])

        monkeypatch.setattr(streaming, "_wanted", wanted)
        monkeypatch.setattr(streaming, "end_with", lambda parent: None)
        with contextlib.suppress(Enough):
            streaming._produce(stream, folder, 0)

    return run


def rows_on_disk(folder, segment):
    rows = RowFile.open(folder / f"segment-{segment:09}.arrow")
    return [rows.row(number)[0].tolist() for number in range(len(rows))]


def segments_made(folder, *segments):
    return [rows_on_disk(folder, segment) for segment in segments]


def test_a_segment_holds_the_share_of_each_source_in_turn(tmp_path, make, two, produce, tokenizer):
    stream = make(None, **two)
    produce(stream, tmp_path / "ring", 0, 3)
    expected = []
    for number in (0, 1):
        shares = [stream.rows_of(segment)[number] for segment in range(4)]
        rows = [ids for ids, _ in expected_rows(stream, tokenizer, sum(shares), number=number)]
        places = [0, *itertools.accumulate(shares)]
        expected.append([rows[one:other] for one, other in itertools.pairwise(places)])
    for segment in (2, 3):  # the others were used and are gone
        assert rows_on_disk(tmp_path / "ring", segment) == sum((e[segment] for e in expected), [])


@pytest.mark.parametrize("what", ["kept", "torn", "torn within", "deleted", "empty"])
def test_any_segment_is_made_again_with_bookmarks_or_without(tmp_path, make, two, produce, what):
    stream, folder = make(None, **two), tmp_path / "ring"
    produce(stream, folder, 0, 6)
    expected = segments_made(folder, 5, 6)
    bookmarks = folder / "bookmarks.jsonl"
    lines = bookmarks.read_text().splitlines()
    assert [json.loads(line).get("segment") for line in lines] == [None, *range(7)]
    for path in folder.glob("segment-*"):
        path.unlink()
    if what == "deleted":
        shutil.rmtree(folder)
    elif what == "empty":
        bookmarks.write_text("")
    elif what == "torn":
        bookmarks.write_text("\n".join(lines)[:-20])
    elif what == "torn within":  # and written on after that
        bookmarks.write_text("\n".join([*lines[:3], lines[3][:9] + lines[4], *lines[5:-2]]))
    made_from = []
    begun = streaming.Source.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            streaming.Source, "__init__",
            lambda self, *args: made_from.append(args[2]) or begun(self, *args),
        )  # fmt: skip
        produce(stream, folder, 6, 6)
    assert segments_made(folder, 5, 6) == expected
    from_the_start = what in ("deleted", "empty")
    assert (made_from == [START, START]) == from_the_start
    if what == "kept":
        assert made_from == json.loads(lines[6])["sources"]
    kept = streaming._read_bookmarks(folder, stream.identity)
    assert 6 in kept and kept[6] == json.loads(lines[7])["sources"]


def test_bookmarks_are_written_once(tmp_path, make, varied, produce):
    stream, folder = make(varied), tmp_path / "ring"
    produce(stream, folder, 0, 3)
    before = (folder / "bookmarks.jsonl").read_text()
    produce(stream, folder, 3, 4)
    after = (folder / "bookmarks.jsonl").read_text()
    assert after.startswith(before) and len(after.splitlines()) == 1 + 5


def test_bookmarks_of_another_stream_are_none(tmp_path, make, varied, produce):
    """Also where the line that says whose they are was cut off."""
    stream, other = make(varied), make(varied, seed=1)
    assert stream.identity != other.identity
    produce(stream, tmp_path, 0, 2)
    path = tmp_path / "bookmarks.jsonl"
    assert len(streaming._read_bookmarks(tmp_path, stream.identity)) == 3
    assert streaming._read_bookmarks(tmp_path, other.identity) is None
    text = path.read_text()
    for torn in (text[5:], text[:10] + text[text.index("\n") + 1 :]):
        path.write_text(torn)
        assert streaming._read_bookmarks(tmp_path, other.identity) is None


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1}, {"rows": 2 * SEGMENT}, {"block_size": 32}, {"validation_fraction": 0.3},
        {"rules": {"shortest": 10}}, {"shard_bytes": 3000},
    ],
)  # fmt: skip
def test_whatever_changes_the_rows_changes_the_identity(make, varied, change):
    stream = make(varied)
    assert stream.identity == make(varied).identity != make(varied, **change).identity


@pytest.mark.slow
def test_a_stream_can_be_sent_and_its_producer_needs_no_torch(make, varied, tmp_path):
    stream = make(varied)
    (tmp_path / "stream").write_bytes(pickle.dumps(stream))
    code = (
        "import pickle, sys, pipeline.streaming as s;"
        f"stream = pickle.load(open({str(tmp_path / 'stream')!r}, 'rb'));"
        "s.Source(stream, 0, dict.fromkeys(['pass', 'shard', 'document', 'token'], 0)).take(9);"
        "print('torch' in sys.modules, 'transformers' in sys.modules, stream.identity)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False", stream.identity]


# -- the ring -------------------------------------------------------------------------------------


def expected_ring(stream, tokenizer, segments):
    """The rows of the ring by their place: those of each segment in an order of its own."""
    rows = [ids for ids, _ in expected_rows(stream, tokenizer, segments * SEGMENT)]
    found = []
    for segment in range(segments):
        order = permuted(np.arange(SEGMENT), SEGMENT, stream.seed, segment)
        found += [rows[segment * SEGMENT + place] for place in order]
    return found


def producer_of(folder):
    return int(re.findall(r"\d+", (folder / "producer").read_text())[-1])


def is_gone(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def wait_until(is_so, seconds=10):
    end = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end:
        time.sleep(0.02)
    return is_so()


@contextlib.contextmanager
def at_most(seconds):
    """Fail instead of waiting for ever."""

    def give_up(*_):
        raise TimeoutError(f"it still waits after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
def test_the_ring_gives_shuffled_segments_and_stays_small(tmp_path, make, varied, tokenizer):
    """Thousands of rows pass through a handful of files; then nothing but bookmarks is left."""
    stream, folder = make(varied), tmp_path / "ring"
    expected = expected_ring(stream, tokenizer, 100)
    ring = Ring(stream, folder, length=len(expected))
    assert len(ring) == 3200 and ring.block_size == BLOCK
    most, found = 0, []
    with at_most(20), producing(stream, folder, is_main_process=True):
        producer = producer_of(folder)
        for place in range(len(expected)):
            ids, starts, used = ring.row(place)
            found.append(ids.tolist())
            assert used == BLOCK and len(starts) <= BLOCK
            most = max(most, len(list(folder.glob("*segment-*"))))
        assert found[-1] == ring.row(len(expected) - 1)[0].tolist()
        assert ring.row(len(expected) - SEGMENT - 1)[0].tolist() == found[-SEGMENT - 1]
    assert found == expected
    assert 2 <= most <= streaming.SEGMENTS_AHEAD + 3
    assert [path.name for path in folder.iterdir()] == ["bookmarks.jsonl"] and is_gone(producer)

    # Again from the middle, with what a killed run leaves behind: other segments, a wish, a report.
    for name in ("segment-000000050.arrow", "_segment-000000051.arrow", "failed.txt", "wanted"):
        (folder / name).write_text("99999999")
    again = Ring(stream, folder, length=len(expected))
    with at_most(20), producing(stream, folder, is_main_process=True):
        places = range(50 * SEGMENT - 9, 52 * SEGMENT)
        assert [again.row(place)[0].tolist() for place in places] == expected[places.start :][
            : len(places)
        ]
        # Two processes are never a whole segment apart, but either may be first.
        third = Ring(stream, folder, length=len(expected))
        assert third.row(50 * SEGMENT)[0].tolist() == expected[50 * SEGMENT]


@pytest.mark.slow
def test_bookmarks_of_another_stream_are_thrown_away(tmp_path, make, varied, produce, tokenizer):
    other, stream, folder = make(varied, seed=1), make(varied), tmp_path / "ring"
    produce(other, folder, 0, 3)
    ring = Ring(stream, folder, length=999)
    with at_most(20), producing(stream, folder, is_main_process=True):
        assert ring.row(2 * SEGMENT)[0].tolist() == expected_ring(stream, tokenizer, 3)[-SEGMENT]
    first = json.loads((folder / "bookmarks.jsonl").read_text().splitlines()[0])
    assert first == {"stream": stream.identity}


def test_without_a_stream_or_in_another_process_nothing_happens(tmp_path, make, varied):
    for stream, is_main in [(None, True), (None, False), (make(varied), False)]:
        with producing(stream, tmp_path / "ring", is_main_process=is_main):
            assert not (tmp_path / "ring").exists()


@pytest.mark.parametrize("when", ["before the first row", "between rows"])
def test_a_producer_that_was_killed_is_noticed(tmp_path, make, varied, when):
    """It stays a zombie of this process, which has a process id like any other."""
    stream, folder = make(varied), tmp_path / "ring"
    ring = Ring(stream, folder, length=9999)
    with at_most(20), producing(stream, folder, is_main_process=True):
        if when == "between rows":
            ring.row(0)
        os.kill(producer_of(folder), signal.SIGKILL)
        with pytest.raises(InputError, match="the process that encodes the stream is gone"):
            for place in range(9999):
                ring.row(place)
    assert [p.name for p in folder.iterdir() if p.name != "bookmarks.jsonl"] == []


def test_text_that_cannot_be_read_reaches_the_reader_as_a_sentence(tmp_path, make, texts):
    """What came before it can still be read."""
    folder = write_texts(tmp_path / "t", [text * 40 for text in texts])
    stream, ring = make(folder), tmp_path / "ring"
    shards = stream.shards[0]
    order = permuted(np.arange(len(shards)), len(shards), stream.seed, 0)
    bad = shards[order[-1]].files[0][1]
    with open(bad, "rb+") as file:
        file.seek(5)
        file.write(b"\xff")
    rows = Ring(stream, ring, length=9999)
    place = -1
    with at_most(20):
        with pytest.raises(InputError) as caught, producing(stream, ring, is_main_process=True):
            for place in range(9999):
                rows.row(place)
    assert place >= SEGMENT
    assert str(caught.value).startswith(f"{bad}: byte 0xff at offset 5 is not UTF-8; convert")


def test_a_folder_that_cannot_be_written_reaches_the_reader_as_a_sentence(
    tmp_path, make, varied, produce, monkeypatch
):
    def full(*_):
        raise OSError(28, "No space left on device")

    stream = make(varied)
    monkeypatch.setattr(streaming, "_write", full)
    produce(stream, tmp_path, 0, 1)
    with pytest.raises(InputError, match="the stream stopped .OSError: .*No space left"):
        Ring(stream, tmp_path, length=99).row(0)


SCRIPT = """
import os, pickle, signal, sys, time
from pathlib import Path
from pipeline.streaming import Ring, producing

if __name__ == "__main__":
    folder, stream = Path(sys.argv[1]), pickle.loads(Path(sys.argv[2]).read_bytes())
    with producing(stream, folder, is_main_process=True):
        row = Ring(stream, folder, length=99).row(0)
        print((folder / "producer").read_text(), flush=True)
        if sys.argv[3] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
"""


def started(tmp_path, stream, how):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "stream").write_bytes(pickle.dumps(stream))
    command = [tmp_path / "script.py", tmp_path / "ring", tmp_path / "stream", how]
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_the_producer_ends_when_its_parent_is_killed(tmp_path, make, varied):
    victim = started(tmp_path, make(varied), "kill")
    producer = int(re.findall(r"\d+", victim.stdout.readline())[-1])
    victim.communicate(timeout=30)
    assert victim.returncode == -signal.SIGKILL
    assert wait_until(lambda: is_gone(producer))
    assert (tmp_path / "ring" / "segment-000000000.arrow").exists()  # nobody could remove it


@pytest.mark.slow
def test_interrupted_by_ctrl_c_the_producer_says_nothing(tmp_path, make, varied):
    """A terminal sends the signal to both, and the parent ends the other in its own time."""
    victim = started(tmp_path, make(varied), "wait")
    producer = int(re.findall(r"\d+", victim.stdout.readline())[-1])
    os.kill(producer, signal.SIGINT)
    time.sleep(0.3)
    assert not is_gone(producer)
    os.killpg(victim.pid, signal.SIGINT)
    said = victim.communicate(timeout=30)[1]
    assert wait_until(lambda: is_gone(producer))
    assert said.count("Traceback") == 1 and "_produce" not in said  # the script's own
    assert [p.name for p in (tmp_path / "ring").iterdir()] == ["bookmarks.jsonl"]


# -- data sets of the Hub -------------------------------------------------------------------------


def write_data_set(folder, texts, kind):
    folder.mkdir()
    for number in range(3):
        part = texts[number::3]
        if kind == "parquet":
            pq.write_table(pa.table({"text": part}), folder / f"train-{number}.parquet")
        else:
            lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
            (folder / f"train-{number}.jsonl").write_text(lines)
    return folder


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_data_set_is_the_same_streamed_and_whole(
    tmp_path, make, texts, tokenizer, kind, monkeypatch
):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    raw_documents.load_hub.cache_clear()
    folder = write_data_set(tmp_path / "set", texts, kind)
    stream = make(None, dataset=str(folder))
    assert [shard.kind for shard in stream.shards[0]] == ["hub_stream"] * 3
    read = [list(stream.work.reader.documents(shard)) for shard in stream.shards[0]]
    whole = Corpus(section_of(None, dataset=str(folder), streaming=False))
    expected = [(d.text, d.split) for shard in whole.shards for d in whole.reader.documents(shard)]
    assert [(d.text, d.split) for part in read for d in part] == expected
    assert sorted(text for text, _ in expected) == sorted(texts)
    # And so are its rows, from anywhere.
    order = permuted(np.arange(3), 3, 0, 0)
    train = [d.text for n in order for d in read[n] if d.split == "train"]
    ids = [i for t in tokenizer(train, add_special_tokens=False)["input_ids"] for i in [*t, 0]]
    source = Source(stream, 0, START)
    count = len(ids) // BLOCK
    found = source.take(count - 3).ids.ravel().tolist()
    mark = source.bookmark()
    assert found == ids[: len(found)] and mark["pass"] == 0
    rest = Source(stream, 0, mark).take(3).ids
    assert rest.ravel().tolist() == ids[len(found) : count * BLOCK]
    assert np.array_equal(source.take(3).ids, rest)


# -- what is held out, and the door ---------------------------------------------------------------


def prepared(tokenizer, folder, section, rules=None):
    rules = CleaningSection(**(rules or {}))
    prepare_blocks(section, Corpus(section, rules), tokenizer, folder, cleaning=rules)
    return folder


@pytest.mark.parametrize("rules", [{}, {"shortest": 300, "longest": 700}])
@pytest.mark.parametrize("hold_out", ["documents", "tail"])
def test_held_out_rows_are_those_of_a_corpus_read_whole(
    tmp_path, texts, tokenizer, hold_out, rules
):
    folder = write_texts(tmp_path / "t", ["", *texts])
    for streamed in (True, False):
        section = section_of(folder, streaming=streamed, hold_out=hold_out)
        prepared(tokenizer, tmp_path / f"{streamed}", section, rules)
    for split in ("validation", "test"):
        one, other = (RowFile.open(tmp_path / f"{s}" / f"{split}.arrow") for s in (True, False))
        assert len(one) == len(other)
        for number in range(len(one)):
            assert one.row(number)[0].tolist() == other.row(number)[0].tolist()
            assert one.row(number)[1].tolist() == other.row(number)[1].tolist()
    facts = [
        json.loads((tmp_path / f"{s}" / "manifest.json").read_text())["facts"]
        for s in (True, False)
    ]
    for split in ("validation", "test"):
        for name in ("documents", "bytes", "tokens", "rows", "first_token_bytes"):
            assert facts[0][split][name] == facts[1][split][name], (split, name)


def test_nothing_held_out_is_ever_trained_on(tmp_path, make, texts, tokenizer):
    """Also what lies beyond the bytes that are looked through for held-out text."""
    folder = write_texts(tmp_path / "t", texts)
    section = section_of(folder, held_out_from_bytes=6000)
    prepared(tokenizer, tmp_path / "b", section)
    stream = make(folder, held_out_from_bytes=6000)
    rows = Source(stream, 0, START).take(2 * rows_in_a_pass(stream, tokenizer))
    said = tokenizer.decode(rows.ids.ravel())
    held = [text for text in texts if split_of(text, section) != "train"]
    assert len(held) > 5 and not any(text in said for text in held)
    facts = json.loads((tmp_path / "b" / "manifest.json").read_text())["facts"]
    assert 0 < facts["validation"]["documents"] + facts["test"]["documents"] < len(held)
    assert "validation" in describe(tmp_path / "b", section)


def test_rows_that_are_not_made_yet_cannot_be_shown(tmp_path, varied, tokenizer):
    section = section_of(varied)
    prepared(tokenizer, tmp_path / "b", section)
    assert show(tmp_path / "b", tokenizer, 3).startswith("--- row 0: ")  # of the validation text


def test_other_machines_prepare_nothing_of_a_stream(tmp_path, varied, tokenizer, monkeypatch):
    """What they would tokenise beforehand is larger than the disk."""
    monkeypatch.setattr(sources, "SHARD_BYTES", (1000, 1000))
    section = section_of(varied)
    corpus = Corpus(section)
    prepare_blocks(section, corpus, tokenizer, tmp_path / "b", rank=1, world_size=2)
    assert [path.name for path in tmp_path.rglob("*.bin")] == []


def test_a_stream_whose_first_document_is_held_out_has_bytes_per_token(
    tmp_path, varied, tokenizer, make
):
    """It may be as long as what is looked through."""
    text = "a first document that is held out, "
    section = section_of(varied, held_out_from_bytes=1)
    number = next(n for n in range(999) if split_of(text * n, section) == "validation")
    (varied / "000.txt").write_text(text * number)
    prepared(tokenizer, tmp_path / "b", section)
    stream = make(varied, held_out_from_bytes=1)
    options = {"ring": tmp_path / "ring", "length": 99}
    train = open_blocks(tmp_path / "b", section, stream=stream, **options)["train"]
    assert train.is_stream and train.bytes / train.tokens > 1


def test_text_given_as_held_out_may_not_be_streamed(tmp_path, texts, tokenizer, make):
    folder = write_texts(tmp_path / "t", texts)
    given = {"validation_files": [str(folder / "003.txt")]}
    with pytest.raises(InputError, match=r"003\.txt: this training document is also held-out text"):
        prepared(tokenizer, tmp_path / "b", section_of(folder, **given))
    # Beyond the beginning that is looked through, the stream itself finds it.
    values = {"validation_files": [str(folder / "039.txt")], "held_out_from_bytes": 1000}
    prepared(tokenizer, tmp_path / "c", section_of(folder, **values))
    known = (tmp_path / "c" / stream_beginning.GIVEN).read_text().split()
    stream = make(folder, **values)._replace(held_out=frozenset(map(bytes.fromhex, known)))
    assert len(known) == 1
    with pytest.raises(InputError, match=r"039\.txt: this training document is also held-out"):
        Source(stream, 0, START).take(2000)


def test_copies_of_held_out_text_are_left_out_of_a_stream(tmp_path, texts, tokenizer, make):
    """The remedy that the sentence names."""
    folder = write_texts(tmp_path / "t", texts)
    values, rules = {"validation_files": [str(folder / "003.txt")]}, {"decontaminate": "copies"}
    prepared(tokenizer, tmp_path / "b", section_of(folder, **values), rules)
    known = (tmp_path / "b" / stream_beginning.GIVEN).read_text().split()
    stream = make(folder, rules=rules, **values)
    stream = stream._replace(held_out=frozenset(map(bytes.fromhex, known)))
    rows = Source(stream, 0, START).take(2 * rows_in_a_pass(stream, tokenizer))
    assert texts[3] not in tokenizer.decode(rows.ids.ravel())


def test_a_streamed_folder_that_changed_is_another_text(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text('{"text": "one"}\n' * 9)
    section = section_of(None, dataset=str(folder), hold_out="documents")
    before = Corpus(section).identity
    assert Corpus(section).identity == before
    (folder / "train.jsonl").write_text('{"text": "two"}\n' * 9)
    assert Corpus(section).identity != before
