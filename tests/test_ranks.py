"""Several processes stop, fail and go on together, whichever of them is hit and when."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from conftest import ROOT
from forked import (
    Forked,
    at_update,
    before,
    differences,
    forked,
    history,
    outcome,
    send,
    start_ranks,
    state_of,
    steps_saved,
    until,
    with_data_of,
)

from pipeline import artifact, failures, results, run_data, run_folder
from pipeline.interruption import EXIT_CODE
from pipeline.recipe import InputError
from pipeline.trainer import PretrainingTrainer

pytestmark = pytest.mark.slow

COMMON = [
    "--training.use_cpu", "true", "--training.eval_steps", "6", "--training.max_steps", "12",
    "--training.save_steps", "5", "--model.config.resid_pdrop",
]  # fmt: skip


def arguments(recipe: Path, folder: Path, *more: str, dropout: float = 0.1) -> list[str]:
    return [
        "--config", str(recipe), "--training.output_dir", str(folder), *COMMON, str(dropout), *more
    ]  # fmt: skip


@pytest.fixture(scope="module")
def straight(smoke_recipe, tmp_path_factory) -> Path:
    """A run of two processes that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    with forked() as starter:
        run(starter, 2, arguments(smoke_recipe, folder), folder)
    return folder


def run(starter: Forked, count: int, argv: list[str], folder: Path, hook=None, code=0) -> list[str]:
    """Run so many processes to the end; return what each said."""
    return end(starter, start(starter, count, argv, folder, hook), folder, code)


def start(starter: Forked, count: int, argv: list[str], folder: Path, hook=None) -> list[int]:
    for rank in range(count):
        log_of(folder, rank).unlink(missing_ok=True)
    return start_ranks(starter, count, argv, folder.with_name(f"{folder.name}.log"), hook)


def end(starter: Forked, pids: list[int], folder: Path, code: int = 0) -> list[str]:
    found = [starter.code(pid) for pid in pids]
    said = [log_of(folder, rank).read_text() for rank in range(len(pids))]
    assert found == [code] * len(pids), "\n".join(said)
    return said


def log_of(folder: Path, rank: int) -> Path:
    return folder.with_name(f"{folder.name}.log.{rank}")


def keep_rows(folder: Path, rank: int) -> None:
    """Write down which rows this process takes at which update."""
    file = (folder.with_name(f"{folder.name}.rows.{rank}")).open("w", buffering=1)

    def look(self, model, inputs, *rest, **kwargs) -> None:
        for row in inputs["input_ids"].tolist():
            file.write(f"{self.state.global_step + 1} {row}\n")

    before(PretrainingTrainer, "training_step", look)


def rows_kept(folder: Path, rank: int) -> dict[int, list[str]]:
    found = defaultdict(list)
    for line in folder.with_name(f"{folder.name}.rows.{rank}").read_text().splitlines():
        step, row = line.split(" ", 1)
        found[int(step)].append(row)
    return found


def on(rank: int, act, *arguments):
    """Return a hook that acts in one process only."""
    return lambda this: act(*arguments) if this == rank else None


def at_8(number: int = signal.SIGTERM) -> None:
    at_update(8, lambda: send(number))


def slowly(seconds: float = 0.1) -> None:
    before(PretrainingTrainer, "training_step", lambda *_, **__: time.sleep(seconds))


def apart(seconds: float):
    """Ask rank 0 at update 8 and rank 1 so much later, while rank 0 still writes."""

    def hook(rank: int) -> None:
        slowly()
        if rank == 0:
            before(artifact, "commit", lambda _, f, *r: f.name[-2:] != "-5" and time.sleep(1.5))
        later = seconds * rank
        at_update(8, lambda: threading.Timer(later, send, [signal.SIGTERM]).start())

    return hook


def in_evaluation() -> None:
    before(PretrainingTrainer, "evaluation_loop", lambda *_, **__: send(signal.SIGINT))


