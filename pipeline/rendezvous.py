"""How the processes of a launcher find one another, and through which network."""

import datetime
import os
import socket

import psutil
import torch.distributed as dist

from pipeline.recipe import CutOff, first_line

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
