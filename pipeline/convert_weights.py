"""Turn weights from elsewhere into a folder that transformers opens.

python pipeline/convert_weights.py --source out/ckpt.pt --output_dir outputs/converted
    --tokenizer openai-community/gpt2
"""

import sys
from collections.abc import Sequence

from pipeline.command_line import enter, read_options
from pipeline.options import ConvertOptions


def main(argv: Sequence[str] | None = None) -> None:
    """Read the options, convert, say what was made."""
    options = read_options(argv, ConvertOptions, doc=__doc__)

    # Not before: these imports take seconds, and --help should not.
    from pipeline.conversion import convert

    sys.stdout.write(f"{convert(options)}\n")


if __name__ == "__main__":
    enter(main)