def while_writing(rank: int) -> None:
    def look(staging, folder, *rest) -> None:
        if folder.name == "checkpoint-5":
            send(signal.SIGUSR1)
            time.sleep(0.2)

    before(artifact, "commit", look)


MOMENTS = {
    "one at an update": on(1, at_8),
    "both 0.25 s apart": apart(0.25),
    "both 1 s apart": apart(1),
    "one in an evaluation": on(1, in_evaluation),
    "one while it writes": while_writing,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_all_stop_after_the_same_update_and_go_on_to_the_last_bit(
    smoke_recipe, straight, tmp_path, moment
):
    def hook(rank: int) -> None:
        keep_rows(folder, rank)
        MOMENTS[moment](rank)

    folder = with_data_of(straight, tmp_path / "run")
    argv = arguments(smoke_recipe, folder)
    with forked() as starter:
        said = run(starter, 2, argv, folder, hook, code=EXIT_CODE)
        assert not [one for one in said if "Traceback" in one or "error:" in one]
        status, saved = run_folder.read_status(folder), steps_saved(folder)
        assert status["state"] == "preempted"
        assert status["checkpoint"] == f"checkpoint-{saved[-1]}"
        assert status["why"].endswith(f", after update {saved[-1]}")
        assert [max(rows_kept(folder, rank)) for rank in (0, 1)] == [saved[-1]] * 2
        assert 5 < saved[-1] < 12 and not (folder / "model.safetensors").exists()
        run(starter, 2, argv, folder)
    assert differences(outcome(folder), outcome(straight)) == []


def in_the_final_measuring() -> None:
    before(results, "load_model", lambda *_: send(signal.SIGTERM))


def in_preparation() -> None:
    before(artifact, "commit", lambda _, f, *r: f.name == "blocks" and send(signal.SIGTERM))


HITS = {
    "0 prepares": (0, in_preparation),
    "0 measures": (0, in_the_final_measuring),
    "1 measures": (1, in_the_final_measuring),
}


@pytest.mark.parametrize("moment", HITS)
def test_outside_of_training_the_launcher_ends_the_others(smoke_recipe, straight, tmp_path, moment):
    """It sends a signal to all as soon as one has ended, as accelerate and torchrun do."""
    folder, (hit, act) = tmp_path / "run", HITS[moment]
    argv = arguments(smoke_recipe, folder)
    with forked() as starter:
        pids = start(starter, 2, argv, folder, on(hit, act))
        assert starter.code(pids[hit]) == EXIT_CODE
        os.kill(pids[1 - hit], signal.SIGTERM)
        assert starter.code(pids[1 - hit]) in (EXIT_CODE, -signal.SIGTERM)
        assert state_of(folder) == "preempted"
        assert not (folder / "metrics.json").exists()
        assert steps_saved(folder)[-1:] == ([] if act is in_preparation else [12])
        run(starter, 2, argv, folder)
    assert differences(outcome(folder), outcome(straight)) == []


def test_a_process_that_is_killed_ends_the_others_in_seconds(smoke_recipe, straight, tmp_path):
    folder = with_data_of(straight, tmp_path / "run")
    argv = arguments(smoke_recipe, folder)
    with forked() as starter:
        pids = start(starter, 2, argv, folder, on(1, at_8, signal.SIGKILL))
        assert starter.code(pids[1]) == -signal.SIGKILL
        began = time.monotonic()
        assert starter.code(pids[0]) == 1
        assert time.monotonic() - began < 10
        assert state_of(folder) == "failed" and steps_saved(folder) == [5]
        run(starter, 2, argv, folder)
    assert differences(outcome(folder), outcome(straight)) == []


@pytest.mark.parametrize(
    ("is_asked", "code", "state", "why"),
    [
        (True, EXIT_CODE, "preempted", "another process was asked to stop: SIGTERM"),
        (
            False,
            1,
            "failed",
            "another process has ended without a word; the main one: RuntimeError: ",
        ),
    ],
    ids=["asked", "killed"],
)
def test_a_launchers_signal_after_the_connection_broke_changes_nothing(
    smoke_recipe, straight, tmp_path, is_asked, code, state, why
):
    """Launchers ask all to end when one has ended; what that one ended of is what the run did."""
    folder, broken = with_data_of(straight, tmp_path / "run"), tmp_path / "broken"

    def hook(rank: int) -> None:
        if rank == 0:
            before(run_folder, "_stopped_by", lambda *_: broken.touch())
        elif is_asked:
            in_the_final_measuring()
        else:
            at_8(signal.SIGKILL)

    argv = arguments(smoke_recipe, folder)
    with forked() as starter:
        pids = start(starter, 2, argv, folder, hook)
        until(broken.exists)
        time.sleep(0.1)
        os.kill(pids[0], signal.SIGTERM)
        assert starter.code(pids[0]) == code
    status = run_folder.read_status(folder)
    assert status["state"] == state and status["why"].startswith(why)


@pytest.mark.parametrize(
    ("hit", "error", "code", "beginning", "why"),
    [
        (0, RuntimeError("a bug"), 1, "Traceback ", "RuntimeError: a bug"),
        (1, RuntimeError("a bug"), 1, "Traceback ", "process 1: RuntimeError: a bug"),
        (1, InputError("no file"), 2, "error: no file\n", "process 1: InputError: no file"),
    ],
)
def test_what_ended_one_process_is_told_once(
    smoke_recipe, straight, tmp_path, monkeypatch, hit, error, code, beginning, why
):
    def fail() -> None:
        raise error

    folder, other = with_data_of(straight, tmp_path / "run"), 1 - hit
    monkeypatch.setattr(failures, "SECONDS_FOR_MAIN", 0.5)
    with forked() as starter:
        argv = arguments(smoke_recipe, folder)
        pids = start(starter, 2, argv, folder, on(hit, at_update, 8, fail))
        assert starter.code(pids[hit]) == code
        assert starter.code(pids[other], 10) == 1
    said = [log_of(folder, rank).read_text() for rank in (0, 1)]
    name = f"process 1 ({socket.gethostname()}): " if hit else ""
    assert f"\n{name}{beginning}" in f"\n{said[hit]}"
    assert "".join(said).count("Traceback") == ("Traceback" in beginning)
    assert said[other].endswith(
        f"process {other}: ends because another process has ended; its output, or the "
        "launcher's, says why\n"
    )
    assert run_folder.read_status(folder)["why"] == why


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_process_that_is_frozen_ends_the_others_with_their_stacks(
    smoke_recipe, straight, tmp_path, frozen
):
    def hook(rank: int) -> None:
        slowly()
        if rank == frozen:
            at_8(signal.SIGSTOP)

    folder, other = with_data_of(straight, tmp_path / "run"), 1 - frozen
    argv = arguments(smoke_recipe, folder, "--faults.hang_seconds", "2")
    with forked() as starter:
        pids = start(starter, 2, argv, folder, hook)
        until(lambda: psutil.Process(pids[frozen]).status() == psutil.STATUS_STOPPED)
        began = time.monotonic()
        assert starter.code(pids[other], 12) == 1
        assert time.monotonic() - began < 10
        said = log_of(folder, other).read_text()
        assert f"error: process {other} of 2 (" in said and "Thread 0x" in said
        assert "nothing has happened for " in said and "in training_step" in said
        if frozen == 1:
            assert "process 1 was last heard of" in said
            status = run_folder.read_status(folder)
            assert status["state"] == "failed" and "nothing has happened" in status["why"]
        assert steps_saved(folder) == [5]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_number_that_is_none_in_one_process_stops_all_before_the_update(
    smoke_recipe, straight, tmp_path, rank
):
    def poison(self, *rest, **kwargs) -> None:
        if self.state.global_step == 7:
            with torch.no_grad():
                next(self.model.parameters()).fill_(float("nan"))

    folder = with_data_of(straight, tmp_path / "run")
    argv = arguments(smoke_recipe, folder)
    with forked() as starter:
        hook = on(rank, before, PretrainingTrainer, "training_step", poison)
        said = run(starter, 2, argv, folder, hook, code=1)
        assert not [one for one in said if "Traceback" in one]
        sentence = "error: update 8 was not made: its loss or gradient is infinite or not a number"
        assert said[0].count("error:") == 1 and sentence in said[0] and "error:" not in said[1]
        status = run_folder.read_status(folder)
        assert status["state"] == "failed" and "update 8 was not made" in status["why"]
        assert steps_saved(folder) == [5]
        run(starter, 2, argv, folder)
    assert differences(outcome(folder), outcome(straight)) == []


def test_a_spike_in_one_process_is_skipped_in_all(smoke_recipe, straight, tmp_path):
    folder = with_data_of(straight, tmp_path / "run")
    argv = arguments(smoke_recipe, folder, "--guards.skip_spikes", "true")
    argv += ["--guards.spike_window", "20"]  # of which ten updates are enough

    def hook(rank: int) -> None:
        compute = PretrainingTrainer.compute_loss

        def compute_loss(self, *given, **parts):
            loss = compute(self, *given, **parts)
            return loss * 10 if rank == 1 and self.state.global_step == 10 else loss

        def keep(self, *_, **__) -> None:
            weights = next(self.model.parameters()).detach().numpy().tobytes()
            (tmp_path / f"{rank}.{self.state.global_step}").write_bytes(weights)

        PretrainingTrainer.compute_loss = compute_loss
        before(PretrainingTrainer, "training_step", keep)

    with forked() as starter:
        said = run(starter, 2, argv, folder, hook)
    assert "update 11: the loss is " in said[0] and "update 11: " not in said[1]
    guards = artifact.read_manifest(folder / "checkpoint-12")["facts"]["guards"]
    assert guards["times"] == {"spike": 1} and guards["skipped_updates"] == 1
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("[01].*")}
    assert kept["0.9"] != kept["0.10"] == kept["0.11"]
    assert [n for n in range(12) if kept[f"0.{n}"] != kept[f"1.{n}"]] == []


