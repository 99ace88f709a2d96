"""Let a trained model go on from a prompt.

python pipeline/generate.py --model outputs/quickstart --prompt "def read("
"""

import sys
from collections.abc import Sequence

from pipeline.command_line import enter, read_options
from pipeline.options import GenerateOptions


def main(argv: Sequence[str] | None = None) -> None:
    """Load model and tokenizer, write."""
    options = read_options(argv, GenerateOptions, doc=__doc__)

    # Not before: these imports take seconds, and --help should not.
    from pipeline.generation import continuation
    from pipeline.model import load_model
    from pipeline.tokenizer import load_tokenizer

    model, tokenizer = load_model(options.model), load_tokenizer(options.model)
    settings = options.model_dump(exclude={"model", "prompt"})
    text = continuation(model, tokenizer, options.prompt, **settings)
    sys.stdout.write(f"{options.prompt}{text}\n")


if __name__ == "__main__":
    enter(main)
