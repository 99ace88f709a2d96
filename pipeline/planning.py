"""What a run takes, before it runs: parameters, operations, memory, and the topology that fits.

Arithmetic on a GPT-2's shape alone. What of it could be measured on a CPU is: operations as PyTorch
counts them and the bytes kept for the backward pass come out exactly (`tests/test_planning.py`).
"""

from typing import Any, NamedTuple


class Shape(NamedTuple):
    """What sets the size of a GPT-2; names as in its config in words."""

    layers: int
    width: int
    heads: int
    vocabulary: int = 50257
    positions: int = 1024
    inner: int | None = None
    """Width of the MLP (`n_inner`); four times `width` where nothing is said, as in GPT-2."""

    @property
    def mlp_width(self) -> int:
        """Width between the MLP's two products."""
        return 4 * self.width if self.inner is None else self.inner


# Radford et al. 2019, table 2; by the parameters that they really have, in millions.
SIZES = {
    "124M": Shape(12, 768, 12),
    "355M": Shape(24, 1024, 16),
    "774M": Shape(36, 1280, 20),
    "1558M": Shape(48, 1600, 25),
}
# What the Hub calls them, and distilgpt2 (Sanh et al. 2019), half the layers of the smallest.
_NAMED = {
    "gpt2": SIZES["124M"],
    "gpt2-medium": SIZES["355M"],
    "gpt2-large": SIZES["774M"],
    "gpt2-xl": SIZES["1558M"],
    "distilgpt2": Shape(6, 768, 12),
}
_ORGANISATIONS = ("openai-community", "distilbert", "openai", "")

FP32, HALF = 4, 2  # bytes; half is bf16 or fp16
ADAMW_BYTES = 8  # a parameter: both averages in fp32; of Muon's matrices it is one
# A share of a device's memory that nothing of ours takes: CUDA's context, NCCL's buffers, holes
# between allocations. An assumption; nothing here could measure it.
KEPT_FREE = 0.1
# Of `pipeline.linear_cross_entropy`, logits held at a time, and of `pipeline.attention`, queries at
# a time of `blockwise_causal`: those rooms cost torch, so a test keeps these the same.
CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 2**30}
QUERIES = 128
# What the processes divide instead of each holding it whole (Rajbhandari et al. 2020, section 5).
DIVIDED = {
    "none": (),
    "ddp": (),
    "zero2": ("gradients", "optimizer"),
    "zero3": ("weights", "gradients", "optimizer"),
    "fsdp2": ("weights", "gradients", "optimizer"),
}
# DeepSpeed's defaults (docs, config-json): reduce_bucket_size and stage3_max_live_parameters.
ZERO_BUCKET, ZERO_LIVE = 500_000_000, 1_000_000_000


def known_shape(name: str) -> Shape | None:
    """Return the shape of OpenAI's GPT-2 or distilgpt2 by its name on the Hub, None of others."""
    organisation, _, model = name.rpartition("/")
    return _NAMED.get(model.lower()) if organisation.lower() in _ORGANISATIONS else None


def parameters_by_part(shape: Shape) -> dict[str, int]:
    """Return how many parameters each part has; the head is the embedding."""
    layers, width, inner = shape.layers, shape.width, shape.mlp_width
    return {
        "embedding": shape.vocabulary * width,
        "positions": shape.positions * width,
        "attention": layers * (4 * width**2 + 4 * width),  # queries, keys, values; projection
        "mlp": layers * (2 * width * inner + inner + width),  # to the inner width, and back
        "norms": layers * 4 * width + 2 * width,
    }


def parameters(shape: Shape) -> int:
    """Return how many parameters the model has, the tied embedding once."""
    return sum(parameters_by_part(shape).values())


def flops_per_token(
    *,
    parameters: int,
    layers: int,
    width: int,
    block_size: int,
    trained: int | None = None,
    still: int = 0,
    still_layers: int = 0,
) -> int:
    """Return the floating-point operations of a training step per token: 6N + 12 L C T.

    Each weight multiplies and adds once forwards and twice backwards (Kaplan et al. 2020): for its
    input's gradient and for its own; queries meet keys, and probabilities values, over the whole
    block as PaLM counts it (Chowdhery et al. 2022, appendix B), though half of it is above the
    diagonal and need not be computed.

    Args:
        trained: parameters that have a gradient (default: all).
        still: parameters below all that are trained, which no gradient passes.
        still_layers: the layers that they are.
    """
    trained = parameters if trained is None else trained
    products = 2 * parameters + 2 * (parameters - still) + 2 * trained
    return products + 4 * (3 * layers - 2 * still_layers) * width * block_size


def training_flops(shape: Shape, block_size: int) -> int:
    """Return the floating-point operations of a training step per token, all parameters trained."""
    return flops_per_token(
        parameters=parameters(shape), layers=shape.layers, width=shape.width, block_size=block_size
    )


