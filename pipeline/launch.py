"""What `accelerate launch` was asked for, and what came of it."""

import os
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from transformers import TrainingArguments

from pipeline.machine import device_name
from pipeline.recipe import InputError
from pipeline.sharding import wanted_sharding

# Where MPI and the launchers that need no environment of torch's say how many processes there are;
# `accelerate` asks them in this order.
COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

# Ways to divide a model that a config can ask for, none of which this trainer knows.
DIVISIONS = {
    "PARALLELISM_CONFIG_TP_SIZE": "tensor parallelism (parallelism_config_tp_size)",
    "PARALLELISM_CONFIG_CP_SIZE": "context parallelism (parallelism_config_cp_size)",
    "PARALLELISM_CONFIG_SP_SIZE": "sequence parallelism (parallelism_config_sp_size)",
}

STARTS_SEVERAL = (
    "accelerate_configs/cpu_2.yaml starts several on a CPU, accelerate_configs/ddp.yaml one for "
    "each GPU"
)


class Asked(NamedTuple):
    """What the command line and config of `accelerate launch` say; None: nothing."""

    processes: int | None = None
    count_from: str = ""
    """Where the number of processes is stated."""
    because: str = ""
    """What makes the launcher start another number, and the remedy."""
    sharding: str | None = None
    """The section that shards the model, fsdp_config or deepspeed_config, and its file."""
    devices: str | None = None
    """cpu; or the words that ask for GPUs."""
    accumulation: str | None = None
    """Where gradient accumulation is stated."""


