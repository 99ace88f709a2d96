"""A `Trainer` that can train on trial: afterwards nothing of it is left, to the last bit."""

import contextlib
import copy
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import TrainerControl
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from pipeline.blocks import Rows
from pipeline.clock import Clock
from pipeline.evaluating import EvaluatingTrainer
from pipeline.guard import Guard
from pipeline.recipe import Recipe
from pipeline.sharding import put, whole

# Once weights are wrapped (by DDP, by FSDP2) they stay so, as between two calls of `train`.
WRAPPED = ("model", "model_wrapped", "deepspeed")


class Trial(NamedTuple):
    """What a trial has shown."""

    losses: list[float]
    """Of each update's batch, before it was made, in the main process."""
    tokens_per_second: float
    """Of the updates after the first."""


class OneBatch(torch.utils.data.Dataset):
    """Some rows of others, as if they were all that there is."""

    is_stream = False

    def __init__(self, rows: Rows, count: int) -> None:
        """Take `count` rows spread evenly."""
        self._rows, self.is_marked, self.block_size = rows, rows.is_marked, rows.block_size
        self._indices = np.linspace(0, len(rows) - 1, count).astype(int).tolist()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self._rows[self._indices[index]]

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Return a batch, see `Rows`."""
        return self._rows.__getitems__([self._indices[index] for index in indices])


class TrialTrainer(EvaluatingTrainer):
    """The same, which can be tried out."""

    def batch(self, rows: Rows, indices: Iterable[int]) -> dict[str, torch.Tensor]:
        """Return some rows on the run's device."""
        return self._prepare_inputs(rows.__getitems__(list(indices)))

    @contextlib.contextmanager
    def untouched(self, *, in_fp32: bool = False) -> Iterator[torch.nn.Module]:
        """Yield the plain model as it evaluates, in the run's precision; put back what it changes.

        Of the run's random numbers none is drawn, nothing is compiled, and no gradient is left.
        """
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        plain = torch.compiler.set_stance("force_eager")
        precision = contextlib.nullcontext() if in_fp32 else self.accelerator.autocast()
        try:
            with plain, precision, torch.random.fork_rng(devices=self._rng_devices()):
                yield self.model
        finally:
            self.model.zero_grad(set_to_none=True)
            for module, mode in modes.items():
                module.training = mode

    def tried(
        self,
        is_enough: Callable[[int, float], bool],
        *,
        recipe: Recipe | None = None,
        batch: OneBatch | None = None,
        most_updates: int | None = None,
    ) -> Trial:
        """Train as the run would, until it is enough, and put everything back.

        All processes must call it. Nothing is compiled, logged, evaluated or saved.

        Args:
            is_enough: asked in the main process after each update: (updates made, loss of the last
                one's batch before it).
            recipe: to train by instead of the run's; of it the schedule counts.
            batch: what every update is made of, instead of the training rows.
            most_updates: the horizon (default: the run's).
        """
        weights = {
            name: whole(weight).to("cpu", copy=True) for name, weight in self._own_weights().items()
        }
        kept, modes = dict(vars(self)), {m: m.training for m in self.model.modules()}
        generators, scaler = self._training_state.random_state(), self.accelerator.scaler
        scale = scaler.state_dict() if scaler is not None else None
        states = random.getstate(), np.random.get_state()
        plain = torch.compiler.set_stance("force_eager")
        try:
            with plain, torch.random.fork_rng(devices=self._rng_devices()):
                self._set_up_trial(recipe, batch, most_updates)
                watch = _Watch(self, is_enough)
                self.callback_handler = CallbackHandler(
                    [watch], self.model, self.processing_class, None, None
                )
                self.train()
                self._guard.settle()
                trial = Trial(watch.losses, watch.tokens_per_second)
        finally:
            self._processes.end_vote()
            if scale:  # fp16
                scaler.load_state_dict(scale)
            random.setstate(states[0])
            np.random.set_state(states[1])
            wrapped = {name: vars(self)[name] for name in WRAPPED if name in vars(self)}
            vars(self).update(kept | wrapped)
            self.model.zero_grad(set_to_none=True)
            for module, mode in modes.items():
                module.training = mode
            for name, weight in self._own_weights().items():
                put(weight, weights[name].to(weight.device))
        for name, weight in self._own_weights().items():
            assert torch.equal(whole(weight).cpu(), weights[name]), f"{name} is not as it was"
        assert self._training_state.random_state() == generators, "the generators are not"
        return trial

    def _own_weights(self) -> dict[str, torch.Tensor]:
        named = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        return {name: weight.detach() for name, weight in named.items()}

    def _set_up_trial(
        self, recipe: Recipe | None, batch: OneBatch | None, most_updates: int | None
    ) -> None:
        self.args, self.control = copy.copy(self.args), TrainerControl()
        self.args.eval_on_start = self.args.load_best_model_at_end = False
        self.recipe = recipe or self.recipe
        self.optimizer = self.lr_scheduler = None
        self._resumed, self._seen_step, self._is_to_stop, self._owes_save = {}, None, False, False
        self._guard = Guard(process_count=self._processes.count)  # what is ill here is not the run
        if most_updates is not None:
            self.args.max_steps = most_updates
        if batch is not None:
            self.train_dataset, self.args.dataloader_num_workers = batch, 0
            self.args.per_device_train_batch_size = len(batch) // self._processes.count
            self.args.gradient_accumulation_steps = 1
            self._train_batch_size = self.args.train_batch_size
            self.recipe = self.recipe.with_values(tokens_per_update=len(batch) * batch.block_size)
        self._clock = Clock(self.recipe.tokens_per_update)


class _Watch(DefaultFlowCallback):
    """Notes each update's loss, and stops all processes when the main one says so.

    It stands for Trainer's own, by which nothing is due.
    """

    def __init__(self, trainer: TrialTrainer, is_enough: Callable[[int, float], bool]) -> None:
        self._trainer, self._is_enough = trainer, is_enough
        self._sum, self.losses, self.tokens_per_second = 0.0, [], 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the main process."""
        trainer = self._trainer
        total = trainer._tr_loss.item()
        self.losses.append(total - self._sum)
        self._sum = total
        self.tokens_per_second = trainer._clock.rate(state.global_step)
        control.should_training_stop = trainer._processes.told(
            lambda: self._is_enough(state.global_step, self.losses[-1])
        )

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do nothing."""
