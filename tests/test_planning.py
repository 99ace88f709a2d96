"""Parameters, operations and memory by table; what is kept for the backward pass, as measured."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline import attention, linear_cross_entropy, planning
from pipeline.model import build_model, parameter_count
from pipeline.planning import (
    SIZES,
    Shape,
    activation_bytes,
    fitting,
    flops_by_part,
    flops_per_token,
    known_shape,
    largest_rows,
    loss_bytes,
    memory_by_part,
    optimizer_bytes,
    parameters,
    parameters_by_part,
    training_flops,
)
from pipeline.recipe import ModelSection

TRUE_PARAMETERS = {
    "124M": 124_439_808, "355M": 354_823_168, "774M": 774_030_080, "1558M": 1_557_611_200,
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_a_gpt_2_has_so_many_parameters(size):
    assert parameters(SIZES[size]) == TRUE_PARAMETERS[size]


@pytest.mark.parametrize("inner", [None, 48])
def test_the_parts_are_those_of_the_model(tokenizer, inner):
    section = ModelSection(config={"n_layer": 3, "n_head": 2, "n_embd": 32, "n_inner": inner})
    model = build_model(section, tokenizer, block_size=16, seed=0)
    parts = parameters_by_part(Shape(3, 32, 2, len(tokenizer), 16, inner))
    named = {"embedding": "wte", "positions": "wpe", "attention": ".attn.", "mlp": ".mlp."}
    for part, name in named.items():
        assert parts[part] == sum(p.numel() for n, p in model.named_parameters() if name in n)
    assert sum(parts.values()) == parameter_count(model)


@pytest.mark.parametrize(
    ("size", "gflops"), [("124M", 0.860), ("355M", 2.431), ("774M", 5.210), ("1558M", 10.289)]
)
def test_a_token_of_gpt_2_takes_so_many_operations(size, gflops):
    found = training_flops(SIZES[size], 1024)
    assert isinstance(found, int) and round(found / 1e9, 3) == gflops


class Vocabulary:
    """What a model asks of a tokenizer."""

    eos_token_id = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def test_operations_grow_with_the_block_by_attention_alone():
    short, long = (
        flops_per_token(parameters=1000, layers=3, width=8, block_size=n) for n in (16, 48)
    )
    assert short == 6 * 1000 + 12 * 3 * 8 * 16 and long - short == 12 * 3 * 8 * 32


@pytest.mark.parametrize(
    ("shape", "block_size"),
    [
        (Shape(2, 32, 2, 97, 48), 48), (Shape(4, 128, 2, 2048, 128), 128),
        (Shape(1, 64, 4, 300, 300), 300), (Shape(3, 96, 3, 1000, 256, inner=200), 256),
    ],
    ids=["2x32", "4x128", "1x64 of 300", "3x96, inner 200"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["eager", "blockwise_causal"])
def test_pytorch_counts_the_same_operations(shape, block_size, name):
    """Not with the fused attention: for its kernel on CPUs the counter has no formula."""
    rows = 2
    config = {"n_layer": shape.layers, "n_head": shape.heads, "n_embd": shape.width}
    config |= {"n_inner": shape.inner}
    section = ModelSection(config=config, attn_implementation=name)
    model = build_model(section, Vocabulary(shape.vocabulary), block_size=block_size, seed=0)
    ids = torch.randint(0, shape.vocabulary, (rows, block_size))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    counted = counter.get_total_flops() / (rows * block_size)
    parts = flops_by_part(shape, block_size=block_size, is_blockwise=name != "eager")
    assert sum(parts.values()) == pytest.approx(counted, rel=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_six_times_the_parameters_is_close_for_the_real_sizes(size):
    """PaLM's count, by which MFU is measured, is within 1 % of the exact one."""
    exact = sum(flops_by_part(SIZES[size], block_size=1024).values())
    assert training_flops(SIZES[size], 1024) == pytest.approx(exact, rel=0.01)


