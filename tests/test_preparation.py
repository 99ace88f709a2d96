"""From text to rows on disk: nothing lost, nothing twice, and what is left out is counted."""

import itertools
import json
import math
import random
import re
import subprocess
import sys
import unicodedata

import datasets
import numpy as np
import pytest
from conftest import ROOT, WORDS, make_texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline import artifact, preparation, sources, text_files, token_shards
from pipeline.blocks import open_blocks
from pipeline.corpus import Corpus, split_of
from pipeline.preparation import prepare_blocks
from pipeline.recipe import CleaningSection, DataSection, InputError
from pipeline.row_file import RowFile
from pipeline.row_tables import describe, show
from pipeline.tokenizer import train_tokenizer

BLOCK = 16
SPLITS = ["train", "validation", "test"]


@pytest.fixture
def text_folder(tmp_path, texts):
    return write_texts(tmp_path / "text", texts)


def write_texts(folder, texts):
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
    return folder


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def section(folder, **values):
    """The end of every document is held out."""
    tail = {"hold_out": "tail", "validation_fraction": 0.1, "test_fraction": 0.0}
    return DataSection(files=[str(folder)], **({"block_size": BLOCK} | tail | values))


def documents_section(path, **values):
    """Whole documents are held out."""
    whole = {"hold_out": "documents", "validation_fraction": 0.2, "test_fraction": 0.1}
    if "sources" not in values:
        values["files"] = [str(path)]
    return DataSection(**({"block_size": BLOCK} | whole | values))


def prepare(wanted, tokenizer, folder, rules=None, **options):
    rules = CleaningSection(**(rules or {}))
    corpus = Corpus(wanted, rules)
    prepare_blocks(wanted, corpus, tokenizer, folder, cleaning=rules, **options)
    return open_blocks(folder, wanted)


def refusal(wanted, tokenizer, folder, rules=None, **options):
    """Return the sentence with which rows are refused; nothing is left under their name."""
    with pytest.raises(InputError) as caught:
        prepare(wanted, tokenizer, folder, rules, **options)
    message = str(caught.value)
    assert "\n" not in message and not folder.exists()
    return message


FILES = {*(f"{split}.arrow" for split in SPLITS)} | {
    f"{split}_documents.jsonl" for split in SPLITS[1:]
}


def held_out_names(folder, split):
    return [json.loads(line) for line in (folder / f"{split}_documents.jsonl").open()]


def facts_of(folder):
    return artifact.read_manifest(folder)["facts"]


def digests_of(folder):
    files = artifact.read_manifest(folder)["files"]
    assert set(files) == FILES
    return {name: entry["sha256"] for name, entry in files.items()}


