"""Kill a tiny run again and again, restart it by the same command, and compare what it makes.

python tests/soak.py --kills 1000 --seed 0

Runs are forked from a process that has imported everything, and killed by SIGKILL. Most kills are
aimed at what a run spends little time in and could damage: saving, evaluating, preparing text.
"""

import argparse
import ctypes
import hashlib
import json
import multiprocessing.sharedctypes
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conftest import make_texts

TIMINGS = ("second", "runtime", "time", "mfu", "fraction", "peak_memory", "product_rate")
ANYWHERE = "anywhere"

# What each kill is aimed at, as shares; where it missed, the first that holds then is counted.
AIMS = {"saving": 0.3, "evaluation": 0.2, "preparation": 0.18, "report": 0.07, ANYWHERE: 0.25}
PHASES = (*(aim for aim in AIMS if aim != ANYWHERE), "else")

# A run that was killed as often goes on to its end, so that there is something to compare.
KILLS_PER_RUN = 8
SECONDS_PER_RUN = 120
CRASHES_SHOWN = 10  # with so many it ends early

RECIPE = """
tokens_per_update: 256
precision: fp32
tokenizer: {{vocab_size: 384}}
data: {{files: {text}, block_size: 32}}
model: {{config: {{n_layer: 2, n_head: 2, n_embd: 32, resid_pdrop: 0.1, embd_pdrop: 0.1}}}}
generation: {{prompts: ["the "], max_new_tokens: 12}}
training:
  max_steps: 20
  learning_rate: 1e-3
  per_device_train_batch_size: 8
  logging_steps: 3
  eval_strategy: steps
  eval_steps: 4
  save_steps: 2
  save_total_limit: 2
  report_to: none
  output_dir: {folder}
"""


class Shared(ctypes.Structure):
    """What a child says about one phase, readable after its death."""

    _fields_ = [("inside", ctypes.c_int), ("entered", ctypes.c_int), ("seconds", ctypes.c_double)]


class Phases:
    """Which phase a child is in, in memory that it shares with its parent."""

    def __init__(self) -> None:
        self._all = multiprocessing.sharedctypes.RawArray(Shared, len(PHASES))

    def __getitem__(self, phase: str) -> Shared:
        return self._all[PHASES.index(phase)]

    def clear(self) -> None:
        ctypes.memset(self._all, 0, ctypes.sizeof(self._all))

    @property
    def now(self) -> str:
        return next((phase for phase in PHASES if self[phase].inside), "else")

    def watched(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """Return the function, which then says when it runs."""
        shared = self[phase]

        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            shared.entered += 1
            shared.inside = 1
            try:
                return function(*args, **kwargs)
            finally:
                shared.inside = 0
                shared.seconds += time.perf_counter() - started

        return run

    def watch(self) -> None:
        """In a child: say from now on what it does."""
        from pipeline import checkpoint, report, run_data
        from pipeline.trainer import PretrainingTrainer

        for owner, name, phase in (
            (checkpoint.Writer, "_write", "saving"),
            (PretrainingTrainer, "evaluate", "evaluation"),
            (run_data, "obtain_run_data", "preparation"),
            (PretrainingTrainer, "save_result", "report"),
            (PretrainingTrainer, "result", "report"),
            (report, "write_report", "report"),
        ):
            setattr(owner, name, self.watched(getattr(owner, name), phase))


def warm_up() -> None:
    """Import what a run imports, so that a fork of this process starts at once."""
    import torch

    from pipeline import artifact, pretrain, report, run_data, run_folder, trainer  # noqa: F401

    torch.set_num_threads(1)
    artifact.versions()
    artifact.git_commit()


def write_recipe(folder: Path) -> Path:
    """Write a small text and a recipe for it into `folder`; its runs go to folder/run."""
    text = folder / "text"
    text.mkdir(parents=True)
    for number, content in enumerate(make_texts(60)):
        (text / f"{number:03}.txt").write_text(content, encoding="utf-8")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(text=text, folder=folder / "run"))
    return path


