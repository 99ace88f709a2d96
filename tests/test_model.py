"""The model: its size, its first weights, its loss path, and what is refused before it is built."""

import copy
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AttentionInterface,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pipeline.model import TanhGELU, build_model, check_model, load_model, parameter_count
from pipeline.recipe import InputError, ModelSection
from pipeline.tokenizer import train_tokenizer

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32}


class TokenizerOfGpt2:
    """The two facts about GPT-2's tokenizer that decide the model's shape."""

    eos_token_id = 50256

    def __len__(self):
        return 50257


def fresh(tokenizer, *, block_size=16, seed=0, **config):
    section = ModelSection(config=TINY | config)
    return build_model(section, tokenizer, block_size=block_size, seed=seed)


def refusal(section, tokenizer=None, *, block_size=16):
    """Return the sentence of `check_model`, or of `build_model` where a tokenizer is given."""
    with pytest.raises(InputError) as caught:
        if tokenizer is None:
            check_model(section, block_size=block_size)
        else:
            build_model(section, tokenizer, block_size=block_size, seed=0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def saved(tiny_model, tmp_path):
    """The name of a folder with a GPT-2 of 16 positions, 384 entries and special ids of its own."""
    for holder in (tiny_model.config, tiny_model.generation_config):
        holder.bos_token_id = holder.eos_token_id = holder.pad_token_id = 5
    tiny_model.save_pretrained(tmp_path / "saved")
    return str(tmp_path / "saved")


# -- fresh ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n_layer, n_head, n_embd, count",
    [(12, 12, 768, 124_439_808), (24, 16, 1024, 354_823_168), (48, 25, 1600, 1_557_611_200)],
    ids=["small", "medium", "xl"],
)
def test_published_sizes(n_layer, n_head, n_embd, count):
    section = ModelSection(config={"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd})
    with torch.device("meta"):
        model = build_model(section, TokenizerOfGpt2(), block_size=1024, seed=0)
    assert parameter_count(model) == count
    # embeddings, then per layer: two norms, attention 4 d^2 + 4 d, feed-forward 8 d^2 + 5 d
    by_hand = (50257 + 1024) * n_embd + n_layer * (12 * n_embd**2 + 13 * n_embd) + 2 * n_embd
    assert count == by_hand


@pytest.mark.parametrize("block_size", [8, 16, 33])
def test_shape_and_special_ids_follow_tokenizer_and_rows(tokenizer, block_size):
    model = fresh(tokenizer, block_size=block_size)
    assert type(model) is GPT2LMHeadModel
    assert model.transformer.wte.weight.shape == (len(tokenizer), 32)
    assert model.transformer.wpe.weight.shape == (block_size, 32)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.n_positions == block_size
    for holder in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert getattr(holder, name) == tokenizer.eos_token_id
    assert model.lm_head.weight is model.transformer.wte.weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_fields_that_are_stated_arrive(tokenizer):
    model = fresh(tokenizer, n_inner=48, activation_function="gelu", layer_norm_epsilon=1e-6)
    assert model.transformer.h[0].mlp.c_fc.weight.shape == (32, 48)
    assert model.config.activation_function == "gelu"
    assert model.transformer.ln_f.eps == 1e-6


@pytest.mark.parametrize(
    "stated, expected",
    [
        ({}, (0.0, 0.0, 0.0)),
        ({"resid_pdrop": 0.1, "embd_pdrop": 0.2, "attn_pdrop": 0.3}, (0.1, 0.2, 0.3)),
        ({"attn_pdrop": 0.3}, (0.0, 0.0, 0.3)),
    ],
)
def test_dropout_is_what_is_stated_and_otherwise_none(tokenizer, stated, expected):
    model = fresh(tokenizer, **stated).train()
    block = model.transformer.h[0]
    found = (block.attn.resid_dropout.p, model.transformer.drop.p, block.attn.attn_dropout.p)
    assert found == expected
    assert block.mlp.dropout.p == expected[0]
    ids = torch.arange(16)[None]
    with torch.no_grad():
        same = torch.equal(model(ids).logits, model(ids).logits)
    assert same == (expected == (0, 0, 0))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_first_loss_is_that_of_a_guess(tokenizer, seed):
    model = fresh(tokenizer, n_embd=64, block_size=64, seed=seed).eval()
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(tokenizer), (16, 64), generator=source)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].double()
    taken = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
    assert -taken.mean().item() == pytest.approx(math.log(len(tokenizer)), rel=0.02)