def encoded(texts, tokenizer):
    """Return the ids of each text with its end; only for text that spells no special token."""
    end = [tokenizer.eos_token_id]
    if not texts:
        return []
    return [ids + end for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def stream_of(texts, tokenizer):
    return sum(encoded(texts, tokenizer), [])


def whole(rows):
    """Return all rows as a list of lists."""
    return rows.__getitems__(list(range(len(rows))))["input_ids"].tolist()


def held_out_stream(rows):
    """Return the ids of a held-out split, what is filled up included."""
    found = whole(rows)
    return found[0] + sum((row[1:] for row in found[1:]), [])


def whole_documents(folder):
    """Return the training documents in rows of best_fit in which all have room, sorted."""
    file = RowFile.open(folder / "train.arrow")
    parts = [part.tolist() for index in range(len(file)) for part in file.documents_of(index)]
    return sorted(parts)


def split_texts(wanted, rules=None):
    """Return the texts of each split, as the corpus says they are."""
    found = {split: [] for split in SPLITS}
    for document in Corpus(wanted, CleaningSection(**(rules or {}))).documents():
        found[document.split].append(document.text)
    return found


def head(text):
    return text[: len(text) * 9 // 10]


def tail(text):
    return text[len(text) * 9 // 10 :]


def table_line(folder, wanted, name):
    """Return the cells of one line of what `describe` says."""
    lines = [line.split() for line in describe(folder, wanted).splitlines()]
    return next(line for line in lines if line and line[0] == name)


# -- documents to rows ----------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [2, 16, 100])
def test_training_rows_are_the_stream_less_its_last_partial_row(
    text_folder, texts, tokenizer, tmp_path, block_size
):
    out, wanted = tmp_path / "blocks", section(text_folder, block_size=block_size)
    rows = prepare(wanted, tokenizer, out)["train"]
    stream = stream_of(map(head, texts), tokenizer)
    found = whole(rows)
    assert {len(row) for row in found} == {block_size} == {rows.block_size}
    joined = sum(found, [])
    assert joined == stream[: len(joined)]
    left_out = len(stream) - len(joined)
    assert 0 <= left_out < block_size
    facts = facts_of(out)["train"]
    assert facts["left_out"] == left_out and facts["padding"] == 0
    assert facts["rows"] == len(rows) and facts["tokens"] == rows.tokens == len(stream)
    assert facts["documents"] == len(texts)
    assert facts["bytes"] == rows.bytes == sum(len(head(text).encode()) for text in texts)
    cells = table_line(out, wanted, "train")
    assert cells[-1] == str(left_out) and f"{len(stream):,}" in cells


@pytest.mark.parametrize("block_size", [2, 16, 100, 5000])
def test_held_out_rows_overlap_by_one_and_lose_nothing(
    text_folder, texts, tokenizer, tmp_path, block_size
):
    # 5000 is longer than the held-out stream, but not than the training stream.
    wanted = section(text_folder, block_size=block_size)
    rows = prepare(wanted, tokenizer, tmp_path / "blocks")["validation"]
    stream = stream_of(map(tail, texts), tokenizer)
    found = whole(rows)
    assert {len(row) for row in found} == {block_size}
    for row, following in zip(found, found[1:], strict=False):
        assert following[0] == row[-1]
    joined = held_out_stream(rows)
    assert joined[: len(stream)] == stream
    assert set(joined[len(stream) :]) <= {tokenizer.eos_token_id}
    assert len(found) == math.ceil((len(stream) - 1) / (block_size - 1))
    assert rows.tokens == len(stream) and rows.scored_tokens == len(stream) - 1
    assert rows.bytes == sum(len(tail(text).encode()) for text in texts)
    first_token = tokenizer.backend_tokenizer.id_to_token(stream[0])
    assert rows.scored_bytes == rows.bytes - len(first_token)


def test_whole_documents_go_to_the_split_of_their_hash(tmp_path, tokenizer, corpus_folder):
    wanted = documents_section(corpus_folder, test_fraction=0.2)
    splits = prepare(wanted, tokenizer, tmp_path / "blocks")
    assert list(splits) == SPLITS
    documents = list(Corpus(wanted).documents())
    facts = facts_of(tmp_path / "blocks")
    for split in SPLITS:
        members = [d for d in documents if d.split == split]
        stream = stream_of([d.text for d in members], tokenizer)
        assert splits[split].tokens == len(stream)
        assert facts[split]["documents"] == len(members)
        # Which documents are held out is on record; listing the others would be the corpus.
        if split != "train":
            assert held_out_names(tmp_path / "blocks", split) == [d.name for d in members]
        if split == "train":
            found = whole(splits[split])
            assert sum(found, []) == stream[: len(found) * BLOCK]
        else:
            assert held_out_stream(splits[split])[: len(stream)] == stream


@pytest.mark.slow
def test_twenty_thousand_lines_are_all_there_once_and_in_order(tmp_path, tokenizer, monkeypatch):
    """In many shards, each encoded in many calls."""
    monkeypatch.setattr(sources, "SHARD_BYTES", (1 << 15, 1 << 15))
    monkeypatch.setattr(token_shards, "CHARACTERS_PER_CALL", 1 << 13)
    monkeypatch.setattr(preparation.cleaning, "TOKENS_AT_ONCE", 1000)
    source = random.Random(0)
    lines = [
        f"{number} {' '.join(source.choices(WORDS, k=source.randint(0, 4)))}"
        for number in range(20_000)
    ]
    wanted = documents_section(write_rows(tmp_path / "lines.jsonl", lines))
    assert len(Corpus(wanted).shards) > 10
    splits = prepare(wanted, tokenizer, tmp_path / "blocks", num_proc=1)
    parts = split_texts(wanted)
    assert sorted(itertools.chain(*parts.values())) == sorted(lines)
    for split in SPLITS:
        stream = stream_of_many(parts[split], tokenizer)
        found = np.array(whole(splits[split]))
        joined = found.reshape(-1) if split == "train" else np.append(found[0, 0], found[:, 1:])
        length = min(len(joined), len(stream))
        assert len(stream) - length < BLOCK and (joined[:length] == stream[:length]).all()
        facts = facts_of(tmp_path / "blocks")[split]
        assert (facts["documents"], facts["tokens"]) == (len(parts[split]), len(stream))


def stream_of_many(texts, tokenizer):
    return np.array(list(itertools.chain.from_iterable(encoded(texts, tokenizer))))


def test_an_empty_test_split_is_absent(text_folder, tokenizer, tmp_path):
    for _ in range(2):
        splits = prepare(section(text_folder), tokenizer, tmp_path / "blocks")
        assert list(splits) == ["train", "validation"]


def test_text_that_spells_the_control_token_ends_no_document(tmp_path, tokenizer):
    text = "before <|endoftext|> after " * 30
    write_texts(tmp_path / "text", [text] * 3)
    splits = prepare(section(tmp_path / "text"), tokenizer, tmp_path / "blocks")
    ids = np.array(whole(splits["train"])).reshape(-1)
    assert 2 <= (ids == tokenizer.eos_token_id).sum() <= 3  # the last may be left out
    first = ids[: list(ids).index(tokenizer.eos_token_id)]
    assert tokenizer.decode(first) == head(text)
    starts = RowFile.open(tmp_path / "blocks" / "train.arrow")
    assert sum(len(starts.row(n)[1]) for n in range(len(starts))) == 3


@pytest.mark.parametrize("values", [{}, {"packing": "best_fit"}])
def test_a_split_opens_as_a_data_set_of_fixed_lists(text_folder, tokenizer, tmp_path, values):
    out = tmp_path / "blocks"
    rows = prepare(section(text_folder, **values), tokenizer, out)
    for split in rows:
        opened = datasets.Dataset.from_file(str(out / f"{split}.arrow"))
        assert opened.column_names == ["input_ids", "document_starts", "tokens"]
        assert opened.features["input_ids"].length == BLOCK
        assert opened["input_ids"][:] == whole(rows[split])


def test_two_bytes_a_token_on_disk(texts, tokenizer, tmp_path):
    source = random.Random(0)
    (tmp_path / "long.txt").write_text("".join(source.choices(texts, k=400)))
    splits = prepare(section(tmp_path / "long.txt", block_size=1024), tokenizer, tmp_path / "b")
    ids = len(splits["train"]) * 1024
    assert ids > 50_000
    assert 2 <= (tmp_path / "b" / "train.arrow").stat().st_size / ids < 2.05
    kept = {path.name for path in (tmp_path / "b").iterdir()}
    assert kept == {"manifest.json", *FILES}
    assert {path.name for path in tmp_path.iterdir()} == {"b", "long.txt"}  # the shards are gone


def large_tokenizer(entries):
    """Return a byte-level tokenizer whose last id is "ab", found without training."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<|endoftext|>", *alphabet, *(f"unused{n}" for n in range(entries - 258)), "ab"]
    backend = Tokenizer(models.BPE({name: n for n, name in enumerate(names)}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


@pytest.mark.parametrize("entries, dtype", [(65_536, "uint16"), (65_537, "uint32")])
def test_ids_are_stored_in_the_narrowest_type_that_holds_them(tmp_path, entries, dtype):
    large = large_tokenizer(entries)
    assert len(large) == entries
    (tmp_path / "t.txt").write_text("ab" * 3000)
    splits = prepare(section(tmp_path / "t.txt", block_size=64), large, tmp_path / "blocks")
    opened = datasets.Dataset.from_file(str(tmp_path / "blocks" / "train.arrow"))
    assert opened.features["input_ids"].feature.dtype == dtype
    assert splits["train"][0]["input_ids"].tolist() == [entries - 1] * 64


def test_a_held_out_document_is_on_record_by_any_name(tmp_path, tokenizer):
    """File names may hold whatever a line of text may not."""
    names = ["a\nb", "c\rd", "e\x0cf", "g\u2028h", "i\x85j", "plain"]
    folder = write_texts(tmp_path / "text", [])
    for name, text in zip(names, make_texts(len(names)), strict=True):
        (folder / f"{name}.txt").write_text(text)
    prepare(section(folder), tokenizer, tmp_path / "blocks")
    found = held_out_names(tmp_path / "blocks", "validation")
    assert found == [f"{folder}/{name}.txt" for name in sorted(names)]


# -- the same bytes -------------------------------------------------------------------------------


@pytest.fixture
def lines_file(tmp_path):
    """A table of 400 documents, in shards of about 40 each where SHARD_BYTES is 4,000."""
    texts = [text[:100] for text in make_texts(400, seed=5)]
    return write_rows(tmp_path / "lines.jsonl", texts)


def test_the_number_of_processes_changes_no_byte(lines_file, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SHARD_BYTES", (4000, 4000))
    wanted = documents_section(lines_file)
    assert len(Corpus(wanted).shards) > 5
    prepare(wanted, tokenizer, tmp_path / "one", num_proc=1)
    prepare(wanted, tokenizer, tmp_path / "two", num_proc=2)
    assert digests_of(tmp_path / "one") == digests_of(tmp_path / "two")
    assert facts_of(tmp_path / "one") == facts_of(tmp_path / "two")


def test_several_machines_make_the_same_bytes(lines_file, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SHARD_BYTES", (4000, 4000))
    wanted = documents_section(lines_file)
    prepare(wanted, tokenizer, tmp_path / "one")
    corpus = Corpus(wanted)
    for rank in (2, 1, 0):  # the first waits for the others, so it comes last here
        options = {"rank": rank, "world_size": 3, "num_proc": 1}
        prepare_blocks(wanted, corpus, tokenizer, tmp_path / "three", **options)
        assert (tmp_path / "three").exists() == (rank == 0)
    assert digests_of(tmp_path / "one") == digests_of(tmp_path / "three")


def test_how_documents_are_batched_changes_nothing(text_folder, tokenizer, tmp_path, monkeypatch):
    prepare(section(text_folder), tokenizer, tmp_path / "one")
    monkeypatch.setattr(token_shards, "CHARACTERS_PER_CALL", 1)
    monkeypatch.setattr(preparation.cleaning, "TOKENS_AT_ONCE", 1)
    monkeypatch.setattr(text_files, "WINDOW", 100)
    prepare(section(text_folder), tokenizer, tmp_path / "two")
    assert digests_of(tmp_path / "one") == digests_of(tmp_path / "two")


@pytest.mark.parametrize("values", [{"packing": "best_fit"}, {"packing": "sliding", "stride": 5}])
def test_how_the_stream_is_cut_to_chunks_changes_no_row(
    text_folder, tokenizer, tmp_path, monkeypatch, values
):
    prepare(section(text_folder, **values), tokenizer, tmp_path / "one")
    monkeypatch.setattr(preparation.cleaning, "TOKENS_AT_ONCE", 40)  # below a document's length
    prepare(section(text_folder, **values), tokenizer, tmp_path / "two")
    assert digests_of(tmp_path / "one") == digests_of(tmp_path / "two")


def test_rows_are_reused_and_not_written_again(text_folder, tokenizer, tmp_path):
    out = tmp_path / "blocks"
    first = prepare(section(text_folder), tokenizer, out)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.iterdir()}
    # Documents are kept apart when rows are read, so it makes no difference to what is on disk.
    for values in ({}, {"attend_across": False}):
        again = prepare(section(text_folder, **values), tokenizer, out)
        assert before == {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in out.iterdir()}
        for split in first:
            assert whole(first[split]) == whole(again[split])
            assert first[split].fingerprint == again[split].fingerprint


def test_another_recipe_is_refused_with_the_difference(text_folder, texts, tokenizer, tmp_path):
    out = tmp_path / "blocks"
    prepare(section(text_folder), tokenizer, out)
    other_tokenizer = train_tokenizer(texts, vocab_size=300)
    for wanted, used, rules, difference in [
        (section(text_folder, block_size=32), tokenizer, {}, "data.block_size: 16 -> 32"),
        (section(text_folder, validation_fraction=0.2), tokenizer, {}, "fraction: 0.1 -> 0.2"),
        (section(text_folder, hold_out="documents"), tokenizer, {}, '"tail" -> "documents"'),
        (section(text_folder), other_tokenizer, {}, "tokenizer: "),
        (section(text_folder, packing="best_fit"), tokenizer, {}, 'packing: "concatenate" -> '),
        (section(text_folder, packing="sliding", stride=3), tokenizer, {}, "stride: null -> 3"),
        (section(text_folder), tokenizer, {"deduplicate": True}, "deduplicate: false -> true"),
        (section(text_folder), tokenizer, {"shortest": 9}, "shortest: 1 -> 9"),
        (section(text_folder), tokenizer, {"normalization": "NFC"}, 'tion: null -> "NFC"'),
    ]:
        with pytest.raises(InputError) as caught:
            prepare(wanted, used, out, rules)
        message = str(caught.value)
        assert str(out) in message and difference in message and "remove that folder" in message
        assert "\n" not in message
    (text_folder / "000.txt").write_text("changed")
    with pytest.raises(InputError, match="corpus.sources: "):
        prepare(section(text_folder), tokenizer, out)


def test_other_benchmarks_make_other_rows(text_folder, tokenizer, tmp_path):
    benchmark = tmp_path / "benchmark.txt"
    benchmark.write_text("a question that nobody trains on, and its answer")
    rules = {"decontaminate": "drop", "benchmark_files": [str(benchmark)]}
    prepare(section(text_folder), tokenizer, tmp_path / "blocks", rules)
    prepare(section(text_folder), tokenizer, tmp_path / "blocks", rules)
    benchmark.write_text("another question")
    with pytest.raises(InputError, match="cleaning.benchmarks: "):
        prepare(section(text_folder), tokenizer, tmp_path / "blocks", rules)


# -- interrupted, and two at once -----------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline import preparation, sources, token_shards
from pipeline.corpus import Corpus
from pipeline.recipe import DataSection
from pipeline.tokenizer import load_tokenizer

sources.SHARD_BYTES = (4000, 4000)
calls, make = [], token_shards.make_token_shard

def killed_in_the_third(place, *rest):
    calls.append(place)
    if len(calls) == 3:  # its folder is begun and not finished
        token_shards._limited = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    make(place, *rest)

token_shards.make_token_shard = killed_in_the_third
wanted = DataSection.model_validate_json(sys.argv[1])
preparation.prepare_blocks(
    wanted, Corpus(wanted), load_tokenizer(sys.argv[2]), Path(sys.argv[3]), num_proc=1
)
"""


def test_killed_with_kill_9_it_goes_on_with_the_shards_that_stand(
    lines_file, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(sources, "SHARD_BYTES", (4000, 4000))
    wanted = documents_section(lines_file)
    out, count = tmp_path / "blocks", len(Corpus(wanted).shards)
    prepare(wanted, tokenizer, tmp_path / "straight")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = [wanted.model_dump_json(exclude_unset=True), tmp_path / "tokenizer", out]
    victim = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)], cwd=ROOT, timeout=100
    )
    assert victim.returncode == -9
    assert not out.exists()
    stand = sorted(path.name for path in (tmp_path / "_shards-blocks").iterdir())
    assert len(stand) == 3 and stand[:2] == ["000000", "000001"]
    assert stand[2].startswith("_staging-000002")
    made, make = [], token_shards.make_token_shard
    monkeypatch.setattr(
        token_shards, "make_token_shard", lambda p, *rest: made.append(p.name) or make(p, *rest)
    )
    prepare(wanted, tokenizer, out, num_proc=1)
    assert made == [f"{number:06}" for number in range(2, count)]
    assert digests_of(out) == digests_of(tmp_path / "straight")
    assert facts_of(out) == facts_of(tmp_path / "straight")
    assert not (tmp_path / "_shards-blocks").exists()


def interrupted(wanted, tokenizer, out, monkeypatch, after):
    """Prepare until `after` shards stand."""
    make, made = token_shards.make_token_shard, []

    def stop(place, *rest):
        if len(made) == after:
            raise KeyboardInterrupt
        made.append(place)
        make(place, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(token_shards, "make_token_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(wanted, tokenizer, out, num_proc=1)
    assert not out.exists()
    return made


@pytest.mark.slow
def test_a_shard_that_was_damaged_or_of_other_text_is_made_again(
    lines_file, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(sources, "SHARD_BYTES", (4000, 4000))
    wanted = documents_section(lines_file)
    prepare(wanted, tokenizer, tmp_path / "straight")
    made = interrupted(wanted, tokenizer, tmp_path / "damaged", monkeypatch, 3)
    tokens = np.fromfile(made[1] / "tokens.bin", np.uint16)
    tokens[5] += 1
    tokens.tofile(made[1] / "tokens.bin")
    prepare(wanted, tokenizer, tmp_path / "damaged")
    assert digests_of(tmp_path / "damaged") == digests_of(tmp_path / "straight")

    interrupted(wanted, tokenizer, tmp_path / "changed", monkeypatch, 3)
    texts = [json.loads(line)["text"] for line in lines_file.read_text().splitlines()]
    write_rows(lines_file, [text.replace("a", "b") for text in texts])
    prepare(wanted, tokenizer, tmp_path / "changed")
    prepare(wanted, tokenizer, tmp_path / "anew")
    assert digests_of(tmp_path / "changed") == digests_of(tmp_path / "anew")
    assert digests_of(tmp_path / "changed") != digests_of(tmp_path / "straight")


def test_two_at_once_on_one_folder(lines_file, tokenizer, tmp_path, monkeypatch):
    wanted, out = documents_section(lines_file), tmp_path / "blocks"
    make, said = token_shards.make_token_shard, []

    def meanwhile(*arguments):
        said.append(refusal(wanted, tokenizer, out, num_proc=1))
        prepare(wanted, tokenizer, tmp_path / "elsewhere", num_proc=1)
        make(*arguments)

    def once(*arguments):
        monkeypatch.setattr(token_shards, "make_token_shard", make)
        meanwhile(*arguments)

    monkeypatch.setattr(token_shards, "make_token_shard", once)
    prepare(wanted, tokenizer, out, num_proc=1)
    assert len(said) == 1 and "another process is at work" in said[0]
    assert "--data.path" in said[0]
    assert digests_of(out) == digests_of(tmp_path / "elsewhere")


ROOM = 512  # tokens: no document of these tests is longer


def roomy(path, **values):
    """Whole documents in rows, so that they can be told apart there."""
    return documents_section(path, **({"packing": "best_fit", "block_size": ROOM} | values))


def held_out_text(rows):
    return held_out_stream(rows)[: rows.tokens]


def source_line(folder, wanted):
    """Return the counts of the only source as the table has them."""
    lines = describe(folder, wanted).splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("source"))
    names, cells = lines[at].split(), lines[at + 1].split()
    return {name: int(cells[names.index(name)].replace(",", "")) for name in ("copies", "dropped")}


def grams(document):
    """Return every 13 tokens in a row of a document, its end left out."""
    return [tuple(document[n : n + 13]) for n in range(len(document) - 13)]


def cut_out(document, known):
    """Return what is left of a document in parts, each with an end of its own."""
    covered = {
        k for n, gram in enumerate(grams(document)) if gram in known for k in range(n, n + 13)
    }
    parts = [[]]
    for place, number in enumerate(document[:-1]):
        if place in covered:
            parts.append([])
        else:
            parts[-1].append(number)
    return [part + document[-1:] for part in parts if part]


def related_texts(wanted):
    """Return documents of which some training ones quote held-out ones, by a little or a lot."""
    source = random.Random(0)
    texts = [f"{n} {text[:400]}" for n, text in enumerate(make_texts(120, seed=9))]
    held_out = [text for text in texts if split_of(text, wanted) != "train"]
    if wanted.hold_out == "tail":
        held_out = [text[len(text) * 7 // 10 :] for text in texts]
    for number in range(60):
        quoted = source.choice(held_out)
        start = source.randrange(len(quoted) // 2)
        quote = quoted[start : start + source.choice([10, 40, 120, 400])]
        text = source.choice(
            [f"{quote} {number}", f"{number} says {quote}!", f"q{number} {quote} x"]
        )
        if split_of(text, wanted) == "train":
            texts.insert(source.randrange(len(texts)), text)
    return texts


def test_two_at_once_beside_each_other(text_folder, tokenizer, tmp_path):
    """Of which the one's name begins with the other's."""
    with artifact.staged(tmp_path / "blocks-2", {}) as (staging, _):
        (staging / "half").write_text("begun")
        prepare(section(text_folder), tokenizer, tmp_path / "blocks")
        assert (staging / "half").exists()


# -- what is left out -----------------------------------------------------------------------------


def test_copies_are_counted_and_one_stays(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "SHARD_BYTES", (2000, 2000))
    distinct = [text[:90] for text in make_texts(60, seed=1)]
    source = random.Random(0)
    texts = distinct + source.choices(distinct, k=45)
    source.shuffle(texts)
    wanted = roomy(write_rows(tmp_path / "lines.jsonl", texts))
    assert len(Corpus(wanted).shards) > 3
    for rules, out in [({"deduplicate": True}, "once"), ({}, "all")]:
        rows = prepare(wanted, tokenizer, tmp_path / out, rules)
        parts = split_texts(wanted)
        if rules:
            parts = {split: list(dict.fromkeys(parts[split])) for split in SPLITS}
        assert whole_documents(tmp_path / out) == sorted(encoded(parts["train"], tokenizer))
        for split in SPLITS[1:]:
            assert held_out_text(rows[split]) == stream_of(parts[split], tokenizer)
        facts = facts_of(tmp_path / out)
        copies = 45 if rules else 0
        assert facts["sources"][0]["copies"] == copies
        assert sum(facts[split]["documents"] for split in SPLITS) == 105 - copies
        assert source_line(tmp_path / out, wanted)["copies"] == copies


@pytest.mark.parametrize("mode", ["drop", "cut"])
@pytest.mark.parametrize("hold_out", ["documents", "tail"])
def test_no_thirteen_tokens_are_shared_with_held_out_text(
    tmp_path, tokenizer, monkeypatch, mode, hold_out
):
    monkeypatch.setattr(sources, "SHARD_BYTES", (3000, 3000))
    wanted = roomy(tmp_path / "lines.jsonl", hold_out=hold_out)
    write_rows(tmp_path / "lines.jsonl", related_texts(wanted))
    parts = {s: encoded(texts, tokenizer) for s, texts in split_texts(wanted).items()}
    known = {g for s in SPLITS[1:] for document in parts[s] for g in grams(document)}
    shared = [document for document in parts["train"] if known & set(grams(document))]
    assert 10 < len(shared) < len(parts["train"]) / 2
    if mode == "drop":
        expected = [document for document in parts["train"] if document not in shared]
    else:
        expected = [part for document in parts["train"] for part in cut_out(document, known)]
    out = tmp_path / "blocks"
    rows = prepare(wanted, tokenizer, out, {"decontaminate": mode})
    found = whole_documents(out)
    assert not known & {g for document in found for g in grams(document)}
    assert found == sorted(expected)
    facts = facts_of(out)
    counts = {name: facts["sources"][0][name] for name in ("dropped", "cut")}
    assert counts == {"dropped": 0, "cut": 0} | {{"drop": "dropped"}.get(mode, mode): len(shared)}
    assert facts["train"]["documents"] == len(expected)
    assert facts["train"]["tokens"] == sum(map(len, expected))
    said = f"{len(shared)} for text" if mode == "drop" else f"such text: {len(shared)}"
    assert said in describe(out, wanted)
    for split in SPLITS[1:]:  # what is held out stays as it is
        assert held_out_text(rows[split]) == sum(parts[split], [])


def test_a_training_document_that_is_also_a_validation_file_is_named(tmp_path, tokenizer):
    folder = write_texts(tmp_path / "text", make_texts(30, seed=2))
    (tmp_path / "held.txt").write_text((folder / "017.txt").read_text())
    (tmp_path / "other.txt").write_text("a text that is nowhere else in the corpus\n" * 3)
    values = {"validation_files": [str(tmp_path / "held.txt"), str(tmp_path / "other.txt")]}
    wanted = roomy(folder, test_fraction=0.0, **values)
    message = refusal(wanted, tokenizer, tmp_path / "blocks")
    assert message.startswith(f"{folder}/017.txt: ") and "decontaminate copies" in message
    rows = prepare(wanted, tokenizer, tmp_path / "blocks", {"decontaminate": "copies"})
    held_out = [(tmp_path / name).read_text() for name in ("held.txt", "other.txt")]
    assert held_out_text(rows["validation"]) == stream_of(held_out, tokenizer)
    facts = facts_of(tmp_path / "blocks")
    assert held_out_names(tmp_path / "blocks", "validation") == values["validation_files"]
    assert facts["sources"][0]["dropped"] == 30 - facts["train"]["documents"] >= 1
    assert [source["documents"] for source in facts["sources"]][1:] == [2]
    assert encoded(held_out, tokenizer)[0] not in whole_documents(tmp_path / "blocks")


def test_validation_files_stay_where_copies_are_left_out(tmp_path, tokenizer):
    """The copy in the training text comes first, and goes; the one that is held out stays."""
    folder = write_texts(tmp_path / "text", make_texts(30, seed=2))
    (tmp_path / "held.txt").write_text((folder / "017.txt").read_text())
    wanted = roomy(folder, test_fraction=0.0, validation_files=[str(tmp_path / "held.txt")])
    rules = {"decontaminate": "drop", "deduplicate": True}
    rows = prepare(wanted, tokenizer, tmp_path / "blocks", rules)
    expected = stream_of([(tmp_path / "held.txt").read_text()], tokenizer)
    assert held_out_text(rows["validation"]) == expected
    found = whole_documents(tmp_path / "blocks")
    assert expected not in found and len(found) >= 25


def test_a_validation_file_is_found_in_text_whose_end_is_held_out(tmp_path, tokenizer):
    """The recipe's defaults: few documents, so the end of each is the test text."""
    folder = write_texts(tmp_path / "text", make_texts(30, seed=2))
    (tmp_path / "held.txt").write_text((folder / "017.txt").read_text())
    wanted = DataSection(
        files=[str(folder)], validation_files=[str(tmp_path / "held.txt")], block_size=BLOCK
    )
    assert "017.txt" in refusal(wanted, tokenizer, tmp_path / "blocks")


def test_a_document_in_validation_files_and_test_files_is_named(tmp_path, tokenizer):
    folder = write_texts(tmp_path / "text", make_texts(30, seed=2))
    names = ("one", "two")
    for name in names:
        (tmp_path / f"{name}.txt").write_text("held out twice\n" * 5)
    files = {
        f"{s}_files": [str(tmp_path / f"{n}.txt")] for s, n in zip(SPLITS[1:], names, strict=True)
    }
    message = refusal(roomy(folder, **files), tokenizer, tmp_path / "blocks")
    assert "two.txt: the same document is in validation and in test" in message


@pytest.mark.parametrize("mode", ["drop", "cut"])
def test_benchmark_files_are_kept_out(tmp_path, tokenizer, mode):
    texts = [text[:300] for text in make_texts(80, seed=3)]
    wanted = roomy(write_rows(tmp_path / "lines.jsonl", texts))
    trained = split_texts(wanted)["train"]
    write_rows(tmp_path / "benchmark.jsonl", ["zzz " + trained[3][50:250], trained[7], "short"])
    rules = {"decontaminate": mode, "benchmark_files": str(tmp_path / "benchmark.jsonl")}
    benchmark = ["zzz " + trained[3][50:250], trained[7]]
    known = {g for document in encoded(benchmark, tokenizer) for g in grams(document)}
    held_out = encoded(sum((split_texts(wanted)[s] for s in SPLITS[1:]), []), tokenizer)
    known |= {g for document in held_out for g in grams(document)}
    prepare(wanted, tokenizer, tmp_path / "blocks", rules)
    found = whole_documents(tmp_path / "blocks")
    expected = [part for d in encoded(trained, tokenizer) for part in cut_out(d, known)]
    if mode == "drop":
        expected = [d for d in encoded(trained, tokenizer) if not known & set(grams(d))]
    assert found == sorted(expected)
    first, second = encoded([trained[3], trained[7]], tokenizer)
    assert first not in found and second not in found


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_benchmark_files_are_normalised_as_the_documents_are(tmp_path, tokenizer, form):
    spelt = "naïve façade café déjà vu élève où ça à la même fête dû être très "
    texts = [text[:300] for text in make_texts(80, seed=3)] + [spelt * 3]
    wanted = roomy(write_rows(tmp_path / "lines.jsonl", texts), validation_fraction=0.1)
    assert spelt * 3 in split_texts(wanted)["train"]
    (tmp_path / "benchmark.txt").write_text(unicodedata.normalize(form, spelt * 2))
    rules = {
        "decontaminate": "drop", "normalization": "NFC",
        "benchmark_files": [str(tmp_path / "benchmark.txt")],
    }  # fmt: skip
    prepare(wanted, tokenizer, tmp_path / "blocks", rules)
    assert encoded([spelt * 3], tokenizer)[0] not in whole_documents(tmp_path / "blocks")


def test_documents_are_normalised_before_they_are_compared(tmp_path, tokenizer):
    texts = [text[:200] for text in make_texts(60, seed=3)]
    twice = [unicodedata.normalize(form, text) for text in texts for form in ("NFC", "NFD")]
    different = sum(twice[n] != twice[n + 1] for n in range(0, 120, 2))
    assert different > 20
    wanted = roomy(write_rows(tmp_path / "lines.jsonl", twice))
    for rules, copies in [({}, 60 - different), ({"normalization": "NFC"}, 60)]:
        out = tmp_path / f"{copies}"
        prepare(wanted, tokenizer, out, rules | {"deduplicate": True})
        assert facts_of(out)["sources"][0]["copies"] == copies


@pytest.mark.parametrize("window", [100, 1 << 20])
def test_what_is_too_short_too_long_or_empty_is_counted(tmp_path, tokenizer, monkeypatch, window):
    monkeypatch.setattr(text_files, "WINDOW", window)
    texts = [text[:160] for text in make_texts(60, seed=4)]
    lengths = {"short": [1, 19, 5, 19], "long": [301, 700], "kept": [20, 21, 299, 300]}
    words = ("word " * 200)[: lengths["long"][1]]
    odd = {name: [f"{n}{words}"[:n] for n in found] for name, found in lengths.items()}
    texts += sum(odd.values(), []) + ["", "", ""]
    random.Random(0).shuffle(texts)
    path = write_rows(tmp_path / "lines.jsonl", texts)
    with path.open("a") as file:
        file.write('{"text": null}\n')
    wanted = roomy(path)
    prepare(wanted, tokenizer, tmp_path / "blocks", {"shortest": 20, "longest": 300})
    facts = facts_of(tmp_path / "blocks")
    counts = {name: facts["sources"][0][name] for name in ("empty", "short", "long")}
    assert counts == {"empty": 4, "short": 4, "long": 2}
    assert sum(facts[split]["documents"] for split in SPLITS) == len(texts) - 9
    said = describe(tmp_path / "blocks", wanted)
    assert "dropped: 4 empty, 4 short, 2 long, 0 for text" in said
    assert source_line(tmp_path / "blocks", wanted)["dropped"] == 10
    found = whole_documents(tmp_path / "blocks")
    kept = [t for t in split_texts(wanted)["train"] if 20 <= len(t) <= 300]
    assert found == sorted(encoded(kept, tokenizer))


def test_where_the_end_of_documents_is_held_out_the_counts_are_of_documents(
    text_folder, texts, tokenizer, tmp_path
):
    """A document is in three pieces there, and a piece that is empty is no empty document."""
    wanted = section(text_folder)
    prepare(wanted, tokenizer, tmp_path / "blocks")
    source = facts_of(tmp_path / "blocks")["sources"][0]
    assert [source[name] for name in ("empty", "short", "long", "copies")] == [0] * 4
    assert "dropped: 0 empty, 0 short, 0 long" in describe(tmp_path / "blocks", wanted)


def test_where_the_end_of_documents_is_held_out_a_short_document_is_a_whole_one(
    text_folder, texts, tokenizer, tmp_path
):
    shortest = sorted(len(text) for text in texts)[10]
    wanted = section(text_folder)
    rows = prepare(wanted, tokenizer, tmp_path / "blocks", {"shortest": shortest})
    kept = [text for text in texts if len(text) >= shortest]
    assert held_out_text(rows["validation"]) == stream_of(map(tail, kept), tokenizer)
    assert facts_of(tmp_path / "blocks")["train"]["documents"] == len(kept)


# -- packing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [{}, {"decontaminate": "cut"}])
def test_best_fit_says_what_is_filled_up_and_cut(tmp_path, tokenizer, rules):
    wanted = roomy(tmp_path / "lines.jsonl", block_size=64)
    write_rows(tmp_path / "lines.jsonl", related_texts(wanted))
    prepare(wanted, tokenizer, tmp_path / "blocks", rules)
    parts = {s: encoded(texts, tokenizer) for s, texts in split_texts(wanted).items()}
    documents = parts["train"]
    if rules:
        known = {g for s in SPLITS[1:] for document in parts[s] for g in grams(document)}
        documents = [part for document in documents for part in cut_out(document, known)]
    facts = facts_of(tmp_path / "blocks")["train"]
    pieces = [d[n : n + 64] for d in documents for n in range(0, len(d), 64)]
    assert whole_documents(tmp_path / "blocks") == sorted(pieces)
    long = sum(len(document) > 64 for document in documents)
    assert 0 < long < len(documents)
    tokens = sum(map(len, documents))
    assert facts["left_out"] == 0 and facts["tokens"] == tokens
    padding = 1 - tokens / (facts["rows"] * 64)
    assert facts["padding"] == pytest.approx(padding)
    assert facts["truncation"] == pytest.approx(long / len(documents))
    assert (
        f"best_fit: {padding:.2%} of the room in the rows is padding, "
        f"{long / len(documents):.2%} of the documents are longer than a row and cut"
    ) in describe(tmp_path / "blocks", wanted)


@pytest.mark.parametrize("at_once", [1 << 22, 40])
def test_what_is_left_of_a_long_document_is_packed_in_whole_rows_and_remainders(
    tmp_path, tokenizer, monkeypatch, at_once
):
    """However few tokens are in memory at once."""
    monkeypatch.setattr(preparation.cleaning, "TOKENS_AT_ONCE", at_once)
    wanted = roomy(tmp_path / "lines.jsonl", block_size=BLOCK)
    write_rows(tmp_path / "lines.jsonl", related_texts(wanted))
    parts = {s: encoded(texts, tokenizer) for s, texts in split_texts(wanted).items()}
    known = {g for s in SPLITS[1:] for document in parts[s] for g in grams(document)}
    left = [part for document in parts["train"] for part in cut_out(document, known)]
    prepare(wanted, tokenizer, tmp_path / "blocks", {"decontaminate": "cut"})
    pieces = [d[n : n + BLOCK] for d in left for n in range(0, len(d), BLOCK)]
    assert whole_documents(tmp_path / "blocks") == sorted(pieces)


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_sliding_rows_begin_every_stride(text_folder, texts, tokenizer, tmp_path, stride):
    wanted = section(text_folder, packing="sliding", stride=stride)
    rows = prepare(wanted, tokenizer, tmp_path / "blocks")["train"]
    stream = stream_of(map(head, texts), tokenizer)
    places = range(0, len(stream) - BLOCK + 1, stride)
    assert whole(rows) == [stream[place : place + BLOCK] for place in places]
    facts = facts_of(tmp_path / "blocks")["train"]
    assert facts["left_out"] == len(stream) - (places[-1] + BLOCK)
    assert facts["tokens"] == len(stream) and facts["padding"] == 0


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_rows_shown_have_their_documents_apart(tmp_path, tokenizer, packing):
    texts = [f"{number} {text[:40]}" for number, text in enumerate(make_texts(80, seed=6))]
    texts = [" ".join(text.split()) for text in texts]
    wanted = roomy(write_rows(tmp_path / "lines.jsonl", texts), packing=packing, block_size=100)
    rows = prepare(wanted, tokenizer, tmp_path / "blocks")["train"]
    shown = show(tmp_path / "blocks", tokenizer, 10**6).splitlines()
    heads = [n for n, line in enumerate(shown) if line.startswith("--- row ")]
    assert [shown[n].split()[2] for n in heads] == [f"{n}:" for n in range(len(rows))]
    lines, trained = [], split_texts(wanted)["train"]
    for head_at, following in itertools.pairwise([*heads, len(shown)]):
        marks, documents = shown[head_at + 1 : following : 2], shown[head_at + 2 : following : 2]
        if packing == "best_fit":
            assert set(marks) == {"[a document, or a part of a long one]"}
        else:
            assert set(marks[1:]) <= {"[a document begins]"}
            assert marks[0] in ("[a document begins]", "[a document goes on]")
        assert f": {len(documents)} document(s)" in shown[head_at]
        filled = re.search(r", (\d+) filled up", shown[head_at])
        text = "".join(documents)
        used = len(stream_of([text], tokenizer)) if not text.endswith("|>") else None
        if packing == "best_fit":
            assert all(line.endswith("<|endoftext|>") for line in documents) and used is None
            tokens = sum(map(len, encoded([d[:-13] for d in documents], tokenizer)))
            assert tokens + int(filled[1] if filled else 0) == 100
        else:
            assert filled is None
            assert all(line.endswith("<|endoftext|>") for line in documents[:-1])
        lines += documents
    if packing == "best_fit":
        assert sorted(lines) == sorted(f"{text}<|endoftext|>" for text in trained)
    else:
        assert "<|endoftext|>".join(trained).startswith("".join(lines)[:-20])
    some = show(tmp_path / "blocks", tokenizer, 3)
    numbers = [int(n) for n in re.findall(r"--- row (\d+):", some)]
    assert numbers == [0, round((len(rows) - 1) / 2), len(rows) - 1]


# -- mixtures -------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path):
    """Three sources: many documents, few, and one that is shorter than a row."""
    folder = tmp_path / "sources"
    folder.mkdir()
    write_rows(folder / "many.jsonl", [f"many {t[:150]}" for t in make_texts(200, seed=7)])
    write_rows(folder / "few.jsonl", [f"few {t[:150]}" for t in make_texts(60, seed=8)])
    write_rows(folder / "none.jsonl", ["tiny"])
    return folder


def mixed(folder, weights, **values):
    named = [
        {"files": str(folder / f"{name}.jsonl"), "name": name}
        | ({} if weight is None else {"weight": weight})
        for name, weight in weights.items()
    ]
    return documents_section(None, sources=named, **values)


def shares_of(folder, wanted):
    lines = [line.split() for line in describe(folder, wanted).splitlines()]
    names = [source.name for source in wanted.sources]
    found = {line[0]: line for line in lines if line and line[0] in names and len(line) == 8}
    return {name: float(found[name][-1].rstrip("%")) / 100 for name in names}


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, 0.1), (0.25, 0.75), (1, 0), (0, 1)])
def test_a_mixture_has_its_weights_within_a_row(three, tokenizer, tmp_path, weights):
    wanted = mixed(three, dict(zip(("many", "few"), weights, strict=True)))
    out = tmp_path / "blocks"
    rows = prepare(wanted, tokenizer, out)["train"]
    available = [source["rows"] for source in facts_of(out)["sources"]]
    found = np.array(whole(rows))
    assert len(rows) == len(found)
    everything = RowFile.open(out / "train.arrow")
    place = {tuple(everything.row(n)[0].tolist()): n for n in range(len(everything))}
    places = [place[tuple(row)] for row in found.tolist()]
    assert places == sorted(set(places))  # none twice
    taken = sum(n < available[0] for n in places), sum(n >= available[0] for n in places)
    for name, weight, count in zip(("many", "few"), weights, taken, strict=True):
        assert abs(count - weight * len(rows)) <= 1
        assert shares_of(out, wanted)[name] == pytest.approx(count / len(rows), abs=6e-4)
    assert any(t == a for t, a in zip(taken, available, strict=True))
    used_up = ("many", "few")[taken[0] != available[0]]
    assert f"{used_up} is used up: it limits the mixture" in describe(out, wanted)


def test_a_source_that_runs_out_says_so(three, tokenizer, tmp_path):
    wanted, out = mixed(three, {"many": 0.5, "few": 0.5}), tmp_path / "blocks"
    prepare(wanted, tokenizer, out)
    many, few = (source["rows"] for source in facts_of(out)["sources"])
    assert few < many / 2
    asked = 4 * few * BLOCK  # twice what few has, and less than many has
    wanted = mixed(three, {"many": 0.5, "few": 0.5}, mixture_tokens=asked)
    rows = prepare(wanted, tokenizer, out)["train"]
    assert len(rows) == 3 * few
    said = describe(out, wanted)
    assert (
        f"few ran out: {few * BLOCK:,} tokens of the {asked // 2:,} that its weight 0.5 asks for "
        "(33.3% of all)"
    ) in said
    assert "many ran out" not in said
    assert shares_of(out, wanted) == pytest.approx({"many": 0.667, "few": 0.333})
    wanted = mixed(three, {"many": 0.5, "few": 0.5}, mixture_tokens=few * BLOCK)
    rows = prepare(wanted, tokenizer, out)["train"]
    assert abs(len(rows) - few) <= 1 and "ran out" not in describe(out, wanted)


def test_without_weights_all_is_taken(three, tokenizer, tmp_path):
    wanted, out = mixed(three, {"many": None, "few": None, "none": None}), tmp_path / "blocks"
    rows = prepare(wanted, tokenizer, out)["train"]
    facts = facts_of(out)
    counts = [source["rows"] for source in facts["sources"]]
    assert len(rows) == sum(counts) == facts["train"]["rows"] and counts[2] == 0
    shares = shares_of(out, wanted)
    for name, count in zip(("many", "few", "none"), counts, strict=True):
        assert shares[name] == pytest.approx(count / len(rows), abs=6e-4)
    # No row is of two sources, and what each leaves out is counted.
    text = [tokenizer.decode(row) for row in whole(rows)]
    assert not any("few" in row for row in text[: counts[0]])
    assert facts["train"]["left_out"] == facts["train"]["tokens"] - len(rows) * BLOCK


def test_weights_all_on_too_little_text_are_refused(three, tokenizer, tmp_path):
    out = tmp_path / "blocks"
    wanted = mixed(three, {"many": 0, "none": 1})
    for values in ({}, {"mixture_tokens": 1000}):
        wanted = mixed(three, {"many": 0, "none": 1}, **values)
        message = refusal(wanted, tokenizer, out)
        assert "the mixture is empty" in message and "data.sources" in message


def test_weights_all_on_too_little_text_are_refused_on_rows_that_stand(three, tokenizer, tmp_path):
    """Other weights need no other rows, so nothing is prepared anew."""
    out = tmp_path / "blocks"
    prepare(mixed(three, {"many": 1, "none": 0}), tokenizer, out)
    with pytest.raises(InputError, match="the mixture is empty"):
        prepare(mixed(three, {"many": 0, "none": 1}), tokenizer, out)


def test_other_weights_need_no_other_rows(three, tokenizer, tmp_path):
    out = tmp_path / "blocks"
    first = prepare(mixed(three, {"many": 0.5, "few": 0.5}), tokenizer, out)["train"]
    second = prepare(mixed(three, {"many": 0.9, "few": 0.1}), tokenizer, out)["train"]
    assert first.fingerprint == second.fingerprint and len(first) != len(second)


# -- the table ------------------------------------------------------------------------------------


def test_the_table_has_what_each_source_gave(three, tokenizer, tmp_path):
    wanted, out = mixed(three, {"many": None, "few": None}), tmp_path / "blocks"
    prepare(wanted, tokenizer, out)
    for name, source in zip(("many", "few"), facts_of(out)["sources"], strict=True):
        texts = [
            json.loads(line)["text"] for line in (three / f"{name}.jsonl").read_text().splitlines()
        ]
        size, tokens = sum(len(t.encode()) for t in texts), len(stream_of(texts, tokenizer))
        cells = table_line(out, wanted, name)
        assert cells[1:4] == [f"{len(texts):,}", f"{size:,}", f"{tokens:,}"]
        assert float(cells[6]) == pytest.approx(size / (tokens - len(texts)), abs=6e-4)
        assert (source["documents"], source["bytes"], source["tokens"]) == (
            len(texts), size, tokens,
        )  # fmt: skip


# -- sentences ------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [{}, {"packing": "sliding", "stride": 4}])
def test_text_shorter_than_a_row_names_both_lengths(tmp_path, tokenizer, values):
    (tmp_path / "t.txt").write_text("a few words")
    tokens = len(tokenizer("a few words"[:9])["input_ids"]) + 1
    wanted = section(tmp_path / "t.txt", block_size=64, **values)
    message = refusal(wanted, tokenizer, tmp_path / "blocks")
    assert f" {tokens} tokens" in message and "64" in message and "data.block_size" in message


@pytest.mark.parametrize("values", [{"hold_out": "documents", "validation_fraction": 1e-9}])
def test_nothing_held_out_is_refused(text_folder, tokenizer, tmp_path, values):
    message = refusal(section(text_folder, **values), tokenizer, tmp_path / "blocks")
    assert "validation" in message and "40 documents" in message and "data.hold_out" in message


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_documents_that_are_all_empty_are_no_text(tmp_path, tokenizer, packing):
    wanted = roomy(write_rows(tmp_path / "lines.jsonl", [""] * 5), packing=packing)
    rules = {"deduplicate": True, "decontaminate": "cut"}
    message = refusal(wanted, tokenizer, tmp_path / "blocks", rules)
    assert "the training text has 0 tokens" in message


def test_the_same_bytes_in_a_file_of_another_kind_are_another_text(tmp_path, texts, tokenizer):
    rows = write_rows(tmp_path / "k.jsonl", texts)
    (tmp_path / "k.txt").write_bytes(rows.read_bytes())
    prepare(section(tmp_path / "k.txt"), tokenizer, tmp_path / "blocks")
    with pytest.raises(InputError, match="was made by another recipe"):
        prepare(section(rows), tokenizer, tmp_path / "blocks")


def test_a_changed_mixture_is_said_again(tmp_path, texts, tokenizer, caplog):
    caplog.set_level("INFO")
    write_rows(tmp_path / "a.jsonl", texts[:30])
    write_rows(tmp_path / "b.jsonl", texts[30:])

    def mixed(weight, **values):
        sources = [
            {"files": [str(tmp_path / "a.jsonl")], "weight": weight, "name": "a"},
            {"files": [str(tmp_path / "b.jsonl")], "weight": 1 - weight, "name": "b"},
        ]
        return documents_section(None, sources=sources, **values)

    prepare(mixed(0.5), tokenizer, tmp_path / "blocks")
    caplog.clear()
    prepare(mixed(0.1, mixture_tokens=10**6), tokenizer, tmp_path / "blocks")
    assert "b ran out" in caplog.text and "share" in caplog.text


def test_a_separator_that_stands_nowhere_is_said(tmp_path, texts, tokenizer, caplog):
    caplog.set_level("INFO")
    text = "\r\n\r\n".join(text.replace("\n", " ") for text in texts)
    (tmp_path / "crlf.txt").write_bytes(text.encode())
    prepare(section(tmp_path / "crlf.txt", separator="\\n\\n"), tokenizer, tmp_path / "blocks")
    assert "stands in none of the 1 file(s)" in caplog.text
    caplog.clear()
    wanted = section(tmp_path / "crlf.txt", separator="\r\n\r\n")
    prepare(wanted, tokenizer, tmp_path / "other")
    assert "stands in none" not in caplog.text


def test_what_is_left_of_shards_is_removed_when_the_rows_stand(text_folder, tokenizer, tmp_path):
    prepare(section(text_folder), tokenizer, tmp_path / "blocks")
    (tmp_path / "_shards-blocks" / "000000").mkdir(parents=True)
    prepare(section(text_folder), tokenizer, tmp_path / "blocks")
    assert not (tmp_path / "_shards-blocks").exists()


def test_short_held_out_text_is_counted_where_it_protects_nothing(
    tmp_path, texts, tokenizer, caplog
):
    caplog.set_level("INFO")
    write_rows(tmp_path / "a.jsonl", texts)
    (tmp_path / "short.txt").write_text("the end")
    rules = {"decontaminate": "drop", "benchmark_files": [str(tmp_path / "short.txt")]}
    prepare(documents_section(tmp_path / "a.jsonl"), tokenizer, tmp_path / "blocks", rules)
    assert "shorter than 13 tokens" in caplog.text
