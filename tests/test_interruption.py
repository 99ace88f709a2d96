"""A run that is asked to stop saves, says so, exits with 75, and goes on to the last bit."""

import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from forked import (
    Forked,
    at_update,
    before,
    differences,
    forked,
    outcome,
    pretraining,
    send,
    state_of,
    steps_saved,
    until,
    with_data_of,
)

from pipeline import artifact, interruption, results, run_folder
from pipeline.interruption import EXIT_CODE, SIGNALS, Preempted
from pipeline.trainer import PretrainingTrainer


def test_outside_of_a_block_signals_are_the_callers(monkeypatch):
    before_it = [signal.getsignal(number) for number in SIGNALS]
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    with interruption.heeded():
        assert all(signal.getsignal(number) not in before_it for number in SIGNALS)
    assert [signal.getsignal(number) for number in SIGNALS] == before_it
    assert signal.set_wakeup_fd(wakeup) == wakeup
    assert "interruption" not in {thread.name for thread in threading.enumerate()}
    with interruption.deferred():
        assert interruption.reason() is None


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_raised_and_nothing_that_handles_errors_handles_it(number):
    with interruption.heeded():
        with pytest.raises(Preempted, match=f"^{number.name}$"):
            try:
                send(number)
            except Exception:
                pytest.fail("it was taken for an error")
        assert interruption.reason() == number.name
        send(number)
    assert interruption.reason() is None


def test_a_deferred_signal_waits_for_whoever_deferred_it():
    with interruption.heeded():
        with interruption.deferred(), interruption.deferred():
            send(signal.SIGUSR1)
            send(signal.SIGTERM)
            assert interruption.reason() == "SIGUSR1"
        assert interruption.reason() == "SIGUSR1"


def test_who_is_asked_to_stop_is_told_what_that_means(caplog):
    caplog.set_level(logging.INFO, "pipeline")
    with pytest.raises(Preempted), interruption.heeded(), interruption.told("nothing was trained"):
        send(signal.SIGTERM)
    assert caplog.messages == ["\nstopped (SIGTERM); nothing was trained"]


def test_a_block_inside_of_another_and_one_of_another_thread_change_nothing():
    def elsewhere() -> None:
        with interruption.heeded():
            found.append(signal.getsignal(signal.SIGTERM))

    found = []
    with interruption.heeded():
        handler = signal.getsignal(signal.SIGTERM)
        with interruption.heeded():
            assert signal.getsignal(signal.SIGTERM) == handler
        assert signal.getsignal(signal.SIGTERM) == handler
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


def test_a_forked_worker_leaves_the_groups_signals_to_its_parent(tmp_path):
    with interruption.heeded(), forked() as starter:

        def work() -> None:
            for number in SIGNALS:
                send(number, group=True)
            os._exit(7 if interruption.reason() is None else 8)

        assert starter.code(starter.start(work, tmp_path / "log")) == 7
        assert interruption.reason() is None


def test_without_a_limit_a_process_has_all_the_time_it_needs(tmp_path):
    def work() -> None:
        interruption.SAME_SECONDS, interruption.SECONDS_BETWEEN_LOOKS = 60, 0.01
        with interruption.heeded(), interruption.deferred():
            for number in SIGNALS:
                send(number)
                time.sleep(0.05)
            os._exit(7)

    with forked() as starter:
        assert starter.code(starter.start(work, tmp_path / "log")) == 7


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("name", interruption.LAUNCHED)
def test_the_death_of_a_launcher_is_noticed(tmp_path, name, number):
    def launcher() -> None:
        os.environ[name] = "x"
        if os.fork():
            signal.pause()
        with interruption.heeded():
            (tmp_path / "ready").touch()
            try:
                time.sleep(20)
            except Preempted as error:
                (tmp_path / "why").write_text(str(error))
        os._exit(0)

    with forked() as starter:
        pid = starter.start(launcher, tmp_path / "log")
        until((tmp_path / "ready").exists)
        os.kill(pid, number)
        assert starter.code(pid) == -number
        why = tmp_path / "why"
        until(lambda: why.exists() and why.read_text() == "the launcher is gone", 5)


