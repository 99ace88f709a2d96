"""Pushing to the Hub while a run trains, so that no failure there ever costs it anything.

A thread of the main process has one revision after the other sent, in the order in which they
were saved, each by a process of its own (`publish.py`): one that hangs is ended, and tried again.
What is not on the Hub when the run ends is said, with the command that sends it.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import hub, interruption, publication
from pipeline.checkpoint import step_of
from pipeline.options import PublishOptions
from pipeline.processes import Processes
from pipeline.push_list import LAST, RESULT, STRATEGIES, PushList, Revision
from pipeline.recipe import InputError, Recipe, first_line
from pipeline.run_folder import METRICS
from pipeline.run_identity import IDENTITY, identity_file, run_identity

logger = logging.getLogger(__name__)

ATTEMPTS_OF_A_PROCESS = "3"  # starting one costs a second
LONGEST_PAUSE = 60.0
# A launcher's, by which the process that sends would take itself for another one that trains.
NOT_PASSED_ON = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


class _Failure(NamedTuple):
    sentence: str
    retry_after: float | None = None


class Pusher:
    """Sends what one run saves; without `training.push_to_hub` it does nothing."""

    def __init__(self, recipe: Recipe, processes: Processes) -> None:
        """Take them; nothing is read or asked yet."""
        training = recipe.training
        self._section, self._processes = recipe.hub, processes
        self._folder = recipe.output_dir
        self._branch = training.get("hub_revision") or "main"
        self._strategy = training.get("hub_strategy", STRATEGIES[1])
        self._is_on = bool(training.get("push_to_hub")) and processes.is_main
        self._list: PushList | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._child: subprocess.Popen[str] | None = None
        self._is_ending = self._is_stopped = False

    def checked(self, recipe: Recipe) -> Recipe:
        """See that the Hub can be written to, and return the recipe with the repository's name.

        A run that goes on is not stopped by a Hub that is out of reach.

        Raises:
            InputError: no token or one that may not write there, a repository that is another
                model's, or no answer.
        """
        training = recipe.training
        if not training.get("push_to_hub"):
            return recipe
        if recipe.model.lora_r is not None and Path(recipe.model.pretrained).exists():
            raise InputError(
                f"training.push_to_hub: an adapter on the model in {recipe.model.pretrained} is "
                "of no use to others; push that model first and take its name on the Hub, or "
                "train without pushing and publish both in one (convert_weights.py)"
            )

        repo_id = self._processes.told(lambda: self._asked(training), patiently=True)
        return recipe.with_values(training={**training, "hub_model_id": repo_id})

    def offer(self, checkpoint: Path) -> None:
        """Have a whole checkpoint sent, at some time; its files are held until then."""
        if self._thread is None or self._strategy == "end":
            return
        own, is_all = f"step-{step_of(checkpoint):09}", self._strategy == "all_checkpoints"
        branches = {self._branch: False}
        if self._strategy == "checkpoint":
            branches[LAST] = True
        if is_all or self._section.branches:
            branches[own] = is_all
        try:
            for branch, whole in branches.items():
                self._hold(checkpoint.name, branch, whole=whole)
        except Exception as error:  # a full disk, say; the run matters more
            logger.error("%s: is not pushed: %s; training goes on", checkpoint, first_line(error))

    def make_room(self) -> bool:
        """Let go of the oldest checkpoint that waits, because the disk is full; tell if one did."""
        lost = self._list.give_up_oldest() if self._list is not None else None
        if lost is not None:
            logger.error(
                "%s: the disk is full: %s waits no longer, and will not be on the Hub",
                self._folder, lost.name,
            )  # fmt: skip
        return lost is not None

    @property
    def said(self) -> str:
        """What is on the Hub and what is not, to be added to the run's summary."""
        return f"\n{self._list.said()}\n" if self._list is not None else ""

    def finish(self) -> None:
        """Send the result of a finished run, and all that still waits."""
        if not self._is_on:
            return
        if self._list is None:  # the run had finished before
            self._list = PushList(self._folder)
            if self._list.repo_id is None:
                return
        interruption.grant(float("inf"), lambda why: None)  # the run itself is safe
        metrics = json.loads((self._folder / METRICS).read_text(encoding="utf-8"))
        if not self._list.has_result(metrics["updates"]):
            self._hold(None, self._branch)
        if not self._list.waiting:
            return
        logger.info(
            "sending to the Hub: %s", ", ".join(revision.said for revision in self._list.waiting)
        )
        with self._changed:
            self._is_ending = True
            self._changed.notify()
        self._start()
        while self._thread.is_alive():
            self._thread.join(0.2)  # so that a signal is heeded in between

    def stop(self) -> None:
        """End at once; what waits goes on waiting, on disk."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify()
        child = self._child
        if child is not None:
            with contextlib.suppress(OSError):
                child.kill()
        if self._thread is not None:
            self._thread.join()

    def _asked(self, training: dict[str, Any]) -> str:
        """Ask the Hub, in the main process, and begin to send what waits."""
        self._list = found = PushList(self._folder)
        name = training.get("hub_model_id") or self._folder.resolve().name
        repo_id = found.repo_id
        try:
            if repo_id is None or "hub_model_id" in training and name != repo_id.split("/")[-1]:
                repo_id = name if "/" in name else f"{hub.user_name(name)}/{name}"
            access = hub.check_access(
                repo_id, identity=run_identity(self._folder), revision=self._branch,
                private=training.get("hub_private_repo") is not False,
                overwrite=self._section.overwrite,
            )  # fmt: skip
        except InputError as error:
            if found.repo_id is None or repo_id != found.repo_id:
                raise
            logger.warning("%s; the run goes on, and its checkpoints wait", error)
        else:
            whose = "private" if access.is_private else "public"
            logger.info("pushing to %s (%s), as %s", access.url, whose, access.user)
            found.name_place(repo_id, is_private=access.is_private)
        self._start()
        return repo_id

    def _hold(self, checkpoint: str | None, branch: str, *, whole: bool = False) -> None:
        """Put a checkpoint (None: the result) on the list, its files as they will be there."""
        options = PublishOptions(
            run=str(self._folder), repo_id=self._list.repo_id, private=self._list.is_private,
            revision=branch, checkpoint=checkpoint, whole=whole,
        )  # fmt: skip
        made = publication.prepared(options, is_fresh=True)
        revision = Revision(checkpoint or RESULT, branch, made.updates, made.title)
        self._list.hold(revision, made.files | {IDENTITY: identity_file(made.identity)})
        with self._changed:
            self._changed.notify()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="pushing", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        failures = attempts_at_the_end = 0
        told: Revision | None = None
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._is_stopped or self._is_ending or self._list.waiting
                )
                if self._is_stopped or not self._list.waiting:
                    return
                revision = self._list.waiting[0]
            started = time.monotonic()
            found = self._sent(revision)
            if self._is_stopped:
                return
            if isinstance(found, str):
                logger.info(
                    "sent to the Hub: %s, in %.0f s", revision.said, time.monotonic() - started
                )
                self._list.mark_sent(revision, found)
                failures = attempts_at_the_end = 0
                continue
            failures += 1
            attempts_at_the_end += self._is_ending
            if told is not revision or self._is_ending:
                told = revision
                logger.error("not sent to the Hub: %s: %s", revision.said, found.sentence)
            if attempts_at_the_end >= self._section.attempts:
                return
            pause = min(found.retry_after or 2.0 ** (failures - 1), LONGEST_PAUSE)
            with self._changed:
                self._changed.wait_for(lambda: self._is_stopped, pause)

    def _sent(self, revision: Revision) -> str | _Failure:
        """Send one revision; return its commit, or what went wrong."""
        command = [
            sys.executable, "-m", "pipeline.publish", "--run", str(self._list.place_of(revision)),
            "--repo_id", self._list.repo_id, "--revision", revision.branch,
            "--title", revision.title, "--attempts", ATTEMPTS_OF_A_PROCESS, "--prepared",
            *["--force"] * self._section.overwrite,
        ]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if k not in NOT_PASSED_ON}
        limit = self._section.timeout_seconds
        try:
            with subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, env=environment, start_new_session=True,
            ) as child:  # fmt: skip
                self._child = child
                try:
                    with contextlib.suppress(OSError, AttributeError):  # training comes first
                        os.setpriority(os.PRIO_PROCESS, child.pid, 19)
                    out, errors = child.communicate(timeout=limit)
                except subprocess.TimeoutExpired:
                    return _Failure(f"it took longer than hub.timeout_seconds ({limit:g})")
                finally:
                    self._child = None
                    child.kill()
        except OSError as error:
            return _Failure(f"no process could be started: {error.strerror}")
        return _outcome(child.returncode, out, errors, revision.branch)


@contextlib.contextmanager
def opened(recipe: Recipe, processes: Processes) -> Iterator[Pusher]:
    """Yield what sends a run's checkpoints; after the block, in which it has finished, the result.

    If the block raises, nothing is waited for.
    """
    pusher = Pusher(recipe, processes)
    try:
        yield pusher
        pusher.finish()
    except BaseException:
        pusher.stop()
        if pusher.said:
            logger.info("%s", pusher.said.rstrip())
        raise
    pusher.stop()


def _outcome(code: int, out: str, errors: str, branch: str) -> str | _Failure:
    lines = out.splitlines()
    if code == 0:
        for line in reversed(lines):
            if line.startswith(f"{branch}: "):
                return line.removeprefix(f"{branch}: ")
    asked = [line.partition(": ")[2] for line in lines if line.startswith("retry_after: ")]
    said = (errors.strip().splitlines() or [f"the process that sends it ended with code {code}"])[
        -1
    ]
    return _Failure(said.removeprefix("error: "), float(asked[-1]) if asked else None)