@pytest.mark.parametrize("layers", [1, 2, 8])
def test_residual_projections_start_smaller_with_depth(tokenizer, layers):
    model = fresh(tokenizer, n_layer=layers, n_embd=128)
    for block in model.transformer.h:
        for projection in (block.attn.c_proj, block.mlp.c_proj):
            wanted = 0.02 / math.sqrt(2 * layers)
            assert projection.weight.std().item() == pytest.approx(wanted, rel=0.05)
            assert projection.weight.mean().abs() < 0.1 * wanted
            assert not projection.bias.any()
        for other in (block.attn.c_attn, block.mlp.c_fc):
            assert other.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.transformer.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_the_seed_decides_the_weights(tokenizer):
    def weights(seed):
        return torch.cat([p.flatten() for p in fresh(tokenizer, seed=seed).parameters()])

    first = weights(7)
    set_seed(1234)  # what was drawn before must not matter
    assert torch.equal(weights(7), first)
    other = weights(8)
    assert not torch.equal(other, first)
    drawn = first.abs() > 0
    drawn &= first != 1  # biases are 0 and norms 1 for every seed
    assert (other[drawn] != first[drawn]).float().mean() > 0.99


def test_the_attention_asked_for_is_used(tokenizer):
    ids = torch.arange(16)[None]
    logits = {}
    for name in ("eager", "sdpa"):
        section = ModelSection(config=TINY, attn_implementation=name)
        model = build_model(section, tokenizer, block_size=16, seed=0).eval()
        assert model.config._attn_implementation == name
        with torch.no_grad():
            logits[name] = model(ids).logits
    torch.testing.assert_close(logits["eager"], logits["sdpa"])


# -- the loss path of Trainer ---------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["fresh", "pretrained"])
@pytest.mark.parametrize("count", [45, 90, 1000])
def test_loss_is_the_sum_over_the_items_that_trainer_counts(tokenizer, saved, origin, count):
    if origin == "fresh":
        model = fresh(tokenizer)
    else:
        model = build_model(ModelSection(pretrained=saved), tokenizer, block_size=16, seed=0)
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(len(tokenizer), (3, 16), generator=source)
    labels = ids.clone()
    labels[0, 5:9] = -100
    with torch.no_grad():
        logs = model(input_ids=ids).logits.double().log_softmax(-1)
        loss = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(count)).loss
        mean = model(input_ids=ids, labels=labels).loss
    total, predicted = 0.0, 0
    for row in range(3):
        for place in range(1, 16):
            if labels[row, place] != -100:
                total -= logs[row, place - 1, ids[row, place]].item()
                predicted += 1
    assert predicted == 41
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    assert mean.item() == pytest.approx(total / predicted, rel=1e-5)


@pytest.mark.parametrize("origin", ["fresh", "pretrained"])
def test_trainer_counts_the_tokens_that_are_predicted(tokenizer, saved, tmp_path, origin):
    if origin == "fresh":
        model = fresh(tokenizer)
    else:
        model = build_model(ModelSection(pretrained=saved), tokenizer, block_size=16, seed=0)
    arguments = TrainingArguments(output_dir=tmp_path / "run", use_cpu=True, report_to="none")
    trainer = Trainer(model, arguments)
    ids = torch.arange(48).reshape(3, 16)
    labels = ids.clone()
    labels[0, :5] = -100
    batches = [{"input_ids": ids, "labels": labels}, {"input_ids": ids, "labels": ids}]
    # With a loss type that it does not know, Trainer counts position 0 too, which is never scored,
    # and every loss comes out too small by one part in block_size.
    _, count = trainer.get_batch_samples(iter(batches), 2, torch.device("cpu"))
    assert count == (11 + 15 + 15) + 3 * 15


