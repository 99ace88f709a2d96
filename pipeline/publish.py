"""Send a finished run, one of its checkpoints, or a model's folder to the Hugging Face Hub.

python pipeline/publish.py --run outputs/quickstart --repo_id USER/NAME --dry_run
python pipeline/publish.py --run outputs/quickstart --repo_id USER/NAME --license mit --language en

Exit codes: 0 sent, or there already; 2 it cannot work; 75 it failed, and the same again may not.
"""

import sys
from collections.abc import Sequence

from pipeline.command_line import enter, read_options
from pipeline.interruption import EXIT_CODE
from pipeline.options import PublishOptions


def main(argv: Sequence[str] | None = None) -> int:
    """Choose the files, show them, send them in one commit, say where they are."""
    options = read_options(argv, PublishOptions, doc=__doc__)

    # Not before: these imports take a while, and --help should not.
    from pipeline import publication, publishing
    from pipeline.hub_client import Temporary

    made = publication.prepared(options)
    sys.stdout.write(f"{publication.listing(made)}\n")
    if options.dry_run:
        sys.stdout.write(f"\n{publication.card(made)}\nnothing was sent (--dry_run)\n")
        return 0
    sys.stdout.flush()
    try:
        made, commit = publishing.sent(made)
        sys.stdout.write(f"\n{publishing.farewell(made)}\n")
        if options.space:
            sys.stdout.write(f"{publishing.sent_space(made)}\n")
    except Temporary as error:
        sys.stderr.write(f"error: {error}; the same command tries it again\n")
        sys.stdout.write(publishing.wish(error))
        return EXIT_CODE
    sys.stdout.write(f"{made.revision}: {commit}\n")
    return 0


if __name__ == "__main__":
    enter(main)
