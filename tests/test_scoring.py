"""Nats and hits of batches, against sums made another way."""

import copy
import math

import numpy as np
import oracle
import pytest
import torch
from transformers import GPT2LMHeadModel

from pipeline.blocks import Rows
from pipeline.held_out import HeldOutBatches, held_out_texts
from pipeline.model import build_model
from pipeline.recipe import ModelSection
from pipeline.scoring import Sums, score_rows, sum_scores, token_scores


@pytest.fixture
def model(rough_model):
    return rough_model


def sum_nats(model, batches, **options):
    return sum_scores(model, batches, **options).nats.sum()


def oracle_sums(model, texts, tokenizer, block_size):
    """Return nats and hits of each token after the first of the stream, window by window."""
    stream = oracle.stream_of(texts, tokenizer)
    found = oracle.scores(oracle.in_fp64(model), stream, block_size, block_size - 1)
    assert len(found) == len(stream) - 1
    return math.fsum(nats for nats, _ in found.values()), sum(hit for _, hit in found.values())


# -- the sum --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("block_size", [2, 7, 16])
def test_sums_equal_independent_ones(model, tokenizer, beginnings, batch_size, block_size):
    texts = beginnings[: 1 if block_size == 2 else 6]
    rows = Rows.held_out(texts, tokenizer, block_size=block_size)
    sums = sum_scores(model, HeldOutBatches(rows, batch_size=batch_size), device="cpu")
    nats, hits = oracle_sums(model, texts, tokenizer, block_size)
    assert sums.nats.sum() == pytest.approx(nats, rel=1e-6)
    assert sums.correct.sum() == hits and sums.tokens.sum() == rows.scored_tokens
    # Otherwise any window would give about the same and the test would show little.
    assert nats / rows.scored_tokens > 1.05 * math.log(len(tokenizer))


def test_processes_together_sum_to_the_same(model, tokenizer, beginnings):
    rows = Rows.held_out(beginnings[:8], tokenizer, block_size=16)
    expected, _ = oracle_sums(model, beginnings[:8], tokenizer, 16)
    for world_size in (2, 3):
        shares = [
            sum_nats(
                model,
                HeldOutBatches(rows, batch_size=3, rank=rank, world_size=world_size),
                device="cpu",
            )
            for rank in range(world_size)
        ]
        assert math.fsum(shares) == pytest.approx(expected, rel=1e-6)


def test_masked_labels_and_the_first_position_do_not_count(model, tokenizer):
    source = torch.Generator().manual_seed(1)
    ids = torch.randint(len(tokenizer), (4, 16), generator=source)
    labels = ids.clone()
    labels[torch.rand(labels.shape, generator=source) < 0.4] = -100
    with torch.no_grad():
        logs = copy.deepcopy(model).double()(ids).logits.log_softmax(-1)
    expected = -sum(
        logs[row, place - 1, ids[row, place]].item()
        for row in range(4)
        for place in range(1, 16)
        if labels[row, place] != -100
    )
    batch = {"input_ids": ids, "labels": labels}
    assert sum_nats(model, [batch], device="cpu") == pytest.approx(expected, rel=1e-6)
    nothing = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    assert sum_nats(model, [nothing], device="cpu") == 0
    assert sum_nats(model, [batch, nothing, batch], device="cpu") == pytest.approx(
        2 * expected, rel=1e-6
    )


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_it_was_in(tokenizer, beginnings, training):
    config = {"n_layer": 1, "n_head": 2, "n_embd": 32, "resid_pdrop": 0.5}
    model = build_model(ModelSection(config=config), tokenizer, block_size=16, seed=0)
    model.train(training)
    rows = Rows.held_out(beginnings[:2], tokenizer, block_size=16)
    first, second = (
        sum_nats(model, HeldOutBatches(rows, batch_size=4), device="cpu") for _ in range(2)
    )
    assert first == second  # dropout was off
    assert model.training is training
    assert all(module.training is training for module in model.modules())
    with pytest.raises(KeyError):
        sum_nats(model, [{}], device="cpu")
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_after_each_batch_the_caller_is_told(model, tokenizer, beginnings):
    batches = HeldOutBatches(Rows.held_out(beginnings[:2], tokenizer, block_size=16), batch_size=3)
    calls = []
    sum_nats(model, batches, device="cpu", after_batch=lambda: calls.append(1))
    assert len(calls) == len(batches) > 1


