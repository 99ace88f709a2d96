"""The attentions without a mask: what they compute, which kernel runs, and what a model does.

Distances are relative, in the Euclidean norm. Measured: fp32 3e-7; bf16 5.3e-3 for
`blockwise_causal`, 4.7e-3 for PyTorch's fused kernel, both from fp64 on unrounded inputs.
"""

import types

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

import pipeline.attention
from pipeline.attention import blockwise_causal, fastest

FP32, BF16 = 1e-5, 1e-2
NAMES = ["blockwise_causal", "sdpa_causal"]
TRAINING = types.SimpleNamespace(training=True)


def inputs(length, *, heads=2, width=8, keys=None, seed=0, dtype=torch.float32):
    """Return query, key and value for a batch of 2."""
    source = torch.Generator().manual_seed(seed)
    shapes = [(2, heads, length, width)] + 2 * [(2, heads, keys or length, width)]
    drawn = [torch.randn(shape, generator=source) for shape in shapes]
    return [x.to(dtype).requires_grad_() for x in drawn]


def blockwise(*given, module=TRAINING, **options):
    """Return the result as PyTorch's own has it: [batch, heads, queries, width]."""
    found, weights = blockwise_causal(module, *given, None, **options)
    assert weights is None and found.is_contiguous()
    return found.transpose(1, 2)


def fused(query, key, value, scaling=None):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)


