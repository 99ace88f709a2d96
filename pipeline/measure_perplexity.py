"""Measure perplexity, bits per byte and accuracy of models on text, side by side.

python pipeline/measure_perplexity.py --model outputs/quickstart --files a.txt b.txt
python pipeline/measure_perplexity.py --model outputs/a outputs/b --held_out outputs/a
"""

import sys
from collections.abc import Sequence

from pipeline.command_line import enter, read_options
from pipeline.options import MeasureOptions


def main(argv: Sequence[str] | None = None) -> None:
    """Read the options, measure every model on the text, show and keep the numbers."""
    options = read_options(argv, MeasureOptions, doc=__doc__)

    # Not before: these imports take seconds, and --help should not.
    from pipeline import json_file, side_by_side
    from pipeline.processes import Processes

    json_file.check_target(options.json_)
    processes = Processes.launched()
    with side_by_side.said_as_options():
        found = side_by_side.compare(options, processes)
    if processes.is_main:
        sys.stdout.write(side_by_side.table(found) + "\n")
        json_file.write(found, options.json_)


if __name__ == "__main__":
    enter(main)
