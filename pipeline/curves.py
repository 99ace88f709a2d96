"""The curves of a run over the tokens it has seen, the same in the page and in the picture."""

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

# Of a curve: two for each column of a plot 500 pixels wide, more than anyone can see.
MOST_POINTS = 1000
FEW_POINTS = 30  # of which each is marked: a line through two evaluations hides that they are two

# Readable on white and on black; the first two are told apart by the colour-blind as well.
COLOURS = (
    "#2f7ed8", "#e8743b", "#19a979", "#945ecf", "#c9a100", "#ed4a7b", "#13a4b4", "#6c8893",
)  # fmt: skip
HEIGHT = 300  # pixels of a chart in the page
LONGEST_NAME = 36  # characters that fit beside a legend's line on a phone


class Series(NamedTuple):
    """One curve, thinned to what can be seen."""

    name: str
    tokens: list[int]
    values: list[float]
    updates: list[int]
    colour: str = COLOURS[0]
    is_dotted: bool = False


class Panel(NamedTuple):
    """What is drawn into one pair of axes."""

    title: str
    unit: str
    series: list[Series]

    @property
    def is_log(self) -> bool:
        """Whether the values span a decade, so that a linear axis would show only the largest."""
        values = list(itertools.chain.from_iterable(s.values for s in self.series))
        return self.title in _MAYBE_LOG and 0 < 10 * min(values) < max(values)


_PERPLEXITY, _NORM = "Perplexity of held-out texts", "Gradient norm"
_MAYBE_LOG = (_PERPLEXITY, _NORM)
_FROM_ZERO = ("Learning rate", "Speed")  # whose ups and downs mean what they are of the whole


def panels(history: list[dict[str, Any]]) -> list[Panel]:
    """Return the curves that a run's logs hold; what is not a finite number is left out."""
    texts = _named_texts(history)
    keys = dict.fromkeys(key for log in history for key in log)
    errors_and_counts = ("_stderr", "_samples")
    tasks = [k for k in keys if k.startswith("eval_task_") and not k.endswith(errors_and_counts)]
    evaluated = {"eval": "held-out", **{f"eval_{name}": name for name in texts}}
    # Title, unit, and of each curve: its key, its name, and a key that its logs also have.
    wanted = (
        ("Loss", "nats per token",
         [("loss", "training", "loss"), ("eval_loss", "held-out", "eval_loss")]),
        (_PERPLEXITY, "per token",
         [(f"{k}_perplexity", n, f"{k}_loss") for k, n in evaluated.items()]),
        ("Bits per byte", "", [
            ("bits_per_byte", "training", "loss"),
            *((f"{k}_bits_per_byte", n, f"{k}_loss") for k, n in evaluated.items()),
        ]),
        ("Tasks", "", [(key, key.removeprefix("eval_task_"), key) for key in tasks]),
        ("Learning rate", "", [("learning_rate", "learning rate", "loss")]),
        (_NORM, "before clipping", [("grad_norm", "gradient norm", "loss")]),
        ("Speed", "tokens per second", [("tokens_per_second", "tokens per second", "loss")]),
    )  # fmt: skip
    found = []
    colours = {"training": 0, "held-out": 1}  # the same in every panel
    for title, unit, curves in wanted:
        series = []
        for key, name, beside in curves:
            logs = (log for log in history if beside in log)
            if title == "Speed":  # the first update, which compiles, counts apart
                logs = (log for log in logs if "compile_seconds" not in log)
            if points := _thinned(_points(logs, key)):
                tokens, updates, values = map(list, zip(*points, strict=True))
                is_text = name == "training" or beside != "loss"
                place = colours.setdefault(name, len(colours)) if is_text else 0
                colour = COLOURS[place % len(COLOURS)]
                series.append(Series(name, tokens, values, updates, colour))
        if series:
            found.append(Panel(title, unit, series))
    return found


def overlaid(runs: dict[str, list[Panel]]) -> list[Panel]:
    """Return the panels of several runs as one set, each run in its colour, held-out text solid."""
    titles = dict.fromkeys((p.title, p.unit) for several in runs.values() for p in several)
    found = []
    for title, unit in titles:
        series = []
        for number, (run, several) in enumerate(runs.items()):
            colour = COLOURS[number % len(COLOURS)]
            curves = [s for panel in several if panel.title == title for s in panel.series]
            names = {s.name for s in curves}
            alone = names <= {title.lower(), unit}
            series += [
                s._replace(
                    name=run if alone else f"{run}: {s.name}", colour=colour,
                    is_dotted=s.name != "held-out" and "held-out" in names,
                )
                for s in curves
            ]  # fmt: skip
        found.append(Panel(title, unit, series))
    return found