def test_who_was_started_by_no_launcher_outlives_its_parent(tmp_path, monkeypatch):
    """A shell that is left with nohup ends, and the run goes on."""
    for name in interruption.LAUNCHED:
        monkeypatch.delenv(name, raising=False)

    def shell() -> None:
        if os.fork():
            until((tmp_path / "ready").exists)
            os._exit(0)
        with interruption.heeded():
            parent = os.getppid()
            (tmp_path / "ready").touch()
            until(lambda: os.getppid() != parent)
            time.sleep(2 * interruption.SECONDS_BETWEEN_LOOKS)
            (tmp_path / "reason").write_text(str(interruption.reason()))
        os._exit(0)

    with forked() as starter:
        assert starter.code(starter.start(shell, tmp_path / "log")) == 0
        reason = tmp_path / "reason"
        until(lambda: reason.exists() and reason.read_text() == "None", 5)


# -- whole runs -----------------------------------------------------------------------------------


def arguments(recipe: Path, folder: Path, *more: str) -> list[str]:
    return [
        "--config", str(recipe), "--training.output_dir", str(folder), "--training.use_cpu", "true",
        "--model.config.resid_pdrop", "0.1", "--training.logging_steps", "3",
        "--training.eval_steps", "6", "--training.max_steps", "12", "--training.save_steps", "5",
        *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def straight(smoke_recipe, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    with forked() as starter:
        run(starter, arguments(smoke_recipe, folder), folder)
    return folder


def start(starter: Forked, argv: list[str], folder: Path, hook=None) -> int:
    log = folder.with_name(f"{folder.name}.log")
    log.unlink(missing_ok=True)
    return starter.start(pretraining(argv, hook), log)


def end(starter: Forked, pid: int, folder: Path, code: int = 0) -> str:
    """Wait for the process and return what it has said."""
    found, said = starter.code(pid), folder.with_name(f"{folder.name}.log").read_text()
    assert found == code, said
    return said


def run(starter: Forked, argv: list[str], folder: Path, hook=None, code: int = 0) -> str:
    return end(starter, start(starter, argv, folder, hook), folder, code)


def in_preparation(number: int) -> None:
    def look(staging, folder, *rest) -> None:
        if folder.name == "blocks":
            send(number)

    before(artifact, "commit", look)


def in_training(number: int) -> None:
    at_update(8, lambda: send(number))


def in_evaluation(number: int) -> None:
    before(PretrainingTrainer, "evaluation_loop", lambda *_, **__: send(number))


def while_a_checkpoint_is_written(number: int) -> None:
    def look(staging, folder, *rest) -> None:
        if folder.name == "checkpoint-5":
            send(number)
            time.sleep(0.2)

    before(artifact, "commit", look)


def in_the_final_measuring(number: int) -> None:
    before(results, "load_model", lambda *_: send(number))


# And the updates after which there may be the last checkpoint then.
MOMENTS = {
    in_preparation: (),
    in_training: (8,),
    in_evaluation: (6, 7),
    while_a_checkpoint_is_written: range(6, 12),
    in_the_final_measuring: (12,),
}


QUICK = (in_training,)


@pytest.mark.parametrize(
    "moment",
    [pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow) for m in MOMENTS],
    ids=lambda moment: moment.__name__,
)
def test_a_run_that_is_asked_to_stop_goes_on_to_the_last_bit(
    smoke_recipe, straight, tmp_path, moment
):
    folders = {number: tmp_path / number.name for number in SIGNALS}
    if moment is not in_preparation:
        for folder in folders.values():
            with_data_of(straight, folder)
    with forked() as starter:
        started = {
            number: start(
                starter, arguments(smoke_recipe, folder), folder, lambda n=number: moment(n)
            )
            for number, folder in folders.items()
        }
        for number, folder in folders.items():
            said = end(starter, started[number], folder, code=EXIT_CODE)
            check_stopped(folder, said, moment, number)
            started[number] = start(starter, arguments(smoke_recipe, folder), folder)
        for number, folder in folders.items():
            end(starter, started[number], folder)
            assert differences(outcome(folder), outcome(straight)) == []


def check_stopped(folder: Path, said: str, moment, number: int) -> None:
    assert "Traceback" not in said and "error:" not in said
    status, saved = run_folder.read_status(folder), steps_saved(folder)
    assert status["state"] == "preempted"
    last = MOMENTS[moment]
    if moment is in_preparation:
        assert status["why"] == number.name and status["checkpoint"] is None and saved == []
    else:
        assert saved[-1] in last and status["checkpoint"] == f"checkpoint-{saved[-1]}"
        after = "" if moment is in_the_final_measuring else f", after update {saved[-1]}"
        assert status["why"] == f"{number.name}{after}"
        assert f"the same command goes on from {folder / status['checkpoint']}" in said
    if moment is while_a_checkpoint_is_written:
        assert saved[0] == 5
    if moment is not in_the_final_measuring:
        assert not (folder / "model.safetensors").exists()
    assert not (folder / "metrics.json").exists()
    assert not [p for p in folder.iterdir() if p.name.startswith(artifact.STAGING)]


@pytest.mark.parametrize("streaming", [False, True], ids=["workers", "streamed"])
@pytest.mark.slow
def test_a_signal_to_the_whole_group_leaves_workers_and_the_stream_to_their_parent(
    smoke_recipe, straight, tmp_path, monkeypatch, streaming
):
    more = ["--training.dataloader_num_workers", "1"]
    if streaming:
        monkeypatch.setattr("pipeline.preparation.TOKENS_PER_SEGMENT", 32)
        monkeypatch.setattr("pipeline.sources.SHARD_BYTES", (4000, 4000))
        more = ["--data.streaming", "true", "--data.hold_out", "documents"]
    folder, reference = tmp_path / "run", straight
    with forked() as starter:
        if streaming:
            reference = tmp_path / "reference"
            run(starter, arguments(smoke_recipe, reference, *more), reference)
        with_data_of(reference, folder)
        argv = arguments(smoke_recipe, folder, *more)
        said = run(
            starter, argv, folder,
            lambda: at_update(8, lambda: send(signal.SIGTERM, group=True)), code=EXIT_CODE,
        )  # fmt: skip
        assert "Traceback" not in said and "error:" not in said
        assert steps_saved(folder)[-1] == 8 and state_of(folder) == "preempted"
        run(starter, argv, folder)
    assert differences(outcome(folder), outcome(reference)) == []


@pytest.mark.slow
def test_signals_that_follow_at_once_count_as_one(smoke_recipe, straight, tmp_path):
    """Launchers send on what the process group has got already."""

    def hook() -> None:
        at_update(8, lambda: [send(number) for number in SIGNALS])
        before(
            artifact, "commit", lambda _, folder, *rest: folder.name[-1] == "8" and send(SIGNALS[1])
        )

    folder = with_data_of(straight, tmp_path / "run")
    argv = arguments(smoke_recipe, folder)
    with forked() as starter:
        run(starter, argv, folder, hook, code=EXIT_CODE)
        status = run_folder.read_status(folder)
        assert (status["state"], status["checkpoint"]) == ("preempted", "checkpoint-8")
        run(starter, argv, folder)
    assert differences(outcome(folder), outcome(straight)) == []


@pytest.mark.slow
def test_a_later_second_signal_ends_the_process_at_once(smoke_recipe, straight, tmp_path):
    def hook() -> None:
        interruption.SAME_SECONDS = 0.1
        at_update(8, hang)

    def hang() -> None:
        send(signal.SIGTERM)
        time.sleep(0.3)
        sent.write_text(str(time.time()))
        send(signal.SIGINT)
        time.sleep(30)

    folder, sent = with_data_of(straight, tmp_path / "run"), tmp_path / "sent"
    argv = arguments(smoke_recipe, folder)
    with forked() as starter:
        run(starter, argv, folder, hook, code=EXIT_CODE)
        assert time.time() - float(sent.read_text()) < 5
        status = run_folder.read_status(folder)
        assert (status["state"], status["checkpoint"]) == ("preempted", "checkpoint-5")
        assert status["why"] == "SIGTERM, and SIGINT after it"
        run(starter, argv, folder)
    assert differences(outcome(folder), outcome(straight)) == []


@pytest.mark.slow
def test_when_the_time_is_over_the_last_whole_checkpoint_stands(smoke_recipe, straight, tmp_path):
    def look(staging, folder, *rest) -> None:
        if folder.name == "checkpoint-8":
            saving.touch()
            time.sleep(30)

    def hook() -> None:
        at_update(8, lambda: send(signal.SIGUSR1))
        before(artifact, "commit", look)

    folder, saving = with_data_of(straight, tmp_path / "run"), tmp_path / "saving"
    argv = arguments(smoke_recipe, folder, "--faults.grace_seconds", "1")
    with forked() as starter:
        run(starter, argv, folder, hook, code=EXIT_CODE)
        assert 0.5 < time.time() - saving.stat().st_mtime < 5
        status = run_folder.read_status(folder)
        assert (status["state"], status["checkpoint"]) == ("preempted", "checkpoint-5")
        assert status["why"] == "SIGUSR1, and 1 seconds were not enough"
        assert not (folder / "checkpoint-8").exists()
        assert "resuming from" in run(starter, argv, folder)
    assert differences(outcome(folder), outcome(straight)) == []
