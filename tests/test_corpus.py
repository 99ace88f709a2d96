"""Documents: where they come from, which split they are in, and the sentences when they fail."""

import hashlib
import json
import os
import random
import re

import datasets
import pytest

from pipeline.corpus import Corpus, read_files, read_text, split_of
from pipeline.recipe import DataSection, InputError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Tables are cached where nobody else's are."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


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


def refusal(files, **values):
    """Return the sentence with which a corpus is refused, on opening or on reading."""
    with pytest.raises(InputError) as caught:
        list(Corpus(section(files, **values)).documents())
    return str(caught.value)


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


# -- reading --------------------------------------------------------------------------------------


def test_byte_order_mark_goes_and_line_endings_stay(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\rthree\n")
    (tmp_path / "later.txt").write_bytes("a\ufeffb\n".encode())
    texts = [d.text for d in Corpus(section([tmp_path], hold_out="documents")).documents()]
    assert texts == ["one\r\ntwo\r\n\rthree\n", "a\ufeffb\n"]


def test_bytes_that_are_not_utf8_are_named_or_replaced(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("naïve ".encode() + b"caf\xe9 au lait")
    message = refusal([path])
    assert str(path) in message
    assert "0xe9" in message and "offset 10 " in message
    assert "--data.errors replace" in message
    corpus = Corpus(section([path], errors="replace"))
    assert "".join(d.text for d in corpus.documents()) == "naïve caf\ufffd au lait"


def test_empty_documents_are_passed_over(tmp_path):
    write_texts(tmp_path / "t", ["one", "", "\ufeff", "two"])
    rows = write_rows(tmp_path / "t.jsonl", [{"text": "three"}, {"text": ""}, {"text": "four"}])
    corpus = Corpus(section([tmp_path / "t", rows], hold_out="documents"))
    assert [d.text for d in corpus.documents()] == ["one", "two", "three", "four"]


def test_a_folder_gives_its_txt_files_at_any_depth_and_a_pattern_gives_others(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "folder.txt").mkdir()
    for name in ["b.txt", "a.txt", "deep/c.txt", "deep/er/d.txt", "deep/e.md"]:
        (tmp_path / name).write_text(name)
    by_folder = Corpus(section([tmp_path], hold_out="documents"))
    assert sorted(d.text for d in by_folder.documents()) == [
        "a.txt", "b.txt", "deep/c.txt", "deep/er/d.txt"
    ]  # fmt: skip
    by_pattern = Corpus(section([tmp_path / "**" / "*.md"], hold_out="documents"))
    assert [d.text for d in by_pattern.documents()] == ["deep/e.md"]
    assert by_pattern.size == len("deep/e.md")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_tables_give_the_text_column_row_by_row(tmp_path, suffix):
    path = tmp_path / f"t.{suffix}"
    table = datasets.Dataset.from_dict({"id": [1, 2, 3], "body": ["one", "zwei\nDrei", "四 😀"]})
    write = {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[suffix]
    write(str(path))
    corpus = Corpus(section([path], text_column="body", hold_out="documents"))
    assert [(d.name, d.text) for d in corpus.documents()] == [
        (f"{path}:0", "one"), (f"{path}:1", "zwei\nDrei"), (f"{path}:2", "四 😀")
    ]  # fmt: skip
    assert corpus.size is None


def test_the_standard_library_is_found_without_its_tests():
    corpus = Corpus(section(["python:stdlib"]))
    documents = {d.name: d for d in corpus.documents()}
    assert "json/decoder.py" in documents and "tempfile.py" in documents
    assert "class JSONDecoder" in documents["json/decoder.py"].text
    assert corpus.hold_out == "documents"
    folders = {part for name in documents for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages"}


# -- order and fingerprint ------------------------------------------------------------------------


def test_order_is_the_same_each_time_and_not_that_of_the_disk(tmp_path):
    names = [f"{number:03}.txt" for number in range(50)]
    (tmp_path / "t").mkdir()
    for name in random.Random(3).sample(names, len(names)):
        (tmp_path / "t" / name).write_text(name)
    for source in [tmp_path / "t", tmp_path / "t" / "*.txt"]:
        wanted = section([source], hold_out="documents")
        first, second = (list(Corpus(wanted).documents()) for _ in range(2))
        assert first == second
        assert [d.text for d in first] == names


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


def test_identity_changes_with_whatever_moves_a_text(tmp_path):
    write_texts(tmp_path / "t", synthetic(3))
    base = Corpus(section([tmp_path / "t"])).identity
    assert json.loads(json.dumps(base)) == base  # it is kept in a manifest
    changes = [
        {"errors": "replace"},
        {"hold_out": "documents"},
        {"validation_fraction": 0.06},
        {"test_fraction": 0.06},
    ]
    for change in changes:
        assert Corpus(section([tmp_path / "t"], **change)).identity != base
    assert Corpus(section([tmp_path / "t"], block_size=99)).identity == base


# -- sentences ------------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path):
    message = refusal([tmp_path / "nowhere.txt"])
    assert str(tmp_path / "nowhere.txt") in message and "no such file" in message
    assert "data.files" in message and os.getcwd() in message


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "empty.txt").touch()
    message = refusal([tmp_path / "empty.txt"])
    assert str(tmp_path / "empty.txt") in message and "empty" in message


def test_a_folder_without_text_says_how_to_name_other_files(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    message = refusal([tmp_path])
    assert str(tmp_path) in message and "no .txt file" in message and "**/*.md" in message


def test_a_pattern_without_a_match_is_named(tmp_path):
    message = refusal([tmp_path / "*.text"])
    assert str(tmp_path / "*.text") in message and "no such file" in message


def test_a_missing_column_names_those_there_are(tmp_path):
    path = write_rows(tmp_path / "t.jsonl", [{"body": "a", "title": "b"}])
    message = refusal([path])
    assert str(path) in message and "no column 'text'" in message
    assert "body" in message and "title" in message and "data.text_column" in message


@pytest.mark.parametrize(
    "rows, row, value",
    [
        ([{"text": 7}, {"text": 8}], 0, "7"),
        ([{"text": "a"}, {"text": "b"}, {"text": None}], 2, "None"),
        ([{"text": ["a", "b"]}], 0, "['a', 'b']"),
    ],
    ids=["number", "null", "list"],
)
def test_a_value_that_is_not_text_is_named_with_its_row(tmp_path, rows, row, value):
    path = write_rows(tmp_path / "t.jsonl", rows)
    message = refusal([path])
    assert str(path) in message and f"row {row} " in message and value in message
    assert "'text'" in message and "data.text_column" in message


@pytest.mark.parametrize(
    "name, content",
    [
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n'),
        ("none.parquet", b"this is no parquet file at all"),
        ("binary.csv", b"text\n\xff\xfe\x00\n"),
    ],
)
def test_a_broken_table_is_one_sentence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    message = refusal([tmp_path / name])
    suffix = name[name.index(".") :]
    assert message.startswith(f"{tmp_path / name}: not a {suffix} table: ")
    assert "\n" not in message and "Traceback" not in message


def test_an_unreachable_data_set_is_one_sentence():
    with pytest.raises(InputError) as caught:
        Corpus(DataSection(dataset="nobody/no-such-data-set"))
    message = str(caught.value)
    assert "data.dataset nobody/no-such-data-set" in message and "HF_HUB_OFFLINE" in message
    assert "\n" not in message


def test_read_files_keeps_the_order_and_names_what_is_wrong(tmp_path):
    (tmp_path / "a").write_text("one")
    (tmp_path / "b").write_text("two")
    (tmp_path / "c").touch()
    (tmp_path / "d").write_bytes(b"ok \xc3")
    a, b, c, d, e = (str(tmp_path / name) for name in "abcde")
    assert read_files([b, a, b]) == ["two", "one", "two"]
    for name, word in [(c, "empty"), (d, "offset 3 "), (e, "no such file")]:
        with pytest.raises(InputError, match=f"{re.escape(name)}: .*{word}"):
            read_files([a, name])
    assert read_files([d], errors="replace") == ["ok \ufffd"]


def test_a_folder_cannot_be_read_as_text(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_text(tmp_path)


def test_what_looks_like_a_missing_value_in_a_csv_is_text(tmp_path):
    (tmp_path / "rows.csv").write_text('text\nNA\n7\n"two\nlines"\n')
    section = DataSection(files=[str(tmp_path / "rows.csv")], hold_out="documents")
    assert [d.text for d in Corpus(section).documents()] == ["NA", "7", "two\nlines"]
