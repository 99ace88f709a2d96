"""Which revisions of a run are on the Hub and which are still to be sent: a list, and their files.

What waits lies in `_hub` as hard links: a checkpoint that training removes meanwhile takes no other
place, and nothing is ever written into one. The list is on disk before anything is sent, so that
whoever comes after a killed process knows what is missing.
"""

import dataclasses
import json
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path

from pipeline import artifact

logger = logging.getLogger(__name__)

LIST, PLACE = "hub_status.json", "_hub"
RESULT = "result"
# Trainer's names: the result alone; each checkpoint's model; and the newest, or each, whole.
STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")
LAST = "last-checkpoint"  # the branch that always holds the newest checkpoint whole


def _new_serial() -> str:
    return uuid.uuid4().hex[:8]


@dataclasses.dataclass(frozen=True)
class Revision:
    """A commit that is to be on the Hub."""

    name: str
    """checkpoint-100, or result."""
    branch: str
    updates: int
    title: str
    commit: str | None = None
    """None as long as it is not there."""
    serial: str = dataclasses.field(default_factory=_new_serial)
    """Tells it from a later one of that name, after a rollback for instance."""

    @property
    def said(self) -> str:
        """What a person calls it."""
        return f"{'the result' if self.name == RESULT else self.name} ({self.branch})"


class PushList:
    """The list of one run; safe to be used by several threads of one process.

    Attributes:
        repo_id: where to, None as long as nothing was to be sent.
        is_private: whether only its owner may read it.
        in_flight: what is being sent: its files stay where they are.
    """

    def __init__(self, run_folder: Path) -> None:
        """Read it, empty where there is none."""
        self.repo_id: str | None = None
        self.is_private = True
        self.in_flight: Revision | None = None
        self._folder, self._lock = run_folder, threading.RLock()
        self._revisions: list[Revision] = []
        try:
            kept = json.loads((run_folder / LIST).read_text(encoding="utf-8"))
            self.repo_id, self.is_private = str(kept["repo_id"]), bool(kept["private"])
            self._revisions = [Revision(**values) for values in kept["revisions"]]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError):  # damaged, or another version's
            self._set_aside()

    @property
    def sent(self) -> list[Revision]:
        """What is on the Hub, oldest first."""
        return [revision for revision in list(self._revisions) if revision.commit is not None]

    @property
    def waiting(self) -> list[Revision]:
        """What is not, in the order in which it has to be sent."""
        return [revision for revision in list(self._revisions) if revision.commit is None]

    @property
    def result_branch(self) -> str | None:
        """Where the result goes, if the run has said so."""
        return next((r.branch for r in self._revisions if r.name == RESULT), None)

    def has(self, name: str, updates: int) -> bool:
        """Whether a checkpoint, or the result, after so many updates is on the list."""
        return any((r.name, r.updates) == (name, updates) for r in list(self._revisions))

    def place_of(self, revision: Revision) -> Path:
        """Return the folder of its files."""
        return self._folder / PLACE / f"{revision.name}@{revision.branch}.{revision.serial}"

    def name_place(self, repo_id: str, *, is_private: bool) -> None:
        """Say where to; what was sent elsewhere does not count."""
        with self._lock:
            if self.repo_id not in (None, repo_id):
                self._revisions = self.waiting
            self.repo_id, self.is_private = repo_id, is_private
            self._write()

    def hold(self, revision: Revision, files: Mapping[str, Path | bytes]) -> None:
        """Put a revision on the list, in the place of an earlier one of that name and branch.

        Of a branch that shows the newest checkpoint alone, an older one gives up its place.

        Raises:
            OSError: its files cannot be held.
        """
        place = self.place_of(revision)
        with self._lock:  # all of it: what is not on the list is nobody's, and is removed
            place.mkdir(parents=True)
            for name, content in files.items():
                if isinstance(content, bytes):
                    (place / name).write_bytes(content)
                else:
                    _link(content, place / name)
            stale = [
                r for r in self.waiting
                if r.branch == revision.branch and (r.name == revision.name or r.branch == LAST)
                and r != self.in_flight
            ]  # fmt: skip
            sent_before = [
                r for r in self.sent if (r.name, r.branch) == (revision.name, revision.branch)
            ]
            where = self._revisions.index(stale[0]) if stale else len(self._revisions)
            self._revisions.insert(where, revision)
            gone = [*stale, *sent_before]
            self._revisions = [r for r in self._revisions if r not in gone]
            self._write()
            self._let_go()

    def mark_sent(self, revision: Revision, commit: str) -> None:
        """Take down that a revision is on the Hub; its files are let go."""
        with self._lock:
            sent = dataclasses.replace(revision, commit=commit)
            if revision in self._revisions:
                self._revisions[self._revisions.index(revision)] = sent
            self.in_flight = None
            self._write()
            self._let_go()

    def add_sent(self, revision: Revision) -> None:
        """Take down a revision that was sent without having waited."""
        with self._lock:
            of = (revision.name, revision.branch)
            self._revisions = [r for r in self._revisions if (r.name, r.branch) != of]
            self._revisions.append(revision)
            self._write()
            self._let_go()

    def leave_out(self, revision: Revision) -> None:
        """Take a revision off the list: it cannot be sent any more."""
        with self._lock:
            self._revisions = [r for r in self._revisions if r != revision]
            self._let_go()
            self._write()

    def give_up_oldest(self) -> Revision | None:
        """Let go of the oldest checkpoint that waits, if there are several: the disk is full."""
        with self._lock:
            waiting = [r for r in self.waiting if r != self.in_flight and r.name != RESULT]
            if len({revision.name for revision in waiting}) < 2:
                return None
            oldest = waiting[0]
            self._revisions = [r for r in self._revisions if r not in waiting or r != oldest]
            self._let_go()  # first: the list may not find room before
            self._write()
        return oldest

    def said(self) -> str:
        """Say what is on the Hub and what is not, and how to send it; empty if there is neither."""
        sent, waiting = self.sent, self.waiting
        lines = []
        if sent:
            lines.append(f"on the Hub, {self.repo_id}: {', '.join(r.said for r in sent)}")
        if waiting:
            lines += [
                f"not on the Hub: {', '.join(revision.said for revision in waiting)}",
                f"Send them: python pipeline/publish.py --run {self._folder}",
            ]
        return "\n".join(lines)

    def _let_go(self) -> None:
        """Remove the files of what is not waiting any more."""
        places = {self.place_of(revision) for revision in self.waiting}
        if self.in_flight is not None:
            places.add(self.place_of(self.in_flight))
        for place in (self._folder / PLACE).glob("*"):
            if place not in places:
                shutil.rmtree(place, ignore_errors=True)
        if not places:
            shutil.rmtree(self._folder / PLACE, ignore_errors=True)

    def _set_aside(self) -> None:
        for name in (LIST, PLACE):
            if (path := self._folder / name).exists():
                aside = artifact.free_name(path, "damaged")
                os.rename(path, aside)
                logger.warning("%s cannot be read, and is now %s", path, aside.name)

    def _write(self) -> None:
        values = {
            "repo_id": self.repo_id,
            "private": self.is_private,
            "revisions": [dataclasses.asdict(revision) for revision in self._revisions],
        }
        artifact.write_whole(self._folder / LIST, json.dumps(values, indent=1), synced=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
