"""What a person reads after the sweeps: a table, a picture, and the numbers of both as a file."""

import os
import statistics
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from transformers import TrainingArguments

from pipeline import artifact
from pipeline.curves import COLOURS
from pipeline.plan_options import FindOptions
from pipeline.rate_suggestion import RULE, SMOOTHED_OVER, smoothed, suggested
from pipeline.rate_sweep import Sweep
from pipeline.recipe import InputError, Recipe
from pipeline.wording import NOTHING

NUMBERS, PICTURE = "learning_rate.json", "learning_rate.png"

# What a sweep cannot know, with the figures of tests/benchmarks/README.md.
LIMITS = (
    "a sweep sees the first updates of a run, without warm-up or decay: it finds the order of "
    "magnitude; try half and twice of it in short runs"
)
# The other words of a pretrained model: for this transformers has no finder ("usually indicates one
# in the 1e-3 when the actual best value is in the 1e-5 range", issue 16013).
LIMITS_PRETRAINED = (
    "of a pretrained model a sweep does not see what is forgotten: the best rate is often far "
    "below the one at which the training loss falls most; take this one for the upper end"
)
ABOVE = 1.1  # times its first value: then it rose, and did not only scatter
WIDTH = 79  # columns of a sentence


def check_target(path: str | None) -> None:
    """Check before the work that a picture can be written to `path`.

    Raises:
        InputError: its folder is not there or cannot be written to.
    """
    if path is None:
        return
    target = Path(path)
    if not os.access(target.parent, os.W_OK) or target.is_dir():
        raise InputError(f"--picture {path}: cannot be written; give a file in a folder that can")


