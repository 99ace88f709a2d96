"""What a parameter costs each process besides activations, by topology, in bytes of memory.

python tests/benchmarks/topology_memory.py [--processes 2]

Trains GPT-2 on the CPU over gloo and reads what each process has for itself, after the first and
after the last batch of an update of two, less what it had before there was a model.
"""

import argparse
import ctypes
import gc
import os
import sys

import psutil
from reduction_bytes import ALONE, launch, made, passes, start_alone

TOPOLOGIES = ("none", "ddp", "fsdp2")
_M_MMAP_THRESHOLD = -3  # <malloc.h>


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--topology", choices=TOPOLOGIES, help="of one run; all by default")
    given = parser.parse_args()
    if ALONE not in os.environ:
        start_alone()
    elif "RANK" in os.environ:
        train(given.topology)
    else:
        print("| topology | after the first batch | after the last |")
        print("|---|---|---|", flush=True)
        for topology in TOPOLOGIES:
            launch(given.processes, __file__, "--topology", topology)


def train(topology: str) -> None:
    """Be one of the processes."""
    import torch
    import torch.distributed as dist

    from pipeline.planning import Shape

    if sys.platform == "linux":  # what is free goes back to the kernel at once
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 64 * 1024)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    small = made(Shape(2, 32, 2, 4096, 128), topology, 4)  # what is loaded once is not counted
    passes(small, topology, True)
    del small
    gc.collect()
    before = psutil.Process().memory_full_info().uss
    model = made(Shape(8, 512, 8, 4096, 128), topology, 4)
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(3):
        found = []
        for is_last in (False, True):
            passes(model, topology, is_last)
            gc.collect()
            found.append((psutil.Process().memory_full_info().uss - before) / parameters)
        optimizer.step()
        optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"| {topology} | {found[0]:.1f} | {found[1]:.1f} |", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
