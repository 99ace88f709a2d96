"""Whether memory stays flat: many updates of the smoke recipe, with evaluations and checkpoints.

python tests/benchmarks/memory.py [--updates 20000]

Prints the resident memory of the process after every twentieth of the run, and by how much the
last is above that after the first.
"""

import argparse
import gc
import tempfile
import time
from pathlib import Path

import psutil
from checkpoints import make_trainer
from transformers import TrainerCallback


class Memory(TrainerCallback):
    """Notes resident memory, in bytes, every so many updates."""

    def __init__(self, every: int) -> None:
        self.every, self.seen, self.started = every, [], time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Note it."""
        if state.global_step % self.every == 0:
            gc.collect()
            self.seen.append(psutil.Process().memory_info().rss)
            print(
                f"update {state.global_step:>6}: {self.seen[-1] / 1e6:.1f} MB, "
                f"{time.perf_counter() - self.started:.0f} s",
                flush=True,
            )


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=20_000)
    updates = parser.parse_args().updates
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            Path(folder) / "run",
            **{
                "training.max_steps": updates, "training.eval_strategy": "steps",
                "training.eval_steps": 100, "training.save_steps": 100,
                "training.disable_tqdm": "true",
            },
        )  # fmt: skip
        memory = Memory(updates // 20)
        trainer.add_callback(memory)
        trainer.train_from("never")
    print(f"the last is {memory.seen[-1] / memory.seen[0] - 1:+.2%} of the first")


if __name__ == "__main__":
    main()
