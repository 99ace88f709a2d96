"""Sweeps over learning rates: short runs of the recipe's own updates, of which nothing is kept."""

import contextlib
import copy
import functools
import gc
import logging
import math
import shutil
import time
from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from pipeline import rate_suggestion
from pipeline.arguments import remedy
from pipeline.guard import NonFinite
from pipeline.model import build_model
from pipeline.plan_options import FindOptions
from pipeline.pretrained import fetch_weights
from pipeline.processes import Processes
from pipeline.rate_suggestion import Point, rate_at
from pipeline.recipe import InputError, Recipe
from pipeline.run_data import RunData, obtain_run_data
from pipeline.sharding import wanted_sharding
from pipeline.trainer import PretrainingTrainer

logger = logging.getLogger(__name__)

PLACE = "learning_rate"  # the folder in the output folder that holds what a sweep leaves
LINES = 5  # of progress for each sweep, where there is no terminal

# What a sweep does not do: compile (25 s on the quickstart, whose sweeps take less), save,
# evaluate, report, push, and follow the recipe's schedule; nor does it say that it spikes.
_LEFT_OUT = (
    "push_to_hub", "load_best_model_at_end", "metric_for_best_model", "eval_on_start",
    "num_train_epochs",
)  # fmt: skip


class Sweep(NamedTuple):
    """One sweep.

    Attributes:
        seed: of the first weights and the order of the rows.
        points: of all updates that were made.
        ended: "whole", "diverged", or "not finite": the update after the last point could not be
            made.
    """

    seed: int
    points: list[Point]
    ended: str


def swept(recipe: Recipe, options: FindOptions) -> Recipe:
    """Return the recipe of the sweeps: model, text and update as they are, and nothing besides.

    Raises:
        InputError: the accelerate config divides the model.
    """
    if wanted_sharding() is not None:
        raise InputError(
            "the accelerate config shards the model (FSDP or DeepSpeed), and a sweep is made where "
            "each process holds it whole; use accelerate_configs/ddp.yaml (the rates do not hang "
            "on how a model is divided)"
        )
    dropped = ("hub_", "torch_compile")
    training = {
        key: value
        for key, value in recipe.training.items()
        if key not in _LEFT_OUT and not key.startswith(dropped)
    }
    training |= {
        "max_steps": options.updates, "save_strategy": "no", "eval_strategy": "no",
        "logging_strategy": "steps", "logging_steps": 1, "report_to": "none",
        "torch_compile": False,
    }  # fmt: skip
    return recipe.with_values(
        training=training,
        schedule={"warmup_steps": 0},
        evaluation={},
        generation={},
        guards={"spike_sigmas": 0, "stuck_updates": 0, "norm_growth": 0, "gap": False},
    )


def sweeps(
    recipe: Recipe, arguments: TrainingArguments, options: FindOptions, processes: Processes
) -> list[Sweep]:
    """Return a sweep for each seed, the recipe's first; `recipe` is what `swept` returned.

    Raises:
        InputError: see `obtain_run_data` and `PretrainingTrainer`; or the memory does not suffice.
    """
    recipe = processes.told(lambda: recipe)
    if recipe.model.pretrained is not None:
        processes.told(lambda: fetch_weights(recipe.model), patiently=True)
    folder = recipe.output_dir / PLACE
    ring = folder / "_ring"
    data: RunData | None = None
    found = []
    progress = _Progress(options, is_shown=processes.is_main)
    with contextlib.closing(progress), contextlib.ExitStack() as stack:
        if processes.is_main:
            stack.callback(shutil.rmtree, ring, ignore_errors=True)
        for number in range(options.seeds):
            own = copy.copy(arguments)
            own.output_dir = str(folder)
            own.seed += number
            own.data_seed = None if own.data_seed is None else own.data_seed + number
            if data is None or recipe.data.streaming:  # a stream comes in the order of its seed
                data = obtain_run_data(recipe, own, processes, ring=ring)
            if number == 0:
                _say(recipe, options)
            progress.begin(number, own.seed)
            found.append(_one(recipe, own, data, options, processes, progress))
            gc.collect()  # a trainer and its parts know each other, and a model may be large
    return found