@pytest.mark.parametrize("attend_across", [True, False])
def test_a_batch_says_which_document_a_token_is_of(model, tokenizer, beginnings, attend_across):
    texts = [beginnings[0], "a", "the", *beginnings[1:4]]
    rows = Rows.held_out(texts, tokenizer, block_size=7, attend_across=attend_across)
    batches = HeldOutBatches(rows, batch_size=5, by_document=True)
    sums = sum_scores(model, batches, device="cpu")
    lengths = [len(oracle.stream_of([text], tokenizer)) for text in texts]
    if attend_across:
        assert sums.tokens[: len(texts)].tolist() == [lengths[0] - 1, *lengths[1:]]
    else:
        assert sums.tokens[: len(texts)].tolist() == [length - 1 for length in lengths]
    plain = sum_scores(model, HeldOutBatches(rows, batch_size=5), device="cpu")
    assert plain.nats.sum() == pytest.approx(sums.nats.sum(), rel=1e-12)
    found = list(held_out_texts(rows, tokenizer))
    assert [text for text, _ in found] == texts
    assert [ids.tolist() for _, ids in found] == [oracle.ids_of(t, tokenizer) for t in texts]


def test_a_score_of_rows_is_of_one_document(model, tokenizer, beginnings):
    rows = Rows.held_out(beginnings[:6], tokenizer, block_size=16)
    score = score_rows(model, HeldOutBatches(rows, batch_size=8), device="cpu")
    nats, hits = oracle_sums(model, beginnings[:6], tokenizer, 16)
    assert score.nats.tolist() == [pytest.approx(nats, rel=1e-6)]
    assert score.tokens.tolist() == [rows.scored_tokens] and score.correct.tolist() == [hits]
    assert score.bytes.tolist() == [rows.scored_bytes]


def test_the_first_of_equally_likely_tokens_counts(tiny_model):
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.zero_()
    ids = torch.tensor([[3, 0, 1, 0, 2]])
    (found,) = token_scores(tiny_model, [{"input_ids": ids, "labels": ids}], device="cpu")
    assert found.correct.tolist() == [True, False, True, False]  # all logits are 0: argmax is 0
    assert found.nats.tolist() == pytest.approx([math.log(384)] * 4)


def test_the_head_alone_gives_what_the_whole_forward_gives(model, tokenizer, beginnings):
    """A stock model, in bf16 as while training, by both ways to its logits."""
    stock = GPT2LMHeadModel(model.config).eval()
    stock.load_state_dict(model.state_dict())
    rows = Rows.held_out(beginnings[:4], tokenizer, block_size=16)
    batches = list(HeldOutBatches(rows, batch_size=4))

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = stock, stock.config

        def forward(self, **inputs):
            return self.inner(**inputs)

    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            one = sum_scores(stock, batches, device="cpu")
            other = sum_scores(Wrapped(), batches, device="cpu")
        assert one.nats.sum() == pytest.approx(other.nats.sum(), rel=1e-6)
        assert one.correct.sum() == other.correct.sum()


def test_sums_grow_as_documents_come():
    sums = Sums()
    source = np.random.default_rng(0)
    documents, nats = np.sort(source.integers(0, 500, 3000)), source.random(3000)
    correct = source.random(3000) < 0.3
    for part in np.array_split(np.arange(3000), 37):
        sums.add(documents[part], nats[part], correct[part])
    sums.add(np.zeros(0, int), np.zeros(0), np.zeros(0, bool))
    total = sums.together(None, documents=500)
    assert total.nats == pytest.approx(np.bincount(documents, nats, minlength=500))
    assert total.tokens.tolist() == np.bincount(documents, minlength=500).tolist()
    assert total.correct.tolist() == np.bincount(documents[correct], minlength=500).tolist()
