"""What devices send by table, and what the pages say of it: every number is computed again."""

import pytest

from pipeline.communication import (
    CLUSTERS,
    Cluster,
    Traffic,
    compute_seconds,
    efficiency,
    link_seconds,
    tokens_for,
    traffic,
)
from pipeline.planning import SIZES

SMALL, COUNT, ENDS = SIZES["124M"], 124_439_808, (50257 + 1024) * 768
CLUSTER = Cluster(between=10.0, inside=100.0, devices_per_node=8, attained=0.5)


@pytest.mark.parametrize(
    ("topology", "gathered", "reduced"),
    [
        ("none", 0, 0),
        ("ddp", 0, 2 * 4 * COUNT),
        ("fsdp2", 3 * 2 * (2 * (COUNT - ENDS) + ENDS), 4 * COUNT),
        ("zero2", 2 * COUNT, 3 * 4 * COUNT),
        ("zero3", 3 * 2 * 2 * COUNT, 3 * 4 * COUNT),
    ],
)
def test_each_device_sends_so_much(topology, gathered, reduced):
    sent = traffic(SMALL, topology=topology, devices=8, accumulation=3)
    assert sent[:2] == pytest.approx((7 / 8 * gathered, 7 / 8 * reduced))


def test_one_device_sends_nothing_and_bf16_halves_it():
    assert traffic(SMALL, topology="ddp", devices=1) == (0, 0, 0)
    full, half = (traffic(SMALL, topology="ddp", devices=4, reduce_bytes=n) for n in (4, 2))
    assert half.reduced == full.reduced / 2 == 1.5 * 2 * COUNT
    assert full.last == 1.5 * 4 * ENDS


def test_a_ring_is_as_fast_as_its_slowest_link():
    assert link_seconds(100, devices=8, cluster=CLUSTER) == 2.0
    assert link_seconds(100, devices=9, cluster=CLUSTER) == 20.0
    fast = CLUSTER._replace(between=1000.0)
    assert link_seconds(100, devices=9, cluster=fast) == 2.0


def test_computing_takes_operations_over_rates():
    seconds = compute_seconds(
        SMALL, tokens=524_288, block_size=1024, devices=8, cluster=CLUSTERS["400 Gb/s per GPU"]
    )
    assert seconds == pytest.approx(524_288 * 0.859885e9 / (8 * 989e12 * 0.5), rel=1e-5)


@pytest.mark.parametrize(
    ("sent", "accumulation", "alone", "overlapped"),
    [
        (Traffic(0, 0, 0), 1, 1, 1),
        (Traffic(0, 150, 0), 1, 0.5, 3 / 4),  # 2 of 3 s hide behind the backward pass
        (Traffic(0, 150, 0), 2, 0.5, 3 / 5),  # 1 of 3 s
        (Traffic(0, 50, 25), 1, 0.75, 3 / 3.5),  # the last half second has nothing to hide behind
        (Traffic(100, 50, 0), 1, 0.5, 1),  # all but nothing is hidden
        (Traffic(300, 50, 0), 1, 0.3, 3 / 7),
    ],
)
def test_what_is_not_hidden_is_waited_for(sent, accumulation, alone, overlapped):
    asked = {"devices": 8, "cluster": CLUSTER, "accumulation": accumulation}
    assert efficiency(3, sent, is_overlapped=False, **asked) == pytest.approx(alone)
    assert efficiency(3, sent, is_overlapped=True, **asked) == pytest.approx(overlapped)


def test_so_many_tokens_reach_what_is_wanted():
    cluster = CLUSTERS["100 GbE per node"]
    tokens = tokens_for(0.9, SMALL, block_size=1024, devices=64, cluster=cluster)
    compute = compute_seconds(SMALL, tokens=tokens, block_size=1024, devices=64, cluster=cluster)
    sent = traffic(SMALL, topology="ddp", devices=64)
    found = efficiency(compute, sent, devices=64, cluster=cluster, is_overlapped=False)
    assert found == pytest.approx(0.9)
