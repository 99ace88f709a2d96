"""The recipe that trains a size for as long as a budget lasts: update, rate, batch and length."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from typing import Any

from pipeline import scaling_laws
from pipeline.cost_plan import cost_plan
from pipeline.hardware import Hardware
from pipeline.memory_plan import MemoryPlan, memory_plan, topologies
from pipeline.model_shape import PlannedModel
from pipeline.planning import Shape, parameters, parameters_by_part, training_flops
from pipeline.recipe import InputError, Recipe
from pipeline.size_ladder import gpt3_batch_tokens, gpt3_learning_rate
from pipeline.text_size import TextSize

FEWEST_UPDATES = 100
UPDATES_WANTED = 2000  # fewer leave AdamW no time to come down from its peak; GPT-3 made 90,000
MOST_ROWS = {"cpu": 16, "cuda": 32, "mps": 16}  # at once: the recipes'; more are no faster
FEW_ROWS = 4  # with fewer at once devices idle: rather shard, or compute activations again
GPT3_WARMUP_TOKENS = 375e6  # Brown et al. 2020, appendix B
EVALUATIONS = 20
WIDELY_TRIED = 16  # times the quickstart's tokens, up to which its rate is carried


def recipe_in_time(
    base: Recipe,
    shape: Shape,
    hardware: Hardware,
    text: TextSize,
    seconds: float,
    *,
    topology: str | None = None,
) -> Recipe | None:
    """Return a recipe of that shape whose planned time is the budget's, evaluations included.

    Args:
        base: has the text and its tokenizer.
        hardware: at the MFU of this shape's step.

    Returns:
        None if it fits in no batch, or makes fewer than `FEWEST_UPDATES` in the time.

    Raises:
        InputError: the topology does not go with the devices or the recipe.
    """
    count, block_size = parameters(shape), base.data.block_size
    model = PlannedModel(shape, count, count, 0, 0, "")
    each = training_flops(shape, block_size)
    tokens = hardware.rate(base.precision) * seconds / each
    for _ in range(2):  # the second time for the tokens that the first was found to have time for
        settings = _settings(shape, tokens, block_size, hardware)
        fitted = _fitting(base, settings, model, tokens, hardware, topology)
        if fitted is None:
            return None
        recipe, memory = fitted

        def planned_seconds(recipe: Recipe, memory: MemoryPlan = memory) -> float:
            updates = recipe.training["max_steps"]
            return cost_plan(
                recipe, model, hardware, memory, flops_per_token=each, updates=updates,
                tokens=updates * recipe.tokens_per_update,
                validation_tokens=text.validation_tokens, test_tokens=text.test_tokens,
            ).seconds  # fmt: skip

        recipe = _in_time(recipe, planned_seconds, seconds)
        if recipe is None:
            return None
        tokens = recipe.training["max_steps"] * recipe.tokens_per_update
    return recipe


def update_limits(shape: Shape, tokens: float) -> dict[str, float]:
    """Return what an update on GPUs should have at most, in tokens, by what says so."""
    return {
        "GPT-3's for this size": gpt3_batch_tokens(parameters(shape)),
        "the critical batch of Kaplan et al. 2020": critical_batch_tokens(shape, tokens),
        f"a {UPDATES_WANTED:,}th of all": tokens / UPDATES_WANTED,
    }


def critical_batch_tokens(shape: Shape, tokens: float) -> float:
    """Return the critical batch at the loss that Kaplan's law foretells, in tokens."""
    loss = scaling_laws.kaplan_loss(_inside(shape), tokens)
    return scaling_laws.critical_batch_tokens(min(loss, math.log(shape.vocabulary)))


def learning_rate(shape: Shape) -> tuple[float, str]:
    """Return AdamW's rate for a shape, in two digits, and its source."""
    rate, source = gpt3_learning_rate(parameters(shape), inside=_inside(shape))
    return _two_digits(rate), source


def _inside(shape: Shape) -> int:
    """Return the parameters without embeddings."""
    parts = parameters_by_part(shape)
    return sum(parts.values()) - parts["embedding"] - parts["positions"]


def _settings(shape: Shape, tokens: float, block_size: int, hardware: Hardware) -> dict[str, Any]:
    """Return optimizer, schedule and the part of `training:` that goes with size and tokens."""
    row = block_size * hardware.count  # one on each device
    if hardware.device.kind == "cpu":
        return _as_the_quickstart(tokens, block_size, row)
    wanted = min(update_limits(shape, tokens).values())
    update = row * 2 ** max(0, math.floor(math.log2(wanted / row) + 1e-6))
    warmup = min(GPT3_WARMUP_TOKENS, 0.02 * tokens)
    return {
        "tokens_per_update": update,
        "schedule": {"warmup_steps": max(1, round(warmup / update)), "floor": 0.1},
        "training": {
            "learning_rate": learning_rate(shape)[0], "adam_beta1": 0.9, "adam_beta2": 0.95,
            "weight_decay": 0.1, "max_grad_norm": 1.0,
        },
    }  # fmt: skip


