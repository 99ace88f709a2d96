"""The `Trainer` that joins the rooms: our schedule, truthful numbers.

What stays Trainer's: the loop, devices, mixed precision, clipping, reporters. What is overridden
and why stands at each method.
"""

import functools
import logging
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import (
    DDPCommunicationHookType,
    DynamoBackend,
    FullyShardedDataParallelPlugin,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_callback import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
)

from pipeline import adaptation, artifact, checkpoint, zero
from pipeline.blocks import Rows, collate
from pipeline.callbacks import (
    PerplexityCallback,
    SampleCallback,
    TasksCallback,
    TrainingProgressCallback,
)
from pipeline.evaluating import named_texts
from pipeline.lr_schedule import schedule
from pipeline.machine import device_name
from pipeline.meters import Meter
from pipeline.model import build_model, parameter_count
from pipeline.optimizer import muon
from pipeline.perplexity import bits_per_byte, perplexity
from pipeline.planning import flops_per_token
from pipeline.pretrained import weights_fingerprint
from pipeline.processes import Processes
from pipeline.pushing import Pusher
from pipeline.recipe import InputError, Recipe, RunFailed, first_line
from pipeline.results import measured, measured_tasks
from pipeline.run_data import RunData
from pipeline.run_files import SAMPLES
from pipeline.run_record import accepted
from pipeline.sharding import wanted_sharding
from pipeline.tasks import as_logs, check_tasks
from pipeline.tokenizer import tokenizer_fingerprint
from pipeline.trial import TrialTrainer

logger = logging.getLogger(__name__)


