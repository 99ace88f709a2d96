"""What to make of a budget of devices and time: a size, its tokens, and how they are trained."""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import Any, NamedTuple

from pipeline import scaling_laws
from pipeline.hardware import Hardware
from pipeline.memory_plan import memory_plan
from pipeline.model_shape import PlannedModel, planned_model
from pipeline.plan_options import PlanOptions
from pipeline.planning import Shape, parameters, parameters_by_part, training_flops
from pipeline.recipe import InputError, Recipe
from pipeline.run_plan import Plan, plan
from pipeline.size_ladder import gpt3_batch_tokens, gpt3_learning_rate, shapes
from pipeline.text_size import NAMED_TOKENS, TextSize, text_size
from pipeline.wording import duration, short

# Muennighoff et al. 2023, Scaling Data-Constrained Language Models (2305.16264), equations 5 and 6:
# Chinchilla's law, fitted to C4, in which text that is read again counts less and less. Where
# the text is long enough it puts 20 tokens to a parameter.
E, A, B, EXPONENT = 1.87, 521.0, 1488.0, 0.353
READ_AGAIN, EXCESS = 15.39, 5.31  # R_D* and R_N*
SIZE_FOR_TEXT = 0.051  # parameters that a token of text, read once, is worth
LAW = "Muennighoff et al. 2023 (Chinchilla's law, text that is read again counting less)"
FEWEST_UPDATES = 100
UPDATES_WANTED = 2000  # fewer leave AdamW no time to come down from its peak; GPT-3 made 90,000
MOST_ROWS = {"cpu": 16, "cuda": 32, "mps": 16}  # at once: the recipes'; more are no faster
FEW_ROWS = 4  # with fewer at once devices idle: rather shard, or compute activations again
COMPARED = 2  # sizes on either side of the chosen one that are shown
GPT3_WARMUP_TOKENS = 375e6  # Brown et al. 2020, appendix B
EVALUATIONS = 20
WIDELY_TRIED = 16  # times the quickstart's tokens, up to which its rate is carried


class Candidate(NamedTuple):
    """A size, and what the budget makes of it."""

    shape: Shape
    parameters: int
    tokens: float
    epochs: float | None
    loss: float
    """By `LAW`, in nats per token of C4."""


class Choice(NamedTuple):
    """A recipe for a budget."""

    recipe: Recipe
    plan: Plan
    hardware: Hardware
    seconds: float
    candidates: list[Candidate]
    chosen: int
    reasons: list[str]


def data_constrained_loss(parameters: float, tokens: float, text_tokens: float | None) -> float:
    """Return the loss of N parameters after D tokens of a text of U, read D / U times (`LAW`)."""
    unique = tokens if text_tokens is None else min(tokens, text_tokens)
    again = tokens / unique - 1
    useful = min(parameters, SIZE_FOR_TEXT * unique)
    excess = parameters / useful - 1
    seen = unique * (1 + READ_AGAIN * (1 - math.exp(-again / READ_AGAIN)))
    sized = useful * (1 + EXCESS * (1 - math.exp(-excess / EXCESS)))
    return E + A / sized**EXPONENT + B / seen**EXPONENT


def choose(base: Recipe, options: PlanOptions, hardware: Hardware, seconds: float) -> Choice:
    """Return the recipe that makes most of the devices in the time, on the text of `base`.

    Raises:
        InputError: the time is too short for any size, no size fits, or `base` goes on from a
            model, whose size is given.
    """
    if base.model.pretrained is not None:
        raise InputError(
            f"--budget chooses a size, and {options.config} goes on from model.pretrained "
            f"{base.model.pretrained}; take the text of a recipe with model.config"
        )
    precision = _precision(hardware)
    base = base.with_values(precision=precision)
    rate = hardware.rate(precision)
    base, text = _enough_text(base, rate * seconds)
    vocabulary, block_size = planned_model(base).shape.vocabulary, base.data.block_size
    candidates = []
    for shape in shapes(vocabulary, block_size):
        tokens = rate * seconds / training_flops(shape, block_size)
        count = parameters(shape)
        loss = data_constrained_loss(count, tokens, text.tokens)
        epochs = tokens / text.tokens if text.tokens else None
        candidates.append(Candidate(shape, count, tokens, epochs, loss))
    for best in sorted(range(len(candidates)), key=lambda number: candidates[number].loss):
        one = candidates[best]
        if one.tokens < FEWEST_UPDATES * block_size * hardware.count:
            continue
        settings, reasons = _settings(base, one, hardware)
        fitted = _fitting(base, settings, one, hardware)
        if fitted is None:
            continue
        recipe, found = _in_time(fitted, options, hardware, seconds)
        reasons = [_why(one, candidates, text, best), *reasons]
        nearby = slice(max(0, best - COMPARED), best + COMPARED + 1)
        return Choice(
            recipe, found, hardware, seconds, candidates[nearby], best - nearby.start, reasons
        )
    raise InputError(
        f"budget: in {duration(seconds)} {hardware.title} cannot train the smallest size that fits "
        f"for {FEWEST_UPDATES} updates; give more time or devices with more memory"
    )


