"""What would fail later is found out before it costs anything: before text is read, and after."""

import functools
from pathlib import Path

from pipeline import cheap_checks, findings
from pipeline.findings import Finding
from pipeline.pretrained import fetch_weights
from pipeline.processes import Processes
from pipeline.pushing import Pusher
from pipeline.recipe import Recipe
from pipeline.tasks import check_tasks
from pipeline.trainer import PretrainingTrainer


def passed(recipe: Recipe, processes: Processes, pusher: Pusher, *, is_dry: bool = False) -> Recipe:
    """Return the main process's recipe, with the name of the repository that it is pushed to.

    Of a dry run the Hub does not hear yet.

    Raises:
        InputError: a task cannot be run, or the Hub cannot be written to.
    """
    recipe = processes.told(lambda: recipe)  # a branch of the Hub may have moved meanwhile
    if recipe.model.pretrained is not None:
        processes.told(lambda: fetch_weights(recipe.model), patiently=True)
    processes.told(lambda: check_tasks(recipe.evaluation.tasks), patiently=True)
    return recipe if is_dry else pusher.checked(recipe)


def look(trainer: PretrainingTrainer, found: Path | None) -> None:
    """Show what costs next to nothing to see of a run before its first update.

    Raises:
        InputError: something fails that the recipe does not accept; all has been shown.
    """
    trainer.processes.told(functools.partial(_look, trainer, found), patiently=True)


def _look(trainer: PretrainingTrainer, found: Path | None) -> None:
    accept, seen = trainer.recipe.preflight.accept, []

    def see(finding: Finding) -> None:
        seen.append(finding)
        findings.say(finding, accept)

    see(cheap_checks.recipe_in_effect(trainer))
    see(cheap_checks.beginning(trainer, found))
    if cheap_checks.step_of(found) >= trainer.horizon:  # nothing will be trained
        return
    if found is None:
        see(cheap_checks.initial_loss(trainer))
    see(cheap_checks.memory(trainer))
    see(cheap_checks.disk(trainer, found))
    see(cheap_checks.tokens(trainer))
    see(cheap_checks.evaluation(trainer, found))
    for name in accept:
        if name in cheap_checks.OF_A_DRY_RUN:
            see(Finding(name, "not looked at but by --dry_run", "see it there"))
    trainer.seen = findings.as_seen(seen, accept)
    findings.judge(seen, accept)
