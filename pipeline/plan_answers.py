"""Which question is asked of a plan, and its answer as text, numbers and picture."""

import datetime
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import budgeting, json_file, plan_text, recipe_writing
from pipeline.command_line import DEFAULT_RECIPE
from pipeline.hardware import Hardware, budget, hardware
from pipeline.model_shape import planned_model
from pipeline.plan_options import PlanOptions
from pipeline.recipe import InputError, Recipe, read_recipe
from pipeline.run_plan import NO_UPDATES_KNOWN, Plan, as_numbers, known_updates, plan
from pipeline.text_size import text_size
from pipeline.training_limits import check_limits

TAKEN = ("tokenizer", "data", "cleaning", "generation")  # of a budget's --config


class Answer(NamedTuple):
    """What is shown, kept and drawn."""

    text: str
    numbers: dict[str, Any]
    draw: Callable[[str | None], None]
    """To a file, if one is named."""


def check_targets(options: PlanOptions) -> None:
    """See that the files that are asked for can be written.

    Raises:
        InputError: one cannot.
    """
    json_file.check_target(options.json_)
    if options.picture is not None:
        target = Path(options.picture)
        if not os.access(target.parent, os.W_OK) or target.is_dir():
            raise InputError(
                f"--picture {options.picture}: cannot be written; give a file in a folder that can"
            )


def answer(recipe: Recipe, options: PlanOptions) -> Answer:
    """Return the plan of the recipe, the recipe of a budget, or the law of a ladder.

    Raises:
        InputError: what the rooms of these raise.
    """
    if options.fit is not None:
        return _of_ladder(recipe, options)
    if options.budget is not None:
        return _of_budget(recipe, options)
    found = plan(recipe, options, _with_mfu(hardware(options.hardware), options.mfu))
    return Answer(_table(found), as_numbers(found), _drawing(recipe, options, found))


def _of_budget(recipe: Recipe, options: PlanOptions) -> Answer:
    path = recipe_writing.place_of(options.budget, options.recipe, overwrite=options.overwrite)
    machine, seconds = budget(options.budget)
    for name in _overridden(recipe, options):
        if name.split(".")[0] not in TAKEN:
            raise InputError(
                f"--{name}: --budget chooses it; leave it out, and change it in the recipe that is "
                "written"
            )
    machine = _with_mfu(machine, options.mfu)
    choice = budgeting.choose(recipe, options, machine, seconds, file=str(path))
    commands = recipe_writing.launch_lines(choice, path)
    text = [
        plan_text.choice_table(choice, options.budget), "", _table(choice.plan), "",
        f"recipe in {path}; launch it with", *sum(map(plan_text.command_lines, commands), []),
    ]  # fmt: skip
    recipe_writing.write(choice, path, budget=options.budget)
    numbers = {
        "budget": {"text": options.budget, "seconds": seconds},
        "recipe_file": str(path),
        "reasons": choice.reasons,
        "commands": commands,
        "plan": as_numbers(choice.plan),
    }
    return Answer("\n".join(text), numbers, _drawing(choice.recipe, options, choice.plan))


def _overridden(recipe: Recipe, options: PlanOptions) -> list[str]:
    """Return the fields that the command line has changed, by their dotted names."""
    file = DEFAULT_RECIPE if options.config is None else Path(options.config)
    here, there = _by_field(recipe.as_dict()), _by_field(read_recipe(file).as_dict())
    return [n for n in {**here, **there} if (n in here, here.get(n)) != (n in there, there.get(n))]


def _by_field(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        is_section = isinstance(value, dict) and value
        found |= _by_field(value, f"{above}{name}.") if is_section else {above + name: value}
    return found


def _of_ladder(recipe: Recipe, options: PlanOptions) -> Answer:
    from pipeline import ladder, law_fit, law_picture, law_table  # SciPy, matplotlib

    planned = None
    if options.config is not None:
        check_limits(recipe.training)
        model = planned_model(recipe)
        updates = known_updates(recipe, text_size(recipe, model.shape.vocabulary))
        if updates is None:
            raise InputError(f"{options.config}: {NO_UPDATES_KNOWN}")
        planned = model.parameters, updates * recipe.tokens_per_update
    elif changed := _overridden(recipe, options):
        raise InputError(
            f"--{changed[0]}: with --fit it changes the recipe whose loss is foretold; name that "
            "one with --config, too"
        )
    named = {Path(name).resolve(): name for name in [*options.fit, *options.leave_out]}
    left_out = ladder.points(options.leave_out) if options.leave_out else []
    gone = {(run.parameters, run.tokens) for run in left_out}
    every = ladder.points(list(named.values()))  # checked to be comparable, together
    found = law_fit.fit([run for run in every if (run.parameters, run.tokens) not in gone])

    def draw(path: str | None) -> None:
        if path is not None:
            law_picture.draw(found, Path(path), left_out, planned)

    numbers = {
        "law": as_numbers(found.law), "ranges_95": as_numbers(found.ranges),
        "scatter": found.scatter, "undetermined": found.undetermined,
        "runs": as_numbers(found.runs),
        "left_out": [
            {**as_numbers(run), "foretold": as_numbers(found.predicted(run.parameters, run.tokens))}
            for run in left_out
        ],
        "planned": None if planned is None else {
            "parameters": planned[0], "tokens": planned[1], **as_numbers(found.predicted(*planned)),
        },
    }  # fmt: skip
    return Answer(law_table.table(found, left_out, planned), numbers, draw)


def _table(found: Plan) -> str:
    return plan_text.table(found, now=datetime.datetime.now())


def _drawing(recipe: Recipe, options: PlanOptions, found: Plan) -> Callable[[str | None], None]:
    def draw(path: str | None) -> None:
        if path is not None:
            from pipeline.plan_picture import draw_plan  # matplotlib: half a second

            draw_plan(recipe, options, found, path)

    return draw


def _with_mfu(machine: Hardware, mfu: float | None) -> Hardware:
    """Return the hardware at the MFU that a person states."""
    if mfu is None:
        return machine
    stated = {"mfu": mfu, "mfu_source": "stated by --mfu", "mfu_by_size": ()}
    return machine._replace(device=machine.device._replace(**stated))
