"""Reading: every format, whole or in shards, in windows; and the sentences when it fails."""

import gzip
import json
import os
import random
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from pipeline import file_search, raw_documents, sources, text_files
from pipeline.corpus import Corpus
from pipeline.recipe import DataSection, InputError, SourceSection
from pipeline.text_files import read_text, safe_windows
from pipeline.tokenizer import text_encoder, train_tokenizer

KINDS = ["txt", "separated", "jsonl", "csv", "parquet"]
TEXTS = ["one", "zwei\nDrei", '"四", 😀', " x\r\ny ", "", "na\u0308ive\x00\u2028end"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Data sets are cached where nobody else's are."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def source_of(*files, **values):
    return SourceSection(files=[str(name) for name in files], **values)


def shards_of(source):
    files = file_search.find_files(source)
    size = sum(path.stat().st_size for _, path in files)
    return sources.shards_of(0, source, files, total_bytes=size)


def read(source):
    """Return names and texts, shard after shard."""
    shards = shards_of(source)
    return [(d.name, d.text) for shard in shards for d in raw_documents.read_shard(shard, source)]


def texts_of(source):
    return [text for _, text in read(source)]


def refusal(*files, **values):
    """Return the one sentence with which a source is refused, on opening or on reading."""
    with pytest.raises(InputError) as caught:
        read(source_of(*files, **values))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def write(path, content):
    """Write bytes, compressed as the name says."""
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = pa.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)
    return path


def write_table(path, rows, column="text", **values):
    """Write one column as .jsonl, .csv or .parquet."""
    columns = {"id": list(range(len(rows))), column: rows}
    if ".jsonl" in path.name:
        lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in enumerate(rows)]
        return write(path, "".join(f"{line}\n" for line in lines).encode())
    if ".csv" in path.name:
        quoted = ('"' + str(row).replace('"', '""') + '"' for row in rows)
        lines = [f"{number},{text}\r\n" for number, text in enumerate(quoted)]
        return write(path, f"id,{column}\r\n{''.join(lines)}".encode())
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table(columns), sink, **values)
    return write(path, sink.getvalue().to_pybytes())


def corrupted_parquet(path):
    """A column of text that holds other bytes."""
    offsets = pa.array([0, 2, 4], pa.int32()).buffers()[1]
    column = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"abc\xff")])
    pyarrow.parquet.write_table(pa.table({"text": column}), path)
    return path


# -- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_documents_plain_and_compressed(tmp_path, kind, suffix):
    expected = TEXTS
    if kind == "txt":
        expected = [text for text in TEXTS if text]
        for number, text in enumerate(expected):
            write(tmp_path / f"{number}.txt{suffix}", text.encode())
        source = source_of(tmp_path)
    elif kind == "separated":
        path = write(tmp_path / f"t.txt{suffix}", "<|endoftext|>".join(TEXTS).encode())
        source = source_of(path, separator="<|endoftext|>")
    else:
        path = write_table(tmp_path / f"t.{kind}{suffix}", TEXTS, "body")
        source = source_of(path, text_column="body")
    found = read(source)
    assert [text for _, text in found] == expected
    assert len({name for name, _ in found}) == len(found)
    assert all(name.startswith(str(tmp_path)) for name, _ in found)


def test_a_compressed_file_of_several_parts_is_read_to_its_end(tmp_path):
    for suffix in [".gz", ".zst"]:
        path = write(tmp_path / f"t.txt{suffix}", b"one ")
        path.write_bytes(path.read_bytes() + write(tmp_path / f"u{suffix}", b"two").read_bytes())
        assert texts_of(source_of(path)) == ["one two"]


def test_a_local_folder_is_a_data_set(tmp_path):
    for kind in ["parquet", "jsonl"]:
        (tmp_path / kind).mkdir()
        write_table(tmp_path / kind / f"train.{kind}", ["one", None, "zwei\n"])
        folder = str(tmp_path / kind)
        names = [f"{folder}:{number}" for number in range(3)]
        found = read(SourceSection(dataset=folder))
        assert found == list(zip(names, ["one", "", "zwei\n"], strict=True))
        with pytest.raises(InputError, match="no column 'body'; it has id, text; set data.text_c"):
            read(SourceSection(dataset=folder, text_column="body"))


