"""One push, made by a process of its own (`publish.py`): whatever hangs in it can be ended."""

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
# A launcher's, by which the process that sends would take itself for another one that trains.
NOT_PASSED_ON = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
LOWEST_PRIORITY = 19  # training comes first
REFUSED = 2  # publish.py's exit code for what will not work by itself


class Failure(NamedTuple):
    """Why a push did not get there."""

    sentence: str
    retry_after: float | None = None
    """Seconds that the server asks to wait."""
    is_refused: bool = False
    """The same again will not work by itself."""


class PushProcess:
    """Makes one push after the other, until it is stopped."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._is_stopped = False

    def send(
        self,
        folder: Path,
        *,
        repo_id: str,
        branch: str,
        title: str,
        attempts: int,
        force: bool,
        seconds: float,
    ) -> str | Failure:
        """Send a folder that is prepared; return the commit, or why there is none.

        Args:
            attempts: of the process, which starts for a second.
            force: whether another model may be replaced.
            seconds: after that it is ended.
        """
        command = [
            # -P: a file of the user's in the working folder must not take a library's place.
            sys.executable, "-P", "-m", "pipeline.publish", "--prepared", "--run", str(folder),
            "--repo_id", repo_id, "--revision", branch, "--title", title,
            "--attempts", str(attempts), *["--force"] * force,
        ]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if k not in NOT_PASSED_ON}
        paths = [str(ROOT), environment.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        try:
            with subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, env=environment, start_new_session=True,
            ) as child:  # fmt: skip
                with self._lock:
                    self._child = child
                    if self._is_stopped:
                        child.kill()
                try:
                    with contextlib.suppress(OSError, AttributeError):
                        os.setpriority(os.PRIO_PROCESS, child.pid, LOWEST_PRIORITY)
                    out, errors = child.communicate(timeout=seconds)
                except subprocess.TimeoutExpired:
                    return Failure(f"it took longer than hub.timeout_seconds ({seconds:g})")
                finally:
                    with self._lock:
                        self._child = None
                    child.kill()
        except OSError as error:
            return Failure(f"no process could be started: {error.strerror}")
        return outcome(child.returncode, out, errors, branch)

    def stop(self) -> None:
        """End what is under way, and whatever comes after it."""
        with self._lock:
            self._is_stopped = True
            if self._child is not None:
                self._child.kill()


def outcome(code: int, out: str, errors: str, branch: str) -> str | Failure:
    """Return what a process of publish.py has said: the commit, or why there is none."""
    lines = out.splitlines()
    if code == 0:
        for line in reversed(lines):
            if line.startswith(f"{branch}: "):
                return line.removeprefix(f"{branch}: ")
    asked = [line.partition(": ")[2] for line in lines if line.startswith("retry_after: ")]
    died = f"the process that sends it ended with code {code}"
    said = (errors.strip().splitlines() or [died])[-1].removeprefix("error: ")
    return Failure(said, float(asked[-1]) if asked else None, code == REFUSED)
