"""How long a planned run takes, when it ends, and what energy and money it costs."""

from __future__ import annotations

from typing import Any, NamedTuple

from pipeline import memory_bound, planning
from pipeline.communication import Cluster, efficiency, traffic
from pipeline.devices import UNCOMPILED
from pipeline.footprint import footprint
from pipeline.hardware import Hardware
from pipeline.memory_plan import DEVICES_PER_MACHINE, MemoryPlan, is_compiled
from pipeline.model_shape import PlannedModel
from pipeline.recipe import Recipe
from pipeline.wording import short

# bytes/s of a device to the others in its machine, each way, by the beginning of its name: NVLink
# by NVIDIA's data sheets (half of what they add up for both ways), else PCI Express x16.
LINKS = {
    "v100": 150e9, "a100": 300e9, "h100-pcie": 64e9, "h100": 450e9, "h200": 450e9, "b200": 900e9,
    "t4": 16e9,
}  # fmt: skip
PCIE_4 = 32e9
BETWEEN = 50e9  # of each device to other machines: 400 Gb/s, an assumption
# An MFU is told of a model this many times smaller than those that it is of, or of updates shorter
# than this: starting kernels and reading rows then take longer than products. Assumptions.
FAR_SMALLER = 4
SHORT_UPDATE = 0.01  # seconds


class CostPlan(NamedTuple):
    """Time, energy and money; None where the run's length or a figure is not known."""

    peak_flops: float
    """FLOP/s of all devices together, in the plan's precision."""
    mfu: float
    mfu_source: str
    efficiency_low: float
    """The share of the time in which devices compute: if no communication is hidden. Taken."""
    efficiency_high: float
    """If all is hidden that can be."""
    tokens_per_second: float
    training_seconds: float | None
    evaluations: int | None
    evaluation_seconds: float | None
    seconds: float | None
    """Both; compiling, preparing text and saving are not counted."""
    kwh: float | None
    kg_co2: float | None
    """CO2 equivalents."""
    device_hours: float | None
    price: float | None
    """In the currency of --price_per_hour, which is of each device."""
    notes: list[str]


def cost_plan(
    recipe: Recipe,
    model: PlannedModel,
    hardware: Hardware,
    memory: MemoryPlan,
    *,
    flops_per_token: int,
    tokens: int | None,
    updates: int | None,
    epochs: float | None = None,
    validation_tokens: float | None = None,
    test_tokens: float | None = None,
    price_per_hour: float | None = None,
) -> CostPlan:
    """Return what a run costs.

    Args:
        hardware: at the MFU of this model's step (`Hardware.of_step`).
        flops_per_token: of a training step.
        tokens, updates: of the run, None if they are not known.
        validation_tokens, test_tokens: of the held-out text, None if not known.
        price_per_hour: of each device.
    """
    device, notes = hardware.device, []
    rate = hardware.rate(recipe.precision)
    low, high = _efficiencies(recipe, model, hardware, memory)
    step, block_size = flops_per_token, recipe.data.block_size
    if memory.is_checkpointed:
        step += _forward_flops(model, block_size, is_still_counted=False)
        notes.append(
            "gradient checkpointing computes the forward pass twice: "
            f"{flops_per_token / step:.2g} of the speed"
        )
    per_second = rate * low / step
    notes += _far_from_known(recipe, model, hardware, per_second)
    if not hardware.is_measured and memory.devices > DEVICES_PER_MACHINE:
        notes.append(
            f"between machines of {DEVICES_PER_MACHINE} devices {BETWEEN * 8 / 1e9:.0f} Gb/s a "
            "device are assumed; accelerate_configs/README.md has slower networks"
        )
    evaluations = seconds = spent = measuring = None
    kwh = kilograms = hours = None
    if tokens is not None:
        spent = tokens / per_second
        evaluations, scored = _scored(recipe, updates, epochs, validation_tokens, test_tokens)
        forward = _forward_flops(model, block_size, is_still_counted=True)
        measuring = scored * forward / (rate * low)
        seconds = spent + measuring
        hours = seconds / 3600 * hardware.count
        found = footprint(
            seconds, device="cpu" if device.kind == "cpu" else device.title,
            world_size=hardware.count, threads=device.threads,
            memory_bytes=memory.peak_bytes,
        ) if device.kind != "mps" else None  # fmt: skip
        if found is not None:
            kwh, kilograms = found.kwh, found.grams_co2 / 1000
    price = None if price_per_hour is None or hours is None else price_per_hour * hours
    return CostPlan(
        hardware.count * device.flops[memory.precision], device.mfu, _mfu_source(recipe, hardware),
        low, high, per_second, spent, evaluations, measuring, seconds, kwh, kilograms,
        hours, price, notes,
    )  # fmt: skip


