"""Fine-tuning at 124 million parameters: when the first update begins, and what LoRA saves.

python tests/benchmarks/fine_tuning.py [--updates 3] [--rows 1] [--block_size 256]

GPT-2 small with random weights and a tokenizer of 4,096 entries lies in a folder; each arm is
`pretrain.py` in a process of its own, on a text of 60 kB. Arms: all weights, the upper six blocks
alone, and LoRA of rank 8 on all four matrices of each block.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
ARMS = {
    "all weights": [],
    "upper six blocks": ["--model.frozen_blocks", "6", "--model.frozen_embeddings", "true"],
    "LoRA, rank 8": ["--model.lora_r", "8"],
}


def written(folder: Path) -> Path:
    """Write a text, and GPT-2 small with random weights and a small tokenizer."""
    import sysconfig

    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from pipeline.tokenizer import train_tokenizer

    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in library]
    tokenizer = train_tokenizer(texts, vocab_size=4096)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    (folder / "text.txt").write_text("".join(texts)[:60_000], encoding="utf-8")
    return folder / "gpt2"


def arm(folder: Path, more: list[str], options: argparse.Namespace) -> dict[str, float]:
    """Run one arm; return its figures."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    given = {
        "model.pretrained": folder / "gpt2", "data.files": folder / "text.txt",
        "data.block_size": options.block_size, "training.output_dir": folder / "run",
        "tokens_per_update": options.block_size * options.rows,
        "training.per_device_train_batch_size": options.rows,
        "training.max_steps": options.updates, "training.logging_steps": 1,
        "training.eval_strategy": "no", "training.save_strategy": "no",
        "training.load_best_model_at_end": "false", "evaluation.early_stopping_patience": "null",
        "evaluation.tokens": 256, "generation.prompts": "[]", "training.use_cpu": "true",
    }  # fmt: skip
    command = [
        sys.executable, "-u", str(ROOT / "pipeline" / "pretrain.py"),
        "--config", str(ROOT / "recipes" / "gpt2_finetune.yaml"),
        *[word for key, value in given.items() for word in (f"--{key}", str(value))], *more,
    ]  # fmt: skip
    started, first = time.perf_counter(), None
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        found = re.search(r"the first update took ([\d.]+) s", line)
        if found and first is None:
            first = time.perf_counter() - started - float(found[1])
    if process.wait():
        raise SystemExit("".join(lines))
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    history = json.loads((folder / "run" / "history.json").read_text())
    peak = max(log["peak_memory_bytes"] for log in history if "peak_memory_bytes" in log)
    return {
        "begins": first,
        "trained": metrics["trained_parameters"] / metrics["parameters"],
        "peak": peak,
        "rate": metrics["train_tokens_per_second"],
    }


def main() -> None:
    """Parse the options, run the arms in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--block_size", type=int, default=256)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fine-tuning-"))
    try:
        written(folder)
        found = {name: arm(folder, more, options) for name, more in ARMS.items()}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    whole = found["all weights"]
    print("| arm | first update begins after s | trained | peak MB | of all weights | tokens/s |")
    print("|---|---|---|---|---|---|")
    for name, f in found.items():
        print(
            f"| {name} | {f['begins']:.1f} | {f['trained']:.2%} | {f['peak'] / 1e6:,.0f} | "
            f"{f['peak'] / whole['peak']:.0%} | {f['rate']:.0f} |"
        )


if __name__ == "__main__":
    main()
