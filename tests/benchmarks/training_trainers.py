"""The two arms of training_speed.py that are Trainers: transformers' own, and ours."""

import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from training_arms import LEARNING_RATE, MAX_NORM, STEPS_PER_LOG, Job, Windows, load_weights
from training_inputs import RECIPE, ROWS, RUN_CLM_ROWS, config
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)


class _InOrder(Trainer):
    """Takes rows as they come: they are shuffled already."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class _Turns(TrainerCallback):
    """Waits before the first step and between two windows."""

    def __init__(self, windows: Windows) -> None:
        self._windows = windows

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the first window."""
        assert self._windows.begin(), "there is at least one window"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step; what Trainer does until the next one is in the next one's time."""
        control.should_training_stop = not self._windows.after_step()


def train_stock(job: Job, windows: Windows) -> None:
    """Transformers' Trainer over a stock model and rows as run_clm.py makes them."""
    from datasets import load_from_disk  # ours does without

    model = GPT2LMHeadModel(GPT2Config(**config(job.shape)))
    # Else Trainer divides the summed loss by the tokens of a row, of which one is not predicted.
    model.loss_type = "ForCausalLM"
    load_weights(model, job)
    arguments = TrainingArguments(
        output_dir=str(job.folder / "stock"),
        max_steps=job.total_steps,
        per_device_train_batch_size=job.shape["batch"],
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=MAX_NORM,
        optim="adamw_torch_fused",
        bf16=job.precision == "bf16",
        use_cpu=job.device == "cpu",
        torch_compile=job.compiled,
        logging_steps=STEPS_PER_LOG,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = _InOrder(
        model=model,
        args=arguments,
        train_dataset=load_from_disk(str(job.folder / RUN_CLM_ROWS)),
        data_collator=default_data_collator,
    )
    _watch(trainer, windows)
    trainer.train()


def train_ours(job: Job, windows: Windows) -> None:
    """PretrainingTrainer from a recipe, joined as pretrain.py joins it."""
    from pipeline.arguments import training_arguments
    from pipeline.blocks import Rows
    from pipeline.model import build_model
    from pipeline.recipe import read_recipe
    from pipeline.row_file import RowFile
    from pipeline.tokenizer import load_tokenizer
    from pipeline.trainer import PretrainingTrainer

    recipe, arguments = training_arguments(read_recipe(job.folder / RECIPE))
    if job.device == "cpu":
        torch.set_num_threads(job.threads)  # it may choose others, and all arms should have as many
    tokenizer = load_tokenizer(recipe.tokenizer.pretrained)
    model = build_model(
        recipe.model, tokenizer, block_size=recipe.data.block_size, seed=arguments.seed
    )
    load_weights(model, job)
    file = RowFile.open(job.folder / ROWS)
    tokens = len(file) * file.block_size
    counts = {"tokens": tokens, "bytes": 4 * tokens, "scored_tokens": 0, "scored_bytes": 0}
    rows = Rows(file, **counts)
    Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
    trainer = PretrainingTrainer(
        recipe, arguments, model=model, tokenizer=tokenizer,
        blocks={"train": rows, "validation": rows},
    )  # fmt: skip
    _watch(trainer, windows)
    trainer.train_from("never")


def _watch(trainer: Any, windows: Windows) -> None:
    """Let the windows decide when a Trainer makes its steps, and see its losses."""
    make_step, fetch = trainer.training_step, trainer.get_batch_samples

    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = make_step(*args, **kwargs)
        windows.losses.append(loss.detach())
        return loss

    def get_batch_samples(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return fetch(*args, **kwargs)
        finally:
            windows.waiting += time.perf_counter() - started

    trainer.training_step, trainer.get_batch_samples = training_step, get_batch_samples
    trainer.add_callback(_Turns(windows))
