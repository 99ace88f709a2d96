"""What a recipe's batch takes of each device's memory, and the largest batch that fits."""

from __future__ import annotations

import math
from typing import NamedTuple

from pipeline.accumulation import share_of_update
from pipeline.batch_memory import KEPT_FREE, Batch
from pipeline.hardware import Hardware
from pipeline.model_shape import PlannedModel
from pipeline.recipe import InputError, Recipe
from pipeline.wording import storage

ROWS = 8  # TrainingArguments' default of per_device_train_batch_size
# The accelerate config of each topology; ddp and fsdp2 have one for several machines, too.
CONFIGS = {
    "none": "single_gpu", "ddp": "ddp", "fsdp2": "fsdp2", "zero2": "deepspeed_zero2",
    "zero3": "deepspeed_zero3",
}  # fmt: skip
DEVICES_PER_MACHINE = 8
LONGEST_BLOCKWISE = 512  # of `pipeline.attention`, which costs torch: a test keeps them the same


class MemoryPlan(NamedTuple):
    """A batch on each device."""

    devices: int
    topology: str
    accelerate_config: str
    precision: str
    is_checkpointed: bool
    rows_per_device: int
    """Of block_size tokens, at once."""
    accumulation: int
    """Batches of an update on each device."""
    bytes_by_part: dict[str, int]
    """Of each device."""
    peak_bytes: int
    phase: str | None
    """Of an update, in which these parts are there together (loss, backward, embedding, optimizer);
    None where their sum is an upper bound."""
    device_bytes: float
    usable_bytes: float
    """Of them: the rest is the runtime's, and holes between allocations."""
    is_fitting: bool
    largest_rows: int
    """The largest power of two of rows that fits."""
    notes: list[str]


def memory_plan(
    recipe: Recipe, model: PlannedModel, hardware: Hardware, *, topology: str | None = None
) -> MemoryPlan:
    """Return how the recipe's batch fits on each device.

    Args:
        topology: none, ddp, fsdp2, zero2 or zero3 (default: the one of none, ddp and fsdp2 that
            sends least, of those in which the batch fits).

    Raises:
        InputError: not one row fits, the device lacks the precision, or the topology does not go
            with the number of devices or the recipe.
    """
    devices, device = hardware.count, hardware.device
    precision, notes = hardware.precision(recipe.precision), []
    if recipe.precision == "auto" and precision == "fp32" and "fp16" in device.flops:
        faster = device.flops["fp16"] / device.flops["fp32"]
        notes.append(f"no bf16 on this device; precision: fp16 has {faster:.2g} times fp32's rate")
    wanted = recipe.training.get("per_device_train_batch_size", ROWS)
    asked = {"block_size": recipe.data.block_size, "batch_size": wanted, "world_size": devices}
    try:
        rows, accumulation = share_of_update(recipe.tokens_per_update, **asked)
    except InputError as error:
        notes.append(f"will be refused: {error}")
        share = recipe.tokens_per_update / (recipe.data.block_size * devices)
        rows = min(wanted, max(1, math.floor(share)))
        accumulation = max(1, math.ceil(share / rows))
    usable = device.memory_bytes * (1 - KEPT_FREE)
    tried: list[Batch] = []
    for name in topologies(recipe, topology, devices):
        batch = Batch(
            model.shape, recipe.data.block_size, precision, name, devices, device.kind,
            recipe.optimizer.name, model.trained / model.parameters,
            is_accumulating=accumulation > 1,
            is_checkpointed=bool(recipe.training.get("gradient_checkpointing")),
            is_blockwise=is_blockwise(recipe, device.kind),
            is_compiled=is_compiled(recipe),
            is_saving=recipe.training.get("save_strategy", "steps") != "no",
        )  # fmt: skip
        tried.append(batch)
        if batch.peak_bytes(rows) <= usable:
            break
    else:  # one in which a smaller batch fits, of which an update has several
        tried = [one._replace(is_accumulating=True) for one in tried]
        batch = next((one for one in tried if one.largest_rows(device.memory_bytes)), tried[0])
    largest = batch.largest_rows(device.memory_bytes)
    if not largest:
        raise InputError(_nothing_fits(recipe, batch, hardware, usable))
    phase, parts = batch.held(rows)
    peak = sum(parts.values())
    if peak > usable:
        notes.append(
            f"does not fit: {rows} rows at once take {storage(peak)} of {storage(usable)}; "
            f"--training.per_device_train_batch_size {largest} does (the update stays the same)"
        )
    return MemoryPlan(
        devices, batch.topology, _config(batch.topology, devices, device.kind), precision,
        batch.is_checkpointed, rows, accumulation, parts, peak, phase,
        device.memory_bytes, usable, peak <= usable, largest, notes,
    )  # fmt: skip