def fork_run(argv: list[str], log: Path, prepare: Callable[[], Any] = lambda: None) -> int:
    """Return the id of a new process that does `pretrain.py ARGV`; `prepare` is called in it."""
    from pipeline import pretrain
    from pipeline.command_line import enter

    pid = os.fork()
    if pid:
        return pid
    code: Any = 1
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        prepare()
        enter(lambda: pretrain.main(argv))
    except SystemExit as error:
        code = error.code
    except BaseException as error:  # it must not get into the parent's code
        os.write(2, repr(error).encode())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def ended(pid: int) -> int:
    """Wait for a process and return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(argv: list[str], log: Path, prepare: Callable[[], Any] = lambda: None) -> int:
    """Return the exit code of `pretrain.py ARGV` in a process of its own."""
    return ended(fork_run(argv, log, prepare))


def result(folder: Path) -> dict[str, Any]:
    """Return all that a finished run made and that must not depend on interruptions."""
    import torch

    from pipeline import checkpoint

    last = checkpoint.checkpoints(folder)[-1]
    state = json.loads((last / "trainer_state.json").read_text())

    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def loaded(name: str) -> str:
        return _digest_of(torch.load(last / name, weights_only=True))

    return {
        "last": last.name,
        "weights": digest(folder / "model.safetensors"),
        "weights of the last checkpoint": digest(last / "model.safetensors"),
        "optimizer": loaded("optimizer.pt"),
        "scheduler": loaded("scheduler.pt"),
        "random state": loaded("rng_state.pth"),
        "logs": [_untimed(entry) for entry in state.pop("log_history")],
        "state": _untimed(state),
        "rates": _values(last, "learning_rate"),
        "samples": (folder / "samples.txt").read_text(),
        "metrics": _untimed(json.loads((folder / "metrics.json").read_text())),
        "status": json.loads((folder / "run_status.json").read_text())["state"],
        "files": _results_in(folder),
    }


def _results_in(folder: Path) -> list[str]:
    """Return all files but those of checkpoints and, underscored, what a kill may leave."""
    kept = [p for p in folder.iterdir() if not p.name.startswith(("_", "checkpoint-"))]
    found = [p for path in kept for p in (path, *path.rglob("*")) if p.is_file()]
    return sorted(str(p.relative_to(folder)) for p in found)


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of the parts of two results that are not the same."""
    return [name for name in one if one[name] != other[name]]


@dataclass
class Outcome:
    """What a soak has found."""

    landed: list[str] = field(default_factory=list)
    """The phase in which each kill landed."""
    completed: int = 0
    identical: int = 0
    crashes: list[str] = field(default_factory=list)
    """Of each restart that ended by itself and not with 0: code and last lines."""
    differences: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    """Moments at which fewer whole checkpoints were there than promised."""
    fewest_whole: int | None = None
    """At any kill after a second checkpoint was seen whole."""
    seconds: float = 0.0

    def share(self, phase: str) -> float:
        return self.landed.count(phase) / max(1, len(self.landed))

    def table(self) -> str:
        kills = ", ".join(f"{phase} {count}" for phase, count in Counter(self.landed).most_common())
        rows = {
            "kills": f"{len(self.landed)} ({kills})",
            "runs completed": self.completed,
            "crashed restarts": len(self.crashes),
            "bit-identical": f"{self.identical} of {self.completed}",
            "fewest whole checkpoints": self.fewest_whole,
            "checkpoints lost": len(self.losses),
            "seconds": f"{self.seconds:.0f}",
        }
        lines = [f"{name:<26}{value}" for name, value in rows.items()]
        return "\n".join([*lines, *self.crashes, *self.differences, *self.losses])


def soak(kills: int, seed: int, folder: Path, say: Callable[[str], Any] = lambda line: None):
    """Kill runs in `folder` until there were as many kills, each run restarted to its end."""
    started = time.monotonic()
    warm_up()
    recipe, output, log = write_recipe(folder), folder / "run", folder / "log.txt"
    argv = ["--config", str(recipe)]
    phases, outcome, source = Phases(), Outcome(), random.Random(seed)
    began = time.monotonic()
    if code := run(argv, log, phases.watch):
        raise RuntimeError(f"the uninterrupted run ended with {code}:\n{_tail(log)}")
    whole_run = time.monotonic() - began
    lengths = {phase: phases[phase].seconds / max(1, phases[phase].entered) for phase in PHASES}
    expected = result(output)
    while len(outcome.landed) < kills and len(outcome.crashes) < CRASHES_SHOWN:
        shutil.rmtree(output)
        seen = killed = 0
        while True:
            log.unlink()
            phases.clear()
            pid = fork_run(argv, log, phases.watch)
            if killed < KILLS_PER_RUN and len(outcome.landed) < kills:
                is_new = not (output / "blocks").exists()
                aim = _aim(outcome, source, is_new=is_new)
                entry = source.randint(1, 4 if is_new and aim == "saving" else 1)
                delay = source.uniform(0, lengths.get(aim, whole_run))
                _await(pid, phases, aim, entry, delay)
                os.kill(pid, signal.SIGKILL)
            code = _ended_in_time(pid)
            if code != -signal.SIGKILL:
                break
            killed += 1
            # A save goes on beside the training: what was aimed at comes before what went on too.
            outcome.landed.append(aim if aim != ANYWHERE and phases[aim].inside else phases.now)
            seen = _look_at_checkpoints(output, seen, outcome)
        if code:
            outcome.crashes.append(f"exit code {code} after {killed} kills:\n{_tail(log)}")
            continue
        outcome.completed += 1
        if wrong := differing(expected, result(output)):
            outcome.differences.append(f"run {outcome.completed}: another {', '.join(wrong)}")
        outcome.identical += not wrong
        outcome.seconds = time.monotonic() - started
        say(
            f"{len(outcome.landed)} of {kills} kills, {outcome.completed} runs, "
            f"{outcome.identical} identical, {len(outcome.crashes)} crashes, "
            f"{outcome.seconds:.0f} s"
        )
    return outcome


