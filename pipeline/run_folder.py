"""One run's folder: whose it is, what state it is in, and that nobody else's is overwritten."""

import contextlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import artifact, failures, interruption, locks
from pipeline.checkpoint import check_named, checkpoints, chosen
from pipeline.hub_checkpoint import PLACE as FETCHED
from pipeline.hub_checkpoint import PREFIX, fetched
from pipeline.options import PretrainOptions
from pipeline.processes import Processes
from pipeline.push_list import LIST, PLACE
from pipeline.recipe import InputError, InputErrorTold, Recipe, RunFailed, read_recipe
from pipeline.resumption import (
    changes,
    check_allowed,
    described,
    is_longer,
    keys,
    refused,
    sentence,
)
from pipeline.run_files import (
    ASIDE,
    CARD,
    CONFIG,
    HISTORY,
    METRICS,
    PAGE,
    PICTURE,
    PREFLIGHT,
    SAMPLES,
    STATUS,
    read_status,
)
from pipeline.run_identity import IDENTITY

logger = logging.getLogger(__name__)


# A process that was asked to stop writes that down before its connections break, or soon after.
SECONDS_FOR_A_WORD = 2.0

# What a finished run writes beside its checkpoints; a stranger's file of that name stays his.
RESULTS = (
    STATUS, CONFIG, METRICS, HISTORY, PREFLIGHT, PAGE, PICTURE, "config.json",
    "generation_config.json", "model.safetensors", "adapter_config.json",
    "adapter_model.safetensors", "tokenizer.json",
    "tokenizer_config.json", "chat_template.jinja", CARD, SAMPLES, IDENTITY, LIST,
    "loss.png",  # the picture of earlier versions
)  # fmt: skip


class Run(NamedTuple):
    """A folder that is ours for as long as the process lives."""

    finished: bool
    begin: Callable[[Recipe], None]
    """Call it when training starts: saves the recipe, and lets go of a run being overwritten."""
    find: Callable[[], Path | None]
    """In the main process: the verified checkpoint that the run goes on from."""
    last_words: Callable[[str], None]
    """Call it before the process ends itself because it hangs, with why."""