def topologies(recipe: Recipe, asked: str | None, devices: int) -> list[str]:
    """Return those to try, the one that sends least first.

    Raises:
        InputError: the one asked for does not go with the number of devices or the recipe.
    """
    if asked is not None:
        if (asked == "none") != (devices == 1):
            raise InputError(
                f"--topology {asked}: {devices} device(s) "
                + ("share nothing; leave it out" if devices == 1 else "need ddp or another")
            )
        names = [asked]
    else:
        names = ["ddp", "fsdp2"] if devices > 1 else ["none"]
    whole = _is_whole(recipe)
    if whole and asked in ("fsdp2", "zero2", "zero3"):
        what = "model.lora_r" if recipe.model.lora_r is not None else "optimizer.name: muon"
        raise InputError(
            f"--topology {asked}: {what} needs every matrix whole, and pretrain.py refuses it; use "
            "ddp"
        )
    return names[:1] if whole else names


def _is_whole(recipe: Recipe) -> bool:
    """Tell whether every device has to hold all of each matrix."""
    return recipe.optimizer.name == "muon" or recipe.model.lora_r is not None


def _config(topology: str, devices: int, kind: str) -> str:
    if kind == "cpu" and topology in ("none", "ddp"):
        return f"accelerate_configs/{'cpu' if devices == 1 else 'cpu_2'}.yaml"
    name = CONFIGS[topology]
    if devices > DEVICES_PER_MACHINE and topology in ("ddp", "fsdp2"):
        name = f"multi_node_{name}"
    return f"accelerate_configs/{name}.yaml"


def is_blockwise(recipe: Recipe, kind: str) -> bool:
    """Tell whether attention is `blockwise_causal`, as `pipeline.attention` chooses it."""
    if recipe.model.attn_implementation is not None:
        return recipe.model.attn_implementation == "blockwise_causal" and kind == "cpu"
    is_short = recipe.data.block_size <= LONGEST_BLOCKWISE
    return kind == "cpu" and recipe.data.attend_across and is_short


def is_compiled(recipe: Recipe) -> bool:
    """Tell whether the recipe's steps are compiled."""
    return bool(recipe.training.get("torch_compile"))


def _nothing_fits(recipe: Recipe, batch: Batch, hardware: Hardware, usable: float) -> str:
    """Say that not one row fits, and what of the remedies would do."""
    remedies = []
    if not batch.is_checkpointed and batch._replace(is_checkpointed=True).peak_bytes(1) <= usable:
        remedies.append("--training.gradient_checkpointing true")
    for count in (2, 4, 8, 16, 32, 64):
        divided = batch._replace(topology="fsdp2", devices=count, is_accumulating=False)
        is_other = count > hardware.count and hardware.device.kind != "cpu"
        if not _is_whole(recipe) and is_other and divided.peak_bytes(1) <= usable:
            remedies.append(f"{count} of these devices with fsdp2 and one batch per update")
            break
    remedies += ["a device with more memory", "a smaller model.config or data.block_size"]
    parts = batch.held(1)[1]
    states = sum(parts.get(name, 0) for name in ("weights", "gradients", "optimizer"))
    return (
        f"the recipe does not fit on {hardware.title} in any batch: one row of "
        f"{batch.block_size:,} tokens takes {storage(batch.peak_bytes(1))} on each device "
        f"({storage(states)} of it weights, gradients and optimizer), of "
        f"{storage(usable)} that can be used; it takes {', or '.join(remedies)}"
    )
