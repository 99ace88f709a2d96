"""One run's folder: whose it is, what state it is in, and that nobody else's is overwritten."""

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import artifact
from pipeline.checkpoint import checkpoints, newest_whole
from pipeline.command_line import PretrainOptions
from pipeline.recipe import InputError, Recipe, read_recipe

logger = logging.getLogger(__name__)

STATUS = "run_status.json"
CONFIG = "config.yaml"
METRICS = "metrics.json"

# What a finished run writes beside its checkpoints; a stranger's file of that name stays his.
RESULTS = (
    STATUS, CONFIG, METRICS, "config.json", "generation_config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "README.md", "loss.png", "samples.txt",
)  # fmt: skip


# Fields of `training:` that say where a run lies and how it is shown, and change nothing in it.
HARMLESS = ("output_dir", "report_to", "run_name", "project", "disable_tqdm", "log_level")


class Run(NamedTuple):
    """A folder that is ours for as long as the process lives."""

    finished: bool
    begin: Callable[[Recipe], None]
    """Call it when training starts: saves the recipe, and lets go of a run being overwritten."""


@contextlib.contextmanager
def opened(recipe: Recipe, options: PretrainOptions, *, is_main_process: bool) -> Iterator[Run]:
    """Yield the recipe's run folder, claimed; keep its status file true until the block ends.

    Until `begin` is called, an earlier run that `--overwrite` replaces is only set aside, and
    comes back if the block fails. Only the main process writes.

    Raises:
        InputError: the folder cannot be written to, is in use, or holds another run or foreign
            files; or `--resume` names nothing to resume.
    """
    folder = recipe.output_dir
    with artifact.held(folder, is_main_process=is_main_process):
        # While the main process sets a run aside, the others must not look at it.
        state = _claim(recipe, options) if is_main_process or not options.overwrite else "new"
        if state == "finished":
            yield Run(True, lambda _: None)
            return
        aside = folder / "_overwritten"
        if is_main_process and options.overwrite:
            _move(_ours(folder), aside)
        begun = False

        def write(new_state: str, **more: Any) -> None:
            if is_main_process:
                _write_json(folder / STATUS, {"state": new_state, "time": time.time(), **more})

        def begin(resolved: Recipe) -> None:
            nonlocal begun
            begun = True
            if is_main_process:
                resolved.save(folder / CONFIG)
                shutil.rmtree(aside, ignore_errors=True)
            write("running", pid=os.getpid())

        try:
            yield Run(False, begin)
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            failure = "interrupted" if interrupted else "failed"
            if interrupted and begun and is_main_process:
                last = checkpoints(folder)[-1:]
                goes_on = f"from {last[0]}" if last else "anew"
                logger.info("\nstopped; the same command goes on %s", goes_on)
            if begun or state == "new" and not aside.exists():
                write(failure, why=f"{type(error).__name__}: {error}".strip())
            elif is_main_process and aside.exists():
                _move(_ours(folder), folder / "_failed")
                shutil.rmtree(folder / "_failed", ignore_errors=True)
                _move(list(aside.iterdir()), folder)
                aside.rmdir()
            raise
        write("finished")


def read_status(folder: Path) -> dict[str, Any] | None:
    """Return the run's status, or None where no run of ours has been."""
    try:
        return json.loads((folder / STATUS).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _claim(recipe: Recipe, options: PretrainOptions) -> str:
    """Return "new", "unfinished" or "finished"; look only."""
    folder, resume = recipe.output_dir, options.resume
    if resume not in ("auto", "must", "never") and (wrong := artifact.damage(Path(resume))):
        raise InputError(f"--resume {resume}: {wrong}; name a whole checkpoint, or use auto")
    status = read_status(folder)
    if status is None:
        foreign = [name for name in RESULTS if (folder / name).exists()]
        if foreign:
            raise InputError(
                f"{folder}: holds {foreign[0]} that no run of ours wrote; choose another "
                "--training.output_dir"
            )
    if resume == "must" and (options.overwrite or newest_whole(folder) is None):
        raise InputError(f"--resume must: no whole checkpoint in {folder}")
    # A run that failed before its first checkpoint holds nothing to lose.
    if options.overwrite or status is None:
        return "new"
    if status["state"] != "finished" and not checkpoints(folder):
        return "new"
    if resume == "never":
        raise InputError(
            f"{folder}: holds a run ({status['state']}), and --resume never starts a fresh one; "
            "add --overwrite to remove it, or choose another --training.output_dir"
        )
    if not (folder / CONFIG).exists():
        raise InputError(
            f"{folder}: its {CONFIG} is gone, so that nobody can tell which run this is; add "
            "--overwrite to remove it, or choose another --training.output_dir"
        )
    changes = artifact.differences(comparable(read_recipe(folder / CONFIG)), comparable(recipe))
    if changes:
        raise InputError(
            f"{folder}: holds another run ({'; '.join(changes)}); choose another "
            "--training.output_dir, or add --overwrite to remove it"
        )
    is_finished = status["state"] == "finished" and (folder / METRICS).exists()
    return "finished" if is_finished else "unfinished"


def comparable(recipe: Recipe) -> dict[str, Any]:
    """Return what makes two runs the same run: every value, defaults too, but not the place."""
    values = recipe.model_dump(mode="json")
    # A folder may be moved or reached by another path and still hold the same run.
    values["training"] = {k: v for k, v in values["training"].items() if k not in HARMLESS}
    return values


def _ours(folder: Path) -> list[Path]:
    """Return what a run of ours wrote: results, whole artifacts, TensorBoard's logs."""
    parts = [folder / "tokenizer", folder / "blocks", *checkpoints(folder)]
    found = [part for part in parts if artifact.read_manifest(part) is not None]
    found += [folder / name for name in (*RESULTS, "runs", "_ring", "_digests-blocks.json")]
    return [path for path in found if path.exists()]


def _move(paths: list[Path], target: Path) -> None:
    target.mkdir(exist_ok=True)
    for path in paths:
        if (target / path.name).is_dir():  # left there by a process that was killed
            shutil.rmtree(target / path.name)
        os.replace(path, target / path.name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    staging = path.with_name(f"_{path.name}")
    staging.write_text(json.dumps(content, indent=1))
    os.replace(staging, path)
