"""Let a trained model go on from prompts.

python pipeline/generate.py --model outputs/quickstart --prompt "def read("
python pipeline/generate.py --model outputs/quickstart --prompts_file a.txt --output texts.jsonl
python pipeline/generate.py --model outputs/quickstart
"""

import sys
from collections.abc import Sequence

from pipeline.command_line import enter, read_options
from pipeline.options import GenerateOptions


def main(argv: Sequence[str] | None = None) -> None:
    """Read the prompts, load model and tokenizer, write."""
    options = read_options(argv, GenerateOptions, doc=__doc__)

    # Not before: these imports take seconds, and --help should not.
    from pipeline.prompts import read_prompts

    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    prompts = read_prompts(options, at_terminal=at_terminal)

    # Nor these, which a mistake in the prompts need not wait for.
    from pipeline import samples
    from pipeline.dialogue import Dialogue
    from pipeline.model import load_model
    from pipeline.tokenizer import load_tokenizer

    model, tokenizer = load_model(options.model), load_tokenizer(options.model)
    streams = {"out": sys.stdout, "notes": sys.stderr}
    if prompts is None:
        Dialogue(model, tokenizer, options, **streams).run()
    else:
        samples.write(model, tokenizer, prompts, options, **streams)


if __name__ == "__main__":
    enter(main)
