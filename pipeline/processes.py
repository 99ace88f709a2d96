"""What the processes of one run tell each other: one decides and the others hear of it."""

import datetime
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import TrainingArguments

from pipeline.recipe import InputError, InputErrorTold
from pipeline.rendezvous import join

T = TypeVar("T")


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
