"""The loss of a language model's head, with at most `CHUNK_BYTES` of fp32 logits at a time.

GPT-2 small over 8 x 1,024 tokens has 1.65 GB of fp32 logits, and a stock step holds several copies.
Here a few rows at a time are multiplied with the head's weight, and at once turned into their loss
and gradients: three matrix products as in the stock step, nothing computed twice. The products run
in the autocast precision; log-sum-exp, the loss and the sum of the weight's gradient over the
chunks are fp32. `torch.nn.functional.linear_cross_entropy` is not used: its chunked form returns
the loss itself in bf16 (7.81 for 7.89), and PyTorch 2.11 does not have it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from pipeline.blocks import NO_LABEL

# fp32 logits held at a time. CPU: 256 rows of GPT-2's vocabulary, what two cores' caches still
# serve; a GPU wants few large products, and has the room.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}
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
        vocabulary, rows = len(weight), chunk_rows(len(weight), hidden.device.type)
        missing = -vocabulary % ALIGNED if hidden.device.type == "cuda" else 0
        head = weight.to(dtype)
        if missing:
            head = F.pad(head, (0, 0, 0, missing))
        is_label = labels != NO_LABEL
        targets = torch.where(is_label, labels, 0)[:, None]
        # Where nothing is predicted, neither this row's loss nor its part of the gradients counts.
        counts = is_label[:, None].to(dtype)
        inputs = hidden.to(dtype)
        # The sum over a chunk comes before any loss scale, and fp16 ends at 65,504.
        shrunk = 2.0**-8 if dtype == torch.float16 else 1.0
        losses, hidden_gradients, weight_gradient = [], [], None
        for start in range(0, len(hidden), rows):
            chunk, target = inputs[start : start + rows], targets[start : start + rows]
            count = counts[start : start + rows]
            logits = chunk @ head.t()
            if missing:
                logits[:, vocabulary:] = float("-inf")
            log_odds = F.log_softmax(logits, -1, dtype=torch.float32)
            losses.append(-log_odds.gather(1, target) * count.float())
            if not is_hidden_trained and not is_weight_trained:
                continue
            error = _minus_one_at(log_odds, target).to(dtype)
            if is_hidden_trained:
                hidden_gradients.append(error @ head * count)
            if is_weight_trained:
                part = (error.t() @ (chunk * (count * shrunk))).float() / shrunk
                weight_gradient = part if weight_gradient is None else weight_gradient.add_(part)
        ctx.save_for_backward(
            torch.cat(hidden_gradients) if is_hidden_trained else None,
            weight_gradient[:vocabulary] if is_weight_trained else None,
        )
        ctx.dtypes = hidden.dtype, weight.dtype
        return torch.cat(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        return (
            None if hidden_gradient is None else hidden_gradient.to(hidden_dtype) * gradient,
            None if weight_gradient is None else weight_gradient.to(weight_dtype) * gradient,
            *[None] * 4,
        )


def _minus_one_at(log_odds: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the probabilities, less 1 at each row's target: the gradient of its loss."""
    if torch.compiler.is_compiling():  # a comparison becomes part of the kernel, a scatter does not
        columns = torch.arange(log_odds.shape[1], device=log_odds.device)
        return log_odds.exp() - (columns == target).float()
    return log_odds.exp_().scatter_add_(1, target, log_odds.new_full(target.shape, -1.0))
