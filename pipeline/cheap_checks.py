"""What is seen of a run in a moment, before each one: loss, memory, disk, tokens, evaluations."""

import hashlib
import math
import os
from pathlib import Path

import torch

from pipeline import artifact, machine
from pipeline.batch_memory import KEPT_FREE, Batch
from pipeline.findings import Finding
from pipeline.model import parameter_count
from pipeline.planning import Shape
from pipeline.recipe import InputError
from pipeline.run_files import CONFIG
from pipeline.scaling_laws import verdict
from pipeline.sharding import wanted_sharding
from pipeline.trainer import PretrainingTrainer
from pipeline.wording import duration, short, storage

# How far a fresh model's loss may be from ln(vocabulary), in nats. GPT-2's initialisation (standard
# deviation 0.02) gives logits a variance of about width / 2500, half of which is added to the loss:
# tried with 16 to 1,600 wide and 257 to 50,257 entries, it was 0.02 below to 0.38 above. Labels
# that are the inputs themselves gave 0.18 to 1.15 less, a deviation of 0.1 gave 0.56 more.
BELOW, ABOVE = 0.15, 0.5
# Tokens on which a loss is looked at: its mean then varies by a hundredth.
TOKENS = 2048
# What costs more than a moment to see.
OF_A_DRY_RUN = ("labels", "gradient", "overfitting")
# Evaluations that cost more than the training are a mistake, as far as a person waits for it.
EVALUATION_SHARE, EVALUATION_SECONDS = 0.5, 60.0