# -- pretrained -----------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [8, 16])
def test_a_pretrained_model_keeps_its_weights_and_positions(
    saved, tiny_model, tokenizer, block_size
):
    model = build_model(ModelSection(pretrained=saved), tokenizer, block_size=block_size, seed=5)
    assert model.config.n_positions == 16
    for ours, theirs in zip(model.parameters(), tiny_model.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == torch.float32
    assert model.lm_head.weight is model.transformer.wte.weight
    for holder in (model.config, model.generation_config):
        special = {holder.bos_token_id, holder.eos_token_id, holder.pad_token_id}
        assert special == {tokenizer.eos_token_id}


def test_a_pretrained_model_in_half_precision_is_read_as_fp32(tiny_model, tokenizer, tmp_path):
    half = copy.deepcopy(tiny_model).half()
    half.save_pretrained(tmp_path)
    model = build_model(ModelSection(pretrained=str(tmp_path)), tokenizer, block_size=16, seed=0)
    for ours, theirs in zip(model.parameters(), half.parameters(), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs.float())


def test_more_positions_than_the_pretrained_model_has_are_refused(saved, tokenizer):
    section = ModelSection(pretrained=saved)
    for message in [refusal(section, block_size=17), refusal(section, tokenizer, block_size=17)]:
        assert "data.block_size is 17" in message and "16 positions" in message and saved in message
    check_model(section, block_size=16)


def test_a_tokenizer_larger_than_the_pretrained_model_is_refused(saved, texts, tokenizer):
    larger = train_tokenizer(texts, vocab_size=385)
    message = refusal(ModelSection(pretrained=saved), larger)
    assert "385 entries" in message and "384" in message and saved in message
    smaller = train_tokenizer(texts, vocab_size=300)
    model = build_model(ModelSection(pretrained=saved), smaller, block_size=16, seed=0)
    assert model.config.vocab_size == 384


def test_a_folder_without_config_is_refused(tmp_path):
    message = refusal(ModelSection(pretrained=str(tmp_path)))
    assert str(tmp_path) in message and "config.json is missing" in message


def test_another_architecture_is_refused(tmp_path):
    LlamaConfig(hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path)
    message = refusal(ModelSection(pretrained=str(tmp_path)))
    assert str(tmp_path) in message and "is a llama, not a GPT-2" in message


@pytest.mark.parametrize("content", ["{", '{"model_type": "no-such-kind"}', "[]"])
def test_a_broken_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    message = refusal(ModelSection(pretrained=str(tmp_path)))
    assert f"model.pretrained {tmp_path}: cannot be loaded" in message


def test_an_unknown_name_is_refused():
    message = refusal(ModelSection(pretrained="nobody/no-such-model"))
    assert "model.pretrained nobody/no-such-model" in message and "HF_HUB_OFFLINE" in message


# -- what is refused of a fresh one ---------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["vocab_size", "n_positions", "bos_token_id", "eos_token_id", "pad_token_id"]
)
def test_stating_a_derived_field_is_refused(name, tokenizer):
    section = ModelSection(config=TINY | {name: 64})
    for message in [refusal(section), refusal(section, tokenizer)]:
        assert message.startswith(f"model.config.{name}: is derived")


@pytest.mark.parametrize("n_embd, n_head", [(32, 3), (30, 4), (2, 4)])
def test_a_width_that_heads_do_not_divide_is_refused(n_embd, n_head):
    message = refusal(ModelSection(config={"n_embd": n_embd, "n_head": n_head, "n_layer": 1}))
    assert "model.config.n_embd" in message
    assert f"{n_embd} is not a multiple of n_head {n_head}" in message


@pytest.mark.parametrize("name", ["n_layer", "n_head", "n_embd"])
@pytest.mark.parametrize("value", [0, -1])
def test_less_than_one_is_refused(name, value):
    message = refusal(ModelSection(config=TINY | {name: value}))
    assert message == f"model.config.{name}: must be at least 1; got {value}"


def test_an_unknown_activation_names_the_known():
    message = refusal(ModelSection(config=TINY | {"activation_function": "gelu_newest"}))
    assert "model.config.activation_function: 'gelu_newest'" in message and "gelu_new," in message


@pytest.mark.parametrize("value", ["many", 1.5, None])
def test_a_value_of_the_wrong_kind_is_refused(value):
    message = refusal(ModelSection(config=TINY | {"n_layer": value}))
    assert "model.config" in message and "n_layer" in message


def test_an_unknown_attention_is_refused(tokenizer):
    message = refusal(ModelSection(config=TINY, attn_implementation="no-such"), tokenizer)
    assert "model.attn_implementation" in message and "no-such" in message


