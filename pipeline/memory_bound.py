"""What each device holds of a batch in training, by part: an upper bound, for every topology.

The bytes kept for the backward pass come out exactly as PyTorch's on a CPU
(`tests/test_memory_bound.py`).
"""

from pipeline.planning import Shape, parameters, parameters_by_part, query_parts, seen_keys

FP32, HALF = 4, 2  # bytes; half is bf16 or fp16
ADAMW_BYTES = 8  # a parameter: both averages in fp32; of Muon's matrices it is one
# Of `pipeline.linear_cross_entropy`, logits held at a time: that room costs torch, so a test keeps
# it the same.
CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 2**30}
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
        seen, ends = seen_keys(block_size), [end for _, end in query_parts(block_size)]
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