def _precision(hardware: Hardware) -> str:
    """Return auto, or fp16 where it is all that is fast."""
    has = hardware.device.flops
    return "fp16" if "fp16" in has and "bf16" not in has else "auto"


def _enough_text(base: Recipe, flops: float) -> tuple[Recipe, TextSize]:
    """Return the recipe and its text; of FineWeb-Edu the sample that has the tokens wanted."""
    data, vocabulary = base.data, planned_model(base).shape.vocabulary
    wanted = math.sqrt(flops * scaling_laws.TOKENS_PER_PARAMETER / scaling_laws.FLOPS)
    name = NAMED_TOKENS.fullmatch(data.dataset_config or "")
    if data.dataset == "HuggingFaceFW/fineweb-edu" and name:
        larger = (n for n in (10, 100, 350) if n >= int(name[1]) and n * 1e9 >= wanted)
        size = next(larger, max(350, int(name[1])))
        share = int(name[1]) / size  # as much is held out
        values = data.model_dump(exclude_unset=True) | {"dataset_config": f"sample-{size}BT"}
        values |= {
            f"{split}_fraction": round(getattr(data, f"{split}_fraction") * share, 6)
            for split in ("validation", "test")
        }
        base = base.with_values(data=values)
    return base, text_size(base, vocabulary)


def _settings(base: Recipe, one: Candidate, hardware: Hardware) -> tuple[dict[str, Any], list[str]]:
    """Return optimizer, schedule and the part of `training:` that goes with a size."""
    block_size, devices, parts = base.data.block_size, hardware.count, parameters_by_part(one.shape)
    inside = one.parameters - parts["embedding"] - parts["positions"]
    critical = scaling_laws.critical_batch_tokens(
        min(scaling_laws.kaplan_loss(inside, one.tokens), math.log(one.shape.vocabulary))
    )
    if hardware.device.kind == "cpu":
        return _as_the_quickstart(one, block_size, devices, critical)
    wanted = min(gpt3_batch_tokens(one.parameters), critical, one.tokens / UPDATES_WANTED)
    each = 2 ** max(0, math.floor(math.log2(wanted / (block_size * devices)) + 1e-6))
    update = each * block_size * devices
    rate, source = gpt3_learning_rate(one.parameters, inside=inside)
    warmup = min(GPT3_WARMUP_TOKENS, 0.02 * one.tokens)
    settings = {
        "tokens_per_update": update,
        "schedule": {"warmup_steps": max(1, round(warmup / update)), "floor": 0.1},
        "training": {
            "learning_rate": _two_digits(rate), "adam_beta1": 0.9, "adam_beta2": 0.95,
            "weight_decay": 0.1, "max_grad_norm": 1.0,
        },
    }  # fmt: skip
    return settings, [
        f"an update of {update:,} tokens: at most GPT-3's for this size and the critical batch "
        f"({short(critical)}, Kaplan et al. 2020), and {UPDATES_WANTED:,} updates at least",
        f"learning rate {_two_digits(rate):g}: {source}; find_learning_rate.py measures it",
        "warm-up 2 % of the tokens, at most GPT-3's 375 million; cosine to a tenth",
    ]