def flops_by_part(shape: Shape, *, block_size: int, is_blockwise: bool = False) -> dict[str, float]:
    """Return the operations of a training step per token in matrix products, exactly, by part.

    What `torch.utils.flop_counter` counts, where `training_flops` counts 2 x 3 for every parameter:
    positions, norms and biases multiply nothing, and a row's last token predicts nothing.

    Args:
        is_blockwise: attention is `blockwise_causal`, which leaves out most of what is above the
            diagonal; else the whole block counts, as for PaLM.

    Returns:
        `layers` (their weights), `attention` (queries with keys, probabilities with values) and
        `head`.
    """
    width, layers = shape.width, shape.layers
    met = seen_keys(block_size) if is_blockwise else block_size**2
    return {
        "layers": 6.0 * layers * (4 * width**2 + 2 * width * shape.mlp_width),
        "attention": 12 * layers * width * met / block_size,
        "head": 6 * shape.vocabulary * width * (block_size - 1) / block_size,
    }


def seen_keys(block_size: int) -> int:
    """Return with how many keys a row's queries meet in `blockwise_causal`, in all."""
    return sum((end - start) * end for start, end in _query_parts(block_size))


def _query_parts(block_size: int) -> list[tuple[int, int]]:
    """Return the queries that `blockwise_causal` takes at a time; each sees the keys to its end."""
    starts = range(0, block_size, QUERIES)
    return [(start, min(start + QUERIES, block_size)) for start in starts]


# -- memory ---------------------------------------------------------------------------------------


def activation_bytes(
    shape: Shape,
    *,
    rows: int,
    block_size: int,
    precision: str = "bf16",
    is_checkpointed: bool = False,
    is_blockwise: bool = False,
) -> int:
    """Return the bytes that a forward pass keeps for the backward pass.

    Each layer keeps, per token, C values of each norm's input (of the residual stream, 4 bytes
    each) and 14 C values of what products and the activation take (s bytes each): the attention's
    input C, queries, keys and values 3 C, its output C; the MLP's input C, and 4 C (its width) on
    either side of the activation. That is 36 C bytes in bf16 (s 2) and 64 C in fp32. Compiled
    (inductor, CPU) it came to the same within a thousandth.

    Args:
        rows: of a batch, each of `block_size` tokens.
        precision: bf16 or fp16 (autocast), or fp32.
        is_checkpointed: gradient checkpointing: each layer keeps its input alone, and one layer
            at a time the rest.
        is_blockwise: attention is `blockwise_causal`, which keeps probabilities and copies.
    """
    tokens, width = rows * block_size, shape.width
    product = product_bytes(precision)
    norm = 2 * FP32  # mean and reciprocal deviation
    kept = 6 * width + 2 * shape.mlp_width
    layer = tokens * (2 * (FP32 * width + norm) + product * kept)
    if is_blockwise:
        # Each query sees the keys up to its part's end: fp32 probabilities, and what multiplies the
        # values; a mask for all rows and heads; and the keys and values seen, copied for each part.
        seen, ends = seen_keys(block_size), [end for _, end in _query_parts(block_size)]
        layer += seen * (rows * shape.heads * (FP32 + product * (product < FP32)) + 1)
        layer += 2 * product * rows * width * (sum(ends) - block_size)
    else:
        layer += tokens * FP32 * shape.heads  # the fused kernel's log-sum-exp
    last = tokens * (8 + FP32 * width + norm + product * width)  # ids, last norm, loss's gradient
    if is_checkpointed:
        return shape.layers * FP32 * tokens * width + layer + last
    return shape.layers * layer + last


def product_bytes(precision: str) -> int:
    """Return the bytes of a value that is multiplied."""
    return FP32 if precision == "fp32" else HALF


