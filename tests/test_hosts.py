"""Two machines train together, and end and go on when the network between them breaks."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from conftest import ROOT
from forked import (
    Forked,
    at_update,
    differences,
    forked,
    history,
    outcome,
    pretraining,
    start_ranks,
    steps_saved,
    until,
    with_data_of,
)

from pipeline import run_folder
from pipeline.rendezvous import interface_to

pytestmark = pytest.mark.slow

HANG_SECONDS = 5
NEW_NETWORK = 0x40000000  # CLONE_NEWNET of sched.h


def arguments(recipe: Path, folder: Path, *more: str) -> list[str]:
    return [
        "--config", str(recipe), "--training.output_dir", str(folder), "--training.use_cpu", "true",
        "--training.eval_steps", "6", "--training.max_steps", "12", "--training.save_steps", "5",
        "--training.logging_steps", "1", *more,
    ]  # fmt: skip


class Hosts:
    """Two network namespaces joined by a cable, one for each machine."""

    addresses = ("10.113.0.1", "10.113.0.2")

    def __init__(self) -> None:
        self.names = [f"host{rank}-{os.getpid()}" for rank in (0, 1)]

    def build(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        first, second = self.names
        far = ("type", "veth", "peer", "name", "cable1", "netns", second)
        ip("-n", first, "link", "add", "cable0", *far)
        for rank, name in enumerate(self.names):
            ip("-n", name, "addr", "add", f"{self.addresses[rank]}/24", "dev", f"cable{rank}")
        self.join()

    def join(self) -> None:
        for rank, name in enumerate(self.names):
            ip("-n", name, "link", "set", f"cable{rank}", "up")
        until(lambda: "LOWER_UP" in ip("-n", self.names[0], "link", "show", "cable0"))

    def cut(self) -> None:
        """Let nothing through any more, and let no end hear of it."""
        ip("-n", self.names[1], "link", "set", "cable1", "down")

    def enter(self, rank: int) -> None:
        """Put this process onto a machine; it must have one thread."""
        with open(f"/var/run/netns/{self.names[rank]}") as namespace:
            assert ctypes.CDLL(None).setns(namespace.fileno(), NEW_NETWORK) == 0

    def remove(self) -> None:
        for name in self.names:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                for pid in ip("netns", "pids", name).split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                ip("netns", "delete", name)


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    made = Hosts()
    try:
        made.build()
        yield made
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        pytest.skip(f"two machines need `ip netns` of iproute2, and the rights of root: {said}")
    finally:
        made.remove()


# -- what the launchers start ---------------------------------------------------------------------


# pretrain.py, which at update 8 tells that it is there, the first time, and waits to be cut off.
DRIVER = """
import sys, time
from pathlib import Path

sys.path.insert(0, {tests!r})
from forked import at_update

from pipeline import pretrain
from pipeline.command_line import enter


def reached():
    if not Path({place!r}).exists():
        Path({place!r}).touch()
        time.sleep(2)


if __name__ == "__main__":
    at_update(8, reached)
    enter(pretrain.main)