def _as_the_quickstart(
    one: Candidate, block_size: int, devices: int, critical: float
) -> tuple[dict[str, Any], list[str]]:
    known = scaling_laws.QUICKSTART
    tokens = min(one.tokens, WIDELY_TRIED * known.tokens)
    carried = scaling_laws.carried(known, tokens=round(tokens), block_size=block_size)
    update, rate = carried.tokens_per_update, _two_digits(carried.learning_rate)
    update = math.ceil(update / (block_size * devices)) * block_size * devices
    settings = {
        "tokens_per_update": update,
        "optimizer": {"name": "muon"},
        "schedule": {"name": "linear", "warmup_steps": 0.035, "floor": 0.0},
        "training": {"learning_rate": rate, "adam_beta2": 0.95, "weight_decay": 0.3},
    }
    return settings, [
        f"an update of {update:,} tokens (critical by Kaplan et al. 2020: {short(critical)}) and a "
        f"learning rate of {rate:g}: the quickstart's, both carried by the square root of the "
        f"tokens, up to {WIDELY_TRIED} times its own; Muon, as there",
        "find_learning_rate.py measures whether that rate is right",
    ]


def _fitting(
    base: Recipe, settings: dict[str, Any], one: Candidate, hardware: Hardware
) -> Recipe | None:
    """Return the recipe with the largest batch that fits, sharded or checkpointed only where else
    few rows or none would."""
    share = settings["tokens_per_update"] // (base.data.block_size * hardware.count)
    kind = hardware.device.kind
    model = PlannedModel(one.shape, one.parameters, one.parameters, 0, 0, "")
    rows = [n for n in range(min(share, MOST_ROWS[kind]), 0, -1) if share % n == 0]
    many = [n for n in rows if n >= FEW_ROWS] or rows[:1]
    topologies = ("ddp", "fsdp2") if hardware.count > 1 else ("none",)
    ways = itertools.product((many, rows), (False, True), topologies)
    for some, is_checkpointed, topology in ways:
        for number in some:
            recipe = _written(base, settings, one, number, is_checkpointed, kind)
            with contextlib.suppress(InputError):  # in no batch
                if memory_plan(recipe, model, hardware, topology=topology).is_fitting:
                    return recipe
    return None


def _written(
    base: Recipe,
    settings: dict[str, Any],
    one: Candidate,
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
    size = {"n_layer": one.shape.layers, "n_head": one.shape.heads, "n_embd": one.shape.width}
    evaluated = max(16_384, min(1_048_576, 2 ** round(math.log2(max(2, one.tokens / 500)))))
    evaluation: dict[str, Any] = {"tokens": evaluated}
    training = {
        "output_dir": base.training["output_dir"], "max_steps": 1, **training,
        "per_device_train_batch_size": rows,
    }  # fmt: skip
    if is_checkpointed:
        training["gradient_checkpointing"] = True
    training["torch_compile"] = kind != "mps"
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


def _in_time(
    recipe: Recipe, options: PlanOptions, hardware: Hardware, seconds: float
) -> tuple[Recipe, Plan]:
    """Return the recipe with as many updates as end in time, evaluations included, and its plan."""
    steps = 1000.0
    for _ in range(5):
        recipe = _of_length(recipe, max(1, math.floor(steps)))
        found = plan(recipe, options, hardware)
        steps *= seconds / found.cost.seconds
    while found.cost.seconds > seconds and (steps := found.work.updates - 1) > 0:
        recipe = _of_length(recipe, steps)
        found = plan(recipe, options, hardware)
    return recipe, found


def _of_length(recipe: Recipe, steps: int) -> Recipe:
    every = max(1, round(steps / EVALUATIONS))
    training = recipe.training | {
        "max_steps": steps, "logging_steps": max(1, min(50, round(steps / 200))),
        "eval_steps": every, "save_steps": every,
    }  # fmt: skip
    return recipe.with_values(training=training)


def _why(one: Candidate, candidates: list[Candidate], text: TextSize, best: int) -> str:
    ratio = one.tokens / one.parameters
    said = (
        f"{short(one.parameters)} parameters, {short(one.tokens)} tokens, {ratio:.3g} per "
        f"parameter: the least loss for these operations by {LAW}"
    )
    unlimited = min(candidates, key=lambda c: data_constrained_loss(c.parameters, c.tokens, None))
    if text.tokens is not None and one.tokens > text.tokens:
        said += (
            f"; the budget wants more tokens than the text has ({short(text.tokens)}): it is read "
            f"{one.epochs:.3g} times; with enough of it {short(unlimited.parameters)} parameters "
            "would be best (--data.files python:packages, for one, has more)"
        )
    elif text.tokens is None:
        said += "; how long the text is, is not known: the law is that of text read once"
    if best == len(candidates) - 1:
        said += "; it is the largest size in the table, and a larger one would be better"
    return said


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")
