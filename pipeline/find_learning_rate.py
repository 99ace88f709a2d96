"""Find a learning rate: sweep over rates with a recipe's own model, text and updates.

python pipeline/find_learning_rate.py --config recipes/quickstart.yaml
"""

import sys
from collections.abc import Sequence

from pipeline import interruption
from pipeline.command_line import enter, read_command_line
from pipeline.plan_options import FindOptions


@interruption.heeded()
def main(argv: Sequence[str] | None = None) -> None:
    """Read the recipe, sweep with each seed, draw the sweeps, say what they suggest."""
    recipe, options = read_command_line(argv, FindOptions, doc=__doc__)

    # Not before: torch takes seconds, and --help or a misspelt key should not.
    from pipeline import locks, rate_report, rate_sweep
    from pipeline.arguments import training_arguments
    from pipeline.model import check_model
    from pipeline.pretrained import settled
    from pipeline.processes import Processes

    rate_report.check_target(options.picture)
    recipe, arguments = training_arguments(settled(rate_sweep.swept(recipe, options)))
    check_model(recipe.model, block_size=recipe.data.block_size)
    processes = Processes(arguments)
    folder = recipe.output_dir / rate_sweep.PLACE
    with (
        interruption.told("nothing but the folder learning_rate is touched"),
        locks.held(folder, is_main_process=processes.is_main),
    ):
        sweeps = rate_sweep.sweeps(recipe, arguments, options, processes)
        if processes.is_main:
            found = rate_report.findings(sweeps, recipe, arguments, options)
            files = rate_report.write(found, folder, options.picture)
            sys.stdout.write(f"\n{rate_report.table(found)}\nIn {files[0]} and {files[1]}\n")


if __name__ == "__main__":
    enter(main)
