"""One run's folder: whose it is, what state it is in, and that nobody else's is overwritten."""

import contextlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import artifact
from pipeline.checkpoint import checkpoints
from pipeline.command_line import PretrainOptions
from pipeline.recipe import InputError, Recipe, read_recipe

STATUS = "run_status.json"
CONFIG = "config.yaml"
METRICS = "metrics.json"

# What a finished run writes beside its checkpoints; a stranger's file of that name stays his.
RESULTS = (
    STATUS, CONFIG, METRICS, "config.json", "generation_config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "README.md", "loss.png", "samples.txt",
)  # fmt: skip


def claim(recipe: Recipe, options: PretrainOptions, *, is_main_process: bool) -> str:
    """Return the state of the recipe's run folder: "new", "unfinished" or "finished".

    Every process looks; only the main one removes an earlier run, and only if told to.

    Raises:
        InputError: the folder cannot be written to, or holds another run or foreign files.
    """
    folder = recipe.output_dir
    _probe(folder)
    status = read_status(folder)
    if status is not None:
        _check_not_running(folder, status)
    if options.overwrite:
        if is_main_process:
            _clear(folder)
        return "new"
    if status is None:
        foreign = [name for name in RESULTS if (folder / name).exists()]
        if foreign:
            raise InputError(
                f"{folder}: holds {foreign[0]} that no run of ours wrote; choose another "
                "--training.output_dir"
            )
        return "new"
    if status["state"] != "finished" and not checkpoints(folder):
        return "new"  # nothing is there to lose
    if options.resume == "never":
        raise InputError(
            f"{folder}: holds a run ({status['state']}), and --resume never starts a fresh one; "
            "add --overwrite to remove it, or choose another --training.output_dir"
        )
    changes = artifact.differences(_comparable(saved_recipe(folder)), _comparable(recipe))
    if changes:
        raise InputError(
            f"{folder}: holds another run ({'; '.join(changes)}); choose another "
            "--training.output_dir, or add --overwrite to remove it"
        )
    return "finished" if status["state"] == "finished" else "unfinished"


def _clear(folder: Path) -> None:
    """Remove what a run of ours wrote: results, whole artifacts, reporters' logs."""
    for name in RESULTS:
        (folder / name).unlink(missing_ok=True)
    for part in [folder / "tokenizer", folder / "blocks", *checkpoints(folder)]:
        if artifact.read_manifest(part) is not None:
            shutil.rmtree(part)


@contextlib.contextmanager
def running(recipe: Recipe, *, is_main_process: bool) -> Iterator[None]:
    """Keep the status file true while the block runs: running, then finished or failed (why)."""
    folder = recipe.output_dir

    def write(state: str, **more: Any) -> None:
        if is_main_process:
            status = {"state": state, "time": time.time(), "host": platform.node()}
            _write_json(folder / STATUS, status | more)

    if is_main_process:
        recipe.save(folder / CONFIG)
    write("running", pid=os.getpid())
    try:
        yield
    except BaseException as error:
        write("failed", why=f"{type(error).__name__}: {error}".strip())
        raise
    write("finished")


def read_status(folder: Path) -> dict[str, Any] | None:
    """Return the run's status, or None where no run of ours has been."""
    try:
        return json.loads((folder / STATUS).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def saved_recipe(folder: Path) -> Recipe:
    """Return the recipe of the run in `folder`."""
    return read_recipe(folder / CONFIG)


def _check_not_running(folder: Path, status: dict[str, Any]) -> None:
    pid = status.get("pid")
    if status["state"] != "running" or status["host"] != platform.node() or pid == os.getpid():
        return
    try:
        os.kill(pid, 0)
    except ProcessLookupError:  # it died without a word, by kill -9 say
        return
    except PermissionError:
        pass
    raise InputError(
        f"{folder}: process {pid} is training in it now; wait for it, end it, or choose another "
        "--training.output_dir"
    )


def _comparable(recipe: Recipe) -> dict[str, Any]:
    values = recipe.as_dict()
    # A folder may be moved or reached by another path and still hold the same run.
    values["training"] = {k: v for k, v in values["training"].items() if k != "output_dir"}
    return values


def _probe(folder: Path) -> None:
    probe = folder / f"_probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror}); choose another --training.output_dir"
        ) from None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    staging = path.with_name(f"_{path.name}")
    staging.write_text(json.dumps(content, indent=1))
    os.replace(staging, path)
