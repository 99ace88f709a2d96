"""Write a run's report.html anew, or one page that compares several runs.

python pipeline/write_report.py --runs outputs/one outputs/other --html comparison.html
"""

import sys
from collections.abc import Sequence

from pipeline.command_line import enter, read_options
from pipeline.options import WriteReportOptions


def main(argv: Sequence[str] | None = None) -> None:
    """Read the run folders, write the page, say where it is."""
    options = read_options(argv, WriteReportOptions, doc=__doc__)

    # Not before: these imports take seconds, and --help should not.
    from pipeline.report_page import write_pages

    sys.stdout.write(f"{write_pages(options.runs, options.html)}\n")


if __name__ == "__main__":
    enter(main)
