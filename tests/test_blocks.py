"""Documents to rows and rows to batches: no token lost, none scored twice, none unaccounted for."""

import math
import random

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import pipeline.blocks
from pipeline.blocks import (
    HeldOutBatches,
    Rows,
    collate,
    describe,
    obtain_blocks,
    overlapping_rows,
)
from pipeline.corpus import Corpus
from pipeline.recipe import DataSection, InputError
from pipeline.tokenizer import train_tokenizer

BLOCK = 16
SPLITS = ["train", "validation", "test"]


@pytest.fixture
def text_folder(tmp_path, texts):
    folder = tmp_path / "text"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
    return folder


def section(folder, **values):
    tail = {"hold_out": "tail", "validation_fraction": 0.1, "test_fraction": 0.0}
    return DataSection(files=[str(folder)], **({"block_size": BLOCK} | tail | values))


def prepare(wanted, tokenizer, folder, **options):
    return obtain_blocks(wanted, Corpus(wanted), tokenizer, folder, **options)


def stream_of(documents, tokenizer):
    """Return the ids of documents end to end; only for text that spells no special token."""
    ids = []
    for text in documents:
        ids += tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return ids


def whole(rows):
    """Return all rows as a list of lists."""
    return rows.__getitems__(list(range(len(rows)))).tolist()


def head(text):
    return text[: len(text) * 9 // 10]


def tail(text):
    return text[len(text) * 9 // 10 :]


def numbered_rows(length, block_size):
    """Return rows over the stream 0, 1, 2, ..., in which every id says its own place."""
    ids = overlapping_rows(np.arange(length), block_size, fill=0)
    return Rows(ids, tokens=length, bytes=length, scored_bytes=length - 1)


# -- rows on disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [2, 16, 100])
def test_training_rows_are_the_stream_less_its_last_partial_row(
    text_folder, texts, tokenizer, tmp_path, block_size
):
    out = tmp_path / "blocks"
    rows = prepare(section(text_folder, block_size=block_size), tokenizer, out)["train"]
    stream = stream_of(map(head, texts), tokenizer)
    found = whole(rows)
    assert {len(row) for row in found} == {block_size} == {rows.block_size}
    joined = sum(found, [])
    assert joined == stream[: len(joined)]
    left_out = len(stream) - len(joined)
    assert 0 <= left_out < block_size
    facts = pipeline.artifact.read_manifest(out)["facts"]["train"]
    assert facts["left_out"] == left_out
    assert facts["rows"] == len(rows) and facts["tokens"] == rows.tokens == len(stream)
    assert facts["documents"] == len(texts)
    assert facts["bytes"] == rows.bytes == sum(len(head(text).encode()) for text in texts)
    train_line = next(line for line in describe(out).splitlines() if line.startswith("train"))
    assert train_line.split()[-1] == str(left_out)
    assert f"{len(stream):,}" in train_line.split()


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
    joined = found[0] + sum((row[1:] for row in found[1:]), [])
    assert joined[: len(stream)] == stream
    assert set(joined[len(stream) :]) <= {tokenizer.eos_token_id}
    assert len(found) == math.ceil((len(stream) - 1) / (block_size - 1))
    text = [tail(text) for text in texts]
    assert rows.tokens == len(stream)
    assert rows.bytes == sum(len(t.encode()) for t in text)
    first_token = tokenizer.backend_tokenizer.id_to_token(stream[0])
    assert rows.scored_bytes == rows.bytes - len(first_token)


def test_whole_documents_go_to_the_split_of_their_hash(tmp_path, tokenizer, corpus_folder):
    wanted = DataSection(
        files=[str(corpus_folder)], validation_fraction=0.2, test_fraction=0.2, block_size=BLOCK
    )
    splits = prepare(wanted, tokenizer, tmp_path / "blocks")
    assert list(splits) == SPLITS
    documents = list(Corpus(wanted).documents())
    facts = pipeline.artifact.read_manifest(tmp_path / "blocks")["facts"]
    for split in SPLITS:
        members = [d for d in documents if d.split == split]
        stream = stream_of([d.text for d in members], tokenizer)
        assert splits[split].tokens == len(stream)
        assert facts[split]["documents"] == len(members)
        # Which documents are held out is on record; listing the others would be the corpus.
        assert facts[split]["names"] == ([] if split == "train" else [d.name for d in members])
        found = whole(splits[split])
        if split == "train":
            assert sum(found, []) == stream[: len(found) * BLOCK]
        else:
            joined = found[0] + sum((row[1:] for row in found[1:]), [])
            assert joined[: len(stream)] == stream


def test_an_empty_test_split_is_absent(text_folder, tokenizer, tmp_path):
    splits = prepare(section(text_folder), tokenizer, tmp_path / "blocks")
    assert list(splits) == ["train", "validation"]
    again = prepare(section(text_folder), tokenizer, tmp_path / "blocks")
    assert list(again) == ["train", "validation"]


def test_text_that_spells_the_control_token_ends_no_document(tmp_path, tokenizer):
    text = "before <|endoftext|> after " * 30
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(text)
    splits = prepare(section(tmp_path), tokenizer, tmp_path / "blocks")
    ids = np.array(whole(splits["train"])).reshape(-1)
    assert 2 <= (ids == tokenizer.eos_token_id).sum() <= 3  # the last may be left out
    first = ids[: list(ids).index(tokenizer.eos_token_id)]
    assert tokenizer.decode(first) == head(text)


def test_a_split_opens_as_a_data_set_of_fixed_lists(text_folder, tokenizer, tmp_path):
    out = tmp_path / "blocks"
    rows = prepare(section(text_folder), tokenizer, out)
    for split in rows:
        opened = datasets.Dataset.from_file(str(out / f"{split}.arrow"))
        assert opened.column_names == ["input_ids"]
        assert opened.features["input_ids"].length == BLOCK
        assert opened["input_ids"][:] == whole(rows[split])


def test_two_bytes_a_token_on_disk(texts, tokenizer, tmp_path):
    source = random.Random(0)
    (tmp_path / "long.txt").write_text("".join(source.choices(texts, k=400)))
    splits = prepare(section(tmp_path / "long.txt", block_size=64), tokenizer, tmp_path / "blocks")
    ids = len(splits["train"]) * 64
    assert ids > 50_000
    assert 2 <= (tmp_path / "blocks" / "train.arrow").stat().st_size / ids < 2.05
    kept = {path.name for path in (tmp_path / "blocks").iterdir()}
    assert kept == {"manifest.json", *(f"{split}.arrow" for split in SPLITS)}


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
    assert splits["train"][0].tolist() == [entries - 1] * 64


def test_two_processes_write_the_same_bytes(text_folder, tokenizer, tmp_path, monkeypatch):
    # Small batches, so that each process has several and could return them out of order.
    monkeypatch.setattr(pipeline.blocks, "CHARACTERS_PER_CALL", 700)
    one, two = tmp_path / "one", tmp_path / "two"
    prepare(section(text_folder), tokenizer, one)
    prepare(section(text_folder), tokenizer, two, num_proc=2)
    for split in SPLITS:
        assert (one / f"{split}.arrow").read_bytes() == (two / f"{split}.arrow").read_bytes()


def test_how_documents_are_batched_changes_nothing(text_folder, tokenizer, tmp_path, monkeypatch):
    prepare(section(text_folder), tokenizer, tmp_path / "one")
    monkeypatch.setattr(pipeline.blocks, "CHARACTERS_PER_CALL", 1)
    prepare(section(text_folder), tokenizer, tmp_path / "two")
    for split in SPLITS:
        name = f"{split}.arrow"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_rows_are_reused_and_not_written_again(text_folder, tokenizer, tmp_path):
    out = tmp_path / "blocks"
    first = prepare(section(text_folder), tokenizer, out)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.iterdir()}
    again = prepare(section(text_folder), tokenizer, out)
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in out.iterdir()}
    for split in first:
        assert whole(first[split]) == whole(again[split])
        assert first[split].scored_bytes == again[split].scored_bytes


