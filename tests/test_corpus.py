"""Documents: which split they are in, in which order, and what tells one corpus from another."""

import hashlib
import json
import os
import random
import re
import time
import unicodedata

import datasets
import pytest

from pipeline import file_digests, text_files
from pipeline.corpus import Corpus, split_of
from pipeline.recipe import CleaningSection, DataSection


def section(files, **values):
    return DataSection(files=[str(name) for name in files], **values)


def write_texts(folder, texts):
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04}.txt").write_bytes(text.encode())
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def synthetic(count):
    source = random.Random(1)
    return ["".join(source.choices("abcdefg \n", k=source.randint(20, 80))) for _ in range(count)]


def texts_of(corpus):
    return [document.text for document in corpus.documents()]


# -- the split ------------------------------------------------------------------------------------


@pytest.mark.parametrize("validation, test", [(0.05, 0.05), (0.2, 0.1), (0.1, 0), (0.01, 0.1)])
def test_split_follows_the_hash_of_the_text_in_about_the_stated_shares(validation, test):
    wanted = section(["x"], validation_fraction=validation, test_fraction=test)
    texts = [f"synthetic document {number}" for number in range(4000)]
    splits = [split_of(text, wanted) for text in texts]
    for name, share in [("validation", validation), ("test", test)]:
        spread = (share * (1 - share) * 4000) ** 0.5
        assert abs(splits.count(name) - share * 4000) <= 4 * spread
    for text, split in zip(texts, splits, strict=True):
        number = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 16**16
        side = "test" if number < test else "validation" if number < test + validation else "train"
        assert split == side


def test_split_ignores_every_setting_but_the_two_shares():
    a = section(["x"], validation_fraction=0.3, test_fraction=0.2)
    b = section(["y", "z"], validation_fraction=0.3, test_fraction=0.2, block_size=77)
    texts = synthetic(300)
    assert [split_of(t, a) for t in texts] == [split_of(t, b) for t in texts]
    assert {split_of(t, a) for t in texts} == {"train", "validation", "test"}


def test_adding_documents_moves_none(tmp_path):
    texts = synthetic(200)
    shares = {"validation_fraction": 0.2, "test_fraction": 0.2}
    folder = write_texts(tmp_path / "t", texts[:120])
    before = {d.name: d.split for d in Corpus(section([folder], **shares)).documents()}
    write_texts(folder, texts)
    (folder / "00-first-of-all.txt").write_text("one more in front of the others")
    after = {d.name: d.split for d in Corpus(section([folder], **shares)).documents()}
    assert len(before) == 120 and len(after) == 201
    assert before == {name: after[name] for name in before}
    assert set(before.values()) == {"train", "validation", "test"}


def test_copies_land_on_one_side(tmp_path):
    texts = synthetic(120)
    a, b = write_texts(tmp_path / "a", texts), write_texts(tmp_path / "b", texts)
    table = write_rows(tmp_path / "c.jsonl", [{"text": text} for text in texts])
    corpus = Corpus(section([a, b, table], validation_fraction=0.3, test_fraction=0.2))
    sides = {}
    for document in corpus.documents():
        sides.setdefault(document.text, []).append(document.split)
    assert all(len(splits) == 3 and len(set(splits)) == 1 for splits in sides.values())
    assert {splits[0] for splits in sides.values()} == {"train", "validation", "test"}