def by_definition(query, key, value, scaling=None):
    """Return softmax over what is not later than the query, the last query at the last key."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scale
    queries, keys = scores.shape[2:]
    later = torch.arange(keys)[None] > torch.arange(keys - queries, keys)[:, None]
    return scores.masked_fill(later, float("-inf")).softmax(-1) @ value


def with_gradients(function, given, dtype=None):
    """Return the result and the gradients of query, key and value."""
    given = [x.detach().to(dtype or x.dtype).requires_grad_() for x in given]
    result = function(*given)
    source = torch.Generator().manual_seed(1)
    result.backward(torch.randn(result.shape, generator=source).to(result.dtype))
    return [result.detach(), *(x.grad for x in given)]


def distance(found, wanted):
    assert found.shape == wanted.shape
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def assert_close(found, wanted, limit):
    for one, other in zip(found, wanted, strict=True):
        if other.abs().max() < 1e-6:  # one key: query and key have no say
            assert one.abs().max() < limit
        else:
            assert distance(one, other) < limit


# -- what is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 5, 128, 129, 300])
@pytest.mark.parametrize("heads, width", [(1, 8), (3, 16), (2, 5)])
def test_it_equals_the_fused_kernel_in_fp32(length, heads, width):
    given = inputs(length, heads=heads, width=width)
    found = with_gradients(blockwise, given)
    assert_close(found, with_gradients(fused, given), FP32)
    assert_close(found, with_gradients(by_definition, given, torch.float64), FP32)


@pytest.mark.parametrize("scaling", [1.0, 0.1, 0.0])
def test_the_scaling_is_the_one_asked_for(scaling):
    given = inputs(130)
    found = with_gradients(lambda *x: blockwise(*x, scaling=scaling), given)
    wanted = with_gradients(lambda *x: by_definition(*x, scaling), given, torch.float64)
    assert_close(found, wanted, FP32)


@pytest.mark.parametrize("length", [1, 5, 128, 129, 300])
def test_in_bf16_it_is_about_as_near_as_the_fused_kernel(length):
    given = inputs(length)
    wanted = with_gradients(by_definition, given, torch.float64)
    found = with_gradients(blockwise, given, torch.bfloat16)
    assert {x.dtype for x in found} == {torch.bfloat16}
    assert_close(found, wanted, BF16)
    theirs = with_gradients(fused, given, torch.bfloat16)
    assert distance(found[0], wanted[0]) < 2 * distance(theirs[0], wanted[0])


@pytest.mark.parametrize("queries", [1, 2, 128, 129, 299])
def test_with_a_cache_the_last_query_is_at_the_last_key(queries):
    query, key, value = inputs(300)
    whole = by_definition(query, key, value)
    found = blockwise(query[:, :, -queries:], key, value)
    assert distance(found, whole[:, :, -queries:]) < FP32
    given = [query[:, :, -queries:], key, value]
    wanted = with_gradients(by_definition, given, torch.float64)
    assert_close(with_gradients(blockwise, given), wanted, FP32)


@pytest.mark.parametrize("changed", [1, 127, 128, 200, 299])
def test_what_comes_later_changes_nothing(changed):
    given = inputs(300)
    before = blockwise(*given)
    with torch.no_grad():
        for x in given:
            x[:, :, changed:] = 1e4
    after = blockwise(*given)
    assert torch.equal(after[:, :, :changed], before[:, :, :changed])
    assert not torch.equal(after[:, :, changed:], before[:, :, changed:])


def test_nothing_above_the_diagonal_is_computed():
    """No block of scores is wider than the keys that its last query sees."""
    shapes = []

    class Wide(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten._softmax.default:
                shapes.append(tuple(result.shape[2:]))
            return result

    with Wide():
        blockwise(*inputs(300))
    assert shapes == [(128, 128), (128, 256), (44, 300)]


def test_dropout_falls_on_the_weights_and_only_in_training():
    given = inputs(20)
    wanted = blockwise(*given)
    resting = types.SimpleNamespace(training=False)
    assert torch.equal(blockwise(*given, module=resting, dropout=0.5), wanted)
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = [blockwise(*given, dropout=0.5) for _ in range(400)]
    assert distance(drawn[0], wanted) > 0.3
    assert distance(sum(drawn) / 400, wanted) < 0.1  # the mean stays: 1 / sqrt(400) and a margin
    # The first query sees one key: its value comes doubled, or not at all.
    first = (torch.stack(drawn) / wanted)[..., 0, :].round(decimals=3)
    assert set(first.abs().flatten().tolist()) == {0.0, 2.0}


def test_a_mask_is_refused():
    with pytest.raises(AssertionError):
        blockwise_causal(TRAINING, *inputs(4), torch.ones(2, 1, 4, 4, dtype=torch.bool))


@pytest.mark.parametrize(
    "block_size, attend_across, on_cpu, name",
    [
        (2, True, True, "blockwise_causal"),
        (512, True, True, "blockwise_causal"),
        (513, True, True, "sdpa_causal"),
        (1024, True, True, "sdpa_causal"),
        (128, True, False, "sdpa_causal"),
        (1024, True, False, "sdpa_causal"),
        (128, False, True, "sdpa"),
        (1024, False, True, "sdpa"),
        (1024, False, False, "sdpa"),
    ],
)
def test_the_fastest(block_size, attend_across, on_cpu, name):
    found = fastest(block_size=block_size, attend_across=attend_across, on_cpu=on_cpu)
    assert found == name


# -- in a model -----------------------------------------------------------------------------------


def gpt2(attention, *, positions=300, layers=2, **config):
    """Return a stock GPT-2 whose logits are spread, the same for every attention."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=96, n_positions=positions, n_layer=layers, n_head=2, n_embd=32,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, **config,
    )  # fmt: skip
    return GPT2LMHeadModel._from_config(config, attn_implementation=attention)


def ids_for(model, length, rows=1):
    source = torch.Generator().manual_seed(0)
    return torch.randint(1, model.config.vocab_size, (rows, length), generator=source)


