"""Whole runs in forked processes: they need not import torch again, and can be interrupted."""

import contextlib
import gc
import json
import logging
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from conftest import ROOT

from pipeline import pretrain, report, run_folder
from pipeline.checkpoint import checkpoints, step_of
from pipeline.command_line import enter
from pipeline.trainer import PretrainingTrainer

TIMES = (
    "second", "runtime", "git_commit", "mfu", "fraction", "peak_memory", "product_rate",
)  # fmt: skip
SECONDS = 60.0


class Forked:
    """Starts processes, each in a group of its own, and leaves none behind."""

    def __init__(self) -> None:
        self._running: set[int] = set()

    def start(self, work: Callable[[], Any], log: Path, **environment: str) -> int:
        """Run `work` in a new process and return its id; `log` gets what it writes."""
        pid = os.fork()
        if pid:
            self._running.add(pid)
            return pid
        code = 1
        try:
            os.setsid()
            gc.freeze()  # what the parent has made is no garbage: nothing is gained by looking
            _write_to(log)
            os.environ.update(environment, CUDA_VISIBLE_DEVICES="")
            work()
            code = 0
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(code)

    def code(self, pid: int, seconds: float = SECONDS) -> int:
        """Return the exit code of a process; it fails the test to take longer."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._running.discard(pid)
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        raise AssertionError(f"process {pid} has not ended within {seconds} s")

    def end(self) -> None:
        """Kill what is left."""
        for pid in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@contextlib.contextmanager
def forked() -> Iterator[Forked]:
    """Yield a starter of processes; when the block ends, they have."""
    one = Forked()
    try:
        yield one
    finally:
        one.end()


def _write_to(log: Path) -> None:
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    logging.root.handlers.clear()
    for logger in map(logging.getLogger, ("transformers", "accelerate", "datasets")):
        logger.handlers.clear()


def pretraining(argv: list[str], hook: Callable[[], None] | None = None) -> Callable[[], None]:
    """Return what runs the door pretrain.py as a program, after `hook` has changed this process."""

    def work() -> None:
        torch.cuda.is_available = lambda: False  # a forked process cannot use the parent's CUDA
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        report.draw_loss = lambda *_: None  # slow, and the same for all
        if hook is not None:
            hook()
        enter(lambda: pretrain.main(argv))

    return work


def start_ranks(
    starter: Forked,
    count: int,
    argv: list[str],
    log: Path,
    hook: Callable[[int], None] | None = None,
) -> list[int]:
    """Start the processes of one run without a launcher; each logs into LOG.RANK."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return [
        starter.start(
            pretraining(argv, None if hook is None else lambda rank=rank: hook(rank)),
            log.with_name(f"{log.name}.{rank}"),
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count),
            LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )
        for rank in range(count)
    ]  # fmt: skip


def divide_weights(**config: str) -> None:
    """Have the processes share the weights, as under fsdp2.yaml, but on CPUs.

    accelerate knows FSDP on other devices only, and says of several processes on a CPU MULTI_CPU.
    """
    given = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp2.yaml").read_text())
    for name, value in (given["fsdp_config"] | config).items():
        name = name.upper().replace("TRANSFORMER_LAYER_CLS", "TRANSFORMER_CLS")
        os.environ[name] = str(value)
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    made = PartialState.__init__

    def make(self: PartialState, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = make


def before(owner: Any, name: str, act: Callable[..., None]) -> None:
    """Have `act` called, with the same arguments, before each call of `owner.name`."""
    original = getattr(owner, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        act(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, replaced)


def at_update(step: int, act: Callable[[], None]) -> None:
    """Have `act` called while that update is made, counted from 1."""

    def look(trainer: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step == step - 1:
            act()

    before(PretrainingTrainer, "training_step", look)


def send(number: int, *, group: bool = False) -> None:
    """Send a signal to this process, or to its whole group."""
    os.killpg(0, number) if group else os.kill(os.getpid(), number)


def until(condition: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """Return the first true value of `condition`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.005)
    raise AssertionError(f"it has not come true within {seconds} s")


def with_data_of(run: Path, folder: Path) -> Path:
    """Return a run folder that holds only the prepared text of another."""
    for name in ("tokenizer", "blocks"):
        shutil.copytree(run / name, folder / name)
    return folder


def state_of(folder: Path) -> str | None:
    """Return the state that a run folder's status names."""
    return (run_folder.read_status(folder) or {}).get("state")


def steps_saved(folder: Path) -> list[int]:
    """Return the updates after which there are checkpoints."""
    return [step_of(path) for path in checkpoints(folder)]


def history(checkpoint: Path) -> list[dict[str, float]]:
    """Return the logs that a checkpoint holds, without the times."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return [_without_times(entry) for entry in state["log_history"]]


def outcome(folder: Path) -> dict[str, Any]:
    """Return everything of a finished run that an interruption must not change."""
    assert state_of(folder) == "finished"
    last = checkpoints(folder)[-1]
    files = [folder / "model.safetensors", folder / "samples.txt", last / "optimizer.pt"]
    files += [last / "model.safetensors", last / "scheduler.pt", *sorted(last.glob("rng_state*"))]
    found: dict[str, Any] = {str(p.relative_to(folder)): p.read_bytes() for p in files}
    found["history"] = history(last)
    found["metrics"] = _without_times(json.loads((folder / "metrics.json").read_text()))
    return found


def _without_times(entry: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in entry.items() if not any(word in k for word in TIMES)}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return in what two outcomes differ; bytes would fill the screen."""
    return [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
