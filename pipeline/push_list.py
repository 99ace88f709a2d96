"""Which revisions of a run are on the Hub and which are still to be sent: a list, and their files.

What waits lies in `_hub` as hard links: a checkpoint that training removes meanwhile takes no other
place, and nothing is ever written into one. The list is on disk before anything is sent, so that
whoever comes after a killed process knows what is missing.
"""

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

from pipeline import artifact

LIST, PLACE = "hub_status.json", "_hub"
RESULT = "result"
# Trainer's names: the result alone; each checkpoint's model; and the newest, or each, whole.
STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")
LAST = "last-checkpoint"  # the branch that always holds the newest checkpoint whole


@dataclasses.dataclass
class Revision:
    """A commit that is to be on the Hub."""

    name: str
    """checkpoint-100, or result."""
    branch: str
    updates: int
    title: str
    commit: str | None = None
    """None as long as it is not there."""

    @property
    def said(self) -> str:
        """What a person calls it."""
        return f"{'the result' if self.name == RESULT else self.name} ({self.branch})"


class PushList:
    """The list of one run; safe to be used by several threads of one process.

    Attributes:
        repo_id: where to, None as long as nothing was to be sent.
        is_private: whether only its owner may read it.
    """

    def __init__(self, run_folder: Path) -> None:
        """Read it, empty where there is none."""
        self.repo_id: str | None = None
        self.is_private = True
        self._folder, self._lock = run_folder, threading.RLock()
        self._revisions: list[Revision] = []
        try:
            kept = json.loads((run_folder / LIST).read_text(encoding="utf-8"))
            self.repo_id, self.is_private = kept["repo_id"], bool(kept["private"])
            self._revisions = [Revision(**values) for values in kept["revisions"]]
        except FileNotFoundError:
            pass
        except (ValueError, TypeError, KeyError):  # another version's
            (run_folder / LIST).unlink()

    @property
    def sent(self) -> list[Revision]:
        """What is on the Hub, oldest first."""
        return [revision for revision in list(self._revisions) if revision.commit is not None]

    @property
    def waiting(self) -> list[Revision]:
        """What is not, in the order in which it has to be sent."""
        return [revision for revision in list(self._revisions) if revision.commit is None]

    def name_place(self, repo_id: str, *, is_private: bool) -> None:
        """Say where to; what was sent elsewhere does not count."""
        with self._lock:
            if self.repo_id not in (None, repo_id):
                self._revisions = [r for r in self._revisions if r.commit is None]
            self.repo_id, self.is_private = repo_id, is_private
            self._write()

    def hold(self, revision: Revision, files: Mapping[str, Path | bytes]) -> None:
        """Put a revision on the list, in the place of an earlier one of that name and branch.

        Raises:
            OSError: its files cannot be held.
        """
        place = self.place_of(revision)
        with self._lock:  # all of it: what is not on the list is nobody's, and is removed
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            for name, content in files.items():
                if isinstance(content, bytes):
                    (place / name).write_bytes(content)
                else:
                    _link(content, place / name)
            # Of a branch that shows the newest checkpoint alone an older one is not missed.
            is_stale = {LAST} & {revision.branch}
            self._revisions = [
                r for r in self._revisions
                if (r.name, r.branch) != (revision.name, revision.branch)
                and (r.commit or r.branch not in is_stale)
            ]  # fmt: skip
            self._revisions.append(revision)
            self._write()
            self._let_go()

    def has_result(self, updates: int) -> bool:
        """Whether the run's result after so many updates is on the list."""
        results = [revision for revision in self._revisions if revision.name == RESULT]
        return any(revision.updates == updates for revision in results)

    @property
    def result_branch(self) -> str | None:
        """Where the result goes, if the run has said so."""
        return next((r.branch for r in self._revisions if r.name == RESULT), None)

    def add_sent(self, revision: Revision) -> None:
        """Take down a revision that is on the Hub, whether it has waited or not."""
        with self._lock:
            of = (revision.name, revision.branch)
            places = [(r.name, r.branch) for r in self._revisions]
            if of in places:
                self._revisions[places.index(of)] = revision
            else:
                self._revisions.append(revision)
            self._write()
            self._let_go()

    def mark_sent(self, revision: Revision, commit: str) -> None:
        """Take down that a revision is on the Hub; its files are let go."""
        self.add_sent(dataclasses.replace(revision, commit=commit))

    def give_up_oldest(self) -> Revision | None:
        """Let go of the oldest checkpoint that waits, if there are several: the disk is full."""
        with self._lock:
            waiting = [revision for revision in self._revisions if revision.commit is None]
            if len({revision.name for revision in waiting}) < 2:  # one is being sent
                return None
            oldest = waiting[0]
            self._revisions = [r for r in self._revisions if r.commit or r.name != oldest.name]
            self._write()
            self._let_go()
        return oldest

    def place_of(self, revision: Revision) -> Path:
        """Return the folder of its files."""
        return self._folder / PLACE / f"{revision.name}@{revision.branch}"

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
        for place in (self._folder / PLACE).glob("*"):
            if place not in places:
                shutil.rmtree(place, ignore_errors=True)
        if not places:
            shutil.rmtree(self._folder / PLACE, ignore_errors=True)

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