# -- loading a finished one -----------------------------------------------------------------------


@pytest.fixture
def without_mask():
    """An attention that is registered without a mask function, as a fast causal kernel would be."""
    AttentionInterface.register("sdpa_causal_test", sdpa_attention_forward)
    return "sdpa_causal_test"


def test_an_attention_that_lets_documents_see_each_other_is_refused(tokenizer, without_mask):
    """It would drop the boundaries without a word."""
    section = ModelSection(config=TINY, attn_implementation=without_mask)
    build_model(section, tokenizer, block_size=16, seed=0)  # with one document in sight it may do
    with pytest.raises(InputError) as caught:
        build_model(section, tokenizer, block_size=16, seed=0, attend_across=False)
    assert str(caught.value) == (
        "model.attn_implementation: sdpa_causal_test has no mask and would let documents see each "
        "other; with data.attend_across false take eager or sdpa"
    )


def test_an_attention_is_looked_at_for_a_pretrained_model_too(saved, tokenizer, without_mask):
    section = ModelSection(pretrained=saved, attn_implementation=without_mask)
    with pytest.raises(InputError, match="sdpa_causal_test has no mask"):
        build_model(section, tokenizer, block_size=16, seed=0, attend_across=False)


@pytest.mark.parametrize("name", [None, "eager", "sdpa"])
def test_attention_within_documents_gives_the_logits_of_each_by_itself(tokenizer, name):
    section = ModelSection(config=TINY, attn_implementation=name)
    model = build_model(section, tokenizer, block_size=16, seed=0, attend_across=False)
    model = model.double().eval()
    lengths = [5, 1, 7, 3]
    ids = torch.randint(0, len(tokenizer), (1, 16), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        found = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        alone = [model(input_ids=part, use_cache=False).logits for part in ids.split(lengths, 1)]
        across = model(input_ids=ids, use_cache=False).logits
    assert torch.allclose(found, torch.cat(alone, 1), rtol=0, atol=1e-12)
    assert not torch.allclose(found, across, rtol=0, atol=1e-6)


def test_the_config_says_whether_documents_see_each_other(tokenizer, tmp_path):
    """Whoever measures the model reads it there; a stock config is not added to."""
    section = ModelSection(config=TINY)
    stock = build_model(section, tokenizer, block_size=16, seed=0)
    assert not hasattr(stock.config, "attend_across")
    apart = build_model(section, tokenizer, block_size=16, seed=0, attend_across=False)
    apart.save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).config.attend_across is False
    # Trained on with documents in sight, it says that.
    section = ModelSection(pretrained=str(tmp_path))
    for attend_across in (True, False):
        model = build_model(section, tokenizer, block_size=16, seed=0, attend_across=attend_across)
        assert model.config.attend_across is attend_across


