"""Rows to batches: no token scored twice or left out, and documents kept apart where asked."""

import copy
import random

import numpy as np
import pytest
import torch

from pipeline import packing
from pipeline.blocks import Rows, collate, open_blocks
from pipeline.corpus import Corpus
from pipeline.held_out import HeldOutBatches
from pipeline.model import build_model
from pipeline.preparation import prepare_blocks
from pipeline.recipe import DataSection, InputError, ModelSection
from pipeline.row_file import RowFile
from pipeline.scoring import sum_scores

BLOCK = 16


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


def prepare(wanted, tokenizer, folder):
    prepare_blocks(wanted, Corpus(wanted), tokenizer, folder)
    return open_blocks(folder, wanted)


def batch_of(rows, indices=None):
    return rows.__getitems__(list(range(len(rows))) if indices is None else indices)


def whole(rows):
    """Return all rows as a list of lists."""
    return batch_of(rows)["input_ids"].tolist()


def tail(text):
    return text[len(text) * 9 // 10 :]


def numbered_rows(length, block_size, starts=(0,), attend_across=True):
    """Return rows over the stream 0, 1, 2, ..., in which every id says its own place."""
    chunk = packing.Chunk(np.arange(length), np.array(starts, np.int64))
    batches = list(packing.held_out([chunk], block_size, fill=0))
    scored = length - (1 if attend_across else len(starts))
    return Rows(
        RowFile(batches), tokens=length, bytes=length, scored_tokens=scored, scored_bytes=scored,
        attend_across=attend_across,
    )  # fmt: skip


def random_starts(source, length):
    return [0, *sorted(source.sample(range(1, length), source.randint(0, min(9, length - 1))))]


def scored_ids(ranks):
    """Return the labels that all processes count; every one is predicted from the place before."""
    scored = []
    for batches in ranks:
        for batch in batches:
            labels, context = batch["labels"][:, 1:], batch["input_ids"][:, :-1]
            counted = labels != -100
            assert torch.equal(context[counted], labels[counted] - 1)
            scored += labels[counted].tolist()
    return scored


# -- batches --------------------------------------------------------------------------------------


def test_rows_are_int64_tensors_in_the_order_asked():
    rows = numbered_rows(71, 8)
    assert len(rows) == 10
    assert set(rows[0]) == {"input_ids", "labels"}
    assert all(value.dtype == torch.int64 for value in rows[0].values())
    assert rows[3]["input_ids"].tolist() == rows[3]["labels"].tolist() == list(range(21, 29))
    asked = batch_of(rows, [9, 0, 9])
    expected = [list(range(63, 71)), list(range(8)), list(range(63, 71))]
    assert asked["input_ids"].tolist() == asked["labels"].tolist() == expected


@pytest.mark.parametrize("index", [-1, 10, 11])
def test_there_is_no_row_beyond_the_last(index):
    with pytest.raises(IndexError, match=f"row {index} of 10"):
        numbered_rows(71, 8)[index]


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


@pytest.mark.parametrize("attend_across", [True, False])
def test_what_is_filled_up_is_no_label(text_folder, tokenizer, tmp_path, attend_across):
    wanted = section(text_folder, packing="best_fit", block_size=200, attend_across=attend_across)
    rows = prepare(wanted, tokenizer, tmp_path / "blocks")["train"]
    file = RowFile.open(tmp_path / "blocks" / "train.arrow")
    filled = 0
    for index, row in enumerate(map(rows.__getitem__, range(len(rows)))):
        used = file.row(index)[2]
        filled += 200 - used
        assert (row["labels"][used:] == -100).all()
        assert (row["input_ids"][used:] == tokenizer.eos_token_id).all()
        assert row["labels"][used - 1] == tokenizer.eos_token_id or used == 200
    assert filled > 0


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [2, 3, 8, 9, 15, 16, 57, 71, 72, 100])
def test_every_token_after_the_first_is_a_label_exactly_once(length, batch_size, world_size):
    rows = numbered_rows(length, 8)
    ranks = [
        HeldOutBatches(rows, batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for batches in ranks:
        found = list(batches)
        # One process with a batch more than the others would wait for them for ever.
        assert len(found) == len(batches) == len(ranks[0]) >= 1
        for batch in found:
            assert batch["input_ids"].shape == batch["labels"].shape == (batch_size, 8)
            assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
            assert batch["input_ids"].min() >= 0
    assert sorted(scored_ids(ranks)) == list(range(1, length))


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("block_size", [2, 3, 8, 50])
def test_apart_every_token_but_a_documents_first_is_a_label_exactly_once(block_size, world_size):
    source = random.Random(block_size)
    for length in (2, 3, 8, 9, 15, 57, 100, *source.sample(range(2, 200), 10)):
        starts = random_starts(source, length)
        rows = numbered_rows(length, block_size, starts, attend_across=False)
        ranks = [
            HeldOutBatches(rows, batch_size=2, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        scored = scored_ids(ranks)
        assert sorted(scored) == sorted(set(range(length)) - set(starts))
        assert len(scored) == rows.scored_tokens
        assert {batch["position_ids"].shape for b in ranks for batch in b} == {(2, block_size)}


def test_one_process_reads_the_rows_in_order():
    rows = numbered_rows(71, 8)
    ids = torch.cat([batch["input_ids"] for batch in HeldOutBatches(rows, batch_size=4)])
    assert ids[:10].tolist() == whole(rows)


def test_apart_positions_begin_anew_with_each_document():
    source = random.Random(0)
    for length in source.sample(range(2, 120), 30):
        starts = random_starts(source, length)
        rows = numbered_rows(length, 8, starts, attend_across=False)
        for index in range(len(rows)):
            row, position = rows[index], 0
            for place, (number, found) in enumerate(
                zip(row["input_ids"].tolist(), row["position_ids"].tolist(), strict=True)
            ):
                inside = index * 7 + place < length
                position = 0 if place == 0 or inside and number in starts else position + 1
                assert found == position


# -- held-out text --------------------------------------------------------------------------------


@pytest.mark.parametrize("attend_across", [True, False])
def test_held_out_rows_in_memory_equal_those_on_disk(
    text_folder, texts, tokenizer, tmp_path, attend_across
):
    wanted = section(text_folder, attend_across=attend_across)
    on_disk = prepare(wanted, tokenizer, tmp_path / "blocks")["validation"]
    in_memory = Rows.held_out(
        map(tail, texts), tokenizer, block_size=BLOCK, attend_across=attend_across
    )
    one, other = batch_of(in_memory), batch_of(on_disk)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    for name in ("tokens", "bytes", "scored_tokens", "scored_bytes"):
        assert getattr(in_memory, name) == getattr(on_disk, name)


@pytest.mark.parametrize("attend_across", [True, False])
def test_scored_tokens_and_bytes_are_those_of_the_labels(
    text_folder, tokenizer, tmp_path, attend_across
):
    wanted = section(text_folder, attend_across=attend_across)
    rows = prepare(wanted, tokenizer, tmp_path / "blocks")["validation"]
    labels = batch_of(rows)["labels"][:, 1:]
    counted = labels[labels != -100].tolist()
    names = [tokenizer.backend_tokenizer.id_to_token(i) for i in counted]
    assert rows.scored_tokens == len(counted) == rows.tokens - (1 if attend_across else 40)
    assert rows.scored_bytes == sum(0 if n == "<|endoftext|>" else len(n) for n in names)


@pytest.mark.parametrize("attend_across", [True, False])
@pytest.mark.parametrize("texts_given", [[], [""], ["", ""]])
def test_held_out_rows_need_a_token_to_predict(tokenizer, texts_given, attend_across):
    with pytest.raises(InputError, match="no token to predict"):
        Rows.held_out(texts_given, tokenizer, block_size=BLOCK, attend_across=attend_across)


@pytest.mark.parametrize("attend_across", [True, False])
@pytest.mark.parametrize("tokens, count", [(2, 1), (15, 1), (30, 2), (44, 2), (45, 3), (150, 10)])
def test_a_part_is_whole_rows_spread_over_all_of_them(
    texts, tokenizer, tokens, count, attend_across
):
    rows = Rows.held_out(texts, tokenizer, block_size=BLOCK, attend_across=attend_across)
    some = rows.part(tokens, tokenizer)
    places = [whole(rows).index(row) for row in whole(some)]
    assert len(places) == len(some) == count and places == sorted(set(places)) and places[0] == 0
    if count > 1:
        assert places[-1] == len(rows) - 2  # the last may be filled up, and is left out
        steps = [b - a for a, b in zip(places, places[1:], strict=False)]
        assert max(steps) - min(steps) <= 1
    one, other = batch_of(some), batch_of(rows, places)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    labels = one["labels"][:, 1:].reshape(-1)
    predicted = labels[labels != -100].tolist()
    names = [tokenizer.backend_tokenizer.id_to_token(i) for i in predicted]
    assert some.scored_bytes == sum(0 if n == "<|endoftext|>" else len(n) for n in names)
    assert some.scored_tokens == len(predicted)
    if attend_across:
        assert predicted == [i for row in whole(some) for i in row[1:]]
    labels = torch.cat([b["labels"][:, 1:].reshape(-1) for b in HeldOutBatches(some, batch_size=4)])
    assert labels[labels != -100].tolist() == predicted


def test_a_part_of_more_than_there_are_is_all(texts, tokenizer):
    rows = Rows.held_out(texts[:2], tokenizer, block_size=BLOCK)
    some = rows.part(10**6, tokenizer)
    assert whole(some) == whole(rows)
    assert (some.tokens, some.scored_bytes) == (rows.tokens, rows.scored_bytes)


# -- mixtures -------------------------------------------------------------------------------------


def test_rows_of_a_mixture_are_spread_evenly_over_each_source():
    parts = [(0, 4, 4), (4, 3, 0), (7, 3, 2)]
    rows = numbered_rows(71, 8)
    some = Rows(rows._rows, tokens=71, bytes=71, scored_tokens=70, scored_bytes=70, mixture=parts)
    assert len(some) == 6
    assert [row[0] // 7 for row in whole(some)] == [0, 1, 2, 3, 7, 8]
    with pytest.raises(IndexError):
        some[6]
    many = Rows(
        numbered_rows(7001, 8)._rows, tokens=7001, bytes=1, scored_tokens=1, scored_bytes=1,
        mixture=[(100, 900, 300)],
    )  # fmt: skip
    places = [row[0] // 7 for row in whole(many)]
    assert places == list(range(100, 1000, 3))


# -- documents apart ------------------------------------------------------------------------------


@pytest.fixture(params=["eager", "sdpa"])
def model(request, tokenizer):
    """A model that is wrong in different ways at different tokens and depends on its context."""
    wanted = ModelSection(
        config={"n_layer": 2, "n_head": 2, "n_embd": 32}, attn_implementation=request.param
    )
    found = build_model(wanted, tokenizer, block_size=BLOCK, seed=0).eval()
    assert found.config._attn_implementation == request.param
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=source)
    return found


@pytest.fixture
def phrases(tmp_path, texts):
    """A file of documents that are shorter than a row, most of them much shorter."""
    words, source = " ".join(texts).split(), random.Random(0)
    lines = [" ".join(source.choices(words, k=source.randint(1, 3)))[:14] for _ in range(120)]
    path = tmp_path / "phrases.txt"
    path.write_text("\n".join(lines))
    return path


def nats_alone(model, ids):
    """Return the nats of a text's tokens after its first, alone, by hand; `model` is in fp64."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    logs = logits - logits.exp().sum(-1, keepdim=True).log()
    return -sum(logs[place, number].item() for place, number in enumerate(ids[1:]))


def packed(phrases, tokenizer, folder, attend_across):
    """Return rows, and for each document in them the row and its columns."""
    wanted = section(
        phrases, separator="\\n", hold_out="documents", packing="best_fit", block_size=BLOCK,
        attend_across=attend_across,
    )  # fmt: skip
    rows = prepare(wanted, tokenizer, folder)["train"]
    file, places = RowFile.open(folder / "train.arrow"), []
    for index in range(len(rows)):
        column = 0
        for document in file.documents_of(index):
            places.append((index, column, column + len(document)))
            column += len(document)
    return rows, places


def nats_in_row(model, rows, index, first, stop, beside):
    """Return what `sum_scores` adds up for the columns of one document, others beside it."""
    batch = batch_of(rows, [index, *beside])
    labels = torch.full_like(batch["labels"], -100)
    labels[0, first:stop] = batch["labels"][0, first:stop]
    batches = [batch | {"labels": labels}]
    return sum_scores(model, batches, device="cpu").nats.sum()


@pytest.mark.slow
def test_apart_a_document_between_strangers_costs_what_it_costs_alone(
    phrases, tokenizer, tmp_path, model
):
    rows, places = packed(phrases, tokenizer, tmp_path / "blocks", attend_across=False)
    exact = copy.deepcopy(model).double()
    strangers = [p for p in places if p[1] > 0]
    assert len(strangers) > 20 and len({index for index, *_ in places}) < len(places) / 2
    for index, first, stop in places[:60]:
        ids = rows[index]["input_ids"][first:stop].tolist()
        assert ids[-1] == tokenizer.eos_token_id and ids.count(ids[-1]) == 1
        alone = nats_alone(exact, ids)
        assert nats_in_row(model, rows, index, first, stop, []) == pytest.approx(alone, abs=1e-5)
        assert nats_in_row(model, rows, index, first, stop, [0, 1]) == pytest.approx(
            alone, abs=1e-5
        )
    # ... and all rows together cost what all documents cost, nothing between them added.
    each = sum(
        nats_alone(exact, rows[index]["input_ids"][first:stop].tolist())
        for index, first, stop in places
    )
    batches = [batch_of(rows, [i]) for i in range(len(rows))]
    assert sum_scores(model, batches, device="cpu").nats.sum() == pytest.approx(each, rel=1e-6)
    labels = torch.cat([batch["labels"][:, 1:] for batch in batches])
    assert (labels != -100).sum() == sum(stop - first - 1 for _, first, stop in places)


def test_across_a_document_between_strangers_costs_something_else(
    phrases, tokenizer, tmp_path, model
):
    rows, places = packed(phrases, tokenizer, tmp_path / "blocks", attend_across=True)
    exact = copy.deepcopy(model).double()
    for index, first, stop in [p for p in places if p[1] > 0][:20]:
        alone = nats_alone(exact, rows[index]["input_ids"][first:stop].tolist())
        # Without the first token, which alone has no context and costs nothing.
        across = nats_in_row(model, rows, index, first + 1, stop, [])
        assert abs(across - alone) > 1e-3


def test_apart_what_strangers_say_changes_no_logit(phrases, tokenizer, tmp_path, model):
    rows, places = packed(phrases, tokenizer, tmp_path / "blocks", attend_across=False)
    index, first, stop = next(p for p in places if p[1] > 0 and p[2] < BLOCK)
    batch = batch_of(rows, [index])
    changed = batch["input_ids"].clone()
    changed[0, :first] = (changed[0, :first] + 5) % len(tokenizer)
    changed[0, stop:] = (changed[0, stop:] + 5) % len(tokenizer)
    with torch.no_grad():
        before, after = (
            model(input_ids=ids, position_ids=batch["position_ids"], use_cache=False).logits[0]
            for ids in (batch["input_ids"], changed)
        )
    assert torch.allclose(before[first:stop], after[first:stop], atol=1e-5)
    assert not torch.allclose(before[:first], after[:first], atol=1e-3)


def test_apart_a_gradient_reaches_no_stranger(phrases, tokenizer, tmp_path, model):
    """As in training: the loss of transformers, with labels and positions, from one backward."""
    rows, places = packed(phrases, tokenizer, tmp_path / "blocks", attend_across=False)
    index, first, stop = next(p for p in places if p[1] > 0 and p[2] < BLOCK)
    batch = batch_of(rows, [index])
    labels = torch.full_like(batch["labels"], -100)
    labels[0, first:stop] = batch["labels"][0, first:stop]
    embedded = model.transformer.wte(batch["input_ids"]).detach().requires_grad_()
    model.train()  # dropout is 0
    model(
        inputs_embeds=embedded, position_ids=batch["position_ids"], labels=labels, use_cache=False
    ).loss.backward()
    reached = embedded.grad[0].abs().sum(-1) > 0
    assert reached[first : stop - 1].all()
    assert not reached[:first].any() and not reached[stop - 1 :].any()
