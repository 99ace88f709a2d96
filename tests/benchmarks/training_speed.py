"""How fast a training step is: ours beside nanoGPT, a stock Trainer and a bare loop, in turns.

python tests/benchmarks/training_speed.py --shape 4x192,124M [--nanogpt CHECKOUT] [--levers]

Every arm is a process of its own that makes a window of steps when it is told to and sleeps
otherwise, so that a machine that changes its pace changes it for all; peak memory and compilation
are one arm's. All begin with the same weights and see the same rows in the same order; dropout and
weight decay are 0, AdamW is fused, the rate 1e-3, gradients are clipped at 1. nanoGPT is a checkout
given by its path; without one it is left out. With --levers also the ladder from a stock model to
ours, and each lever taken alone out of the full set (a machine then holds seven arms at once: their
weights and optimizers all the time, the rest of an arm only while it has its turn).
"""

import argparse
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import training_inputs
from training_arms import LEVERS, ON_CPU_ONLY, Job, work
from training_tables import about_this_run, print_tables

from pipeline.planning import flops_per_token

GPT2 = {"vocabulary": 50257, "batch": 16, "block": 1024}
SMALL = {"vocabulary": 4096}
SHAPES = {
    "4x128": {"layers": 4, "width": 128, "heads": 2, "batch": 16, "block": 128, "vocabulary": 2048},
    "4x192": {"layers": 4, "width": 192, "heads": 3, "batch": 16, "block": 128, **SMALL},
    "6x384": {"layers": 6, "width": 384, "heads": 6, "batch": 8, "block": 256, **SMALL},
    "124M": {"layers": 12, "width": 768, "heads": 12, **GPT2},
    "355M": {"layers": 24, "width": 1024, "heads": 16, **GPT2},
    "1558M": {"layers": 48, "width": 1600, "heads": 25, **GPT2},
}
ON_CPU = {"batch": 2, "block": 512}  # of GPT-2's own sizes
SECONDS_TO_ANSWER = 3600
# Later the same arithmetic in another order leads to other weights; the first steps show mistakes.
COMPARED_STEPS = 20
FURTHEST = {"fp32": 1e-3, "bf16": 2e-2}  # fp32: relative, bf16: in nats
UNTIMED_PRODUCTS, TIMED_PRODUCTS = 3, 8
MAIN = {"nanoGPT": "nanoGPT", "stock Trainer": "stock", "bare loop": "loop", "ours": "ours"}
NOT_AS_USUAL = {"nanoGPT eager": "nanoGPT", "stock Trainer compiled": "stock"}


class ArmDied(Exception):
    """A process has ended; the message says why."""


class Arm:
    """One arm, seen from the parent: a process, and the seconds of its windows."""

    def __init__(self, job: Job, log: Path) -> None:
        """Start it, and wait until it could make its first step."""
        self.job = job
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, job, log))
        self._process.start()
        theirs.close()  # so that its end is noticed
        self.found: dict[str, Any] = {"name": job.name, "seconds": [], "waiting": []}
        try:
            self._answer()
        except ArmDied:
            self.kill()
            raise

    def window(self, *, first: bool = False) -> float:
        """Let it make a window of steps; return the seconds of a step."""
        self._pipe.send("go")
        answer = self._answer()
        per_step = answer["seconds"] / self.job.steps
        if first:
            self.found["first_window_seconds"] = answer["whole_seconds"]
        else:
            self.found["seconds"].append(per_step)
            self.found["waiting"].append(answer["waiting"] / answer["seconds"])
        return per_step

    def end(self) -> None:
        """Ask for what it has found besides, and let it go."""
        self._pipe.send("end")
        self.found |= self._answer()
        self._process.join()

    def kill(self) -> None:
        """End its process, whatever it does."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()

    def _answer(self) -> dict[str, Any]:
        try:
            if not self._pipe.poll(SECONDS_TO_ANSWER):
                raise ArmDied(f"said nothing for {SECONDS_TO_ANSWER} s")
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            why = "killed, most likely for memory" if code == -9 else f"exit code {code}"
            raise ArmDied(why) from None
        if "error" in answer:
            raise ArmDied(answer["error"])
        return answer


def main() -> None:
    """Measure every shape that is asked for, print the tables, compare the losses."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # the arms end with us
    with tempfile.TemporaryDirectory() as place:
        folder = options.folder or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        shapes = [_measure_shape(name, options, folder / name) for name in options.shape]
    about = about_this_run(options)
    said = [sentence for shape in shapes for sentence in shape.pop("disagreements")]
    if options.json:
        options.json.write_text(json.dumps({"about": about, "shapes": shapes}, indent=1))
    for shape in shapes:
        print(f"\n{about['line']}")
        print_tables(shape)
    if said:
        sys.exit("; ".join(said))


