"""A `Trainer` whose checkpoints are ours: written beside the training, put back as they were.

What is saved is `training_state`'s, where and how `checkpoint`'s; what is overridden and why stands
at each method.
"""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import EarlyStoppingCallback

from pipeline import adaptation, artifact, checkpoint, resumption, zero
from pipeline.clock import Clock
from pipeline.guard import Guard
from pipeline.lr_schedule import warmup_left
from pipeline.notices import Notices
from pipeline.processes import Processes
from pipeline.pushing import Pusher
from pipeline.recipe import Recipe
from pipeline.run_files import PREFLIGHT, SAMPLES, read_seen
from pipeline.sharding import tensor_bytes, wanted_sharding
from pipeline.training_state import TrainingState
from pipeline.watchdog import Watchdog

logger = logging.getLogger(__name__)


class SavingTrainer(Trainer):
    """`Trainer` with our checkpoints, and what they tell of the run so far."""

    def __init__(
        self,
        recipe: Recipe,
        arguments: TrainingArguments,
        *,
        processes: Processes | None,
        pusher: Pusher | None,
        fingerprints: dict[str, str | None],
        **parts: Any,
    ) -> None:
        """Take `fingerprints` of rows, tokenizer and an adapter's base; `parts` go to Trainer."""
        self.recipe = recipe
        self._processes = processes or Processes(arguments)
        self._pusher = pusher or Pusher(recipe, self._processes)
        self._clock = Clock(recipe.tokens_per_update)
        self._spent: dict[str, float] = {}
        self._watchdog = Watchdog(
            recipe.faults.hang_seconds, rank=self._processes.rank, count=self._processes.count
        )
        self._left_out: set[int] = set()  # rows of updates that were not made
        self._rollbacks = 0
        self._resumed: dict[str, Any] = {}  # facts of the checkpoint that the run goes on from
        self._saved_step: int | None = None
        self.seen: dict[str, Any] = {}  # what preflight saw, by the name of the check
        self._fingerprints = fingerprints
        super().__init__(args=arguments, **parts)
        self._watch_updates()
        self._training_state = TrainingState(self)
        folder, keep = Path(arguments.output_dir), arguments.save_total_limit
        self._writer = checkpoint.Writer(
            folder, keep=keep, written=self._pusher.offer, make_room=self._pusher.make_room
        )

    @property
    def processes(self) -> Processes:
        """Those that train together."""
        return self._processes

    @property
    def horizon(self) -> int:
        """The update with which the run ends."""
        return self._horizon

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

    def _watch_updates(self) -> None:
        """Guard the updates from where the checkpoint that was resumed, if any, left off."""
        self._notices = Notices(
            self.recipe.guards,
            vocabulary=self.model.config.vocab_size,
            is_fresh=self.recipe.model.pretrained is None,
            warmup_updates=warmup_left(self.recipe.schedule, max_steps=self._horizon),
            tell=self._tell_notice,
            before=self._resumed.get("guards"),
        )
        self._guard = Guard(process_count=self._processes.count, notices=self._notices)

    def _tell_notice(self, notice: dict[str, Any], sentence: str) -> None:
        """Keep what was noticed among the logs, and say it beside the progress bar."""
        self._keep_notice(notice)
        if self._processes.is_main:
            with tqdm.external_write_mode():
                logger.warning("%s", sentence)

    def _keep_notice(self, notice: dict[str, Any]) -> None:
        # Not by `log`: reporters take numbers only.
        place = {"step": self.state.global_step, "tokens_seen": self._tokens_seen}
        self.state.log_history.append(notice | place)

    def check_room(self, found: Path | None) -> str:
        """See that the disk has room for the checkpoints after `found`; say how much they need.

        Raises:
            InputError: it has not.
        """
        arguments, step = self.args, 0
        if found is not None:
            manifest = artifact.read_manifest(found)
            size = sum(f["size"] for f in manifest["files"].values())
            step = manifest["facts"].get("step", 0)
        else:  # the weights and, of AdamW, two moments of each that is trained
            trained = sum(tensor_bytes(p) for p in self.model.parameters() if p.requires_grad)
            size = tensor_bytes(adaptation.stored_weights(self.model)[1]) + 2 * trained
        every = {"epoch": self._updates_per_epoch, "no": self._horizon}.get(
            arguments.save_strategy, arguments.save_steps
        )
        every = every if every >= 1 else math.ceil(every * self._horizon)
        return checkpoint.check_room(
            Path(arguments.output_dir),
            size=size,
            planned=math.ceil((self._horizon - step) / every),
            keep=arguments.save_total_limit,
            has_best=arguments.metric_for_best_model is not None,
        )

    def _make_ready(self, found: Path | None) -> None:
        """See that the run can be saved, and keep what is in no checkpoint but in its report."""
        folder = Path(self.args.output_dir)
        with artifact.full_disk_said(folder):
            self._training_state.unchanging_files()  # while there is room
            if self.seen:
                known = read_seen(folder) if found is not None else {}
                text = artifact.as_json(known | self.seen)
                artifact.write_whole(folder / PREFLIGHT, text)
        if "disk" not in self.recipe.preflight.accept:
            self.check_room(found)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Copy what a checkpoint holds; a thread writes it while training goes on."""
        if self._saved_step == self.state.global_step:
            return
        self._guard.settle()
        self._saved_step = self.state.global_step
        self._name_best()
        with self._clock.paused():
            self._watchdog.beat(f"saving after update {self.state.global_step}")
            windows = self._processes.gathered(self._tr_loss.item())
            random_states = self._processes.gathered(self._training_state.random_state())
            self._finish_writing()  # it reads the copy that is about to be overwritten
            files, size = self._training_state.files(random_states)
            if self._processes.is_main:
                contents = checkpoint.Contents(files, size, self._origin(), self._facts(windows))
                self._writer.write(self.state.global_step, contents, best=self._best)

    def _finish_writing_alone(self) -> None:
        with self._watchdog.paused():
            self._writer.wait()

    def _finish_writing(self) -> None:
        """Wait for the last checkpoint; the others wait for the main process, and a slow disk."""
        with self._watchdog.paused():
            self._processes.told(self._writer.wait, patiently=True)

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
        else:  # Trainer's own warns of the tied head
            self._training_state.put_back_weights(self._best)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Keep in mind which weights are in which group: DeepSpeed joins them."""
        optimizer = super().create_optimizer(model)
        if self.is_deepspeed_enabled:
            groups = optimizer.param_groups
            self._training_state.groups = [list(group["params"]) for group in groups]
        return optimizer

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[torch.nn.Module, Any]:
        """Load a checkpoint as without DeepSpeed: Trainer would ask for one of DeepSpeed's own."""
        found = resume_from_checkpoint
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, found)
        zero.compute_by_autocast(self.accelerator)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if found is not None:
            self._load_from_checkpoint(found)
            self._load_optimizer_and_scheduler(found)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights from safetensors and nothing else; Trainer takes pickles as well."""
        self._training_state.put_back_weights(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both, with the recipe's rates; Trainer goes on without a word if one is gone."""
        if checkpoint is not None:
            saved = self._resumed.get("optimizer")
            self._training_state.put_back_optimizer(Path(checkpoint), saved)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the generators, also with another number of processes."""
        if checkpoint is not None:
            self._training_state.put_back_random_state(Path(checkpoint))

    def _load_callback_state(self) -> None:
        """Go on counting evaluations without a better loss, with the recipe's patience."""
        super()._load_callback_state()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience = self.recipe.evaluation.early_stopping_patience

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
            "base_fingerprint": self._fingerprints["base"],
            "processes": {
                "count": self._processes.count,
                "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
                "sharding": wanted_sharding(),
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
            "guards": self._notices.state(),
            "optimizer": self._training_state.optimizer_name,
        }
