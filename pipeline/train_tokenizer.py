"""Train the recipe's byte-level BPE tokenizer on its training text.

python pipeline/train_tokenizer.py --config recipes/quickstart.yaml
"""

import sys
from collections.abc import Sequence

from pipeline.command_line import RecipeOptions, enter, read_command_line


def main(argv: Sequence[str] | None = None) -> None:
    """Read the recipe, find the text, train."""
    recipe, _ = read_command_line(argv, RecipeOptions, doc=__doc__)

    # Not before: these imports take seconds, and --help or a misspelt key should not.
    from pipeline.corpus import Corpus
    from pipeline.tokenizer import obtain_tokenizer

    tokenizer = obtain_tokenizer(
        recipe.tokenizer,
        Corpus(recipe.data),
        recipe.tokenizer_dir,
        model=recipe.model.pretrained,
    )
    sys.stdout.write(f"tokenizer of {len(tokenizer):,} entries: {tokenizer.name_or_path}\n")


if __name__ == "__main__":
    enter(main)
