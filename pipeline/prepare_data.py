"""Turn the recipe's text into fixed-length rows of ids on disk.

python pipeline/prepare_data.py --config recipes/quickstart.yaml --num_proc 2
"""

import sys
from collections.abc import Sequence

from pipeline.command_line import PrepareOptions, enter, read_command_line


def main(argv: Sequence[str] | None = None) -> None:
    """Read the recipe, find text and tokenizer, write rows, say what they hold."""
    recipe, options = read_command_line(argv, PrepareOptions, doc=__doc__)

    # Not before: these imports take seconds, and --help or a misspelt key should not.
    from pipeline.blocks import obtain_blocks
    from pipeline.corpus import Corpus
    from pipeline.tokenizer import obtain_tokenizer

    corpus = Corpus(recipe.data)
    tokenizer = obtain_tokenizer(
        recipe.tokenizer, corpus, recipe.tokenizer_dir, model=recipe.model.pretrained
    )
    obtain_blocks(recipe.data, corpus, tokenizer, recipe.blocks_dir, num_proc=options.num_proc)
    sys.stdout.write(f"rows in {recipe.blocks_dir}\n")


if __name__ == "__main__":
    enter(main)
