"""The plan of a run that has not happened: its model, work, memory, cost and what laws foretell."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from pipeline import scaling_laws
from pipeline.cost_plan import CostPlan, cost_plan
from pipeline.hardware import Hardware
from pipeline.memory_plan import MemoryPlan, is_blockwise, is_compiled, memory_plan
from pipeline.model_shape import PlannedModel, planned_model
from pipeline.plan_options import PlanOptions
from pipeline.planning import flops_by_part, flops_per_token, parameters_by_part
from pipeline.recipe import InputError, Recipe
from pipeline.text_size import TextSize, text_size
from pipeline.training_limits import check_limits

MOST_UPDATES = 10**12  # the largest runs make millions
NO_UPDATES_KNOWN = (
    "how long this run is, is known when its text is prepared; --training.max_steps N plans it now"
)


class WorkPlan(NamedTuple):
    """What is computed; None where the text is not known and the recipe has no max_steps."""

    flops_per_token: int
    """Of a training step: 6 N + 12 x layers x width x block size, as an MFU counts; what is frozen
    left out."""
    exact_flops_per_token: float | None
    """In matrix products alone, as PyTorch counts; None where something is frozen."""
    exact_flops_per_token_without_head: float | None
    updates: int | None
    tokens_per_update: int
    tokens: int | None
    epochs: float | None
    text_tokens: float | None
    """Of one epoch."""
    text_source: str
    flops: float | None
    """Of all updates."""
    flops_by_6nd: float | None
    """6 x parameters x tokens, as scaling laws count."""


class Prediction(NamedTuple):
    """A loss that a law foretells, in nats per token of its own text."""

    loss: float | None
    """None where the law gives more than a guess among all entries has, ln(vocabulary)."""
    law: str
    source: str
    constants: dict[str, float]
    validity: str


class LawPlan(NamedTuple):
    """What scaling laws say of this run."""

    tokens_per_parameter: float
    verdict: str
    optima: dict[str, scaling_laws.Optimum]
    """For the same 6 N D, by approach."""
    why_both: str
    """Of the third approach's two sets of constants."""
    predictions: dict[str, Prediction]
    critical_batch_tokens: float
    """At the loss that Kaplan's law foretells, from whose runs the critical batch comes."""


class Plan(NamedTuple):
    """A recipe on a machine."""

    recipe: str
    hardware: Hardware
    model: PlannedModel
    parameters_by_part: dict[str, int]
    parameters_without_embeddings: int
    block_size: int
    work: WorkPlan
    memory: MemoryPlan
    cost: CostPlan
    laws: LawPlan | None
    notes: list[str]
    """What is assumed or will go wrong, in sentences."""


def plan(recipe: Recipe, options: PlanOptions, hardware: Hardware) -> Plan:
    """Return the plan of a recipe on a machine.

    Raises:
        InputError: what `check_limits`, `planned_model`, `text_size`, `memory_plan` and
            `Hardware.precision` raise.
    """
    check_limits(recipe.training)
    model = planned_model(recipe)
    parts = parameters_by_part(model.shape)
    if adapter := model.parameters - sum(parts.values()):
        parts["adapter"] = adapter
    inside = model.parameters - parts["embedding"] - parts["positions"]
    hardware = hardware.of_step(model.parameters, is_compiled=is_compiled(recipe))
    memory = memory_plan(recipe, model, hardware, topology=options.topology)
    text = text_size(recipe, model.shape.vocabulary)
    updates = known_updates(recipe, text)
    work = _work(recipe, model, text, hardware, updates)
    cost = cost_plan(
        recipe, model, hardware, memory, flops_per_token=work.flops_per_token, tokens=work.tokens,
        updates=work.updates, epochs=work.epochs, validation_tokens=text.validation_tokens,
        test_tokens=text.test_tokens, price_per_hour=options.price_per_hour,
    )  # fmt: skip
    laws = None
    if work.tokens is not None and recipe.model.pretrained is None:
        laws = _laws(model, inside, work.tokens)
    notes = [*memory.notes, *cost.notes, *_notes(work, text, model, laws)]
    return Plan(
        options.config or "recipes/quickstart.yaml", hardware, model, parts, inside,
        recipe.data.block_size, work, memory,
        cost, laws, notes,
    )  # fmt: skip