def _mfu_source(recipe: Recipe, hardware: Hardware) -> str:
    device = hardware.device
    said = f"rate: {device.source}; MFU: {device.mfu_source}"
    if device.mfu_by_size and device.kind in UNCOMPILED and not is_compiled(recipe):
        left, source = UNCOMPILED[device.kind]
        said += f"; {left:g} of it without training.torch_compile ({source})"
    return said


def _forward_flops(model: PlannedModel, block_size: int, *, is_still_counted: bool) -> float:
    """Return the operations of a forward pass per token, 2 N + 4 L C T; what is frozen computes
    like the rest, and only blocks that no gradient passes need not be computed again."""
    layers, count = model.shape.layers, model.parameters
    if not is_still_counted:
        layers, count = layers - model.still_layers, count - model.still
    return 2 * count + 4 * layers * model.shape.width * block_size


def _far_from_known(
    recipe: Recipe, model: PlannedModel, hardware: Hardware, tokens_per_second: float
) -> list[str]:
    """Say where an assumed MFU is too high for so small a model."""
    if not hardware.device.mfu_by_size:
        return []
    smallest = hardware.device.mfu_by_size[0][0]
    update = recipe.tokens_per_update / tokens_per_second
    if model.parameters * FAR_SMALLER >= smallest and update >= SHORT_UPDATE:
        return []
    return [
        f"the MFU is of models from {short(smallest)} parameters on: one of "
        f"{short(model.parameters)}, with updates of {update:.2g} s by it, may take many times as "
        "long; --hardware FOLDER plans by what a short run there has measured"
    ]


def _efficiencies(
    recipe: Recipe, model: PlannedModel, hardware: Hardware, memory: MemoryPlan
) -> tuple[float, float]:
    """Return the share of the time in which devices compute, nothing overlapped and all."""
    if hardware.count == 1 or hardware.is_measured:  # what a run measured has waited already
        return 1.0, 1.0
    device = hardware.device
    inside = next((LINKS[name] for name in LINKS if device.name.startswith(name)), PCIE_4)
    cluster = Cluster(
        between=BETWEEN * DEVICES_PER_MACHINE, inside=inside,
        devices_per_node=DEVICES_PER_MACHINE, device_flops=device.flops[memory.precision],
        mfu=device.mfu,
    )  # fmt: skip
    sent = traffic(
        model.shape, topology=memory.topology, devices=hardware.count,
        accumulation=memory.accumulation,
        reduce_bytes=memory_bound.HALF if recipe.reduce_dtype == "bf16" else memory_bound.FP32,
    )  # fmt: skip
    flops = planning.training_flops(model.shape, recipe.data.block_size)
    seconds = recipe.tokens_per_update * flops / hardware.rate(recipe.precision)
    common: dict[str, Any] = {"devices": hardware.count, "cluster": cluster}
    common["accumulation"] = memory.accumulation
    low, high = (efficiency(seconds, sent, is_overlapped=b, **common) for b in (False, True))
    return low, high


def _scored(
    recipe: Recipe,
    updates: int,
    epochs: float | None,
    validation_tokens: float | None,
    test_tokens: float | None,
) -> tuple[int, float]:
    """Return how many evaluations there are while training, and the tokens of them and the last.

    Held-out text whose size is not known counts as nothing where `evaluation.tokens` does not say.
    """
    training, each = recipe.training, recipe.evaluation.tokens
    validation = validation_tokens or 0
    each = validation if each is None else min(each, validation or each)
    when, every = training.get("eval_strategy", "no"), training.get("eval_steps")
    count = 0
    if when == "steps":
        every = every or training.get("logging_steps", 500)
        every = max(1, round(every * updates)) if every < 1 else every
        count = int(updates // every)
    elif when == "epoch":
        count = int(epochs or 0)
    return count, count * each + validation + (test_tokens or 0)
