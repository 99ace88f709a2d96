"""Pre-train or fine-tune GPT-2 from a recipe, on text, into a folder that from_pretrained opens.

accelerate launch --quiet pipeline/pretrain.py --config recipes/quickstart.yaml
"""

import sys
from collections.abc import Sequence

from pipeline.command_line import PretrainOptions, enter, read_command_line


def main(argv: Sequence[str] | None = None) -> None:
    """Read the recipe, make its parts in the order of their dependency, train, report."""
    recipe, options = read_command_line(argv, PretrainOptions, doc=__doc__)

    # Not before: torch takes seconds, and --help or a misspelt key should not.
    from pipeline import report, run_folder
    from pipeline.arguments import training_arguments
    from pipeline.blocks import obtain_blocks
    from pipeline.corpus import Corpus
    from pipeline.model import build_model, check_model
    from pipeline.tokenizer import obtain_tokenizer
    from pipeline.trainer import PretrainingTrainer

    recipe, arguments = training_arguments(recipe)
    check_model(recipe.model, block_size=recipe.data.block_size)
    is_main = arguments.process_index == 0
    with run_folder.opened(recipe, options, is_main_process=is_main) as run:
        if not run.finished:
            with arguments.main_process_first(local=False):
                corpus = Corpus(recipe.data)
                tokenizer = obtain_tokenizer(
                    recipe.tokenizer, corpus, recipe.tokenizer_dir, model=recipe.model.pretrained
                )
                blocks = obtain_blocks(recipe.data, corpus, tokenizer, recipe.blocks_dir)
            model = build_model(
                recipe.model, tokenizer, block_size=recipe.data.block_size, seed=arguments.seed
            )
            trainer = PretrainingTrainer(
                recipe, arguments, model=model, tokenizer=tokenizer, blocks=blocks
            )
            run.begin(recipe)
            trainer.train_from(options.resume)
            trainer.save_result()
            metrics, sample = trainer.result(blocks)
            if is_main:
                report.write_report(recipe, metrics, sample, trainer.history, tokenizer)
    if is_main:
        sys.stdout.write(f"\n{report.summary(recipe)}\n")


if __name__ == "__main__":
    enter(main)
