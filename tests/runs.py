"""Runs that are watched: what they saw, what they logged, and what they left on the disk."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from test_trainer import _StopAt, make_trainer, streamed
from transformers import TrainerCallback

from pipeline import artifact, checkpoint
from pipeline.trainer import PretrainingTrainer

SPEED = (
    "_per_second",
    "_runtime",
    "mfu",
    "compile_seconds",
    "data_wait_fraction",
    "logging_fraction",
    "peak_memory_bytes",
)  # numbers that no two runs have in common


def watched(trainer: PretrainingTrainer) -> PretrainingTrainer:
    """Let `trainer.seen` have the ids of each update's batches (of a repeated update, the last)."""
    seen: dict[int, list[torch.Tensor]] = {}
    made = trainer.training_step

    def training_step(model, inputs, *rest):
        batches = seen.setdefault(trainer.state.global_step + 1, [])
        if len(batches) == trainer.args.gradient_accumulation_steps:
            batches.clear()
        batches.append(inputs["input_ids"].clone())
        return made(model, inputs, *rest)

    trainer.training_step, trainer.seen = training_step, seen
    return trainer


def made(recipe_path: Path, folder: Path, **overrides) -> PretrainingTrainer:
    """Return a watched trainer."""
    make = streamed if overrides.get("data__streaming") else make_trainer
    return watched(make(recipe_path, folder, **overrides))


def trained(
    trainer: PretrainingTrainer, resume: str = "never", *, stop: int | None = None, **options
) -> PretrainingTrainer:
    """Train to the end, or die after update `stop`."""
    if stop is not None:
        trainer.add_callback(_StopAt(stop))
    try:
        with trainer.flowing():
            trainer.train_from(resume, **options)
    except KeyboardInterrupt:
        trainer._writer.wait()
        assert trainer.state.global_step == stop
    else:
        assert stop is None
    return trainer


def cut_back(run: Path, folder: Path, step: int) -> Path:
    """Copy a run as it would be, had it been killed before the checkpoint after `step` was whole.

    Up to the update at which it dies a run is what it would have been otherwise.
    """
    shutil.copytree(run, folder)
    for found in checkpoint.checkpoints(folder):
        if checkpoint.step_of(found) > step:
            shutil.rmtree(found)
    return folder


def same(one: Any, other: Any) -> bool:
    """Whether two nests of dicts, lists and tensors are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def logs(trainer: PretrainingTrainer) -> list[dict[str, Any]]:
    """Return what a run has logged, without its speed."""
    return _without_speed(trainer.state.log_history)


def rates(trainer: PretrainingTrainer) -> dict[int, float]:
    """Return the learning rate of each logged update."""
    history = trainer.state.log_history
    return {e["step"]: e["learning_rate"] for e in history if "learning_rate" in e}


def assert_ended_the_same(one: PretrainingTrainer, other: PretrainingTrainer) -> None:
    """See that two runs logged, wrote and became the same, to the last bit."""
    assert logs(one) == logs(other)
    assert same(one.model.state_dict(), other.model.state_dict())
    assert same(one.optimizer.state_dict(), other.optimizer.state_dict())
    assert one.state.best_metric == other.state.best_metric
    folders = [Path(trainer.args.output_dir) for trainer in (one, other)]
    samples = [(f / "samples.txt").read_bytes() for f in folders if (f / "samples.txt").exists()]
    assert len(samples) in (0, 2) and len(set(samples)) < 2
    kept = [{c.name for c in checkpoint.checkpoints(f)} for f in folders]
    assert kept[0] == kept[1] and kept[0]
    for name in kept[0]:
        left, right = (f / name for f in folders)
        files = [artifact.read_manifest(f)["files"] for f in (left, right)]
        differing = {n for n in files[0] | files[1] if files[0].get(n) != files[1].get(n)}
        assert differing <= {"trainer_state.json"}, name
        assert _saved_state(left) == _saved_state(right)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return time and bytes of every file below a folder, but of the cache of digests.

    That is written again as soon as the corpus is old enough for its files' times to be trusted.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in files if not path.name.startswith("_digests")]
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


class Before(TrainerCallback):
    """Do something just before an update is made, each time that it comes."""

    def __init__(self, update: int, act) -> None:
        self._update, self._act = update, act

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step + 1 == self._update:
            self._act()


def _saved_state(folder: Path) -> dict[str, Any]:
    state = json.loads((folder / "trainer_state.json").read_text())
    best = state["best_model_checkpoint"]
    return state | {
        "log_history": _without_speed(state["log_history"]),
        "best_model_checkpoint": best and Path(best).name,
    }


def _without_speed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if not k.endswith(SPEED)} for entry in history]
