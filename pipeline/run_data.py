"""What a run learns from: tokenizer, rows, and for a stream the process that makes them."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase, TrainingArguments

from pipeline.blocks import Rows, open_blocks
from pipeline.completions import CHAT_TEMPLATE
from pipeline.corpus import Corpus
from pipeline.preparation import prepare_blocks, stream_of
from pipeline.processes import Processes
from pipeline.recipe import Recipe
from pipeline.streaming import producing
from pipeline.tokenizer import obtain_tokenizer


class RunData(NamedTuple):
    """The data of a run, ready to be trained on."""

    tokenizer: PreTrainedTokenizerBase
    blocks: dict[str, Rows]
    """Rows of each split that is not empty."""
    flowing: Callable[[], contextlib.AbstractContextManager[None]]
    """Training happens inside of it: it keeps a streamed corpus coming."""


def obtain_run_data(
    recipe: Recipe,
    arguments: TrainingArguments,
    processes: Processes,
    *,
    ring: Path | None = None,
) -> RunData:
    """Return the data of a run; what is not prepared yet the main process prepares first.

    A stream's rows pass through the folder `ring` (default: the run's own).

    Raises:
        InputError: see `Corpus`, `obtain_tokenizer` and `prepare_blocks`.
    """
    section, folder, ring = recipe.data, recipe.blocks_dir, ring or recipe.ring_dir

    def prepared() -> tuple[Corpus, PreTrainedTokenizerBase]:
        corpus = Corpus(section, recipe.cleaning, digests=recipe.digests_path)
        tokenizer = obtain_tokenizer(
            recipe.tokenizer, corpus, recipe.tokenizer_dir, model=recipe.model
        )
        prepare_blocks(section, corpus, tokenizer, folder, cleaning=recipe.cleaning)
        return corpus, tokenizer

    corpus, tokenizer = processes.main_first(prepared)
    if section.example_format == "messages":
        tokenizer.chat_template = CHAT_TEMPLATE  # saved with it; whatever it had before
    rows_per_update = recipe.tokens_per_update // section.block_size
    stream = stream_of(
        section,
        corpus,
        tokenizer,
        folder=folder,
        cleaning=recipe.cleaning,
        rows_per_update=rows_per_update,
        seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
    )
    length = max(0, arguments.max_steps) * rows_per_update
    blocks = open_blocks(folder, section, stream=stream, ring=ring, length=length)
    return RunData(
        tokenizer,
        blocks,
        lambda: producing(stream, ring, is_main_process=processes.is_main),
    )