def updates_of(recipe: Recipe, text_tokens: float | None) -> int | None:
    """Return the updates of a run as they are counted in training, None if that is not known.

    `training.max_steps`, or `num_train_epochs` (3) times the updates of an epoch, rounded up; rows
    that do not fill an epoch's last update are left out.
    """
    steps = recipe.training.get("max_steps", -1)
    if steps > 0:
        return steps
    if text_tokens is None:
        return None
    in_epoch = int(text_tokens // recipe.tokens_per_update)
    epochs = recipe.training.get("num_train_epochs", 3.0)
    return math.ceil(min(2.0 * MOST_UPDATES, epochs * in_epoch))  # infinite ones, too


def known_updates(recipe: Recipe, text: TextSize) -> int | None:
    """Return `updates_of`, where they can be made.

    Raises:
        InputError: the text does not fill one update, or there are more than anyone makes.
    """
    updates = updates_of(recipe, text.tokens)
    if updates == 0:
        raise InputError(
            f"the text has {text.tokens:,.0f} tokens ({text.source}), and an update takes "
            f"{recipe.tokens_per_update:,}: give more text, or a smaller tokens_per_update"
        )
    if updates is not None and updates > MOST_UPDATES:
        raise InputError(
            f"training.max_steps, or training.num_train_epochs: no run makes more than "
            f"{MOST_UPDATES:,} updates; give fewer"
        )
    return updates


def as_numbers(value: Any) -> Any:
    """Return a plan, or any part of it, as mappings, lists, numbers and text."""
    if hasattr(value, "_asdict"):
        return {name: as_numbers(part) for name, part in value._asdict().items()}
    if isinstance(value, dict):
        return {name: as_numbers(part) for name, part in value.items()}
    return [as_numbers(part) for part in value] if isinstance(value, list | tuple) else value


def _work(
    recipe: Recipe,
    model: PlannedModel,
    text: TextSize,
    hardware: Hardware,
    updates: int | None,
) -> WorkPlan:
    shape, block_size = model.shape, recipe.data.block_size
    asked = {"layers": shape.layers, "width": shape.width, "block_size": block_size}
    frozen = {"trained": model.trained, "still": model.still, "still_layers": model.still_layers}
    whole = flops_per_token(parameters=model.parameters, **asked, **frozen)
    exact = None
    if model.trained == model.parameters:
        exact = flops_by_part(
            shape, block_size=block_size, is_blockwise=is_blockwise(recipe, hardware.device.kind)
        )
    tokens = None if updates is None else updates * recipe.tokens_per_update
    return WorkPlan(
        whole, exact and sum(exact.values()),
        exact and sum(exact.values()) - exact["head"], updates, recipe.tokens_per_update, tokens,
        tokens / text.tokens if tokens is not None and text.tokens else None,
        text.tokens, text.source,
        None if tokens is None else float(whole) * tokens,
        None if tokens is None else float(scaling_laws.FLOPS) * model.parameters * tokens,
    )  # fmt: skip


def _laws(model: PlannedModel, inside: int, tokens: int) -> LawPlan:
    count, most = model.parameters, math.log(model.shape.vocabulary)
    hoffmann, again = scaling_laws.HOFFMANN, scaling_laws.BESIROGLU
    kaplan = scaling_laws.kaplan_loss(inside, tokens)
    by_sum = (("Hoffmann", hoffmann), ("fitted again", again))
    found = {
        name: Prediction(
            law.loss(count, tokens), law.formula, law.source, law.constants,
            law.validity.said(count, tokens),
        ) for name, law in by_sum
    }  # fmt: skip
    found["Kaplan"] = Prediction(
        kaplan, scaling_laws.KAPLAN_FORMULA, scaling_laws.KAPLAN_SOURCE,
        scaling_laws.KAPLAN_CONSTANTS, scaling_laws.KAPLAN_VALIDITY.said(inside, tokens),
    )  # fmt: skip
    alone = ((inside, scaling_laws.KAPLAN_OF_PARAMETERS), (tokens, scaling_laws.KAPLAN_OF_TOKENS))
    for value, law in alone:
        found[f"Kaplan L({law.of})"] = Prediction(
            law.loss(value), law.formula, law.source, law.constants, law.said(value)
        )
    return LawPlan(
        tokens / count,
        scaling_laws.verdict(count, tokens),
        scaling_laws.compute_optimal(float(scaling_laws.FLOPS) * count * tokens),
        scaling_laws.WHY_BOTH,
        {n: p if p.loss < most else p._replace(loss=None) for n, p in found.items()},
        scaling_laws.critical_batch_tokens(min(kaplan, most)),
    )


def _notes(work: WorkPlan, text: TextSize, model: PlannedModel, laws: LawPlan | None) -> list[str]:
    notes = []
    if "assumed" in model.vocabulary_source:
        notes.append(f"vocabulary {model.shape.vocabulary:,}: {model.vocabulary_source}")
    if work.updates is None:
        notes.append(NO_UPDATES_KNOWN)
    if work.epochs is not None and work.epochs > 1.05:
        said = f"the text is read {work.epochs:.3g} times; scaling laws are of text read once"
        if work.epochs > 4:
            said += (
                "; up to 4 times are nearly as good as new text, and beyond 16 little is gained "
            )
            said += "(Muennighoff et al. 2023)"
        notes.append(said)
    if laws is not None and work.tokens_per_update > laws.critical_batch_tokens:
        notes.append(
            f"tokens_per_update {work.tokens_per_update:,} is above the critical "
            f"{laws.critical_batch_tokens:,.0f}: a smaller update learns more from each token"
        )
    return notes