def test_another_recipe_is_refused_with_the_difference(text_folder, texts, tokenizer, tmp_path):
    out = tmp_path / "blocks"
    prepare(section(text_folder), tokenizer, out)
    other_tokenizer = train_tokenizer(texts, vocab_size=300)
    for wanted, used, difference in [
        (section(text_folder, block_size=32), tokenizer, "data.block_size: 16 -> 32"),
        (section(text_folder, validation_fraction=0.2), tokenizer, "fraction: 0.1 -> 0.2"),
        (section(text_folder, hold_out="documents"), tokenizer, '"tail" -> "documents"'),
        (section(text_folder), other_tokenizer, "tokenizer: "),
    ]:
        with pytest.raises(InputError) as caught:
            prepare(wanted, used, out)
        message = str(caught.value)
        assert str(out) in message and difference in message and "remove that folder" in message
        assert "\n" not in message
    (text_folder / "000.txt").write_text("changed")
    with pytest.raises(InputError, match="corpus.fingerprint: "):
        prepare(section(text_folder), tokenizer, out)


def test_text_shorter_than_a_row_names_both_lengths(tmp_path, tokenizer):
    (tmp_path / "t.txt").write_text("a few words")
    tokens = len(tokenizer("a few words"[:9])["input_ids"]) + 1
    with pytest.raises(InputError) as caught:
        prepare(section(tmp_path / "t.txt", block_size=64), tokenizer, tmp_path / "blocks")
    message = str(caught.value)
    assert f" {tokens} tokens" in message and "64" in message and "data.block_size" in message
    assert not (tmp_path / "blocks").exists()


@pytest.mark.parametrize("values", [{"hold_out": "documents", "validation_fraction": 1e-9}])
def test_nothing_held_out_is_refused(text_folder, tokenizer, tmp_path, values):
    with pytest.raises(InputError) as caught:
        prepare(section(text_folder, **values), tokenizer, tmp_path / "blocks")
    message = str(caught.value)
    assert "validation" in message and "40 documents" in message and "data.hold_out" in message
    assert not (tmp_path / "blocks").exists()


# -- rows to batches ------------------------------------------------------------------------------