def _as_the_quickstart(tokens: float, block_size: int, row: int) -> dict[str, Any]:
    known = scaling_laws.QUICKSTART
    within = min(tokens, WIDELY_TRIED * known.tokens)
    carried = scaling_laws.carried(known, tokens=round(within), block_size=block_size)
    rate = _two_digits(carried.learning_rate)
    return {
        "tokens_per_update": math.ceil(carried.tokens_per_update / row) * row,
        "optimizer": {"name": "muon"},
        "schedule": {"name": "linear", "warmup_steps": 0.035, "floor": 0.0},
        "training": {"learning_rate": rate, "adam_beta2": 0.95, "weight_decay": 0.3},
    }


def _fitting(
    base: Recipe,
    settings: dict[str, Any],
    model: PlannedModel,
    tokens: float,
    hardware: Hardware,
    topology: str | None,
) -> tuple[Recipe, MemoryPlan] | None:
    """Return the recipe with the largest batch that fits, sharded or checkpointed only where else
    few rows or none would, and its memory."""
    share = settings["tokens_per_update"] // (base.data.block_size * hardware.count)
    kind = hardware.device.kind
    rows = [n for n in range(min(share, MOST_ROWS[kind]), 0, -1) if share % n == 0]
    many = [n for n in rows if n >= FEW_ROWS] or rows[:1]
    first = _written(base, settings, model.shape, tokens, rows[0], False, kind)
    names = topologies(first, topology, hardware.count)
    for some, is_checkpointed, name in itertools.product((many, rows), (False, True), names):
        for number in some:
            recipe = _written(base, settings, model.shape, tokens, number, is_checkpointed, kind)
            with contextlib.suppress(InputError):  # in no batch
                memory = memory_plan(recipe, model, hardware, topology=name)
                if memory.is_fitting:
                    return recipe, memory
    return None


def _written(
    base: Recipe,
    settings: dict[str, Any],
    shape: Shape,
    tokens: float,
    rows: int,
    is_checkpointed: bool,
    kind: str,
) -> Recipe:
    """Return the recipe, its length aside."""
    stated, training = base.as_dict(), settings["training"]
    values = {
        n: stated[n] for n in ("precision", "tokenizer", "data", "cleaning", "generation")
        if n in stated
    }  # fmt: skip
    values["data"] = {k: v for k, v in values["data"].items() if k != "path"}
    size = {"n_layer": shape.layers, "n_head": shape.heads, "n_embd": shape.width}
    evaluated = max(16_384, min(1_048_576, 2 ** round(math.log2(max(2, tokens / 500)))))
    evaluation: dict[str, Any] = {"tokens": evaluated}
    training = {
        "output_dir": base.training["output_dir"], "max_steps": 1, **training,
        "per_device_train_batch_size": rows,
    }  # fmt: skip
    if is_checkpointed:
        training["gradient_checkpointing"] = True
    training["torch_compile"] = is_compiled_on(kind)
    if kind == "cuda":
        training["dataloader_num_workers"] = 2
    training |= {"eval_strategy": "steps", "save_total_limit": 3, "seed": 1337}
    if kind == "cpu":
        evaluation["early_stopping_patience"] = 3
        training["load_best_model_at_end"] = True
    return base.model_validate(
        {**values, **{k: v for k, v in settings.items() if k != "training"},
         "model": {"config": size}, "evaluation": evaluation, "training": training}
    )  # fmt: skip


def is_compiled_on(kind: str) -> bool:
    """Tell whether a budget's recipe compiles its steps on cpu, cuda or mps."""
    return kind != "mps"


def _in_time(
    recipe: Recipe, planned_seconds: Callable[[Recipe], float], seconds: float
) -> Recipe | None:
    """Return the recipe with as many updates as end in time; None if they are too few."""
    steps = 1000.0
    for _ in range(5):
        recipe = _of_length(recipe, max(1, math.floor(steps)))
        steps *= seconds / planned_seconds(recipe)
    while planned_seconds(recipe) > seconds and recipe.training["max_steps"] > FEWEST_UPDATES:
        recipe = _of_length(recipe, recipe.training["max_steps"] - 1)
    is_enough = recipe.training["max_steps"] >= FEWEST_UPDATES
    return recipe if is_enough and planned_seconds(recipe) <= seconds else None


def _of_length(recipe: Recipe, steps: int) -> Recipe:
    every = max(1, round(steps / EVALUATIONS))
    training = recipe.training | {
        "max_steps": steps, "logging_steps": max(1, min(50, round(steps / 200))),
        "eval_steps": every, "save_steps": every,
    }  # fmt: skip
    return recipe.with_values(training=training)


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")