def test_a_data_set_is_read_in_ranges_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SHARD_BYTES", (1, 1))
    write_table(tmp_path / "train.parquet", [str(number) for number in range(10)])
    source = SourceSection(dataset=str(tmp_path))
    shards = sources.shards_of(0, source, [], total_bytes=4)
    assert [(shard.start, shard.stop) for shard in shards] == [(n, n + 1) for n in range(10)]
    found = [d.text for shard in shards for d in raw_documents.read_shard(shard, source)]
    assert found == [str(number) for number in range(10)]


def test_a_folder_gives_its_known_files_at_any_depth_and_a_pattern_gives_others(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "folder.txt").mkdir()
    for name in ["b.txt", "a.txt.gz", "deep/c.txt.zst", "deep/er/d.txt", "deep/e.md", "f.gz"]:
        write(tmp_path / name, name.encode())
    write_table(tmp_path / "deep" / "g.jsonl", ["g"])
    write_table(tmp_path / "h.parquet.gz", ["h"])
    assert texts_of(source_of(tmp_path)) == [
        "a.txt.gz", "b.txt", "deep/c.txt.zst", "deep/er/d.txt", "g", "h"
    ]  # fmt: skip
    assert texts_of(source_of(tmp_path / "**" / "*.md")) == ["deep/e.md"]
    assert texts_of(source_of(tmp_path / "f.gz")) == ["f.gz"]  # named, it is text


def test_what_looks_like_a_missing_value_in_a_csv_is_text(tmp_path):
    (tmp_path / "rows.csv").write_text('text\nNA\n7\n"two\nlines"\n')
    assert texts_of(source_of(tmp_path / "rows.csv")) == ["NA", "7", "two\nlines"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_null_is_an_empty_document(tmp_path, kind):
    assert texts_of(source_of(write_table(tmp_path / f"t.{kind}", ["a", None]))) == ["a", ""]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "parquet", "hub"])
def test_rows_that_are_pieces_of_one_text_are_joined_as_they_are(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sources, "SHARD_BYTES", (1, 1))
    rows = ["", " = One = \n", "zwei\r\n", "", "四 😀"]
    if kind == "hub":
        write_table(tmp_path / "train.parquet", rows)
        source = SourceSection(dataset=str(tmp_path), join_rows=True)
        shards = sources.shards_of(0, source, [], total_bytes=0)
        found = [d.text for shard in shards for d in raw_documents.read_shard(shard, source)]
    else:
        source = source_of(write_table(tmp_path / f"t.{kind}", rows), join_rows=True)
        found = texts_of(source)
    assert found == ["".join(rows)]


