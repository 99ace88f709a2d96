"""Tasks that `lm-eval` runs on a model: HellaSwag, LAMBADA, ARC and the like, and one's own."""

import difflib
import functools
import importlib.metadata
import importlib.util
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.recipe import InputError
from pipeline.task_files import check_file, check_safe, is_file, known_names, read_config

logger = logging.getLogger(__name__)

OLDEST = (0, 4, 12)  # the first lm-eval whose TaskManager loads tasks one by one
REMEDY = "pip install -e '.[tasks]'"


def check_tasks(names: Sequence[str], *, positions: int | None = None) -> None:
    """See that every task can be run, and read its data, which is kept for `run_tasks`.

    Names and task files come first, in less than a second; lm-eval is imported after that.

    Args:
        names: tasks, groups and tags of lm-eval, or paths of task files (.yaml, .yml).
        positions: the model's, into which must fit what a task lets it write.

    Raises:
        InputError: lm-eval is not installed, a name is unknown or given twice, a task file is
            broken, a task would run a program of the model or of the Hub, or its data cannot be
            read.
    """
    if not names:
        return
    _check_installed(names)
    for number, name in enumerate(names):
        if name in names[:number]:
            raise InputError(f"task {name}: is given twice")
        if is_file(name):
            check_file(name)
        elif name not in (known := known_names()):
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
            version = importlib.metadata.version("lm_eval")
            raise InputError(
                f"task {name}: lm-eval {version} has none of this name"
                + (f"; did you mean {' or '.join(close)}?" if close else "")
                + "; a task of your own is given by its file, ending in .yaml"
            )
        elif known[name] is not None:
            check_safe(name, read_config(known[name]))
    owners: dict[str, str] = {}
    for name in names:
        for task_name, task in _loaded(name)["tasks"].items():
            if (other := owners.setdefault(task_name, name)) != name:
                raise InputError(f"task {task_name}: is in {other} and in {name}; leave out one")
            if positions is not None and task.OUTPUT_TYPE == "generate_until":
                _check_length(task_name, task, positions)


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    batch_size: int,
    limit: int | None = None,
    after_batch: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Return the numbers of each task: acc, acc_stderr, perplexity, ... and samples.

    A group has numbers of its own, where lm-eval defines them, before those of its tasks. The model
    is left in the mode that it was in, and every random state as it was.

    Args:
        names: see `check_tasks`.
        batch_size: texts in one forward pass.
        limit: documents of each task, its first ones (default: all).
        after_batch: called after each forward pass.

    Raises:
        InputError: see `check_tasks`; or a task's rules do not fit its data, or the memory does not
            suffice.
    """
    check_tasks(names)
    if not names:
        return {}
    from pipeline.harness import tamed

    was_training, found = model.training, {}
    with tamed([model.device] if model.device.type == "cuda" else []):
        try:
            for name in names:
                found |= _run(
                    name, model, tokenizer, batch_size=batch_size, limit=limit,
                    after_batch=after_batch,
                )  # fmt: skip
        finally:
            model.train(was_training)
    return found


def as_logs(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the numbers of tasks under the keys that logs have them by."""
    return {f"eval_task_{t}_{m}": value for t in found for m, value in found[t].items()}


def sentence(task: str, numbers: dict[str, float]) -> str:
    """Return a task's numbers in one line for the screen."""
    parts = []
    for metric, value in numbers.items():
        if metric != "samples" and not metric.endswith("_stderr"):
            error = numbers.get(f"{metric}_stderr")
            digits = 4 if abs(value) < 10 else 2
            parts.append(
                f"{metric} {value:,.{digits}f}"
                + ("" if error is None else f" ± {error:,.{digits}f}")
            )
    return f"{task}: {', '.join(parts)} ({numbers['samples']:,} documents)"


