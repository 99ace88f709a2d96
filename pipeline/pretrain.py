"""Pre-train or fine-tune GPT-2 from a recipe, on text, into a folder that from_pretrained opens.

accelerate launch --quiet pipeline/pretrain.py --config recipes/quickstart.yaml
"""

import sys
from collections.abc import Sequence

from pipeline import interruption
from pipeline.command_line import enter, read_command_line
from pipeline.options import PretrainOptions


@interruption.heeded()
def main(argv: Sequence[str] | None = None) -> None:
    """Read the recipe, make its parts in the order of their dependency, train, report."""
    recipe, options = read_command_line(argv, PretrainOptions, doc=__doc__)

    # Not before: torch takes seconds, and --help or a misspelt key should not.
    from pipeline import dry_run, machine, preflight, report, run_folder
    from pipeline.arguments import training_arguments
    from pipeline.model import check_model
    from pipeline.pretrained import settled
    from pipeline.processes import Processes
    from pipeline.pushing import Pusher
    from pipeline.run_data import obtain_run_data
    from pipeline.trainer import make_trainer

    recipe, arguments = training_arguments(settled(recipe))
    check_model(recipe.model, block_size=recipe.data.block_size)
    processes = Processes(arguments)
    pusher = Pusher(recipe, processes)
    with pusher, run_folder.opened(recipe, options, processes, pusher.finish) as run:
        if options.dry_run or not run.finished:
            recipe = preflight.passed(recipe, processes, pusher, is_dry=options.dry_run)
            machine.warm_compiler(arguments, is_wanted=not options.dry_run)
            data = obtain_run_data(recipe, arguments, processes)
            trainer = make_trainer(recipe, arguments, data, processes=processes, pusher=pusher)
            with data.flowing():
                if options.dry_run:
                    return dry_run.look(trainer, run, pusher, options)
                trainer.train_from(
                    options.resume, allow_change=options.allow_change, find=run.find,
                    look=lambda found: preflight.look(trainer, found),
                    begin=lambda: run.begin(recipe), last_words=run.last_words,
                )  # fmt: skip
            trainer.save_result()
            metrics, sample = trainer.result(data.blocks)
            if processes.is_main:
                report.write_report(recipe, metrics, sample, trainer.history, data.tokenizer)
    if processes.is_main:
        sys.stdout.write(f"\n{report.summary(recipe)}\n{pusher.said}")


if __name__ == "__main__":
    enter(main)
