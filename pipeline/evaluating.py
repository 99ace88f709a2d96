"""A `Trainer` that measures held-out text, extra texts and tasks, and changes no weight by it."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput

from pipeline.blocks import Rows
from pipeline.gap import verdict
from pipeline.held_out import HeldOutBatches
from pipeline.model import model_with
from pipeline.recipe import InputError, Recipe
from pipeline.resumable import ResumableTrainer
from pipeline.scoring import score_rows
from pipeline.sharding import is_divided
from pipeline.tasks import run_tasks
from pipeline.text_files import read_text

logger = logging.getLogger(__name__)


class EvaluatingTrainer(ResumableTrainer):
    """The same with our sums; a run that evaluates more often is the same run."""

    _has_warned = False  # of evaluations that take longer than a stop may
    _texts: dict[str, Rows]  # measured besides

    @property
    def evaluated_tokens(self) -> int:
        """Tokens that the model reads in one evaluation."""
        held_out = [self.eval_dataset, *self._texts.values()]
        return sum(len(rows) * self.recipe.data.block_size for rows in held_out)

    def evaluations_left(self, step: int) -> int:
        """Return how often held-out text is measured while training, after update `step`."""
        arguments, updates = self.args, self._horizon
        every = {"epoch": self._updates_per_epoch, "no": math.inf}.get(
            arguments.eval_strategy, arguments.eval_steps
        )
        if every < 1:
            every = math.ceil(every * updates)
        at_start = int(bool(arguments.eval_on_start) and step == 0)
        return at_start + int(updates // every) - int(step // every)

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
        found = score_rows(
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
        with self._aside("evaluation.tokens"), self.accelerator.autocast():
            metrics = super().evaluate(*args, **kwargs)
        self._notices.evaluated(self.state.global_step, verdict(self.state.log_history))
        return metrics

    @contextlib.contextmanager
    def _aside(self, remedy: str) -> Iterator[None]:
        """Measure the plain model outside of the updates' time, the random state left as it was."""
        started, grace = time.perf_counter(), self.recipe.faults.grace_seconds
        plain = torch.compiler.set_stance("force_eager")
        with plain, self._clock.evaluating(), torch.random.fork_rng(devices=self._rng_devices()):
            yield
        if (passed := time.perf_counter() - started) > grace and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "an evaluation took %.0f s, longer than faults.grace_seconds (%g): a run that is "
                "asked to stop in one goes back to the checkpoint before; lower %s",
                passed, grace, remedy,
            )  # fmt: skip

    def _run_tasks(self, names: list[str]) -> dict[str, dict[str, float]]:
        """Run tasks in the main process; the others wait for as long as it takes."""
        self._beat()
        is_main = self._processes.is_main
        awaited = contextlib.nullcontext() if is_main else self._watchdog.paused()
        with self._aside("evaluation.tasks_limit"), awaited:
            model = self._model_for_main()
            return self._processes.told(
                lambda: run_tasks(
                    model, self.processing_class, names,
                    batch_size=self.args.eval_batch_size,
                    limit=self.recipe.evaluation.tasks_limit, after_batch=self._beat,
                ),
                patiently=True,
            )  # fmt: skip

    def _model_for_main(self) -> GPT2LMHeadModel | None:
        """Return a model that the main process can use alone; all processes must ask."""
        if not is_divided(self.model):
            return self.model
        _, weights = self._training_state.whole_weights()
        if weights is None:
            return None
        return model_with(weights, self.model.config).to(self.args.device)


def named_texts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, Rows]:
    """Return the rows of `evaluation.texts`, no more of each than of the held-out text."""
    section, data = recipe.evaluation, recipe.data
    texts = {}
    for name, file in section.texts.items():
        rows = Rows.held_out(
            [read_text(Path(file), errors=data.errors)], tokenizer,
            block_size=data.block_size, attend_across=data.attend_across,
        )  # fmt: skip
        if not rows.scored_bytes:
            raise InputError(f"evaluation.texts: {file}: is too short, nothing can be predicted")
        texts[name] = rows if section.tokens is None else rows.part(section.tokens, tokenizer)
    return texts
