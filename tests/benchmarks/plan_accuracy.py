"""What a plan says beside what runs measure: peak memory, operations, tokens a second, on the CPU.

python tests/benchmarks/plan_accuracy.py [--tokenizer openai-community/gpt2] [--only 6x384]

Each shape trains in a process of its own by pretrain.py, with evaluations and checkpoints, and its
metrics.json is read. Memory is the process's resident peak (VmHWM). Operations are counted by
`torch.utils.flop_counter` on the eager attention: its formulas leave out the fused one on CPUs.
Tokens a second are planned with the assumed MFU, and with the figures of the first run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from optimizer_step import Tokenizer
from torch.utils.flop_counter import FlopCounterMode

from pipeline.hardware import hardware
from pipeline.model import build_model
from pipeline.peak_memory import peak
from pipeline.planning import SIZES, Shape, flops_by_part, parameters, training_flops
from pipeline.sections import ModelSection

ROOT = Path(__file__).parent.parent.parent


class Case(NamedTuple):
    """A run, and what of it a plan asks."""

    name: str
    shape: Shape
    rows: int
    block_size: int
    precision: str
    updates: int
    optimizer: str = "adamw"
    accumulated: int = 1
    is_checkpointed: bool = False
    is_compiled: bool = False

    @property
    def words(self) -> str:
        """What is special about it."""
        words = [self.precision, self.optimizer]
        words += ["compiled"] * self.is_compiled + ["checkpointing"] * self.is_checkpointed
        return ", ".join(words + [f"{self.accumulated} batches"] * (self.accumulated > 1))


CASES = (
    Case("4x128", Shape(4, 128, 2, 2048, 128), 16, 128, "bf16", 40, "muon", is_compiled=True),
    Case("6x384", Shape(6, 384, 6, 4096, 256), 8, 256, "fp32", 12),
    Case("6x384", Shape(6, 384, 6, 4096, 256), 8, 256, "bf16", 12),
    Case("124M", SIZES["124M"]._replace(positions=512), 2, 512, "fp32", 4),
    Case("124M", SIZES["124M"]._replace(positions=512), 2, 512, "bf16", 4),
    Case("124M", SIZES["124M"]._replace(positions=512), 2, 512, "bf16", 4, "muon"),
    Case("124M", SIZES["124M"], 1, 1024, "bf16", 4),
    Case("124M", SIZES["124M"]._replace(positions=512), 2, 512, "fp32", 4, is_checkpointed=True),
    Case("4x192", Shape(4, 192, 3, 4096, 128), 16, 128, "bf16", 12, "adamw", 2, is_compiled=True),
    Case("8x512", Shape(8, 512, 8, 8192, 256), 16, 256, "fp32", 6, is_checkpointed=True),
)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", default="openai-community/gpt2", help="for 124M")
    parser.add_argument("--only", help="the shape of that name")
    given = parser.parse_args()
    print(
        "| shape | rows x block | | peak planned, MB | measured | off | most is held in |", end=""
    )
    print(" FLOP/token planned | counted | tokens/s assumed MFU | MFU of the first | measured |")
    print("|" + "---|" * 12, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        text, first = Path(folder) / "text.txt", None
        modules = sorted(Path(os.__file__).parent.glob("*.py"))[:60]
        text.write_text("\n".join(module.read_text(errors="replace") for module in modules))
        for number, case in enumerate(CASES):
            if given.only in (None, case.name):
                run = train(case, Path(folder) / str(number), text, given.tokenizer)
                first = first or run
                print(row(case, run, first), flush=True)


def train(case: Case, folder: Path, text: Path, tokenizer: str) -> Path:
    """Return the folder of a finished run."""
    shape = case.shape
    own = shape.vocabulary != SIZES["124M"].vocabulary
    values = {
        "training.output_dir": folder, "data.files": text, "precision": case.precision,
        "tokens_per_update": case.rows * case.block_size * case.accumulated,
        "tokenizer.vocab_size": shape.vocabulary if own else "null",
        "tokenizer.pretrained": "null" if own else tokenizer,
        "data.block_size": case.block_size,
        "model.config": json.dumps(
            {"n_layer": shape.layers, "n_head": shape.heads, "n_embd": shape.width}
        ),
        "optimizer.name": case.optimizer, "evaluation.tokens": 2048,
        "data.validation_fraction": 0.01, "data.test_fraction": 0.01,
        "training.max_steps": case.updates, "training.per_device_train_batch_size": case.rows,
        "training.gradient_checkpointing": str(case.is_checkpointed).lower(),
        "training.torch_compile": str(case.is_compiled).lower(),
        "training.eval_steps": case.updates // 2, "training.save_steps": case.updates // 2,
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "pipeline" / "pretrain.py")]
    command += ["--config", str(ROOT / "recipes" / "smoke.yaml")]
    command += [part for name, value in values.items() for part in (f"--{name}", str(value))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return folder


def row(case: Case, run: Path, first: Path) -> str:
    """Return a line of the table."""
    have = json.loads((run / "metrics.json").read_text())
    shape = case.shape._replace(
        vocabulary=json.loads((run / "config.json").read_text())["vocab_size"]
    )
    planned = peak(
        shape, rows=case.rows, block_size=case.block_size, precision=case.precision,
        optimizer=case.optimizer, is_accumulating=case.accumulated > 1,
        is_checkpointed=case.is_checkpointed, is_compiled=case.is_compiled,
        is_blockwise=case.block_size <= 512,
    )  # fmt: skip
    measured = have["peak_memory_bytes"]
    flops = sum(flops_by_part(shape, block_size=case.block_size).values())
    each = training_flops(shape, case.block_size)
    cpu = hardware("cpu").of_step(parameters(shape), is_compiled=case.is_compiled)
    assumed = cpu.rate(case.precision) / each
    devices = hardware(str(first))
    by_first = devices.device.mfu * have["product_rate_flops"] / each
    cells = [
        case.name, f"{case.rows} x {case.block_size}", case.words, f"{planned.total / 1e6:,.0f}",
        f"{measured / 1e6:,.0f}", f"{planned.total / measured - 1:+.1%}", planned.phase,
        f"{flops:,.0f}", f"{counted(case, shape):,.0f}", f"{assumed:,.0f}", f"{by_first:,.0f}",
        f"{have['train_tokens_per_second']:,.0f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def counted(case: Case, shape: Shape) -> float:
    """Return the operations of a training step per token, as PyTorch counts them."""
    config = {"n_layer": shape.layers, "n_head": shape.heads, "n_embd": shape.width}
    section = ModelSection(config=config, attn_implementation="eager")
    size = case.block_size
    model = build_model(section, Tokenizer(shape.vocabulary), block_size=size, seed=0)
    ids = torch.zeros(1, size, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    return counter.get_total_flops() / size


if __name__ == "__main__":
    main()