def _options() -> argparse.Namespace:
    from pipeline import machine

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="4x192", help=f"{', '.join(SHAPES)}; several, or all")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--levers", action="store_true", help="also the ladder and levers alone")
    parser.add_argument("--only", help="these arms, names separated by commas")
    parser.add_argument("--windows", type=int, default=5, help="timed ones, of every arm")
    parser.add_argument("--steps", type=int, default=20, help="timed ones in a window")
    parser.add_argument("--settle", type=int, help="steps before those (1; on a GPU 3)")
    for name in ("batch", "block", "heads", "threads"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--folder", type=Path, help="work here, and leave what arms have said")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    options = parser.parse_args()
    import torch

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = options.device == "cpu"
    options.precision = machine.precision(options.precision, on_cpu=on_cpu)
    names = [n for n in SHAPES if not on_cpu or n not in ("355M", "1558M")]
    options.shape = names if options.shape == "all" else options.shape.split(",")
    if unknown := set(options.shape) - set(SHAPES):
        parser.error(f"--shape: {', '.join(unknown)}: known are {', '.join(SHAPES)} and all")
    if options.nanogpt is not None and not (options.nanogpt / "model.py").is_file():
        parser.error(f"--nanogpt: {options.nanogpt} has no model.py")
    options.nanogpt = options.nanogpt and options.nanogpt.resolve()
    options.settle = (1 if on_cpu else 3) if options.settle is None else options.settle
    if min(options.windows, options.steps) < 1 or options.settle < 0:
        parser.error("--windows and --steps are at least 1, --settle at least 0")
    if on_cpu:
        machine.prepare_cpu()  # finds the number of threads
        options.threads = options.threads or torch.get_num_threads()
        torch.set_num_threads(options.threads)
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    else:
        torch.set_float32_matmul_precision("high")  # the arms compute fp32 in TF32 too
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return options


def shape_of(name: str, *, on_cpu: bool) -> dict[str, int]:
    """Return the sizes of a model and of a batch of a step."""
    is_large = SHAPES[name]["vocabulary"] == GPT2["vocabulary"]
    return SHAPES[name] | (ON_CPU if is_large and on_cpu else {})


def _measure_shape(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return what all arms have shown with one shape."""
    shape = shape_of(name, on_cpu=options.device == "cpu")
    given = {k: getattr(options, k) for k in ("batch", "block", "heads") if getattr(options, k)}
    shape = shape | given
    folder.mkdir()
    # A warm-up window, the timed ones, and a step that nobody asks for.
    steps = (options.windows + 1) * (options.settle + options.steps) + 1
    print(f"{name}: {shape}, {steps} steps at most", flush=True)
    training_inputs.prepare(
        folder, shape, steps=steps, precision=options.precision, cpu=options.device == "cpu"
    )
    common = {
        "folder": folder, "shape": shape, "device": options.device, "threads": options.threads or 0,
        "precision": options.precision, "settle": options.settle, "steps": options.steps,
        "total_steps": steps, "nanogpt": options.nanogpt,
    }  # fmt: skip
    rates: dict[str, list[float]] = {}
    died: dict[str, str] = {}
    groups = {
        group: _measure(
            group,
            [Job(**fields, **common, own_cache=group == "main") for fields in jobs],
            options,
            rates,
            died,
        )
        for group, jobs in _groups(options).items()
    }
    result = {
        "name": name,
        "shape": shape,
        "precision": options.precision,
        "compared_steps": COMPARED_STEPS,
        "flop_per_token": _flop_per_token(shape),
        "matrix_products_flop_per_second": {k: statistics.median(r) for k, r in rates.items()},
        "groups": groups,
        "died": died,
    }
    found = {a["name"]: a for arms in groups.values() for a in arms}
    result["loss_difference"], result["disagreements"] = _disagreement(found, name, options)
    return result


def _groups(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Return the arms, as fields of `Job`, in groups that take turns."""
    every = frozenset(LEVERS)
    usable = [lever for lever in LEVERS if options.device == "cpu" or lever not in ON_CPU_ONLY]
    full = {"name": "bare loop", "kind": "loop", "levers": every}
    main = [{"name": n, "kind": kind, "levers": every} for n, kind in MAIN.items()]
    unusual = [{"name": n, "kind": k, "compiled": "compiled" in n} for n, k in NOT_AS_USUAL.items()]
    for arm in main:
        arm["compiled"] = arm["name"] != "stock Trainer"
    ladder = [{"name": "stock model", "kind": "loop", "levers": frozenset()}]
    for count, lever in enumerate(usable, start=1):
        so_far = frozenset(usable[:count])
        ladder.append({"name": f"+ {lever}", "kind": "loop", "levers": so_far})
    # With the last one it is the bare loop, also where some levers do not exist.
    ladder[-1] = full | {"name": f"{ladder[-1]['name']} = bare loop"}
    alone = [full] + [
        {"name": f"all but {lever}", "kind": "loop", "levers": every - {lever}} for lever in usable
    ]
    groups = {"main": main + unusual, "ladder": ladder, "levers alone": alone}
    if options.only:
        known = {arm["name"]: arm for arms in groups.values() for arm in arms}
        names = [name.strip() for name in options.only.split(",")]
        if unknown := set(names) - set(known):
            sys.exit(f"--only: {', '.join(unknown)}: known are {', '.join(known)}")
        groups = {"main": [known[name] for name in names]}
    elif not options.levers:
        groups = {"main": main}
    if options.nanogpt is None and any(arm["kind"] == "nanoGPT" for arm in groups["main"]):
        print("nanoGPT is left out: no --nanogpt")
        groups["main"] = [arm for arm in groups["main"] if arm["kind"] != "nanoGPT"]
    return groups


def _measure(
    group: str,
    jobs: list[Job],
    options: argparse.Namespace,
    rates: dict[str, list[float]],
    died: dict[str, str],
) -> list[dict[str, Any]]:
    """Let the arms of a group take turns; return what each has found, the dead left out."""
    arms: list[Arm] = []

    def tried(name: str, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except ArmDied as error:
            died[name] = str(error)
            print(f"  {name} died: {error}; going on without", flush=True)
            for arm in [arm for arm in arms if arm.job.name == name]:
                arm.kill()
                arms.remove(arm)

    try:
        for number, job in enumerate(jobs):
            log = job.folder / f"{group.replace(' ', '_')}-{number}.log"
            if arm := tried(job.name, lambda job=job, log=log: Arm(job, log)):
                arms.append(arm)
                tried(job.name, lambda arm=arm: arm.window(first=True))
            if arm in arms:
                print(f"  {job.name}: first window {arm.found['first_window_seconds']:.1f} s")
        for number in range(options.windows):
            _measure_products(options, rates)
            said = {a.job.name: tried(a.job.name, a.window) for a in list(arms)}
            shown = ", ".join(f"{n} {1000 * s:.1f}" for n, s in said.items() if s is not None)
            print(f"  round {number + 1} of {options.windows}: {shown} ms a step", flush=True)
        for arm in list(arms):
            tried(arm.job.name, arm.end)
        return [arm.found for arm in arms]
    finally:
        for arm in arms:
            arm.kill()


def _measure_products(options: argparse.Namespace, rates: dict[str, list[float]]) -> None:
    """Add FLOP/s of a few large matrix products: what this machine could do just now."""
    import torch

    on_gpu = options.device == "cuda"
    size = 8192 if on_gpu else 2048
    for name, dtype in {"bf16": torch.bfloat16, "fp32": torch.float32}.items():
        if name == "bf16" and options.precision == "fp32":
            continue  # emulated where the processor does not have it
        left, right = (torch.randn(size, size, device=options.device).to(dtype) for _ in range(2))
        for attempt in range(UNTIMED_PRODUCTS + TIMED_PRODUCTS):
            if on_gpu:
                torch.cuda.synchronize()
            started = time.perf_counter()
            left @ right
            if on_gpu:
                torch.cuda.synchronize()
            if attempt >= UNTIMED_PRODUCTS:
                seconds = time.perf_counter() - started
                rates.setdefault(name, []).append(2 * size**3 / seconds)
        del left, right
    if on_gpu:
        torch.cuda.empty_cache()


def _flop_per_token(shape: dict[str, int]) -> int:
    """Return 6 N + 12 layers x width x block; of N the tied head counts once."""
    layers, width, block = shape["layers"], shape["width"], shape["block"]
    embeddings = (shape["vocabulary"] + block) * width
    count = embeddings + layers * (12 * width**2 + 13 * width) + 2 * width
    return flops_per_token(parameters=count, layers=layers, width=width, block_size=block)


def _disagreement(
    arms: dict[str, dict[str, Any]], shape: str, options: argparse.Namespace
) -> tuple[dict[str, float], list[str]]:
    """Return the largest differences of losses at the same step, and a sentence if too large."""
    found, furthest, blamed = {"early": 0.0, "ever": 0.0}, FURTHEST[options.precision], ""
    for one, other in itertools.combinations(arms.values(), 2):
        pairs = zip(one["losses"], other["losses"], strict=False)
        for step, (left, right) in enumerate(pairs, start=1):
            difference = abs(left - right) / (right if options.precision == "fp32" else 1)
            found["ever"] = max(found["ever"], difference)
            # Written so that a loss that is not a number is a difference.
            if step <= COMPARED_STEPS and not difference <= found["early"]:
                found["early"] = difference
                blamed = f"{one['name']} {left:.4f} and {other['name']} {right:.4f} at step {step}"
    if found["early"] <= furthest:
        return found, []
    return found, [f"{shape}: the losses of {blamed} differ by more than {furthest:g}"]


if __name__ == "__main__":
    main()