@contextlib.contextmanager
def opened(
    recipe: Recipe,
    options: PretrainOptions,
    processes: Processes,
    afterwards: Callable[[], None] = lambda: None,
) -> Iterator[Run]:
    """Yield the recipe's run folder, claimed; keep its status file true until the block ends.

    When the run has finished, and the folder is still held, `afterwards` is called.

    Until `begin` is called, an earlier run that `--overwrite` replaces is only set aside, and
    comes back if the block fails. Only the main process writes.

    Raises:
        InputError: the folder cannot be written to, is in use, or holds another run or foreign
            files; or `--resume` names nothing to resume.
        Preempted: the run was asked to stop.
    """
    if options.dry_run:
        with (
            interruption.told("nothing was trained"),
            _looked_at(recipe, options, processes) as run,
        ):
            yield run
        return
    folder, is_main = recipe.output_dir, processes.is_main
    aside = folder / ASIDE
    with contextlib.ExitStack() as stack:

        def claim() -> str:
            stack.enter_context(locks.held(folder))
            artifact.clear_leftovers(folder)
            if aside.exists():  # a process that was to overwrite a run was killed
                if (folder / STATUS).exists():  # after it had begun
                    shutil.rmtree(aside, ignore_errors=True)
                else:
                    _put_back(aside, folder)
            return _claim(recipe, options)

        state = processes.told(claim)
        if state == "finished":
            yield Run(True, lambda _: None, lambda: None, lambda _: None)
            afterwards()
            return
        if is_main and options.overwrite:
            _move(_ours(folder), aside)
        begun = False

        def write(new_state: str, **more: Any) -> None:
            content = {"state": new_state, "time": time.time(), **more}
            try:
                text = json.dumps(content, indent=1)
                artifact.write_whole(folder / STATUS, text, synced=True)
            except OSError as error:  # a full disk: the run matters more
                logger.error("%s: cannot be written: %s", folder / STATUS, error.strerror)

        def begin(resolved: Recipe) -> None:
            nonlocal begun
            begun = True
            if is_main:
                write("running", pid=os.getpid(), host=socket.gethostname())
                with artifact.full_disk_said(folder):
                    artifact.write_whole(folder / CONFIG, resolved.as_yaml(), synced=True)
                shutil.rmtree(aside, ignore_errors=True)

        def preempted(why: str) -> None:
            last = checkpoints(folder)[-1:]
            write("preempted", why=why, checkpoint=last[0].name if last else None)

        if is_main and not options.overwrite:  # else the run that is set aside may still come back
            # Before all else: a folder with other files of a run and no status holds a stranger's.
            write("running", pid=os.getpid(), host=socket.gethostname())
        interruption.grant(recipe.faults.grace_seconds, preempted)
        # Verified while libraries are imported, rows opened and the model made.
        resume = "never" if options.overwrite else options.resume
        finder = stack.enter_context(ThreadPoolExecutor(1))
        is_fetched = resume.startswith(PREFIX)
        looks = is_main and not is_fetched
        found = finder.submit(chosen, folder, resume) if looks else None
        try:
            if is_fetched:  # before anybody gives the folder a name on the Hub
                path = processes.told(lambda: fetched(resume, folder), patiently=True)
            yield Run(
                False, begin, lambda: path if is_fetched else found.result(),
                lambda why: write("failed", why=why),
            )  # fmt: skip
        except BaseException as error:
            with interruption.deferred():
                why = _stopped_by(error, processes, folder)
                if begun or not aside.exists():
                    if why is not None and (is_main or interruption.reason() is not None):
                        preempted(why)  # the others tell the main process so that it can
                    elif why is None:
                        told = _what_ended(error, processes, folder)
                        if told is not None:
                            write("failed", why=told)
                if why is not None and begun and is_main:
                    last = checkpoints(folder)[-1:]
                    goes_on = f"from {last[0]}" if last else "anew"
                    logger.info("\nstopped (%s); the same command goes on %s", why, goes_on)
                if not begun and is_main and aside.exists():
                    _move(_ours(folder), folder / "_failed")
                    shutil.rmtree(folder / "_failed", ignore_errors=True)
                    _put_back(aside, folder)
            if why is not None and not isinstance(error, interruption.Preempted):
                raise interruption.Preempted(why) from error
            raise
        if is_main:
            with interruption.deferred():
                write("finished")
            shutil.rmtree(folder / FETCHED, ignore_errors=True)
        afterwards()


@contextlib.contextmanager
def _looked_at(recipe: Recipe, options: PretrainOptions, processes: Processes) -> Iterator[Run]:
    """Yield a run folder that is held, so that text can be prepared in it, and is no run's yet."""
    with contextlib.ExitStack() as stack:

        def claim() -> str:
            stack.enter_context(locks.held(recipe.output_dir))
            return _claim(recipe, options)

        state, had_ring = processes.told(claim), recipe.ring_dir.exists()
        try:
            yield Run(
                state == "finished", lambda _: None,
                lambda: chosen(recipe.output_dir, options.resume), lambda _: None,
            )  # fmt: skip
        finally:
            if processes.is_main and not had_ring:  # a stream's place
                shutil.rmtree(recipe.ring_dir, ignore_errors=True)


def _stopped_by(error: BaseException, processes: Processes, folder: Path) -> str | None:
    """Return what asked the run to stop; None if the error came by itself."""
    if isinstance(error, interruption.Preempted):
        return str(error)
    if isinstance(error, KeyboardInterrupt):  # where no handlers could be installed
        return "SIGINT"
    if interruption.reason() is not None or processes.count == 1:
        return interruption.reason()
    if not isinstance(error, RuntimeError):
        return None
    # The connection to another process broke. If it was asked to stop, it says so; a signal that
    # comes to us from now on is its launcher's, who ends all when one has ended.
    end = time.monotonic() + SECONDS_FOR_A_WORD
    while time.monotonic() < end:
        status = read_status(folder)
        if status is not None and status["state"] == "preempted":
            return f"another process was asked to stop: {status.get('why')}"
        if status is not None and status["state"] == "failed":
            return None
        time.sleep(0.05)
    return None


