"""What would fail later is found out before any text is read: tasks, and the way to the Hub."""

from pipeline.pretrained import fetch_weights
from pipeline.processes import Processes
from pipeline.pushing import Pusher
from pipeline.recipe import Recipe
from pipeline.tasks import check_tasks


def passed(recipe: Recipe, processes: Processes, pusher: Pusher) -> Recipe:
    """Return the main process's recipe, with the name of the repository that it is pushed to.

    Raises:
        InputError: a task cannot be run, or the Hub cannot be written to.
    """
    recipe = processes.told(lambda: recipe)  # a branch of the Hub may have moved meanwhile
    if recipe.model.pretrained is not None:
        processes.told(lambda: fetch_weights(recipe.model), patiently=True)
    processes.told(lambda: check_tasks(recipe.evaluation.tasks), patiently=True)
    return pusher.checked(recipe)
