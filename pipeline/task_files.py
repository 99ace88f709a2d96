"""The names of `lm-eval`'s tasks and the files of one's own, known before it is asked to load any.

Its own index takes 12 seconds to make, and passes over a broken file without a word.
"""

import dataclasses
import difflib
import functools
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.recipe import InputError

OUTPUT_TYPES = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")

# The keys that give a name, with the lines of a list below them.
ENTRY = re.compile(rb"^[\"']?(task|group|tag)[\"']?[ \t]*:[ \t]*(.*(?:\n[ \t]*-[ \t]+.*)*)", re.M)
NO_CONFIG = (".py", ".pyc", ".md", ".json", ".jsonl", ".csv")


@functools.cache
def known_names() -> dict[str, Path | None]:
    """Return every name that lm-eval has, and of single tasks their files.

    A file is searched for three keys only, all of them in half a second. The names are those of
    lm-eval's `TaskManager().all_tasks` (14,683 in 0.4.13) and a few that it cannot load.
    """
    found: dict[str, Path | None] = {}
    top = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
    paths = [
        os.path.join(folder, file)
        for folder, _, files in os.walk(top)
        for file in files
        if not file.endswith(NO_CONFIG)
    ]
    for path in sorted(paths):
        with open(path, "rb") as file:
            entries = ENTRY.findall(file.read())
        for key, value in entries:
            names = _names(value)
            if key != b"task":
                for name in names:
                    found.setdefault(name, None)
            elif path.endswith(".yaml") and b"\n" not in value and names:
                found[names[0]] = found.get(names[0]) or Path(path)  # of two the first counts
    return found


def _names(value: bytes) -> list[str]:
    """Return the names in what stands after a key: one, `[a, b]`, or lines of a list."""
    lines = (line.partition(b" #")[0].strip().removeprefix(b"- ") for line in value.splitlines())
    parts = (part.strip(b" \t\"'") for line in lines for part in re.split(rb"[\[\],]", line))
    return [part.decode() for part in parts if part]


def is_file(name: str) -> bool:
    """Whether a name means a task file and not one of lm-eval's tasks."""
    return name.endswith((".yaml", ".yml"))


def check_file(name: str) -> None:
    """See that a task file says what a task needs.

    Raises:
        InputError: it is not there, no YAML, or lacks something.
    """
    path = Path(name)
    if not path.is_file():
        raise InputError(f"{name}: no such task file; looked in {Path.cwd()}")
    config = read_config(path)
    check_safe(name, config)
    if "group" in config or isinstance(config.get("task"), list):
        raise InputError(f"{name}: is a group of tasks; give the files of its tasks instead")
    if not isinstance(config.get("task"), str):
        raise InputError(f"{name}: task: is missing; it is what the task is called")
    if config["task"] in known_names():
        raise InputError(
            f"{name}: task: {config['task']!r} is the name of one of lm-eval's own tasks; call "
            "yours otherwise"
        )
    if "class" in config:
        return  # a task in Python has rules of its own
    for key in config:
        if key not in (known := _known_keys()):
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            remedy = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            raise InputError(f"{name}: {key}: lm-eval knows no such key of a task; {remedy}")
    if (kind := config.get("output_type", OUTPUT_TYPES[-1])) not in OUTPUT_TYPES:
        raise InputError(
            f"{name}: output_type: must be one of {', '.join(OUTPUT_TYPES)}; got {kind!r}"
        )
    if not (config.get("dataset_path") or "custom_dataset" in config):
        raise InputError(
            f"{name}: dataset_path: is missing; json reads the files that "
            "dataset_kwargs.data_files names, anything else is a data set of the Hub"
        )
    if not (config.get("test_split") or config.get("validation_split")):
        raise InputError(
            f"{name}: test_split: is missing; it names the split of the data to measure on"
        )
    wanted = ["doc_to_text", "doc_to_target"]
    if kind == "multiple_choice":
        wanted.append("doc_to_choice")
    for key in wanted:
        if config.get(key) is None and "use_prompt" not in config:
            raise InputError(
                f"{name}: {key}: is missing; it is a column of the data, or a template of columns "
                "as in '{{question}}?'"
            )


def _known_keys() -> list[str]:
    from lm_eval.config.task import TaskConfig

    return [field.name for field in dataclasses.fields(TaskConfig)]


def check_safe(name: str, config: dict[str, Any]) -> None:
    """See that a task runs nothing that a model wrote.

    Raises:
        InputError: it does.
    """
    if config.get("unsafe_code"):
        raise InputError(
            f"task {name}: runs the code that the model writes (unsafe_code), which is not done "
            "here; leave it out"
        )


class _AnyTag(yaml.SafeLoader):
    """Reads what has a tag, `!function utils.f` for instance, as text."""


_AnyTag.add_multi_constructor("!", lambda loader, tag, node: str(node.value))


def read_config(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return what a task file says, with what it includes, no function resolved.

    Raises:
        InputError: it cannot be read, is no YAML mapping, or includes itself.
    """
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_AnyTag)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a task file: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: a task file is a YAML mapping of task, dataset_path, ...")
    if path.resolve() in seen:
        raise InputError(f"{path}: includes itself")
    included: dict[str, Any] = {}
    names = config.pop("include", None) or []
    for name in [names] if isinstance(names, str) else names:
        included |= read_config(path.parent / name, (*seen, path.resolve()))
    return included | config