@pytest.mark.parametrize("length", [1, 2, 9, 10, 11, 99, 100, 1000, 1003, 12345])
def test_tail_trains_on_exactly_the_first_nine_tenths(tmp_path, length):
    text = "".join(random.Random(length).choices("aé東😀\n", k=length))
    write_texts(tmp_path / "t", [text])
    wanted = section([tmp_path / "t"], hold_out="tail", validation_fraction=0.1, test_fraction=0)
    corpus = Corpus(wanted)
    pieces = {d.split: d.text for d in corpus.documents()}
    assert pieces.get("train", "") == text[: length * 9 // 10]
    assert pieces.get("train", "") + pieces.get("validation", "") == text
    assert "test" not in pieces


def test_tail_cuts_every_document_into_three_and_loses_nothing(tmp_path):
    texts = synthetic(30)
    write_texts(tmp_path / "t", texts)
    wanted = section(
        [tmp_path / "t"], hold_out="tail", validation_fraction=0.25, test_fraction=0.25
    )
    pieces = {}
    for document in Corpus(wanted).documents():
        pieces.setdefault(document.name, {})[document.split] = document.text
    assert len(pieces) == 30
    for cut, text in zip(pieces.values(), texts, strict=True):
        assert cut["train"] + cut["validation"] + cut["test"] == text
        assert len(cut["train"]) == len(text) // 2
        assert len(cut["test"]) == -(-len(text) // 4)


@pytest.mark.parametrize("count, choice", [(1, "tail"), (99, "tail"), (100, "documents")])
@pytest.mark.parametrize("kind", ["files", "table"])
def test_auto_holds_out_tails_below_a_hundred_documents(tmp_path, kind, count, choice):
    texts = synthetic(count)
    if kind == "files":
        source = write_texts(tmp_path / "t", texts)
    else:
        source = write_rows(tmp_path / "t.jsonl", [{"text": text} for text in texts])
    corpus = Corpus(section([source]))
    assert corpus.hold_out == choice
    assert corpus.identity["hold_out"] == choice


@pytest.mark.parametrize("choice", ["tail", "documents"])
def test_a_stated_hold_out_is_kept(tmp_path, choice):
    write_texts(tmp_path / "t", synthetic(3))
    assert Corpus(section([tmp_path / "t"], hold_out=choice)).hold_out == choice


def test_texts_are_the_documents_of_one_split(tmp_path):
    texts = synthetic(120)
    write_texts(tmp_path / "t", texts)
    corpus = Corpus(section([tmp_path / "t"], validation_fraction=0.3, test_fraction=0.2))
    found = {split: list(corpus.texts(split)) for split in ("train", "validation", "test")}
    assert sorted(sum(found.values(), [])) == sorted(texts)
    for split, members in found.items():
        assert members == [d.text for d in corpus.documents() if d.split == split] != []


# -- several sources, and files of their own for a split -------------------------------------------


def test_sources_come_in_their_order_and_by_their_names(tmp_path):
    write_texts(tmp_path / "b", ["b0", "b1"])
    rows = write_rows(tmp_path / "a.jsonl", [{"body": "a0"}, {"body": "a1"}])
    (tmp_path / "c.txt").write_text("c0;c1")
    wanted = DataSection(
        sources=[
            {"files": str(tmp_path / "b"), "name": "second letter"},
            {"files": str(rows), "text_column": "body"},
            {"files": str(tmp_path / "c.txt"), "separator": ";", "name": "pieces"},
        ],
        hold_out="documents",
    )
    corpus = Corpus(wanted)
    assert corpus.source_names() == ["second letter", str(rows), "pieces"]
    found = {}
    for shard in corpus.shards:
        texts = [document.text for document in corpus.reader.documents(shard)]
        found.setdefault(corpus.group_of(shard), []).extend(texts)
    assert found == {0: ["b0", "b1"], 1: ["a0", "a1"], 2: ["c0", "c1"]} and list(found) == [0, 1, 2]
    assert texts_of(corpus) == ["b0", "b1", "a0", "a1", "c0", "c1"]


@pytest.mark.parametrize("hold_out", ["documents", "tail"])
def test_given_files_are_their_split_and_no_document_of_the_sources_is(tmp_path, hold_out):
    texts = synthetic(300)
    write_texts(tmp_path / "train", texts[:200])
    rows = write_rows(tmp_path / "held.jsonl", [{"body": text} for text in texts[200:260]])
    more = write_rows(tmp_path / "last.jsonl", [{"body": text} for text in texts[260:]])
    first = {"files": str(tmp_path / "train"), "text_column": "body"}
    corpus = Corpus(
        DataSection(
            sources=[first], validation_files=[str(rows)], test_files=[str(more)], hold_out=hold_out
        )
    )
    assert {document.split for document in corpus.documents()} == {"train", "validation", "test"}
    assert sorted(corpus.texts("train")) == sorted(texts[:200])  # nothing is taken from it
    assert list(corpus.texts("validation")) == texts[200:260]
    assert list(corpus.texts("test")) == texts[260:]
    first, second, third = corpus.source_names()
    assert first == str(tmp_path / "train") and "validation" in second and "test" in third
    groups = [corpus.group_of(shard) for shard in corpus.shards]
    assert sorted(set(groups)) == [0, 1, 2] and groups == sorted(groups)


def test_a_split_without_files_is_still_taken_from_the_sources(tmp_path):
    texts = synthetic(300)
    write_texts(tmp_path / "train", texts[:250])
    write_texts(tmp_path / "held", texts[250:])
    wanted = section([tmp_path / "train"], test_fraction=0.2, hold_out="documents")
    alone = {d.name: d.split for d in Corpus(wanted).documents()}
    wanted = section(
        [tmp_path / "train"],
        test_fraction=0.2,
        hold_out="documents",
        validation_files=[str(tmp_path / "held")],
    )
    found = {d.name: d.split for d in Corpus(wanted).documents()}
    assert [name for name, split in found.items() if split == "test" and "train" in name] == [
        name for name, split in alone.items() if split == "test"
    ]
    assert {split for name, split in found.items() if "held" in name} == {"validation"}
    assert {split for name, split in found.items() if "held" not in name} == {"train", "test"}


def test_a_data_set_gives_its_own_splits(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts, folder = synthetic(150), tmp_path / "data"
    folder.mkdir()
    for split, part in [("train", texts[:130]), ("validation", texts[130:])]:
        write_rows(folder / f"{split}.jsonl", [{"text": text} for text in part])
    wanted = DataSection(dataset=str(folder), validation_split="validation", test_fraction=0.2)
    corpus = Corpus(wanted)
    assert list(corpus.texts("validation")) == texts[130:]
    assert set(corpus.texts("train")) | set(corpus.texts("test")) == set(texts[:130])
    assert "validation" in corpus.source_names()[1] and corpus.size == 0
    alone = Corpus(DataSection(dataset=str(folder), test_fraction=0.2))
    assert list(alone.texts("test")) == list(corpus.texts("test")) != []


# -- text -----------------------------------------------------------------------------------------


def test_empty_documents_are_passed_over(tmp_path):
    write_texts(tmp_path / "t", ["one", "", "\ufeff", "two"])
    rows = [{"text": "three"}, {"text": ""}, {"text": None}, {"text": "four"}]
    table = write_rows(tmp_path / "t.jsonl", rows)
    corpus = Corpus(section([tmp_path / "t", table], hold_out="documents"))
    assert texts_of(corpus) == ["one", "two", "three", "four"]


def test_the_standard_library_is_found_without_its_tests():
    corpus = Corpus(section(["python:stdlib"]))
    documents = {d.name: d for shard in corpus.shards for d in corpus.reader.documents(shard)}
    assert "json/decoder.py" in documents and "tempfile.py" in documents
    assert "class JSONDecoder" in documents["json/decoder.py"].text
    assert corpus.hold_out == "documents"
    folders = {part for name in documents for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages"}


def test_normalisation_brings_both_spellings_to_one_text_and_one_side(tmp_path):
    texts = [f"na\u00efve caf\u00e9 {text}" for text in synthetic(120)]
    for form in ("NFC", "NFD"):
        write_texts(tmp_path / form, [unicodedata.normalize(form, text) for text in texts])
    wanted = section(
        [tmp_path / "NFC", tmp_path / "NFD"], validation_fraction=0.3, test_fraction=0.2
    )

    def sides(cleaning):
        corpus, found = Corpus(wanted, cleaning), {}
        for document in corpus.documents():
            key = unicodedata.normalize("NFC", document.text)
            found.setdefault(key, []).append((document.text, document.split))
        return list(found.values())

    assert any(a[1] != b[1] for a, b in sides(None))
    for form in ("NFC", "NFD"):
        both = sides(CleaningSection(normalization=form))
        assert len(both) == 120 and all(a == b for a, b in both)
        assert all(unicodedata.is_normalized(form, text) for (text, _), _ in both)


def test_a_long_text_has_the_same_split_and_the_same_tail_in_windows(tmp_path, monkeypatch):
    texts = [text * 20 for text in synthetic(100)]
    write_texts(tmp_path / "t", texts)
    shares = {"validation_fraction": 0.3, "test_fraction": 0.2}
    wanted = [section([tmp_path / "t"], hold_out=h, **shares) for h in ("documents", "tail")]
    whole = [[(d.split, d.text) for d in Corpus(one).documents()] for one in wanted]
    monkeypatch.setattr(text_files, "WINDOW", 300)
    pieces = [[(d.split, d.text) for d in Corpus(one).documents()] for one in wanted]
    assert pieces == whole
    assert max(len(list(d.read())) for d in Corpus(wanted[0]).documents()) > 3


# -- order and fingerprint ------------------------------------------------------------------------


def test_order_is_the_same_each_time_and_not_that_of_the_disk(tmp_path):
    names = [f"{number:03}.txt" for number in range(50)]
    (tmp_path / "t").mkdir()
    for name in random.Random(3).sample(names, len(names)):
        (tmp_path / "t" / name).write_text(name)
    for source in [tmp_path / "t", tmp_path / "t" / "*.txt"]:
        wanted = section([source], hold_out="documents")
        first, second = (Corpus(wanted) for _ in range(2))
        assert [d.name for d in first.documents()] == [d.name for d in second.documents()]
        assert texts_of(first) == texts_of(second) == names


def test_fingerprint_is_the_contents_in_order(tmp_path):
    a, b = (write_texts(tmp_path / name, synthetic(5)) for name in "ab")
    write_texts(tmp_path / "c", synthetic(5)[::-1])
    first = Corpus(section([a])).fingerprint
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert first == Corpus(section([a])).fingerprint == Corpus(section([b])).fingerprint
    assert first != Corpus(section([tmp_path / "c"])).fingerprint


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv"])
def test_fingerprint_and_text_follow_content_of_the_same_size_and_time(tmp_path, suffix):
    path = tmp_path / f"t.{suffix}"
    contents = {
        "txt": "the word is {}\n",
        "jsonl": '{{"text": "the word is {}"}}\n',
        "csv": "text\nthe word is {}\n",
    }
    found = []
    for word in ["yes", "nay"]:
        path.write_text(contents[suffix].format(word))
        os.utime(path, ns=(10**18, 10**18))
        corpus = Corpus(section([path], hold_out="documents"))
        found.append((corpus.fingerprint, next(corpus.documents()).text.strip()))
    assert [text for _, text in found] == ["the word is yes", "the word is nay"]
    assert found[0][0] != found[1][0]


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_byte_or_the_order_of_files_changes_fingerprint_identity_and_shard(tmp_path, kind):
    a, b = tmp_path / f"a.{kind}", tmp_path / f"b.{kind}"
    for path, word in [(a, "one"), (b, "two")]:
        path.write_text(word if kind == "txt" else json.dumps({"text": word}))

    def marks(*files):
        corpus = Corpus(section(files, hold_out="documents"))
        shard = json.dumps(corpus.shard_identity(corpus.shards[0]))
        return corpus.fingerprint, json.dumps(corpus.identity), shard

    found = [marks(a, b), marks(b, a), marks(a)]
    a.write_bytes(a.read_bytes().replace(b"n", b"m"))
    found.append(marks(a, b))
    fingerprints, identities, shards = zip(*found, strict=True)
    assert len(set(fingerprints)) == len(set(identities)) == len(found)
    assert len({shards[0], shards[1], shards[3]}) == 3  # shards[2] is that of the same file a


def test_identity_changes_with_whatever_moves_a_text(tmp_path):
    write_texts(tmp_path / "t", synthetic(3))
    base = Corpus(section([tmp_path / "t"])).identity
    assert json.loads(json.dumps(base)) == base  # it is kept in a manifest
    held_out = str(tmp_path / "t" / "0000.txt")
    changes = [
        {"errors": "replace"},
        {"separator": "b"},
        {"join_rows": True},
        {"hold_out": "documents"},
        {"validation_fraction": 0.06},
        {"test_fraction": 0.06},
        {"validation_files": held_out},
        {"test_files": held_out},
    ]
    found = [Corpus(section([tmp_path / "t"], **change)).identity for change in changes]
    found.append(Corpus(section([tmp_path / "t"]), CleaningSection(normalization="NFC")).identity)
    assert len({json.dumps(identity) for identity in [base, *found]}) == len(found) + 1
    assert Corpus(section([tmp_path / "t"], block_size=99)).identity == base


def test_identity_tells_a_source_from_files_given_for_a_split(tmp_path):
    write_texts(tmp_path / "t", ["one", "two", "three"])
    a, b, c = (str(tmp_path / "t" / f"000{number}.txt") for number in range(3))
    rest = {"hold_out": "documents", "test_fraction": 0}
    first = Corpus(
        DataSection(sources=[{"files": [a]}, {"files": [b]}], validation_files=c, **rest)
    )
    second = Corpus(DataSection(sources=[{"files": [a]}], validation_files=b, test_files=c, **rest))
    assert list(first.texts("train")) != list(second.texts("train"))
    assert first.identity != second.identity


# -- the file of fingerprints ---------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that are read for their fingerprint, from now on."""
    seen, real = [], file_digests._sha256

    def counted(paths):
        seen.extend(os.path.basename(path) for path in paths)
        return real(paths)

    monkeypatch.setattr(file_digests, "_sha256", counted)
    return seen


def test_untouched_files_are_not_read_again(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(file_digests, "RACY_SECONDS", 0)
    folder, kept = write_texts(tmp_path / "t", ["one", "two"]), tmp_path / "new" / "digests.json"
    time.sleep(0.02)  # time stamps of files are a few milliseconds coarse
    first = Corpus(section([folder]), digests=kept)
    assert sorted(hashed) == ["0000.txt", "0001.txt"]
    (folder / "0002.txt").write_text("three")
    time.sleep(0.02)
    hashed.clear()
    second = Corpus(section([folder]), digests=kept)
    assert hashed == ["0002.txt"]
    hashed.clear()
    third = Corpus(section([folder]), digests=kept)
    assert hashed == []
    assert first.fingerprint != second.fingerprint == third.fingerprint
    assert third.fingerprint == Corpus(section([folder])).fingerprint
    assert os.listdir(kept.parent) == [kept.name]  # no staging file stays


def test_a_change_is_seen_though_size_and_time_are_put_back(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(file_digests, "RACY_SECONDS", 0)
    folder, kept = write_texts(tmp_path / "t", ["one", "two"]), tmp_path / "digests.json"
    time.sleep(0.02)
    before = Corpus(section([folder]), digests=kept).fingerprint
    path = folder / "0001.txt"
    stat = path.stat()
    path.write_text("owt")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    hashed.clear()
    assert Corpus(section([folder]), digests=kept).fingerprint != before
    assert hashed == ["0001.txt"]


def test_files_changed_a_moment_ago_are_not_kept(tmp_path, hashed, monkeypatch):
    assert file_digests.RACY_SECONDS >= 2  # FAT's time stamps
    monkeypatch.setattr(file_digests, "RACY_SECONDS", 60)
    folder, kept = write_texts(tmp_path / "t", ["one"]), tmp_path / "digests.json"
    Corpus(section([folder]), digests=kept)
    assert json.loads(kept.read_text()) == {}
    Corpus(section([folder]), digests=kept)
    assert hashed == ["0000.txt", "0000.txt"]


@pytest.mark.parametrize("content", ["", "{", "\x00"])
def test_a_broken_file_of_fingerprints_is_made_anew(tmp_path, content):
    folder, kept = write_texts(tmp_path / "t", ["one"]), tmp_path / "digests.json"
    kept.write_text(content)
    found = Corpus(section([folder]), digests=kept)
    assert found.fingerprint == Corpus(section([folder])).fingerprint
    assert isinstance(json.loads(kept.read_text()), dict)
