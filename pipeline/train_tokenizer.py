"""Train the recipe's byte-level BPE tokenizer on its training text.

python pipeline/train_tokenizer.py --config recipes/quickstart.yaml --compare openai-community/gpt2
"""

import sys
from collections.abc import Sequence

from pipeline.command_line import enter, read_command_line
from pipeline.options import TokenizerOptions


def main(argv: Sequence[str] | None = None) -> None:
    """Read the recipe, find the text, train."""
    recipe, options = read_command_line(argv, TokenizerOptions, doc=__doc__)

    # Not before: these imports take seconds, and --help or a misspelt key should not.
    from pipeline.corpus import Corpus
    from pipeline.locks import held
    from pipeline.tokenizer import compare, load_tokenizer, obtain_tokenizer

    others = {options.compare: load_tokenizer(options.compare)} if options.compare else {}
    with held(recipe.output_dir):
        corpus = Corpus(recipe.data, recipe.cleaning, digests=recipe.digests_path)
        tokenizer = obtain_tokenizer(
            recipe.tokenizer, corpus, recipe.tokenizer_dir, model=recipe.model
        )
    sys.stdout.write(f"tokenizer of {len(tokenizer):,} entries: {tokenizer.name_or_path}\n")
    sys.stdout.write(compare(corpus, {"this one": tokenizer, **others}) + "\n")


if __name__ == "__main__":
    enter(main)