def test_the_others_wait_for_the_preparation_however_long_it_takes(smoke_recipe, tmp_path):
    folder, rows = tmp_path / "run", tmp_path / "run" / "blocks"

    def hook(rank: int) -> None:
        def look(*_, **__) -> None:
            assert rows.exists() == (rank == 1)  # done once, and found by the others
            time.sleep(8 * (rank == 0))

        before(run_data, "prepare_blocks", look)

    argv = arguments(smoke_recipe, folder, "--training.ddp_timeout", "4")
    with forked() as starter:
        said = run(starter, 2, argv, folder, hook)
    assert "launch: 2 processes" in said[0] and "launch:" not in said[1]


# -- another number of processes ------------------------------------------------------------------


WIDE = ["--tokens_per_update", "1536", "--training.logging_steps", "1"]


@pytest.fixture(scope="module")
def alone(smoke_recipe, tmp_path_factory) -> Path:
    """A run of one process whose updates three can divide."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    with forked() as starter:
        argv = arguments(smoke_recipe, folder, *WIDE, dropout=0)
        run(starter, 1, argv, folder, lambda rank: keep_rows(folder, rank))
    return folder


@pytest.mark.parametrize(("was", "now"), [(2, 1), (1, 2), (2, 3)])
def test_a_run_goes_on_with_another_number_of_processes(smoke_recipe, alone, tmp_path, was, now):
    """In the middle of an epoch: the same rows at each update, each once, and the same curve."""

    def first(rank: int) -> None:
        keep_rows(folder, rank)
        if rank == was - 1:
            at_update(9, lambda: send(signal.SIGTERM))

    folder = with_data_of(alone, tmp_path / "run")
    argv = arguments(smoke_recipe, folder, *WIDE, dropout=0)
    with forked() as starter:
        run(starter, was, argv, folder, first, code=EXIT_CODE)
        begun = [rows_kept(folder, rank) for rank in range(was)]
        stopped = steps_saved(folder)[-1]
        said = run(starter, now, argv, folder, lambda rank: keep_rows(folder, rank))
        ended = [rows_kept(folder, rank) for rank in range(now)]
    assert f"  differs from the checkpoint: processes.count: {was} -> {now} (applied)" in said[0]
    assert "processes.gradient_accumulation_steps: " in said[0]
    assert 7 < stopped < 12 and min(map(min, ended)) == stopped + 1
    expected = rows_kept(alone, 0)
    assert [len(expected[step]) for step in range(1, 13)] == [48] * 12
    for step in range(1, 13):
        parts = begun if step <= stopped else ended
        assert sorted(sum((part[step] for part in parts), [])) == sorted(expected[step])
    one, other = (history(run / "checkpoint-12") for run in (alone, folder))
    assert len(one) == len(other)
    for name in ("loss", "eval_loss", "grad_norm", "learning_rate"):
        values, same = ([e[name] for e in h if name in e] for h in (other, one))
        assert values == pytest.approx(same, rel=1e-5)


@pytest.mark.parametrize("batch", ["8", "16"], ids=["added up", "at once"])
def test_three_processes_go_on_to_the_last_bit(smoke_recipe, alone, tmp_path, batch):
    """Of three addends the order shows, and DDP changes it after its first reduction."""
    straight, folder = (with_data_of(alone, tmp_path / name) for name in ("straight", "run"))
    more = [*WIDE, "--training.per_device_train_batch_size", batch]
    with forked() as starter:
        run(starter, 3, arguments(smoke_recipe, straight, *more), straight)
        argv = arguments(smoke_recipe, folder, *more)
        run(starter, 3, argv, folder, on(1, at_8), code=EXIT_CODE)
        run(starter, 3, argv, folder)
    assert differences(outcome(folder), outcome(straight)) == []


# -- real launchers -------------------------------------------------------------------------------


# A slow pretrain.py that tells when it is in the middle of training, and there hits itself once.
DRIVER = """
import os, sys, time
from pathlib import Path

