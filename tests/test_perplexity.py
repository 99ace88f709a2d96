"""Nats, perplexity and bits per byte, against sums made another way."""

import copy
import math

import pytest
import torch

from pipeline.blocks import HeldOutBatches, Rows
from pipeline.model import build_model
from pipeline.perplexity import (
    Score,
    bits_per_byte,
    check_target,
    load_metric,
    perplexity,
    score_rows,
    score_texts,
    sum_nats,
)
from pipeline.recipe import InputError, ModelSection
from pipeline.tokenizer import train_tokenizer


@pytest.fixture
def model(tiny_model):
    """A model that is wrong in different ways at different tokens; a fresh one is wrong evenly."""
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=source)
    return tiny_model


@pytest.fixture
def beginnings(texts):
    """Beginnings of the session's documents: enough windows, and quick to score one by one."""
    return [text[:200] for text in texts]


def stream_of(texts, tokenizer):
    ids = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return ids


def oracle_nats(model, stream, block_size):
    """Return the nats of each token after the first, in fp64, window by window."""
    model = copy.deepcopy(model).double().eval()
    nats = []
    with torch.no_grad():
        for start in range(0, len(stream) - 1, block_size - 1):
            window = torch.tensor([stream[start : start + block_size]])
            logs = torch.log_softmax(model(window).logits[0], -1)
            nats += [-logs[place, token].item() for place, token in enumerate(window[0, 1:])]
    assert len(nats) == len(stream) - 1
    return nats


def oracle_nats_apart(model, texts, tokenizer, block_size):
    """Return the nats of each text's tokens after its first, of which no other text is a context.

    Windows lie as over the stream of all texts; what a window holds of a text is run by itself.
    """
    model = copy.deepcopy(model).double().eval()
    nats, begin = [], 0
    step = block_size - 1
    for text in texts:
        ids = stream_of([text], tokenizer)
        places = range(begin, begin + len(ids))
        for window in range(begin // step, places[-1] // step + 1):
            inside = [p for p in places if window * step <= p <= (window + 1) * step]
            piece = [ids[p - begin] for p in inside]
            if len(piece) > 1:
                with torch.no_grad():
                    logs = model(torch.tensor([piece])).logits[0].log_softmax(-1)
                nats += [-logs[place, token].item() for place, token in enumerate(piece[1:])]
        begin += len(ids)
    assert len(nats) == len(stream_of(texts, tokenizer)) - len(texts)
    return nats


# -- arithmetic -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss, value",
    [(0, 1), (math.log(50257), 50257), (1, math.e), (800, math.inf), (math.inf, math.inf)],
)
def test_perplexity(loss, value):
    assert perplexity(loss) == pytest.approx(value)
    assert math.isnan(perplexity(math.nan))


@pytest.mark.parametrize(
    "nats, count, bits", [(0, 1, 0), (8 * math.log(2), 1, 8), (5545.177444479562, 1000, 8)]
)
def test_bits_per_byte(nats, count, bits):
    assert bits_per_byte(nats, count) == pytest.approx(bits, rel=1e-12)
    assert bits_per_byte(2 * nats, 2 * count) == pytest.approx(bits, rel=1e-12)


def test_score_names_its_numbers():
    metrics = Score(nats=20 * math.log(4), tokens=20, bytes=80).as_metrics("held_out")
    assert metrics == {
        "held_out_loss": pytest.approx(math.log(4)),
        "held_out_perplexity": pytest.approx(4),
        "held_out_bits_per_byte": pytest.approx(0.5),
        "held_out_tokens": 20,
        "held_out_bytes": 80,
    }


# -- the sum --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("block_size", [2, 7, 16])
def test_sum_nats_equals_an_independent_sum(model, tokenizer, beginnings, batch_size, block_size):
    texts = beginnings[: 1 if block_size == 2 else 6]
    rows = Rows.held_out(texts, tokenizer, block_size=block_size)
    nats = sum_nats(model, HeldOutBatches(rows, batch_size=batch_size), device="cpu")
    expected = math.fsum(oracle_nats(model, stream_of(texts, tokenizer), block_size))
    assert nats == pytest.approx(expected, rel=1e-6)
    # Otherwise any window would give about the same and the test would show little.
    assert nats / rows.scored_tokens > 1.05 * math.log(len(tokenizer))


def test_processes_together_sum_to_the_same(model, tokenizer, beginnings):
    rows = Rows.held_out(beginnings[:8], tokenizer, block_size=16)
    expected = math.fsum(oracle_nats(model, stream_of(beginnings[:8], tokenizer), 16))
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


