"""How many bytes an update sends between processes, beside what `pipeline.communication` computes.

python tests/benchmarks/reduction_bytes.py [--processes 2] [--updates 4]

Starts processes that train a small GPT-2 over gloo, and counts what passes the loopback device
during a number of updates: in a network namespace of their own where the system lets a user make
one, so that nobody else's bytes are counted. Then two whole runs of pretrain.py, one of them ten
times as long, and what its further updates sent: everything that our loop sends is in it.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
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
        print("MB that each process sends in an update", flush=True)
        print("| topology | batches | gradient | computed | on the wire | more |")
        print("|---|---|---|---|---|---|", flush=True)
        launch(given.processes, __file__, "--updates", str(given.updates))
        whole_runs(given.processes)


def launch(processes: int, *command: str) -> None:
    """Start processes, and wait for their end."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    subprocess.run([*torchrun, *command], check=True)


def whole_runs(processes: int) -> None:
    """Print what an update of pretrain.py sends."""
    from pipeline.communication import traffic
    from pipeline.planning import Shape

    bytes_sent, updates = [], (10, 100)
    layers, width, heads, vocabulary, positions = SHAPE
    values = {
        "tokens_per_update": 4 * processes * positions, "data.block_size": positions,
        "tokenizer.vocab_size": vocabulary, "training.per_device_train_batch_size": 2,
        "model.config": f"{{n_layer: {layers}, n_head: {heads}, n_embd: {width}}}",
        "training.eval_strategy": "no", "training.save_strategy": "no", "training.use_cpu": "true",
        "training.logging_steps": 1000, "training.disable_tqdm": "true",
    }  # fmt: skip
    for number in updates:
        with tempfile.TemporaryDirectory() as folder:
            asked = values | {"training.max_steps": number, "training.output_dir": f"{folder}/run"}
            options = [word for key, value in asked.items() for word in (f"--{key}", str(value))]
            before = sent()
            recipe = ["--config", str(ROOT / "recipes" / "smoke.yaml")]
            launch(processes, str(ROOT / "pipeline" / "pretrain.py"), *recipe, *options)
            bytes_sent.append(sent() - before)
    each = (bytes_sent[1] - bytes_sent[0]) / (updates[1] - updates[0]) / processes
    computed = traffic(Shape(*SHAPE), topology="ddp", devices=processes).reduced
    print(line("pretrain.py", 2, 4, computed, each))


def line(what: str, batches: int, reduce_bytes: int, computed: float, found: float) -> str:
    """Return a row of the table."""
    gradient = "fp32" if reduce_bytes == 4 else "bf16"
    return (
        f"| {what} | {batches} | {gradient} | {computed / 1e6:.2f} | {found / 1e6:.2f} | "
        f"{found / computed - 1:+.1%} |"
    )


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
    from pipeline.memory_bound import FP32
    from pipeline.planning import Shape, parameters

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, count, shape = dist.get_rank(), dist.get_world_size(), Shape(*SHAPE)

    def counted(act) -> float:
        """Return what each process sends when all do it; what is set up once does not count."""
        act()
        act()
        dist.barrier()
        before = sent()
        dist.barrier()
        for _ in range(updates):
            act()
        dist.barrier()
        found = (sent() - before) / updates / count
        dist.barrier()
        return found

    for topology, batches, reduce_bytes in CASES:
        model = made(shape, topology, reduce_bytes)
        found = counted(lambda: update(model, topology, batches))  # noqa: B023
        asked = {"accumulation": batches, "reduce_bytes": reduce_bytes}
        of_one = traffic(shape, topology=topology, devices=count, **asked)
        if rank == 0:
            computed = of_one.gathered + of_one.reduced
            print(line(topology, batches, reduce_bytes, computed, found), flush=True)
    whole = torch.zeros(parameters(shape) // count * count)
    part = torch.zeros(len(whole) // count)
    found = counted(lambda: dist.reduce_scatter_tensor(part, whole))
    if rank == 0:
        computed = (count - 1) * FP32 * len(part)
        print(line("a reduce-scatter alone", 1, FP32, computed, found), flush=True)
    dist.destroy_process_group()


def made(shape, topology: str, reduce_bytes: int):
    """Return a GPT-2 as accelerate wraps it."""
    from accelerate.utils.fsdp_utils import _find_final_norm
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
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        if reduce_bytes == 2:
            model.register_comm_hook(None, in_bf16)
        return model
    if topology == "none":
        return model
    for block in model.transformer.h:  # as accelerate's fsdp2_prepare_model does
        fully_shard(block)
    ends = [_find_final_norm(model), model.get_input_embeddings(), model.get_output_embeddings()]
    fully_shard(ends, reshard_after_forward=False)
    fully_shard(model)
    return model


def in_bf16(state, bucket):
    """Reduce gradients in bf16, as PyTorch's bf16_compress_hook does, which refuses gloo."""
    import torch.distributed as dist

    small = bucket.buffer().bfloat16() / dist.get_world_size()
    future = dist.all_reduce(small, async_op=True).get_future()
    return future.then(lambda reduced: bucket.buffer().copy_(reduced.value()[0]))


def update(model, topology: str, batches: int) -> None:
    """Make the passes of one update; gradients are reduced in the last of them."""
    for batch in range(batches):
        passes(model, topology, batch == batches - 1)
    model.zero_grad()


def passes(model, topology: str, is_last: bool) -> None:
    """Make both passes of a batch, as accelerate's `no_sync` has them made."""
    import torch

    ids = torch.randint(0, SHAPE[3], (2, SHAPE[4]))
    waiting = contextlib.nullcontext()
    if topology == "fsdp2":
        model.set_requires_gradient_sync(is_last)
    elif topology == "ddp" and not is_last:
        waiting = model.no_sync()
    with waiting:
        model(ids, labels=ids).loss.backward()


if __name__ == "__main__":
    main()