def loss_and_gradients(model, ids):
    model.zero_grad()
    loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "config",
    [{}, {"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}],
    ids=["stock", "by layer", "unscaled"],
)
def test_a_model_computes_what_the_stock_one_does(name, config):
    stock, ours = gpt2("eager", **config), gpt2(name, **config)
    ids = ids_for(ours, 150, rows=2)
    found, wanted = loss_and_gradients(ours, ids), loss_and_gradients(stock, ids)
    assert_close(found, wanted, FP32)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_nothing(name):
    model = gpt2(name).train()
    ids = ids_for(model, 150)
    wanted = loss_and_gradients(model, ids)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert_close(loss_and_gradients(model, ids), wanted, FP32)


def graphs_of(model, ids):
    """Compile the model as one graph and return what it is made of, and the operators that ran."""
    torch._dynamo.reset()
    nodes = []

    def keep(graph, example_inputs):
        nodes.extend(graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=keep)
    compiled(ids, use_cache=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        compiled(ids, use_cache=False)
    return nodes, {event.key for event in profile.key_averages()}


def square_tensors(nodes, length):
    """Return the names of the nodes that make a tensor of every query by every key."""
    made = [(node.name, node.meta.get("example_value")) for node in nodes]
    square = [n for n, x in made if isinstance(x, torch.Tensor) and x.shape[-2:] == (length,) * 2]
    return square


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiled_as_one_graph_there_is_no_dense_mask(name):
    model = gpt2(name, layers=1)
    nodes, _ = graphs_of(model, ids_for(model, 300))
    assert len(nodes) > 10
    assert square_tensors(nodes, 300) == []


@pytest.mark.slow
def test_compiled_stock_sdpa_has_the_dense_mask():
    """Else the two attentions of ours would not be needed, and the test above shows nothing."""
    model = gpt2("sdpa", layers=1)
    nodes, _ = graphs_of(model, ids_for(model, 300))
    assert square_tensors(nodes, 300)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_sdpa_causal_runs_the_fused_causal_kernel(monkeypatch, is_compiled):
    told, original = [], F.scaled_dot_product_attention
    model = gpt2("sdpa_causal")
    ids = ids_for(model, 150)
    if is_compiled:
        nodes, ran = graphs_of(model, ids)
        told = [node.kwargs for node in nodes if node.target is original]
    else:

        def spy(*args, **kwargs):
            told.append(kwargs)
            return original(*args, **kwargs)

        monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(ids, use_cache=False)
        ran = {event.key for event in profile.key_averages()}
    assert [(x["attn_mask"], x["is_causal"]) for x in told] == 2 * [(None, True)]
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in ran
    assert not any("softmax" in name for name in ran)


def test_blockwise_runs_matrix_products_and_no_fused_kernel():
    model = gpt2("blockwise_causal", layers=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(ids_for(model, 300), use_cache=False)
    count = {event.key: event.count for event in profile.key_averages()}
    assert count["aten::_softmax"] == 3 and count["aten::bmm"] == 2 * 3
    assert not any("scaled_dot_product" in name for name in count)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiled_by_inductor_it_computes_what_the_stock_one_does(name):
    torch._dynamo.reset()
    stock, ours = gpt2("eager", layers=1), gpt2(name, layers=1)
    ids = ids_for(ours, 150, rows=2)
    compiled = torch.compile(ours, fullgraph=True, dynamic=False)
    wanted = loss_and_gradients(stock, ids)
    loss = F.cross_entropy(
        compiled(ids, use_cache=False).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    loss.backward()
    assert_close([loss.detach(), *(p.grad for p in ours.parameters())], wanted, FP32)


@pytest.mark.parametrize("name", NAMES)
def test_a_trained_model_writes_what_the_stock_one_does(name):
    """Greedy tokens, with the cache: the prompt at once, then one query after another."""
    model = gpt2(name, positions=64).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        loss_and_gradients(model, ids_for(model, 64, rows=4))
        optimizer.step()
    stock = gpt2("eager", positions=64)
    stock.load_state_dict(model.state_dict())
    prompt = ids_for(model, 9)
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    found = model.eval().generate(prompt, **settings)
    wanted = stock.eval().generate(prompt, use_cache=False, **settings)
    assert found.shape == (1, 49) and len(set(found[0, 9:].tolist())) > 5
    assert torch.equal(found, wanted)


def test_both_names_are_known_to_transformers():
    from transformers import AttentionInterface

    known = AttentionInterface().valid_keys()
    assert set(NAMES) <= set(known)
    assert AttentionInterface()["blockwise_causal"] is pipeline.attention.blockwise_causal