"""


@contextlib.contextmanager
def launched(hosts: Hosts, folder: Path, argv: list[str]) -> Iterator[list[subprocess.Popen]]:
    """Yield `accelerate launch` of each machine, running, with the file that tells of update 8."""
    script, config, place = (folder.with_name(n) for n in ("driver.py", "config.yaml", "reached"))
    script.write_text(DRIVER.format(tests=str(ROOT / "tests"), place=str(place)))
    values = yaml.safe_load((ROOT / "accelerate_configs" / "multi_node_ddp.yaml").read_text())
    config.write_text(yaml.safe_dump(values | {"num_processes": 2, "use_cpu": True}))
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch", "--quiet"]
    launcher += ["--config_file", str(config), "--main_process_ip", hosts.addresses[0]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("GLOO_SOCKET_IFNAME", None)
    running = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *launcher, "--machine_rank", str(rank), script, *argv],
            cwd=ROOT, stdout=said_of(folder, rank).open("w"), stderr=subprocess.STDOUT,
            env=environment, start_new_session=True,
        )
        for rank, name in enumerate(hosts.names)
    ]  # fmt: skip
    try:
        yield running
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def said_of(folder: Path, rank: int) -> Path:
    return folder.with_name(f"{folder.name}.said.{rank}")


class Two(NamedTuple):
    """What became of a run on two machines that were cut apart, and went on."""

    folder: Path
    seconds: float
    codes: list[int]
    said: list[str]
    status: dict
    saved: list[int]
    codes_then: list[int]
    said_then: list[str]


@pytest.fixture(scope="module")
def alone(smoke_recipe, tmp_path_factory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    with forked() as starter:
        log = folder.with_name("log")
        pids = start_ranks(starter, 1, arguments(smoke_recipe, folder), log)
        assert starter.code(pids[0]) == 0, log.with_name("log.0").read_text()
    return folder


@pytest.fixture(scope="module")
def two(hosts, smoke_recipe, alone, tmp_path_factory) -> Two:
    folder = with_data_of(alone, tmp_path_factory.mktemp("two") / "run")
    argv = arguments(smoke_recipe, folder, "--faults.hang_seconds", str(HANG_SECONDS))
    said = [said_of(folder, rank) for rank in (0, 1)]
    with launched(hosts, folder, argv) as running:
        until(folder.with_name("reached").exists, 120)
        hosts.cut()
        began = time.monotonic()
        until(lambda: None not in [process.poll() for process in running], 120)
        seconds = time.monotonic() - began
    first = (seconds, [p.returncode for p in running], [s.read_text() for s in said])
    first += (run_folder.read_status(folder), steps_saved(folder))
    hosts.join()
    with launched(hosts, folder, argv) as running:
        codes = [process.wait(120) for process in running]
    return Two(folder, *first, codes, [s.read_text() for s in said])


def test_a_machine_that_is_cut_off_ends_both_and_their_launchers_in_the_time_given(two):
    assert two.codes == [1, 1]
    assert two.seconds < HANG_SECONDS + 20
    for rank, behind in enumerate(("process 1 was last heard of ", "the process that keeps the")):
        assert f"error: process {rank} of 2 (" in two.said[rank]
        assert f"process {rank}; {behind}" in two.said[rank]
    assert two.status["state"] == "failed"
    assert "nothing has happened for " in two.status["why"]
    assert two.saved == [5]


def test_then_the_same_commands_go_on_to_the_last_bit(hosts, two, smoke_recipe, alone, tmp_path):
    assert two.codes_then == [0, 0], "\n".join(two.said_then)
    assert f"resuming from {two.folder}/checkpoint-5" in two.said_then[0]
    folder = with_data_of(alone, tmp_path / "run")
    with forked() as starter:
        pids = start(starter, hosts, arguments(smoke_recipe, folder), folder)
        assert [starter.code(pid) for pid in pids] == [0, 0]
    assert differences(outcome(two.folder), outcome(folder)) == []


def test_two_machines_learn_what_one_process_does_and_one_of_them_tells(two, alone):
    one, other = (history(folder / "checkpoint-12") for folder in (alone, two.folder))
    for name in ("loss", "eval_loss", "grad_norm", "learning_rate"):
        values, same = ([e[name] for e in h if name in e] for h in (other, one))
        assert values == pytest.approx(same, rel=1e-5) and len(same) >= 2
    assert ["held-out loss" in said for said in two.said_then] == [True, False]
    assert "update 12/12" not in two.said_then[1]


# -- without launchers ----------------------------------------------------------------------------


def start(
    starter: Forked, hosts: Hosts, argv: list[str], folder: Path, hook=None, addresses=None
) -> list[int]:
    """Start one process on each machine; `addresses` are where each looks for the first."""

    def on(rank: int):
        def prepare() -> None:
            hosts.enter(rank)
            if hook is not None:
                hook()

        return prepare

    return [
        starter.start(
            pretraining(argv, on(rank)), said_of(folder, rank),
            RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="1",
            GROUP_RANK=str(rank), MASTER_PORT="29500",
            ACCELERATE_DYNAMO_BACKEND="no",  # a launcher's sign: threads follow from it
            MASTER_ADDR=(addresses or [hosts.addresses[0]] * 2)[rank],
        )
        for rank in (0, 1)
    ]  # fmt: skip


def test_a_collective_ends_after_ddp_timeout(hosts, smoke_recipe, alone, tmp_path):
    folder, place = with_data_of(alone, tmp_path / "run"), tmp_path / "reached"

    def hook() -> None:
        at_update(8, lambda: (place.touch(), time.sleep(1)))

    hosts.join()
    argv = arguments(smoke_recipe, folder, "--training.ddp_timeout", "4")
    with forked() as starter:
        pids = start(starter, hosts, argv, folder, hook)
        until(place.exists)
        hosts.cut()
        began = time.monotonic()
        codes = [starter.code(pid) for pid in pids]
    said = [said_of(folder, rank).read_text() for rank in (0, 1)]
    assert codes == [1, 1], "\n".join(said)
    assert time.monotonic() - began < 20
    for rank in (0, 1):
        sentence = f"process {rank}: another process has not answered for training.ddp_timeout"
        assert sentence in said[rank]
    status = run_folder.read_status(folder)
    assert status["state"] == "failed" and "Timed out waiting 4000ms" in status["why"]


def test_a_process_that_reaches_no_other_says_so_on_its_own_machine(
    hosts, smoke_recipe, alone, tmp_path
):
    folder = with_data_of(alone, tmp_path / "run")
    hosts.join()
    argv = arguments(smoke_recipe, folder, "--training.ddp_timeout", "3")
    with forked() as starter:
        wrong = (hosts.addresses[0], "10.113.0.9")
        pids = start(starter, hosts, argv, folder, addresses=wrong)
        assert [starter.code(pid) for pid in pids] == [1, 1]
    for rank in (0, 1):
        said = said_of(folder, rank).read_text()
        assert f"error: process {rank} of 2 (machine {rank}, " in said, said
        assert "has no connection to the others" in said and "Traceback" not in said
        assert "--main_process_ip is an address of machine 0" in said
        assert f"GLOO_SOCKET_IFNAME, here cable{rank}, names" in said


def test_the_interface_is_the_one_that_leads_to_the_main_process(hosts, tmp_path):
    hosts.join()

    def look() -> None:
        hosts.enter(1)
        found = [interface_to(host) for host in (*hosts.addresses, "127.0.0.1", "192.0.2.1")]
        (tmp_path / "found").write_text(repr(found))

    with forked() as starter:
        assert starter.code(starter.start(look, tmp_path / "log")) == 0
    assert (tmp_path / "found").read_text() == "['cable1', 'cable1', 'lo', None]"
