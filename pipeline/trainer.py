"""The `Trainer` that joins the rooms: our schedule, truthful numbers, whole checkpoints.

What stays Trainer's: the loop, devices, mixed precision, clipping, reporters. What is overridden
and why stands at each method.
"""

import contextlib
import importlib.util
import logging
import os
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_callback import EarlyStoppingCallback, PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from pipeline import artifact, checkpoint
from pipeline.blocks import HeldOutBatches, Rows, collate
from pipeline.callbacks import (
    PerplexityCallback,
    SampleCallback,
    Stopwatch,
    TrainingProgressCallback,
)
from pipeline.corpus import read_text
from pipeline.generation import continuation
from pipeline.lr_schedule import schedule
from pipeline.model import load_model, parameter_count
from pipeline.perplexity import Score, bits_per_byte, perplexity, sum_nats
from pipeline.recipe import InputError, Recipe

logger = logging.getLogger(__name__)

# It warns of compiling where there is no Ampere GPU; on a CPU compiling is worth half the time.
logging.getLogger("transformers.training_args").addFilter(
    lambda record: "speedups for torchdynamo" not in str(record.msg)
)

# Fields of TrainingArguments that are not the recipe's to state, and where they come from instead.
OWNED = {
    "gradient_accumulation_steps": "it is derived from tokens_per_update",
    "bf16": "use precision: bf16",
    "fp16": "use precision: fp16",
    "bf16_full_eval": "evaluation runs in the recipe's precision",
    "fp16_full_eval": "evaluation runs in the recipe's precision",
    "lr_scheduler_type": "use schedule.name",
    "lr_scheduler_kwargs": "use schedule:",
    "warmup_steps": "use schedule.warmup_steps",
    "resume_from_checkpoint": "use --resume",
    "ignore_data_skip": "a resumed run goes on where it stopped",
    "save_only_model": "such a checkpoint cannot be resumed",
    "enable_jit_checkpoint": "it can hang several processes and is not exact",
    "auto_find_batch_size": "the batch follows from tokens_per_update",
    "push_to_hub": "push the finished folder: hf upload NAME outputs/...",
    "logging_nan_inf_filter": "a loss that is not a number is shown as it is",
    "dataloader_drop_last": "rows are full, and a last partial batch is left out",
    "remove_unused_columns": "batches come finished from the rows",
    "do_train": "pretrain.py trains",
    "do_eval": "use training.eval_strategy",
    "do_predict": "pretrain.py trains",
    "fsdp": "the accelerate config says how devices share the work",
    "fsdp_config": "the accelerate config says how devices share the work",
    "deepspeed": "the accelerate config says how devices share the work",
}


def training_arguments(recipe: Recipe) -> tuple[Recipe, TrainingArguments]:
    """Return the recipe with every open choice made, and the `TrainingArguments` it means.

    Sets up devices and, under a launcher, the process group.

    Raises:
        InputError: a field is ours, a value is refused by transformers, or the device lacks the
            precision.
    """
    stated = dict(recipe.training)
    for name in stated:
        if name in OWNED:
            raise InputError(f"training.{name}: leave it out; {OWNED[name]}")
    _check_values(stated)
    for reporter in _reporters(stated.get("report_to")):
        if importlib.util.find_spec(reporter) is None:
            raise InputError(
                f"training.report_to: the package {reporter} is not installed; run "
                "pip install -e '.[tracking]' (or pip install it), or leave report_to out"
            )
    on_cpu = stated.get("use_cpu", False) or not (
        torch.cuda.is_available() or torch.backends.mps.is_available()
    )
    precision = _precision(recipe.precision, on_cpu=on_cpu)
    if stated.get("torch_compile") and on_cpu and not _compiler_is_there():
        logger.warning("torch_compile: no C++ compiler and Python.h here; going on without")
        stated["torch_compile"] = False
    patience = recipe.evaluation.early_stopping_patience
    derived = {
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": on_cpu,
        "logging_nan_inf_filter": False,
        "dataloader_drop_last": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "ddp_find_unused_parameters": False,
        "ddp_static_graph": None,
    }
    defaults: dict[str, Any] = {
        "report_to": "none",
        "per_device_eval_batch_size": stated.get("per_device_train_batch_size", 8),
        "dataloader_pin_memory": not on_cpu,
    }
    if stated.get("load_best_model_at_end") or stated.get("save_strategy") == "best" or patience:
        defaults["metric_for_best_model"] = "loss"
    if stated.get("metric_for_best_model", "loss").removeprefix("eval_") in _LOWER_IS_BETTER:
        defaults["greater_is_better"] = False
    try:
        arguments = TrainingArguments(**{**defaults, **stated, **derived})
    except (ValueError, TypeError, ImportError, AssertionError) as error:
        raise InputError(f"training: {' '.join(str(error).split())}") from None
    arguments.gradient_accumulation_steps = gradient_accumulation_steps(
        recipe.tokens_per_update,
        block_size=recipe.data.block_size,
        batch_size=arguments.per_device_train_batch_size,
        world_size=arguments.world_size,
    )
    if patience and arguments.eval_strategy == "no":
        raise InputError(
            "evaluation.early_stopping_patience counts evaluations, and training.eval_strategy is "
            "no: set it to steps or epoch, or leave the patience out"
        )
    if arguments.max_steps > 0:
        schedule(recipe.schedule, max_steps=arguments.max_steps)  # a warm-up too long: now
    if on_cpu:
        torch.set_num_threads(_threads())
        # Compiled GPT-2 on two threads otherwise adds embedding gradients in changing order.
        torch.use_deterministic_algorithms(True)
    return recipe.with_values(precision=precision), arguments


