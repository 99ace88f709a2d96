"""What the processes of one run tell each other: one decides and the others hear of it."""

import datetime
import os
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import TrainingArguments

from pipeline.recipe import CutOff, InputError, InputErrorTold, first_line

T = TypeVar("T")

# torchrun counts its restarts here; it keeps its store over them.
ATTEMPT = "TORCHELASTIC_RESTART_COUNT"

# What a launcher says to each process that it starts.
_SAID = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def join(backend: str, *, timeout: float = 1800.0) -> None:
    """Set up the process group of a launched process where the libraries would do it differently.

    On a CPU transformers 5.24 does not pass `ddp_timeout` on. And after a restart torchrun's store
    still has the addresses of the processes before, which torch 2.13 reads: gloo then fails or
    hangs at random. With names of its own every attempt is the first.

    Args:
        timeout: seconds that a process waits for another, here and in each collective.

    Raises:
        CutOff: the others cannot be reached.
    """
    if not all(name in os.environ for name in _SAID) or dist.is_initialized():
        return
    _choose_interface()
    attempt = os.environ.get(ATTEMPT, "0")
    if backend != "gloo" and attempt == "0":
        return
    patience = datetime.timedelta(seconds=timeout)
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=patience))
        own = dist.PrefixStore(f"attempt {attempt}", store)
        dist.init_process_group(backend, store=own, rank=rank, world_size=count, timeout=patience)
    except dist.DistError as error:
        raise CutOff(_alone(first_line(error))) from None


def _alone(why: str) -> str:
    """Return the sentence of a process that has found no other."""
    said = os.environ
    machine = f"machine {said.get('GROUP_RANK', 0)}, {socket.gethostname()}"
    sentence = (
        f"process {said['RANK']} of {said['WORLD_SIZE']} ({machine}) has no connection to the "
        f"others: {why}"
    )
    if _are_on_one_machine():
        return sentence
    return (
        f"{sentence}; see that --main_process_ip is an address of machine 0 that every machine "
        "reaches (a name may mean 127.0.0.1 there), that no firewall stands between them, and that "
        f"GLOO_SOCKET_IFNAME, here {said.get('GLOO_SOCKET_IFNAME')}, names this one's interface to "
        "the others"
    )


def _are_on_one_machine() -> bool:
    return os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]


def _choose_interface() -> None:
    """Have gloo use the network that leads to the main process.

    By itself it takes the address that the host's own name has, and many systems give that name
    127.0.0.1: no address for another machine.
    """
    if not _are_on_one_machine() and "GLOO_SOCKET_IFNAME" not in os.environ:
        name = interface_to(os.environ["MASTER_ADDR"])
        if name is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = name


def interface_to(host: str) -> str | None:
    """Return the name of this machine's network interface to a host; None if there is none."""
    try:
        family, *_, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as asking:
            asking.connect(address)  # which sends nothing
            own = asking.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if own in [one.address for one in addresses]:
            return name
    return None


class Processes:
    """The processes that train together, seen from one of them.

    Attributes:
        rank: which one this is, from 0; 0 is the main process.
        count: how many there are.
    """

    def __init__(self, arguments: TrainingArguments) -> None:
        """Take them as `TrainingArguments` has set them up."""
        self.rank, self.count = arguments.process_index, arguments.world_size
        self._group: dist.ProcessGroup | None = None
        self._vote: tuple[dist.Work, torch.Tensor] | None = None

    @classmethod
    def launched(cls) -> "Processes":
        """Return the processes that a launcher started together, or this one alone."""
        on_cpu = not torch.cuda.is_available()
        join("gloo" if on_cpu else "nccl")
        state = PartialState(cpu=on_cpu)
        return cls(
            SimpleNamespace(process_index=state.process_index, world_size=state.num_processes)
        )

    @classmethod
    def alone(cls) -> "Processes":
        """Return this process, whatever others there are."""
        return cls(SimpleNamespace(process_index=0, world_size=1))

    @classmethod
    def existing(cls) -> "Processes":
        """Return those of the process group that there is; without one, this process alone."""
        known = dist.is_available() and dist.is_initialized()
        rank, count = (dist.get_rank(), dist.get_world_size()) if known else (0, 1)
        return cls(SimpleNamespace(process_index=rank, world_size=count))

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes, prints and decides."""
        return self.rank == 0

    def told(self, decide: Callable[[], T], *, patiently: bool = False) -> T:
        """Return in every process what `decide` returns in the main one.

        Args:
            patiently: the others wait for as long as it takes; else for as long as for any
                collective (`ddp_timeout`).

        Raises:
            InputError: the main process raised it; then all do.
        """
        if self.count == 1:
            return decide()
        said: list[Any] = [None, None]
        if self.is_main:
            try:
                said = [decide(), None]
            except InputError as error:
                said = [None, str(error)]
        dist.broadcast_object_list(said, src=0, group=self._hosts if patiently else None)
        if said[1] is not None:
            raise InputError(said[1]) if self.is_main else InputErrorTold(said[1])
        return said[0]

    def main_first(self, make: Callable[[], T]) -> T:
        """Return what `make` returns in each process; the others wait until the main one is done.

        What takes long then happens once: the others find it on the disk.

        Raises:
            InputError: the main process raised it; then all do.
        """
        made: list[T] = []
        self.told(lambda: made.append(make()), patiently=True)
        return made[0] if made else make()

    def gathered(self, value: T) -> list[T]:
        """Return every process's value, in the order of their ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def any_of(self, flag: bool) -> bool:
        """Return whether any process said so, the same in all; of several, one call later.

        The votes travel between the hosts while the devices compute: waiting for them at once
        would cost every update a round trip.
        """
        if self.count == 1:
            return flag
        before, vote = self._vote, torch.tensor([int(flag)])
        self._vote = (
            dist.all_reduce(vote, dist.ReduceOp.MAX, group=self._hosts, async_op=True),
            vote,
        )
        if before is None:
            return False
        before[0].wait()
        return bool(before[1].item())

    def end_vote(self) -> None:
        """Wait for the last vote; all processes have voted equally often."""
        if self._vote is not None:
            self._vote[0].wait()
            self._vote = None

    @property
    def _hosts(self) -> dist.ProcessGroup:
        """A group between the hosts; all processes ask for it first at the same place."""
        if self._group is None:
            # Of its own: a vote must not come between the device's collectives.
            month = datetime.timedelta(days=30)  # a hang is the watchdog's business
            self._group = dist.new_group(backend="gloo", timeout=month)
        return self._group