def findings(
    sweeps: list[Sweep], recipe: Recipe, arguments: TrainingArguments, options: FindOptions
) -> dict[str, Any]:
    """Return what the sweeps found: of each and together, beside what the recipe says.

    Keys of the whole: learning_rate (the median of the suggestions; None where there are fewer
    than half), spread_factor (the highest of them over the lowest), range (medians of the rate
    that makes half of the fall and of that of the lowest loss), recipe_learning_rate, is_inside
    (whether that lies in the range), why_not, rule, and what was swept.
    """
    each = []
    for sweep in sweeps:
        said = suggested(sweep.points) if sweep.points else None
        each.append(
            {
                "seed": sweep.seed,
                "suggestion": said and said.rate,
                "half_of_the_fall": said and said.half,
                "lowest_loss": said and said.lowest,
                "why_not": said.why_not if said else "no fall",
                "ended": sweep.ended,
                "learning_rates": [point.rate for point in sweep.points],
                "losses": [point.loss for point in sweep.points],
                "smoothed_losses": smoothed(sweep.points) if sweep.points else [],
            }
        )
    good = [one for one in each if one["suggestion"] is not None]
    has_answer = 2 * len(good) >= len(each)
    rates = [one["suggestion"] for one in good]
    between = [
        statistics.median(one[key] for one in good) for key in ("half_of_the_fall", "lowest_loss")
    ] if good else None  # fmt: skip
    stated = arguments.learning_rate
    return {
        "learning_rate": statistics.median(rates) if has_answer else None,
        "spread_factor": max(rates) / min(rates) if has_answer else None,
        "range": between if has_answer else None,
        "recipe_learning_rate": stated,
        "is_inside": between[0] <= stated <= between[1] if has_answer else None,
        "why_not": None if has_answer else statistics.mode(
            one["why_not"] for one in each if one["why_not"]
        ),
        "rule": RULE,
        "smoothed_over_decades": SMOOTHED_OVER,
        "optimizer": "muon" if recipe.optimizer.name == "muon" else str(arguments.optim.value),
        "is_pretrained": recipe.model.pretrained is not None,
        "tokens_per_update": recipe.tokens_per_update,
        **options.model_dump(include={"start", "end", "updates"}),
        "sweeps": each,
        "versions": artifact.versions(),
        "git_commit": artifact.git_commit(),
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """Return what a person should know of the findings."""
    lines = [f"{'seed':>6}{'half of fall':>15}{'suggestion':>13}{'lowest loss':>14}   ended"]
    for one in found["sweeps"]:
        lines.append(
            f"{one['seed']:>6}{_rate(one['half_of_the_fall']):>15}{_rate(one['suggestion']):>13}"
            f"{_rate(one['lowest_loss']):>14}   {_ended(one)}"
        )
    lines.append("")
    stated = found["recipe_learning_rate"]
    if found["learning_rate"] is None:
        lines.append(f"no suggestion: {_remedy(found)}")
        lines.append(f"the recipe says  {_rate(stated)}")
        return "\n".join(lines)
    rate, count = found["learning_rate"], sum(s["suggestion"] is not None for s in found["sweeps"])
    seeds = f"median of {count} seeds, apart by a factor of {_factor(found['spread_factor'])}"
    ratio = stated / rate
    where = "inside" if found["is_inside"] else "outside"
    low, high = found["range"]
    times = f"{_factor(ratio)} times" if ratio >= 1 else f"1/{_factor(1 / ratio)} of"
    lines += [
        f"learning rate    {_rate(rate)}   {seeds if count > 1 else 'one seed'}",
        f"the recipe says  {_rate(stated)}   {times} that, {where} of",
        f"the range        {_rate(low)} to {_rate(high)} (half of the fall to lowest loss)",
    ]
    limits = LIMITS_PRETRAINED if found["is_pretrained"] else LIMITS
    lines += [textwrap.fill(f"({text})", WIDTH) for text in (f"rule: {RULE}", limits)]
    return "\n".join(lines)


def write(found: dict[str, Any], folder: Path, picture: str | None) -> tuple[Path, Path]:
    """Write numbers and picture, in the place of those of an earlier sweep; return the files.

    Raises:
        InputError: the disk is full.
    """
    numbers = folder / NUMBERS
    drawn = folder / PICTURE if picture is None else Path(picture)
    with artifact.full_disk_said(folder):
        artifact.write_whole(numbers, artifact.as_json(found) + "\n")
        draw(found, drawn)
    return numbers, drawn


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw every sweep: losses faint, the smoothed curve, and what is read off it."""
    page = Figure(figsize=(8, 4.8), layout="constrained")
    axes = page.add_subplot()
    heights = []
    for number, one in enumerate(found["sweeps"]):
        colour = COLOURS[number % len(COLOURS)]
        rates, curve = one["learning_rates"], one["smoothed_losses"]
        axes.plot(rates, one["losses"], ".", color=colour, alpha=0.3, markersize=4)
        axes.plot(rates, curve, color=colour, linewidth=1.6, label=f"seed {one['seed']}")
        if one["ended"] != "whole" and rates:
            axes.plot(rates[-1], curve[-1], "x", color=colour, markersize=9, markeredgewidth=2,
                      clip_on=False)  # fmt: skip
        heights += curve
    if found["range"]:
        axes.axvspan(*found["range"], color="#808080", alpha=0.12, linewidth=0,
                     label="half of the fall to the lowest loss")  # fmt: skip
    if (rate := found["learning_rate"]) is not None:
        axes.axvline(rate, color="black", linewidth=1.4, label=f"suggestion {_rate(rate)}")
    stated = found["recipe_learning_rate"]
    axes.axvline(stated, color="#c0392b", linewidth=1.4, linestyle="--",
                 label=f"the recipe's {_rate(stated)}")  # fmt: skip
    if any(one["ended"] != "whole" for one in found["sweeps"]):
        axes.plot([], [], "x", color="#808080", markersize=8, label="diverged, and ended")
    axes.set_xscale("log")
    axes.set_xlim(found["start"], found["end"])
    if heights:
        margin = 0.08 * (max(heights) - min(heights)) or 0.1
        axes.set_ylim(min(heights) - 2 * margin, max(heights) + margin)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss (nats per token)")
    axes.set_title(
        f"{found['updates']} updates of {found['tokens_per_update']:,} tokens, "
        f"{found['optimizer']}", fontsize=10, loc="left",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    page.savefig(path, dpi=110)


def _rate(rate: float | None) -> str:
    return NOTHING if rate is None else f"{rate:.1e}"


def _factor(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def _ended(one: dict[str, Any]) -> str:
    rates = one["learning_rates"]
    if not rates:
        return "not finite at the first update"
    said = {"diverged": f"diverged at {_rate(rates[-1])}", "whole": "at the highest rate",
            "not finite": f"not finite after {_rate(rates[-1])}"}[one["ended"]]  # fmt: skip
    return said + (f" ({one['why_not']})" if one["why_not"] else "")


def _remedy(found: dict[str, Any]) -> str:
    """Return why there is no suggestion, and the option that helps."""
    start, end, why = found["start"], found["end"], found["why_not"]
    wider = f"--end {100 * end:g}" if 100 * end <= 100 else "more --updates"
    lower = f"--start {start / 1000:g}"
    if why == "no rise":
        return f"the loss does not rise up to --end {end:g}; widen the range, {wider}"
    if why == "falls at once":
        return f"the loss falls from --start {start:g} on; begin lower, {lower}"
    curves = [one["smoothed_losses"] for one in found["sweeps"]]
    rise = sum(not curve or max(curve) > ABOVE * curve[0] for curve in curves)
    remedy = f"begin lower, {lower}" if 2 * rise >= len(curves) else f"widen the range, {wider}"
    return f"the loss never falls by more than its scatter; {remedy}"
