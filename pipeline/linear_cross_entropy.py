"""The loss of a language model's head, with at most `CHUNK_BYTES` of fp32 logits at a time.

GPT-2 small over 8 x 1,024 tokens has 1.65 GB of fp32 logits, and a stock step holds several copies.
Here a few rows at a time are multiplied with the head's weight, and at once turned into their loss
and gradients: three matrix products as in the stock step, nothing computed twice. The products run
in the autocast precision; log-sum-exp, the loss and the sum of the weight's gradient over the
chunks are fp32. `torch.nn.functional.linear_cross_entropy` is not used: its chunked form returns
the loss itself in bf16 (7.81 for 7.89), and PyTorch 2.11 does not have it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from pipeline.blocks import NO_LABEL

# fp32 logits held at a time. CPU: 512 rows of GPT-2's vocabulary were faster than 128 and 256, and
# as fast as 1,024 (two Zen 4 cores); a GPU wants few large products, and has the room.
CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 2**30}
# Columns of the padded products: tensor cores want multiples of 8, and their tiles of 64.
ALIGNED = 64


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the summed cross-entropy of `hidden @ weight.T` against `labels`, in nats, fp32.

    Equals `F.cross_entropy(hidden @ weight.T, labels, reduction="sum")`; the gradients exist once
    (no double backward).

    Args:
        hidden: [tokens, width].
        weight: [vocabulary, width].
        labels: [tokens], -100 where nothing is predicted.
    """
    kind = hidden.device.type
    is_mixed = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if is_mixed else hidden.dtype
    # A frozen head or a model that is only asked for its loss makes fewer products.
    wanted = [torch.is_grad_enabled() and of.requires_grad for of in (hidden, weight)]
    return _LinearCrossEntropy.apply(hidden, weight, labels, dtype, *wanted)


def chunk_rows(vocabulary: int, device_type: str) -> int:
    """Return how many rows of logits are made at a time: a power of two."""
    rows = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cpu"]) // (4 * vocabulary)
    return 1 << max(rows.bit_length() - 1, 5)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        dtype: torch.dtype,
        is_hidden_trained: bool,
        is_weight_trained: bool,
    ) -> torch.Tensor:
        are_trained = is_hidden_trained, is_weight_trained
        vocabulary, kind = len(weight), hidden.device.type
        head = weight.to(dtype)
        if kind == "cuda" and vocabulary % ALIGNED:
            head = F.pad(head, (0, 0, 0, -vocabulary % ALIGNED))
        is_apart = torch.compiler.is_compiling() and len(hidden) > chunk_rows(vocabulary, kind)
        compute = _loss_and_gradients_apart if is_apart else _loss_and_gradients
        loss, *found = compute(hidden.to(dtype), head, labels, vocabulary, are_trained, is_apart)
        gradients = [found.pop(0) if is_trained else None for is_trained in are_trained]
        ctx.save_for_backward(*gradients)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        each = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        made = [None if of is None else of.to(dtype) * gradient for of, dtype in each]
        return (*made, *[None] * 4)


def _loss_and_gradients(
    hidden: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    vocabulary: int,
    are_trained: Sequence[bool],
    is_apart: bool,
) -> list[torch.Tensor]:
    """Return the loss, and the gradients of those of hidden and weight that are trained."""
    losses_and_error, add_ = _compiled() if is_apart else (_losses_and_error, _add_)
    is_hidden_trained, is_weight_trained = are_trained
    is_label = labels != NO_LABEL
    targets = torch.where(is_label, labels, 0)[:, None]
    # Where nothing is predicted, neither this row's loss nor its part of the gradients counts.
    counts = is_label[:, None].to(hidden.dtype)
    # The sum over a chunk comes before any loss scale, and fp16 ends at 65,504.
    shrunk = 2.0**-8 if hidden.dtype == torch.float16 else 1.0
    losses, hidden_gradients, weight_gradient = [], [], None
    for chunk, target, count in zip(
        *(of.split(chunk_rows(vocabulary, hidden.device.type)) for of in (hidden, targets, counts)),
        strict=True,
    ):
        nats, error = losses_and_error(chunk @ head.t(), target, vocabulary)
        losses.append(nats * count.float())
        if is_hidden_trained:
            hidden_gradients.append(error @ head * count)
        if is_weight_trained:
            part = error.t() @ (chunk * (count * shrunk))
            if weight_gradient is None:
                weight_gradient = part.float()
            else:
                add_(weight_gradient, part)
            del part
        del error  # or the next chunk's are made beside them
    gradients = [torch.cat(hidden_gradients)] if is_hidden_trained else []
    if is_weight_trained:
        if shrunk != 1.0:
            weight_gradient /= shrunk
        gradients.append(weight_gradient[:vocabulary])
    return [torch.cat(losses).sum(), *gradients]


# As part of a compiled graph a chunk's kernels would be compiled once for each chunk, and the parts
# of the weight's gradient kept, to be added up in one kernel: for GPT-2 small and 8 x 1,024 tokens
# 71 s and 2 GB. As an operator of its own it runs as written, on kernels compiled by themselves
# (by inductor, whatever the backend of the graph is).
_loss_and_gradients_apart = torch.library.custom_op(
    "gpt2_pretraining::loss_and_gradients", _loss_and_gradients, mutates_args=()
)


# While a graph is made it is known by the shapes of what the function itself returns.
_loss_and_gradients_apart.register_fake(lambda *given: _loss_and_gradients(*given[:-1], False))


def _losses_and_error(
    logits: torch.Tensor, target: torch.Tensor, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's nats, and their gradient: the probabilities, less 1 at the target."""
    if logits.shape[1] > vocabulary:  # padded
        logits[:, vocabulary:] = float("-inf")
    log_odds = F.log_softmax(logits, -1, dtype=torch.float32)
    nats = -log_odds.gather(1, target)
    if torch.compiler.is_compiling():  # a comparison becomes part of the kernel, a scatter does not
        columns = torch.arange(log_odds.shape[1], device=log_odds.device)
        error = log_odds.exp() - (columns == target).float()
    else:
        ones = log_odds.new_ones(target.shape)
        error = log_odds.exp_().scatter_add_(1, target, -ones)
    return nats, error.to(logits.dtype)


def _add_(total: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    return total.add_(part)


@functools.cache
def _compiled() -> list[Callable[..., Any]]:
    each = (_losses_and_error, _add_)
    return [torch.compile(function, fullgraph=True, dynamic=False) for function in each]
