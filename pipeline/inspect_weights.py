"""Show the tensors of a model: names, shapes, parameters, mean and standard deviation.

python pipeline/inspect_weights.py --model outputs/quickstart --match "*.attn.*"
"""

import sys
from collections.abc import Sequence

from pipeline.command_line import enter, read_options
from pipeline.options import InspectOptions


def main(argv: Sequence[str] | None = None) -> None:
    """Read the options, look at every tensor, show and keep the table."""
    options = read_options(argv, InspectOptions, doc=__doc__)

    # Not before: these imports take seconds, and --help should not.
    from pipeline import json_file, weight_table

    json_file.check_target(options.json_)
    table = weight_table.look(options.model, match=options.match)
    sys.stdout.write(f"{weight_table.as_text(table)}\n")
    json_file.write(weight_table.as_dict(table), options.json_)


if __name__ == "__main__":
    enter(main)