def test_load_model_reads_what_was_saved(saved, tiny_model):
    model = load_model(saved)
    assert not model.training
    for ours, theirs in zip(model.parameters(), tiny_model.parameters(), strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_load_model_names_what_is_missing(saved, tmp_path):
    with pytest.raises(InputError, match="config.json is missing"):
        load_model(str(tmp_path))
    GPT2Config().save_pretrained(tmp_path / "only-config")
    for name in [str(tmp_path / "only-config"), "nobody/no-such-model"]:
        with pytest.raises(InputError, match=f"^{re.escape(name)}: cannot be loaded[^\n]*$"):
            load_model(name)


def test_with_labels_there_is_the_stock_loss_and_no_logits(tiny_model):
    import inspect

    ids = torch.randint(0, 384, (3, 16), generator=torch.Generator().manual_seed(0))
    stock = GPT2LMHeadModel(tiny_model.config).eval()
    stock.load_state_dict(tiny_model.state_dict())
    stock.loss_type = "ForCausalLM"
    count = torch.tensor(45.0)
    ours = tiny_model(input_ids=ids, labels=ids, num_items_in_batch=count)
    theirs = stock(input_ids=ids, labels=ids, num_items_in_batch=count)
    assert ours.logits is None
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0)
    ours.loss.backward()
    theirs.loss.backward()
    for one, other in zip(tiny_model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(tiny_model(input_ids=ids).logits, stock(input_ids=ids).logits)
    # Trainer and generate() read the signature to know what may be passed.
    assert inspect.signature(tiny_model.forward) == inspect.signature(stock.forward)


# -- the same as a stock model, faster ------------------------------------------------------------

ATTENTIONS = ["eager", "sdpa", "sdpa_causal", "blockwise_causal"]
# Relative, in the Euclidean norm; the stock model in bf16 is as far from fp32.
FP32, BF16, BF16_LOSS = 1e-5, 3e-2, 2e-3


def spread(tokenizer, attention=None, *, positions=160, **config):
    """Return a built model whose logits and gradients are not all nearly the same."""
    section = ModelSection(
        config=TINY | {"initializer_range": 0.2} | config, attn_implementation=attention
    )
    return build_model(section, tokenizer, block_size=positions, seed=0)


def stock_of(model, dtype=torch.float32):
    """Return transformers' own model of the same weights, without fused anything."""
    config = GPT2Config.from_dict(model.config.to_dict())
    stock = GPT2LMHeadModel._from_config(config, attn_implementation="eager").to(dtype)
    stock.load_state_dict(model.state_dict())
    return stock


def batch_of(model, rows=2):
    """Return ids and labels, some labels left out."""
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (rows, 150), generator=source)
    labels = ids.clone()
    labels[0, :40] = labels[1, 7] = labels[1, -1] = -100
    return ids, labels


def summed(model, ids, labels):
    """Return the sum of the plain loss, position t predicting label t + 1."""
    logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")


