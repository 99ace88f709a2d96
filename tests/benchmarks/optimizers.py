"""Set Muon beside AdamW at equal tokens and at equal time, over seeds, on one recipe.

python tests/benchmarks/optimizers.py recipes/quickstart.yaml --seeds 1 2 3 --adamw_rate 3e-3 \
    --folder /tmp/optimizers

Muon runs the recipe as it is. AdamW runs it with its own rate, once for as many updates and once
for as many more as it makes in the time that Muon's took; the arms of a seed follow one another.
Prints a table of held-out bits per byte (files read back, fp32) with means and spreads.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Run, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--adamw_rate", required=True, help="its best learning rate, found apart")
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    arms: dict[str, list[dict[str, Any]]] = {
        "Muon": [], "AdamW, equal tokens": [], "AdamW, equal time": []
    }  # fmt: skip
    adamw = ["--optimizer.name", "adamw", "--training.learning_rate", options.adamw_rate]
    for seed in options.seeds:
        muon = trained(options, seed, "muon", ["--optimizer.name", "muon"])
        same_tokens = trained(options, seed, "adamw", adamw)
        more = update_seconds(muon) / update_seconds(same_tokens)
        updates = round(muon["updates"] * more)
        longer = trained(
            options, seed, "adamw-longer", [*adamw, "--training.max_steps", str(updates)]
        )
        for name, metrics in zip(arms, (muon, same_tokens, longer), strict=True):
            arms[name].append(metrics)
    print("| optimizer | bits per byte by seed | mean | spread | tokens | update seconds |")
    print("|---|---|---|---|---|---|")
    for name, runs in arms.items():
        bits = [run["eval_bits_per_byte"] for run in runs]
        spread = statistics.stdev(bits) if len(bits) > 1 else 0.0
        print(
            f"| {name} | {' '.join(f'{b:.4f}' for b in bits)} | {statistics.mean(bits):.4f} | "
            f"{spread:.4f} | {statistics.mean(r['train_tokens'] for r in runs) / 1e6:.2f} M | "
            f"{statistics.mean(update_seconds(r) for r in runs):.0f} |"
        )


def trained(
    options: argparse.Namespace, seed: int, name: str, overrides: list[str]
) -> dict[str, Any]:
    """Return the metrics of one run, made now unless it is there."""
    folder = options.folder / f"{name}-{seed}"
    command = [
        sys.executable, "pipeline/pretrain.py", "--config", options.recipe,
        "--training.output_dir", str(folder), "--training.seed", str(seed), *overrides,
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    metrics = json.loads((folder / "metrics.json").read_text())
    print(f"{folder.name}: {metrics['eval_bits_per_byte']:.4f} bits per byte", file=sys.stderr)
    return metrics


def update_seconds(metrics: dict[str, Any]) -> float:
    """Return what the updates took, without compilation, evaluations and checkpoints."""
    return metrics["train_tokens"] / metrics["train_tokens_per_second"]


if __name__ == "__main__":
    main()
