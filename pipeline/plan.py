"""Compute what a run takes before anything is loaded: parameters, memory, time, money, loss.

python pipeline/plan.py --config recipes/gpt2_small.yaml --hardware 8xh100 --price_per_hour 2.5
python pipeline/plan.py --budget "8xh100 24h"
python pipeline/plan.py --fit outputs/ladder/*/metrics.json --config recipes/quickstart.yaml
"""

import sys
from collections.abc import Sequence

from pipeline.command_line import enter, read_command_line
from pipeline.plan_options import PlanOptions


def main(argv: Sequence[str] | None = None) -> None:
    """Read recipe and options, answer the question that they ask, show, keep and draw it."""
    recipe, options = read_command_line(argv, PlanOptions, doc=__doc__)

    from pipeline import json_file, plan_answers

    plan_answers.check_targets(options)
    answer = plan_answers.answer(recipe, options)
    sys.stdout.write(answer.text + "\n")
    json_file.write(answer.numbers, options.json_)
    answer.draw(options.picture)


if __name__ == "__main__":
    enter(main)
