"""A `Trainer` that can be stopped, killed, led astray by its data, and gone on with exactly.

It joins what decides where a run begins (`resumption`), what is saved and put back
(`training_state`, `checkpoint`) and what ends an update, a process or the run before its time
(`guard`, `watchdog`, `interruption`) to Trainer's loop. What is overridden and why stands at each
method.
"""

import functools
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers import trainer as trainer_module
from transformers.trainer_callback import (
    EarlyStoppingCallback,
)

from pipeline import artifact, checkpoint, interruption, resumption
from pipeline.arguments import is_of_compiler, is_out_of_memory, out_of_memory_sentence
from pipeline.clock import Clock
from pipeline.guard import Guard, NonFinite, wrong_rows
from pipeline.processes import Processes
from pipeline.recipe import InputError, Recipe, RunFailed, first_line
from pipeline.row_order import RowOrder
from pipeline.training_state import TrainingState, tensor_bytes
from pipeline.watchdog import Watchdog

logger = logging.getLogger(__name__)

SAMPLES = "samples.txt"
ANOTHER_STOPPED = "another process was asked to stop"

# What differs from the checkpoint is said by us, field by field, and is applied.
logging.getLogger("transformers.trainer_utils").addFilter(
    lambda record: "do not match the ones in the `trainer_state.json`" not in str(record.msg)
)


