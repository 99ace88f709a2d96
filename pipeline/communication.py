"""What devices send each other in an update, how long that takes, and what it leaves for training.

Arithmetic, before a run. Latency is not counted: the figures are for large messages.
"""

from typing import NamedTuple

from pipeline.memory_bound import FP32
from pipeline.planning import Shape, parameters, parameters_by_part, training_flops

# The share of a forward and backward pass that is the backward's: two of three products.
BACKWARD = 2 / 3


class Cluster(NamedTuple):
    """Nodes of devices, and their links."""

    between: float
    """bytes/s from one node to the others, of all its devices together."""
    inside: float = 450e9
    """bytes/s of each device to the others in its node: NVLink 4, 900 GB/s both ways (H100)."""
    devices_per_node: int = 8
    attained: float = 0.8
    """The share of the links' rates that large messages reach."""
    device_flops: float = 989e12
    """FLOP/s of a device: H100 SXM, dense bf16, by its data sheet."""
    mfu: float = 0.5
    """The share of that which a device uses while it computes."""


CLUSTERS = {
    "400 Gb/s per GPU": Cluster(between=8 * 50e9),
    "400 Gb/s per node": Cluster(between=50e9),
    "100 GbE per node": Cluster(between=12.5e9),
}


class Traffic(NamedTuple):
    """Bytes that each device sends in an update."""

    gathered: float
    """Weights, before they are used."""
    reduced: float
    """Gradients."""
    last: float
    """Those of both that no computation can hide: the embedding's weight is the first to be used
    and, tied to the head, its gradient the last to be whole."""


def traffic(
    shape: Shape,
    *,
    topology: str,
    devices: int,
    accumulation: int = 1,
    reduce_bytes: int = FP32,
) -> Traffic:
    """Return what each device sends in an update, by ring algorithms.

    To gather or to scatter S bytes over n devices each sends (n-1)/n S; an all-reduce does both
    (Patarasu and Yuan 2009). DDP all-reduces gradients once per update. FSDP2 gathers each block
    for the forward and again for the backward pass of every batch, the embedding once, and scatters
    gradients once per update. ZeRO-3 gathers like it and scatters after every batch; ZeRO-2
    scatters after every batch and gathers the new weights once (Rajbhandari et al. 2020, section
    7). Weights travel in fp32, for autocast to round as it does with DDP.

    Args:
        topology: none, ddp, fsdp2, zero2 or zero3.
        accumulation: batches of an update on each device.
        reduce_bytes: of a gradient on its way: fp32 4, bf16 2.
    """
    share = (devices - 1) / devices
    count, sizes = parameters(shape), parameters_by_part(shape)
    ends = sizes["embedding"] + sizes["positions"]
    gathers, reduces, of_ends = {
        "none": (0, 0, 0),
        "ddp": (0, 2, 0),
        "fsdp2": (2 * accumulation, 1, accumulation),
        "zero2": (1, accumulation, 1),
        "zero3": (2 * accumulation, accumulation, 2 * accumulation),
    }[topology]
    gathered = share * FP32 * (gathers * (count - ends) + of_ends * ends)
    reduced = share * reduce_bytes * reduces * count
    last = share * ends * (FP32 * of_ends + reduce_bytes * reduces)
    return Traffic(gathered, reduced, last)


def link_seconds(sent_bytes: float, *, devices: int, cluster: Cluster) -> float:
    """Return how long it takes that each device sends so much.

    A ring is as fast as its slowest link (nccl-tests, PERFORMANCE.md: bus bandwidth). Between nodes
    as many rings run as there are devices in one, and each crosses over with its share of the
    bytes: together they have the whole of the node's links.
    """
    is_inside = devices <= cluster.devices_per_node
    slowest = cluster.inside if is_inside else min(cluster.inside, cluster.between)
    return sent_bytes / (slowest * cluster.attained)


def compute_seconds(
    shape: Shape, *, tokens: int, block_size: int, devices: int, cluster: Cluster
) -> float:
    """Return how long `devices` compute for `tokens` tokens, with no communication."""
    rate = devices * cluster.device_flops * cluster.mfu
    return tokens * training_flops(shape, block_size) / rate


def efficiency(
    compute_seconds: float,
    sent: Traffic,
    *,
    devices: int,
    cluster: Cluster,
    accumulation: int = 1,
    is_overlapped: bool = True,
) -> float:
    """Return the share of the time in which devices compute: 1 were communication free.

    Overlapped, gradients travel while the last batch's backward pass makes the next ones, weights
    while any batch computes, and only what is `last` has nothing to hide behind. Else all of it is
    waited for. The truth is between them.
    """
    of = {"devices": devices, "cluster": cluster}
    gather, reduce = link_seconds(sent.gathered, **of), link_seconds(sent.reduced, **of)
    exposed = gather + reduce
    if is_overlapped:
        backward = BACKWARD * compute_seconds / accumulation
        exposed = max(
            link_seconds(sent.last, **of), reduce - backward, gather + reduce - compute_seconds
        )
    return compute_seconds / (compute_seconds + exposed)


def tokens_for(
    wanted: float, shape: Shape, *, block_size: int, devices: int, cluster: Cluster
) -> float:
    """Return the tokens per update with which DDP reaches an efficiency, nothing overlapped.

    What it sends does not grow with the update, so that a larger one makes up for it.
    """
    sent = traffic(shape, topology="ddp", devices=devices)
    waits = link_seconds(sent.reduced, devices=devices, cluster=cluster)
    of_one = {"tokens": 1, "block_size": block_size, "devices": devices, "cluster": cluster}
    return wanted / (1 - wanted) * waits / compute_seconds(shape, **of_one)
