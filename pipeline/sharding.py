"""Weights that are divided over devices: made whole for a file, and divided again.

A checkpoint is the same whatever its run was divided into. What is divided is gathered tensor by
tensor, so that no device ever holds the whole model, and comes together in the main process's host
memory, from where it is written beside the training: 12 bytes a parameter with AdamW's state, 19 GB
or more for GPT-2 xl. Each process maps such a file and keeps its part.
"""

import copy
import itertools
import os
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline import zero

# What accelerate's launcher tells the processes that it starts.
_FSDP, _DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"


def wanted_sharding() -> str | None:
    """Return what the accelerate config divides the weights by: fsdp2, deepspeed or None."""
    found = {"fsdp2": os.environ.get(_FSDP, ""), "deepspeed": os.environ.get(_DEEPSPEED, "")}
    return next((name for name, said in found.items() if said.lower() in ("1", "true")), None)


def is_divided(model: torch.nn.Module) -> bool:
    """Whether no process holds all of the model's weights, so that all must use it together."""
    return isinstance(model, FSDPModule) or any(map(zero.is_divided, model.parameters()))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the parts of all processes; all of them must ask."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    return zero.whole(tensor) if zero.holds(tensor) else tensor


def whole_shape(weight: torch.Tensor) -> list[int]:
    """Return the shape of a weight, of which this process may hold a part."""
    return list(getattr(weight, "ds_shape", weight.shape))


@torch.no_grad()
def put(weight: torch.Tensor, value: torch.Tensor) -> None:
    """Give a weight, or this process's part of it, a value that all processes hold."""
    if zero.holds(weight):
        zero.put(weight, value)
    else:
        weight.copy_(divided_like(value, weight))


def divided_like(tensor: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor that all hold, if `example` is divided."""
    if not isinstance(example, DTensor) or tensor.shape != example.shape:
        return tensor
    mesh, placements = example.device_mesh, example.placements
    # `None`: every process has read the same; there is nothing to be sent.
    part = distribute_tensor(tensor, mesh, placements, src_data_rank=None)
    return part.clone()  # else it would keep the whole one


def tensor_bytes(tree: Any) -> int:
    """Return the bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(tree, torch.Tensor):
        return getattr(tree, "ds_numel", tree.numel()) * tree.element_size()
    if isinstance(tree, dict):
        tree = list(tree.values())
    return sum(map(tensor_bytes, tree)) if isinstance(tree, list | tuple) else 0


def whole_copy(tree: Any, last: Any, *, keep: bool = True, pinned: bool = False) -> Any:
    """Return nested dicts and lists with their tensors copied, into those of `last` if they fit.

    Without `keep` only give other processes the parts of what is divided, and return None. Memory
    that is taken `pinned` is copied into without waiting for the GPU.
    """
    options = {"keep": keep, "pinned": pinned}
    if callable(tree):
        tree = tree()
    if isinstance(tree, torch.Tensor):
        tree = whole(tree)
        if not keep:
            return None
        on_gpu = tree.device.type == "cuda" and pinned
        if not isinstance(last, torch.Tensor) or (last.shape, last.dtype) != (
            tree.shape, tree.dtype
        ):  # fmt: skip
            last = torch.empty(tree.shape, dtype=tree.dtype, pin_memory=on_gpu)
        return last.copy_(tree.detach(), non_blocking=on_gpu)
    if isinstance(tree, dict):
        before = last if isinstance(last, dict) else {}
        found = {key: whole_copy(value, before.get(key), **options) for key, value in tree.items()}
        return found if keep else None
    if isinstance(tree, list | tuple):
        before = last if isinstance(last, list | tuple) and len(last) == len(tree) else ()
        found = [whole_copy(*pair, **options) for pair in itertools.zip_longest(tree, before)]
        return type(tree)(found) if keep else None
    return copy.deepcopy(tree)