def test_the_head_is_a_part():
    parts = flops_by_part(SIZES["124M"], block_size=1024)
    assert list(parts) == ["layers", "attention", "head"]
    assert parts["head"] == 6 * 50257 * 768 * 1023 / 1024
    assert parts["layers"] == 6 * 12 * 12 * 768**2
    assert parts["attention"] == 12 * 12 * 768 * 1024


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("openai-community/gpt2", 124_439_808), ("gpt2-medium", 354_823_168),
        ("openai-community/gpt2-large", 774_030_080), ("GPT2-XL", 1_557_611_200),
        ("distilbert/distilgpt2", 81_912_576), ("distilgpt2", 81_912_576),
    ],
)  # fmt: skip
def test_models_of_the_hub_are_known_by_name(name, count):
    assert parameters(known_shape(name)) == count


@pytest.mark.parametrize("name", ["someone/gpt2", "gpt3", "", "outputs/run", "/models/gpt2"])
def test_other_models_are_not(name):
    assert known_shape(name) is None


# -- what is kept for the backward pass -----------------------------------------------------------


def kept_bytes(model, rows: int, block_size: int, *, precision: str) -> int:
    """Return the bytes of the storages that autograd saves, weights and their copies left out."""
    weights = {p.untyped_storage().data_ptr(): tuple(p.shape) for p in model.parameters()}
    shapes = set(weights.values()) | {shape[::-1] for shape in weights.values()}
    kept = {}

    def keep(saved):
        # autocast's copy of a weight is counted elsewhere, and so is the head's gradient
        if saved.data_ptr() not in weights and tuple(saved.shape) not in shapes:
            kept[saved.untyped_storage().data_ptr()] = saved  # alive, so that no address repeats
        return saved

    ids = torch.randint(0, 97, (rows, block_size))
    is_bf16 = precision == "bf16"
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        model(ids, labels=ids)
    return sum(saved.untyped_storage().nbytes() for saved in kept.values())


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["whole", "checkpointed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["sdpa_causal", "blockwise_causal"])
@pytest.mark.parametrize(
    ("shape", "rows", "block_size"),
    [(Shape(2, 32, 2), 3, 48), (Shape(4, 96, 3), 2, 128), (Shape(1, 64, 4), 2, 300)],
    ids=["2x32", "4x96", "1x64 of 300"],
)
def test_so_much_is_kept_for_the_backward_pass(
    tokenizer, shape, rows, block_size, name, precision, is_checkpointed
):
    layers, width, heads, *_ = shape
    section = ModelSection(
        config={"n_layer": layers, "n_head": heads, "n_embd": width}, attn_implementation=name
    )
    model = build_model(section, tokenizer, block_size=block_size, seed=0).train()
    if is_checkpointed:
        old = model.gradient_checkpointing_enable  # its name before transformers 5.24
        getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
    found = kept_bytes(model, rows, block_size, precision=precision)
    asked = {"rows": rows, "block_size": block_size, "precision": precision}
    asked |= {"is_blockwise": name == "blockwise_causal"}
    computed = activation_bytes(shape, **asked, is_checkpointed=is_checkpointed)
    if is_checkpointed:  # what one layer needs besides is made in the backward pass
        one = shape._replace(layers=1)
        none = shape._replace(layers=0)
        computed -= activation_bytes(one, **asked) - activation_bytes(none, **asked)
    assert computed == pytest.approx(found, rel=0.02)


def test_what_other_rooms_say_is_the_same_here():
    assert planning.CHUNK_BYTES == linear_cross_entropy.CHUNK_BYTES
    assert planning.QUERIES == attention.QUERIES
    for device in ("cpu", "cuda"):
        rows = linear_cross_entropy.chunk_rows(50257, device)
        logits = loss_bytes(SIZES["124M"], tokens=10**9, precision="fp32", device=device)
        assert logits == 50257 * max(8 * rows + 4 * 768, 4 * rows + 8 * 768)


@pytest.mark.parametrize("tokens", [256, 600], ids=["one chunk", "several"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_holds_so_much_at_most(monkeypatch, precision, tokens):
    for room in (planning, linear_cross_entropy):
        monkeypatch.setitem(room.CHUNK_BYTES, "cpu", 4 * 4096 * 256)
    hidden, weight = (torch.randn(n, 16, requires_grad=True) for n in (tokens, 4096))
    labels = torch.randint(0, 4096, (tokens,))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            linear_cross_entropy.linear_cross_entropy(hidden, weight, labels)
    events = profile.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    shape = Shape(1, 16, 1, vocabulary=4096)
    computed = loss_bytes(shape, tokens=tokens, precision=precision, device="cpu")
    assert max(itertools.accumulate(sizes)) == pytest.approx(computed, rel=0.1)


# -- memory and topology --------------------------------------------------------------------------


def test_what_is_divided_is_by_the_topology():
    count, asked = 124_439_808, {"rows": 1, "block_size": 1024, "devices": 8}
    held = {t: memory_by_part(SIZES["124M"], topology=t, **asked) for t in planning.DIVIDED}
    for whole in ("none", "ddp"):
        parts = held[whole]
        assert [parts[p] / count for p in ("weights", "gradients", "optimizer")] == [4, 4, 8]
    assert (held["none"]["buffers"], held["ddp"]["buffers"]) == (0, 4 * count)
    assert held["none"]["copies"] == 2 * 12 * (12 * 768**2 + 9 * 768)
    sharded = held["fsdp2"]
    assert sharded["weights"] == count / 2 and sharded["optimizer"] == count
    assert sharded["gradients"] == 4 * count + count / 2  # whole while batches are added up
    once = memory_by_part(SIZES["124M"], topology="fsdp2", is_accumulating=False, **asked)
    assert once["gradients"] == count / 2 + 4 * (50257 + 1024) * 768
    # Rajbhandari et al. 2020, figure 1, but 4 bytes of weights and 4 of gradients for autocast; the
    # 12 of the optimizer hold weights of its own, which are counted here as weights.
    assert held["zero2"]["weights"] == 4 * count + count / 2
    assert held["zero3"]["weights"] == count / 2 + count / 2
    assert held["zero2"]["gradients"] == held["zero3"]["gradients"] == count / 2


def test_fp32_has_no_copies_and_one_device_divides_nothing():
    asked = {"rows": 1, "block_size": 1024, "precision": "fp32"}
    assert memory_by_part(SIZES["124M"], **asked)["copies"] == 0
    alone = memory_by_part(SIZES["124M"], topology="fsdp2", devices=1, **asked)
    assert alone["weights"] == 4 * 124_439_808


@pytest.mark.parametrize(
    ("size", "devices", "gigabytes", "config"),
    [
        ("124M", 1, 16, "single_gpu"), ("124M", 8, 16, "ddp"), ("774M", 1, 16, None),
        ("774M", 8, 16, "fsdp2"), ("1558M", 8, 80, "ddp"), ("1558M", 8, 40, "fsdp2"),
        ("1558M", 8, 4, None),
    ],
)  # fmt: skip
def test_the_smallest_topology_that_fits_is_taken(size, devices, gigabytes, config):
    asked = {"devices": devices, "memory_bytes": gigabytes * 1e9, "rows": 1, "block_size": 1024}
    assert fitting(SIZES[size], **asked) == config


def test_the_largest_batch_fits_and_twice_as_much_does_not():
    asked = {"block_size": 1024, "topology": "ddp", "devices": 8}
    rows = largest_rows(SIZES["355M"], memory_bytes=40e9, **asked)
    held = [sum(memory_by_part(SIZES["355M"], rows=n, **asked).values()) for n in (rows, 2 * rows)]
    assert held[0] <= 36e9 < held[1]
    assert largest_rows(SIZES["355M"], memory_bytes=5e9, **asked) == 0
    less = largest_rows(SIZES["355M"], memory_bytes=40e9, is_checkpointed=True, **asked)
    more = largest_rows(SIZES["355M"], memory_bytes=40e9, precision="fp32", **asked)
    assert less > rows >= more


def test_muon_keeps_one_average_of_a_matrix():
    saved = optimizer_bytes(SIZES["124M"]) - optimizer_bytes(SIZES["124M"], "muon")
    assert saved == 4 * 12 * 12 * 768**2
    asked = {"rows": 1, "block_size": 1024}
    both = (memory_by_part(SIZES["124M"], optimizer=n, **asked) for n in ("adamw", "muon"))
    assert [parts["optimizer"] for parts in both] == [8 * 124_439_808, 8 * 124_439_808 - saved]
