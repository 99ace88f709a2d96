"""The numbers of held-out text: while training, and at the end on the files that were saved."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TrainingArguments

from pipeline.blocks import HeldOutBatches, Rows
from pipeline.generation import continuation
from pipeline.model import load_model
from pipeline.perplexity import Score, sum_nats
from pipeline.processes import Processes
from pipeline.recipe import Recipe

logger = logging.getLogger(__name__)


def score(
    model: torch.nn.Module,
    batches: HeldOutBatches,
    processes: Processes,
    *,
    device: torch.device,
    after_batch: Callable[..., Any],
) -> Score:
    """Score a held-out split, each process its own batches; all get the same number."""
    nats = sum_nats(model, batches, device=device, after_batch=after_batch)
    rows = batches.dataset
    total = sum(processes.gathered(nats))
    return Score(nats=total, tokens=rows.scored_tokens, bytes=rows.scored_bytes)


def measured(
    recipe: Recipe,
    arguments: TrainingArguments,
    processes: Processes,
    blocks: dict[str, Rows],
    tokenizer: PreTrainedTokenizerBase,
    *,
    after_batch: Callable[[], Any],
) -> tuple[dict[str, Any], str]:
    """Return the held-out numbers of the saved folder, and what its model writes.

    The saved weights are read back and scored in fp32 by the stock model, so that the numbers
    are those of the files, and `measure_perplexity.py` repeats them.
    """
    logger.info("measuring the saved model on all held-out text, in fp32")
    model = load_model(arguments.output_dir).to(arguments.device)
    metrics: dict[str, Any] = {}
    for split, prefix in (("validation", "eval"), ("test", "test")):
        if split in blocks:
            batches = HeldOutBatches(
                blocks[split], batch_size=arguments.eval_batch_size,
                rank=processes.rank, world_size=processes.count,
            )  # fmt: skip
            with tqdm(desc=f"{split} in fp32", total=len(batches), delay=2, disable=None) as bar:

                def show_progress(bar: tqdm = bar) -> None:
                    bar.update()
                    after_batch()

                found = score(
                    model, batches, processes, device=arguments.device, after_batch=show_progress
                )
            metrics |= found.as_metrics(prefix)
    section = recipe.generation
    sample = ""
    for prompt in section.prompts[:1]:
        settings = section.model_dump(exclude={"prompts"})
        sample = prompt + continuation(model, tokenizer, prompt, **settings)
    return metrics, sample
