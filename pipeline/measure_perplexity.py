"""Measure perplexity and bits per byte of a model on text files.

python pipeline/measure_perplexity.py --model outputs/quickstart --files a.txt b.txt
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.command_line import MeasureOptions, enter, read_options


def main(argv: Sequence[str] | None = None) -> None:
    """Load model, tokenizer and texts, score, show and keep the numbers."""
    options = read_options(argv, MeasureOptions, doc=__doc__)

    # Not before: these imports take seconds, and --help should not.
    from pipeline.model import load_model
    from pipeline.perplexity import check_target, load_metric
    from pipeline.text_files import read_files
    from pipeline.tokenizer import load_tokenizer

    check_target(options.json_)
    texts = read_files(options.files, errors=options.errors)
    numbers = load_metric().compute(
        predictions=texts,
        model=load_model(options.model),
        tokenizer=load_tokenizer(options.model),
        block_size=options.block_size,
        batch_size=options.batch_size,
    )
    sys.stdout.write(
        "\n".join(
            f"{name:<15}{value:>14,.6g}" if isinstance(value, float) else f"{name:<15}{value:>14,}"
            for name, value in numbers.items()
        )
        + "\n"
    )
    if options.json_:
        Path(options.json_).write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    enter(main)