def test_rows_are_int64_tensors_in_the_order_asked():
    rows = numbered_rows(71, 8)
    assert len(rows) == 10
    assert rows[0].dtype == torch.int64
    assert rows[3].tolist() == list(range(21, 29))
    assert rows.__getitems__([9, 0, 9]).tolist() == [
        list(range(63, 71)),
        list(range(8)),
        list(range(63, 71)),
    ]


def test_collate_masks_no_label(text_folder, tokenizer, tmp_path):
    rows = prepare(section(text_folder), tokenizer, tmp_path / "blocks")["train"]
    loader = torch.utils.data.DataLoader(rows, batch_size=7, collate_fn=collate)
    batches = list(loader)
    for batch in batches:
        assert set(batch) == {"input_ids", "labels"}
        assert torch.equal(batch["input_ids"], batch["labels"])
        assert batch["labels"].min() >= 0
    ids = torch.cat([batch["labels"] for batch in batches])
    assert ids.tolist() == whole(rows)
    assert (ids == tokenizer.eos_token_id).any()  # the model must learn to stop


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [2, 3, 8, 9, 15, 16, 57, 71, 72, 100])
def test_every_token_after_the_first_is_a_label_exactly_once(length, batch_size, world_size):
    rows = numbered_rows(length, 8)
    ranks = [
        HeldOutBatches(rows, batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    scored = []
    for batches in ranks:
        found = list(batches)
        # One process with a batch more than the others would wait for them for ever.
        assert len(found) == len(batches) == len(ranks[0]) >= 1
        for batch in found:
            assert batch["input_ids"].shape == batch["labels"].shape == (batch_size, 8)
            assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
            assert batch["input_ids"].min() >= 0
            labels, context = batch["labels"][:, 1:], batch["input_ids"][:, :-1]
            counted = labels != -100
            assert torch.equal(context[counted], labels[counted] - 1)
            scored += labels[counted].tolist()
    assert sorted(scored) == list(range(1, length))


def test_one_process_reads_the_rows_in_order():
    rows = numbered_rows(71, 8)
    ids = torch.cat([batch["input_ids"] for batch in HeldOutBatches(rows, batch_size=4)])
    assert ids[:10].tolist() == whole(rows)


@pytest.mark.parametrize("length, rows", [(0, 0), (1, 0), (2, 1), (8, 1), (9, 2), (15, 2), (16, 3)])
def test_overlapping_rows_fill_up_the_last(length, rows):
    found = overlapping_rows(np.arange(10, 10 + length, dtype=np.uint16), 8, fill=3)
    assert found.shape == (rows, 8) and found.dtype == np.uint16
    if rows:
        spread = [*found[0], *found[1:, 1:].reshape(-1)]
        assert spread == [*range(10, 10 + length), *[3] * (rows * 7 + 1 - length)]


def test_held_out_rows_in_memory_equal_those_on_disk(text_folder, texts, tokenizer, tmp_path):
    on_disk = prepare(section(text_folder), tokenizer, tmp_path / "blocks")["validation"]
    in_memory = Rows.held_out(map(tail, texts), tokenizer, block_size=BLOCK)
    assert whole(in_memory) == whole(on_disk)
    for name in ("tokens", "bytes", "scored_bytes"):
        assert getattr(in_memory, name) == getattr(on_disk, name)


@pytest.mark.parametrize("texts_given", [[], [""]])
def test_held_out_rows_need_a_token_to_predict(tokenizer, texts_given):
    with pytest.raises(InputError, match="no token to predict"):
        Rows.held_out(texts_given, tokenizer, block_size=BLOCK)


@pytest.mark.parametrize("tokens, count", [(2, 1), (15, 1), (30, 2), (44, 2), (45, 3), (150, 10)])
def test_a_part_is_whole_rows_spread_over_all_of_them(texts, tokenizer, tokens, count):
    rows = Rows.held_out(texts, tokenizer, block_size=BLOCK)
    some = rows.part(tokens, tokenizer)
    places = [whole(rows).index(row) for row in whole(some)]
    assert len(places) == count and places == sorted(set(places)) and places[0] == 0
    if count > 1:
        assert places[-1] == len(rows) - 2  # the last may be filled up, and is left out
        steps = [b - a for a, b in zip(places, places[1:], strict=False)]
        assert max(steps) - min(steps) <= 1
    predicted = [i for row in whole(some) for i in row[1:]]
    names = [tokenizer.backend_tokenizer.id_to_token(i) for i in predicted]
    assert some.scored_bytes == sum(0 if n == "<|endoftext|>" else len(n) for n in names)
    assert some.tokens - 1 == len(predicted)
    batches = HeldOutBatches(some, batch_size=4)
    labels = torch.cat([batch["labels"][:, 1:].reshape(-1) for batch in batches])
    assert labels[labels != -100].tolist() == predicted


def test_a_part_of_more_than_there_are_is_all(texts, tokenizer):
    rows = Rows.held_out(texts[:2], tokenizer, block_size=BLOCK)
    some = rows.part(10**6, tokenizer)
    assert whole(some) == whole(rows)
    assert (some.tokens, some.scored_bytes) == (rows.tokens, rows.scored_bytes)