# -- texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [None, 5, 16])
def test_score_of_texts_is_over_every_token_after_the_first(
    model, tokenizer, beginnings, block_size
):
    stream = stream_of(beginnings[:5], tokenizer)
    score = score_texts(beginnings[:5], model, tokenizer, block_size=block_size)
    expected = math.fsum(oracle_nats(model, stream, block_size or 16))
    assert score.nats == pytest.approx(expected, rel=1e-6)
    assert score.tokens == len(stream) - 1
    first = tokenizer.backend_tokenizer.id_to_token(stream[0])
    assert score.bytes == sum(len(text.encode()) for text in beginnings[:5]) - len(first)
    assert score.loss == pytest.approx(expected / (len(stream) - 1), rel=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("block_size", [5, 16])
def test_a_model_that_kept_documents_apart_is_scored_so(
    model, tokenizer, beginnings, block_size, attention
):
    texts = [text[: 1 + 7 * number] for number, text in enumerate(beginnings[:12])]
    model.set_attn_implementation(attention)
    across = score_texts(texts, model, tokenizer, block_size=block_size)
    model.config.attend_across = False
    score = score_texts(texts, model, tokenizer, block_size=block_size)
    expected = oracle_nats_apart(model, texts, tokenizer, block_size)
    assert score.nats == pytest.approx(math.fsum(expected), rel=1e-6)
    assert score.tokens == len(expected) == across.tokens - (len(texts) - 1)
    firsts = [stream_of([text], tokenizer)[0] for text in texts]
    names = [tokenizer.backend_tokenizer.id_to_token(i) for i in firsts]
    assert score.bytes == sum(len(text.encode()) for text in texts) - sum(map(len, names))
    assert abs(score.loss - across.loss) > 1e-3
    alone = [
        score_texts([text], model, tokenizer).nats
        for text in texts
        if len(stream_of([text], tokenizer)) <= 16
    ]
    mixed = [oracle_nats(model, stream_of([t], tokenizer), 16) for t in texts[: len(alone)]]
    assert alone == pytest.approx([math.fsum(nats) for nats in mixed], rel=1e-6)


def test_apart_texts_that_fill_their_windows_cost_what_each_costs_alone(
    model, tokenizer, beginnings
):
    parts = [text[start : start + 20] for text in beginnings for start in (0, 50, 100)]
    same = [text for text in parts if len(stream_of([text], tokenizer)) == 12]
    assert len(same) > 5
    alone = math.fsum(score_texts([text], model, tokenizer).nats for text in same)
    across = score_texts(same, model, tokenizer, block_size=13).nats
    model.config.attend_across = False
    for order in (same, same[::-1]):
        score = score_texts(order, model, tokenizer, block_size=13, batch_size=3)
        assert score.tokens == 11 * len(same)
        assert score.nats == pytest.approx(alone, rel=1e-6)
    assert abs(across - alone) > 1


def test_score_does_not_depend_on_the_batch_size(model, tokenizer, beginnings):
    scores = [
        score_texts(beginnings[:6], model, tokenizer, batch_size=size) for size in (1, 3, 8, 1000)
    ]
    assert len({(score.tokens, score.bytes) for score in scores}) == 1
    for score in scores:
        assert score.nats == pytest.approx(scores[0].nats, rel=1e-6)


def test_score_rows_equals_score_texts(model, tokenizer, beginnings):
    rows = Rows.held_out(beginnings[:6], tokenizer, block_size=16)
    by_rows = score_rows(model, HeldOutBatches(rows, batch_size=8), device="cpu")
    assert by_rows == score_texts(beginnings[:6], model, tokenizer)


def test_an_iterator_of_texts_is_enough(model, tokenizer, beginnings):
    assert score_texts(iter(beginnings[:3]), model, tokenizer) == score_texts(
        beginnings[:3], model, tokenizer
    )


def test_the_metric_equals_the_function_and_needs_no_network(model, tokenizer, beginnings):
    metric = load_metric()
    for options in [{}, {"block_size": 7, "batch_size": 3}]:
        found = metric.compute(
            predictions=beginnings[:4], model=model, tokenizer=tokenizer, **options
        )
        score = score_texts(beginnings[:4], model, tokenizer, **options)
        assert found == {
            "loss": score.nats / score.tokens,
            "perplexity": math.exp(score.nats / score.tokens),
            "bits_per_byte": pytest.approx(score.nats / math.log(2) / score.bytes),
            "tokens": score.tokens,
            "bytes": score.bytes,
        }


# -- sentences ------------------------------------------------------------------------------------


@pytest.mark.parametrize("nothing", [[], [""]])
def test_nothing_to_predict_is_refused(tiny_model, tokenizer, nothing):
    with pytest.raises(InputError, match="no token to predict"):
        score_texts(nothing, tiny_model, tokenizer)


def test_one_token_is_enough(tiny_model, tokenizer):
    score = score_texts(["a"], tiny_model, tokenizer)
    assert score.tokens == 1  # the end of the text; "a" itself has no context
    assert score_texts(["", "a", ""], tiny_model, tokenizer) == score  # an empty text is none


def test_a_window_beyond_the_positions_is_refused(tiny_model, tokenizer):
    with pytest.raises(InputError, match="block_size is 17, but the model has 16 positions"):
        score_texts(["abc"], tiny_model, tokenizer, block_size=17)


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_model, texts):
    larger = train_tokenizer(texts, vocab_size=390)
    with pytest.raises(InputError, match="390 entries and the model 384"):
        score_texts(["abc"], tiny_model, larger)


def test_where_numbers_go_is_checked_before_the_work(tmp_path):
    check_target(None)
    check_target(str(tmp_path / "numbers.json"))
    (tmp_path / "old.json").write_text("{}")
    check_target(str(tmp_path / "old.json"))
    with pytest.raises(InputError, match="no/numbers.json: cannot be written"):
        check_target(str(tmp_path / "no" / "numbers.json"))
    (tmp_path / "book.txt").write_text("my book")
    with pytest.raises(InputError, match="book.txt: holds something other than JSON"):
        check_target(str(tmp_path / "book.txt"))
    assert (tmp_path / "book.txt").read_text() == "my book"