sys.path.insert(0, {tests!r})
from forked import at_update, before, send

from pipeline import pretrain
from pipeline.command_line import enter
from pipeline.trainer import PretrainingTrainer


def reached():
    rank = os.environ.get("RANK", "0")
    place = Path({place!r})
    if not (place / rank).exists():
        (place / ("_" + rank)).write_text(str(os.getpid()))
        os.replace(place / ("_" + rank), place / rank)
        if rank == "1" and {number}:
            send({number})


if __name__ == "__main__":
    before(PretrainingTrainer, "training_step", lambda *_, **__: time.sleep({seconds}))
    at_update(8, reached)
    enter(pretrain.main)
"""


@contextlib.contextmanager
def launched(count: int, tmp_path: Path, argv: list[str], *more: str, number=0, seconds=0.1):
    """Yield `accelerate launch`, running; nothing of it is left afterwards."""
    place = tmp_path / "reached"
    place.mkdir()
    script, config = tmp_path / "driver.py", tmp_path / "accelerate.yaml"
    script.write_text(
        DRIVER.format(
            tests=str(ROOT / "tests"), place=str(place), number=int(number), seconds=seconds
        )
    )
    values = yaml.safe_load((ROOT / "accelerate_configs" / "cpu.yaml").read_text())
    if count > 1:
        values = yaml.safe_load((ROOT / "accelerate_configs" / "ddp.yaml").read_text())
        values |= {"num_processes": count, "use_cpu": True, "main_process_port": 0}
    config.write_text(yaml.safe_dump(values))
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch", "--quiet"]
    process = subprocess.Popen(
        [*launcher, "--config_file", str(config), *more, str(script), *argv],
        cwd=ROOT, stdout=(tmp_path / "said").open("w"), stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
    )  # fmt: skip
    process.place = place
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for path in place.iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGKILL)
        process.wait()


def test_a_process_whose_launcher_is_gone_saves_and_ends(smoke_recipe, straight, tmp_path):
    numbers = (signal.SIGKILL, signal.SIGTERM)
    folders = [with_data_of(straight, tmp_path / number.name / "run") for number in numbers]
    with contextlib.ExitStack() as stack:
        launchers = [
            stack.enter_context(
                launched(1, folder.parent, arguments(smoke_recipe, folder), seconds=0.3)
            )
            for folder in folders
        ]
        for number, launcher in zip(numbers, launchers, strict=True):
            until((launcher.place / "0").exists)
            launcher.send_signal(number)
            assert launcher.wait(10) == -number
        for launcher in launchers:
            pid = int((launcher.place / "0").read_text())
            until(lambda pid=pid: not psutil.pid_exists(pid), 20)
    for folder in folders:
        status, saved = run_folder.read_status(folder), steps_saved(folder)
        assert status["state"] == "preempted" and 8 <= saved[-1] < 12
        assert status["why"] == f"the launcher is gone, after update {saved[-1]}"


@pytest.mark.parametrize("hit", ["launcher", "process 1"])
def test_a_signal_to_the_launcher_or_to_one_of_its_processes_stops_all(
    smoke_recipe, straight, tmp_path, hit
):
    folder = with_data_of(straight, tmp_path / "run")
    argv = arguments(smoke_recipe, folder)
    number = signal.SIGTERM if hit == "process 1" else 0
    with launched(2, tmp_path, argv, number=number) as launcher:
        if hit == "launcher":
            until((launcher.place / "0").exists)
            launcher.terminate()
        assert launcher.wait(90) not in (0, None), (tmp_path / "said").read_text()
    status, saved = run_folder.read_status(folder), steps_saved(folder)
    assert status["state"] == "preempted" and saved[0] == 5 and 8 <= saved[-1] < 12
    assert status["why"].endswith(f", after update {saved[-1]}")
    with forked() as starter:
        run(starter, 2, argv, folder)
    assert differences(outcome(folder), outcome(straight)) == []


def test_after_a_kill_the_launcher_goes_on_by_itself(smoke_recipe, straight, tmp_path):
    folder = with_data_of(straight, tmp_path / "run")
    argv = arguments(smoke_recipe, folder)
    more = ("--max_restarts", "1")
    with launched(2, tmp_path, argv, *more, number=signal.SIGKILL, seconds=0.02) as launcher:
        said = tmp_path / "said"
        assert launcher.wait(120) == 0, said.read_text()
    assert f"resuming from {folder}/checkpoint-5" in said.read_text()
    assert differences(outcome(folder), outcome(straight)) == []


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_compiled_processes_learn_what_plain_ones_do(smoke_recipe, straight, tmp_path, optimizer):
    """What DDP wraps cannot be compiled as one graph; the model below it can.

    By Muon each process orthogonalises a part of the matrices.
    """
    compiled = ["--training.torch_compile", "true", "--training.torch_compile_backend", "aot_eager"]
    losses = []
    with forked() as starter:
        for name, count, more in (("alone", 1, []), ("plain", 2, []), ("compiled", 2, compiled)):
            folder = with_data_of(straight, tmp_path / name)
            argv = [*arguments(smoke_recipe, folder, dropout=0), "--optimizer.name", optimizer]
            run(starter, count, [*argv, *more], folder)
            losses.append(json.loads((folder / "metrics.json").read_text())["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)
