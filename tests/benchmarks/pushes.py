"""A hundred pushes to a Hub that goes wrong: what becomes of the runs, and what gets there.

python tests/benchmarks/pushes.py [--runs 10] [--rate 0.25] [--seed 0]

Tiny runs push each of their ten checkpoints and their result to a Hub on 127.0.0.1. It refuses the
token, forbids, reports conflicts, too many requests and failures of its own, closes connections
before, during and after the work, hangs, and sends slowly, each at random; in the last run it is
gone altogether after the start. Then the command that the run has printed is run, with the Hub
whole again. Compared are the weights with those of a run that pushes nothing, and what the Hub
holds with what the run has saved.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from conftest import make_texts  # noqa: E402
from forked import forked, pretraining  # noqa: E402
from huggingface_hub import constants  # noqa: E402
from loopback_hub import USER, LoopbackHub  # noqa: E402

from pipeline.push_list import PushList  # noqa: E402

SLOW = "slow:3000"  # bytes a second
FAULTS = (
    401, 403, 409, (429, {"Retry-After": "1"}), 500, 503, "drop", "drop_after", "cut", "hang", SLOW,
)  # fmt: skip
NAMES = {401: "401", 403: "403", 409: "409", 500: "500", 503: "503"}
RECIPE = """
tokens_per_update: 256
precision: fp32
tokenizer: {{vocab_size: 384}}
data: {{files: {text}, block_size: 32}}
model: {{config: {{n_layer: 2, n_head: 2, n_embd: 32}}}}
hub: {{timeout_seconds: 6}}
training:
  max_steps: 20
  learning_rate: 1e-3
  per_device_train_batch_size: 8
  save_steps: 2
  save_total_limit: 2
  output_dir: {folder}
"""


def written(folder: Path) -> Path:
    """Write text and recipe of one run, and return the recipe."""
    text = folder.parent / "text.txt"
    if not text.exists():
        text.write_text("\n\n".join(make_texts(60)), encoding="utf-8")
    recipe = folder.parent / f"{folder.name}.yaml"
    recipe.write_text(RECIPE.format(text=text, folder=folder))
    return recipe


def ended(folder: Path, environment: dict[str, str], *more: str) -> tuple[int, float]:
    """Run pretrain.py to its end; return exit code and seconds."""

    def see() -> None:
        constants.ENDPOINT = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
        constants.HF_HUB_OFFLINE = False

    argv, started = ["--config", str(written(folder)), *more], time.perf_counter()
    with forked() as starter:
        pid = starter.start(pretraining(argv, see), folder.with_suffix(".log"), **environment)
        code = starter.code(pid, seconds=900)
    return code, time.perf_counter() - started


def main() -> None:
    """Parse the options, make the runs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--rate", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="pushes-"))
    try:
        measure(place, options.runs, options.rate, options.seed)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def measure(place: Path, runs: int, rate: float, seed: int) -> None:
    """Print a line for each run, and what they come to."""
    alone = place / "alone"
    code, seconds = ended(alone, {})
    assert code == 0, alone.with_suffix(".log").read_text()
    weights = (alone / "model.safetensors").read_bytes()
    print(f"without pushing: {seconds:.0f} s")
    print("| run | ends with | s | same weights | requests | gone wrong | sent by the run | "
          "missing | missing after the command |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    total: Counter[str] = Counter()
    for number in range(runs):
        with LoopbackHub() as hub:
            folder = place / f"run-{number}"
            environment = hub.environment(place / "home") | {"PYTHONPATH": str(ROOT)}
            is_gone = number == runs - 1
            _begin(hub, seed + number, rate, is_gone)
            name = f"{USER}/{folder.name}"
            more = ["--training.push_to_hub", "true", "--training.hub_model_id", name]
            code, seconds = ended(folder, environment, *more)
            hub.random_faults(0, 0)
            hub.release()
            same = (folder / "model.safetensors").read_bytes() == weights
            wrong = [f for f in hub.happened] if hasattr(hub, "happened") else []
            listed = PushList(folder)
            sent, missing = len(listed.sent), len(listed.waiting)
            done = subprocess.run(
                [sys.executable, str(ROOT / "pipeline" / "publish.py"), "--run", str(folder)],
                env=os.environ | environment, capture_output=True, text=True,
            )  # fmt: skip
            left = _left(hub, name, folder)
            total.update(runs=1, pushes=sent + missing, sent=sent, missing=missing, left=left,
                         ended=code == 0, same=same, wrong=len(wrong))  # fmt: skip
            print(f"| {number}{' (Hub gone)' if is_gone else ''} | {code} | {seconds:.0f} | {same} "
                  f"| {len(hub.log)} | {_counted(wrong)} | {sent} | {missing} | {left} "
                  f"(code {done.returncode}) |", flush=True)  # fmt: skip
    print(json.dumps(total))


def _begin(hub: LoopbackHub, seed: int, rate: float, is_gone: bool) -> None:
    """Let things go wrong once the run has seen that it may push."""
    keep = hub._fault
    hub.happened = []

    def fault(request: str):
        if "/commit/" in request and hub._random is None and not hub.happened:
            hub.random_faults(seed, 1.0 if is_gone else rate, ("drop",) if is_gone else FAULTS)
        found = keep(request)
        if found is not None:
            hub.happened.append(found)
        return found

    hub._fault = fault


def _counted(wrong: list) -> str:
    kinds = Counter(str(f[0] if isinstance(f, tuple) else f).partition(":")[0] for f in wrong)
    return f"{len(wrong)}: " + ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))


def _left(hub: LoopbackHub, name: str, folder: Path) -> int:
    """Return how many of the ten checkpoints and the result are not on the Hub as they were."""
    history = hub.history(name)
    titles = {commit.title for commit in history}
    wanted = [f"After {step} of 20 updates" for step in range(2, 20, 2)]
    wanted += ["After 20 updates", "The result after 20 updates"]
    missing = sum(title not in titles for title in wanted)
    is_result = hub.files(name)["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    return missing + (not is_result)


if __name__ == "__main__":
    main()
