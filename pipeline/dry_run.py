"""What is seen of a run by trying it: rows, labels, gradient, one batch learnt, speed, costs.

Nothing of it is left. Where several processes train together all of them call what is here.
"""

import functools
import logging
import math
import sys
import time

import torch
import torch.nn.functional as F

from pipeline import cheap_checks, findings, trial_checks
from pipeline.blocks import NO_LABEL
from pipeline.cheap_checks import rows_at_once, step_of
from pipeline.findings import Finding
from pipeline.lr_schedule import schedule
from pipeline.options import PretrainOptions
from pipeline.pushing import Pusher
from pipeline.recipe import InputError
from pipeline.row_text import as_text
from pipeline.run_folder import Run
from pipeline.terminal_curve import drawn
from pipeline.trainer import PretrainingTrainer
from pipeline.wording import duration

logger = logging.getLogger(__name__)

# The model's loss against one from its logits, both fp32: they add up in another order.
RELATIVE = 1e-4
ROWS_SHOWN = 2


def look(trainer: PretrainingTrainer, run: Run, pusher: Pusher, options: PretrainOptions) -> None:
    """Show all that can be known of a run before its first update.

    Raises:
        InputError: something fails that the recipe does not accept; all has been shown.
    """
    told = functools.partial(trainer.processes.told, patiently=True)
    accept, seen = trainer.recipe.preflight.accept, []

    def see(finding: Finding) -> None:
        seen.append(finding)
        findings.say(finding, accept)

    found = told(lambda: trainer.may_go_on_from(run.find(), options.allow_change))
    started, begin = time.perf_counter(), None if run.finished else found
    see(told(lambda: cheap_checks.recipe_in_effect(trainer, whole=True)))
    see(told(lambda: cheap_checks.beginning(trainer, found, is_finished=run.finished)))
    see(told(lambda: rows(trainer)))
    see(told(lambda: labels(trainer)))
    see(told(lambda: cheap_checks.initial_loss(trainer)))
    see(told(lambda: gradient(trainer)))
    see(told(lambda: learning_rate(trainer, step_of(begin))))
    memory = told(lambda: cheap_checks.memory(trainer))
    see(memory)
    see(told(lambda: cheap_checks.disk(trainer, begin)))
    see(told(lambda: cheap_checks.tokens(trainer)))
    if memory.mark(accept) == "fails":
        for name in ("overfitting", "speed"):
            see(Finding(name, "not tried: the memory does not suffice", is_judged=False))
        see(told(lambda: cheap_checks.evaluation(trainer, begin)))
    else:
        trial_checks.see_all(trainer, begin, see)
    if trainer.recipe.training.get("push_to_hub"):
        see(told(lambda: hub(pusher)))
    logger.info("  seen in %s; nothing is trained", duration(time.perf_counter() - started))
    told(lambda: findings.judge(seen, accept))


def rows(trainer: PretrainingTrainer) -> Finding:
    """Return training rows as text, with what each token predicts and where documents begin."""
    train = trainer.train_dataset
    shown = as_text(train, trainer.processing_class, ROWS_SHOWN)
    count = "streamed" if train.is_stream else f"{len(train):,}"
    return Finding("rows", f"{count}, of {train.block_size} tokens; two of them:", shown=shown)


def labels(trainer: PretrainingTrainer) -> Finding:
    """See that labels are the tokens, boundaries are kept, and the loss is that of the next token.

    The loss is computed again, in fp32, from the logits and the ids alone.
    """
    train, name = trainer.train_dataset, "labels"
    anew = "prepare the text anew, in another --training.output_dir"
    indices = list(range(min(len(train), rows_at_once(trainer))))
    batch = train.__getitems__(indices)
    ids, is_label = batch["input_ids"], batch["labels"] != NO_LABEL
    if wrong := int((batch["labels"] != ids)[is_label].sum()):
        return Finding(name, f"{wrong:,} labels are not the tokens of their rows", anew)
    begins = [(n, c) for n in indices for c in train.row(n)[1].tolist() if c > 0]
    if not train.attend_across:
        joined = [(n, c) for n, c in begins if is_label[n, c] or batch["position_ids"][n, c]]
        if joined:
            said = f"in row {joined[0][0]} a document is not apart from the one before"
            return Finding(name, said, anew)
    targets = ids[:, 1:].masked_fill(~is_label[:, 1:], NO_LABEL)
    given, nats = trainer.batch(train, indices), 0.0
    with trainer.untouched(in_fp32=True) as model, torch.no_grad():
        loss = model(**given).loss.item()
        for n in indices:  # the logits of one row at a time
            row = {key: value[n : n + 1] for key, value in given.items() if key != "labels"}
            logits = model(**row, use_cache=False).logits[0, :-1].float().cpu()
            nats += F.cross_entropy(logits, targets[n], reduction="sum").item()
    count = int((targets != NO_LABEL).sum())
    said = f"loss {loss:.4f} of {count:,} labels, {nats / max(1, count):.4f} of the next tokens"
    if not math.isclose(loss, nats / max(1, count), rel_tol=RELATIVE):
        remedy = (
            "the labels are not one token ahead: see to the model's loss (pipeline/model.py) and "
            "its attention (model.attn_implementation)"
        )
        return Finding(name, said, remedy)
    kept = "documents see those before" if train.attend_across else "documents are kept apart"
    return Finding(name, f"{said}; boundaries in {len(indices)} rows: {len(begins):,}, {kept}")