def asked() -> Asked:
    """Return what the launcher of this process was asked for.

    Most of it is in no environment variable; the launcher is the process above, and `accelerate`
    reads its command line for us. Under torchrun, MPI or none, nothing is known.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return Asked()
    try:
        words = words_of(psutil.Process(os.getppid()).cmdline())
        return Asked() if words is None else read(words)
    # Nobody's run ends because another version of `accelerate` keeps its options elsewhere.
    except (Exception, SystemExit):
        return Asked()


def words_of(command: list[str]) -> list[str] | None:
    """Return what follows `accelerate launch` in a command line; None if it is another."""
    for place, word in enumerate(command[:8]):  # interpreter, its options, program
        name, rest = Path(word).stem, command[place + 1 :]
        if name == "accelerate-launch" or word == "accelerate.commands.launch":
            return rest
        if rest[:1] == ["launch"] and (
            name == "accelerate" or word == "accelerate.commands.accelerate_cli"
        ):
            return rest[1:]
    return None


def read(words: list[str]) -> Asked:
    """Return what the words after `accelerate launch` ask for, its config file included."""
    from accelerate.commands.config import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    flags = launch_command_parser().parse_args(words)
    file = flags.config_file
    if file is None and os.path.isfile(default_config_file) and not flags.cpu:
        file = default_config_file
    config = None if file is None else load_config_from_file(file)
    # Without quotes YAML reads NO as false.
    kind = None if config is None else getattr(config.distributed_type, "value", "NO")
    by_flag = [n for n in ("multi_gpu", "use_fsdp", "use_deepspeed") if getattr(flags, n)]
    starts_many = by_flag or kind in ("MULTI_GPU", "FSDP", "DEEPSPEED")

    processes, count_from = flags.num_processes, f"--num_processes {flags.num_processes}"
    if processes is None and config is not None:
        processes, count_from = config.num_processes, f"num_processes in {file}"
    if flags.cpu:
        because = f"--cpu starts one; {STARTS_SEVERAL}"
    elif starts_many:
        because = "it counts those of all machines, and must be a multiple of num_machines"
    elif kind is None:
        because = f"without --multi_gpu and a config there is one; {STARTS_SEVERAL}"
    else:
        because = f"distributed_type: {kind} in {file} starts one; {STARTS_SEVERAL}"
    sections = {
        name: value
        for name in ("fsdp_config", "deepspeed_config")
        if (value := getattr(config, name, None))
    }
    sharding = f"{next(iter(sections))} in {file}" if sections and not by_flag else None
    accumulation = next(
        (
            f"gradient_accumulation_steps in the {name} of {file}"
            for name, section in sections.items()
            if section.get("gradient_accumulation_steps", "auto") != "auto"
        ),
        None,
    )
    devices = None
    if flags.cpu or (config is not None and config.use_cpu):
        devices = "cpu"
    elif kind in ("MULTI_GPU", "FSDP", "DEEPSPEED"):
        devices = f"distributed_type: {kind} without use_cpu: true in {file}"
    return Asked(processes, count_from, because, sharding, devices, accumulation)


def on_cpu(wanted: Asked, *, by_recipe: bool) -> bool:
    """Tell whether the run is on CPUs: asked for, or there is nothing else.

    Raises:
        InputError: the config asks for GPUs, nobody for the CPU, and there are no GPUs.
    """
    by_launcher = _says("ACCELERATE_USE_CPU")
    if by_recipe or by_launcher or wanted.devices == "cpu":
        return True
    there_is_none = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if there_is_none and wanted.devices is not None:
        raise InputError(
            f"the launcher is asked for GPUs ({wanted.devices}), and torch finds none here; "
            "accelerate_configs/cpu_2.yaml starts several processes on one CPU, and "
            "--training.use_cpu true has any of the configs use CPUs"
        )
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if torch.cuda.is_available() and here > gpus:
        raise InputError(
            f"the launcher started {here} processes here, and there are {gpus} GPUs; give "
            "--num_processes as many as all machines have together"
        )
    return there_is_none


def check(wanted: Asked, *, precision: str) -> None:
    """See that the launcher did what it was asked for, and was asked for nothing of the recipe's.

    Raises:
        InputError: it started another number of processes, left a section of its config out, or
            its config states precision, compiling, accumulation or a division unknown here.
    """
    count = next((int(os.environ[name]) for name in COUNTS if name in os.environ), 1)
    if wanted.processes is not None and wanted.processes != count:
        raise InputError(
            f"{wanted.processes} processes were asked for ({wanted.count_from}), and the launcher "
            f"started {count}: {wanted.because}"
        )
    if wanted.sharding is not None and wanted_sharding() is None:
        raise InputError(
            f"the launcher was asked to shard the model ({wanted.sharding}) and left that out: "
            "it heeds the section of its distributed_type only; take "
            "accelerate_configs/fsdp2.yaml, or remove the section"
        )
    if wanted_sharding() == "fsdp2" and os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError(
            "the launcher is asked for FSDP without fsdp_version: 2, which means version 1; this "
            "trainer shards with version 2: take accelerate_configs/fsdp2.yaml"
        )
    if _says("ACCELERATE_USE_MEGATRON_LM"):
        raise InputError(
            "the launcher is asked for Megatron-LM, which GPT2LMHeadModel is not made for; take "
            "accelerate_configs/fsdp2.yaml"
        )
    for name, what in DIVISIONS.items():
        if int(os.environ.get(name, "1")) > 1:
            raise InputError(
                f"the launcher is asked for {what}, which this trainer does not know; take "
                "accelerate_configs/fsdp2.yaml"
            )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    if wanted.accumulation is not None or steps not in ("auto", "1"):
        where = wanted.accumulation or f"gradient_accumulation_steps {steps}"
        raise InputError(
            f"the launcher states {where}: leave it out; it is derived from tokens_per_update"
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        raise InputError(
            f"the launcher states dynamo_backend {backend}, and compiling is the recipe's: leave "
            "it out, and use training.torch_compile and training.torch_compile_backend"
        )
    stated = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if stated not in ("no", precision):
        raise InputError(
            f"the launcher states mixed_precision {stated}, and the recipe comes to {precision} "
            f"here: leave it out of the accelerate config and command; precision has one owner, "
            "the recipe (precision: auto, fp32, bf16 or fp16)"
        )


def came(arguments: TrainingArguments) -> str:
    """Return in one line which processes train, on what, in which precision and how divided.

    Raises:
        InputError: `accelerate` dropped a sharding that it was asked for.
    """
    state, count = arguments.distributed_state, arguments.world_size
    kind = None if state is None else state.distributed_type.value
    if wanted_sharding() == "fsdp2" and kind in ("NO", "MULTI_CPU"):
        raise InputError(
            "the launcher was asked for FSDP, which accelerate leaves out on a CPU; take "
            "accelerate_configs/cpu_2.yaml, or GPUs"
        )
    machines = max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", count)))
    precision = arguments.mixed_precision.replace("no", "fp32")
    place = f"{count} process{'es' * (count > 1)}"
    if machines > 1:
        place += f" on {machines} machines"
    device = device_name(arguments.device)
    if state is not None and state.backend is not None:
        device += f" ({state.backend})"
    elif arguments.device.type == "cuda" and (there := torch.cuda.device_count()) > 1:
        device += f" (one of {there} here: accelerate_configs/ddp.yaml takes all)"
    sharing = ""
    if wanted_sharding() == "fsdp2":
        sharing = ", sharded (FSDP2)"
    elif wanted_sharding() == "deepspeed":
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")  # or it is in DeepSpeed's file
        sharing = f", sharded (DeepSpeed{f' ZeRO-{stage}' if stage else ''})"
    elif count > 1:
        sharing = ", a copy of the model in each (DDP)"
    return f"launch: {place}, {device}, {precision}{sharing}"


def _says(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true")