def figure(panel: Panel) -> dict[str, Any]:
    """Return a panel as plotly draws it: its JSON schema, made without its slow import."""
    data = [
        {
            "type": "scatter",
            "name": s.name if len(s.name) <= LONGEST_NAME else _elided(s.name),
            "x": s.tokens,
            "y": [float(f"{value:.6g}") for value in s.values],
            "customdata": s.updates,
            "hovertemplate": "%{y:.5~g} (update %{customdata:,})",
            "mode": "lines+markers" if len(s.values) < FEW_POINTS else "lines",
            "line": {"color": s.colour, "width": 2, "dash": "dot" if s.is_dotted else "solid"},
        }
        for s in panel.series
    ]
    layout = {
        "height": HEIGHT + 20 * max(0, len(data) - 4),  # the legend's lines
        "margin": {"l": 10, "r": 10, "t": 10, "b": 10},
        "hovermode": "x unified",
        "hoverdistance": -1,  # of every curve the nearest point, however far
        "showlegend": len(data) > 1,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "xaxis": {"title": {"text": "tokens"}, "exponentformat": "B", "hoverformat": ",d",
                  "unifiedhovertitle": {"text": "%{x:,d} tokens"}, "spikethickness": 1,
                  "automargin": True},
        "yaxis": {"exponentformat": "B", "automargin": True},
    }  # fmt: skip
    if panel.title in _FROM_ZERO:
        layout["yaxis"]["rangemode"] = "tozero"
    if panel.is_log:
        ticks = _round_values(panel)
        layout["yaxis"] |= {
            "type": "log",
            "tickvals": ticks,
            "ticktext": [f"{t:,g}" for t in ticks],
        }
    return {"data": data, "layout": layout}


def draw(drawn: list[Panel], path: Path) -> None:
    """Draw panels into one PNG, two beside each other."""
    rows = max(1, math.ceil(len(drawn) / 2))
    page = Figure(figsize=(10, 2.9 * rows))
    page.subplots_adjust(
        left=0.08, right=0.98, top=1 - 0.3 / (2.9 * rows), bottom=0.5 / (2.9 * rows),
        hspace=0.5, wspace=0.2,
    )  # fmt: skip
    for number, panel in enumerate(drawn):
        axes = page.add_subplot(rows, 2, number + 1)
        for s in panel.series:
            marker = "." if len(s.values) < FEW_POINTS else None
            axes.plot(s.tokens, s.values, color=s.colour, marker=marker, linewidth=1.2,
                      label=s.name)  # fmt: skip
        title = f"{panel.title} ({panel.unit})" if panel.unit else panel.title
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("tokens", fontsize=8)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_yscale("log" if panel.is_log else "linear")
        if panel.title in _FROM_ZERO:
            axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if len(panel.series) > 1:
            axes.legend(fontsize=8, frameon=False)
    page.savefig(path, dpi=110)


def _elided(name: str) -> str:
    """Return a name without its middle: at its end stands of which text a curve is."""
    half = LONGEST_NAME // 2
    return f"{name[: half - 1]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"


def _round_values(panel: Panel) -> list[float]:
    """Return up to a dozen powers of ten, and 2 and 5 times them, to stand at a panel's axis."""
    values = list(itertools.chain.from_iterable(s.values for s in panel.series))
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    powers = range(low, high + 1, max(1, (high - low) // 6))  # a loss of 50 has perplexity 5e21
    digits = (1, 2, 5) if high - low <= 3 else (1,)
    return [float(f"{digit}e{power}") for power in powers for digit in digits]


def _named_texts(history: list[dict[str, Any]]) -> list[str]:
    """Return the names in the keys eval_<name>_loss: `eval_word_perplexity` alone is no text's."""
    keys = dict.fromkeys(key for log in history for key in log)
    return [
        key.removeprefix("eval_").removesuffix("_loss")
        for key in keys
        if key.startswith("eval_")
        and key.endswith("_loss")
        and key != "eval_loss"
        and not key.startswith("eval_task_")
    ]


def _points(logs: Iterable[dict[str, Any]], key: str) -> list[tuple[int, int, float]]:
    """Return (tokens seen, update, value) of each log that has a finite one."""
    return [
        (log["tokens_seen"], log["step"], log[key])
        for log in logs
        if isinstance(log.get(key), int | float)
        and math.isfinite(log[key])
        and "tokens_seen" in log
        and "step" in log
    ]


def _thinned(points: list[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    """Return at most MOST_POINTS of them: the ends, and lowest and highest of equal stretches."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) / (MOST_POINTS // 2 - 1))
    kept = [points[0]]
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted({min(stretch, key=_value), max(stretch, key=_value)})
    return list(dict.fromkeys([*kept, points[-1]]))


def _value(point: tuple[int, int, float]) -> float:
    return point[2]