def rows_at_once(trainer: PretrainingTrainer) -> int:
    """Return how many rows a process takes where a look is enough: a batch, but few tokens."""
    at_most = max(1, TOKENS // trainer.recipe.data.block_size)
    return min(trainer.args.per_device_train_batch_size, at_most)


def recipe_in_effect(trainer: PretrainingTrainer, *, whole: bool = False) -> Finding:
    """Return what the run is made by; `whole`: with all of it, choices of the machine included."""
    text, folder = trainer.recipe.as_yaml(), trainer.args.output_dir
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    said = f"sha256 {digest}..., to be saved as {Path(folder) / CONFIG}"
    return Finding("recipe", said, shown=text.rstrip() if whole else "")


def beginning(trainer: PretrainingTrainer, found: Path | None, *, is_finished=False) -> Finding:
    """Return where the run begins."""
    updates = trainer.horizon
    if is_finished:
        return Finding("resume", f"the run has finished: after {updates:,} updates nothing is left")
    if found is None:
        said = "fresh: it begins with update 1"
    else:
        said = f"goes on from {found}, after update {step_of(found):,} of {updates:,}"
    return Finding("resume", said)


def step_of(found: Path | None) -> int:
    """Return the update after which a checkpoint was made, 0 for none."""
    return 0 if found is None else artifact.read_manifest(found)["facts"].get("step", 0)


def initial_loss(trainer: PretrainingTrainer) -> Finding:
    """Return what the model, as it begins, makes of held-out rows, against ln(vocabulary)."""
    rows = trainer.eval_dataset
    count = min(len(rows), rows_at_once(trainer))
    batch = trainer.batch(rows, range(count))
    with trainer.untouched() as model, torch.no_grad():
        loss = model(**batch).loss.item()
    return judged_loss(
        loss, vocabulary=trainer.model.config.vocab_size,
        pretrained=trainer.recipe.model.pretrained,
    )  # fmt: skip


def judged_loss(loss: float, *, vocabulary: int, pretrained: str | None = None) -> Finding:
    """Judge a loss before the first update: see `BELOW` and `ABOVE`; a pretrained model's is below
    ln(vocabulary)."""
    name, even = "initial_loss", math.log(vocabulary)
    said = f"{loss:.3f} nats per token; ln({vocabulary:,}) is {even:.3f}"
    if not math.isfinite(loss):
        remedy = "the weights that the run begins with give no number: see to model"
        return Finding(name, said, remedy)
    if pretrained is not None:
        if loss < even:
            return Finding(name, f"{said}, and {pretrained} is below")
        remedy = (
            f"{pretrained} knows no more than nothing: see whether its weights are whole, and "
            "whether tokenizer is the one that it was trained with"
        )
        return Finding(name, f"{said}, which a pretrained model should be below", remedy)
    said += f", and a fresh model's loss {-BELOW:g} to +{ABOVE:g} from it"
    if loss > even + ABOVE:
        remedy = (
            "its first guesses are worse than even ones: weights begin too large; see to "
            "model.config.initializer_range (GPT-2's is 0.02)"
        )
        return Finding(name, said, remedy)
    if loss < even - BELOW:
        remedy = (
            "it knows what it cannot know yet: see with --dry_run whether the labels are one token "
            "ahead, and whether held-out text is nearly all the same token"
        )
        return Finding(name, said, remedy)
    return Finding(name, said)


def memory(trainer: PretrainingTrainer) -> Finding:
    """Return what the run needs of its device's memory, against what there is for it."""
    device, rows = trainer.args.device, trainer.args.per_device_train_batch_size
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type != "cuda" else 1
    room = machine.free_memory(device) // sharing + machine.held_memory(device)
    each = " for each process" if sharing > 1 else f" on {machine.device_name(device)}"
    there, batch = f"{storage(room)} are there{each}", batch_memory(trainer)
    most, usable = batch.peak_bytes(rows), room * (1 - KEPT_FREE)
    if batch.least_bytes(rows) <= room:
        close = "" if most <= usable else ", which may not be enough"
        return Finding("memory", f"about {storage(most)} at the most; {there}{close}")
    said = f"at least {storage(batch.least_bytes(rows))} are needed, and {there}"
    sizes = [fewer for fewer in range(rows - 1, 0, -1) if rows % fewer == 0]
    # More batches to an update: their gradients are added up.
    batch = batch._replace(is_accumulating=True)
    fit = next((fewer for fewer in sizes if batch.peak_bytes(fewer) <= usable), None)
    if fit is not None:
        remedy = (
            f"{fit} rows at once fit (--training.per_device_train_batch_size {fit}, the update "
            "stays the same)"
        )
    else:
        remedy = "not even one row at once fits: take a smaller model.config or data.block_size"
        if trainer.args.world_size > 1 and wanted_sharding() is None:
            remedy += ", or accelerate_configs/fsdp2.yaml"
    if not batch.is_checkpointed:
        remedy += "; --training.gradient_checkpointing true keeps less for the backward pass"
    return Finding("memory", said, remedy)


def batch_memory(trainer: PretrainingTrainer) -> Batch:
    """Return what decides how much memory this process takes."""
    config, arguments, recipe = trainer.model.config, trainer.args, trainer.recipe
    shape = Shape(
        layers=config.n_layer, width=config.n_embd, heads=config.n_head, inner=config.n_inner,
        vocabulary=config.vocab_size, positions=config.n_positions,
    )  # fmt: skip
    topology = wanted_sharding() or ("ddp" if arguments.world_size > 1 else "none")
    trained = parameter_count(trainer.model, trained=True)
    return Batch(
        shape, recipe.data.block_size, recipe.precision,
        "zero3" if topology == "deepspeed" else topology, arguments.world_size,
        arguments.device.type, recipe.optimizer.name, trained / parameter_count(trainer.model),
        is_accumulating=arguments.gradient_accumulation_steps > 1,
        is_checkpointed=_is_checkpointed(trainer),
        is_blockwise=recipe.model.attn_implementation == "blockwise_causal",
        is_compiled=bool(arguments.torch_compile), is_saving=arguments.save_strategy != "no",
    )  # fmt: skip


def disk(trainer: PretrainingTrainer, found: Path | None) -> Finding:
    """Return the room that the checkpoints to come need."""
    try:
        return Finding("disk", trainer.check_room(found))
    except InputError as error:
        said, _, remedy = str(error).partition("; ")
        return Finding("disk", said, remedy)


def tokens(trainer: PretrainingTrainer) -> Finding:
    """Return how many tokens each parameter is trained on, and what the scaling laws say of it."""
    count = trainer.horizon * trainer.recipe.tokens_per_update
    parameters = parameter_count(trainer.model)
    said = f"{short(count)} / {short(parameters)} parameters = {count / parameters:.3g} each"
    if trainer.recipe.model.pretrained is None:
        said += f": {verdict(parameters, count)}"
    return Finding("tokens", said)


def evaluation(trainer: PretrainingTrainer, found: Path | None) -> Finding:
    """Return what the evaluations while training cost, by the operations that they take."""
    per_token, left = trainer.meter.flops_per_token, trainer.horizon - step_of(found)
    training = left * trainer.recipe.tokens_per_update * per_token
    each = trainer.evaluated_tokens * per_token / 3  # forward alone
    rate = trainer.meter.product_rate * trainer.args.world_size
    how = f"by their products{uncounted(trainer)}"
    return judged_evaluation(
        trainer.evaluations_left(step_of(found)), each, training, seconds=each / rate, how=how
    )


def uncounted(trainer: PretrainingTrainer) -> str:
    """Return what besides held-out text is looked at while training and costs time as well."""
    have = {
        "samples": trainer.recipe.generation.prompts, "tasks": trainer.recipe.evaluation.tasks,
    }  # fmt: skip
    named = " and ".join(name for name, given in have.items() if given)
    return f", {named} not counted" if named else ""


def judged_evaluation(
    count: int, each: float, training: float, *, seconds: float, how: str
) -> Finding:
    """Judge what evaluations cost against the training: see `EVALUATION_SHARE`.

    Args:
        each, training: in one unit.
        seconds: that one evaluation lasts at least.
    """
    name = "evaluation"
    if not count:
        return Finding(name, "none while training")
    share = count * each / (count * each + training)
    said = f"{count:,} while training, {share:.1%} of the run {how}"
    if share > EVALUATION_SHARE and count * seconds > EVALUATION_SECONDS:
        said += f", {duration(count * seconds)} or more"
        remedy = (
            "more than half: lower evaluation.tokens, or evaluate after more updates "
            "(training.eval_steps)"
        )
        return Finding(name, said, remedy)
    return Finding(name, said)


def _is_checkpointed(trainer: PretrainingTrainer) -> bool:
    # transformers 5.24 has renamed it.
    names = ("gradient_checkpointing", "activation_checkpointing")
    return any(bool(getattr(trainer.args, name, False)) for name in names)