class PretrainingTrainer(TrialTrainer):
    """The same with our schedule and logs."""

    def __init__(
        self,
        recipe: Recipe,
        arguments: TrainingArguments,
        *,
        model: GPT2LMHeadModel,
        tokenizer: PreTrainedTokenizerBase,
        blocks: dict[str, Rows],
        processes: Processes | None = None,
        pusher: Pusher | None = None,
    ) -> None:
        """Join the parts; `pusher` is offered every checkpoint.

        Raises:
            InputError: fewer rows than one update needs, or a warm-up beyond the horizon.
        """
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
        self._texts = named_texts(recipe, tokenizer)
        self._has_logged_compilation = False
        self._bytes_per_token = blocks["train"].bytes_per_token
        still = adaptation.still_blocks(model)
        flops = flops_per_token(  # before anything shards the weights
            parameters=parameter_count(model), trained=parameter_count(model, trained=True),
            still=sum(map(parameter_count, model.transformer.h[:still])), still_layers=still,
            layers=model.config.n_layer, width=model.config.n_embd,
            block_size=recipe.data.block_size,
        )  # fmt: skip
        try:
            self.meter = Meter(
                flops, precision=recipe.precision, device=arguments.device,
                world_size=arguments.world_size,
            )  # fmt: skip
            super().__init__(
                recipe,
                arguments,
                processes=processes,
                pusher=pusher,
                fingerprints={
                    "rows": blocks["train"].fingerprint,
                    "tokenizer": tokenizer_fingerprint(tokenizer),
                    "base": weights_fingerprint(recipe.model),
                },
                model=model,
                train_dataset=blocks["train"],
                eval_dataset=held_out,
                data_collator=collate,
                processing_class=tokenizer,
            )
        except (ValueError, ImportError, RuntimeError) as error:
            raise InputError(f"training: {first_line(error)}") from None
        zero.make_models_whole()  # Trainer has told transformers again
        if arguments.torch_compile:
            self._compile()
        assert self._loss_shifts_labels  # else the loss is divided by the wrong number of tokens
        for line in self._derived():
            logger.info("%s", line)
        self._join_callbacks(tokenizer)

    @property
    def history(self) -> list[dict[str, float]]:
        """Every log of the run, those before a resume too."""
        return self.state.log_history

    def save_result(self) -> None:
        """Write model and tokenizer into the run folder, each file whole or as it was.

        Raises:
            InputError: the disk is full.
            RunFailed: the last update has made a weight infinite.
        """
        folder = Path(self.args.output_dir)
        files = self._training_state.model_files()

        def write() -> None:
            with artifact.full_disk_said(folder):
                for name, content in files.items():
                    staging = folder / f"{artifact.STAGING}{name}"
                    checkpoint.write_file(staging, content)
                    os.replace(staging, folder / name)

        try:
            self._processes.told(write)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise RunFailed(f"the last update was one too many: {error}") from None

    def result(self, blocks: dict[str, Rows]) -> tuple[dict[str, Any], str]:
        """Return the run's numbers, held-out ones measured on the saved folder, and a sample."""
        meters = self.meter.read(self._spent["tokens_per_second"])  # before the final measuring
        with self._watchdog:
            metrics, sample = measured(
                self.recipe, self.args, self._processes, blocks, self.processing_class,
                after_batch=functools.partial(self._watchdog.beat, "the final measuring"),
            )  # fmt: skip
        if self.recipe.evaluation.tasks:  # the others wait for as long as it takes
            metrics["tasks"] = self._processes.told(
                lambda: measured_tasks(self.recipe, self.args, self.processing_class),
                patiently=True,
            )
            place = {"step": self.state.global_step, "tokens_seen": self._tokens_seen}
            self.state.log_history.append(
                as_logs(metrics["tasks"]) | place
            )  # the reporters have closed
        metrics |= {
            "updates": self.state.global_step,
            "train_tokens": self._tokens_seen,
            "train_tokens_per_second": self._spent["tokens_per_second"],
            "train_seconds": self._spent["train_seconds"],
            "compile_seconds": self._spent["compile_seconds"],
            **meters,
            "product_rate_flops": self.meter.product_rate,
            "flops_per_token": self.meter.flops_per_token,
            "data_wait_fraction": self._spent["data_wait_fraction"],
            "logging_fraction": self._spent["logging_fraction"],
            "evaluation_seconds": self._spent["evaluation_seconds"],
            "train_bytes": round(self._tokens_seen * self._bytes_per_token)
            if blocks["train"].is_stream
            else blocks["train"].bytes,
            "parameters": parameter_count(self.model),
            "trained_parameters": parameter_count(self.model, trained=True),
            "past_updates": self.recipe.schedule.past_updates,
            "preflight_accepted": accepted(self.recipe.output_dir),
            "world_size": self.args.world_size,
            "threads": torch.get_num_threads(),
            "device": device_name(self.args.device),
            "precision": self.recipe.precision,
            "block_size": self.recipe.data.block_size,
        }
        return metrics, sample

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Muon where the recipe says so; else Trainer's, fused AdamW by default."""
        if self.optimizer is None and self.recipe.optimizer.name == "muon":
            self.optimizer = muon(self.model, self.recipe.optimizer, self.args)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Our schedule: transformers' cosine with a floor climbs back after its horizon."""
        if self.lr_scheduler is None:
            curve = schedule(self.recipe.schedule, max_steps=num_training_steps)
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, curve)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add perplexity, bits per byte, tokens and the meters: here they reach every reporter."""
        with self._clock.waiting_for("logging"):
            step = self.state.global_step
            logs["tokens_seen"] = self._tokens_seen
            logs["tokens_per_second"] = self._clock.rate(step)
            if "loss" in logs:
                logs["perplexity"] = perplexity(logs["loss"])
                # By the training text's average: counting each window's bytes would cost a sync.
                logs["bits_per_byte"] = bits_per_byte(logs["loss"], self._bytes_per_token)
                logs |= self._clock.since_last(step)
                logs |= self.meter.read(logs["tokens_per_second"])
                if self.recipe.guards.skip_spikes:
                    logs["skipped_updates"] = self._notices.skipped
                if not self._has_logged_compilation:
                    logs["compile_seconds"] = self._clock.compile_seconds
                    self._has_logged_compilation = True
            if "train_runtime" in logs:  # of the whole run, not of what came after a resume
                seconds = self._clock.spent(step)["train_seconds"]
                logs["train_runtime"] = seconds
                logs["train_steps_per_second"] = step / seconds
                logs["train_samples_per_second"] = step * self._rows_per_update / seconds
            super().log(logs, start_time)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Count the time that an update waits for its batches."""
        with self._clock.waiting_for("data"):
            return super().get_batch_samples(*args, **kwargs)

    def _get_num_items_in_batch(self, batches: list, device: torch.device) -> torch.Tensor | None:
        """Know how many labels an update has where each row is full; Trainer asks all processes."""
        data = self.recipe.data
        is_full = data.packing == "concatenate" and data.attend_across
        if not is_full or self.train_dataset.is_marked:
            return super()._get_num_items_in_batch(batches, device)
        return torch.tensor(float(self._rows_per_update * (data.block_size - 1)), device=device)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Reduce gradients as the recipe says, and leave compiling to us.

        accelerate compiles what DDP wraps, which is not one graph; and with bf16 its FSDP2 would
        round the weights, the residual stream and the gradients to bf16, unlike DDP: here both
        compute the same by autocast.
        """
        arguments = super()._build_accelerator_args(**kwargs)
        if self.args.torch_compile:
            arguments["dynamo_plugin"].backend = DynamoBackend.NO
        reduced = torch.bfloat16 if self.recipe.reduce_dtype == "bf16" else None
        if wanted_sharding() == "fsdp2":
            arguments["fsdp_plugin"] = FullyShardedDataParallelPlugin(
                mixed_precision_policy=MixedPrecisionPolicy(reduce_dtype=reduced)
            )
        (handler,) = arguments["kwargs_handlers"]
        handler.gradient_as_bucket_view = True  # else every gradient is there twice
        handler.static_graph = True  # which `_settle` has it record
        if reduced is not None:
            handler.comm_hook = DDPCommunicationHookType.BF16
        return arguments

    def _compile(self) -> None:
        """Compile the model in place, as one graph of fixed shapes: a break in it is a bug.

        Its weights keep their names; evaluations and samples run it plain (`torch.compiler`'s
        stance), so that their shapes compile nothing. Of divided weights each block is a graph:
        they come and go between the blocks.
        """
        options = {"backend": self.args.torch_compile_backend, "mode": self.args.torch_compile_mode}
        options |= {"fullgraph": True, "dynamic": False}
        if not self.is_fsdp_enabled:
            self.model.compile(**options)
            return
        for block in self.model.transformer.h:
            block.forward = torch.compile(block.forward, **options)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Nothing: Trainer's count leaves out the head and attention (41 % of GPT-2 small)."""
        return 0

    def _derived(self) -> list[str]:
        """Say what followed from the recipe, the data and the machine."""
        config, arguments, rows = self.model.config, self.args, len(self.train_dataset)
        block_size, updates = self.recipe.data.block_size, self._horizon
        read = self.evaluated_tokens  # a third of a training token each
        parameters = parameter_count(self.model)
        trained = parameter_count(self.model, trained=True)
        share = f" ({trained:,} of them trained, {trained / parameters:.2%})"
        share = share if trained < parameters else ""
        return [
            f"model: {parameters:,} parameters{share}, vocabulary {config.vocab_size:,}, "
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
            f"each evaluation: {self.eval_dataset.scored_tokens:,} held-out tokens"
            + "".join(f", {rows.scored_tokens:,} of {name}" for name, rows in self._texts.items())
            + f" = {read / self.recipe.tokens_per_update / 3:.1f} updates' worth of products",
            *self._going_on(),
            f"machine: {device_name(arguments.device)}, {torch.get_num_threads()} threads, "
            f"{self.recipe.precision}, {'' if arguments.torch_compile else 'not '}compiled"
            + (" (the first update takes longer)" if arguments.torch_compile else ""),
        ]

    def _going_on(self) -> list[str]:
        section = self.recipe.schedule
        if not section.goes_on:
            return []
        rate = schedule(section, max_steps=self._horizon)(0) * self.args.learning_rate
        return [
            f"schedule: goes on after {section.past_updates:,} updates of "
            f"{self.recipe.model.pretrained}, at a rate of {rate:.3g}"
        ]

    def _join_callbacks(self, tokenizer: PreTrainedTokenizerBase) -> None:
        section, arguments = self.recipe.evaluation, self.args
        self.remove_callback(PrinterCallback if arguments.disable_tqdm else ProgressCallback)
        self.add_callback(TrainingProgressCallback())
        if self._texts:
            self.add_callback(
                PerplexityCallback(
                    self._texts,
                    self._processes,
                    batch_size=arguments.eval_batch_size,
                    log=self.log,
                    after_batch=self._beat,
                )  # fmt: skip
            )
        if self.recipe.generation.prompts:
            samples, written = Path(arguments.output_dir) / SAMPLES, self.recipe.generation
            self.add_callback(
                SampleCallback(
                    written, tokenizer, samples, model=self._model_for_main, after=self._beat
                )
            )
        if section.tasks:
            positions = self.model.config.n_positions
            self._processes.told(
                lambda: check_tasks(section.tasks, positions=positions), patiently=True
            )
            self.add_callback(TasksCallback(section, run=self._run_tasks, log=self.log))
        if section.early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(section.early_stopping_patience))


def make_trainer(
    recipe: Recipe,
    arguments: TrainingArguments,
    data: RunData,
    *,
    processes: Processes | None = None,
    pusher: Pusher | None = None,
) -> PretrainingTrainer:
    """Return the trainer of the recipe's model on its data.

    Raises:
        InputError: see `build_model` and `PretrainingTrainer`.
    """
    model = build_model(
        recipe.model, data.tokenizer, block_size=recipe.data.block_size, seed=arguments.seed,
        attend_across=recipe.data.attend_across, added_tokens=len(recipe.tokenizer.added_tokens),
    )  # fmt: skip
    return PretrainingTrainer(
        recipe, arguments, model=model, tokenizer=data.tokenizer, blocks=data.blocks,
        processes=processes, pusher=pusher,
    )  # fmt: skip