def _what_ended(error: BaseException, processes: Processes, folder: Path) -> str | None:
    """Return what the status should say of a failure here; None if another process says it."""
    words = f"{type(error).__name__}: {error}".strip()
    is_alone = not failures.another_has_ended(error)
    if processes.is_main and is_alone:
        return words
    # One that fails writes that down before its connections break.
    if (read_status(folder) or {}).get("state") in ("failed", "finished"):
        return None
    if processes.is_main:
        return f"another process has ended without a word; the main one: {words.split('. ')[0]}"
    is_told = isinstance(error, InputErrorTold | RunFailed)
    return f"process {processes.rank}: {words}" if is_alone and not is_told else None


def _claim(recipe: Recipe, options: PretrainOptions) -> str:
    """Return "new", "unfinished" or "finished"; look only."""
    folder, resume = recipe.output_dir, options.resume
    if resume not in ("auto", "must", "never") and not resume.startswith(PREFIX):
        check_named(Path(resume), contents=False)
    status = read_status(folder)
    if status is None:
        foreign = [name for name in RESULTS if (folder / name).exists()]
        if foreign:
            raise InputError(
                f"{folder}: holds {foreign[0]} that no run of ours wrote; choose another "
                "--training.output_dir"
            )
    if options.overwrite and resume not in ("auto", "never"):
        raise InputError(
            f"--overwrite removes the run in {folder}, and --resume {resume} goes on from one: "
            "take only one of them"
        )
    has_whole = any(artifact.damage(c, contents=False) is None for c in checkpoints(folder))
    if status is None and has_whole:  # nobody else has folders like these
        status = {"state": "unknown"}
    if resume == "must" and not has_whole and (status or {}).get("state") != "finished":
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
    try:
        old, new = described(read_recipe(folder / CONFIG)), described(recipe)
    except InputError as error:
        raise InputError(
            f"{folder}: its {CONFIG} was changed, or written by another version ({error}); add "
            "--overwrite to remove the run, or choose another --training.output_dir"
        ) from None
    found = changes(old, new)
    check_allowed(found, options.allow_change, keys(new))
    is_finished = status["state"] == "finished" and (folder / METRICS).exists()
    can_go_on = not is_finished or is_longer(old, new)
    if left := refused(found, options.allow_change):
        raise InputError(
            f"{folder}: holds another run: {sentence(left, can_go_on=can_go_on)}; "
            f"{'else ' * can_go_on}choose another --training.output_dir, or add --overwrite to "
            "remove it"
        )
    if not is_finished:
        return "unfinished"
    differing = [change.text for change in found if change.kind != "harmless"]
    if not differing:
        return "finished"
    if not can_go_on or not checkpoints(folder):
        why = "it has made all its updates; give it more training.max_steps"
        if can_go_on:
            why = "it kept no checkpoint to go on from"
        raise InputError(
            f"{folder}: holds a finished run, to which this would not be applied: "
            f"{'; '.join(differing)}; {why}, choose another --training.output_dir, or add "
            "--overwrite to remove it"
        )
    return "unfinished"


def _ours(folder: Path) -> list[Path]:
    """Return what a run of ours wrote: its status, results, whole artifacts, TensorBoard's logs."""
    parts = [folder / "tokenizer", folder / "blocks", *checkpoints(folder)]
    found = [
        folder / name
        for name in (*RESULTS, "runs", "_ring", PLACE, FETCHED, "_digests-blocks.json")
    ]
    found += [part for part in parts if artifact.read_manifest(part) is not None]
    return [path for path in found if path.exists()]


def _put_back(aside: Path, folder: Path) -> None:
    """Undo `_move(_ours(folder), aside)`; the status, which says that all is there, comes last."""
    _move(sorted(aside.iterdir(), key=lambda path: path.name == STATUS), folder)
    aside.rmdir()


def _move(paths: list[Path], target: Path) -> None:
    target.mkdir(exist_ok=True)
    for path in paths:
        if (target / path.name).is_dir():  # left there by a process that was killed
            shutil.rmtree(target / path.name)
        os.replace(path, target / path.name)
