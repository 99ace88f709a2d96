"""The picture of a ladder's law: isoFLOP curves with the runs, and the frontier of compute."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from pipeline.curves import COLOURS
from pipeline.ladder import Run
from pipeline.law_fit import Fit
from pipeline.scaling_laws import FLOPS
from pipeline.wording import short

SIZE, DPI = (12.8, 5.6), 100  # 1,280 pixels wide
CURVES = 5  # budgets of operations
# Of viridis, which the colour-blind tell apart too, without the yellow that white swallows.
DARKEST, LIGHTEST = 0.0, 0.85
FORETOLD = COLOURS[1]


def draw(
    fit: Fit,
    path: Path,
    left_out: Sequence[Run] = (),
    planned: tuple[float, float] | None = None,
) -> None:
    """Draw a fit into a PNG or, by the name's ending, an SVG.

    Args:
        left_out: runs that were not fitted, drawn with what was predicted of them.
        planned: parameters and tokens of a run that is to be made.
    """
    predicted = [(run.parameters, run.tokens) for run in left_out]
    predicted += [planned] if planned else []
    flops = [run.flops for run in (*fit.runs, *left_out)]
    flops += [float(FLOPS) * planned[0] * planned[1]] if planned else []
    budgets = np.geomspace(min(flops), max(flops), CURVES)
    page = Figure(figsize=SIZE, layout="constrained")
    sizes, frontier = page.subplots(1, 2)
    _isoflops(sizes, fit, budgets, left_out, predicted)
    _frontier(frontier, fit, budgets, left_out, predicted)
    handles = {}
    for axes in (sizes, frontier):
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=9)
        axes.set_ylabel("held-out loss (nats per token)")
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    page.legend(handles.values(), handles.keys(), loc="outside lower center", frameon=False,
                ncols=len(handles), fontsize=9)  # fmt: skip
    page.savefig(path, dpi=DPI)


def _isoflops(
    axes: Axes,
    fit: Fit,
    budgets: np.ndarray,
    left_out: Sequence[Run],
    predicted: list[tuple[float, float]],
) -> None:
    every = [run.parameters for run in fit.runs] + [size for size, _ in predicted]
    bests = [fit.law.optimum(flops) for flops in budgets]
    low = min(*every, *(best.parameters for best in bests)) / 1.6
    high = max(*every, *(best.parameters for best in bests)) * 1.6
    sizes = np.geomspace(low, high, 200)
    tones = _tones(budgets)
    for flops, best, tone in zip(budgets, bests, tones, strict=True):
        losses = fit.law.loss(sizes, flops / (FLOPS * sizes))
        axes.plot(sizes, losses, color=tone, linewidth=1.4)
        axes.annotate(
            f"{flops:.1e}".replace("e+", "e"), (best.parameters, best.loss), xytext=(-4, -11),
            textcoords="offset points", fontsize=8, ha="right",
        )  # fmt: skip
    axes.plot([best.parameters for best in bests], [best.loss for best in bests],
              color="black", linestyle=":", marker="o", markersize=3, linewidth=1,
              label="least loss for the operations")  # fmt: skip
    _runs(axes, [(run.parameters, run) for run in fit.runs], budgets)
    _predictions(axes, fit, [(size, (size, tokens)) for size, tokens in predicted])
    _left_out(axes, [(run.parameters, run) for run in left_out])
    _limit(axes, fit, left_out, predicted, [best.loss for best in bests])
    _count_axis(axes, "parameters")
    axes.set_title("Loss of a size at the same training operations (FLOPs at each curve)",
                   fontsize=10, loc="left")  # fmt: skip


def _frontier(
    axes: Axes,
    fit: Fit,
    budgets: np.ndarray,
    left_out: Sequence[Run],
    predicted: list[tuple[float, float]],
) -> None:
    flops = np.geomspace(budgets[0] / 2, budgets[-1] * 2, 100)
    bests = [fit.law.optimum(one) for one in flops]
    found = [fit.predicted(best.parameters, best.tokens) for best in bests]
    low, high = [one.low for one in found], [one.high for one in found]
    axes.fill_between(flops, low, high, color=COLOURS[0], alpha=0.15, linewidth=0,
                      label="its 95 % interval")  # fmt: skip
    axes.plot(flops, [one.loss for one in found], color=COLOURS[0], linewidth=1.6,
              label="frontier")  # fmt: skip
    for one in budgets:
        best = fit.law.optimum(one)
        axes.plot([one], [best.loss], ".", color=COLOURS[0])
        axes.annotate(
            f"N {short(best.parameters)}\nD {short(best.tokens)}", (one, best.loss),
            xytext=(-4, -6), textcoords="offset points", ha="right", va="top", fontsize=8,
        )  # fmt: skip
    _runs(axes, [(run.flops, run) for run in fit.runs], budgets)
    _predictions(axes, fit, [(float(FLOPS) * n * d, (n, d)) for n, d in predicted])
    _left_out(axes, [(run.flops, run) for run in left_out])
    axes.set_xscale("log")
    axes.set_xlabel("training operations, 6 N D (FLOPs)")
    axes.set_title("Least loss for the operations, and the N and D that reach it",
                   fontsize=10, loc="left")  # fmt: skip


def _runs(axes: Axes, placed: list[tuple[float, Run]], budgets: np.ndarray) -> None:
    """Draw the fitted runs, each in the tone of its operations."""
    tones = _tones(np.array([run.flops for _, run in placed]), budgets)
    axes.scatter([x for x, _ in placed], [run.loss for _, run in placed], c=tones, s=30,
                 edgecolors="white", linewidths=0.6, zorder=3, label="run, fitted")  # fmt: skip


def _left_out(axes: Axes, placed: list[tuple[float, Run]]) -> None:
    if placed:
        axes.plot([x for x, _ in placed], [run.loss for _, run in placed], "D", color="black",
                  markerfacecolor="none", markersize=8, zorder=4,
                  label="run, left out")  # fmt: skip


def _predictions(axes: Axes, fit: Fit, placed: list[tuple[float, tuple[float, float]]]) -> None:
    if placed:
        found = [fit.predicted(*run) for _, run in placed]
        spread = [[one.loss - one.low for one in found], [one.high - one.loss for one in found]]
        axes.errorbar([x for x, _ in placed], [one.loss for one in found], yerr=spread, fmt="x",
                      color=FORETOLD, capsize=4, markersize=7, zorder=5,
                      label="predicted, with 95 %")  # fmt: skip


def _limit(
    axes: Axes,
    fit: Fit,
    left_out: Sequence[Run],
    predicted: list[tuple[float, float]],
    best: list[float],
) -> None:
    """Keep the losses of runs in sight: far from its best size a curve goes up without end."""
    found = [fit.predicted(*run) for run in predicted]
    losses = [run.loss for run in (*fit.runs, *left_out)] + best
    losses += [one.low for one in found] + [one.high for one in found]
    room = 0.08 * (max(losses) - min(losses))
    axes.set_ylim(min(losses) - 1.5 * room, max(losses) + room)


def _count_axis(axes: Axes, name: str) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: short(count)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(name)


def _tones(flops: np.ndarray, among: np.ndarray | None = None) -> np.ndarray:
    """Return a colour of each budget, the darker the smaller."""
    among = flops if among is None else among
    low, high = np.log(among.min()), np.log(among.max())
    place = (np.log(flops) - low) / (high - low)
    return colormaps["viridis"](DARKEST + (LIGHTEST - DARKEST) * np.clip(place, 0, 1))
