"""Pushing to the Hub while a run trains, so that no failure there ever costs it anything.

A thread of the main process has one revision after the other sent, in the order in which they were
saved. What is not on the Hub when the run ends is said, with the command that sends it.
"""

import json
import logging
import threading
import time
from pathlib import Path

from pipeline import artifact, hub, interruption, publication
from pipeline.checkpoint import checkpoints, step_of
from pipeline.options import PublishOptions
from pipeline.processes import Processes
from pipeline.push_list import LAST, RESULT, STRATEGIES, PushList, Revision
from pipeline.push_process import Failure, PushProcess
from pipeline.recipe import InputError, Recipe, first_line
from pipeline.run_files import METRICS
from pipeline.run_identity import IDENTITY, identity_file, run_identity

logger = logging.getLogger(__name__)

ATTEMPTS_OF_A_PROCESS = 3  # while training; at the end every one counts
LONGEST_PAUSE = 60.0


class Pusher:
    """Sends what one run saves, until its block ends; without `training.push_to_hub` nothing."""

    def __init__(self, recipe: Recipe, processes: Processes) -> None:
        """Take them; nothing is read or asked yet."""
        self._training, self._section = recipe.training, recipe.hub
        self._processes, self._folder = processes, recipe.output_dir
        self._branch = recipe.training.get("hub_revision") or "main"
        self._strategy = recipe.training.get("hub_strategy", STRATEGIES[1])
        self._is_on = bool(recipe.training.get("push_to_hub")) and processes.is_main
        self._list: PushList | None = None
        self._process = PushProcess()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_ending = self._is_stopped = False

    def __enter__(self) -> "Pusher":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End at once; what waits goes on waiting, on disk."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify()
        self._process.stop()
        if self._thread is not None:
            self._thread.join()
        if kind is not None and self.said:
            logger.info("%s", self.said.rstrip())

    def checked(self, recipe: Recipe) -> Recipe:
        """See that the Hub can be written to, and return the recipe with the repository's name.

        A run that goes on is not stopped by a Hub that is out of reach.

        Raises:
            InputError: no token or one that may not write there, a repository that is another
                model's, or no answer.
        """
        if not recipe.training.get("push_to_hub"):
            return recipe
        if recipe.model.lora_r is not None and Path(recipe.model.pretrained).exists():
            raise InputError(
                f"training.push_to_hub: an adapter on the model in {recipe.model.pretrained} is "
                "of no use to others; push that model first and take its name on the Hub, or "
                "train without pushing and publish both in one (convert_weights.py)"
            )
        repo_id = self._processes.told(self._asked, patiently=True)
        return recipe.with_values(training={**recipe.training, "hub_model_id": repo_id})

    def look(self) -> str:
        """Return what the Hub answers, in the main process and without sending; "" if not pushing.

        Raises:
            InputError: as `checked`; a repository is not made, and what it holds not looked at.
        """
        if not self._is_on:
            return ""
        found, name = PushList(self._folder), self._training.get("hub_model_id")
        name = name or found.repo_id or self._folder.resolve().name
        with hub.at_the_start():
            return hub.looked_at(name if "/" in name else f"{hub.user_name(name)}/{name}")

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
        lost = None
        if self._list is not None:
            try:
                lost = self._list.give_up_oldest()
            except OSError:  # the list itself finds no room; files are gone, and may be enough
                return False
        if lost is not None:
            logger.error(
                "%s: the disk is full: %s waits no longer, and will not be on the Hub",
                self._folder, lost.said,
            )  # fmt: skip
        return lost is not None

    @property
    def said(self) -> str:
        """What is on the Hub and what is not, to be added to the run's summary."""
        said = self._list.said() if self._list is not None else ""
        return f"\n{said}\n" if said else ""

    def finish(self) -> None:
        """Send the result of a finished run, and all that still waits.

        Raises:
            InputError: the run had finished before without being pushed, and cannot be.
        """
        if not self._is_on:
            return
        interruption.grant(float("inf"), lambda why: None)  # the run itself is safe
        if self._list is None:  # the run had finished before
            kept, wanted = PushList(self._folder), self._training.get("hub_model_id")
            is_known = kept.repo_id is not None and wanted in (
                None, kept.repo_id, kept.repo_id.partition("/")[2]
            )  # fmt: skip
            if is_known:
                self._list = kept
            else:
                self._asked()
        try:
            metrics = json.loads((self._folder / METRICS).read_text(encoding="utf-8"))
            if not self._list.has(RESULT, metrics["updates"]):
                self._hold(None, self._branch)
        except Exception as error:  # the run is whole
            logger.error("the result is not pushed: %s", first_line(error))
        if not self._list.waiting:
            return
        waiting = ", ".join(revision.said for revision in self._list.waiting)
        logger.info("sending to the Hub: %s", waiting)
        with self._changed:
            self._is_ending = True
            self._changed.notify()
        self._start()
        while self._thread.is_alive():
            self._thread.join(0.2)  # so that a signal is heeded in between

    def _asked(self) -> str:
        """Ask the Hub, in the main process, and begin to send what waits."""
        training = self._training
        self._list = found = PushList(self._folder)
        name = training.get("hub_model_id") or self._folder.resolve().name
        repo_id = found.repo_id
        try:
            with hub.at_the_start():
                if repo_id is None or "hub_model_id" in training and name != repo_id.split("/")[-1]:
                    repo_id = name if "/" in name else f"{hub.user_name(name)}/{name}"
                access = hub.access(
                    repo_id, identity=run_identity(self._folder), revision=self._branch,
                    private=training.get("hub_private_repo") is not False,
                    overwrite=self._section.overwrite,
                )  # fmt: skip
            found.name_place(repo_id, is_private=access.is_private)
        except OSError as error:
            raise InputError(f"{self._folder}: cannot be written: {error.strerror}") from None
        except InputError as error:
            if found.repo_id is None or repo_id != found.repo_id:
                raise
            logger.warning("%s; the run goes on, and its checkpoints wait", error)
        else:
            whose = "private" if access.is_private else "public"
            logger.info("pushing to %s (%s), as %s", access.url, whose, access.user)
            if not access.is_private and self._strategy in ("checkpoint", "all_checkpoints"):
                logger.warning(
                    "checkpoints that are pushed whole name the folders of the text in their "
                    "manifest, and the repository is public"
                )
        self._start()
        for checkpoint in checkpoints(self._folder):  # saved by a process that was killed, say
            is_there = found.has(checkpoint.name, step_of(checkpoint))
            if not is_there and artifact.damage(checkpoint, contents=False) is None:
                self.offer(checkpoint)
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
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, name="pushing", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        """Send what waits, oldest first; what is refused lets the others pass."""
        failures = failures_at_the_end = 0
        refused: set[Revision] = set()
        since: float | None = None  # of the first failure at the end
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._is_stopped or self._is_ending or self._list.waiting
                )
                waiting = self._list.waiting
                left = [revision for revision in waiting if revision not in refused]
                if self._is_stopped or not waiting or self._is_ending and not left:
                    return
                if not left:
                    refused.clear()
                revision = (left or waiting)[0]
                self._list.in_flight = revision
            found = self._tried(revision)
            if self._is_stopped:
                return
            if found is None:
                failures = failures_at_the_end = 0
                since = None
                continue
            self._list.in_flight = None
            failures += 1
            if self._is_ending:
                failures_at_the_end += 1
                since = since or time.monotonic()
            logger.log(
                logging.ERROR if failures == 1 or self._is_ending else logging.DEBUG,
                "not sent to the Hub: %s: %s", revision.said, found.sentence,
            )  # fmt: skip
            if found.is_refused:
                refused.add(revision)
            is_long = since is not None and (
                time.monotonic() - since > 2 * self._section.timeout_seconds
            )
            if failures_at_the_end >= self._section.attempts or is_long:
                return
            pause = found.retry_after or 2.0 ** min(failures - 1, 6)
            ended = self._is_ending
            with self._changed:  # the end of the run is awaited by a person
                wake = (lambda: self._is_stopped) if ended else self._is_near_its_end
                self._changed.wait_for(wake, min(pause, LONGEST_PAUSE))

    def _is_near_its_end(self) -> bool:
        return self._is_stopped or self._is_ending

    def _tried(self, revision: Revision) -> Failure | None:
        """Send a revision and take it down; return what went wrong, None if nothing did."""
        place, started = self._list.place_of(revision), time.monotonic()
        try:
            if not (place / IDENTITY).is_file():  # a person has removed it
                self._list.leave_out(revision)
                logger.error("%s: its files are gone, and it will not be on the Hub", revision.said)
                return None
            found = self._process.send(
                place, repo_id=self._list.repo_id, branch=revision.branch, title=revision.title,
                attempts=1 if self._is_ending else ATTEMPTS_OF_A_PROCESS,
                force=self._section.overwrite, seconds=self._section.timeout_seconds,
            )  # fmt: skip
            if isinstance(found, Failure):
                return found
            logger.info("sent to the Hub: %s, in %.0f s", revision.said, time.monotonic() - started)
            self._list.mark_sent(revision, found)
        except OSError as error:  # a full disk: the list cannot be written
            return Failure(f"{error.filename or self._folder}: {error.strerror}")
        return None
