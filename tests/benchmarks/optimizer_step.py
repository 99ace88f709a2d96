"""What an update costs by Muon and by AdamW, beside the forward and backward pass of a batch.

python tests/benchmarks/optimizer_step.py 4x128 4x192 124M

Muon's cost does not grow with the tokens of an update, the passes' does: the last column is the
number of tokens from which on Muon takes at most a tenth of an update. The arms take turns.
"""

import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from training_speed import shape_of

from pipeline import attention, machine
from pipeline.model import build_model
from pipeline.optimizer import muon
from pipeline.sections import ModelSection, OptimizerSection

ROUNDS = 7
AS_IN_A_RECIPE = SimpleNamespace(
    weight_decay=0.1, learning_rate=1e-3, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8
)


class Tokenizer:
    """As much of one as a model is made from."""

    eos_token_id = 0

    def __init__(self, size: int) -> None:
        """Have so many entries."""
        self._size = size

    def __len__(self) -> int:
        """Return the number of entries."""
        return self._size


def main() -> None:
    """Print a line for each shape named on the command line."""
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        machine.prepare_cpu()
    device = torch.device("cpu" if on_cpu else "cuda")
    print("| shape | tokens | passes ms | AdamW ms | Muon ms | Muon is a tenth from tokens |")
    print("|---|---|---|---|---|---|")
    for name in sys.argv[1:] or ("4x128", "4x192", "124M"):
        shape = shape_of(name, on_cpu=on_cpu)
        vocabulary, rows, block = (shape[key] for key in ("vocabulary", "batch", "block"))
        sizes = {"n_layer": "layers", "n_embd": "width", "n_head": "heads"}
        section = ModelSection(
            config={key: shape[value] for key, value in sizes.items()},
            attn_implementation=attention.fastest(
                block_size=block, attend_across=True, on_cpu=on_cpu
            ),
        )
        model = build_model(section, Tokenizer(vocabulary), block_size=block, seed=0).to(device)
        model.config.use_cache = False
        model.compile(fullgraph=True, dynamic=False)
        ids = torch.randint(0, vocabulary, (rows, block), device=device)
        dtype = torch.bfloat16 if machine.has_bf16(device.type) else torch.float32

        def passes(model=model, ids=ids, dtype=dtype) -> None:
            model.zero_grad()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()

        arms: list[Callable[[], None]] = [
            passes,
            torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True).step,
            muon(model, OptimizerSection(name="muon"), AS_IN_A_RECIPE).step,
        ]
        seconds: list[list[float]] = [[] for _ in arms]
        for number in range(ROUNDS + 1):
            for arm, found in zip(arms, seconds, strict=True):
                took = timed(arm, device)
                if number:  # the first compiles and makes the state
                    found.append(took)
        made, adamw, muons = (statistics.median(found) for found in seconds)
        tokens = rows * block
        tenth = 9 * muons / (made / tokens)
        print(
            f"| {name} | {tokens:,} | {1e3 * made:,.1f} | {1e3 * adamw:,.1f} | "
            f"{1e3 * muons:,.1f} | {tenth:,.0f} |",
            flush=True,
        )


def timed(act: Callable[[], None], device: torch.device) -> float:
    """Return the seconds that something takes, the device waited for."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    act()
    wait()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
