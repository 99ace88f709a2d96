"""Attention for training: causal without a mask, registered with transformers by name.

`sdpa_causal` is PyTorch's fused attention, told that it is causal. transformers' own `sdpa` hands a
compiled GPT-2 a dense mask instead, with which the fast causal kernel cannot run; an attention
without a mask function of its name gets none.

`blockwise_causal` is plain matrix products over 128 queries at a time and the keys before them, so
that what is above the diagonal is not computed. On two Zen 4 cores that is 1.7 to 3.9 times as fast
as the fused kernel in bf16 at blocks of 64 to 512, 1.1 to 1.3 times at 1,024 (compiled, both
passes: `tests/benchmarks/attention_kernels.py`), and keeps block_size / 2 probabilities a token.

Neither can keep documents apart (they are refused where that is asked) or leave out padding,
which our rows do not have: they belong to the model that trains; the saved one opens with sdpa.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask

from pipeline.recipe import InputError

# Queries at a time: fastest, or within a fifteenth of it, at blocks from 512 on. At 128 tokens 64
# would save up to 4 % of a step of 4 x 192, and be twice the code to compile.
QUERIES = 128
# Above, the probabilities kept for the backward pass (12 layers, batch 8 x 1,024: 1.2 GB in bf16)
# cost more than the time they save.
LONGEST_BLOCKWISE = 512
# What transformers calls the cache of keys and values: another name since 5.24.
CACHE = min({"cache", "past_key_values"} & set(inspect.signature(create_causal_mask).parameters))


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


def check_documents_are_apart(model: PreTrainedModel) -> None:
    """Make the mask of two documents of two tokens, and see that the second cannot see the first.

    An attention function without a mask function (a fast causal kernel) gets none and would drop
    the boundaries without a word. Flash attention gets none either, but reads the positions.
    """
    name = model.config._attn_implementation
    if name.startswith("flash_attention"):
        return
    mask = create_causal_mask(
        config=model.config,
        inputs_embeds=torch.zeros(1, 4, model.config.hidden_size),
        attention_mask=None,
        position_ids=torch.tensor([[0, 1, 0, 1]]),
        **{CACHE: None},
    )
    if isinstance(mask, torch.Tensor):
        # Boolean masks say what is seen, others what is added to the scores.
        seen = mask if mask.dtype == torch.bool else mask == 0
        wanted = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]).bool()
        if torch.equal(seen[0, 0], wanted):
            return
    elif mask is not None:  # flex_attention's block mask, made from the same mask function
        return
    raise InputError(
        f"model.attn_implementation: {name} has no mask and would let documents see each other; "
        "with data.attend_across false take eager or sdpa"
    )
