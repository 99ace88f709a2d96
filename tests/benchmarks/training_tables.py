"""The tables of training_speed.py, in Markdown, and what stands above them."""

import argparse
import datetime
import platform
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

_NAMED = {"threads", "torch", "transformers", "commit"}


def about_this_run(options: argparse.Namespace) -> dict[str, Any]:
    """Return the machine, the versions and the day, also as one line."""
    import torch
    import transformers

    import pipeline

    def git(*words: str) -> str:
        # Of what is imported: that need not be the checkout in which this file lies.
        root = Path(pipeline.__file__).parent.parent
        try:
            done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
        except OSError:  # no git here
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    about = {
        "hardware": _hardware(options.device),
        "threads": options.threads or torch.get_num_threads(),
        "precision": options.precision,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": (git("rev-parse", "--short", "HEAD") or "unknown")
        + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else ""),
        "date": datetime.date.today().isoformat(),
        "windows": f"{options.windows} windows of {options.steps} steps",
    }
    line = ", ".join(str(v) if k not in _NAMED else f"{k} {v}" for k, v in about.items())
    return about | {"line": line}


def _hardware(device: str) -> str:
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return f"{names[0]}, {len(names)} cores"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def print_tables(result: dict[str, Any]) -> None:
    """Print what one shape has shown, ready to be pasted."""
    shape, rates = result["shape"], result["matrix_products_flop_per_second"]
    heads, block = shape["heads"], shape["block"]
    print(
        f"**{result['name']}**: {shape['layers']} layers x {shape['width']}, {heads} heads, "
        f"vocabulary {shape['vocabulary']:,}, batch {shape['batch']} x {block}; matrix products "
        + ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates.items())
    )
    unit = " (relative)" if result["precision"] == "fp32" else " nats"
    early, ever = (f"{result['loss_difference'][n]:.1e}" for n in ("early", "ever"))
    print(
        f"Losses of two arms at the same step differ by at most {early}{unit} in the first "
        f"{result['compared_steps']} steps, {ever} in all."
    )
    for group, arms in result["groups"].items():
        for arm in arms:
            if "attention" in arm and group == "main":
                print(f"Operators of attention in {arm['name']}: {', '.join(arm['attention'])}.")
    for name, why in result["died"].items():
        print(f"Not measured: {name} died ({why}).")
    for group, arms in result["groups"].items():
        print(f"\n{group}\n")
        _print_table(result, group, arms)


def _print_table(result: dict[str, Any], group: str, arms: list[dict[str, Any]]) -> None:
    """Print one group; a ratio is the median over the rounds, above 1 is faster."""
    names = [arm["name"] for arm in arms]
    above = dict(zip(names[1:], names, strict=False))
    references: dict[str, Callable[[str], str | None]] = {
        "main": {"stock Trainer": lambda _: "stock Trainer", "nanoGPT": lambda _: "nanoGPT"},
        "ladder": {"line above": above.get, "stock model": lambda _: "stock model"},
        "levers alone": {"bare loop": lambda _: "bare loop"},
    }[group]
    heads = ["arm", "ms/step", "tokens/s", *(f"x {name}" for name in references)]
    heads += ["MFU %", "peak MB", "first window s", "waiting for data %"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    by_name = {arm["name"]: arm for arm in arms}
    tokens = result["shape"]["batch"] * result["shape"]["block"]
    ceiling = result["matrix_products_flop_per_second"][result["precision"]]
    for arm in arms:
        seconds = statistics.median(arm["seconds"])
        fastest, slowest = min(arm["seconds"]), max(arm["seconds"])
        rate = tokens / seconds
        cells = [
            arm["name"],
            f"{1e3 * seconds:.1f} ({1e3 * fastest:.1f}–{1e3 * slowest:.1f})",
            f"{rate:,.0f}",
            *(_ratio(by_name.get(find(arm["name"])), arm) for find in references.values()),
            f"{100 * rate * result['flop_per_token'] / ceiling:.1f}",
            f"{arm['peak_memory'] / 1e6:,.0f}",
            f"{arm['first_window_seconds']:.1f}",
            f"{100 * statistics.median(arm['waiting']):.2f}" if any(arm["waiting"]) else "–",
        ]
        print(f"| {' | '.join(cells)} |")


def _ratio(reference: dict[str, Any] | None, arm: dict[str, Any]) -> str:
    if reference is None:
        return "–"
    pairs = zip(reference["seconds"], arm["seconds"], strict=True)
    return f"{statistics.median(theirs / own for theirs, own in pairs):.2f}"
