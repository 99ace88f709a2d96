"""The `Trainer` that joins the rooms: our schedule, truthful numbers, whole checkpoints.

What stays Trainer's: the loop, devices, mixed precision, clipping, reporters. What is overridden
and why stands at each method.
"""

import contextlib
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_callback import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerState,
)
from transformers.trainer_utils import EvalLoopOutput

from pipeline import artifact, checkpoint
from pipeline.blocks import HeldOutBatches, Rows, collate
from pipeline.callbacks import (
    PerplexityCallback,
    SampleCallback,
    Stopwatch,
    TrainingProgressCallback,
)
from pipeline.generation import continuation
from pipeline.lr_schedule import schedule
from pipeline.model import load_model, parameter_count
from pipeline.perplexity import Score, bits_per_byte, perplexity, sum_nats
from pipeline.recipe import InputError, Recipe, first_line
from pipeline.row_order import ShuffledPlaces
from pipeline.run_folder import comparable
from pipeline.sources import read_text
from pipeline.tokenizer import tokenizer_fingerprint

logger = logging.getLogger(__name__)

# The head is the embedding, stored once and tied when it is loaded: nothing is missing.
logging.getLogger("transformers.trainer").addFilter(
    lambda record: (
        "missing keys in the checkpoint" not in str(record.msg)
        or "['lm_head.weight']" not in record.getMessage()
    )
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
    ) -> None:
        """Join the parts.

        Raises:
            InputError: fewer rows than one update needs, or a warm-up beyond the horizon.
        """
        self.recipe = recipe
        self._staging: Path | None = None
        self._watch = Stopwatch()
        self._last_log = (0.0, 0)
        self._first_step: int | None = None  # the update that this process began with
        self.compile_seconds = 0.0  # the first update, which compiles
        self._started = time.perf_counter()
        self._spent_before: dict[str, float] = {}
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

    def train_from(self, resume: str) -> None:
        """Train, from the checkpoint that `--resume auto|must|never|PATH` means, to the end.

        Raises:
            InputError: there is no such checkpoint, or the device's memory does not suffice.
        """
        found = checkpoint.chosen(Path(self.args.output_dir), resume)
        if found is not None:
            manifest = artifact.read_manifest(found)
            changes = artifact.differences(manifest["made_from"], self._origin())
            if changes:
                raise InputError(
                    f"{found}: is a checkpoint of another run ({'; '.join(changes)}); resume it "
                    "with its own recipe and text, or start anew in another --training.output_dir"
                )
            logger.info("resuming from %s", found)
            self._spent_before = manifest["facts"]
            if self._has_ended(found):
                return
        self._started = time.perf_counter()
        try:
            self.train(resume_from_checkpoint=str(found) if found else None)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise InputError(_out_of_memory_sentence(self.recipe, self.args)) from None
        self._watch.pause()

    def _has_ended(self, found: Path) -> bool:
        """Load a checkpoint of the last update; Trainer would train another one after it."""
        state = TrainerState.load_from_json(str(found / "trainer_state.json"))
        control = state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
        if state.global_step < self.args.max_steps and not control.get("should_training_stop"):
            return False
        self.state = state
        best = Path(self.args.output_dir) / f"checkpoint-{state.best_global_step}"
        wanted = best if self.args.load_best_model_at_end and best.is_dir() else found
        self._load_from_checkpoint(str(wanted))
        return True

    @property
    def history(self) -> list[dict[str, float]]:
        """Every log of the run, those before a resume too."""
        return self.state.log_history

    def save_result(self) -> None:
        """Write model and tokenizer into the run folder, each file whole or as it was."""
        folder = Path(self.args.output_dir)
        staging = folder / "_staging-result"
        self.save_model(str(staging))
        if self.args.should_save:
            for path in staging.iterdir():
                os.replace(path, folder / path.name)
            staging.rmdir()
        self.accelerator.wait_for_everyone()

    def result(self, blocks: dict[str, Rows]) -> tuple[dict[str, Any], str]:
        """Return the run's numbers, held-out ones measured on the saved folder, and a sample.

        The saved weights are read back and scored in fp32 by the stock model, so that the numbers
        are those of the files, and `measure_perplexity.py` repeats them.
        """
        logger.info("measuring the saved model on all held-out text, in fp32")
        model = load_model(self.args.output_dir).to(self.args.device)
        metrics: dict[str, Any] = {}
        for split, prefix in (("validation", "eval"), ("test", "test")):
            if split in blocks:
                batches = self.get_eval_dataloader(blocks[split])
                with tqdm(
                    desc=f"{split} in fp32", total=len(batches), delay=2, disable=None
                ) as bar:
                    score = self._score(model, batches, bar.update)
                metrics |= score.as_metrics(prefix)
        section = self.recipe.generation
        sample = ""
        for prompt in section.prompts[:1]:
            settings = section.model_dump(exclude={"prompts"})
            sample = prompt + continuation(model, self.processing_class, prompt, **settings)
        train_tokens = self.state.global_step * self.recipe.tokens_per_update
        metrics |= {
            "train_tokens": train_tokens,
            "train_tokens_per_second": self._spent["tokens_per_second"],
            "train_seconds": self._spent["train_seconds"],
            "compile_seconds": self._spent["compile_seconds"],
            "train_bytes": round(train_tokens * self._bytes_per_token)
            if blocks["train"].is_stream
            else blocks["train"].bytes,
            "parameters": parameter_count(self.model),
            "world_size": self.args.world_size,
            "threads": torch.get_num_threads(),
            "device": _device_name(self.args.device),
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
        logs["tokens_seen"] = self.state.global_step * self.recipe.tokens_per_update
        logs["tokens_per_second"] = self.tokens_per_second
        if "loss" in logs:
            logs["perplexity"] = perplexity(logs["loss"])
            # By the training text's average: counting the bytes of each window would cost a sync.
            logs["bits_per_byte"] = bits_per_byte(logs["loss"], self._bytes_per_token)
            (seconds, step), now = self._last_log, self._watch.seconds
            self._last_log = (now, self.state.global_step)
            if self.state.global_step > step:
                updates = self.state.global_step - step
                logs["tokens_per_second"] = (
                    updates * self.recipe.tokens_per_update / (now - seconds)
                )
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        """Shuffle all rows each epoch and leave out what makes no whole update.

        Trainer would end each epoch in a smaller update, and `tokens_per_update` were not kept.
        """
        if self.train_dataset.is_stream:  # it comes shuffled
            return torch.utils.data.SequentialSampler(self.train_dataset)
        rows = len(train_dataset if train_dataset is not None else self.train_dataset)
        per_update = self.recipe.tokens_per_update // self.recipe.data.block_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ShuffledPlaces(rows, rows // per_update * per_update, seed)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Time the first update apart: it holds the compilation."""
        if self._first_step is None:
            self._first_step = self.state.global_step
        if self.state.global_step > self._first_step:
            return super().training_step(*args, **kwargs)
        started = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self.compile_seconds += time.perf_counter() - started
        self._watch = Stopwatch()
        self._last_log = (0.0, self._first_step + 1)
        return loss

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on per second of updates, without compilation, evaluation and saving."""
        if self._first_step is None:  # nothing has been trained here yet
            return 0.0
        updates = self.state.global_step - self._first_step - 1
        if updates < 1:
            return self.recipe.tokens_per_update / self.compile_seconds
        return updates * self.recipe.tokens_per_update / self._watch.seconds

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
            self.control = self.callback_handler.on_prediction_step(
                self.args, self.state, self.control
            )

        self.callback_handler.eval_dataloader = dataloader
        # The plain model: autocast as in training, but no second compilation for evaluation.
        score = self._score(self.model, dataloader, show_progress)
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics=score.as_metrics(metric_key_prefix),
            num_samples=len(dataloader.dataset),
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Leave the random state as it was, so that evaluating more often changes no weight."""
        with self._paused(), torch.random.fork_rng(devices=self._rng_devices()):
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Stage, sync, rename, and only then remove an old one."""
        with self._paused():
            folder = Path(self.args.output_dir)
            name = f"checkpoint-{self.state.global_step}"
            self._staging = folder / "_staging"
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            try:
                super()._save_checkpoint(model, trial)
            finally:
                staging, self._staging = self._staging, None
            self.accelerator.wait_for_everyone()
            if self.state.best_global_step:  # by its number: a run folder may have been moved
                best = folder / f"checkpoint-{self.state.best_global_step}"
                self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(staging / name / "trainer_state.json"))
                artifact.commit(staging / name, folder / name, self._origin(), self._spent)
                shutil.rmtree(staging)
                checkpoint.rotate(
                    folder,
                    keep=self.args.save_total_limit,
                    best=self.state.best_model_checkpoint,
                )
            self.accelerator.wait_for_everyone()

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

    def _score(
        self, model: torch.nn.Module, batches: HeldOutBatches, after_batch: Callable[..., Any]
    ) -> Score:
        """Score a held-out split, each process its own batches."""
        nats = sum_nats(model, batches, device=self.args.device, after_batch=after_batch)
        if self.args.world_size > 1:
            total = torch.tensor(nats, dtype=torch.float64, device=self.args.device)
            nats = self.accelerator.reduce(total).item()
        rows = batches.dataset
        return Score(nats=nats, tokens=rows.scored_tokens, bytes=rows.scored_bytes)

    def _origin(self) -> dict[str, Any]:
        return {"recipe": comparable(self.recipe), **self._fingerprints}

    @property
    def _spent(self) -> dict[str, float]:
        """Seconds and updates up to now, those before a resume included."""
        before = self._spent_before
        seconds = self._watch.seconds + before.get("update_seconds", 0.0)
        updates = before.get("timed_updates", 0)
        train_seconds = before.get("train_seconds", 0.0)
        if self._first_step is not None:
            updates += max(0, self.state.global_step - self._first_step - 1)
            train_seconds += time.perf_counter() - self._started
        rate = updates * self.recipe.tokens_per_update / seconds if updates else 0.0
        return {
            "train_seconds": train_seconds,
            "compile_seconds": before.get("compile_seconds", 0.0) + self.compile_seconds,
            "update_seconds": seconds,
            "timed_updates": updates,
            "tokens_per_second": rate or self.tokens_per_second,
        }

    def _derived(self) -> list[str]:
        """Say what followed from the recipe, the data and the machine."""
        config, arguments, rows = self.model.config, self.args, len(self.train_dataset)
        block_size = self.recipe.data.block_size
        per_update = self.recipe.tokens_per_update // block_size
        updates = arguments.max_steps
        if updates < 0:
            updates = math.ceil(arguments.num_train_epochs * (rows // per_update))
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
                else f"{updates * per_update / rows:.2f} times the training text"
            ),
            f"machine: {_device_name(arguments.device)}, {torch.get_num_threads()} threads, "
            f"{self.recipe.precision}, {'' if arguments.torch_compile else 'not '}compiled"
            + (" (the first update takes longer)" if arguments.torch_compile else ""),
        ]

    def _rng_devices(self) -> list[torch.device]:
        return [self.args.device] if self.args.device.type == "cuda" else []

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        self._watch.pause()
        try:
            yield
        finally:
            self._watch.resume()

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
                PerplexityCallback(texts, batch_size=arguments.eval_batch_size, log=self.log)
            )
        if self.recipe.generation.prompts:
            samples = Path(arguments.output_dir) / "samples.txt"
            self.add_callback(SampleCallback(self.recipe.generation, tokenizer, samples))
        if section.early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(section.early_stopping_patience))


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "can't allocate memory" in str(error)  # the CPU allocator's RuntimeError


def _out_of_memory_sentence(recipe: Recipe, arguments: TrainingArguments) -> str:
    batch = arguments.per_device_train_batch_size
    smaller = next((b for b in range(batch // 2, 0, -1) if batch % b == 0), None)
    remedy = "a smaller data.block_size or model.config"
    if smaller:
        remedy = (
            f"--training.per_device_train_batch_size {smaller} (the update stays the same, "
            f"accumulation makes up for it), or {remedy}"
        )
    return (
        f"out of memory on {_device_name(arguments.device)} with {batch} rows of "
        f"{recipe.data.block_size} tokens at once; try {remedy}"
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