def test_blank_lines_between_rows_are_no_documents(tmp_path):
    path = write(tmp_path / "t.jsonl", b'{"text": "a"}\r\n\r\n \n{"text": "b"}')
    assert texts_of(source_of(path)) == ["a", "b"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", KINDS[:4])
def test_a_byte_order_mark_goes_and_line_endings_stay(tmp_path, kind, suffix):
    path = tmp_path / f"t.{'txt' if kind == 'separated' else kind}{suffix}"
    lines = "one\r\ntwo\r\n\rthree\ufeff\n"
    content = {
        "txt": lines,
        "separated": f"{lines}<>\ufeffx",
        "jsonl": json.dumps({"text": lines}),
        "csv": f'text\n"{lines}"\n',
    }[kind]
    write(path, b"\xef\xbb\xbf" + content.encode())
    separator = "<>" if kind == "separated" else None
    expected = [lines, "\ufeffx"] if separator else [lines]
    assert texts_of(source_of(path, separator=separator)) == expected


def test_nul_is_a_character_like_others(tmp_path):
    paths = [write_table(tmp_path / f"t.{kind}", ["a\x00b"]) for kind in KINDS[2:]]
    paths.append(write(tmp_path / "t.txt", b"a\x00b"))
    assert texts_of(source_of(*paths)) == ["a\x00b"] * 4


# -- shards ---------------------------------------------------------------------------------------


def random_documents(seed, forbidden):
    """Texts of very different lengths, many empty, in all lengths of UTF-8."""
    source = random.Random(seed)
    texts = []
    for _ in range(source.randint(1, 60)):
        length = source.choice([0, 0, 1, 2, 5, 30, 200])
        text = "".join(source.choices("ab<|>endoftx\n é東😀", k=length))
        for part in forbidden:
            text = text.replace(part, "")
        texts.append(text)
    return texts


@pytest.mark.parametrize("final", [True, False], ids=["ended", "open"])
@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n", "\n\n", "aba", "\\n"])
def test_separated_text_in_ranges_is_the_same_as_in_one(tmp_path, monkeypatch, separator, final):
    between = separator.replace("\\n", "\n")
    overlaps = between in ("\n\n", "aba")
    monkeypatch.setattr(text_files, "WINDOW", 37)
    for seed in range(6):
        texts = random_documents(seed, [between] if not overlaps else ["\n", "b"])
        content = between.join(texts) + between * final
        path = write(tmp_path / "t.txt", content.encode())
        expected = content.split(between)
        expected = expected[: len(expected) - (expected[-1] == "")]  # nothing follows the last one
        source = source_of(path, separator=separator)
        if not content:
            continue
        monkeypatch.setattr(sources, "SHARD_BYTES", (1 << 20, 1 << 20))
        whole = read(source)
        assert [text for _, text in whole] == expected
        for size in (1, 2, 7, 13, 14, 100, len(content.encode())):
            monkeypatch.setattr(sources, "SHARD_BYTES", (size, size))
            count = -(-len(content.encode()) // size)
            assert len(shards_of(source)) == (1 if overlaps else count)
            assert read(source) == whole


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_jsonl_in_ranges_is_the_same_as_in_one(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(text_files, "WINDOW", 37)
    for seed in range(12):
        texts = random_documents(seed, [])
        lines = [json.dumps({"text": t}, ensure_ascii=seed % 2 == 0) for t in texts]
        content = ending.join(lines) + ending * (seed % 3 > 0)
        path = write(tmp_path / "t.jsonl", content.encode())
        source = source_of(path)
        monkeypatch.setattr(sources, "SHARD_BYTES", (1 << 20, 1 << 20))
        whole = read(source)
        assert [text for _, text in whole] == texts
        for size in (7, 14, 100, len(content.encode())):
            monkeypatch.setattr(sources, "SHARD_BYTES", (size, size))
            assert len(shards_of(source)) == -(-len(content.encode()) // size)
            assert read(source) == whole


def test_parquet_is_read_by_row_groups(tmp_path, monkeypatch):
    texts = [f"row {number}" for number in range(100)]
    path = write_table(tmp_path / "t.parquet", texts, row_group_size=7)
    source = source_of(path)
    whole = read(source)
    assert whole == [(f"{path}:{number}", text) for number, text in enumerate(texts)]
    assert len(shards_of(source)) == 1
    for size in (1, 300):
        monkeypatch.setattr(sources, "SHARD_BYTES", (size, size))
        shards = shards_of(source)
        assert len(shards) == 15 if size == 1 else 1 < len(shards) < 15
        assert read(source) == whole


def test_small_files_come_together_and_compressed_ones_are_not_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SHARD_BYTES", (100, 100))
    for number in range(10):
        write(tmp_path / f"{number}.txt", b"x" * 30)
    assert [len(shard.files) for shard in shards_of(source_of(tmp_path))] == [4, 4, 2]
    noise = random.Random(0).randbytes(2000).hex()
    for suffix in [".gz", ".zst"]:
        path = write_table(tmp_path / f"t.jsonl{suffix}", [noise, "b"])
        assert path.stat().st_size > 1000 and len(shards_of(source_of(path))) == 1


def test_shards_follow_from_the_sizes_alone(tmp_path, monkeypatch):
    smallest, largest = sources.SHARD_BYTES
    path = write(tmp_path / "t.txt", b"x")
    with path.open("r+b") as file:
        file.truncate(3 << 30)  # a hole: no byte of it is on disk
    source = source_of(path, separator="\n")
    for total, size in [(1, smallest), (64 * (20 << 20), 20 << 20), (1 << 50, largest)]:
        shards = sources.shards_of(0, source, [("t", path)], total_bytes=total)
        assert shards[0].stop == size and len(shards) == -(-(3 << 30) // size)
        assert [s.start for s in shards[1:]] == [s.stop for s in shards[:-1]]
        assert shards[-1].stop == 3 << 30


# -- windows --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_tokenizer():
    """GPT-2's kind too, of merges over white space, line ends and CJK punctuation."""
    texts = ["  ".join(["東京。\n\n", "中文，文字！", "a b  c\n \n"] * 40), "\n" * 300, " " * 300]
    return train_tokenizer(texts, vocab_size=290)


def windows_of(text, size, monkeypatch):
    monkeypatch.setattr(text_files, "WINDOW", size)
    found = list(safe_windows(iter([text[:7], text[7:]]), "name"))
    assert "".join(found) == text and all(0 < len(window) <= size for window in found)
    return found


LONG_TEXTS = {
    "spaces": "it's a text,  with   'll 12 numbers 3 and\ttabs \u00a0 no-break \u3000 wide " * 9,
    "newlines": "\n".join("a" * n + "'s!?" * (n % 3) for n in range(1, 24)),
    "blank lines": "\n\n \n".join("word" * (n % 7) for n in range(1, 60)),
    "CJK": "東京都に行きました。\n「中文」，没有空格！\n\n" * 20,
    "CJK indented": "\u3000\u3000東京都に行きました。\r\n" * 20,
    "symbols": "!!! ??? ... --- ((( ))) +++ " * 20,
    "mixed": "मराठी भाषा é e\u0301 \u0301 x\u0301 😀👩\u200d👧 \u200d a\u2028b\x85c " * 12,
}


@pytest.mark.parametrize("name", LONG_TEXTS)
def test_windows_tokenise_as_the_whole_text(name, tokenizer, other_tokenizer, monkeypatch):
    text = LONG_TEXTS[name]
    for each in (tokenizer, other_tokenizer):
        encoder = text_encoder(each)
        whole = encoder.encode(text, add_special_tokens=False).ids
        for size in (32, 33, 50, 200):
            windows = windows_of(text, size, monkeypatch)
            assert len(windows) > 1
            parts = encoder.encode_batch(windows, add_special_tokens=False)
            assert sum((part.ids for part in parts), []) == whole


def test_windows_of_random_text_tokenise_as_the_whole(tokenizer, other_tokenizer, monkeypatch):
    source = random.Random(0)
    characters = "aZé東。9½ \n\t\r'!_\u00a0\u3000\u0301😀\x00"
    for _ in range(60):
        weights = [source.random() for _ in characters]
        text = "".join(source.choices(characters, weights, k=400))
        try:
            windows = windows_of(text, 40, monkeypatch)
        except InputError:
            continue
        for each in (tokenizer, other_tokenizer):
            encoder = text_encoder(each)
            parts = encoder.encode_batch(windows, add_special_tokens=False)
            whole = encoder.encode(text, add_special_tokens=False).ids
            assert sum((part.ids for part in parts), []) == whole


def test_separators_of_ascii_are_no_white_space_to_a_tokenizer(other_tokenizer, monkeypatch):
    encoder = text_encoder(train_tokenizer(["!\x1c!\x1c!\x1c" * 50], vocab_size=260))
    text = ("!" * 10 + " " + "!\x1c" * 9) * 9
    parts = encoder.encode_batch(windows_of(text, 32, monkeypatch), add_special_tokens=False)
    assert sum((part.ids for part in parts), []) == encoder.encode(text).ids


@pytest.mark.parametrize("blank", [" ", "\n", "\t", " \n"])
def test_nothing_but_white_space_is_not_called_text_without_it(blank, tokenizer, monkeypatch):
    text = "a" + blank * 100 + "b"
    try:
        windows = windows_of(text, 32, monkeypatch)
    except InputError as error:
        assert "without white space" not in str(error)
        return
    encoder = text_encoder(tokenizer)
    parts = encoder.encode_batch(windows, add_special_tokens=False)
    assert sum((part.ids for part in parts), []) == encoder.encode(text).ids


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 64])
def test_a_file_read_in_windows_is_the_same_text(tmp_path, monkeypatch, size, suffix):
    monkeypatch.setattr(text_files, "WINDOW", size)
    text = "a\r\né\ufeff東😀" * 20  # characters of one to four bytes over the edges of windows
    path = write(tmp_path / f"t.txt{suffix}", b"\xef\xbb\xbf" + text.encode())
    source = source_of(path)
    document = next(raw_documents.read_shard(shards_of(source)[0], source))
    assert document.text == text == document.text  # it can be read again
    assert len(list(document.read())) > 1


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 1000])
def test_an_invalid_byte_is_named_with_its_place_in_the_file(tmp_path, monkeypatch, size, suffix):
    monkeypatch.setattr(text_files, "WINDOW", size)
    before = "\ufeffé東😀 ".encode() * 3
    for wrong, after in [(b"\xff", b"abc"), (b"\xe6\x9d", b"abc"), (b"\xf0\x9f\x98", b"")]:
        path = write(tmp_path / f"t.txt{suffix}", before + wrong + after)
        message = refusal(path)
        assert message.startswith(f"{path}: byte {wrong[0]:#04x} at offset {len(before)} is not U")
        assert texts_of(source_of(path, errors="replace")) == [
            (before + wrong + after).decode("utf-8-sig", "replace")
        ]


def test_a_text_without_white_space_is_refused_only_if_it_is_longer_than_a_window(monkeypatch):
    assert windows_of("x" * 100, 100, monkeypatch) == ["x" * 100]
    for text in ["x" * 101, " " + "東" * 100, "a b " + "x" * 101]:
        with pytest.raises(InputError, match="^name: no word ends in 100 characters on end"):
            windows_of(text, 100, monkeypatch)


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_compressed_file_that_is_cut_off_is_one_sentence(tmp_path, kind, suffix):
    path = tmp_path / f"t.{'txt' if kind == 'separated' else kind}{suffix}"
    noise = random.Random(0).randbytes(3000).hex()
    if kind in ("txt", "separated"):
        write(path, noise.encode())
    else:
        write_table(path, [noise])
    path.write_bytes(path.read_bytes()[:-9])
    message = refusal(path, separator="\n" if kind == "separated" else None)
    assert message.startswith(f"{path}: the compressed file is cut off or damaged (")
    assert message.endswith("; fetch or write it again")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_a_file_that_is_not_compressed_as_it_says_is_one_sentence(tmp_path, kind, suffix):
    path = tmp_path / f"t.{kind}{suffix}"
    path.write_bytes(b"plain text, and not little of it")
    message = refusal(path)
    assert message.startswith(f"{path}: the compressed file is cut off or damaged (")


@pytest.mark.parametrize(
    "content", [b"x", b"this is no parquet file at all", b"PAR1" + b"x" * 50 + b"PAR1"]
)
def test_a_parquet_file_that_is_none_is_one_sentence(tmp_path, content):
    path = write(tmp_path / "none.parquet", content)
    assert refusal(path).startswith(f"{path}: not a .parquet table: ")


def test_a_parquet_file_that_is_cut_off_is_one_sentence(tmp_path):
    path = write_table(tmp_path / "t.parquet", ["a" * 1000, "b" * 1000])
    path.write_bytes(path.read_bytes()[:-100])
    assert refusal(path).startswith(f"{path}: not a .parquet table: ")


def test_a_missing_file_is_named(tmp_path):
    for name in ["nowhere.txt", "*.text", "no/where"]:
        message = refusal(tmp_path / name)
        assert message == f"{tmp_path / name}: no such file; looked in {os.getcwd()}"


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet", "md", "txt.gz"])
def test_an_empty_file_is_named(tmp_path, kind):
    path = tmp_path / f"empty.{kind}"
    path.touch()
    assert refusal(path) == f"{path}: the file is empty; give one with text"


def test_a_folder_without_known_files_says_how_to_name_others(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path}: no .txt, .jsonl, .csv or .parquet in this folder")
    assert f"'{tmp_path}/**/*.md'" in message


def test_a_link_that_leads_nowhere_is_one_sentence_or_passed_over(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    (tmp_path / "b.txt").write_text("b")
    try:
        corpus = Corpus(DataSection(files=[str(tmp_path)], hold_out="documents"))
        assert [document.text for document in corpus.documents()] == ["b"]
    except InputError as error:
        assert str(tmp_path / "a.txt") in str(error)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_missing_column_names_those_there_are(tmp_path, kind, suffix):
    path = write_table(tmp_path / f"t.{kind}{suffix}", ["a"], "body")
    message = refusal(path)
    assert message.startswith(f"{path}: no column 'text'")
    assert "it has id, body; set data.text_column" in message


def test_a_column_missing_in_a_later_line_is_named_with_its_place(tmp_path):
    path = write(tmp_path / "t.jsonl", b'{"text": "a"}\n{"body": "b"}\n')
    assert f"{path}: no column 'text' in the line at byte 14; it has body; " in refusal(path)
    path = write(tmp_path / "u.jsonl", b'{"text": "a"}\n["text"]\n')
    assert f"{path}: no column 'text' in the line at byte 14; it has none; " in refusal(path)


@pytest.mark.parametrize("value, shown", [(7, "7"), (1.5, "1.5"), (True, "True"), (["a"], "['a']")])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_value_that_is_not_text_is_named_with_its_place(tmp_path, kind, value, shown):
    path = write_table(tmp_path / f"t.{kind}", [None, value])
    message = refusal(path)
    place = "row 1" if kind == "parquet" else "the line at byte 24"
    assert message.startswith(f"{path}: {place} of column 'text' is {shown} and not text; ")
    assert "data.text_column" in message


def test_a_number_in_a_data_set_is_named_with_its_row(tmp_path):
    write_table(tmp_path / "train.parquet", [1, 2])
    with pytest.raises(InputError, match=r": row 0 of column 'text' is 1 and not text; "):
        read(SourceSection(dataset=str(tmp_path)))


def test_a_broken_line_is_named_with_its_place(tmp_path):
    for line in [b'{"text": ', b"text", b'{"text": "a" "b"}', b"{'text': 'a'}"]:
        path = write(tmp_path / "t.jsonl", b'{"text": "a"}\n' + line + b"\n")
        message = refusal(path)
        assert message.startswith(f"{path}: not a .jsonl table: the line at byte 14 is no JSON (")


def test_a_line_of_brackets_is_one_sentence(tmp_path):
    path = write(tmp_path / "t.jsonl", b'{"text": "a"}\n' + b"[" * 200_000 + b"\n")
    assert f"{path}: not a .jsonl table: the line at byte 14 is no JSON" in refusal(path)


def test_an_open_quote_in_a_csv_is_one_sentence(tmp_path):
    path = write(tmp_path / "t.csv", b'text\n"one\ntwo\n')
    assert refusal(path).startswith(f"{path}: not a .csv table: ")


@pytest.mark.parametrize("text", ["\\ud83d", "\\ude00", "a\\ude00\\ud83db"])
def test_half_a_surrogate_pair_is_named_or_replaced(tmp_path, text):
    path = write(tmp_path / "t.jsonl", f'{{"text": "{text}"}}\n'.encode())
    message = refusal(path)
    assert message.startswith(f"{path}: the line at byte 0 of column 'text' holds half of a surro")
    assert "--data.errors replace" in message
    expected = re.sub(r"\\u....", "\ufffd", text)
    assert texts_of(source_of(path, errors="replace")) == [expected]


@pytest.mark.parametrize("kind", ["separated", "jsonl", "csv"])
def test_bytes_that_are_not_utf8_are_named_or_replaced(tmp_path, kind):
    path = tmp_path / f"t.{'txt' if kind == 'separated' else kind}"
    begin, end = {
        "separated": ("naïve;ca", ";x"),
        "jsonl": ('{"text": "naïve"}\n{"text": "ca', '"}\n{"text": "x"}\n'),
        "csv": ("text\nnaïve\nca", "\nx\n"),
    }[kind]
    write(path, begin.encode() + b"\xe9" + end.encode())
    separator = ";" if kind == "separated" else None
    message = refusal(path, separator=separator)
    assert message.startswith(f"{path}: byte 0xe9 ") and "is not UTF-8; convert the file" in message
    assert "--data.errors replace" in message
    if kind != "csv":
        assert f"at offset {len(begin.encode())} is" in message
    source = source_of(path, separator=separator, errors="replace")
    assert texts_of(source) == ["naïve", "ca\ufffd", "x"]


def test_an_invalid_byte_behind_a_byte_order_mark_keeps_its_place(tmp_path):
    path = write(tmp_path / "t.jsonl", b'\xef\xbb\xbf{"text": "\xff"}\n')
    assert "byte 0xff at offset 13 is not UTF-8" in refusal(path)


def test_a_parquet_column_of_other_bytes_is_named_or_replaced(tmp_path):
    path = corrupted_parquet(tmp_path / "t.parquet")
    message = refusal(path)
    assert message.startswith(f"{path}: ") and "row 1" in message and "UTF-8" in message
    assert texts_of(source_of(path, errors="replace")) == ["ab", "c\ufffd"]


@pytest.mark.parametrize("kind", ["separated", "jsonl", "csv"])
def test_a_row_that_would_not_fit_in_memory_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(text_files, "WINDOW", 16)
    monkeypatch.setattr(raw_documents, "LONGEST_ROW", 200)
    path = tmp_path / f"t.{'txt' if kind == 'separated' else kind}"
    separator = "<|endoftext|>" if kind == "separated" else None
    rows = ["a" * 150, "b" * 150, "c" * 150]

    def store(rows):
        if separator:
            return write(path, separator.join(rows).encode())
        return write_table(path, rows)

    assert texts_of(source_of(store(rows), separator=separator)) == rows
    begin = len(store(rows).read_bytes())
    message = refusal(store([*rows, "d" * 999]), separator=separator)
    if kind == "csv":
        assert message.startswith(f"{path}: not a .csv table: field larger than field limit (200)")
    else:
        shown = repr(separator or "\n")
        assert message.startswith(f"{path}: more than ") and f"without {shown}" in message
        assert f"from byte {begin + len(separator or '')} on" in message


def test_an_unreachable_data_set_is_one_sentence():
    with pytest.raises(InputError) as caught:
        read(SourceSection(dataset="nobody/no-such-data-set"))
    message = str(caught.value)
    assert message.startswith("data.dataset nobody/no-such-data-set: cannot be loaded as a data s")
    for word in ["HF_HUB_OFFLINE", "HF_TOKEN", "give an existing folder", "network"]:
        assert word in message
    assert "\n" not in message


def test_a_folder_cannot_be_read_as_text(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_text(tmp_path)


def test_the_installed_packages_are_a_source():
    found = file_search.find_files(SourceSection(files=["python:packages"]))
    names = [name for name, _ in found]
    assert "pyarrow/__init__.py" in names and "datasets/config.py" in names
    assert all(name.endswith(".py") and "__pycache__" not in name for name in names)
    assert names == sorted(names, key=lambda name: Path(name).parts)