def _one(
    recipe: Recipe,
    arguments: TrainingArguments,
    data: RunData,
    options: FindOptions,
    processes: Processes,
    progress: "_Progress",
) -> Sweep:
    model = build_model(
        recipe.model, data.tokenizer, block_size=recipe.data.block_size, seed=arguments.seed,
        attend_across=recipe.data.attend_across, added_tokens=len(recipe.tokenizer.added_tokens),
    )  # fmt: skip
    trainer = SweepingTrainer(
        recipe, arguments, model=model, tokenizer=data.tokenizer, blocks=data.blocks,
        processes=processes, options=options, progress=progress,
    )  # fmt: skip
    with data.flowing():
        return trainer.sweep()


def _say(recipe: Recipe, options: FindOptions) -> None:
    seeds = "1 seed" if options.seeds == 1 else f"each of {options.seeds} seeds"
    logger.info(
        "%d updates of %s tokens for %s, at rates from %g to %g, not compiled", options.updates,
        f"{recipe.tokens_per_update:,}", seeds, options.start, options.end,
    )  # fmt: skip


class SweepingTrainer(PretrainingTrainer):
    """The same with a rate that grows by equal factors, until it is too high; nothing is saved."""

    def __init__(self, *given: Any, options: FindOptions, progress: "_Progress", **parts: Any):
        """Take what `PretrainingTrainer` takes, the range and who shows how far it is."""
        self._options, self._progress = options, progress
        super().__init__(*given, **parts)

    def sweep(self) -> Sweep:
        """Make the updates.

        Raises:
            InputError: the device's memory does not suffice.
        """
        ended = "whole"
        try:
            with self._watchdog:
                try:
                    self.train()
                    self._guard.settle()
                finally:
                    self._processes.end_vote()
        except NonFinite:
            ended = "not finite"
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if sentence := remedy(error, self.recipe, self.args):
                raise InputError(sentence) from None
            raise
        points = self._points
        if ended == "whole" and len(points) > 1 and rate_suggestion.has_diverged(points):
            ended = "diverged"
        return Sweep(self.args.seed, points, ended)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The rate of `rate_at`, in each group as it would be in a run."""
        if self.lr_scheduler is None:
            options, base = self._options, self.args.learning_rate
            curve = functools.partial(
                rate_at, start=options.start, end=options.end, updates=options.updates
            )
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer, lambda step: curve(step) / base
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    @property
    def _points(self) -> list[Point]:
        logs = self.state.log_history
        return [Point(log["learning_rate"], log["loss"]) for log in logs if "loss" in log]

    def _derived(self) -> list[str]:
        return []

    def _join_callbacks(self, tokenizer: Any) -> None:
        self.remove_callback(PrinterCallback if self.args.disable_tqdm else ProgressCallback)
        self.add_callback(_Ending(lambda: self._points, self._progress))


class _Ending(TrainerCallback):
    """Shows how far a sweep is, and ends one that has diverged."""

    def __init__(self, points: Any, progress: "_Progress") -> None:
        self._points, self._progress = points, progress

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" not in logs:  # the summary after the last update
            return
        points = self._points()
        self._progress.show(points[-1])
        if rate_suggestion.has_diverged(points):
            control.should_training_stop = True


class _Progress:
    """One bar for all sweeps; where there is no terminal, lines instead."""

    def __init__(self, options: FindOptions, *, is_shown: bool) -> None:
        """Begin to count the time; the bar comes with the first update."""
        self._updates, self._all = options.updates, options.updates * options.seeds
        self._is_shown, self._bar = is_shown, None
        self._made = self._place = self._number = self._seed = 0
        self._started = time.perf_counter()

    def begin(self, number: int, seed: int) -> None:
        """Begin a sweep; one that ended early before it counts as whole."""
        if self._bar is None:
            self._started = time.perf_counter()
            hidden = None if self._is_shown else True  # None: where there is no terminal
            self._bar = tqdm(total=self._all, unit="update", disable=hidden, smoothing=0)
        self._number, self._seed = number, seed
        self._move(number * self._updates)

    def show(self, point: Point) -> None:
        """Show an update."""
        self._made += 1
        self._move(self._place + 1)
        text = f"rate {point.rate:.1e}, loss {point.loss:.3f}"
        self._bar.set_postfix_str(f"seed {self._seed}: {text}")
        update = self._place - self._number * self._updates
        if self._is_shown and self._bar.disable and update % math.ceil(self._updates / LINES) == 0:
            passed = (time.perf_counter() - self._started) / self._made
            left = tqdm.format_interval(passed * (self._all - self._place))
            tqdm.write(f"seed {self._seed}: update {update}/{self._updates}: {text}, {left} left")

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def _move(self, place: int) -> None:
        self._bar.update(place - self._place)
        self._place = place