class ResumableTrainer(Trainer):
    """`Trainer` with our order of rows and our checkpoints, guarded and watched."""

    def __init__(
        self,
        recipe: Recipe,
        arguments: TrainingArguments,
        *,
        processes: Processes | None,
        fingerprints: dict[str, str | None],
        **parts: Any,
    ) -> None:
        """Take `fingerprints` of rows and tokenizer; `parts` go to Trainer."""
        self.recipe = recipe
        self._processes = processes or Processes(arguments)
        self._staging: Path | None = None
        self._clock = Clock(recipe.tokens_per_update)
        self._spent: dict[str, float] = {}
        self._watchdog = Watchdog(
            recipe.faults.hang_seconds, rank=self._processes.rank, count=self._processes.count
        )
        self._guard = Guard(process_count=self._processes.count)
        self._order: RowOrder | None = None
        self._left_out: set[int] = set()  # rows of updates that were not made
        self._rollbacks = 0
        self._resumed: dict[str, Any] = {}  # facts of the checkpoint that the run goes on from
        self._saved_step: int | None = None
        self._seen_step: int | None = None  # the last one that could be logged and saved
        self._is_to_stop = self._owes_save = False
        self._fingerprints = fingerprints
        super().__init__(args=arguments, **parts)
        self._training_state = TrainingState(self)
        folder, keep = Path(arguments.output_dir), arguments.save_total_limit
        self._writer = checkpoint.Writer(folder, keep=keep)

    def train_from(
        self,
        resume: str,
        *,
        allow_change: Collection[str] = (),
        find: Callable[[], Path | None] | None = None,
        begin: Callable[[], None] = lambda: None,
        last_words: Callable[[str], None] = lambda why: None,
    ) -> None:
        """Train, from the checkpoint that `--resume auto|must|never|PATH` means, to the end.

        Args:
            resume: auto, must, never or a path.
            allow_change: fields that may differ from the checkpoint's, refused otherwise.
            find: returns that checkpoint, verified, in the main process (default: look for it).
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
        begin()
        self._take_up(found)
        if self._has_ended(found):
            return
        self._processes.told(lambda: self._check_room(found))
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
                if is_out_of_memory(error):
                    raise InputError(out_of_memory_sentence(self.recipe, self.args)) from None
                if is_of_compiler(error):
                    raise InputError(
                        f"training.torch_compile: {first_line(error)}; set it to false, or leave "
                        "out what the compiler does not know (model.attn_implementation, for one)"
                    ) from None
                raise
            finally:
                self._finish_writing_alone()

    def _chosen(
        self, find: Callable[[], Path | None], resume: str, allow_change: Collection[str]
    ) -> Path | None:
        """Return the checkpoint to go on from, if the run may."""
        folder, found = Path(self.args.output_dir), find()
        if found is None:
            if resume in ("auto", "must") and checkpoint.checkpoints(folder):
                logger.warning("no checkpoint in %s is whole: starting afresh", folder)
            return None
        step = resumption.check(found, self._origin(), horizon=self._horizon, allow=allow_change)
        checkpoint.set_aside_after(folder, step, but=found)
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
        self._saved_step = self._seen_step = None
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

    def _check_room(self, found: Path | None) -> None:
        arguments = self.args
        if found is not None:
            size = sum(f["size"] for f in artifact.read_manifest(found)["files"].values())
        else:  # the weights and, of AdamW, two moments of each
            size = 3 * sum(tensor_bytes(parameter) for parameter in self.model.parameters())
        every = {"epoch": self._updates_per_epoch, "no": self._horizon}.get(
            arguments.save_strategy, arguments.save_steps
        )
        every = every if every >= 1 else math.ceil(every * self._horizon)
        with artifact.full_disk_said(Path(arguments.output_dir)):
            self._training_state.unchanging_files()  # while there is room
        checkpoint.check_room(
            Path(arguments.output_dir),
            size=size,
            planned=math.ceil((self._horizon - self._resumed.get("step", 0)) / every),
            keep=arguments.save_total_limit,
            has_best=arguments.metric_for_best_model is not None,
        )

    def _place_before(self, fault: NonFinite) -> Path:
        """Return the checkpoint to go back to after an update that could not be made.

        Raises:
            RunFailed: there is none, or the recipe wants no more rollbacks.
        """
        rows, alone = self._rows_of(fault.step), []
        if not self._is_sharded:
            own = rows[self._processes.rank :: self._processes.count]
            batches = {r: self._prepare_inputs(self.train_dataset.__getitems__([r])) for r in own}
            with torch.compiler.set_stance("force_eager"):  # a batch of one compiles nothing
                alone = self._processes.gathered(wrong_rows(self.model, batches))
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
            raise RunFailed(f"{fault.described(rows, alone)}; {why}")
        self._rollbacks += 1
        self._left_out |= set(rows)
        logger.error(
            "%s. Going back to %s, without the rows of that update from here on (%d of %d)",
            fault.described(rows, alone), found, self._rollbacks, limit,
        )  # fmt: skip
        return found

    def _rows_of(self, step: int) -> list[int]:
        """Return the rows of an update, counted from 1."""
        epoch, update = divmod(step - 1, self._updates_per_epoch)
        start = update * self._rows_per_update
        return self._order.rows(epoch, start, start + self._rows_per_update).tolist()

    def _finish_writing_alone(self) -> None:
        with self._watchdog.paused():
            self._writer.wait()

    def _finish_writing(self) -> None:
        """Wait for the last checkpoint; the others wait for the main process."""
        self._finish_writing_alone()
        self.accelerator.wait_for_everyone()

    def _beat(self) -> None:
        self._watchdog.beat(f"the evaluation after update {self.state.global_step}")

    def _end_progress(self) -> None:
        self.callback_handler.on_train_end(self.args, self.state, self.control)

    @property
    def _rows_per_update(self) -> int:
        return self.recipe.tokens_per_update // self.recipe.data.block_size

    @property
    def _updates_per_epoch(self) -> int:
        return len(self.train_dataset) // self._rows_per_update

    @property
    def _horizon(self) -> int:
        """The update with which the run ends."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(self.args.num_train_epochs * self._updates_per_epoch)

    @property
    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

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

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Time the first update apart (it holds the compilation), and show that we are alive."""
        step = self.state.global_step
        self._watchdog.beat(f"update {step + 1}")
        with self._clock.batch(step):
            return super().training_step(*args, **kwargs)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Look at what the update would be made of; this is the last call before it is made."""
        norm = super()._get_grad_norm(model, grad_norm)
        self._guard.look(
            self.state.global_step + 1,
            grad_norm=norm,
            loss=self._tr_loss,
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

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Copy what a checkpoint holds; a thread writes it while training goes on."""
        if self._saved_step == self.state.global_step:
            return
        self._guard.settle()
        self._saved_step = self.state.global_step
        self._name_best()
        with self._clock.paused():
            self._watchdog.beat(f"saving after update {self.state.global_step}")
            if self._is_sharded:
                self._save_shards(model, trial)
                return
            windows = self._processes.gathered(self._tr_loss.item())
            random_states = self._processes.gathered(self._training_state.random_state())
            if self._processes.is_main:
                self._writer.wait()  # it reads the copy that is about to be overwritten
                files, size = self._training_state.files(random_states)
                contents = checkpoint.Contents(files, size, self._origin(), self._facts(windows))
                self._writer.write(self.state.global_step, contents, best=self._best)

    def _save_shards(self, model: torch.nn.Module, trial: Any) -> None:
        """Stage what each process holds, sync, rename; training waits for it."""
        started, folder = time.perf_counter(), Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        self._staging = folder / f"{artifact.STAGING}shards"
        if self._processes.is_main:
            shutil.rmtree(self._staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        finally:
            staging, self._staging = self._staging, None
        self._name_best()  # Trainer has put down the place where it was staged
        windows = self._processes.gathered(self._tr_loss.item())
        if self._processes.is_main:
            self.state.save_to_json(str(staging / name / checkpoint.STATE))
            artifact.commit(staging / name, folder / name, self._origin(), self._facts(windows))
            shutil.rmtree(staging)
            checkpoint.rotate(folder, keep=self.args.save_total_limit, best=self._best)
            logger.info("saved %s; training waited %.1f s", name, time.perf_counter() - started)
        self.accelerator.wait_for_everyone()

    def _name_best(self) -> None:
        """Name the best checkpoint by its number: a run folder may have been moved."""
        if self.state.best_global_step:
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best)

    @property
    def _best(self) -> Path | None:
        best = self.state.best_model_checkpoint
        return Path(best) if best else None

    def _load_best_model(self) -> None:
        """Load the best checkpoint when it is written, and if it is whole."""
        self._finish_writing()
        wrong = self._processes.told(lambda: artifact.damage(self._best))
        if wrong:
            logger.error("the best checkpoint is lost: %s; the result is the last update's", wrong)
        elif self._is_sharded:
            super()._load_best_model()
        else:  # Trainer's own warns of the tied head
            self._training_state.put_back_weights(self._best)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights from safetensors and nothing else; Trainer takes pickles as well."""
        if self._is_sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._training_state.put_back_weights(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both, with the recipe's rates; Trainer goes on without a word if one is gone."""
        if self._is_sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            saved = self._resumed.get("optimizer")
            self._training_state.put_back_optimizer(Path(checkpoint), saved)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the generators, also with another number of processes."""
        if self._is_sharded:
            super()._load_rng_state(checkpoint)
        elif checkpoint is not None:
            self._training_state.put_back_random_state(Path(checkpoint))

    def _load_callback_state(self) -> None:
        """Go on counting evaluations without a better loss, with the recipe's patience."""
        super()._load_callback_state()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience = self.recipe.evaluation.early_stopping_patience

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.args.output_dir)

    @property
    def _tokens_seen(self) -> int:
        # An update that was allowed to be of another size does not change those before it.
        step, tokens = (self._resumed.get(name, 0) for name in ("step", "tokens"))
        return tokens + (self.state.global_step - step) * self.recipe.tokens_per_update

    def _origin(self) -> dict[str, Any]:
        """Return what made a checkpoint, to be compared with what goes on from it."""
        return {
            "recipe": resumption.described(self.recipe),
            "rows": self._fingerprints["rows"],
            "tokenizer_fingerprint": self._fingerprints["tokenizer"],
            "processes": {
                "count": self._processes.count,
                "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            },
            "horizon": self._horizon,
            "threads": torch.get_num_threads(),
        }

    def _facts(self, windows: list[float]) -> dict[str, Any]:
        """Return what a run that goes on from here has to know besides Trainer's own state."""
        samples = Path(self.args.output_dir) / SAMPLES
        return self._clock.spent(self.state.global_step) | {
            "step": self.state.global_step,
            "tokens": self._tokens_seen,
            "loss_windows": windows,
            "last_logged_step": self._globalstep_last_logged,
            "total_loss": self._total_loss_scalar,
            "samples_bytes": samples.stat().st_size if samples.exists() else 0,
            "left_out": sorted(self._left_out),
            "rollbacks": self._rollbacks,
            "optimizer": self._training_state.optimizer_name,
        }
