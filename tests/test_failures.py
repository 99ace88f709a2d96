"""What one of several processes says of its end: nothing that another one says."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from forked import forked, until

from pipeline import failures
from pipeline.command_line import enter
from pipeline.recipe import InputError, InputErrorTold, RunFailed

LOST = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:45453")


@pytest.fixture
def ended(tmp_path, monkeypatch):
    """A function that runs a door which raises `error`; returns its code and what it says."""
    monkeypatch.setattr(failures, "SECONDS_FOR_MAIN", 0.05)
    for name in failures.RANKS:
        monkeypatch.delenv(name, raising=False)

    def run(error: BaseException, **environment: str) -> tuple[int, str]:
        def door() -> None:
            raise error

        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        with forked() as starter:
            code = starter.code(starter.start(lambda: enter(door), log, **environment))
        return code, log.read_text()

    return run


@pytest.mark.parametrize("rank", [{}, {"RANK": "0"}])
def test_alone_or_as_the_main_process_it_says_all(ended, rank):
    assert ended(InputError("no file"), **rank) == (2, "error: no file\n")
    assert ended(RunFailed("the loss is none"), **rank) == (1, "error: the loss is none\n")
    code, said = ended(ValueError("a bug"), **rank)
    assert code == 1 and said.startswith("Traceback (most") and said.endswith("Error: a bug\n")
    assert ended(KeyboardInterrupt(), **rank) == (130, "\ninterrupted\n")


@pytest.mark.parametrize("name", failures.RANKS)
def test_another_says_what_is_its_own_and_who_it_is(ended, name):
    who = f"process 3 ({socket.gethostname()}): "
    assert ended(InputError("no file"), **{name: "3"}) == (2, f"{who}error: no file\n")
    code, said = ended(ValueError("a bug"), **{name: "3"})
    assert code == 1 and said.startswith(f"{who}Traceback (most") and said.count("Trace") == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [(InputErrorTold("no file"), 2), (RunFailed("no loss"), 1), (KeyboardInterrupt(), 130)],
)
def test_another_does_not_repeat_the_main_process(ended, error, code):
    assert ended(error, RANK="3") == (code, "")


WARNS = """
import logging, warnings
from pipeline.command_line import enter

def door():
    import datasets, transformers
    warnings.warn("of a library")
    logging.getLogger("pipeline.model").warning("of ours")
    logging.getLogger("accelerate").warning("of accelerate")
    transformers.utils.logging.get_logger("transformers.trainer").warning("of transformers")
    list(datasets.Dataset.from_dict({"a": [1]}).map(lambda row: row))

enter(door)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_main_process_alone_warns(rank):
    environment = {k: v for k, v in os.environ.items() if k not in failures.RANKS}
    done = subprocess.run(
        [sys.executable, "-c", WARNS], capture_output=True, text=True, cwd=ROOT,
        env=environment | {"RANK": rank},
    )  # fmt: skip
    assert done.returncode == 0
    words = ["of a library", "of ours", "of accelerate", "of transformers", "Map: 100%"]
    said = done.stdout + done.stderr
    assert [word in said for word in words] == [rank == "0"] * 5
    assert rank == "0" or said == ""


def test_what_all_come_to_is_said_by_the_main_process_whose_launcher_ends_the_others(
    tmp_path, monkeypatch
):
    waiting = tmp_path / "waiting"

    def sleep(_: float) -> None:
        waiting.touch()
        signal.pause()

    def door() -> None:
        monkeypatch.setattr(time, "sleep", sleep)
        raise InputError("no file")

    with forked() as starter:
        pid = starter.start(lambda: enter(door), tmp_path / "log", RANK="1")
        until(waiting.exists)
        os.kill(pid, signal.SIGTERM)
        assert starter.code(pid) == -signal.SIGTERM
    assert (tmp_path / "log").read_text() == ""


def test_of_a_machine_the_first_says_it(ended, tmp_path):
    files = [tmp_path / str(rank) / "error.json" for rank in (0, 1)]
    for file in files:
        file.parent.mkdir()
    (code, said), *_ = (
        ended(InputError("no file"), RANK=str(8 + rank), TORCHELASTIC_ERROR_FILE=str(file))
        for rank, file in enumerate(files)
    )
    assert code == 2 and said.startswith("process 8 (")
    again = ended(InputError("no file"), RANK="9", TORCHELASTIC_ERROR_FILE=str(files[1]))
    assert again == (2, "") and all(file.exists() for file in files)


def chained(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("error", [LOST, chained(KeyError("grad"), LOST)])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_connection_that_another_broke_is_no_failure_of_ones_own(ended, rank, error):
    assert ended(error, RANK=rank) == (
        1,
        f"process {rank}: ends because another process has ended; its output, or the launcher's, "
        "says why\n",
    )


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(104, "Connection reset by peer"),  # to the Hub
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ],
)
def test_other_connections_and_errors_are(ended, error):
    assert "Traceback" in ended(error, RANK="0")[1]


def test_the_launchers_table_names_the_cause(ended, tmp_path):
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    file = tmp_path / "error.json"
    before = int(time.time())
    ended(ValueError("a bug"), RANK="1", TORCHELASTIC_ERROR_FILE=str(file))
    failure = ProcessFailure(local_rank=1, pid=9, exitcode=1, error_file=str(file))
    assert failure.message["message"] == "ValueError: a bug"
    assert before <= failure.timestamp <= time.time()
    assert "py_callstack" not in json.loads(file.read_text())["message"]["extraInfo"]
    file.unlink()
    ended(LOST, RANK="0", TORCHELASTIC_ERROR_FILE=str(file))
    assert not file.exists()
