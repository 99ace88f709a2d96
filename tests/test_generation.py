"""What a model writes: as an argmax loop would, as the seed says, and where it stops."""

import random

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.generation import candidates, chosen, continuation, new_ids, penalised
from pipeline.sections import SamplingFields

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
        return ids


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
    """Return `count` likeliest ids one by one; a full context is cut to the last half of it.

    Of a prompt that fills the positions as much stays as leaves room, at least half.
    """
    context, written = list(context), []
    if len(context) >= POSITIONS:
        context = context[-max(POSITIONS // 2, POSITIONS - count) :]
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


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_is_generate_within_the_positions(model, tokenizer, ids, penalty):
    for prompt in ["t", "the model", "東京"]:
        context = torch.tensor([tokenizer(prompt)["input_ids"]])
        count = POSITIONS - context.shape[1]
        expected = model.generate(
            context, attention_mask=torch.ones_like(context), max_new_tokens=count,
            do_sample=False, repetition_penalty=penalty,
        )[0, context.shape[1] :].tolist()  # fmt: skip
        found = continuation(
            model, ids, prompt, max_new_tokens=count, repetition_penalty=penalty, **GREEDY
        )
        assert found == expected


def sampling(**settings):
    return SamplingFields(**{"temperature": 1.0, "top_k": 0} | settings)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 100, 1000])
@pytest.mark.parametrize("top_p", [1e-6, 0.4, 0.9, 1.0])
def test_candidates_are_those_of_the_library(temperature, top_k, top_p):
    """Ids that transformers leaves, in its order of temperature, top-k and top-p, as likely."""
    logits = 4 * torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    steps = [TemperatureLogitsWarper(temperature)]
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    wanted = LogitsProcessorList(steps)(None, logits.clone()).softmax(-1)
    settings = sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    ids, probabilities = candidates(logits, settings)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    found = torch.zeros_like(wanted).scatter(1, ids, probabilities.float())
    assert torch.equal(found > 0, wanted > 0)
    torch.testing.assert_close(found, wanted)
    assert (ids.diff(dim=-1) > 0).all()


def test_a_repetition_penalty_is_that_of_the_library():
    source = torch.Generator().manual_seed(0)
    logits, seen = torch.randn(4, 50, generator=source), torch.randint(50, (4, 9), generator=source)
    wanted = RepetitionPenaltyLogitsProcessor(1.2)(seen, logits.clone())
    assert torch.equal(penalised(logits, seen, 1.2), wanted)


def test_a_draw_falls_into_the_share_of_its_id():
    logits = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).log()
    for draw, expected in [(0, 0), (0.19, 0), (0.21, 2), (0.69, 2), (0.71, 3), (1 - 2**-53, 3)]:
        assert chosen(logits.clamp(min=-1e4), [draw], sampling()) == [expected]


def texts_of(model, contexts, seeds, settings, ends=frozenset()):
    """Return the new ids of each context, written together."""
    found = [[] for _ in contexts]
    for step in new_ids(model, contexts, seeds, settings, set(ends)):
        for ids, number in zip(found, step, strict=True):
            ids += [] if number is None else [number]
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"top_k": 40},
        {"temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.3},
    ],
)
def test_a_text_is_the_same_alone_and_beside_others(model, settings):
    """Of other lengths, that end earlier, and that fill the positions at other times."""
    source = random.Random(0)
    contexts = [
        [source.randrange(384) for _ in range(length)] for length in (1, 3, 3, 9, 14, 15, 16, 2)
    ]
    seeds, settings = [5, 0, 0, 1, 2, 3, 4, 2**32], sampling(max_new_tokens=40, **settings)
    everything = texts_of(model, contexts, seeds, settings)
    assert [len(ids) for ids in everything] == [40] * 8
    ends = {everything[2][20], everything[4][3], everything[1][0]}
    found = texts_of(model, contexts, seeds, settings, ends)
    assert len({len(ids) for ids in found}) > 2
    for context, seed, together, endless in zip(contexts, seeds, found, everything, strict=True):
        assert [together] == texts_of(model, [context], [seed], settings, ends)
        assert together == endless[: len(together)]
        assert len(together) == 40 or together[-1] in ends


def test_what_fills_a_row_up_is_not_read(model, tokenizer):
    """Logits of rows side by side are those of each alone, to rounding."""
    contexts = [tokenizer(text)["input_ids"] for text in ("the model reads", "a", "東京 is")]
    heard = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: heard.append(output))
    [together] = [next(new_ids(model, contexts, [0] * 3, sampling(), set()))]
    batch = heard.pop()[:, -1]
    for row, context in enumerate(contexts):
        assert next(new_ids(model, [context], [0], sampling(), set())) == [together[row]]
        torch.testing.assert_close(heard.pop()[0, -1], batch[row], rtol=0, atol=2e-5)


def test_the_same_prompt_with_other_seeds_and_other_prompts_draw_otherwise(model):
    flat = constant(model, torch.zeros(384))
    found = texts_of(flat, [[1], [1], [2], [1]], [0, 1, 0, 0], sampling(max_new_tokens=12))
    assert found[0] == found[3]
    assert len({tuple(ids) for ids in found}) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error(tiny_model, tokenizer, temperature, wrong):
    logits = torch.zeros(384)
    logits[7] = wrong
    model = constant(tiny_model, logits)
    with pytest.raises(RuntimeError, match="not finite"):
        continuation(model, tokenizer, "the", max_new_tokens=3, temperature=temperature)


def test_attention_without_a_mask_reads_no_rows_of_different_lengths(rough_model):
    rough_model.set_attn_implementation("blockwise_causal")
    same = texts_of(rough_model, [[1, 2], [3, 4]], [0, 0], sampling(max_new_tokens=4))
    assert all(len(ids) == 4 for ids in same)
    with pytest.raises(AssertionError):
        texts_of(rough_model, [[1, 2], [3]], [0, 0], sampling(max_new_tokens=4))


def test_a_text_that_is_not_read_to_its_end_leaves_the_model_as_it_was(model):
    model.train()
    stream = new_ids(model, [[1]], [0], sampling(), set())
    next(stream)
    assert not model.training
    stream.close()
    assert model.training
