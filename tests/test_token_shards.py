"""Shards of ids: the same however they are made, made once, whole or absent."""

import errno
import hashlib
import os
import random

import numpy as np
import pytest

from pipeline import sources, text_files, token_shards
from pipeline.corpus import SPLITS, Corpus, split_of
from pipeline.encoder import Encoder
from pipeline.recipe import CleaningSection, DataSection, InputError
from pipeline.token_shards import TABLE, Work, make_token_shards


@pytest.fixture
def small_shards(monkeypatch):
    """A shard for each file, and ranges of 2,000 bytes of a large one."""
    monkeypatch.setattr(sources, "SHARD_BYTES", (1, 1))


def folder_of(path, texts):
    path.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (path / f"{number:03}.txt").write_bytes(text.encode())
    return path


def corpus_of(*files, cleaning=None, **values):
    values = {"hold_out": "documents", "validation_fraction": 0.2, "test_fraction": 0.1} | values
    return Corpus(DataSection(files=[str(name) for name in files], **values), cleaning)


def work_of(corpus, tokenizer):
    content = tokenizer.backend_tokenizer.to_str()
    return Work(corpus.reader, Encoder(content), tokenizer.eos_token_id, "uint16")


def make(corpus, tokenizer, folder, *, mark="fingerprint", **values):
    values = {"tokenizer": mark, "num_proc": 1} | values
    return make_token_shards(corpus, lambda: work_of(corpus, tokenizer), folder, **values)


def contents(folder):
    """Return the bytes of all shards' files; the manifest lists them."""
    names = ("tokens.bin", "documents.bin", "names.jsonl")
    return {
        f"{shard.name}/{name}": (shard / name).read_bytes()
        for shard in sorted(folder.iterdir())
        for name in names
    }


