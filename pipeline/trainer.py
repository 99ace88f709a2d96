"""The `Trainer` that joins the rooms: our schedule, truthful numbers, whole checkpoints.

What stays Trainer's: the loop, devices, mixed precision, clipping, reporters. What is overridden
and why stands at each method.
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
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers import trainer as trainer_module
from transformers.trainer_callback import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
)
from transformers.trainer_utils import EvalLoopOutput

from pipeline import artifact, checkpoint, interruption, resumption
from pipeline.arguments import device_name, is_out_of_memory, out_of_memory_sentence
from pipeline.blocks import HeldOutBatches, Rows, collate
from pipeline.callbacks import PerplexityCallback, SampleCallback, TrainingProgressCallback
from pipeline.clock import Clock
from pipeline.guard import Guard, NonFinite, wrong_rows
from pipeline.lr_schedule import schedule
from pipeline.model import parameter_count
from pipeline.perplexity import bits_per_byte, perplexity
from pipeline.processes import Processes
from pipeline.recipe import InputError, Recipe, RunFailed, first_line
from pipeline.results import measured, score
from pipeline.row_order import RowOrder
from pipeline.sources import read_text
from pipeline.tokenizer import tokenizer_fingerprint
from pipeline.training_state import TrainingState, tensor_bytes
from pipeline.watchdog import Watchdog

logger = logging.getLogger(__name__)

SAMPLES = "samples.txt"
ANOTHER_STOPPED = "another process was asked to stop"

# What differs from the checkpoint is said by us, field by field, and is applied.
logging.getLogger("transformers.trainer_utils").addFilter(
    lambda record: "do not match the ones in the `trainer_state.json`" not in str(record.msg)
)


class PretrainingTrainer(Trainer):
    """`Trainer` with our schedule, evaluation, logs and checkpoints."""

    def __init__(
        self,
        recipe: Recipe,
        arguments: TrainingArguments,
        *,
        model: GPT2LMHeadModel,
        tokenizer: PreTrainedTokenizerBase,
        blocks: dict[str, Rows],
        processes: Processes | None = None,
    ) -> None:
        """Join the parts.

        Raises:
            InputError: fewer rows than one update needs, or a warm-up beyond the horizon.
        """
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
        self._is_to_stop = self._owes_save = self._has_warned = False
        self._fingerprints = {
            "rows": blocks["train"].fingerprint,
            "tokenizer": tokenizer_fingerprint(tokenizer),
        }
        rows_per_update = recipe.tokens_per_update // recipe.data.block_size
        if len(blocks["train"]) < rows_per_update:
            raise InputError(
                f"the training text gives {len(blocks['train'])} rows of {recipe.data.block_size} "
                f"tokens and one update takes {rows_per_update}: give more text, or a smaller "
                "tokens_per_update and training.per_device_train_batch_size"
            )
        held_out = blocks["validation"]
        if recipe.evaluation.tokens is not None:
            held_out = held_out.part(recipe.evaluation.tokens, tokenizer)
        self._bytes_per_token = blocks["train"].bytes / blocks["train"].tokens
        try:
            super().__init__(
                model=model,
                args=arguments,
                train_dataset=blocks["train"],
                eval_dataset=held_out,
                data_collator=collate,
                processing_class=tokenizer,
            )
        except (ValueError, ImportError, RuntimeError) as error:
            raise InputError(f"training: {first_line(error)}") from None
        assert self._loss_shifts_labels  # else the loss is divided by the wrong number of tokens
        for line in self._derived():
            logger.info("%s", line)
        self._join_callbacks(tokenizer)
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
                if not is_out_of_memory(error):
                    raise
                raise InputError(out_of_memory_sentence(self.recipe, self.args)) from None
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
            self._training_state.prepare()
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

    @property
    def history(self) -> list[dict[str, float]]:
        """Every log of the run, those before a resume too."""
        return self.state.log_history

    def save_result(self) -> None:
        """Write model and tokenizer into the run folder, each file whole or as it was.

        Raises:
            InputError: the disk is full.
        """
        folder = Path(self.args.output_dir)
        staging = folder / f"{artifact.STAGING}result"
        with artifact.full_disk_said(folder):
            self.save_model(str(staging))
            if self.args.should_save:
                for path in staging.iterdir():
                    os.replace(path, folder / path.name)
                staging.rmdir()
        self.accelerator.wait_for_everyone()

    def result(self, blocks: dict[str, Rows]) -> tuple[dict[str, Any], str]:
        """Return the run's numbers, held-out ones measured on the saved folder, and a sample."""
        with self._watchdog:
            metrics, sample = measured(
                self.recipe, self.args, self._processes, blocks, self.processing_class,
                after_batch=functools.partial(self._watchdog.beat, "the final measuring"),
            )  # fmt: skip
        metrics |= {
            "train_tokens": self._tokens_seen,
            "train_tokens_per_second": self._spent["tokens_per_second"],
            "train_seconds": self._spent["train_seconds"],
            "compile_seconds": self._spent["compile_seconds"],
            "train_bytes": round(self._tokens_seen * self._bytes_per_token)
            if blocks["train"].is_stream
            else blocks["train"].bytes,
            "parameters": parameter_count(self.model),
            "world_size": self.args.world_size,
            "threads": torch.get_num_threads(),
            "device": device_name(self.args.device),
            "precision": self.recipe.precision,
            "block_size": self.recipe.data.block_size,
        }
        return metrics, sample

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Our schedule: transformers' cosine with a floor climbs back after its horizon."""
        if self.lr_scheduler is None:
            curve = schedule(self.recipe.schedule, max_steps=num_training_steps)
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, curve)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add perplexity, bits per byte, tokens and speed: here they reach every reporter."""
        logs["tokens_seen"] = self._tokens_seen
        step = self.state.global_step
        logs["tokens_per_second"] = self._clock.rate(step)
        if "loss" in logs:
            logs["perplexity"] = perplexity(logs["loss"])
            # By the training text's average: counting the bytes of each window would cost a sync.
            logs["bits_per_byte"] = bits_per_byte(logs["loss"], self._bytes_per_token)
            logs["tokens_per_second"] = self._clock.rate_since_last(step)
        if "train_runtime" in logs:  # of the whole run, not of what came after a resume
            seconds = self._clock.spent(step)["train_seconds"]
            logs["train_runtime"] = seconds
            logs["train_steps_per_second"] = step / seconds
            logs["train_samples_per_second"] = step * self._rows_per_update / seconds
        super().log(logs, start_time)

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

    def get_eval_dataloader(self, eval_dataset: Any = None) -> HeldOutBatches:
        """Batches that score each token once: a DataLoader repeats rows to even out processes."""
        return HeldOutBatches(
            eval_dataset or self.eval_dataset,
            batch_size=self.args.eval_batch_size,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )

    def evaluation_loop(
        self,
        dataloader: HeldOutBatches,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Sum nats and divide once: Trainer averages the means of batches of unequal size."""

        def show_progress() -> None:
            self._beat()
            self.control = self.callback_handler.on_prediction_step(
                self.args, self.state, self.control
            )

        self.callback_handler.eval_dataloader = dataloader
        # The plain model: autocast as in training, but no second compilation for evaluation.
        found = score(
            self.model, dataloader, self._processes,
            device=self.args.device, after_batch=show_progress,
        )  # fmt: skip
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics=found.as_metrics(metric_key_prefix),
            num_samples=len(dataloader.dataset),
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Leave the random state as it was, so that evaluating more often changes no weight."""
        started, grace = time.perf_counter(), self.recipe.faults.grace_seconds
        with self._clock.paused(), torch.random.fork_rng(devices=self._rng_devices()):
            metrics = super().evaluate(*args, **kwargs)
        if (passed := time.perf_counter() - started) > grace and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "an evaluation took %.0f s, longer than faults.grace_seconds (%g): a run that is "
                "asked to stop in one goes back to the checkpoint before; lower evaluation.tokens",
                passed, grace,
            )  # fmt: skip
        return metrics

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Copy what a checkpoint holds; a thread writes it while training goes on."""
        if self._saved_step == self.state.global_step:
            return
        self._guard.settle()
        self._saved_step = self.state.global_step
        folder = Path(self.args.output_dir)
        if self.state.best_global_step:  # by its number: a run folder may have been moved
            best = folder / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best)
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
        if self.state.best_global_step:  # Trainer has put down the place where it was staged
            best = folder / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best)
        windows = self._processes.gathered(self._tr_loss.item())
        if self._processes.is_main:
            self.state.save_to_json(str(staging / name / checkpoint.STATE))
            artifact.commit(staging / name, folder / name, self._origin(), self._facts(windows))
            shutil.rmtree(staging)
            checkpoint.rotate(folder, keep=self.args.save_total_limit, best=self._best)
            logger.info("saved %s; training waited %.1f s", name, time.perf_counter() - started)
        self.accelerator.wait_for_everyone()

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
        else:
            super()._load_best_model()

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

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save what a stock `from_pretrained` should see: use_cache on, no pickled arguments."""
        use_cache, self.model.config.use_cache = self.model.config.use_cache, True
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.model.config.use_cache = use_cache
        # A pickle that a stranger cannot load safely, and that holds any token that was given.
        Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Compile whole graphs of fixed shapes: a graph break is a bug here, and slow."""
        arguments = super()._build_accelerator_args(**kwargs)
        if self.args.torch_compile:
            arguments["dynamo_plugin"].fullgraph = True
            arguments["dynamo_plugin"].dynamic = False
        return arguments

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Nothing: Trainer's count leaves out the head and attention (41 % of GPT-2 small)."""
        return 0

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

    def _derived(self) -> list[str]:
        """Say what followed from the recipe, the data and the machine."""
        config, arguments, rows = self.model.config, self.args, len(self.train_dataset)
        block_size, updates = self.recipe.data.block_size, self._horizon
        return [
            f"model: {parameter_count(self.model):,} parameters, vocabulary {config.vocab_size:,}, "
            f"{config.n_positions:,} positions, end-of-text is id {config.eos_token_id}",
            f"update: {self.recipe.tokens_per_update:,} tokens = "
            f"{arguments.per_device_train_batch_size} rows x {block_size} tokens x "
            f"{arguments.gradient_accumulation_steps} accumulated x "
            f"{arguments.world_size} process(es)",
            f"run: {updates:,} updates, {updates * self.recipe.tokens_per_update:,} tokens, "
            + (
                "streamed"
                if self.train_dataset.is_stream
                else f"{updates * self._rows_per_update / rows:.2f} times the training text"
            ),
            f"machine: {device_name(arguments.device)}, {torch.get_num_threads()} threads, "
            f"{self.recipe.precision}, {'' if arguments.torch_compile else 'not '}compiled"
            + (" (the first update takes longer)" if arguments.torch_compile else ""),
        ]

    def _rng_devices(self) -> list[torch.device]:
        return [self.args.device] if self.args.device.type == "cuda" else []

    def _join_callbacks(self, tokenizer: PreTrainedTokenizerBase) -> None:
        section, arguments = self.recipe.evaluation, self.args
        self.remove_callback(PrinterCallback if arguments.disable_tqdm else ProgressCallback)
        self.add_callback(TrainingProgressCallback())
        if section.texts:
            texts = {
                name: Rows.held_out(
                    [read_text(Path(file), errors=self.recipe.data.errors)],
                    tokenizer,
                    block_size=self.recipe.data.block_size,
                    attend_across=self.recipe.data.attend_across,
                )
                for name, file in section.texts.items()
            }
            self.add_callback(
                PerplexityCallback(
                    texts,
                    batch_size=arguments.eval_batch_size,
                    log=self.log,
                    after_batch=self._beat,
                )  # fmt: skip
            )
        if self.recipe.generation.prompts:
            samples, written = Path(arguments.output_dir) / SAMPLES, self.recipe.generation
            self.add_callback(SampleCallback(written, tokenizer, samples, after=self._beat))
        if section.early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(section.early_stopping_patience))
