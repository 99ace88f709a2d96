"""What a model writes: as an argmax loop would, as the seed says, and where it stops."""

import random

import numpy as np
import pytest
import torch

from pipeline.generation import continuation

POSITIONS = 16
GREEDY = {"temperature": 0.0}


class Ids:
    """A tokenizer that hands back the ids it is asked to decode, so that they can be counted."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_id

    def __call__(self, text, **options):
        return self._tokenizer(text, **options)

    def decode(self, ids, **_):
        return ids.tolist()


@pytest.fixture
def ids(tokenizer):
    return Ids(tokenizer)


@pytest.fixture
def model(tiny_model):
    """A model with opinions: a fresh one, its embeddings tied, mostly repeats its last token."""
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=source)
    return tiny_model


@pytest.fixture
def endless(model, tokenizer):
    """The same model, which never writes end-of-text."""

    def forbid(_module, _inputs, logits):
        logits = logits.clone()
        logits[..., tokenizer.eos_token_id] = -1e4
        return logits

    model.lm_head.register_forward_hook(forbid)
    return model


def argmax_loop(model, context, count):
    """Return `count` likeliest ids one by one; a full context is cut to the last half of it."""
    context, written = list(context), []
    for _ in range(count):
        if len(context) >= POSITIONS:
            context = context[-(POSITIONS // 2) :]
        with torch.no_grad():
            context.append(int(model(torch.tensor([context])).logits[0, -1].argmax()))
        written.append(context[-1])
    return written


@pytest.mark.parametrize("prompt", ["t", "the model", "東京 😀", "a b c d e f g h i j k l m n o p"])
@pytest.mark.parametrize("count", [1, 15, 16, 30])
def test_greedy_is_an_argmax_loop_of_the_stated_length(endless, tokenizer, ids, prompt, count):
    expected = argmax_loop(endless, tokenizer(prompt)["input_ids"], count)
    assert len(set(expected)) > 1 or count == 1
    assert continuation(endless, ids, prompt, max_new_tokens=count, **GREEDY) == expected
    text = continuation(endless, tokenizer, prompt, max_new_tokens=count, **GREEDY)
    assert text == tokenizer.decode(expected)


def test_an_empty_prompt_starts_a_document(endless, tokenizer, ids):
    expected = argmax_loop(endless, [tokenizer.eos_token_id], 10)
    assert continuation(endless, ids, "", max_new_tokens=10, **GREEDY) == expected


@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_ignores_the_seed(endless, ids, seed):
    expected = continuation(endless, ids, "the", max_new_tokens=20, **GREEDY)
    found = continuation(endless, ids, "the", max_new_tokens=20, seed=seed, **GREEDY)
    assert found == expected


@pytest.mark.parametrize("count", [10, 30])
def test_the_seed_decides_a_sample(endless, ids, count):
    def sample(seed):
        return continuation(endless, ids, "the", max_new_tokens=count, temperature=1.0, seed=seed)

    first = sample(0)
    torch.manual_seed(99)  # what was drawn before must not matter
    assert sample(0) == first
    assert len(first) == count
    assert sample(1) != first


@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
def test_the_single_likeliest_of_one_is_greedy(endless, ids, temperature):
    expected = continuation(endless, ids, "the", max_new_tokens=40, **GREEDY)
    found = continuation(
        endless, ids, "the", max_new_tokens=40, temperature=temperature, top_k=1, seed=5
    )
    assert found == expected


def constant(model, logits):
    """Make the model give the same logits everywhere."""
    model.lm_head.register_forward_hook(
        lambda _module, _inputs, output: logits.expand(output.shape).clone()
    )
    return model


def falling(tokenizer):
    """Return logits that fall by 0.01 from one id to the next; end-of-text is never taken."""
    logits = torch.arange(len(tokenizer)) * -0.01
    logits[tokenizer.eos_token_id] = -1e4
    return logits


def test_top_k_takes_only_the_k_likeliest_and_0_takes_all(tiny_model, tokenizer, ids):
    model = constant(tiny_model, falling(tokenizer))
    options = {"max_new_tokens": 120, "temperature": 10.0}
    end = tokenizer.eos_token_id
    likeliest = [number for number in range(len(tokenizer)) if number != end][:5]
    assert set(continuation(model, ids, "a", top_k=5, **options)) == set(likeliest)
    # transformers' own default would be the 50 likeliest.
    assert len(set(continuation(model, ids, "a", top_k=0, **options))) > 75


def test_top_p_takes_only_the_likeliest_that_make_up_p(tiny_model, tokenizer, ids):
    logits = torch.full((len(tokenizer),), -1e4)
    logits[[10, 20, 30]] = torch.tensor([0.6, 0.3, 0.1]).log()
    model = constant(tiny_model, logits)
    options = {"max_new_tokens": 60, "temperature": 1.0}
    assert set(continuation(model, ids, "a", **options)) == {10, 20, 30}
    assert set(continuation(model, ids, "a", top_p=0.8, **options)) == {10, 20}
    assert set(continuation(model, ids, "a", top_p=0.5, **options)) == {10}


def test_temperature_divides_the_logits(tiny_model, tokenizer, ids):
    logits = torch.full((len(tokenizer),), -1e4)
    logits[[10, 20]] = torch.tensor([2.0, 0.0])
    model = constant(tiny_model, logits)
    for temperature, share in [(1.0, 0.881), (4.0, 0.622), (0.25, 1.0)]:
        found = continuation(model, ids, "a", max_new_tokens=120, temperature=temperature)
        assert found.count(10) / 120 == pytest.approx(share, abs=0.1)


def test_the_random_state_of_the_caller_is_left_alone(endless, tokenizer):
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    continuation(endless, tokenizer, "the", max_new_tokens=40, temperature=1.0, seed=3)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_it_was_in(endless, tokenizer, training):
    endless.train(training)
    continuation(endless, tokenizer, "the", max_new_tokens=3, **GREEDY)
    assert endless.training is training
    assert all(parameter.grad is None for parameter in endless.parameters())


@pytest.mark.parametrize("after", [0, 1, 20])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_stops_at_end_of_text(endless, tokenizer, ids, after, temperature):
    calls = []

    def end(_module, _inputs, logits):
        calls.append(1)
        if len(calls) > after:  # one call writes one token
            logits = logits.clone()
            logits[..., tokenizer.eos_token_id] = 1e4
        return logits

    full = continuation(endless, ids, "the", max_new_tokens=25, temperature=temperature)
    handle = endless.lm_head.register_forward_hook(end)
    found = continuation(endless, ids, "the", max_new_tokens=25, temperature=temperature)
    assert found == full[:after] + [tokenizer.eos_token_id]
    calls.clear()
    text = continuation(endless, tokenizer, "the", max_new_tokens=25, temperature=temperature)
    handle.remove()
    assert text == tokenizer.decode(full[:after])  # the token itself is not part of the text


def test_text_in_a_prompt_that_fills_the_positions_still_counts(endless, tokenizer):
    long = "tokens repeat in rows of ids that a tokenizer cut " * 4
    assert len(tokenizer(long)["input_ids"]) > 2 * POSITIONS
    a = continuation(endless, tokenizer, long, max_new_tokens=12, **GREEDY)
    b = continuation(endless, tokenizer, long + "東", max_new_tokens=12, **GREEDY)
    assert a != b
