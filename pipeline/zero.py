"""What DeepSpeed's ZeRO has divided: made whole for a file, and divided again.

ZeRO joins the weights of each of the optimizer's groups to a long tensor and divides that, and
AdamW's state with it, so that its own files fit one number of processes and no other trainer. Here
both go through the functions that DeepSpeed documents for single weights. What it has no function
for, read in version 0.19, stands at `_flat`, `_make_state` and `_link`.
"""

import functools
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from pipeline.recipe import InputError, Recipe

# DeepSpeed calls functions that PyTorch 2.13 has given other names, and each call would say so.
warnings.filterwarnings(
    "ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", category=FutureWarning
)
# Trainer counts what is accumulated itself; DeepSpeed is told the same number, accelerate none.
logging.getLogger("accelerate.accelerator").addFilter(
    lambda record: "Gradient accumulation steps mismatch" not in str(record.msg)
)

STAGES = ("1", "2", "3")
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch")  # what they keep of a weight has its shape

Groups = Sequence[Sequence[torch.nn.Parameter]]


def check(recipe: Recipe, *, precision: str) -> None:
    """See that our checkpoints can hold what the accelerate config and the recipe ask for.

    Raises:
        InputError: they cannot, or the config states what is the recipe's.
    """
    if (norm := os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto")) != "auto":
        raise InputError(
            f"deepspeed_config.gradient_clipping: {norm}: set it to auto in the accelerate config; "
            "it is the recipe's training.max_grad_norm"
        )
    if (file := _stated("config_file", "none")) != "none":
        raise InputError(
            f"deepspeed_config_file: {file} is not read; state zero_stage in the accelerate "
            "config itself, as accelerate_configs/deepspeed_zero3.yaml does: the rest is the "
            "recipe's"
        )
    if (stage := _stated("zero_stage", "2")) not in STAGES:
        raise InputError(f"deepspeed_config.zero_stage: must be 1, 2 or 3; got {stage}")
    for name in ("offload_optimizer_device", "offload_param_device"):
        if (device := _stated(name, "none")) != "none":
            raise InputError(
                f"deepspeed_config.{name}: {device}: checkpoints do not hold what is offloaded; "
                "leave it out"
            )
    unlike = {
        "precision: fp16": precision == "fp16",
        "reduce_dtype: bf16": recipe.reduce_dtype == "bf16",
        "training.optim": recipe.training.get("optim", OPTIMIZERS[0]) not in OPTIMIZERS,
        "model.frozen_blocks": recipe.model.frozen_blocks > 0,
        "faults.rollbacks": recipe.faults.rollbacks > 0,
        "guards.skip_spikes": recipe.guards.skip_spikes,
    }
    for name in (name for name, is_wanted in unlike.items() if is_wanted):
        raise InputError(
            f"{name}: is not tried under DeepSpeed; leave it out, or use accelerate_configs/"
            "fsdp2.yaml"
        )


def _stated(name: str, default: str) -> str:
    """Return what accelerate's launcher has passed on of a DeepSpeed config."""
    return os.environ.get(f"ACCELERATE_DEEPSPEED_{name.upper()}", default)


def holds(weight: torch.Tensor) -> bool:
    """Whether ZeRO has divided a weight (stage 3), or at least its state (stages 1 and 2)."""
    return is_divided(weight) or hasattr(weight, "_hp_mapping")


def is_divided(weight: torch.Tensor) -> bool:
    """Whether no process holds all of a weight: stage 3."""
    return hasattr(weight, "ds_id")


def make_models_whole() -> None:
    """Let models be made as without DeepSpeed, from the same random numbers.

    Once it has been told of stage 3, transformers makes every model of the process divided,
    those too that are only measured; the engine divides the one that is trained, all the same.
    """
    unset_hf_deepspeed_config()


def compute_by_autocast(accelerator: Accelerator) -> None:
    """Let bf16 mean what it means without DeepSpeed, before its engine is made.

    DeepSpeed's own bf16 rounds the weights that compute and the gradients: the losses of 20
    updates of a small model were 0.05 off those in fp32, and by autocast 0.004.
    """
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    if accelerator.mixed_precision == "bf16":
        config["bf16"] = {"enabled": False}
        autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        config["torch_autocast"] = autocast  # of an empty list nothing travels in bf16
        accelerator.native_amp = True  # evaluations do not go through the engine


def whole(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight as the optimizer holds it, in fp32; all processes must ask."""
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(weight)


def put(weight: torch.Tensor, value: torch.Tensor) -> None:
    """Give a weight a value that all processes hold: what computes, and what is optimized."""
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param

    divided = is_divided(weight)
    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0, enabled=divided):
        weight.copy_(value)
    safe_set_full_fp32_param(weight, value)


def optimizer_state(zero: Any, groups: Groups) -> dict[str, Any]:
    """Return the state dict that AdamW alone would have; its tensors are functions that gather.

    All processes must call them, in the same order.

    Args:
        zero: DeepSpeed's optimizer.
        groups: the weights of each of the optimizer's groups.
    """
    from deepspeed.utils import safe_get_full_optimizer_state as gathered

    _link(zero, groups)
    step, names = None, ()
    for state in filter(None, zero.optimizer.state.values()):
        step, names = state["step"], [name for name in state if name != "step"]
    numbered = list(_numbered(groups))
    state = {
        number: {"step": step} | {name: functools.partial(gathered, w, name) for name in names}
        for number, w in numbered
        if step is not None
    }
    numbers, param_groups = iter(range(len(numbered))), []
    for group, weights in zip(zero.param_groups, groups, strict=True):
        param_groups.append({**group, "params": [next(numbers) for _ in weights]})
    return {"state": state, "param_groups": param_groups}


def put_back_optimizer_state(zero: Any, groups: Groups, state: dict[str, Any]) -> None:
    """Give each process its part of what `optimizer_state` held, whatever it was divided into.

    Raises:
        ValueError: it is the state of other weights.
    """
    from deepspeed.utils import safe_set_full_optimizer_state

    weights = dict(_numbered(groups))
    shapes = {n: tuple(getattr(w, "ds_shape", w.shape)) for n, w in weights.items()}
    kept = {n: tuple(one["exp_avg"].shape) for n, one in state["state"].items()}
    if kept and kept != shapes:
        raise ValueError("it is the state of other weights, or of another order of them")
    if kept:
        _make_state(zero, step=float(state["state"][0]["step"]))
        _link(zero, groups)
    for number, one in state["state"].items():
        for name, value in one.items():
            if name != "step":
                safe_set_full_optimizer_state(weights[number], value, name)


def _numbered(groups: Groups) -> Iterator[tuple[int, torch.nn.Parameter]]:
    return enumerate(weight for group in groups for weight in group)


def _flat(zero: Any) -> list[torch.Tensor]:
    """Return this process's parts of the long tensors, which are what AdamW is given."""
    of_stage_3 = getattr(zero, "fp32_partitioned_groups_flat", None)
    return of_stage_3 or zero.single_partition_of_fp32_groups


def _make_state(zero: Any, *, step: float) -> None:
    """Make what AdamW makes itself in its first step, or set its count of steps."""
    adamw = zero.optimizer
    is_fused = any(group.get("fused") for group in adamw.param_groups)
    for flat in _flat(zero):
        state = adamw.state[flat]
        if not state:
            device = flat.device if is_fused else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
        state["step"].fill_(step)


def _link(zero: Any, groups: Groups) -> None:
    """Let each weight find its part of AdamW's state in stages 1 and 2.

    DeepSpeed does this itself after AdamW's very first call, when only the first group has a state.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    if not any(map(is_divided, groups[0])):
        for weights, flat in zip(groups, _flat(zero), strict=True):
            lazy_init_hp_params_optimizer_state(weights, flat, zero.optimizer.state)