def _run(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    limit: int | None,
    after_batch: Callable[[], None],
) -> dict[str, dict[str, float]]:
    from lm_eval.evaluator import evaluate

    from pipeline.harness import NUMPY_SEED, RESAMPLES, described
    from pipeline.task_model import TaskModel

    loaded = _loaded(name)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(NUMPY_SEED)
    asked = TaskModel(model, tokenizer, name=name, batch_size=batch_size, after_batch=after_batch)
    try:
        results = evaluate(
            asked, loaded, limit=limit, bootstrap_iters=RESAMPLES, log_samples=False
        )["results"]
    except InputError:
        raise
    except (torch.OutOfMemoryError, MemoryError):
        raise InputError(
            f"task {name}: {batch_size} texts in one forward pass do not fit into memory; lower "
            "the batch size (of a run: training.per_device_eval_batch_size)"
        ) from None
    except Exception as error:  # whatever the rules of 14,000 tasks may do
        raise InputError(f"task {name}: cannot be run: {described(error)}") from None
    if asked.cut:
        _say_once(
            f"task {name}: {asked.cut:,} texts are longer than the model's {asked.max_length:,} "
            "positions, and their beginnings are left out"
        )
    order = [*loaded["groups"], *loaded["tasks"]]
    numbers = {task: _numbers(results[task]) for task in order if task in results}
    return {task: values for task, values in numbers.items() if values}


def _numbers(result: dict[str, Any]) -> dict[str, float]:
    """Return what lm-eval calls `metric,filter` as `metric`, or `metric_filter` with a filter."""
    numbers = {}
    for key, value in result.items():
        metric, comma, filter_name = key.partition(",")
        if comma and isinstance(value, int | float | np.number):  # an error not known is "N/A"
            base = metric.removesuffix("_stderr")
            name = base if filter_name == "none" else f"{base}_{filter_name}"
            numbers[name + metric.removeprefix(base)] = float(value)
    return numbers | {"samples": int(result["sample_len"])} if numbers else {}


def _check_installed(names: Sequence[str]) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            f"tasks ({', '.join(names)}): they are run by lm-eval, which is not installed: {REMEDY}"
        )
    version = importlib.metadata.version("lm_eval")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise InputError(f"tasks: lm-eval is {version}, and must be {oldest} or newer: {REMEDY}")


@functools.cache
def _loaded(name: str) -> dict[str, Any]:
    """Return lm-eval's tasks and groups of this name with their data; the same ones each time."""
    from lm_eval.tasks import TaskManager

    from pipeline.harness import data_said, described, only_own_metrics, tamed

    file = Path(name).resolve() if is_file(name) else None
    path = file or known_names()[name]
    logger.info("task %s: reading its data", name)
    with tamed(), only_own_metrics(name), data_said(name, file):
        try:
            if path is None:
                loaded = _all_tasks().load(name)
            else:
                loaded = TaskManager(include_defaults=False).load(str(path))
        except InputError:
            raise
        except ImportError as error:
            raise InputError(
                f"task {name}: a package that it needs is missing: {described(error)}"
            ) from None
        except Exception as error:  # templates that do not fit the data, rules that fail
            raise InputError(f"task {name}: cannot be read: {described(error)}") from None
    for task_name, task in loaded["tasks"].items():
        check_safe(task_name, {"unsafe_code": getattr(task, "UNSAFE_CODE", False)})
        if file is not None:
            _check_answers(name, task)
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
    return loaded


def _check_answers(name: str, task: Any) -> None:
    """See that the answers of one's own task are among its choices: lm-eval counts others wrong."""
    if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input:
        return
    for row, doc in enumerate(task.eval_docs):
        answer, choices = task.doc_to_target(doc), task.doc_to_choice(doc)
        given = answer if isinstance(answer, list) else [answer]
        if not all(a in choices or isinstance(a, int) and 0 <= a < len(choices) for a in given):
            raise InputError(
                f"{name}: doc_to_target of row {row} is {answer!r}, which is none of its "
                f"{len(choices)} choices ({', '.join(map(str, choices))}) nor the place of one"
            )


@functools.cache
def _all_tasks() -> Any:
    """Return lm-eval's index of all tasks, without which it loads no group and no tag."""
    from lm_eval.tasks import TaskManager

    logger.info("looking through all tasks of lm-eval, which takes some seconds")
    return TaskManager()


def _check_length(name: str, task: Any, positions: int) -> None:
    from pipeline.task_model import new_tokens, too_long

    if (length := new_tokens(task.config.generation_kwargs or {})) >= positions:
        raise InputError(too_long(name, length, positions))


@functools.cache
def _say_once(text: str) -> None:
    logger.warning("%s", text)
