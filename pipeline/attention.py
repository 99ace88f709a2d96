"""Attention for training: causal without a mask, registered with transformers by name.

`sdpa_causal` is PyTorch's fused attention, told that it is causal. transformers' own `sdpa` hands a
compiled GPT-2 a dense mask instead, with which the fast causal kernel cannot run; an attention
without a mask function of its name gets none.

`blockwise_causal` is plain matrix products over 128 queries at a time and the keys before them, so
that what is above the diagonal is not computed. On two Zen 4 cores that is 1.7 to 3.9 times as fast
as the fused kernel in bf16 at blocks of 64 to 512, 1.1 to 1.3 times at 1,024 (compiled, both
passes: `tests/benchmarks/attention_kernels.py`), and keeps block_size / 2 probabilities a token.

Neither can keep documents apart (`model` refuses them where that is asked) or leave out padding,
which our rows do not have: they belong to the model that trains; the saved one opens with sdpa.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Queries at a time: fastest, or within a fifteenth of it, at blocks from 512 on. At 128 tokens 64
# would save up to 4 % of a step of 4 x 192, and be twice the code to compile.
QUERIES = 128
# Above, the probabilities kept for the backward pass (12 layers, batch 8 x 1,024: 1.2 GB in bf16)
# cost more than the time they save.
LONGEST_BLOCKWISE = 512


def blockwise_causal(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return softmax(query @ key^T * scaling, causal) @ value, the softmax in fp32.

    Args:
        query: [batch, heads, queries, width]; the last of them is at the last key.
        key: [batch, heads, keys, width].
        value: as `key`.

    Returns:
        [batch, queries, heads, width], and no weights.
    """
    assert attention_mask is None  # transformers makes none for a name without a mask function
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries, before = query.shape[2], key.shape[2] - query.shape[2]
    parts = []
    for start in range(0, queries, QUERIES):
        end = min(start + QUERIES, queries)
        seen = before + end
        scores = query[:, :, start:end] @ key[:, :, :seen].transpose(2, 3) * scale
        above = torch.ones(end - start, seen, dtype=torch.bool, device=query.device)
        scores = scores.masked_fill(above.triu(1 + before + start), float("-inf"))
        weights = F.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
        weights = F.dropout(weights, dropout, training=module.training)
        parts.append(weights @ value[:, :, :seen])
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def sdpa_causal(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return the same by PyTorch's fused attention; arguments as for `blockwise_causal`."""
    if 1 < query.shape[2] < key.shape[2]:  # several tokens after a cache: it would cut off the keys
        return blockwise_causal(module, query, key, value, attention_mask, **kwargs)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def fastest(*, block_size: int, attend_across: bool, on_cpu: bool) -> str:
    """Return the name of the attention that trains fastest and keeps documents as asked."""
    if not attend_across:
        return "sdpa"
    return "blockwise_causal" if on_cpu and block_size <= LONGEST_BLOCKWISE else "sdpa_causal"


AttentionInterface.register("blockwise_causal", blockwise_causal)
AttentionInterface.register("sdpa_causal", sdpa_causal)
