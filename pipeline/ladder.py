"""The finished runs of a ladder of sizes and lengths, read and checked to be comparable."""

import json
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.recipe import InputError
from pipeline.run_files import METRICS, read_status
from pipeline.scaling_laws import FLOPS
from pipeline.wording import finite

NEEDED = ("eval_loss", "parameters", "train_tokens")
MOST = 1e18  # of each, and one over it the least: no run has such
# What has to be the same in all runs, in words; one that differs makes losses incomparable.
SHARED = {
    "tokenizer_fingerprint": "tokenizer",
    "eval_tokens": "held-out text",
    "eval_bytes": "held-out text",
    "data_fingerprint": "prepared text",
}


class Run(NamedTuple):
    """A finished run, as far as a scaling law goes."""

    name: str
    parameters: int
    tokens: int
    loss: float
    """Of the held-out text, nats per token."""

    @property
    def flops(self) -> float:
        """The operations of training as the laws count them, 6 N D."""
        return float(FLOPS) * self.parameters * self.tokens


def points(paths: list[str | Path]) -> list[Run]:
    """Return the runs of a ladder, the smallest budget first, checked to be comparable.

    Args:
        paths: each a run's metrics.json, or its folder.

    Raises:
        InputError: a run is not finished or not a run, a number is missing, a file is named
            twice, two runs have the same size and length, or the runs do not share tokenizer and
            text.
    """
    files = [_metrics_file(Path(path)) for path in paths]
    for path, count in Counter(file.resolve() for file in files).items():
        if count > 1:
            raise InputError(f"{path}: named {count} times; name each run of a ladder once")
    metrics = [_read(file) for file in files]
    names = _names(files)
    _check_shared(names, metrics)
    runs = [
        Run(name, have["parameters"], have["train_tokens"], have["eval_loss"])
        for name, have in zip(names, metrics, strict=True)
    ]
    seen: dict[tuple[int, int], str] = {}
    for run in runs:
        other = seen.setdefault((run.parameters, run.tokens), run.name)
        if other != run.name:
            raise InputError(
                f"{other} and {run.name}: both have {run.parameters:,} parameters and "
                f"{run.tokens:,} tokens; a ladder has each size and length once, leave one out"
            )
    return sorted(runs, key=lambda run: (run.flops, run.name))


def _metrics_file(path: Path) -> Path:
    if not path.is_dir():
        if path.exists():
            return path
        raise InputError(f"{path}: no such file; name {METRICS} of finished runs, or their folders")
    if (path / METRICS).exists():
        return path / METRICS
    status = read_status(path)
    if status is None:
        raise InputError(f"{path}: holds no run; name the training.output_dir of finished runs")
    raise InputError(
        f"{path}: its run is not finished ({status['state']}), so there is no {METRICS}; finish "
        "it with the command that began it, or leave it out"
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        have = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        have = None
    if not isinstance(have, dict):
        raise InputError(f"{file}: cannot be read as JSON; name the {METRICS} of a finished run")
    for key in (*NEEDED, *SHARED):
        if key not in have:
            raise InputError(f"{file}: has no {key}; name the {METRICS} of a finished run")
    for key in NEEDED:
        if not finite(have[key]) or not 1 / MOST < have[key] < MOST:
            raise InputError(
                f"{file}: {key} is {reprlib.repr(have[key])}, which no law can be fitted to; leave "
                "the run out"
            )
    return have


def _names(files: list[Path]) -> list[str]:
    """Return the names of the runs' folders, with as many folders above as tell them apart."""
    parts = [file.resolve().parent.parts for file in files]
    depth = 1
    while len({part[-depth:] for part in parts}) < len({*parts}):
        depth += 1
    stems = Counter(parts)  # several files of one folder
    return [
        "/".join(part[-depth:]) + (f"/{file.name}" if stems[part] > 1 else "")
        for part, file in zip(parts, files, strict=True)
    ]


def _check_shared(names: list[str], metrics: list[dict[str, Any]]) -> None:
    for key, what in SHARED.items():
        most = Counter(str(have[key]) for have in metrics).most_common(1)[:1]
        others = [
            name for name, have in zip(names, metrics, strict=True) if str(have[key]) != most[0][0]
        ]
        if others:
            raise InputError(
                f"{', '.join(others)}: another {what} ({key}) than the other runs', so that the "
                "losses cannot be compared; train all rungs on the same prepared text (data.path)"
            )
