"""Measure perplexity and bits per byte of a model on text files.

python pipeline/measure_perplexity.py --model outputs/quickstart --files a.txt b.txt
"""

import sys
from collections.abc import Sequence

from pipeline.command_line import MeasureOptions, enter, read_options


def main(argv: Sequence[str] | None = None) -> None:
    """Load model, tokenizer and texts, score, show and keep the numbers."""
    options = read_options(argv, MeasureOptions, doc=__doc__)

    # Not before: these imports take seconds, and --help should not.
    from pipeline.corpus import read_files
    from pipeline.model import load_model
    from pipeline.perplexity import load_metric, save_numbers
    from pipeline.tokenizer import load_tokenizer

    texts = read_files(options.files, errors=options.errors)
    numbers = load_metric().compute(
        predictions=texts,
        model=load_model(options.model),
        tokenizer=load_tokenizer(options.model),
        block_size=options.block_size,
        batch_size=options.batch_size,
    )
    sys.stdout.write("\n".join(f"{name:<15}{value:>16,}" for name, value in numbers.items()) + "\n")
    if options.json_:
        save_numbers(numbers, options.json_)


if __name__ == "__main__":
    enter(main)
