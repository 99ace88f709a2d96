"""What real updates show of a run before its first one: one batch learnt, speed, time and costs.

Where several processes train together all of them call what is here.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline import cheap_checks
from pipeline.arguments import remedy
from pipeline.cheap_checks import judged_evaluation, rows_at_once, step_of
from pipeline.findings import Finding
from pipeline.guard import NonFinite
from pipeline.recipe import InputError
from pipeline.trainer import PretrainingTrainer
from pipeline.trial import OneBatch
from pipeline.wording import duration, finishing

# One batch of at most 2,048 tokens, at the recipe's peak rate after a warm-up of 5 updates. Tried:
# its loss halved after 8 updates (the quickstart, Muon 1e-2), 20 (4 x 256, AdamW 6e-4), 111 (smoke,
# AdamW 1e-3, 32 wide), 106 (a pretrained 4 x 128, 5e-5) and 159 (its LoRA, 3e-4). It did not with
# a hundredth of the first or a tenth of smoke's rate, or with rates of 1 and more.
FALL, UPDATES, WARMUP = 0.5, 200, 5
# After so long, a batch that is not learnt is not judged: the machine is too slow to be asked.
SECONDS_TO_LEARN = 60.0
# Updates timed after the first one: as many and as long at least; none if that takes too long.
TIMED_UPDATES, TIMED_SECONDS, MOST_SECONDS = 3, 1.5, 30.0
# Batches timed for an evaluation after the first one, unless that takes as long: of 40 with other
# work beside them the slowest took ten times the quickest.
TIMED_BATCHES = 10


def see_all(
    trainer: PretrainingTrainer, begin: Path | None, see: Callable[[Finding], None]
) -> None:
    """See what real updates show: all that is here, in its order.

    Raises:
        InputError: of several processes one has no memory left.
    """
    # Before the weights are divided.
    per_evaluation = trainer.processes.told(lambda: evaluation_seconds(trainer), patiently=True)
    try:
        learnt, of_one_batch = overfitting(trainer)
        see(learnt)
        for finding in times(trainer, begin, per_evaluation, of_one_batch):
            see(finding)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        sentence = remedy(error, trainer.recipe, trainer.args)
        if sentence is None:
            raise
        if trainer.processes.count > 1:  # the others wait for this one
            raise InputError(sentence) from None
        said, _, way_out = sentence.partition("; ")
        see(Finding("speed", said, way_out or "take a smaller batch or model"))


def overfitting(trainer: PretrainingTrainer) -> tuple[Finding, float]:
    """See that the run's optimizer learns one batch by heart; return its tokens per second, too."""
    name, began, losses = "overfitting", time.monotonic(), []
    if trainer.is_deepspeed_enabled:  # its engine cannot be made twice
        return Finding(name, "not tried with DeepSpeed", is_judged=False), 0.0
    rows = trainer.eval_dataset if trainer.train_dataset.is_stream else trainer.train_dataset
    count = trainer.processes.count
    batch = OneBatch(rows, rows_at_once(trainer) * count)

    def is_enough(update: int, loss: float) -> bool:
        losses.append(loss)
        is_slow = time.monotonic() - began > SECONDS_TO_LEARN
        return loss <= FALL * losses[0] or not math.isfinite(loss) or is_slow

    constant = {"name": "linear", "warmup_steps": WARMUP, "floor": 1.0}
    per_second, broke = 0.0, ""
    try:
        recipe = trainer.recipe.with_values(schedule=constant)
        trial = trainer.tried(is_enough, recipe=recipe, batch=batch, most_updates=UPDATES)
        per_second = trial.tokens_per_second
    except NonFinite as fault:
        broke = f"; {fault}"
    lasted = time.monotonic() - began
    finding = trainer.processes.told(
        lambda: judged_losses(
            losses, tokens=len(batch) * batch.block_size, rate=trainer.args.learning_rate,
            broke=broke, lasted=lasted,
        )
    )  # fmt: skip
    return finding, per_second


