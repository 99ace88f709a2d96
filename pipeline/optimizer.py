"""Muon for the matrices of the blocks, AdamW for the rest, as one optimizer with one state.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a
matrix by the nearest matrix with equal singular values, so that an update moves all directions
alike. That is `torch.optim.Muon`, with what GPT-2 needs besides: `c_attn` holds three matrices,
which are orthogonalised apart; `Conv1D` stores weights transposed, so the rate is adjusted by
`match_rms_adamw`, which does not ask which side is which; all matrices of a shape are multiplied
in one batch, since a loop of small products dominates a small model's step; and a GPU can be told
to skip an update (`found_inf`), as fused AdamW can.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import GPT2LMHeadModel, TrainingArguments

from pipeline import machine
from pipeline.sections import OptimizerSection

# Jordan's quintic: the steepest slope at zero that still keeps singular values near 1. torch's own.
A, B, C = 3.4445, -4.7750, 2.0315
TINY = 1e-7  # of a matrix whose momentum is zero; torch's own
# Adjusted by match_rms_adamw (Liu et al. 2025, https://arxiv.org/abs/2502.16982, section 2.2): an
# update then has the root mean square that AdamW's typically has, and AdamW's rate and decay fit.
RMS_OF_ADAMW = 0.2
# Bytes of matrices multiplied in one batch: all of GPT-2 small at once; of XL a fourth.
BATCH_BYTES = 2**28


class Muon(torch.optim.AdamW):
    """AdamW in which groups with `parts` above 0 hold matrices, and are updated by Muon.

    A group's `parts` says how many matrices lie side by side in each of its parameters. All groups
    have AdamW's settings; those of matrices also `momentum` and `newton_schulz_steps`.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Make one update."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        self._update_matrices([group for group in groups if group["parts"]])
        self.param_groups = [group for group in groups if not group["parts"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def _update_matrices(self, groups: list[dict[str, Any]]) -> None:
        grad_scale, skip = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        skip = None if skip is None else skip.reshape(())
        alike, counts = defaultdict(list), []
        for group in groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    for one in self._matrices(parameter, group):
                        alike[min(one.of.shape), max(one.of.shape), one.settings].append(one)
                    counts.append(self.state[parameter]["step"])
        if counts:
            torch._foreach_add_(counts, 1.0 if skip is None else 1.0 - skip)
        for (short, long, settings), matrices in alike.items():
            at_once = max(1, BATCH_BYTES // (4 * short * long))
            for start in range(0, len(matrices), at_once):
                _update(matrices[start : start + at_once], settings, grad_scale, skip)

    def _matrices(self, parameter: torch.Tensor, group: dict[str, Any]) -> Iterator["_Matrix"]:
        state = self.state[parameter]
        if not state:
            # AdamW's own loading of a state wants one in each.
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["momentum_buffer"] = torch.zeros_like(parameter)
        pieces = (parameter, parameter.grad, state["momentum_buffer"])
        for piece in zip(*(t.chunk(group["parts"], 1) for t in pieces), strict=True):
            yield _Matrix(*piece, _Settings(*(group[name] for name in _Settings._fields)))


class _Settings(NamedTuple):
    lr: float
    weight_decay: float
    momentum: float
    newton_schulz_steps: int


class _Matrix(NamedTuple):
    of: torch.Tensor
    gradient: torch.Tensor
    average: torch.Tensor
    settings: _Settings


def _update(
    matrices: list[_Matrix],
    settings: _Settings,
    grad_scale: torch.Tensor | None,
    skip: torch.Tensor | None,
) -> None:
    """Update matrices of one shape (or its transpose), or none of them where `skip` is 1."""
    rate, decay, momentum, steps = settings
    weights, averages = [one.of for one in matrices], [one.average for one in matrices]
    gradients = [one.gradient for one in matrices]
    if grad_scale is not None:
        gradients = [gradient / grad_scale for gradient in gradients]
    if skip is not None:  # without a look at it: that would wait for the device
        pairs = zip(averages, gradients, strict=True)
        gradients = [torch.where(skip > 0, average, gradient) for average, gradient in pairs]
    torch._foreach_lerp_(averages, gradients, 1 - momentum)
    ahead = torch._foreach_lerp(gradients, averages, momentum)  # Nesterov's
    is_tall = [one.shape[0] > one.shape[1] for one in weights]
    stacked = torch.stack([a.mT if tall else a for a, tall in zip(ahead, is_tall, strict=True)])
    found = _orthogonalized_together(stacked, steps=steps).to(weights[0].dtype)
    updates = [u.mT if tall else u for u, tall in zip(found, is_tall, strict=True)]
    adjusted = rate * RMS_OF_ADAMW * math.sqrt(max(weights[0].shape))
    keep = 1 - rate * decay
    if skip is not None:
        made = 1 - skip
        updates = [update * made for update in updates]
        keep = 1 - rate * decay * made
    torch._foreach_mul_(weights, keep)
    torch._foreach_add_(weights, updates, alpha=-adjusted)


def _orthogonalized_together(matrices: torch.Tensor, *, steps: int) -> torch.Tensor:
    """Return `orthogonalized` of matrices that all processes hold; each makes its share of them.

    On the quickstart two processes on two cores made 0.79 to 1.00 times the tokens of one with two
    threads, by round, and 0.78 to 0.91 when each made them all (`tests/benchmarks/scaling.py`).
    """
    count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    share = -(-len(matrices) // count)
    if share == len(matrices):
        return orthogonalized(matrices, steps=steps)
    start = dist.get_rank() * share
    own = matrices[start : start + share]
    dtype = _dtype_of_products(matrices.device)
    made = matrices.new_zeros(share, *matrices.shape[1:], dtype=dtype)
    if len(own):
        made[: len(own)] = orthogonalized(own, steps=steps)
    everyones = made.new_empty(count * share, *made.shape[1:])
    with warnings.catch_warnings():  # PyTorch 2.13 has another name for it, 2.11 has not
        warnings.simplefilter("ignore", FutureWarning)
        dist.all_gather_into_tensor(everyones, made)
    return everyones[: len(matrices)]


def _dtype_of_products(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if machine.has_bf16(device.type) else torch.float32


def orthogonalized(matrices: torch.Tensor, *, steps: int) -> torch.Tensor:
    """Return matrices with the same singular vectors and singular values near 1.

    0.7 to 1.2 after five steps, but for those that were less than about 1 % of the whole. Newton
    and Schulz's iteration, in bf16 where the device multiplies it, else in fp32.

    Args:
        matrices: [count, rows, columns], rows <= columns.
        steps: of the iteration.
    """
    x = matrices.to(_dtype_of_products(matrices.device))
    x = x / x.flatten(1).norm(dim=1).clamp(min=TINY)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        x = torch.baddbmm(x, polynomial, x, beta=A)
    return x


def muon(model: GPT2LMHeadModel, section: OptimizerSection, arguments: TrainingArguments) -> Muon:
    """Return the optimizer of all parameters that are trained.

    Rate, decay, betas and epsilon are those of `arguments`, as for AdamW, and embeddings decay as
    there; biases and norms do not.
    """
    blocks = model.transformer.h
    fused = {id(block.attn.c_attn.weight) for block in blocks}
    others = {
        id(weight)
        for block in blocks
        for weight in (block.attn.c_proj.weight, block.mlp.c_fc.weight, block.mlp.c_proj.weight)
    }
    kinds: dict[str, list[torch.Tensor]] = {"rest": [], "vectors": [], "qkv": [], "matrices": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = "vectors" if parameter.ndim < 2 else "rest"
            kind = "qkv" if id(parameter) in fused else kind
            kinds["matrices" if id(parameter) in others else kind].append(parameter)
    decay, rate = arguments.weight_decay, arguments.learning_rate
    of_matrices = {
        "lr": rate * section.matrix_rate, "weight_decay": decay,
        "momentum": section.momentum, "newton_schulz_steps": section.newton_schulz_steps,
    }  # fmt: skip
    groups = [
        {"params": kinds["rest"], "weight_decay": decay, "parts": 0},
        {"params": kinds["vectors"], "weight_decay": 0.0, "parts": 0},
        {"params": kinds["qkv"], "parts": 3, **of_matrices},
        {"params": kinds["matrices"], "parts": 1, **of_matrices},
    ]
    return Muon(
        [group for group in groups if group["params"]],
        lr=rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        fused=True,
    )
