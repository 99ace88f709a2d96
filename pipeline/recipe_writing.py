"""A recipe as a file that a person reads and launches: hardware, arithmetic and commands first."""

import textwrap
from pathlib import Path

import yaml

from pipeline import artifact
from pipeline.budgeting import Choice
from pipeline.memory_plan import DEVICES_PER_MACHINE
from pipeline.recipe import InputError
from pipeline.wording import duration, pasted, short

PLACE = Path("outputs") / "plan"
WIDTH = 98


def place_of(budget: str, asked: str | None, *, overwrite: bool) -> Path:
    """Return the file to write.

    Raises:
        InputError: it is a folder, or there already.
    """
    words = "".join(c if c.isalnum() or c in ".-" else " " for c in budget.split("/")[-1]).split()
    path = PLACE / f"{'_'.join(words)}.yaml" if asked is None else Path(asked)
    if path.is_dir():
        raise InputError(f"--recipe {path}: is a folder; name a file in it")
    if path.exists() and not overwrite:
        raise InputError(
            f"--recipe {path}: is there already; name another file, or replace it with --overwrite"
        )
    return path


def write(choice: Choice, path: Path, *, budget: str) -> None:
    """Write the recipe of a budget, its commands naming `path`.

    Raises:
        InputError: it cannot be written.
    """
    values = choice.recipe.as_dict()
    values["training"] = {k: v for k, v in values["training"].items() if k != "output_dir"}
    warmup = values["schedule"]["warmup_steps"]  # read as a number that may be a fraction
    values["schedule"]["warmup_steps"] = int(warmup) if warmup >= 1 else warmup
    head = _comment(_arithmetic(choice, budget), launch_lines(choice, path), choice.reasons)
    order = ("tokens_per_update", "precision", "tokenizer", "data", "cleaning", "model",
             "optimizer", "schedule", "evaluation", "generation", "training")  # fmt: skip
    parts = [
        yaml.safe_dump({name: values[name]}, sort_keys=False, allow_unicode=True, width=WIDTH)
        for name in order
        if name in values and (name, values[name]) != ("precision", "auto")
    ]
    try:
        with artifact.full_disk_said(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            artifact.write_whole(path, head + "\n" + "\n".join(parts))
    except OSError as error:
        raise InputError(f"--recipe {path}: cannot be written: {error.strerror}") from None


def launch_lines(choice: Choice, path: Path) -> list[str]:
    """Return the commands that prepare the text and train."""
    count = choice.hardware.count
    launch = f"accelerate launch --quiet --config_file {choice.plan.memory.accelerate_config}"
    if count > DEVICES_PER_MACHINE and choice.hardware.device.kind != "cpu":
        machines = -(-count // DEVICES_PER_MACHINE)
        launch += (
            f" --num_machines {machines} --num_processes {count} --machine_rank R "
            "--main_process_ip ADDRESS"
        )
    elif count > 1:
        launch += f" --num_processes {count}"
    return [
        f"python pipeline/prepare_data.py --config {path}",
        f"{launch} pipeline/pretrain.py --config {path}",
    ]


def _arithmetic(choice: Choice, budget: str) -> str:
    plan, work, memory = choice.plan, choice.plan.work, choice.plan.memory
    cost, device = plan.cost, choice.hardware.device
    known = "measured" if device.is_measured else "assumed" if device.mfu_by_size else "stated"
    return (
        f"{plan.model.parameters:,} parameters in {duration(choice.seconds)} on "
        f"{choice.hardware.title} (plan.py --budget {budget!r}). {work.tokens_per_update:,} tokens "
        f"per update ({plan.block_size:,} x {memory.rows_per_device} rows x {memory.devices} "
        f"device(s) x {memory.accumulation}) x {work.updates:,} updates = {short(work.tokens)} "
        f"tokens. {work.flops_per_token:.3g} FLOPs a token, {cost.tokens_per_second:,.0f} tokens/s "
        f"({memory.precision}, MFU {cost.mfu:.1%}, {known}) = "
        f"{duration(cost.seconds)}, evaluations included; compiling and preparing the text are not."
    )


def _comment(arithmetic: str, commands: list[str], reasons: list[str]) -> str:
    lines = textwrap.wrap(arithmetic, WIDTH, initial_indent="# ", subsequent_indent="# ")
    for reason in reasons:
        lines += textwrap.wrap(reason, WIDTH, initial_indent="# - ", subsequent_indent="#   ")
    lines.append("# Launch:")
    for command in commands:
        lines += [f"#   {line}" for line in pasted(command, WIDTH - 6)]
    return "\n".join(lines) + "\n"