def judged_losses(
    losses: list[float], *, tokens: int, rate: float, broke: str = "", lasted: float = 0.0
) -> Finding:
    """Judge the losses of one batch, each before its update: see `FALL`.

    Args:
        broke: what ended them before their time.
        lasted: seconds.
    """
    name, first = "overfitting", losses[0] if losses else math.nan
    last, updates = (losses[-1], len(losses) - 1) if losses else (math.nan, 0)
    said = f"one batch of {tokens:,} tokens: loss {first:.3f} to {last:.3f} in {updates} updates"
    said += f" at a rate of {rate:g}"
    if last <= FALL * first:
        return Finding(name, f"{said}; all is put back")
    if lasted > SECONDS_TO_LEARN and not broke and last < first:
        said += f", and no more after {duration(lasted)}: not judged"
        return Finding(name, said, is_judged=False)
    said += f", not to half of it{broke}"
    is_unmoved = max(losses, default=first) - min(losses, default=first) < 0.01 * first
    is_slow = not broke and math.isfinite(last) and (last < first or is_unmoved)
    way = "raise it tenfold" if is_slow else "lower it to a tenth"
    return Finding(name, said, f"see to training.learning_rate: {way}")


def evaluation_seconds(trainer: PretrainingTrainer) -> float:
    """Return how long one evaluation takes, by a batch of held-out rows: the quickest of a few."""
    rows = trainer.eval_dataset
    at_once = max(1, cheap_checks.TOKENS // rows.block_size)
    count = min(len(rows), trainer.args.eval_batch_size, at_once)
    batch, seconds = trainer.batch(rows, range(count)), []
    with trainer.untouched() as model, torch.no_grad():
        while len(seconds) < 2 or len(seconds) <= TIMED_BATCHES and sum(seconds) < TIMED_SECONDS:
            started = time.perf_counter()
            model(**batch).loss.item()
            seconds.append(time.perf_counter() - started)
    each = min(seconds) / (count * rows.block_size) / trainer.processes.count
    return trainer.evaluated_tokens * each


def times(
    trainer: PretrainingTrainer, begin: Path | None, per_evaluation: float, of_one_batch: float
) -> list[Finding]:
    """Return how fast real updates are, when the run ends, and what evaluations cost of it.

    Args:
        begin: the checkpoint that the run goes on from.
        per_evaluation: seconds.
        of_one_batch: tokens per second that were measured before.
    """
    per_update, left = trainer.recipe.tokens_per_update, trainer.horizon - step_of(begin)
    evaluations, count = trainer.evaluations_left(step_of(begin)), 0
    said = "on the batch above, as a real update takes too long here"
    per_second, began = of_one_batch, time.monotonic()
    timed = (1 + TIMED_UPDATES) * per_update
    if not trainer.is_deepspeed_enabled and timed <= MOST_SECONDS * of_one_batch:

        def is_enough(update: int, loss: float) -> bool:
            nonlocal count
            count = update - 1
            return count >= TIMED_UPDATES and time.monotonic() - began > TIMED_SECONDS

        try:
            per_second = trainer.tried(is_enough).tokens_per_second
            said = f"in {count} updates"
        except NonFinite as fault:
            return [Finding("speed", str(fault), "see to training.learning_rate: lower it")]
    per_second = trainer.processes.told(lambda: per_second)
    if not per_second:
        return [Finding("speed", "not measured", is_judged=False)]
    training = left * per_update / per_second
    seconds = training + evaluations * per_evaluation
    compiled = " without compilation, which the run has" if trainer.args.torch_compile else ""
    said = f"{per_second:,.0f} tokens/s {said}{compiled}: {duration(seconds)} with evaluations"
    speed = Finding("speed", f"{said}, until {finishing(seconds)} if it began now")
    return [
        speed,
        judged_evaluation(
            evaluations,
            per_evaluation,
            training,
            seconds=per_evaluation,
            how="as measured" + cheap_checks.uncounted(trainer),
        ),
    ]