def loss_bytes(shape: Shape, *, tokens: int, precision: str = "bf16", device: str = "cuda") -> int:
    """Return the most bytes that the head and its loss hold: a chunk of logits, and its weight's.

    The weight's gradient is made with the loss and kept for the backward pass; in bf16 the weight
    is there in bf16 as well. Of a chunk there are logits and log-softmax, or later its error and
    its part of the weight's gradient.
    """
    rows = 1 << max((CHUNK_BYTES[device] // (FP32 * shape.vocabulary)).bit_length() - 1, 5)
    product = product_bytes(precision)
    is_mixed, is_first = product < FP32, tokens <= rows
    # The logits, in bf16 also in fp32, and their log-softmax in fp32; the gradient so far.
    logits = min(rows, tokens) * (product + FP32 + FP32 * is_mixed)
    before = shape.width * FP32 * (not is_first)
    # The error of what was multiplied, the part that it makes, the gradient to which that is added.
    error = min(rows, tokens) * product
    added = shape.width * (product * (is_mixed or not is_first) + FP32)
    head = shape.width * product * is_mixed
    return shape.vocabulary * (head + max(logits + before, error + added))


def memory_by_part(
    shape: Shape,
    *,
    rows: int,
    block_size: int,
    precision: str = "bf16",
    topology: str = "none",
    devices: int = 1,
    device: str = "cuda",
    optimizer: str = "adamw",
    is_accumulating: bool = True,
    is_checkpointed: bool = False,
    is_blockwise: bool = False,
) -> dict[str, int]:
    """Return the bytes that each device holds at most, by part: an upper bound, for not all of
    them are there at the same time (`pipeline.peak_memory` says which are).

    Args:
        topology: none, ddp, fsdp2, zero2 or zero3, over `devices`. DeepSpeed's two are by its
            paper and its documented defaults, with bf16 by autocast; not measured on GPUs.
        is_accumulating: an update has several batches. FSDP2 then holds gradients whole in fp32,
            since accelerate reduces them once per update (`set_requires_gradient_sync`), and DDP
            holds them beside its buckets.
    """
    count, sizes = parameters(shape), parameters_by_part(shape)
    whole = {
        "weights": FP32 * count,
        "gradients": FP32 * count,
        "optimizer": optimizer_bytes(shape, optimizer),
    }
    divided = {part: devices if part in DIVIDED[topology] else 1 for part in whole}
    held = {part: -(-size // divided[part]) for part, size in whole.items()}
    block = (count - sizes["embedding"] - sizes["positions"]) // shape.layers
    rest = sizes["embedding"] + sizes["positions"]
    buffers = copies = 0
    if topology == "ddp":
        # The buckets are the gradients (gradient_as_bucket_view), but not while they are added up.
        buffers = FP32 * count * is_accumulating
    if precision != "fp32":
        copies = HALF * (sizes["attention"] + sizes["mlp"])  # autocast's, kept for the backward
    if topology == "fsdp2":
        # Two blocks (this and the next) and the embedding are whole, one gather is under way.
        copies += FP32 * (2 * block + rest + max(block, rest))
        buffers = FP32 * max(block, rest)  # what is being scattered
        held["gradients"] += FP32 * (count if is_accumulating else max(block, rest))
    if topology in ("zero2", "zero3"):
        held["weights"] += -(-FP32 * count // devices)  # those that AdamW works on are others
        buffers = FP32 * min(ZERO_BUCKET, count)
        copies += FP32 * min(ZERO_LIVE, count) * (topology == "zero3")
    return held | {
        "buffers": buffers,
        "copies": copies,
        "activations": activation_bytes(
            shape, rows=rows, block_size=block_size, precision=precision,
            is_checkpointed=is_checkpointed, is_blockwise=is_blockwise,
        ),
        "loss": loss_bytes(shape, tokens=rows * block_size, precision=precision, device=device),
    }  # fmt: skip


def optimizer_bytes(shape: Shape, optimizer: str = "adamw") -> int:
    """Return what the optimizer keeps: adamw, or muon, which keeps one average of a matrix."""
    saved = 0
    if optimizer == "muon":
        width = shape.width
        matrices = shape.layers * (4 * width**2 + 2 * width * shape.mlp_width)
        saved = (ADAMW_BYTES - FP32) * matrices
    return ADAMW_BYTES * parameters(shape) - saved


def largest_rows(
    shape: Shape,
    *,
    memory_bytes: float,
    block_size: int,
    topology: str,
    devices: int,
    **asked: Any,
) -> int:
    """Return the largest power of two of rows that a batch can have on each device, or 0.

    By the upper bound, in bf16 on a GPU unless `asked` says another thing to `memory_by_part`.
    """
    usable, rows = memory_bytes * (1 - KEPT_FREE), 1
    held = asked | {"block_size": block_size, "topology": topology, "devices": devices}
    while sum(memory_by_part(shape, rows=rows, **held).values()) <= usable:
        rows *= 2
    return rows // 2


def fitting(
    shape: Shape, *, devices: int, memory_bytes: float, rows: int, block_size: int
) -> str | None:
    """Return the accelerate config to take: the one that communicates least of those that fit.

    single_gpu, ddp or fsdp2 (DeepSpeed's ZeRO-3 divides the same), or None where no batch of `rows`
    rows fits.
    """
    order = {"ddp": "ddp", "fsdp2": "fsdp2"} if devices > 1 else {"none": "single_gpu"}
    fit = {"memory_bytes": memory_bytes, "block_size": block_size, "devices": devices}
    for topology, config in order.items():
        if largest_rows(shape, topology=topology, **fit) >= rows:
            return config
    return None