def gradients(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def distances(model, stock):
    """Return how far each parameter's gradient is from the stock model's."""
    pairs = zip(model.parameters(), stock.parameters(), strict=True)
    return [distance(one.grad, other.grad) for one, other in pairs]


def distance(found, wanted):
    found, wanted = found.detach().double(), wanted.detach().double()
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_loss_and_all_gradients_are_the_stock_models_in_fp32(tokenizer, attention):
    model = spread(tokenizer, attention).train()
    stock = stock_of(model, torch.float64)
    ids, labels = batch_of(model)
    count = (labels[:, 1:] != -100).sum()
    wanted = summed(stock, ids, labels) / count
    wanted.backward()
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    assert distance(loss, wanted) < 1e-6
    assert max(distances(model, stock)) < FP32


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_under_bf16_autocast_they_are_as_near_as_the_stock_models(tokenizer, attention):
    model = spread(tokenizer, attention).train()
    exact, stock = stock_of(model, torch.float64), stock_of(model)
    ids, labels = batch_of(model)
    count = (labels[:, 1:] != -100).sum()
    wanted = summed(exact, ids, labels) / count
    wanted.backward()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = summed(stock, ids, labels) / count
        loss = model(input_ids=ids, labels=labels).loss
    theirs.backward()
    loss.backward()
    assert loss.dtype == torch.float32
    assert distance(loss, wanted) < BF16_LOSS
    assert max(distances(model, exact)) < BF16
    ours = distance(gradients(model), gradients(exact))
    assert ours < 1.3 * distance(gradients(stock), gradients(exact))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa_causal", "blockwise_causal"])
def test_compiled_they_are_the_stock_models_too(tokenizer, attention):
    torch._dynamo.reset()
    model = spread(tokenizer, attention, n_layer=1).train()
    stock = stock_of(model, torch.float64)
    ids, labels = batch_of(model)
    wanted = summed(stock, ids, labels) / 100
    wanted.backward()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    loss = compiled(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    loss.backward()
    assert distance(loss, wanted) < 1e-6
    assert max(distances(model, stock)) < FP32


@pytest.mark.parametrize("count", [7, torch.tensor(7), torch.tensor(7.0)], ids=repr)
def test_the_items_in_the_batch_may_be_a_number_or_a_tensor(tokenizer, count):
    model = spread(tokenizer)
    ids, labels = batch_of(model)
    wanted = summed(stock_of(model), ids, labels) / 7
    loss = model(input_ids=ids, labels=labels, num_items_in_batch=count).loss
    assert loss.shape == () and loss.dtype == torch.float32
    assert distance(loss, wanted) < 1e-6


def test_without_any_label_the_sum_and_its_gradients_are_zero(tokenizer):
    model = spread(tokenizer)
    ids, labels = batch_of(model)
    labels[:, 1:] = -100  # position 0 has a label, and nothing before it to predict it from
    loss = model(input_ids=ids, labels=labels, num_items_in_batch=7).loss
    loss.backward()
    assert loss == 0 and not gradients(model).any()


def test_two_halves_of_a_batch_make_the_whole(tokenizer):
    model = spread(tokenizer).train()
    ids, labels = batch_of(model, rows=4)
    count = (labels[:, 1:] != -100).sum()
    whole = model(input_ids=ids, labels=labels).loss
    whole.backward()
    wanted = gradients(model)
    model.zero_grad()
    total = 0.0
    for half, half_labels in zip(ids.split(2), labels.split(2), strict=True):
        loss = model(input_ids=half, labels=half_labels, num_items_in_batch=count).loss
        loss.backward()
        total += loss.detach()
    assert distance(total, whole) < 1e-6
    assert distance(gradients(model), wanted) < 1e-6


def test_labels_do_not_touch_other_arguments(tokenizer):
    """Positions reach the model with labels as without."""
    model = spread(tokenizer)
    ids, labels = batch_of(model)
    positions = torch.arange(10, 160)[None]
    with torch.no_grad():
        logits = stock_of(model)(ids, position_ids=positions, use_cache=False).logits
        wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        found = model(ids, position_ids=positions, labels=labels, use_cache=False).loss
        assert distance(found, wanted) < 1e-6
        assert distance(model(ids, labels=labels).loss, wanted) > 1e-4


@pytest.mark.parametrize("attention", [None, *ATTENTIONS])
def test_what_is_saved_is_a_stock_model(tokenizer, tmp_path, attention):
    model = spread(tokenizer, attention).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["activation_function"] == "gelu_new"
    assert config["architectures"] == ["GPT2LMHeadModel"] and config["model_type"] == "gpt2"
    assert not [key for key in config if "attn_implementation" in key]
    opened = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert opened.config._attn_implementation == "sdpa"
    assert type(opened.transformer.h[0].mlp.act) is NewGELUActivation
    ids, _ = batch_of(model)
    with torch.no_grad():
        assert distance(model(ids).logits, opened(ids).logits) < 1e-5


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_pytorch_tanh"])
def test_another_activation_is_left_alone(tokenizer, name):
    model = spread(tokenizer, activation_function=name)
    stock = stock_of(model)
    ids, labels = batch_of(model)
    for ours, theirs in zip(model.transformer.h, stock.transformer.h, strict=True):
        assert type(ours.mlp.act) is type(theirs.mlp.act) is not TanhGELU
    with torch.no_grad():
        found = model(input_ids=ids, labels=labels, num_items_in_batch=1).loss
        assert distance(found, summed(stock, ids, labels)) < 1e-6


def test_the_activation_of_gpt2_is_fused_in_every_layer(tokenizer):
    model = fresh(tokenizer, n_layer=3)
    assert [type(block.mlp.act) for block in model.transformer.h] == 3 * [TanhGELU]
    assert not list(TanhGELU().parameters())


@pytest.mark.parametrize("is_compiling", [False, True])
def test_the_fused_activation_is_that_of_gpt2(monkeypatch, is_compiling):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_compiling)
    far = torch.tensor([0.0, -0.0, 100.0, -100.0, 1e4, -1e4, 10.0, -10.0, 1e-6, -1e-6])
    x = torch.cat([torch.linspace(-8, 8, 4001), far]).requires_grad_()
    plain = x.detach().double().requires_grad_()
    found, wanted = TanhGELU()(x), NewGELUActivation()(plain)
    found.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), plain.grad, rtol=1e-6, atol=2e-6)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("is_compiling", [False, True])
def test_the_fused_activation_in_bf16_is_near(monkeypatch, is_compiling):
    """Compiled, the kernel computes in fp32 whatever is written; here every operation rounds."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_compiling)
    x = torch.linspace(-8, 8, 4001).bfloat16()
    found, wanted = TanhGELU()(x), NewGELUActivation()(x.double())
    assert found.dtype == torch.bfloat16
    assert distance(found, wanted) < 5e-3
    torch.testing.assert_close(found.double(), wanted, rtol=0.02, atol=0.02)
