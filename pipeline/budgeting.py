"""What to make of a budget of devices and time: the size of least loss, and why it is that one."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from pipeline import budget_recipe, scaling_laws
from pipeline.hardware import Hardware
from pipeline.model_shape import planned_model
from pipeline.plan_options import PlanOptions
from pipeline.planning import Shape, parameters, training_flops
from pipeline.recipe import InputError, Recipe
from pipeline.run_plan import Plan, plan
from pipeline.size_ladder import shapes
from pipeline.text_size import NAMED_TOKENS, TextSize, text_size
from pipeline.wording import duration, short

# Muennighoff et al. 2023, Scaling Data-Constrained Language Models (2305.16264), equations 5 and 6:
# Chinchilla's law, fitted to C4, in which text that is read again counts less and less. Where
# the text is long enough it puts 20 tokens to a parameter.
E, A, B, EXPONENT = 1.87, 521.0, 1488.0, 0.353
READ_AGAIN, EXCESS = 15.39, 5.31  # R_D* and R_N*
SIZE_FOR_TEXT = 0.051  # parameters that a token of text, read once, is worth
LAW = "Muennighoff et al. 2023 (Chinchilla's law, text that is read again counting less)"
COMPARED = 2  # sizes on either side of the chosen one that are shown


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
    """The sizes beside the chosen one that fit; tokens are those of their own recipes."""
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


def choose(
    base: Recipe, options: PlanOptions, hardware: Hardware, seconds: float, *, file: str
) -> Choice:
    """Return the recipe that makes most of the devices in the time, on the text of `base`.

    Args:
        file: where the recipe will be.

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
    base, text = _enough_text(base, hardware.rate(precision) * seconds)
    block_size, is_compiled = (
        base.data.block_size, budget_recipe.is_compiled_on(hardware.device.kind),
    )  # fmt: skip
    machines, bounds = [], []  # a bound: if there were nothing to do but train
    for shape in shapes(planned_model(base).shape.vocabulary, block_size):
        machines.append(hardware.of_step(parameters(shape), is_compiled=is_compiled))
        tokens = machines[-1].rate(precision) * seconds / training_flops(shape, block_size)
        bounds.append(_candidate(shape, tokens, text))

    @functools.cache
    def made(number: int) -> tuple[Recipe, Candidate] | None:
        recipe = budget_recipe.recipe_in_time(
            base, bounds[number].shape, machines[number], text, seconds, topology=options.topology
        )
        if recipe is None:
            return None
        tokens = recipe.training["max_steps"] * recipe.tokens_per_update
        return recipe, _candidate(bounds[number].shape, tokens, text)

    best = None
    for number in sorted(range(len(bounds)), key=lambda number: bounds[number].loss):
        if best is not None and made(best)[1].loss <= bounds[number].loss:
            break
        if made(number) and (best is None or made(number)[1].loss < made(best)[1].loss):
            best = number
    if best is None:
        raise InputError(
            f"budget: in {duration(seconds)} {hardware.title} cannot train the smallest size that "
            f"fits for {budget_recipe.FEWEST_UPDATES} updates; give more time or devices with more "
            "memory"
        )
    recipe, one = made(best)
    found = plan(recipe, options.model_copy(update={"config": file}), hardware)
    near = range(max(0, best - COMPARED), min(len(bounds), best + COMPARED + 1))
    near = [number for number in near if made(number)]
    said = _why(one, bounds, best, text, is_stdlib=base.data.files == ["python:stdlib"])
    if best == len(bounds) - 1:
        said += "; it is the largest size in the table, and a larger one would be better"
    elif best + 1 not in near:
        said += (
            "; the next larger size fits in no batch, or not for "
            f"{budget_recipe.FEWEST_UPDATES} updates"
        )
    reasons = [said, *_settings_said(recipe, one, found)]
    candidates = [made(number)[1] for number in near]
    return Choice(
        recipe, found, found.hardware, seconds, candidates, near.index(best), reasons
    )  # fmt: skip


def _candidate(shape: Shape, tokens: float, text: TextSize) -> Candidate:
    count = parameters(shape)
    loss = data_constrained_loss(count, tokens, text.tokens)
    return Candidate(shape, count, tokens, tokens / text.tokens if text.tokens else None, loss)


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


def _why(
    one: Candidate, bounds: list[Candidate], best: int, text: TextSize, *, is_stdlib: bool
) -> str:
    """Say what was chosen, by which law, and what the text has to do with it."""
    said = (
        f"{short(one.parameters)} parameters, {short(one.tokens)} tokens, "
        f"{one.tokens / one.parameters:.3g} per parameter: the least loss in this time by {LAW}"
    )
    if text.tokens is None:
        return said + "; how long the text is, is not known: the law is that of text read once"
    if one.tokens <= text.tokens:
        return said
    said += (
        f"; the budget wants more tokens than the text has ({short(text.tokens)}): it is read "
        f"{one.epochs:.3g} times"
    )
    left = one.tokens / bounds[best].tokens  # by evaluations and communication; of others, too
    unlimited = min(
        bounds, key=lambda c: data_constrained_loss(c.parameters, left * c.tokens, None)
    )
    if unlimited.shape != one.shape:
        said += f"; with enough of it {short(unlimited.parameters)} parameters would be best"
        if is_stdlib:
            said += " (--data.files python:packages, for one, has more)"
    return said


def _settings_said(recipe: Recipe, one: Candidate, found: Plan) -> list[str]:
    """Say where update and rate come from, by the plan that was made."""
    update, rate = recipe.tokens_per_update, recipe.training["learning_rate"]
    if found.hardware.device.kind == "cpu":
        critical = budget_recipe.critical_batch_tokens(one.shape, one.tokens)
        return [
            f"an update of {update:,} tokens (critical by Kaplan et al. 2020: {short(critical)}) "
            f"and a learning rate of {rate:g}: the quickstart's, both carried by the square root "
            f"of the tokens, up to {budget_recipe.WIDELY_TRIED} times its own; Muon, as there",
            "find_learning_rate.py measures whether that rate is right",
        ]
    limits = budget_recipe.update_limits(one.shape, one.tokens)
    is_kept = {name: update <= most * (1 + 1e-6) for name, most in limits.items()}
    kept, passed = (
        [f"{name} ({short(most)})" for name, most in limits.items() if is_kept[name] == wanted]
        for wanted in (True, False)
    )
    said = f"an update of {update:,} tokens" + (f": at most {_listed(kept)}" if kept else "")
    if passed:
        said += f"; more than {_listed(passed)}"
        if update == found.block_size * found.memory.devices:
            said += ", since each device takes a row at least"
    return [
        said,
        f"learning rate {rate:g}: {budget_recipe.learning_rate(one.shape)[1]}; "
        "find_learning_rate.py measures it",
        "warm-up 2 % of the tokens, at most GPT-3's 375 million; cosine to a tenth",
    ]


def _listed(names: list[str]) -> str:
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