def _aim(outcome: Outcome, source: random.Random, *, is_new: bool) -> str:
    """Return what most lacks kills, of what can be hit; text is prepared in new runs only."""
    lacking = {
        aim: share - outcome.share("else" if aim == ANYWHERE else aim)
        for aim, share in AIMS.items()
        if is_new or aim != "preparation"
    }
    if is_new:
        lacking.pop("report")
    return max(lacking, key=lambda aim: lacking[aim] + source.uniform(0, 0.05))


def _await(pid: int, phases: Phases, aim: str, entry: int, delay: float) -> None:
    """Return `delay` after the phase was entered so often, or when the process has ended."""
    while aim != ANYWHERE and phases[aim].entered < entry:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.0005)
    until = time.monotonic() + delay
    while time.monotonic() < until:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(min(0.005, max(0.0, until - time.monotonic())))


def _ended_in_time(pid: int) -> int:
    until = time.monotonic() + SECONDS_PER_RUN
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            ended(pid)
            return -signal.SIGALRM  # hung
        time.sleep(0.002)
    return ended(pid)


def _look_at_checkpoints(output: Path, seen: int, outcome: Outcome) -> int:
    """Count the whole ones after a kill; return the most that were seen, at most two."""
    from pipeline import artifact, checkpoint

    found = checkpoint.checkpoints(output) if output.exists() else []
    whole = [folder for folder in found if artifact.damage(folder) is None]
    if len(whole) < seen or len(whole) < len(found):
        left = [p.name for p in found]
        outcome.losses.append(f"kill {len(outcome.landed)}: {len(whole)} whole of {left}")
    if seen >= 2:
        outcome.fewest_whole = min(len(whole), outcome.fewest_whole or len(whole))
    return max(seen, min(len(whole), 2))


def _untimed(values: Any) -> Any:
    if isinstance(values, dict):
        kept = {k: v for k, v in values.items() if not any(word in k for word in TIMINGS)}
        return {key: _untimed(value) for key, value in kept.items()}
    return values


def _values(checkpoint: Path, name: str) -> list[float]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def _digest_of(tree: Any) -> str:
    """Return the sha256 of nested tensors, numbers and text."""
    import torch

    digest = hashlib.sha256()

    def add(node: Any) -> None:
        if isinstance(node, torch.Tensor):
            digest.update(f"{node.dtype}{tuple(node.shape)}".encode())
            digest.update(node.contiguous().numpy().tobytes())
        elif isinstance(node, dict):
            for key in sorted(node, key=repr):
                digest.update(repr(key).encode())
                add(node[key])
        elif isinstance(node, list | tuple):
            digest.update(f"{len(node)}".encode())
            for one in node:
                add(one)
        else:
            digest.update(repr(node).encode())

    add(tree)
    return digest.hexdigest()


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(f"    {line}" for line in lines[-15:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    is_terminal = sys.stdout.isatty()

    def say(line: str) -> None:
        sys.stdout.write(f"\r{line}" if is_terminal else f"{line}\n")
        sys.stdout.flush()

    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        outcome = soak(options.kills, options.seed, Path(folder), say)
    sys.stdout.write(f"\n{outcome.table()}\n")
    return 1 if outcome.crashes or outcome.differences or outcome.losses else 0


if __name__ == "__main__":
    sys.exit(main())
