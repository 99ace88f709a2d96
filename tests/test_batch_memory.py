"""How many rows fit, and what is there for certain, over topologies and devices."""

import pytest

from pipeline.batch_memory import Batch
from pipeline.planning import SIZES

MEDIUM = Batch(SIZES["355M"], 1024, topology="ddp", devices=8)


def test_the_largest_batch_fits_and_twice_as_much_does_not():
    rows = MEDIUM.largest_rows(40e9)
    assert MEDIUM.peak_bytes(rows) <= 36e9 < MEDIUM.peak_bytes(2 * rows)
    assert MEDIUM.largest_rows(5e9) == 0
    less = MEDIUM._replace(is_checkpointed=True).largest_rows(40e9)
    more = MEDIUM._replace(precision="fp32").largest_rows(40e9)
    assert less > rows >= more


@pytest.mark.parametrize("topology", ["none", "ddp", "fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_is_there_for_certain_is_less(topology, kind):
    batch = Batch(SIZES["124M"], 1024, topology=topology, devices=2, kind=kind)
    phase, parts = batch.held(4)
    assert sum(parts.values()) == batch.peak_bytes(4) > batch.least_bytes(4)
    assert batch.least_bytes(4) >= parts["weights"] + parts["optimizer"]
    assert (phase is None) == (kind == "cuda" or topology not in ("none", "ddp"))


def test_buckets_are_held_beside_gradients_that_are_added_up():
    alone, shared = (
        Batch(SIZES["124M"], 1024, topology=t, kind="cpu", precision="fp32")
        for t in ("none", "ddp")
    )
    assert shared.peak_bytes(4) - alone.peak_bytes(4) == 4 * 124_439_808
    once = shared._replace(is_accumulating=False)
    assert once.peak_bytes(4) == alone._replace(is_accumulating=False).peak_bytes(4)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_does_not_learn_has_neither_gradient_nor_averages(kind):
    whole, half = (Batch(SIZES["124M"], 1024, kind=kind, trained=t).held(4)[1] for t in (1, 0.5))
    assert {part for part in whole if half[part] != whole[part]} == (
        {"gradients", "optimizer"} | ({"checkpoint"} if kind == "cpu" else set())
    )
    assert half["optimizer"] == whole["optimizer"] / 2