def gradient(trainer: PretrainingTrainer) -> Finding:
    """See that a gradient reaches every weight that is trained, and is finite.

    For one process, before DDP or FSDP2 has its hooks in the model.
    """
    train, name = trainer.train_dataset, "gradient"
    batch = trainer.batch(train, range(min(len(train), rows_at_once(trainer))))
    # fp16 overflows without the scaler that training has.
    with trainer.untouched(in_fp32=trainer.recipe.precision == "fp16") as model:
        loss = model(**batch).loss
        if loss.requires_grad:
            loss.backward()
        norms = {
            name: 0.0 if weight.grad is None else torch.linalg.vector_norm(weight.grad).item()
            for name, weight in model.named_parameters()
            if weight.requires_grad
        }
    # LoRA's B begins at zero, and so A has none yet (Hu et al. 2022, section 4.1).
    cut = [weight for weight, norm in norms.items() if norm == 0 and ".lora_A." not in weight]
    if cut:
        said = ", ".join(cut[:3]) + (", ..." if len(cut) > 3 else "")
        said = f"none reaches {len(cut)} of {len(norms)} trained weights: {said}"
        remedy = (
            "they would stay as they are: see to the model's forward, or say that they are not "
            "trained (model.frozen_blocks, model.frozen_embeddings)"
        )
        return Finding(name, said, remedy)
    total = math.hypot(*norms.values())
    if not math.isfinite(total):
        bad = next(weight for weight, norm in norms.items() if not math.isfinite(norm))
        remedy = "see to the weights that the run begins with, and to precision"
        return Finding(name, f"its norm is {total}, in {bad} first", remedy)
    return Finding(name, f"reaches all {len(norms)} trained weights; its norm is {total:.3g}")


def learning_rate(trainer: PretrainingTrainer, step: int = 0) -> Finding:
    """Return the recipe's learning rate over the updates, drawn; `step` is where the run begins."""
    section, updates, peak = trainer.recipe.schedule, trainer.horizon, trainer.args.learning_rate
    curve = schedule(section, max_steps=updates)
    values = [peak * curve(number) for number in range(updates)]
    highest, last, across = max(values), values[-1], max(1, updates - 1)
    top = values.index(highest)
    floor = updates - next((n for n, v in enumerate(reversed(values)) if v != last), updates)
    marks = [(top / across, f"peak {highest:.3g} at update {top + 1:,}")]
    if last < highest:
        stays = f"floor {last:.3g} from {floor + 1:,}"
        stays = stays if floor + 1 < updates else f"{last:.3g} at the end"
        marks.append((floor / across, stays))
    if step:
        marks.append((min(step / across, 1.0), f"goes on after {step:,}"))
    warm = f"warm-up of {top:,} updates" if values[0] < highest else "no warm-up"
    drawing = drawn(values, marks=marks, encoding=sys.stdout.encoding)
    return Finding("schedule", f"{section.name}, {warm}, {updates:,} in all", shown=drawing)


def hub(pusher: Pusher) -> Finding:
    """See that the Hub can be reached by whoever pushes."""
    try:
        return Finding("hub", pusher.look())
    except InputError as error:
        said, _, remedy = str(error).partition("; ")
        return Finding("hub", said, remedy or "see to it, or train without training.push_to_hub")
