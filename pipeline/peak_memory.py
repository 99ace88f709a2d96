"""The most memory that a training process holds, and in which phase of an update it does.

`pipeline.memory_bound` bounds it from above, for its parts are not all there at the same time. Here
the parts of each phase stand together. Allocations come out within 5 % of what PyTorch's profiler
counts on a CPU, and whole processes mostly within 10 % of what the kernel says
(`tests/benchmarks/plan_accuracy.py`); on a GPU nothing was measured.
"""

from typing import NamedTuple

from pipeline.memory_bound import (
    FP32,
    HALF,
    activation_bytes,
    loss_bytes,
    optimizer_bytes,
    product_bytes,
)
from pipeline.planning import QUERIES, Shape, parameters, parameters_by_part

# A process on a CPU without its tensors, as measured (torch 2.13, Linux): interpreter and libraries
# 540 MB, text, tokenizer and rows 120 to 150, Trainer and what the first update loads 40.
PROCESS_BYTES = 700e6
COMPILER_BYTES = 70e6  # what torch.compile adds: 49 to 94 MB, most where nothing was compiled yet
MUON_BATCH_BYTES = 2**28  # of `pipeline.optimizer`, a room that costs torch: a test compares


class Peak(NamedTuple):
    """What is held at the most, in bytes by part, and when."""

    phase: str
    """loss, backward, embedding (the end of the backward pass) or optimizer."""
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Return all of it."""
        return sum(self.parts.values())


def peak(
    shape: Shape,
    *,
    rows: int,
    block_size: int,
    precision: str = "bf16",
    kind: str = "cpu",
    optimizer: str = "adamw",
    is_accumulating: bool = False,
    is_checkpointed: bool = False,
    is_blockwise: bool = False,
    is_compiled: bool = False,
    is_saving: bool = True,
) -> Peak:
    """Return the most that one process holds which has the whole model.

    Args:
        rows: of a batch, each of `block_size` tokens.
        precision: fp32, or bf16 or fp16 by autocast.
        kind: cpu, where the process and its libraries count (resident memory), or cuda or mps,
            where only what is allocated on the device does.
        optimizer: adamw or muon.
        is_accumulating: an update has several batches.
        is_checkpointed: gradient checkpointing.
        is_blockwise: attention is `blockwise_causal` (`pipeline.attention.fastest`: on a CPU up to
            blocks of 512).
        is_compiled: torch_compile; counts on a CPU alone.
        is_saving: checkpoints are saved; their copy lies in the host's memory.
    """
    batch = {"rows": rows, "block_size": block_size, "precision": precision}
    batch |= {"is_checkpointed": is_checkpointed, "is_blockwise": is_blockwise}
    phases = _phases(
        shape, **batch, kind=kind, optimizer=optimizer, is_accumulating=is_accumulating
    )
    phase, parts = max(phases.items(), key=lambda each: sum(each[1].values()))
    if kind == "cpu":
        held = FP32 * parameters(shape) + optimizer_bytes(shape, optimizer)
        parts |= {
            "holes": _hole_bytes(shape, rows, block_size, precision, is_blockwise),
            "checkpoint": held * is_saving,
            "process": int(PROCESS_BYTES + COMPILER_BYTES * is_compiled),
        }
    return Peak(phase, parts)


def _phases(
    shape: Shape,
    *,
    rows: int,
    block_size: int,
    precision: str,
    kind: str,
    optimizer: str,
    is_accumulating: bool,
    is_checkpointed: bool,
    is_blockwise: bool,
) -> dict[str, dict[str, int]]:
    """Return what is allocated in each phase of a later update, by part."""
    batch = {"rows": rows, "block_size": block_size, "precision": precision}
    count, sizes, tokens = parameters(shape), parameters_by_part(shape), rows * block_size
    layers, width = shape.layers, shape.width
    weights = FP32 * count
    before = weights * is_accumulating  # gradients of the batches before
    head = FP32 * sizes["embedding"]  # the tied weight's gradient
    of_layers = FP32 * (sizes["attention"] + sizes["mlp"])
    of_layer = of_layers // max(layers, 1)
    copies = HALF * (sizes["attention"] + sizes["mlp"]) if precision != "fp32" else 0
    ends = activation_bytes(shape._replace(layers=0), is_blockwise=is_blockwise, **batch)
    one = activation_bytes(shape._replace(layers=1), is_blockwise=is_blockwise, **batch) - ends
    kept = FP32 * tokens * width if is_checkpointed else one
    work = _backward_bytes(shape, is_blockwise=is_blockwise, **batch)
    always = {"weights": weights, "optimizer": optimizer_bytes(shape, optimizer)}
    device = "cpu" if kind == "cpu" else "cuda"
    loss = loss_bytes(shape, tokens=tokens, precision=precision, device=device)

    def backward(done: int) -> dict[str, int]:
        """Return what is held while the layer below `done` others passes its gradient on."""
        made = before or of_layer * done
        return always | {
            "gradients": made + head,
            "copies": copies,
            "activations": kept * (layers - done) + one * is_checkpointed,
            "work": work,
        }

    last = max((backward(done) for done in (0, layers - 1)), key=lambda parts: sum(parts.values()))
    return {
        "loss": always
        | {
            "gradients": before, "copies": copies,
            "activations": kept * layers + ends, "loss": loss,
        },
        "backward": last,
        # Of the tied weight: the head's, the embedding's, and their sum.
        "embedding": always | {"gradients": max(before, weights - head) + 3 * head},
        "optimizer": always
        | {"gradients": weights, "work": _muon_bytes(shape) if optimizer == "muon" else 0},
    }  # fmt: skip


def _hole_bytes(
    shape: Shape, rows: int, block_size: int, precision: str, is_blockwise: bool
) -> int:
    """Return the memory between allocations: as large as what comes and goes.

    That is a layer and a chunk of the loss. The allocator keeps what was freed
    (`pipeline.machine.prepare_cpu`), and a tensor of another size finds no hole that fits. Of 38
    runs of six shapes 35 came out within 10 % by this rule; with checkpointing in fp32 at 8 x 512
    the holes were twice as large.
    """
    batch = {"rows": rows, "block_size": block_size, "precision": precision}
    one, none = (
        activation_bytes(shape._replace(layers=n), is_blockwise=is_blockwise, **batch)
        for n in (1, 0)
    )
    loss = loss_bytes(shape, tokens=rows * block_size, precision=precision, device="cpu")
    return one - none + loss


def _backward_bytes(
    shape: Shape, *, rows: int, block_size: int, precision: str, is_blockwise: bool
) -> int:
    """Return what the backward pass of a layer makes and drops: of the MLP, or of attention.

    The gradient behind the activation, beside the residual stream's (that before it takes the room
    of the MLP's input to its second product); or those of a part's probabilities, in fp32 and as
    they are multiplied, and of its scores.
    """
    tokens, product = rows * block_size, product_bytes(precision)
    stream = FP32 * tokens * shape.width
    mlp = product * tokens * shape.mlp_width
    part = rows * shape.heads * min(QUERIES, block_size) * block_size * is_blockwise
    return stream + max(mlp, part * (2 * FP32 + product))


def _muon_bytes(shape: Shape) -> int:
    """Return what an update by Muon makes and drops, of the matrices that are multiplied at once.

    In fp32 the momentum ahead, its matrices side by side and the updates; in the precision of the
    products (bf16, or fp32 on a CPU that lacks it; that is counted) three of the iteration's own.
    """
    most = 0
    for number, rows, columns in _matrices(shape):
        short, long = min(rows, columns), max(rows, columns)
        at_once = min(number, max(1, MUON_BATCH_BYTES // (FP32 * short * long)))
        most = max(most, at_once * (2 * FP32 * short * long + 3 * HALF * short * long))
    return most


def _matrices(shape: Shape) -> list[tuple[int, int, int]]:
    """Return how many matrices of each shape Muon updates: four of attention, two of the MLP."""
    width = shape.width
    return [(4 * shape.layers, width, width), (2 * shape.layers, width, shape.mlp_width)]
