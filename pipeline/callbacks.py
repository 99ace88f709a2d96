"""What happens during training besides training: extra texts, samples, tasks, progress."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from pipeline.blocks import Rows
from pipeline.generation import continuation
from pipeline.held_out import HeldOutBatches
from pipeline.processes import Processes
from pipeline.recipe import InputError
from pipeline.scoring import score_rows
from pipeline.sections import EvaluationSection, GenerationSection
from pipeline.tasks import as_logs, sentence
from pipeline.wording import finishing

logger = logging.getLogger(__name__)

LINES_SHOWN = 5  # of a sample; samples.txt has all of it


class PerplexityCallback(TrainerCallback):
    """Measure the perplexity of named texts at each evaluation, all processes together."""

    def __init__(
        self,
        texts: dict[str, Rows],
        processes: Processes,
        *,
        batch_size: int,
        log: Callable[[dict[str, float]], None],
        after_batch: Callable[[], None],
    ) -> None:
        """`log` is the trainer's: what it is given reaches every reporter and the history."""
        self._processes, self._after_batch, self._log = processes, after_batch, log
        self._texts = {
            name: HeldOutBatches(
                rows, batch_size=batch_size, rank=processes.rank, world_size=processes.count
            )
            for name, rows in texts.items()
        }

    def on_evaluate(self, args, state, control, model=None, **kwargs) -> None:
        """Score every text with the model as it is now."""
        for name, batches in self._texts.items():
            score = score_rows(
                model, batches, self._processes, device=args.device,
                after_batch=self._after_batch,
            )  # fmt: skip
            self._log(score.as_metrics(f"eval_{name}"))


class SampleCallback(TrainerCallback):
    """Show and keep what the model writes for the recipe's prompts at each evaluation."""

    def __init__(
        self,
        section: GenerationSection,
        tokenizer: PreTrainedTokenizerBase,
        path: Path,
        *,
        model: Callable[[], torch.nn.Module | None],
        after: Callable[[], None],
    ) -> None:
        """Write into `path`; `after` is called after each sample.

        `model` is called in all processes, and returns in the main one what it can use alone.
        """
        self._model, self._after = model, after
        self._section, self._tokenizer, self._path = section, tokenizer, path

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        """Write one continuation per prompt, the same seed each time."""
        model = self._model()
        if not state.is_world_process_zero:
            return
        settings = self._section.model_dump(exclude={"prompts"})
        for prompt in self._section.prompts:
            try:
                text = prompt + continuation(model, self._tokenizer, prompt, **settings)
            except RuntimeError as error:  # a model that has diverged: its logits are no numbers
                text = f"{prompt} (no sample: {error})"
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(f"--- update {state.global_step}\n{text}\n\n")
            except OSError as error:  # a full disk: no reason to end a run
                logger.error("%s: a sample was not written: %s", self._path, error.strerror)
            shown = "\n".join(text.split("\n")[:LINES_SHOWN])
            self._after()
            tqdm.write(f"--- sample at update {state.global_step}\n{shown}\n---")


class TasksCallback(TrainerCallback):
    """Run lm-eval's tasks every so many updates; after the last they run on what is saved."""

    def __init__(
        self,
        section: EvaluationSection,
        *,
        run: Callable[[list[str]], dict[str, dict[str, float]]],
        log: Callable[[dict[str, float]], None],
    ) -> None:
        """`run` returns the numbers of tasks in all processes, `log` is the trainer's."""
        self._names, self._every = list(section.tasks), section.tasks_steps
        self._run, self._log = run, log

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Run, log and show what is due; a task that cannot be run is no reason to end a run."""
        step = state.global_step
        if not self._names or step % self._every or step == state.max_steps:
            return
        found: dict[str, dict[str, float]] = {}
        for name in list(self._names):
            try:
                found |= self._run([name])
            except InputError as error:
                self._names.remove(name)
                logger.error("%s; the run goes on without it", error)
        if not found:
            return
        due = control.should_log
        self._log(as_logs(found))
        control.should_log = due  # a log takes back that the one of this update is due
        if state.is_world_process_zero:
            for task, numbers in found.items():
                tqdm.write(f"update {step}/{state.max_steps}: {sentence(task, numbers)}")


class TrainingProgressCallback(ProgressCallback):
    """One bar with loss, tokens/s and time left; where there is no terminal, lines instead."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Start the bar (`disable=None`: not where a redrawn bar would only fill a file)."""
        self.current_step = 0
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="update",
                smoothing=0,  # the time left then counts on evaluations to come
                disable=args.disable_tqdm or None,
            )
            self.current_step = state.global_step
            self._started: tuple[float, int] | None = None
            self._has_said_end = False

    def _seconds_left(self, state) -> float | None:
        """Return the time to the last update at the speed since the first, which compiles."""
        started, first = self._started
        if state.global_step <= first:
            return None
        passed = (time.perf_counter() - started) / (state.global_step - first)
        return passed * (state.max_steps - state.global_step)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Move the bar; the time left counts from the second update on, the first compiles."""
        super().on_step_end(args, state, control, **kwargs)
        if state.is_world_process_zero and self._started is None:
            self._started = time.perf_counter(), state.global_step
            self.training_bar.start_t, self.training_bar.initial = time.time(), state.global_step

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs) -> None:
        """Show how far an evaluation is."""
        if self.training_bar is not None and not self.training_bar.disable:
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)
            self.prediction_bar.set_description("evaluating", refresh=False)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Show a training log in the bar and an evaluation on a line of its own."""
        if not state.is_world_process_zero or self.training_bar is None or logs is None:
            return
        head = f"update {state.global_step}/{state.max_steps}"
        if "compile_seconds" in logs:
            with_it = ", compilation included" if args.torch_compile else ""
            tqdm.write(f"{head}: the first update took {logs['compile_seconds']:.1f} s{with_it}")
        if "loss" in logs:
            text = (
                f"loss {logs['loss']:.3f}, {logs['tokens_per_second']:,.0f} tokens/s, "
                f"MFU {logs['mfu']:.0%}, {logs['peak_memory_bytes'] / 1e9:.1f} GB, "
                f"waits {logs['data_wait_fraction']:.0%} data {logs['logging_fraction']:.0%} logs"
            )
            self.training_bar.set_postfix_str(text)
            seconds_left = self._seconds_left(state)
            if self.training_bar.disable:
                if seconds_left is not None:
                    text += f", {tqdm.format_interval(seconds_left)} left"
                tqdm.write(f"{head}: {text}")
            if seconds_left and not self._has_said_end:
                self._has_said_end = True
                tqdm.write(f"{head}: at this speed the run ends at {finishing(seconds_left)}")
        for name in (n.removesuffix("_loss") for n in logs if n.endswith("_loss")):
            if f"{name}_bits_per_byte" in logs:  # not a task's, whose metrics have any names
                label = "held-out text" if name == "eval" else name.removeprefix("eval_")
                tqdm.write(
                    f"{head}: {label}: loss {logs[f'{name}_loss']:.4f}, "
                    f"perplexity {logs[f'{name}_perplexity']:.2f}, "
                    f"{logs[f'{name}_bits_per_byte']:.4f} bits per byte"
                )
