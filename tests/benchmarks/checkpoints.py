"""What a checkpoint costs: training while one is written, verifying, loading, finding the place.

python tests/benchmarks/checkpoints.py [--updates 50] [--pairs 3] [--layers 17]

One run of a model of 124 million parameters; windows of updates with and without a save at their
beginning take turns, so that a machine that changes its pace changes it for both. Then the newest
checkpoint is verified and loaded, and a small run finds its place after 10 and after a million
updates.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from pipeline import artifact, checkpoint
from pipeline.arguments import training_arguments
from pipeline.model import build_model, parameter_count
from pipeline.processes import Processes
from pipeline.recipe import read_recipe
from pipeline.run_data import obtain_run_data
from pipeline.trainer import PretrainingTrainer

ROOT = Path(__file__).parent.parent.parent


def make_trainer(folder: Path, **overrides) -> PretrainingTrainer:
    """Return the trainer of the smoke recipe with other values."""
    given = {"training.output_dir": str(folder), "training.eval_strategy": "no"}
    recipe = read_recipe(ROOT / "recipes" / "smoke.yaml", given | overrides)
    recipe, arguments = training_arguments(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    data = obtain_run_data(recipe, arguments, Processes(arguments))
    model = build_model(
        recipe.model, data.tokenizer, block_size=recipe.data.block_size, seed=arguments.seed
    )
    return PretrainingTrainer(
        recipe, arguments, model=model, tokenizer=data.tokenizer, blocks=data.blocks
    )


class Windows(TrainerCallback):
    """Saves at the beginning of every second window, and notes the time of each."""

    def __init__(self, updates: int) -> None:
        self.updates, self.ends = updates, []

    def on_step_end(self, args, state, control, **kwargs):
        """Note the time; ask for a save before the windows 1, 3, 5 ..."""
        number, rest = divmod(state.global_step, self.updates)
        if rest == 0:
            self.ends.append(time.perf_counter())
            control.should_save = number % 2 == 1


def saving(folder: Path, updates: int, pairs: int, layers: int) -> PretrainingTrainer:
    """Print what a save every so many updates costs."""
    trainer = make_trainer(
        folder,
        **{
            "tokens_per_update": 256, "data.block_size": 128, "tokenizer.vocab_size": 4096,
            "model.config": {"n_layer": layers, "n_head": 12, "n_embd": 768},
            "training.per_device_train_batch_size": 2, "training.save_strategy": "no",
            "training.max_steps": updates * (2 * pairs + 1), "training.logging_steps": 1000,
            "precision": "auto",
        },
    )  # fmt: skip
    windows, stops = Windows(updates), []
    trainer.add_callback(windows)
    save = trainer._save_checkpoint

    def timed(*args):
        started = time.perf_counter()
        save(*args)
        stops.append(time.perf_counter() - started)

    trainer._save_checkpoint = timed
    writes = []
    write = trainer._writer._write

    def timed_write(*args):
        started = time.perf_counter()
        write(*args)
        writes.append(time.perf_counter() - started)

    trainer._writer._write = timed_write
    trainer.train_from("never")
    spans = [b - a for a, b in zip(windows.ends, windows.ends[1:], strict=False)]
    with_save, without = spans[0::2], spans[1::2]
    print(
        f"{parameter_count(trainer.model):,} parameters, {updates} updates of 256 tokens a window"
    )
    print(f"  with a save   {' '.join(f'{s:.1f}' for s in with_save)} s")
    print(f"  without       {' '.join(f'{s:.1f}' for s in without)} s")
    ratios = [a / b for a, b in zip(with_save, without, strict=True)]
    print(f"  ratio         median {statistics.median(ratios):.3f}")
    print(f"  training stood still for {' '.join(f'{s:.2f}' for s in stops)} s a save")
    print(f"  writing took  {' '.join(f'{s:.1f}' for s in writes)} s in the background")
    return trainer


def loading(trainer: PretrainingTrainer, folder: Path) -> None:
    """Print what verifying a checkpoint takes beside loading it."""
    newest = checkpoint.checkpoints(folder)[-1]
    size = sum(f["size"] for f in artifact.read_manifest(newest)["files"].values())
    for attempt in ("first", "again"):
        started = time.perf_counter()
        assert artifact.damage(newest) is None
        verified = time.perf_counter()
        trainer._training_state.put_back_weights(newest)
        trainer._training_state.put_back_optimizer(newest)
        loaded = time.perf_counter()
        seconds = verified - started
        print(
            f"  {size / 1e9:.2f} GB {attempt}: verified in {seconds:.2f} s "
            f"({seconds / size * 1e9:.2f} s per GB), loaded in {loaded - verified:.2f} s"
        )


def place(folder: Path) -> None:
    """Print how long a run takes from its checkpoint to its next batch, early and late."""
    trainer = make_trainer(folder, **{"training.max_steps": 10, "training.save_steps": 10})
    trainer.train_from("never")
    trainer._writer.wait()
    for step in (10, 1_000_000):
        newest = checkpoint.checkpoints(folder)[-1]
        state = json.loads((newest / "trainer_state.json").read_text())
        state["global_step"] = step
        rates = torch.load(newest / "scheduler.pt")
        moved = folder / "moved" / f"checkpoint-{step}"
        with artifact.staged(moved, artifact.read_manifest(newest)["made_from"]) as (new, facts):
            for path in newest.iterdir():
                if path.name != artifact.MANIFEST:
                    (new / path.name).write_bytes(path.read_bytes())
            (new / "trainer_state.json").write_text(json.dumps(state))
            torch.save(rates | {"last_epoch": step}, new / "scheduler.pt")
            facts |= artifact.read_manifest(newest)["facts"] | {"step": step}
        again = make_trainer(
            folder.parent / f"from-{step}",
            **{"training.max_steps": step + 1, "training.save_strategy": "no"},
        )
        first = []
        train = again.training_step
        again.training_step = lambda *a, first=first, train=train: (
            first.append(time.perf_counter()) or train(*a)
        )
        started = time.perf_counter()
        again.train_from(str(moved))
        print(f"  after {step:>9,} updates: {first[0] - started:.3f} s from --resume to the batch")


def main() -> None:
    """Run all three."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=17)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place_:
        folder = Path(place_)
        place(folder / "small")
        trainer = saving(folder / "large", options.updates, options.pairs, options.layers)
        loading(trainer, folder / "large")


if __name__ == "__main__":
    main()
