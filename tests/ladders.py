"""Ladders of runs that follow a known law, for what reads and fits them."""

import json
from pathlib import Path

import numpy as np

from pipeline.ladder import Run
from pipeline.scaling_laws import Law, Validity

SIZES = (239_360, 544_608, 1_071_872, 1_894_880, 3_087_360)
BUDGETS = (716_800, 1_433_600, 2_867_200)
TRUE = Law(1.2, 60.0, 300.0, 0.30, 0.36, "a test", Validity((1, 1e12), (1, 1e12), ""))


def ladder(*, noise: float, seed: int, law: Law = TRUE, budgets=BUDGETS) -> list[Run]:
    """Return runs of every size and budget, whose losses scatter by `noise` about the law."""
    source = np.random.default_rng(seed)
    return [
        Run(f"{size}_{tokens}", size, tokens, noisy(law.loss(size, tokens), noise, source))
        for size in SIZES
        for tokens in budgets
    ]


def noisy(loss: float, noise: float, source: np.random.Generator) -> float:
    """Return a loss off by a normal share."""
    return float(loss * np.exp(noise * source.standard_normal()))


def without_largest(runs: list[Run]) -> tuple[list[Run], list[Run]]:
    """Return all runs but the one of most operations, and that one, for the others to foretell."""
    largest = max(runs, key=lambda run: run.flops)
    return [run for run in runs if run != largest], [largest]


def write_metrics(folder: Path, run: Run, **others) -> Path:
    """Write what a fit reads of a run's metrics.json, and return its path."""
    values = {
        "eval_loss": run.loss, "parameters": run.parameters, "train_tokens": run.tokens,
        "tokenizer_fingerprint": "t", "data_fingerprint": "d", "eval_tokens": 1000,
        "eval_bytes": 3000,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.json"
    path.write_text(json.dumps({k: v for k, v in (values | others).items() if v is not ...}))
    return path
