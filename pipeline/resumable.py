"""A `Trainer` that can be stopped, killed, led astray by its data, and gone on with exactly.

It joins what decides where a run begins (`resumption`) and what ends an update, a process or the
run before its time (`guard`, `watchdog`, `interruption`) to Trainer's loop. What is overridden and
why stands at each method.
"""

import functools
import logging
import math
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import trainer as trainer_module

from pipeline import artifact, checkpoint, interruption, resumption
from pipeline.arguments import remedy
from pipeline.clock import Clock
from pipeline.guard import NonFinite, wrong_rows
from pipeline.recipe import InputError, RunFailed
from pipeline.row_order import RowOrder
from pipeline.run_files import SAMPLES
from pipeline.saving import SavingTrainer
from pipeline.symptoms import causes

logger = logging.getLogger(__name__)

ANOTHER_STOPPED = "another process was asked to stop"

# What differs from the checkpoint is said by us, field by field, and is applied.
logging.getLogger("transformers.trainer_utils").addFilter(
    lambda record: "do not match the ones in the `trainer_state.json`" not in str(record.msg)
)


class ResumableTrainer(SavingTrainer):
    """The same with our order of rows, guarded and watched."""

    def __init__(self, *given: Any, **parts: Any) -> None:
        """Take what `SavingTrainer` takes."""
        self._order: RowOrder | None = None
        self._seen_step: int | None = None  # the last one that could be logged and saved
        self._is_to_stop = self._owes_save = False
        self._settled: DistributedDataParallel | None = None
        self._update_loss: torch.Tensor | None = None  # of the batches of an update until now
        self._faults: list[dict[str, Any]] = []  # noticed since this process began
        super().__init__(*given, **parts)

    def train_from(
        self,
        resume: str,
        *,
        allow_change: Collection[str] = (),
        find: Callable[[], Path | None] | None = None,
        look: Callable[[Path | None], None] = lambda found: None,
        begin: Callable[[], None] = lambda: None,
        last_words: Callable[[str], None] = lambda why: None,
    ) -> None:
        """Train, from the checkpoint that `--resume auto|must|never|PATH` means, to the end.

        Args:
            resume: auto, must, never or a path.
            allow_change: fields that may differ from the checkpoint's, refused otherwise.
            find: returns that checkpoint, verified, in the main process (default: look for it).
            look: called with that checkpoint; what it raises ends the run before it begins.
            begin: called when that checkpoint may be gone on from.
            last_words: called with what happened before a process that hangs is ended.

        Raises:
            InputError: there is no such checkpoint, it is another run's, the disk has no room for
                the checkpoints, or the device's memory does not suffice.
            RunFailed: a loss or gradient is not finite, and there are no rollbacks left.
            Preempted: the run was asked to stop; what it has trained is saved.
        """
        self._watchdog.last_words = last_words
        folder = Path(self.args.output_dir)
        find = find or functools.partial(checkpoint.chosen, folder, resume)
        found = self._processes.told(lambda: self._chosen(find, resume, allow_change))
        look(found)
        begin()
        self._take_up(found)
        if self._has_ended(found):
            return
        self._processes.told(lambda: self._make_ready(found))
        self._stop_if_asked()
        with interruption.deferred(), self._watchdog:
            self._train_with_rollbacks(found)
        self._stop_if_asked(save=True)
        self._spent = self._clock.spent(self.state.global_step)

    def _stop_if_asked(self, *, save: bool = False) -> None:
        if any(self._processes.gathered(interruption.reason() is not None)):
            if save:  # the recipe may have wanted no checkpoint
                self._save_checkpoint(self.model, None)
                self._finish_writing()
            raise interruption.Preempted(interruption.reason() or ANOTHER_STOPPED)

    def _train_with_rollbacks(self, found: Path | None) -> None:
        while True:
            try:
                self.train(resume_from_checkpoint=str(found) if found else None)
                self._guard.settle()
                self._processes.end_vote()
                return
            except NonFinite as fault:
                self._end_progress()
                with self._watchdog.paused():
                    found = self._place_before(fault)
                self._take_up(found)
            except interruption.Preempted:
                self._end_progress()
                raise
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if sentence := remedy(error, self.recipe, self.args):
                    raise InputError(sentence) from None
                raise
            finally:
                self._finish_writing_alone()

    def _chosen(
        self, find: Callable[[], Path | None], resume: str, allow_change: Collection[str]
    ) -> Path | None:
        """Return the checkpoint to go on from, if the run may; set aside what comes after it."""
        found = self.may_go_on_from(find(), allow_change)
        if found is not None:
            step = artifact.read_manifest(found)["facts"].get("step", 0)
            checkpoint.set_aside_after(Path(self.args.output_dir), step, but=found)
        elif resume in ("auto", "must") and checkpoint.checkpoints(Path(self.args.output_dir)):
            logger.warning("no checkpoint in %s is whole: starting afresh", self.args.output_dir)
        return found

    def may_go_on_from(self, found: Path | None, allow_change: Collection[str]) -> Path | None:
        """Return a checkpoint (or None) that this run may go on from.

        Raises:
            InputError: it is another run's.
        """
        if found is not None:
            resumption.check(found, self._origin(), horizon=self._horizon, allow=allow_change)
        return found

    def _take_up(self, found: Path | None) -> None:
        """Take over what a checkpoint says of the run so far; without one the run is new."""
        if found is not None and not all(self._processes.gathered(found.is_dir())):
            raise InputError(
                f"{found}: not every machine sees it; --training.output_dir must be a folder that "
                "all of them share"
            )
        self._resumed = artifact.read_manifest(found)["facts"] if found else {}
        self._left_out |= set(self._resumed.get("left_out", []))
        self._rollbacks = max(self._rollbacks, self._resumed.get("rollbacks", 0))
        self._clock = Clock(self.recipe.tokens_per_update, self._resumed)
        self._watch_updates()
        self._saved_step = self._seen_step = self._update_loss = None
        self._owes_save = False
        # A new run may begin with an evaluation; one that goes on has had it.
        self.args.eval_on_start = self.args.eval_on_start and found is None
        self.optimizer = self.lr_scheduler = None
        samples = Path(self.args.output_dir) / SAMPLES
        if self._processes.is_main and samples.exists():
            size = self._resumed.get("samples_bytes", 0)
            if samples.stat().st_size > size:  # written after the checkpoint, and to come again
                os.truncate(samples, size)

    def _has_ended(self, found: Path | None) -> bool:
        """Load a checkpoint of the last update; Trainer would train another one after it."""
        if found is None:
            return False
        state = self._training_state.progress(found)
        stopping = state.stateful_callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
        waited = stopping.get("early_stopping_patience_counter", 0)
        patience = self.recipe.evaluation.early_stopping_patience or math.inf
        if state.global_step < self._horizon and waited < patience:
            return False
        if state.global_step < self._horizon:
            logger.info("the run has stopped early: %d evaluations were not better", waited)
        self.state = state
        best = Path(self.args.output_dir) / f"checkpoint-{state.best_global_step}"
        wanted = best if self.args.load_best_model_at_end and best.is_dir() else found
        self._load_from_checkpoint(str(wanted))
        if self._processes.is_main:  # a kill may have come between the last save and this
            checkpoint.rotate(best.parent, keep=self.args.save_total_limit, best=best)
        self._spent = self._clock.spent(state.global_step)
        return True

    def _place_before(self, fault: NonFinite) -> Path:
        """Return the checkpoint to go back to after an update that could not be made.

        Raises:
            RunFailed: there is none, or the recipe wants no more rollbacks.
        """
        rows = self._rows_of(fault.step)
        own = rows[self._processes.rank :: self._processes.count]
        batches = {r: self._prepare_inputs(self.train_dataset.__getitems__([r])) for r in own}
        with torch.compiler.set_stance("force_eager"):  # a batch of one compiles nothing
            alone = self._processes.gathered(wrong_rows(self.model, batches))
        symptom = fault.symptom(rows, alone)
        self._writer.wait()
        folder, limit = Path(self.args.output_dir), self.recipe.faults.rollbacks
        found = self._processes.told(lambda: checkpoint.newest_whole(folder, before=fault.step))
        why = None
        if self._rollbacks >= limit:
            why = f"faults.rollbacks is {limit}" + (", and all are used" if limit else "")
        elif found is None:
            why = "there is no whole checkpoint to go back to"
        elif 2 * len(self._left_out | set(rows)) > len(self.train_dataset):
            why = "half of all rows would be left out"
        if why is not None:
            likely = f". Likely, in this order: {causes(symptom)}" if symptom else ""
            raise RunFailed(f"{fault.described(rows, alone)}; {why}{likely}")
        self._rollbacks += 1
        self._left_out |= set(rows)
        said = fault.described(rows, alone)
        seen = f"{said}; the run went back to {found.name}, and on without its rows"
        notice = symptom or "not_finite"
        self._faults.append({"notice": notice, "update": fault.step, "seen": seen})
        likely = f"\n  likely, in this order: {causes(symptom)}" if symptom else ""
        logger.error(
            "%s. Going back to %s, without the rows of that update from here on (%d of %d)%s",
            said, found, self._rollbacks, limit, likely,
        )  # fmt: skip
        return found

    def _rows_of(self, step: int) -> list[int]:
        """Return the rows of an update, counted from 1."""
        epoch, update = divmod(step - 1, self._updates_per_epoch)
        start = update * self._rows_per_update
        return self._order.rows(epoch, start, start + self._rows_per_update).tolist()

    def _rng_devices(self) -> list[torch.device]:
        return [self.args.device] if self.args.device.type == "cuda" else []

    def _beat(self) -> None:
        self._watchdog.beat(f"the evaluation after update {self.state.global_step}")

    def _end_progress(self) -> None:
        self.callback_handler.on_train_end(self.args, self.state, self.control)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        """Shuffle all rows each epoch and leave out what makes no whole update.

        Trainer would end each epoch in a smaller update, and `tokens_per_update` were not kept.
        """
        rows = len(self.train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._order = RowOrder(
            rows,
            rows // self._rows_per_update * self._rows_per_update,
            None if self.train_dataset.is_stream else seed,  # a stream comes shuffled
            left_out=self._left_out,
        )
        return self._order

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Log, evaluate and save as often as the recipe says now, not as the checkpoint did."""
        found = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        known = [(log.get("notice"), log.get("update")) for log in self.state.log_history]
        for fault in self._faults:  # what comes after the checkpoint has forgotten them
            if (fault["notice"], fault["update"]) not in known:
                self._keep_notice(fault)
        return found

    def _run_epoch(self, **kwargs: Any) -> None:
        """Begin the epoch of a resumed run at its place, and the logged window where it was.

        Trainer would walk to that place row by row, and begin an empty window.
        """
        if self.args.dataloader_num_workers:
            self._writer.wait()  # workers are forked, and must not inherit a half-written file
        if not self._resumed or kwargs["epoch"] != kwargs["epochs_trained"]:
            return super()._run_epoch(**kwargs)
        windows = self._resumed.get("loss_windows", [0.0])
        same = len(windows) == self._processes.count
        window = windows[self._processes.rank] if same else sum(windows) / len(windows)
        self._tr_loss += window
        self._globalstep_last_logged = self._resumed.get("last_logged_step", 0)
        self._total_loss_scalar = self._resumed.get("total_loss", 0.0)
        self._initial_global_step = 0

        def found(loader: Any, batches: int) -> Any:
            self._order.start_at(batches * self.args.train_batch_size * self._processes.count)
            return loader

        walk, trainer_module.skip_first_batches = trainer_module.skip_first_batches, found
        try:
            return super()._run_epoch(**kwargs)
        finally:
            trainer_module.skip_first_batches = walk

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any
    ) -> torch.Tensor:
        """Time the first update apart (it holds the compilation), and show that we are alive."""
        step = self.state.global_step
        self._watchdog.beat(f"update {step + 1}")
        with self._clock.batch(step):
            if isinstance(model, DistributedDataParallel) and self._settled is not model:
                self._settle(model, inputs, *args)
            loss = super().training_step(model, inputs, *args)
        before = self._update_loss
        self._update_loss = loss.clone() if before is None else before + loss
        return loss

    def _settle(self, model: DistributedDataParallel, inputs: dict[str, Any], *args: Any) -> None:
        """Let DDP find out in which order gradients come, by passes of which nothing is kept.

        It reduces in that order from its third reduction on (without a static graph from its
        second); a run that is resumed would add up the gradients of three processes or more in
        another one than a run that is not.
        """
        self._settled, reduces = model, model.require_backward_grad_sync
        model.require_backward_grad_sync = True  # also where batches are added up
        with torch.random.fork_rng(devices=self._rng_devices()):
            for _ in range(2):
                super().training_step(model, dict(inputs), *args)
        model.require_backward_grad_sync = reduces
        model.zero_grad()

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Look at what the update would be made of; this is the last call before it is made."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self.is_deepspeed_enabled and self.accelerator.optimizer_step_was_skipped:
            norm = math.inf  # its engine makes the update in the backward pass, or none of that
        loss, self._update_loss = self._update_loss, None
        self._guard.look(
            self.state.global_step + 1,
            grad_norm=norm,
            loss=loss,
            optimizer=self.optimizer.optimizer,
            is_scaled=self.accelerator.scaler is not None,
        )
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log, evaluate and save; then stop, if any process was asked to.

        Trainer calls this after each update, and again at the end of an epoch. What is due at that
        end (an evaluation, say) a resumed run would not make up for: nothing is saved before it.
        For the same reason an evaluation that is due comes before the stop.

        Raises:
            Preempted: in all processes after the same update, when it is saved.
        """
        control, step = self.control, self.state.global_step
        is_epoch_end, self._seen_step = self._seen_step == step, step
        asked = self._processes.any_of(interruption.reason() is not None)
        self._is_to_stop = self._is_to_stop or asked
        self._owes_save = self._owes_save or control.should_save or self._is_to_stop
        can_save = is_epoch_end or step % self._updates_per_epoch != 0
        control.should_save = self._owes_save and can_save
        if control.should_log or control.should_evaluate or control.should_save:
            self._guard.settle()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._processes.count == 1 and interruption.reason() is not None:
            self._is_to_stop = True  # while it was evaluating
        if can_save:
            self._owes_save = False
        if can_save and self._is_to_stop:
            self._save_checkpoint(*args[2:4])  # if it was not due
            self._finish_writing()
            reason = interruption.reason() or ANOTHER_STOPPED
            raise interruption.Preempted(f"{reason}, after update {step}")
