"""What the recipe and the machine come to in `TrainingArguments`: derived, checked, chosen."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from pipeline import attention, launch, machine, zero
from pipeline.accumulation import share_of_update
from pipeline.lr_schedule import schedule
from pipeline.push_list import STRATEGIES
from pipeline.recipe import InputError, Recipe, first_line
from pipeline.rendezvous import join
from pipeline.sharding import wanted_sharding
from pipeline.text_files import read_text
from pipeline.training_limits import check_limits

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
    "hub_token": "set HF_TOKEN in the environment; a recipe is kept in files that are shared",
    "hub_always_push": "every checkpoint is pushed, one after the other",
    "logging_nan_inf_filter": "a loss that is not a number is shown as it is",
    "dataloader_drop_last": "rows are full, and a last partial batch is left out",
    "dataloader_persistent_workers": "a resumed run draws its random numbers as each epoch does",
    "dataloader_in_order": "rows keep their order, so that a resumed run finds its place",
    "remove_unused_columns": "batches come finished from the rows",
    "restore_callback_states_from_checkpoint": "a resumed run goes on counting",
    "average_tokens_across_devices": "the loss is the mean over all tokens of an update",
    "label_smoothing_factor": "perplexity is exp of the plain cross-entropy",
    "use_liger_kernel": "Liger has no kernels for GPT-2",
    "include_num_input_tokens_seen": "tokens_seen stands in every log",
    "label_names": "the labels are the ids",
    "do_train": "pretrain.py trains",
    "do_eval": "use training.eval_strategy",
    "do_predict": "pretrain.py trains",
    "fsdp": "the accelerate config says how devices share the work",
    "fsdp_config": "the accelerate config says how devices share the work",
    "deepspeed": "the accelerate config says how devices share the work",
}


_LOWER_IS_BETTER = {"loss", "perplexity", "bits_per_byte"}


def training_arguments(recipe: Recipe) -> tuple[Recipe, TrainingArguments]:
    """Return the recipe with every open choice made, and the `TrainingArguments` it means.

    Sets up devices and, under a launcher, the process group.

    Raises:
        InputError: a field is ours, a value is refused by transformers, or the device lacks
            the precision.
        CutOff: the other processes cannot be reached.
    """
    stated = dict(recipe.training)
    for name in stated:
        if name in OWNED:
            raise InputError(f"training.{name}: leave it out; {OWNED[name]}")
    _check_values(stated)
    _check_pushing(stated)
    stated = {k: v for k, v in stated.items() if k != "push_to_hub" and not k.startswith("hub_")}
    for reporter in _reporters(stated.get("report_to")):
        if importlib.util.find_spec(reporter) is None:
            raise InputError(
                f"training.report_to: the package {reporter} is not installed; run "
                f"pip install {reporter}, or leave report_to out"
            )
    if recipe.optimizer.name == "muon":
        _check_muon(stated)
    if recipe.model.lora_r is not None and wanted_sharding():
        raise InputError(
            "model.lora_r: the adapter's checkpoints are written by one process that holds it "
            "whole, and the accelerate config shards it (FSDP or DeepSpeed); use "
            "accelerate_configs/ddp.yaml"
        )
    wanted = launch.asked()
    on_cpu = launch.on_cpu(wanted, by_recipe=stated.get("use_cpu", False))
    is_on_cuda = torch.cuda.is_available() and not on_cpu
    if recipe.model.attn_implementation == "blockwise_causal" and not on_cpu:
        logger.warning(
            "model.attn_implementation: blockwise_causal is the faster one on CPUs only; without "
            "that line this device is given its own"
        )
    precision = machine.precision(recipe.precision, on_cpu=on_cpu)
    if precision == "fp16" and wanted_sharding() is not None:
        raise InputError(
            "precision: fp16 is not tried where the accelerate config shards the model (FSDP or "
            "DeepSpeed); use bf16 or fp32, or accelerate_configs/ddp.yaml"
        )
    if precision == "fp16" and recipe.guards.skip_spikes:
        raise InputError(
            "guards.skip_spikes: with precision fp16 the gradient scaler decides which updates are "
            "made; use bf16 or fp32, or leave it out"
        )
    launch.check(wanted, precision=precision)
    if stated.get("torch_compile") and on_cpu and not machine.has_compiler():
        logger.warning("torch_compile: no C++ compiler and Python.h here; going on without")
        stated["torch_compile"] = False
    if wanted_sharding() == "deepspeed":
        zero.check(recipe, precision=precision)
        if stated.get("torch_compile"):
            logger.warning("torch_compile: DeepSpeed's hooks break the graph; going on without")
            stated["torch_compile"] = False
    patience = recipe.evaluation.early_stopping_patience
    for file in recipe.evaluation.texts.values():
        if not read_text(Path(file), errors=recipe.data.errors):
            raise InputError(f"evaluation.texts: {file}: the file is empty")
    derived = {
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": on_cpu,
        "logging_nan_inf_filter": False,
        "dataloader_drop_last": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "restore_callback_states_from_checkpoint": True,
    }
    defaults: dict[str, Any] = {
        "report_to": "none",
        "run_name": recipe.output_dir.resolve().name,
        "per_device_eval_batch_size": stated.get("per_device_train_batch_size", 8),
        "dataloader_pin_memory": is_on_cuda,
        # A batch's copy from pinned memory then waits for nothing; the library's default does.
        "accelerator_config": {
            "non_blocking": is_on_cuda and stated.get("dataloader_pin_memory", True)
        },
        "ddp_find_unused_parameters": False,  # the library's default walks the graph every step
    }
    if stated.get("load_best_model_at_end") or stated.get("save_strategy") == "best" or patience:
        defaults["metric_for_best_model"] = "loss"
    if stated.get("metric_for_best_model", "loss").removeprefix("eval_") in _LOWER_IS_BETTER:
        defaults["greater_is_better"] = False
    if on_cpu:  # before TrainingArguments sets what only a launcher has set until here
        machine.prepare_cpu()
    join(
        stated.get("ddp_backend") or ("gloo" if on_cpu else "nccl"),
        timeout=stated.get("ddp_timeout", TrainingArguments.ddp_timeout),
    )
    try:
        arguments = TrainingArguments(**{**defaults, **stated, **derived})
        Trainer.get_optimizer_cls_and_kwargs(arguments)  # its package may be missing
    except (ValueError, TypeError, ImportError, AssertionError) as error:
        raise InputError(f"training: {' '.join(str(error).split())}") from None
    zero.make_models_whole()
    arguments._n_gpu = min(arguments.n_gpu, 1)  # or one process divides batches over all GPUs
    logger.info(launch.came(arguments))
    if recipe.reduce_dtype == "bf16" and arguments.world_size > 1:
        if not is_on_cuda and wanted_sharding() != "fsdp2":
            raise InputError(
                "reduce_dtype: bf16 gradients between whole models need CUDA GPUs (NCCL); leave "
                "it out here"
            )
    arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = share_of_update(
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
    chosen = {
        "precision": precision,
        "model": recipe.model.model_dump(exclude_unset=True)
        | {
            "attn_implementation": recipe.model.attn_implementation
            or attention.fastest(
                block_size=recipe.data.block_size,
                attend_across=recipe.data.attend_across,
                on_cpu=on_cpu,
            )
        },
        "training": {**recipe.training, "torch_compile": arguments.torch_compile},
    }
    return recipe.with_values(**chosen), arguments


def _check_muon(stated: dict[str, Any]) -> None:
    if name := next((n for n in ("optim", "optim_args") if stated.get(n) is not None), None):
        raise InputError(
            f"training.{name}: {stated[name]} contradicts optimizer.name: muon, which brings its "
            "own; leave one of them out"
        )
    if wanted_sharding():
        raise InputError(
            "optimizer.name: muon needs every matrix whole, and the accelerate config shards them "
            "(FSDP or DeepSpeed); use adamw, or accelerate_configs/ddp.yaml"
        )


def _check_pushing(stated: dict[str, Any]) -> None:
    """See that what we do instead of Trainer can be done; its own pushes fail without a word."""
    strategy = stated.get("hub_strategy", STRATEGIES[0])
    if strategy not in STRATEGIES:
        raise InputError(
            f"training.hub_strategy: {strategy!r} is not one of {', '.join(STRATEGIES)}"
        )
    names = [n for n in stated if n.startswith("hub_")]
    if names and "push_to_hub" not in stated:
        raise InputError(f"training.{names[0]} has a meaning with training.push_to_hub only")


def remedy(error: BaseException, recipe: Recipe, arguments: TrainingArguments) -> str | None:
    """Return the sentence for a failure that other keys avoid, None for all others."""
    is_out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    # The CPU allocator's is a RuntimeError.
    if is_out_of_memory or "can't allocate memory" in str(error):
        return _out_of_memory(recipe, arguments)
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return (
            f"training.torch_compile: {first_line(error)}; set it to false, or leave out what the "
            "compiler does not know (model.attn_implementation, for one)"
        )
    return None


def _out_of_memory(recipe: Recipe, arguments: TrainingArguments) -> str:
    """Return what was asked of the memory, and which keys ask for less."""
    batch = arguments.per_device_train_batch_size
    smaller = next((b for b in range(batch // 2, 0, -1) if batch % b == 0), None)
    less = "a smaller data.block_size or model.config"
    if smaller:
        less = (
            f"--training.per_device_train_batch_size {smaller} (the update stays the same, "
            f"accumulation makes up for it), or {less}"
        )
    return (
        f"out of memory on {machine.device_name(arguments.device)} with {batch} rows of "
        f"{recipe.data.block_size} tokens at once; try {less}"
    )


def _check_values(stated: dict[str, Any]) -> None:
    check_limits(stated)
    metric = stated.get("metric_for_best_model", "loss").removeprefix("eval_")
    if metric not in _LOWER_IS_BETTER:
        raise InputError(
            f"training.metric_for_best_model: {metric!r} is not measured; use one of "
            f"{', '.join(sorted(_LOWER_IS_BETTER))}"
        )
    backend = stated.get("torch_compile_backend")
    if backend is not None and backend not in torch.compiler.list_backends(exclude_tags=()):
        raise InputError(
            f"training.torch_compile_backend: {backend!r} is not one of "
            f"{', '.join(torch.compiler.list_backends(exclude_tags=()))}"
        )


def _reporters(report_to: str | list[str] | None) -> list[str]:
    """Return those named reporters that are a package of the same name."""
    names = [report_to] if isinstance(report_to, str) else report_to or []
    return [name for name in names if name in ("tensorboard", "trackio", "wandb", "mlflow")]
