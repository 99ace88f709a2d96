"""The numbers of held-out text at the end of a run, measured on the files that were saved."""

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TrainingArguments

from pipeline.blocks import Rows
from pipeline.generation import continuation
from pipeline.held_out import HeldOutBatches, scored_texts
from pipeline.model import load_model
from pipeline.perplexity import Score
from pipeline.processes import Processes
from pipeline.recipe import InputError, Recipe
from pipeline.scoring import sum_scores
from pipeline.tasks import run_tasks

logger = logging.getLogger(__name__)


def score_documents(
    model: torch.nn.Module,
    batches: HeldOutBatches,
    tokenizer: PreTrainedTokenizerBase,
    processes: Processes,
    *,
    after_batch: Callable[[], Any],
) -> Score:
    """Score a held-out split document by document; all processes get the same numbers.

    Args:
        batches: this process's, made `by_document`.
    """
    sums = sum_scores(model, batches, device=model.device, after_batch=after_batch)
    rows, counts = batches.dataset, []
    for content in scored_texts(rows, tokenizer):
        counts.append((len(content), len(content.decode(errors="replace").split())))
    sums = sums.together(processes, documents=len(counts))
    assert int(sums.tokens.sum()) == rows.scored_tokens
    return Score(sums.nats, sums.tokens, sums.correct, *np.array(counts).T)


def as_metrics(score: Score, prefix: str) -> dict[str, Any]:
    """Return what stands in metrics.json of a split, under `<prefix>_...`."""
    measures, intervals = score.measures(), score.intervals()
    intervals["loss"] = intervals.pop("nats_per_token")
    return score.as_metrics(prefix) | {
        f"{prefix}_word_perplexity": measures["word_perplexity"],
        f"{prefix}_mean_perplexity": measures["mean_perplexity"],
        f"{prefix}_words": int(score.words.sum()),
        f"{prefix}_documents": int((score.tokens > 0).sum()),
        f"{prefix}_confidence_intervals": intervals,
    }


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
    started = time.perf_counter()
    metrics: dict[str, Any] = {}
    for split, prefix in (("validation", "eval"), ("test", "test")):
        if split in blocks:
            batches = HeldOutBatches(
                blocks[split], batch_size=arguments.eval_batch_size,
                rank=processes.rank, world_size=processes.count, by_document=True,
            )  # fmt: skip
            shown = None if processes.is_main else True
            with tqdm(desc=f"{split} in fp32", total=len(batches), delay=2, disable=shown) as bar:

                def show_progress(bar: tqdm = bar) -> None:
                    bar.update()
                    after_batch()

                found = score_documents(
                    model, batches, tokenizer, processes, after_batch=show_progress
                )
            metrics |= as_metrics(found, prefix)
    metrics["measuring_seconds"] = time.perf_counter() - started
    section = recipe.generation
    sample = ""
    for prompt in section.prompts[:1]:
        settings = section.model_dump(exclude={"prompts"})
        sample = prompt + continuation(model, tokenizer, prompt, **settings)
    return metrics, sample


def measured_tasks(
    recipe: Recipe, arguments: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, float]]:
    """Return the numbers of `evaluation.tasks`, of the saved folder too; for one process."""
    section, found = recipe.evaluation, {}
    model = load_model(arguments.output_dir).to(arguments.device)
    for name in section.tasks:
        try:
            found |= run_tasks(
                model, tokenizer, [name],
                batch_size=arguments.eval_batch_size, limit=section.tasks_limit,
            )  # fmt: skip
        except InputError as error:  # the run itself is whole
            logger.error("%s; the final numbers are without it", error)
    return found
