"""The picture of a plan: a device's memory by part, and what other sizes would cost."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from pipeline.curves import COLOURS
from pipeline.plan_options import PlanOptions
from pipeline.planning import parameters, training_flops
from pipeline.recipe import Recipe
from pipeline.run_plan import Plan
from pipeline.scaling_laws import TOKENS_PER_PARAMETER
from pipeline.size_ladder import shapes
from pipeline.wording import duration, short, storage

SIZE, DPI = (12.8, 6.4), 100  # 1,280 pixels wide
AROUND = 12.0  # times larger and smaller than this model
# Seconds, on the axis of time: days on by tens, beyond what anyone waits for.
TIMES = (0.001, 0.01, 0.1, 1, 10, 60, 600, 3600, 36_000, *(86_400 * 10**n for n in range(15)))
# Each part of the memory has its own colour in every picture.
PART_COLOURS = dict(
    zip(
        ("weights", "gradients", "optimizer", "activations", "buffers", "copies", "loss", "work",
         "holes", "checkpoint", "process"),
        (*COLOURS, "#8d5524", "#5b7f2b", "#444c5c"), strict=True,
    )
)  # fmt: skip
SMALL = 0.09  # of the bar: narrower parts have their name in the legend alone


def draw_plan(recipe: Recipe, options: PlanOptions, plan: Plan, path: str) -> None:
    """Draw a plan into a PNG or, by the name's ending, an SVG."""
    page = Figure(figsize=SIZE, layout="constrained")
    above, below = page.subplots(2, 1, height_ratios=(1, 2.4))
    _memory(above, plan)
    _cost(below, plan, options.price_per_hour)
    length = "" if plan.work.tokens is None else f", {short(plan.work.tokens)} tokens"
    page.suptitle(
        f"{Path(plan.recipe).name}: {short(plan.model.parameters)} parameters{length}, on "
        f"{plan.hardware.title}", fontsize=12,
    )  # fmt: skip
    page.savefig(path, dpi=DPI)


def _memory(axes: Axes, plan: Plan) -> None:
    memory, start = plan.memory, 0.0
    end = max(memory.device_bytes, memory.peak_bytes)
    if memory.peak_bytes < 0.08 * memory.device_bytes:  # a bar too short to be read
        end = memory.peak_bytes * 1.6
    sizes = {part: size for part, size in memory.bytes_by_part.items() if size}
    for part, size in sizes.items():
        label = f"{part} {storage(size)}"
        colour = PART_COLOURS[part]
        axes.barh(0, size / 1e9, left=start / 1e9, color=colour, label=label, edgecolor="white")
        if size > SMALL * end:
            axes.text((start + size / 2) / 1e9, 0, part, ha="center", va="center", fontsize=9,
                      color="white")  # fmt: skip
        start += size
    lines = (("device", memory.device_bytes, "-"), ("usable", memory.usable_bytes, "--"))
    for name, size, style in lines:
        if size <= end * 1.001:
            axes.axvline(size / 1e9, color="black", linestyle=style, linewidth=1.2,
                         label=f"{name} {storage(size)}")  # fmt: skip
    axes.set_xlim(0, end * 1.04 / 1e9)
    axes.set_yticks([])
    axes.set_xlabel("GB")
    of = f"{storage(memory.peak_bytes)} of {storage(memory.device_bytes)}"
    shared = "" if memory.topology == "none" else f", {memory.topology}"
    how = "" if memory.phase else ", an upper bound"
    how += "" if memory.is_fitting else ": DOES NOT FIT"
    axes.set_title(
        f"Memory of each device: {of}{how} ({memory.precision}{shared}, "
        f"{memory.rows_per_device} rows at once)", loc="left", fontsize=10,
    )  # fmt: skip
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.15), frameon=False, fontsize=8)


def _cost(axes: Axes, plan: Plan, price_per_hour: float | None) -> None:
    """Draw the hours of other sizes, at this plan's tokens and at the compute-optimal ones."""
    shape, cost, device = plan.model.shape, plan.cost, plan.hardware.device
    own = cost.tokens_per_second * training_flops(shape, plan.block_size)

    def share(count: int) -> float:  # an assumed one may go with the size
        return device.of_step(count, is_compiled=True).mfu

    def seconds(count: int, flops: int) -> float:
        return flops / (own * share(count) / share(parameters(shape)))

    others = [(parameters(one), training_flops(one, plan.block_size))
              for one in shapes(shape.vocabulary, shape.positions)]  # fmt: skip
    here = plan.model.parameters
    others = [(n, f) for n, f in others if here / AROUND <= n <= here * AROUND]
    others = sorted({*others, (parameters(shape), training_flops(shape, plan.block_size))})
    counts = [count for count, _ in others]
    lines = [(f"at {TOKENS_PER_PARAMETER} tokens per parameter", COLOURS[1],
              [TOKENS_PER_PARAMETER * n * seconds(n, f) / 3600 for n, f in others])]  # fmt: skip
    if plan.work.tokens is not None:
        hours = [plan.work.tokens * seconds(*one) / 3600 for one in others]
        lines.insert(0, (f"at {short(plan.work.tokens)} tokens", COLOURS[0], hours))
    for name, colour, hours in lines:
        axes.plot(counts, hours, color=colour, marker="o", markersize=4, label=name)
    if cost.training_seconds is not None:
        hours = cost.training_seconds / 3600
        axes.plot([here], [hours], "*", color="black", markersize=14, label="this recipe")
        axes.annotate(_time(cost.training_seconds), (here, hours), xytext=(10, -12),
                      textcoords="offset points", fontsize=9)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: short(count)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda hours, _: _time(hours * 3600)))
    axes.yaxis.set_major_locator(FixedLocator([seconds / 3600 for seconds in TIMES]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("parameters (sizes of GPT-2's kind, with this vocabulary)")
    axes.set_ylabel("training time")
    axes.grid(alpha=0.3)
    if price_per_hour:
        each = price_per_hour * plan.hardware.count
        money = axes.secondary_yaxis("right", functions=(lambda h: h * each, lambda m: m / each))
        money.set_ylabel(f"price, at {price_per_hour:g} per device-hour")
        money.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_title("What other sizes would take on the same devices", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=9)


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 1 else duration(seconds)
