"""Tokens per second of whole runs by accelerate config and number of processes, in turns.

python tests/benchmarks/scaling.py [--arms cpu.yaml:1 cpu_2.yaml:2] [--rounds 3] [--updates 150]
python tests/benchmarks/scaling.py --arms single_gpu.yaml:1 ddp.yaml:8 --weak \
    --recipe recipes/gpt2_small.yaml -- --data.files python:packages --tokenizer.pretrained null ...

An arm is a file of accelerate_configs and a number of processes. The update is the recipe's for all
arms, and divided by them; with --weak every process has all of it, and the rate is per process.
What follows `--` is laid over the recipe. Counted is the time of the updates after the first.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline.recipe import read_recipe

ROOT = Path(__file__).parent.parent.parent
ALONE = {  # nothing but updates
    "training.eval_strategy": "no", "training.save_strategy": "no", "evaluation.tokens": 256,
    "training.load_best_model_at_end": "false", "evaluation.early_stopping_patience": "null",
    "generation.prompts": "[]",
}  # fmt: skip


def measured(arm: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Run one arm, and return its numbers; prepared text is kept in `folder` for the next one."""
    config, count = arm.split(":")
    run = folder / "run"
    for path in run.glob("*"):
        if path.name not in ("tokenizer", "blocks") and not path.name.startswith("_digests"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    tokens = read_recipe(Path(options.recipe), {}).tokens_per_update
    given = ALONE | {
        "training.output_dir": run, "training.max_steps": options.updates,
        "tokens_per_update": tokens * int(count) if options.weak else tokens,
    }  # fmt: skip
    launch = [
        Path(sys.executable).with_name("accelerate"), "launch", "--quiet", "--config_file",
        ROOT / "accelerate_configs" / config, "--num_processes", count, "--main_process_port", "0",
        ROOT / "pipeline" / "pretrain.py", "--config", options.recipe,
    ]  # fmt: skip
    words = [*launch, *(w for key, value in given.items() for w in (f"--{key}", value))]
    done = subprocess.run([*map(str, words), *options.more], cwd=ROOT, capture_output=True)
    if done.returncode:
        sys.exit(f"{arm}:\n{(done.stdout + done.stderr).decode()[-3000:]}")
    return json.loads((run / "metrics.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arms", nargs="+", default=["cpu.yaml:1", "cpu_2.yaml:2"])
    parser.add_argument("--recipe", default=str(ROOT / "recipes" / "quickstart.yaml"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--weak", action="store_true")
    parser.add_argument("more", nargs="*")
    options = parser.parse_args()
    rates: dict[str, list[float]] = {arm: [] for arm in options.arms}
    losses = {}
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        for _ in range(options.rounds):
            for arm in options.arms:
                found = measured(arm, Path(folder), options)
                rates[arm].append(found["train_tokens_per_second"])
                losses[arm] = found["eval_loss"]
                print(
                    f"{arm}: {found['world_size']} process(es), {found['threads']} thread(s) each, "
                    f"{rates[arm][-1]:,.0f} tokens/s",
                    flush=True,
                )
    print("\n| arm | tokens/s | x the first, by round | median | loss |")
    print("|---|---|---|---|---|")
    first = rates[options.arms[0]]
    for arm, of in rates.items():
        ratios = [one / base for one, base in zip(of, first, strict=True)]
        if options.weak:  # per process
            ratios = [
                r * int(options.arms[0].split(":")[1]) / int(arm.split(":")[1]) for r in ratios
            ]
        print(
            f"| {arm} | {statistics.median(of):,.0f} | {', '.join(f'{r:.2f}' for r in ratios)} | "
            f"{statistics.median(ratios):.2f} | {losses[arm]:.4f} |"
        )


if __name__ == "__main__":
    main()
