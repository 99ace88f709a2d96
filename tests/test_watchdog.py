"""What hangs is ended with its stack; what only waits, or was suspended, is not."""

import os
import signal
import subprocess
import sys
import time

import pytest

CODE = """
import sys, time
from pipeline import watchdog
watchdog.SECONDS_LATE = 0.3
dog = watchdog.Watchdog(0.4, rank=0, count=1)
dog.last_words = lambda why: open(sys.argv[1], "w").write(why)
with dog:
    print("in", flush=True)
    {act}
print("out", flush=True)
"""


def started(tmp_path, act: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CODE.format(act=act), str(tmp_path / "why")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_what_hangs_is_ended_with_its_stack_and_last_words(tmp_path):
    process = started(tmp_path, "time.sleep(30)")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "process 0 of 1" in said and "nothing has happened for" in said
    assert 'File "<string>", line' in said
    assert "in the start" in (tmp_path / "why").read_text()


@pytest.mark.slow
def test_what_goes_on_or_may_take_long_is_left_alone(tmp_path):
    beats = "[(time.sleep(0.1), dog.beat('update')) for _ in range(10)]"
    process = started(tmp_path, f"{beats}\n    with dog.paused(): time.sleep(1)")
    said, wrong = process.communicate(timeout=60)
    assert process.returncode == 0 and said == "in\nout\n", wrong


@pytest.mark.slow
def test_a_process_that_was_suspended_goes_on(tmp_path):
    beats = "[(time.sleep(0.05), dog.beat('update')) for _ in range(20)]"
    process = started(tmp_path, beats)
    assert process.stdout.readline() == "in\n"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGCONT)
    said, wrong = process.communicate(timeout=60)
    assert process.returncode == 0 and said == "out\n", wrong
