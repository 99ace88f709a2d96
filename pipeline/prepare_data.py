"""Turn the recipe's text into fixed-length rows of ids on disk.

python pipeline/prepare_data.py --config recipes/quickstart.yaml --show 5

N machines with a common file system share the work, each started with its own rank R:
accelerate launch --config_file accelerate_configs/prepare.yaml --num_machines N \\
  --num_processes N --machine_rank R --main_process_ip FIRST pipeline/prepare_data.py
"""

import os
import sys
from collections.abc import Sequence

from pipeline.command_line import enter, read_command_line
from pipeline.options import PrepareOptions


def main(argv: Sequence[str] | None = None) -> None:
    """Read the recipe, find text and tokenizer, write rows, say what they hold."""
    recipe, options = read_command_line(argv, PrepareOptions, doc=__doc__)

    # Not before: these imports take seconds, and --help or a misspelt key should not.
    from pipeline.corpus import Corpus
    from pipeline.locks import held
    from pipeline.preparation import prepare_blocks
    from pipeline.row_tables import show
    from pipeline.tokenizer import await_tokenizer, obtain_tokenizer

    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    with held(recipe.output_dir, is_main_process=rank == 0):
        corpus = Corpus(recipe.data, recipe.cleaning, digests=recipe.digests_path)
        await_tokenizer(recipe.tokenizer, recipe.tokenizer_dir, rank=rank)
        tokenizer = obtain_tokenizer(
            recipe.tokenizer, corpus, recipe.tokenizer_dir, model=recipe.model,
            for_text_only=True, is_awaited=world_size > 1,
        )  # fmt: skip
        prepare_blocks(
            recipe.data, corpus, tokenizer, recipe.blocks_dir, cleaning=recipe.cleaning,
            num_proc=options.num_proc, rank=rank, world_size=world_size,
        )  # fmt: skip
    if rank == 0:
        sys.stdout.write(f"rows in {recipe.blocks_dir}\n")
        if options.show:
            sys.stdout.write(show(recipe.blocks_dir, tokenizer, options.show) + "\n")


if __name__ == "__main__":
    enter(main)
