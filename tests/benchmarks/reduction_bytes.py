"""How many bytes an update sends between processes, beside what `pipeline.communication` computes.

python tests/benchmarks/reduction_bytes.py [--processes 2] [--updates 4]

Starts processes that train a small GPT-2 over gloo, and counts what passes the loopback device
during a number of updates: in a network namespace of their own where the system lets a user make
one, so that nobody else's bytes are counted.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ALONE = "REDUCTION_BYTES_ALONE"  # set in the namespace, and in the processes
SHAPE = (4, 256, 4, 4096, 128)  # layers, width, heads, vocabulary, positions: 4.2 million weights
# What is measured: topology, batches in an update, bytes of a gradient on its way.
CASES = [("ddp", 1, 4), ("ddp", 4, 4), ("ddp", 1, 2), ("fsdp2", 1, 4), ("fsdp2", 4, 4)]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--updates", type=int, default=4)
    given = parser.parse_args()
    if ALONE not in os.environ:
        start_alone()
    elif "RANK" in os.environ:
        train(given.updates)
    else:
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]
        command = [*launch, str(given.processes), __file__, "--updates", str(given.updates)]
        sys.exit(subprocess.run(command).returncode)


def start_alone() -> None:
    """Run this again in a network namespace of its own; where there is none, say so."""
    command, environment = [sys.executable, *sys.argv], os.environ | {ALONE: "1"}
    spaces = ["unshare", "--user", "--map-root-user", "--net"]
    if shutil.which("unshare") and subprocess.run([*spaces, "true"]).returncode == 0:
        command = [*spaces, "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
    else:
        print("no network namespace here: others' bytes on the loopback device count, too")
    sys.exit(subprocess.run(command, env=environment).returncode)


def sent() -> int:
    """Return the bytes that the loopback device has sent (proc(5), net/dev)."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split()[9])


def train(updates: int) -> None:
    """Be one of the processes: train in each case, and count."""
    import torch
    import torch.distributed as dist

    from pipeline.communication import traffic
    from pipeline.planning import Shape, parameters

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    shape = Shape(*SHAPE)
    if rank == 0:
        print(f"{parameters(shape):,} parameters, {count} processes, {updates} updates each; MB")
        print("| topology | batches | gradient | computed | on the wire | more |")
        print("|---|---|---|---|---|---|")
    for topology, batches, reduce_bytes in CASES:
        model = made(shape, topology, reduce_bytes)
        update(model, topology, batches)  # what is set up once is not counted
        update(model, topology, batches)
        dist.barrier()
        before = sent()
        dist.barrier()
        for _ in range(updates):
            update(model, topology, batches)
        dist.barrier()
        each = (sent() - before) / updates / count / 1e6
        dist.barrier()
        asked = {"accumulation": batches, "reduce_bytes": reduce_bytes, "gather_bytes": 4}
        computed = sum(traffic(shape, topology=topology, devices=count, **asked)[:2]) / 1e6
        if rank == 0:
            print(
                f"| {topology} | {batches} | {'fp32' if reduce_bytes == 4 else 'bf16'} | "
                f"{computed:.2f} | {each:.2f} | {each / computed - 1:+.1%} |",
                flush=True,
            )
    dist.destroy_process_group()


def made(shape, topology: str, reduce_bytes: int):
    """Return a GPT-2 as accelerate wraps it."""
    from accelerate.utils.fsdp_utils import _find_final_norm
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=shape.layers, n_embd=shape.width, n_head=shape.heads, vocab_size=shape.vocabulary,
        n_positions=shape.positions, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    if topology == "ddp":
        model = DistributedDataParallel(model)
        if reduce_bytes == 2:
            model.register_comm_hook(None, bf16_compress_hook)
        return model
    for block in model.transformer.h:  # as accelerate's fsdp2_prepare_model does
        fully_shard(block)
    ends = [_find_final_norm(model), model.get_input_embeddings(), model.get_output_embeddings()]
    fully_shard(ends, reshard_after_forward=False)
    fully_shard(model)
    return model


def update(model, topology: str, batches: int) -> None:
    """Make the passes of one update; gradients are reduced in the last of them."""
    import contextlib

    import torch

    ids = torch.randint(0, SHAPE[3], (2, SHAPE[4]))
    for batch in range(batches):
        is_last = batch == batches - 1
        waiting = contextlib.nullcontext()
        if topology == "fsdp2":
            model.set_requires_gradient_sync(is_last)
        elif not is_last:
            waiting = model.no_sync()
        with waiting:
            model(ids, labels=ids).loss.backward()
    model.zero_grad()


if __name__ == "__main__":
    main()
