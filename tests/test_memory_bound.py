"""Memory by part and topology; what is kept for the backward pass, as measured."""

import itertools

import pytest
import torch

from pipeline import attention, linear_cross_entropy, memory_bound, planning
from pipeline.memory_bound import activation_bytes, loss_bytes, memory_by_part, optimizer_bytes
from pipeline.model import build_model
from pipeline.planning import SIZES, Shape
from pipeline.recipe import ModelSection


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
    assert memory_bound.CHUNK_BYTES == linear_cross_entropy.CHUNK_BYTES
    assert planning.QUERIES == attention.QUERIES
    for device in ("cpu", "cuda"):
        rows = linear_cross_entropy.chunk_rows(50257, device)
        logits = loss_bytes(SIZES["124M"], tokens=10**9, precision="fp32", device=device)
        assert logits == 50257 * max(8 * rows + 4 * 768, 4 * rows + 8 * 768)


@pytest.mark.parametrize("tokens", [256, 600], ids=["one chunk", "several"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_holds_so_much_at_most(monkeypatch, precision, tokens):
    for room in (memory_bound, linear_cross_entropy):
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


# -- topologies ------------------------------------------------------------------------------------


def test_what_is_divided_is_by_the_topology():
    count, asked = 124_439_808, {"rows": 1, "block_size": 1024, "devices": 8}
    held = {t: memory_by_part(SIZES["124M"], topology=t, **asked) for t in memory_bound.DIVIDED}
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


def test_muon_keeps_one_average_of_a_matrix():
    saved = optimizer_bytes(SIZES["124M"]) - optimizer_bytes(SIZES["124M"], "muon")
    assert saved == 4 * 12 * 12 * 768**2
    asked = {"rows": 1, "block_size": 1024}
    both = (memory_by_part(SIZES["124M"], optimizer=n, **asked) for n in ("adamw", "muon"))
    assert [parts["optimizer"] for parts in both] == [8 * 124_439_808, 8 * 124_439_808 - saved]
