"""What would fail later is found out before any text is read: tasks, and the way to the Hub."""

from pipeline.processes import Processes
from pipeline.pushing import Pusher
from pipeline.recipe import Recipe
from pipeline.tasks import check_tasks


def passed(recipe: Recipe, processes: Processes, pusher: Pusher) -> Recipe:
    """Return the recipe, with the name of the repository that the run is pushed to.

    Raises:
        InputError: a task cannot be run, or the Hub cannot be written to.
    """
    processes.told(lambda: check_tasks(recipe.evaluation.tasks), patiently=True)
    return pusher.checked(recipe)
