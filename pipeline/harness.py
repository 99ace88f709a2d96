"""`lm-eval` with manners: quiet, in one process, without the Hub's programs or a lasting seed."""

import contextlib
import functools
import logging
import os
import random
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from lm_eval.api import metrics, task
from tqdm.auto import tqdm

from pipeline.perplexity import perplexity
from pipeline.recipe import InputError, first_line

# Those of lm_eval.simple_evaluate: tasks that draw their examples draw the same ones.
SEED, NUMPY_SEED = 0, 1234

# For the error of a metric that has none in closed form (F1, say); lm-eval takes 100,000.
RESAMPLES = 200

LOGS = ("lm_eval", "datasets", "huggingface_hub")


@contextlib.contextmanager
def tamed(devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Keep lm-eval from logging, from bars where nobody sees them, from forking and from seeding.

    Args:
        devices: CUDA devices that are computed on; their random states are kept, too.
    """
    bar = functools.partial(tqdm, desc="texts of the task", delay=2, leave=False, disable=None)
    # A perplexity per word overflows where a language writes no spaces: ours is infinite then.
    own_math = types.SimpleNamespace(**{**vars(metrics.math), "exp": perplexity})
    logs = [logging.getLogger(name) for name in LOGS]
    levels, had_bars = [log.level for log in logs], not datasets.are_progress_bars_disabled()
    with (
        _swapped(task, tqdm=bar),
        _swapped(metrics, bootstrap_stderr=_standard_error, math=own_math),
        _own_randomness(devices),
    ):
        for log in logs:
            log.setLevel(logging.CRITICAL)
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            for log, level in zip(logs, levels, strict=True):
                log.setLevel(level)
            if had_bars:
                datasets.enable_progress_bars()


@contextlib.contextmanager
def only_own_metrics(name: str) -> Iterator[None]:
    """Refuse metrics of the Hub, which are programs: lm-eval would take a misspelt one from there.

    Raises:
        InputError: the task `name` asks for one; lm-eval itself passes over the refusal.
    """
    load, refused = evaluate.load, []

    def only_local(path: str, *given: Any, **options: Any) -> Any:
        if Path(path).exists():
            return load(path, *given, **options)
        refused.append(path)
        raise InputError(path)

    try:
        with _swapped(evaluate, load=only_local):
            yield
    finally:
        if refused:
            raise InputError(
                f"task {name}: its metric {refused[0]} is none of lm-eval's own; one of that name "
                "on the Hub would be a program, and none of the Hub's is run here"
            ) from None


@contextlib.contextmanager
def data_said(name: str, file: Path | None) -> Iterator[None]:
    """Take paths in a task file as relative to it, and say what data cannot be had.

    lm-eval's own meaning, relative to where the user stands, is tried after that.

    Args:
        name: the task that was asked for.
        file: its file; None where lm-eval brings the task.

    Raises:
        InputError: a data set is not here and cannot be fetched, is broken, or lacks something.
    """
    download = task.ConfigurableTask.download

    def said(this: Any, dataset_kwargs: dict | None = None, **options: Any) -> None:
        kwargs = dict(dataset_kwargs or {})
        if file is not None:
            found = {
                n: _beside(file.parent, kwargs[n])
                for n in ("data_files", "data_dir")
                if n in kwargs
            }
            kwargs |= found
            own = file.parent / (this.DATASET_PATH or "")
            if this.DATASET_PATH and "data_files" not in kwargs and own.is_dir():
                this.DATASET_PATH = str(own)
        try:
            download(this, kwargs or None, **options)
        except Exception as error:  # the network, the disk, a file's format
            member = this.config.task
            which = name if file is not None or member in (name, None) else f"{name} ({member})"
            if kwargs.get("data_files"):
                places = [str(Path.cwd())] if file is None else [str(file.parent), str(Path.cwd())]
                raise InputError(
                    f"task {which}: its data_files cannot be read: {described(error)}; looked in "
                    f"{' and '.join(dict.fromkeys(places))}"
                ) from None
            raise InputError(
                f"task {which}: its data set {this.DATASET_PATH} is not here and cannot be "
                f"fetched: {described(error)}; check the network and HF_HUB_OFFLINE, or give the "
                "path of a task file (.yaml) whose data lie beside it"
            ) from None
        if file is not None:
            _check_columns(name, this)

    with _swapped(task.ConfigurableTask, download=said):
        yield


def _check_columns(name: str, this: Any) -> None:
    """See that the data have what the task file names."""
    config, data = this.config, this.dataset
    if not isinstance(data, datasets.DatasetDict):  # what a task's own function returns
        return
    for key in ("test_split", "validation_split", "training_split"):
        if (split := getattr(config, key)) is not None and split not in data:
            raise InputError(
                f"task {name}: {key}: {split!r} is not in its data ({', '.join(data)})"
            )
    split, choice = config.test_split or config.validation_split, config.doc_to_choice
    if split is None or not isinstance(choice, str) or config.process_docs is not None:
        return
    if choice not in (columns := data[split].column_names) and "{" not in choice:
        raise InputError(
            f"task {name}: doc_to_choice: {choice!r} is neither a column of its data "
            f"({', '.join(columns)}) nor a template"
        )


def described(error: Exception) -> str:
    """Return an error of lm-eval or of a task's own rules, to be put into a sentence."""
    error = error.__cause__ or error
    said, name = first_line(error), type(error).__name__
    return said if said == name or said.endswith(")") else f"{said} ({name})"


def _beside(folder: Path, value: Any) -> Any:
    """Return the paths and patterns in `value` that are found in `folder` as such ones."""
    if isinstance(value, dict):
        return {key: _beside(folder, inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_beside(folder, inner) for inner in value]
    if isinstance(value, str) and not os.path.isabs(value) and any(folder.glob(value)):
        return str(folder / value)
    return value


def _standard_error(metric: Callable[[Sequence[Any]], float], values: list, iters: int) -> float:
    """Return the standard error of a metric; lm-eval's forks a pool of processes for it.

    That of a perplexity follows from that of the mean below it: exp'(x) = exp(x) (delta method).
    """
    if metric is metrics.perplexity:
        return metric(values) * metrics.mean_stderr(values)
    source = random.Random(SEED)
    drawn = (source.choices(values, k=len(values)) for _ in range(iters))
    return metrics.sample_stddev([metric(sample) for sample in drawn])


@contextlib.contextmanager
def _own_randomness(devices: Sequence[torch.device]) -> Iterator[None]:
    """Seed as lm-eval does, and leave the random states as they were."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            random.seed(SEED)
            np.random.seed(NUMPY_SEED)
            torch.default_generator.manual_seed(NUMPY_SEED)
            for device in devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(NUMPY_SEED)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def _swapped(owner: Any, **values: Any) -> Iterator[None]:
    """Put other values in the place of a module's or class's own for a while."""
    kept = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(owner, name, value)