def gradient_accumulation_steps(
    tokens_per_update: int, *, block_size: int, batch_size: int, world_size: int
) -> int:
    """Return how many batches each process adds up in one update of `tokens_per_update` tokens.

    Raises:
        InputError: it does not come out even; the nearest budgets that do are named.
    """
    tokens_per_batch = block_size * batch_size * world_size
    steps, rest = divmod(tokens_per_update, tokens_per_batch)
    if rest or not steps:
        nearest = sorted({max(1, steps) * tokens_per_batch, (steps + 1) * tokens_per_batch})
        raise InputError(
            f"tokens_per_update is {tokens_per_update}, which is not a multiple of data.block_size "
            f"{block_size} x training.per_device_train_batch_size {batch_size} x {world_size} "
            f"process(es) = {tokens_per_batch}; the nearest that are: "
            f"{' and '.join(str(n) for n in nearest)}"
        )
    return steps


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
        self.train_seconds = 0.0
        rows_per_update = recipe.tokens_per_update // recipe.data.block_size
        if len(blocks["train"]) < rows_per_update:
            raise InputError(
                f"the training text gives {len(blocks['train'])} rows of {recipe.data.block_size} "
                f"tokens and one update takes {rows_per_update}: give more text, or a smaller "
                "tokens_per_update and training.per_device_train_batch_size"
            )
        held_out = blocks["validation"]
        if recipe.evaluation.tokens is not None:
            held_out = held_out.first(recipe.evaluation.tokens, tokenizer)
        self._bytes_per_token = blocks["train"].bytes / blocks["train"].tokens
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=blocks["train"],
            eval_dataset=held_out,
            data_collator=collate,
            processing_class=tokenizer,
        )
        assert self._loss_shifts_labels  # else the loss is divided by the wrong number of tokens
        for line in self._derived():
            logger.info("%s", line)
        self._join_callbacks(tokenizer)

    def train_from(self, resume: str) -> None:
        """Train, from the checkpoint that `--resume auto|must|never|PATH` means, to the end.

        Raises:
            InputError: there is no such checkpoint, or the device's memory does not suffice.
        """
        folder = Path(self.args.output_dir)
        found = None if resume == "never" else checkpoint.chosen(folder, resume)
        if found is not None:
            logger.info("resuming from %s", found)
        started = time.perf_counter()
        try:
            self.train(resume_from_checkpoint=str(found) if found else None)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise InputError(_out_of_memory_sentence(self.recipe, self.args)) from None
        self._watch.pause()
        self.train_seconds = time.perf_counter() - started

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
        metrics |= {
            "train_tokens": self.state.global_step * self.recipe.tokens_per_update,
            "train_tokens_per_second": self.tokens_per_second,
            "train_seconds": self.train_seconds,
            "compile_seconds": self.compile_seconds,
            "train_bytes": blocks["train"].bytes,
            "parameters": parameter_count(self.model),
            "world_size": self.args.world_size,
            "threads": torch.get_num_threads(),
            "device": _device_name(self.args.device),
            "precision": self.recipe.precision,
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
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(folder / name)
            if self.args.should_save:
                self.state.save_to_json(str(staging / name / "trainer_state.json"))
                artifact.commit(staging / name, folder / name, self._origin(), {})
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
        return Score(nats=nats, tokens=rows.tokens - 1, bytes=rows.scored_bytes)

    def _origin(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.as_dict(),
            "world_size": self.args.world_size,
            "threads": torch.get_num_threads(),
        }

    def _derived(self) -> list[str]:
        """Say what followed from the recipe, the data and the machine."""
        config, arguments, rows = self.model.config, self.args, len(self.train_dataset)
        block_size = self.recipe.data.block_size
        per_update = self.recipe.tokens_per_update // block_size
        updates = arguments.max_steps
        if updates < 0:
            updates = int(arguments.num_train_epochs * (rows // per_update))
        return [
            f"model: {parameter_count(self.model):,} parameters, vocabulary {config.vocab_size:,}, "
            f"{config.n_positions:,} positions, end-of-text is id {config.eos_token_id}",
            f"update: {self.recipe.tokens_per_update:,} tokens = "
            f"{arguments.per_device_train_batch_size} rows x {block_size} tokens x "
            f"{arguments.gradient_accumulation_steps} accumulated x "
            f"{arguments.world_size} process(es)",
            f"run: {updates:,} updates, {updates * self.recipe.tokens_per_update:,} tokens, "
            f"{updates * per_update / rows:.2f} times the training text",
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
        if not arguments.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(TrainingProgressCallback())
        else:
            self.remove_callback(PrinterCallback)
        if section.texts:
            texts = {
                name: Rows.held_out(
                    [read_text(Path(file), errors=self.recipe.data.errors)],
                    tokenizer,
                    block_size=self.recipe.data.block_size,
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


def _threads() -> int:
    """Return the threads of this process: what OMP_NUM_THREADS says, else its share of the cores.

    `accelerate launch` without a config sets OMP_NUM_THREADS to 1, which nobody has asked for.
    """
    said = int(os.environ.get("OMP_NUM_THREADS", "0") or 0)
    by_launcher = said == 1 and "ACCELERATE_DYNAMO_BACKEND" in os.environ
    if said and not by_launcher:
        return torch.get_num_threads()
    cores = psutil.cpu_count(logical=False) or 1
    if hasattr(os, "sched_getaffinity"):  # a container or taskset may allow fewer
        cores = min(cores, len(os.sched_getaffinity(0)))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


_LOWER_IS_BETTER = {"loss", "perplexity", "bits_per_byte"}

# Values that TrainingArguments accepts and that cannot work, with the smallest that can.
_SMALLEST = {
    "learning_rate": (0, "above"),
    "max_steps": (1, "at least"),
    "num_train_epochs": (0, "above"),
    "per_device_train_batch_size": (1, "at least"),
    "per_device_eval_batch_size": (1, "at least"),
    "save_total_limit": (checkpoint.FEWEST_KEPT, "at least"),
    "logging_steps": (0, "above"),
    "eval_steps": (0, "above"),
    "save_steps": (0, "above"),
    "seed": (0, "at least"),
    "weight_decay": (0, "at least"),
    "max_grad_norm": (0, "at least"),
}


def _check_values(stated: dict[str, Any]) -> None:
    for name, (smallest, word) in _SMALLEST.items():
        value = stated.get(name)
        if value is None:
            continue
        fits = value >= smallest if word == "at least" else value > smallest
        if not fits:  # also NaN
            raise InputError(f"training.{name}: must be {word} {smallest}; got {value}")


def _reporters(report_to: str | list[str] | None) -> list[str]:
    """Return those named reporters that are a package of the same name."""
    names = [report_to] if isinstance(report_to, str) else report_to or []
    return [name for name in names if name in ("tensorboard", "trackio", "wandb", "mlflow")]


def _precision(asked: str, *, on_cpu: bool) -> str:
    """Return fp32, bf16 or fp16 for the device at hand."""
    cuda = torch.cuda.is_available() and not on_cpu
    if cuda:
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif on_cpu:
        # Other processors emulate bf16 products, slower than fp32.
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        has_bf16 = False  # MPS: autocast to bf16 depends on the macOS version
    if asked == "auto":
        return "bf16" if has_bf16 else "fp32"
    if asked == "bf16" and not has_bf16:
        raise InputError("precision: bf16 is not in this device's hardware; use auto or fp32")
    if asked == "fp16" and not cuda:
        raise InputError(
            "precision: fp16 needs a CUDA GPU, and none is used here; use auto or fp32"
        )
    return asked


def _compiler_is_there() -> bool:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return bool(compiler) and Path(sysconfig.get_path("include"), "Python.h").exists()
