"""Causal attention, both passes: PyTorch's fused kernel and plain products in pieces of queries.

python tests/benchmarks/attention_kernels.py [--precision fp32]

On these figures rest `attention.QUERIES` (how many queries at a time) and
`attention.LONGEST_BLOCKWISE`. The arms take turns; all are compiled, as in training.
"""

import argparse
import statistics
import time

import torch

from pipeline import attention, machine

ROUNDS, TOKENS = 9, 2048
BLOCKS, HEADS = (64, 128, 256, 512, 1024), ((6, 32), (3, 64), (12, 64))
QUERIES = (64, 128, 256)


def main() -> None:
    """Print a line for each block and each number and width of heads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        machine.prepare_cpu()
    device = torch.device("cpu" if on_cpu else "cuda")
    precision = machine.precision(parser.parse_args().precision, on_cpu=on_cpu)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    print(f"{precision}, {TOKENS:,} tokens, ms; plain products by queries at a time\n")
    print("| block | heads x width | fused |" + "".join(f" {n} |" for n in QUERIES))
    print("|---|---|---|" + "---|" * len(QUERIES))
    for block in BLOCKS:
        for heads, width in HEADS:
            shape = TOKENS // block, heads, block, width
            medians = _medians([torch.randn(shape, device=device, dtype=dtype) for _ in range(3)])
            cells = "".join(f" {1e3 * seconds:.1f} |" for seconds in medians)
            print(f"| {block} | {heads} x {width} |{cells}", flush=True)


def _medians(inputs: list[torch.Tensor]) -> list[float]:
    """Return the seconds of each arm: fused, then each number of queries at a time."""
    torch._dynamo.reset()  # an arm is the same code with another number
    module = torch.nn.Module()
    module.is_causal = True
    arms = [(attention.sdpa_causal, attention.QUERIES)]
    arms += [(attention.blockwise_causal, queries) for queries in QUERIES]
    compiled = []
    for function, queries in arms:
        attention.QUERIES = queries

        def both_passes(function=function) -> torch.Tensor:
            return function(module, *inputs, None)[0]

        compiled.append(torch.compile(both_passes, fullgraph=True, dynamic=False))
        _seconds(compiled[-1], inputs)  # it is compiled with that number
    found: list[list[float]] = [[] for _ in arms]
    for _ in range(ROUNDS):
        for (_, attention.QUERIES), forward, seconds in zip(arms, compiled, found, strict=True):
            seconds.append(_seconds(forward, inputs))
    return [statistics.median(seconds) for seconds in found]


def _seconds(forward: object, inputs: list[torch.Tensor]) -> float:
    for tensor in inputs:
        tensor.requires_grad_().grad = None
    wait = torch.cuda.synchronize if inputs[0].is_cuda else lambda: None
    wait()
    started = time.perf_counter()
    out = forward()
    out.backward(torch.ones_like(out))
    wait()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