def marks(folder):
    """Return what changes when a file is written again."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def remade(before, after):
    """Return the names of the shards of which a file was written again."""
    return {path.parent.name for path in before.keys() | after.keys()
            if before.get(path) != after.get(path)}  # fmt: skip


# -- what is in a shard ---------------------------------------------------------------------------


def check(shards, texts, tokenizer, section):
    """Compare tables and ids with what the texts must give."""
    place = 0
    for shard in shards:
        table, ids = shard.table, shard.tokens("uint16")
        assert table.dtype == TABLE and table["tokens"].sum() == len(ids)
        assert len(shard.names(range(len(shard.table)))) == len(table)
        ends = np.cumsum(table["tokens"])
        for row, stop in zip(table, ends, strict=True):
            text = texts[place]
            document = ids[stop - row["tokens"] : stop].tolist()
            assert document.pop() == tokenizer.eos_token_id
            assert document == tokenizer(text, add_special_tokens=False)["input_ids"]
            assert row["bytes"] == len(text.encode())
            assert row["digest"].tobytes() == hashlib.sha256(text.encode()).digest()[:16]
            assert SPLITS[row["split"]] == split_of(text, section)
            place += 1
    assert place == len(texts)


def test_tables_and_ids_say_what_the_documents_are(tmp_path, texts, tokenizer, small_shards):
    corpus = corpus_of(folder_of(tmp_path / "t", texts))
    shards = make(corpus, tokenizer, tmp_path / "s")
    assert len(shards) == len(texts)
    check(shards, texts, tokenizer, corpus.reader.section)
    assert len({row["split"] for shard in shards for row in shard.table}) == 3
    assert [shard.names(range(len(shard.table))) for shard in shards] == [
        [d.name] for d in corpus.documents()
    ]
    assert [shard.folder.name for shard in shards] == sorted(os.listdir(tmp_path / "s"))


@pytest.mark.parametrize("characters", [1, 100, 1 << 20])
def test_documents_in_windows_and_batches_are_the_same(
    tmp_path, texts, tokenizer, monkeypatch, characters
):
    texts = ["x", "".join(texts[:6]), "y", "".join(texts[6:9]), texts[9]]
    corpus = corpus_of(folder_of(tmp_path / "t", texts))
    monkeypatch.setattr(text_files, "WINDOW", 300)
    monkeypatch.setattr(token_shards, "CHARACTERS_PER_CALL", characters)
    check(make(corpus, tokenizer, tmp_path / "s"), texts, tokenizer, corpus.reader.section)


def test_given_files_and_tails_carry_their_split(tmp_path, texts, tokenizer):
    first = folder_of(tmp_path / "t", texts[:4])
    held = [str(folder_of(tmp_path / name, [texts[n]])) for n, name in [(5, "v"), (6, "w")]]
    corpus = corpus_of(first, validation_files=held[:1], test_files=held[1:])
    shards = make(corpus, tokenizer, tmp_path / "s")
    assert [shard.table["split"].tolist() for shard in shards] == [[0] * 4, [1], [2]]
    assert [shard.group for shard in shards] == [0, 1, 2]
    tail = make(corpus_of(first, hold_out="tail"), tokenizer, tmp_path / "tail")
    assert tail[0].table["split"].tolist() == [0, 1, 2] * 4
    whole = make(corpus_of(first), tokenizer, tmp_path / "whole")
    assert tail[0].table["bytes"].sum() == whole[0].table["bytes"].sum()


def test_what_is_left_out_is_counted(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(text_files, "WINDOW", 50)
    rows = tmp_path / "t.jsonl"
    long = "a long text " * 100
    written = ['""', "null", '"four"', '"fives"', '"a text of 20 letters"', f'"{long}"', '"éé東😀"']
    rows.write_text("".join(f'{{"text": {text}}}\n' for text in written))
    cleaning = CleaningSection(shortest=5, longest=20)
    shard = make(corpus_of(rows, cleaning=cleaning), tokenizer, tmp_path / "a")[0]
    assert shard.facts == {"encoder": "tokenizers", "empty": 2, "short": 2, "long": 1}
    assert shard.table["bytes"].tolist() == [5, 20]
    cleaning = CleaningSection(shortest=len(long), longest=len(long))
    shard = make(corpus_of(rows, cleaning=cleaning), tokenizer, tmp_path / "b")[0]
    assert shard.facts == {"encoder": "tokenizers", "empty": 2, "short": 4, "long": 0}
    assert shard.table["bytes"].tolist() == [len(long)]


def test_a_shard_of_nothing_is_a_shard(tmp_path, tokenizer, small_shards):
    corpus = corpus_of(folder_of(tmp_path / "t", ["\ufeff", "a"]))
    empty, one = make(corpus, tokenizer, tmp_path / "s")
    assert len(empty.table) == len(empty.tokens("uint16")) == len(empty.names([])) == 0
    assert empty.facts["empty"] == 1 and len(one.table) == 1


def test_tails_are_cut_from_documents_that_were_counted_and_measured(tmp_path, tokenizer):
    texts = ["", "x", "ten letter" * 100, "too long to be taken" * 100]
    cleaning = CleaningSection(shortest=500, longest=1900)
    corpus = corpus_of(folder_of(tmp_path / "t", texts), hold_out="tail", cleaning=cleaning)
    shard = make(corpus, tokenizer, tmp_path / "s")[0]
    assert shard.table["split"].tolist() == [0, 1, 2]
    assert {n: shard.facts[n] for n in ("empty", "short", "long")} == {
        "empty": 1, "short": 1, "long": 1
    }  # fmt: skip


@pytest.mark.parametrize("odd", ["\n", "\r", "\u2028", "\x0c", "\x85"])
def test_odd_names_are_one_name_each(tmp_path, tokenizer, odd):
    folder = folder_of(tmp_path / "t", ["a"])
    (folder / f"b{odd}c.txt").write_text("b")
    shard = make(corpus_of(folder), tokenizer, tmp_path / "s")[0]
    assert len(shard.names(range(len(shard.table)))) == len(shard.table) == 2


def test_a_name_that_is_not_utf8_is_read_or_refused(tmp_path, tokenizer):
    folder = folder_of(tmp_path / "t", ["a"])
    with open(os.fsencode(folder) + b"/caf\xe9.txt", "w") as file:
        file.write("b")
    try:
        shard = make(corpus_of(folder), tokenizer, tmp_path / "s")[0]
        assert len(shard.names(range(len(shard.table)))) == 2
    except InputError as error:
        assert "caf" in str(error)


# -- who makes them -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_one_and_by_two(tmp_path_factory, texts, tokenizer):
    """Folders of the same shards, and the environment before and after."""
    folder = tmp_path_factory.mktemp("shards")
    source = random.Random(0)
    rows = ["".join(source.choices(texts, k=source.randint(0, 3))) for _ in range(60)]
    (folder / "t.txt").write_text("<|endoftext|>".join(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "SHARD_BYTES", (9000, 9000))
        patch.setenv("TOKENIZERS_PARALLELISM", "true")
        corpus = corpus_of(folder / "t.txt", separator="<|endoftext|>")
        assert len(corpus.shards) > 4
        for number in (1, 2):
            make(corpus, tokenizer, folder / f"by-{number}", num_proc=number)
        return folder / "by-1", folder / "by-2", os.environ.get("TOKENIZERS_PARALLELISM")


def test_one_process_and_two_write_the_same_bytes(by_one_and_by_two):
    one, two, _ = by_one_and_by_two
    assert contents(one) == contents(two) != {}


def test_the_environment_is_as_before(by_one_and_by_two):
    assert by_one_and_by_two[2] == "true"


def test_machines_share_the_work_and_the_first_has_all(tmp_path, texts, tokenizer, small_shards):
    corpus = corpus_of(folder_of(tmp_path / "t", texts[:5]))
    make(corpus, tokenizer, tmp_path / "alone")
    second = make(corpus, tokenizer, tmp_path / "s", rank=1, world_size=2)
    assert [shard.folder.name for shard in second] == ["000001", "000003"]
    assert sorted(os.listdir(tmp_path / "s")) == ["000001", "000003"]
    before = marks(tmp_path / "s")
    first = make(corpus, tokenizer, tmp_path / "s", rank=0, world_size=2)
    assert [shard.folder.name for shard in first] == [f"{number:06}" for number in range(5)]
    assert contents(tmp_path / "s") == contents(tmp_path / "alone")
    assert before.items() <= marks(tmp_path / "s").items()


def test_the_first_machine_waits_for_the_others(
    tmp_path, texts, tokenizer, small_shards, monkeypatch
):
    corpus = corpus_of(folder_of(tmp_path / "t", texts[:3]))

    def sleep(seconds):
        make(corpus, tokenizer, tmp_path / "s", rank=1, world_size=2)

    monkeypatch.setattr(token_shards.time, "sleep", sleep)
    assert len(make(corpus, tokenizer, tmp_path / "s", rank=0, world_size=2)) == 3
    assert len(os.listdir(tmp_path / "s")) == 3


def test_the_first_machine_takes_no_shard_of_another_text(
    tmp_path, texts, tokenizer, small_shards, monkeypatch
):
    folder = folder_of(tmp_path / "t", texts[:2])
    make(corpus_of(folder), tokenizer, tmp_path / "s")
    folder_of(folder, [texts[0], texts[2]])
    corpus = corpus_of(folder)

    def sleep(seconds):
        make(corpus, tokenizer, tmp_path / "s", rank=1, world_size=2)

    monkeypatch.setattr(token_shards.time, "sleep", sleep)
    shards = make(corpus, tokenizer, tmp_path / "s", rank=0, world_size=2)
    assert shards[1].table["bytes"].tolist() == [len(texts[2].encode())]


def test_the_first_machine_ends_with_what_another_says(tmp_path, texts, tokenizer, small_shards):
    corpus = corpus_of(folder_of(tmp_path / "t", texts[:2]))
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "failed-1.txt").write_text("no room")
    with pytest.raises(InputError, match="^another machine stopped: no room$"):
        make(corpus, tokenizer, tmp_path / "s", rank=0, world_size=2)


# -- made once, whole or absent -------------------------------------------------------------------


def test_finished_shards_are_kept(tmp_path, texts, tokenizer, small_shards):
    corpus = corpus_of(folder_of(tmp_path / "t", texts[:4]))
    first = make(corpus, tokenizer, tmp_path / "s")
    before = marks(tmp_path / "s")
    again = make(corpus_of(tmp_path / "t"), tokenizer, tmp_path / "s")
    assert again == first and marks(tmp_path / "s") == before


@pytest.mark.parametrize("how", ["byte", "cut", "gone", "no manifest", "broken manifest"])
def test_a_damaged_shard_is_made_again_and_only_that(
    tmp_path, texts, tokenizer, small_shards, how
):  # fmt: skip
    corpus = corpus_of(folder_of(tmp_path / "t", texts[:4]))
    make(corpus, tokenizer, tmp_path / "s")
    right, before = contents(tmp_path / "s"), marks(tmp_path / "s")
    path = tmp_path / "s" / "000001" / ("manifest.json" if "manifest" in how else "tokens.bin")
    content = path.read_bytes()
    if how in ("gone", "no manifest"):
        path.unlink()
    else:
        path.write_bytes(content[:-2] + (b"xy" if how == "byte" else b""))
    make(corpus, tokenizer, tmp_path / "s")
    assert contents(tmp_path / "s") == right
    assert remade(before, marks(tmp_path / "s")) == {"000001"}
    assert sorted(os.listdir(tmp_path / "s")) == [f"{number:06}" for number in range(4)]


@pytest.mark.parametrize("change", ["text", "tokenizer", "shortest", "longest", "normalization"])
def test_a_shard_made_from_something_else_is_made_again(
    tmp_path, texts, tokenizer, small_shards, change
):
    folder = folder_of(tmp_path / "t", texts[:3])
    make(corpus_of(folder), tokenizer, tmp_path / "s")
    before = marks(tmp_path / "s")
    cleaning, mark = None, "fingerprint"
    if change == "text":
        folder_of(folder, texts[3:6])
    elif change == "tokenizer":
        mark = "another"
    else:
        value = {"shortest": 2, "longest": 10**6, "normalization": "NFC"}[change]
        cleaning = CleaningSection(**{change: value})
    corpus = corpus_of(folder, cleaning=cleaning)
    shards = make(corpus, tokenizer, tmp_path / "s", mark=mark)
    assert remade(before, marks(tmp_path / "s")) == {"000000", "000001", "000002"}
    wanted = texts[3:6] if change == "text" else texts[:3]
    check(shards, wanted, tokenizer, corpus.reader.section)


def test_a_shard_whose_text_is_the_same_is_kept_beside_one_that_changed(
    tmp_path, texts, tokenizer, small_shards
):
    folder = folder_of(tmp_path / "t", texts[:3])
    make(corpus_of(folder), tokenizer, tmp_path / "s")
    before = marks(tmp_path / "s")
    (folder / "001.txt").write_text(texts[9])
    make(corpus_of(folder), tokenizer, tmp_path / "s")
    assert remade(before, marks(tmp_path / "s")) == {"000001"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence_and_leaves_only_what_was_finished(
    tmp_path, texts, tokenizer, small_shards, monkeypatch, number
):
    corpus = corpus_of(folder_of(tmp_path / "t", texts[:3]))
    flush = token_shards._Batch.flush

    def full(batch):
        if "000001" in batch._table.name:
            batch._table.write(b"half")
            raise OSError(number, os.strerror(number))
        flush(batch)

    monkeypatch.setattr(token_shards._Batch, "flush", full)
    with pytest.raises(InputError) as caught:
        make(corpus, tokenizer, tmp_path / "s")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 's' / '000001'}: cannot be written, the disk is full")
    assert "make room there" in message and "\n" not in message
    assert os.listdir(tmp_path / "s") == ["000000"]
    before = marks(tmp_path / "s")
    monkeypatch.setattr(token_shards._Batch, "flush", flush)
    check(make(corpus, tokenizer, tmp_path / "s"), texts[:3], tokenizer, corpus.reader.section)
    assert before.items() <= marks(tmp_path / "s").items()


def test_a_document_that_cannot_be_read_leaves_no_half_shard(tmp_path, tokenizer, small_shards):
    folder = folder_of(tmp_path / "t", ["one", "two"])
    (folder / "001.txt").write_bytes(b"good and \xff bad")
    with pytest.raises(InputError, match=r"001\.txt: byte 0xff at offset 9 is not UTF-8"):
        make(corpus_of(folder), tokenizer, tmp_path / "s")
    assert os.listdir(tmp_path / "s") == ["000000"]
