"""A plan as a person reads it in a terminal of 80 columns."""

import datetime
import math
import textwrap

from pipeline.budgeting import Choice
from pipeline.run_plan import Plan
from pipeline.wording import duration, finishing, pasted, short, storage

NO_LAWS = "they are of models that begin with nothing, and a number of tokens that is known"
WIDTH, INDENT = 78, 22  # columns of a line, and of the names at its beginning
WHOLE = None  # instead of a name: a line that begins where names do


def table(plan: Plan, *, now: datetime.datetime) -> str:
    """Return a plan as text.

    Args:
        now: when the run would be started.
    """
    sections = {
        f"{plan.recipe} on {plan.hardware.title}": [],
        "model": _model(plan),
        "work": _work(plan),
        "memory of each device": _memory(plan),
        "time and cost": _cost(plan, now),
        "scaling laws": _laws(plan),
    }
    lines = []
    for title, rows in sections.items():
        lines += ["", title] if lines else [title]
        for name, said in rows:
            lines += _row(name, said)
    if plan.notes:
        lines += ["", "notes"]
        for note in plan.notes:
            lines += textwrap.wrap(note, WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join(lines)


def choice_table(choice: Choice, budget: str) -> str:
    """Return the sizes that a budget was offered, and why this one was taken."""
    rows = [["size", "parameters", "tokens", "per parameter", "of the text", "its loss", ""]]
    least = choice.candidates[choice.chosen].loss
    for number, one in enumerate(choice.candidates):
        rows.append([
            f"{one.shape.layers} x {one.shape.width}", short(one.parameters), short(one.tokens),
            f"{one.tokens / one.parameters:.3g}",
            "" if one.epochs is None else f"{one.epochs:.3g}",
            *(("least", "<- chosen") if number == choice.chosen
              else (f"{one.loss / least - 1:+.2%}", "")),
        ])  # fmt: skip
    available = choice.hardware.rate(choice.plan.memory.precision) * choice.seconds
    lines = [f"{budget}: {_power(available)} FLOPs at the assumed MFU"]
    if choice.hardware.is_measured:
        lines = [f"{budget}: {_power(available)} FLOPs as that run was measured"]
    lines += [f"  {line}" for line in aligned(rows)]
    for reason in choice.reasons:
        lines += textwrap.wrap(reason, WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join(lines)


def aligned(rows: list[list[str]]) -> list[str]:
    """Return rows as lines: the first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def command_lines(command: str) -> list[str]:
    """Return a command over as many lines as it takes, to be pasted whole."""
    return [f"  {line}" for line in pasted(command, WIDTH - 4)]


def _row(name: str | None, said: str) -> list[str]:
    if name is WHOLE:
        return [f"  {said}"]
    lines = textwrap.wrap(said, WIDTH - INDENT, break_on_hyphens=False) or [""]
    first = f"  {name}".ljust(INDENT)
    return [first + lines[0], *(" " * INDENT + line for line in lines[1:])]


def _model(plan: Plan) -> list[tuple[str | None, str]]:
    model, shape = plan.model, plan.model.shape
    parts = [
        [part, f"{count:,}", f"{count / model.parameters:.1%}"]
        for part, count in plan.parameters_by_part.items()
    ]
    rows = [
        ("shape", f"{shape.layers} layers x {shape.width}, {shape.heads} heads of "
         f"{shape.width // shape.heads}, vocabulary {shape.vocabulary:,}, {shape.positions:,} "
         "positions"),
        ("parameters", f"{model.parameters:,}"),
    ]  # fmt: skip
    if model.trained < model.parameters:
        rows.append(("trained of them", f"{model.trained:,}"))
    return rows + [("", line) for line in aligned(parts)]


def _work(plan: Plan) -> list[tuple[str | None, str]]:
    work, memory = plan.work, plan.memory
    rows = [
        ("FLOPs per token", f"{_power(work.flops_per_token)} (6 N + 12 layers x width x block)"),
        ("tokens per update", f"{work.tokens_per_update:,} = {plan.block_size:,} x "
         f"{memory.rows_per_device} row(s) x {memory.devices} device(s) x {memory.accumulation} "
         "batch(es)"),
    ]  # fmt: skip
    if work.exact_flops_per_token is not None:
        rows.insert(
            1,
            (
                "",
                f"{_power(work.exact_flops_per_token)} in matrix products, "
                f"{_power(work.exact_flops_per_token_without_head)} without the head",
            ),
        )
    if work.tokens is not None:
        rows.append(("updates, tokens", f"{work.updates:,}, {short(work.tokens)}"))
        rows.append(("FLOPs", f"{_power(work.flops)} (6 N D: {_power(work.flops_by_6nd)})"))
    if work.text_tokens is None:
        rows.append(("text", work.text_source))
    else:
        epochs = "" if work.epochs is None else f"{work.epochs:.3g} epoch(s) of "
        rows.append(("text", f"{epochs}{short(work.text_tokens)} tokens, {work.text_source}"))
    return rows


def _memory(plan: Plan) -> list[tuple[str | None, str]]:
    memory = plan.memory
    parts = [
        [part, storage(size), f"{size / memory.device_bytes:.1%}"]
        for part, size in memory.bytes_by_part.items()
        if size
    ]
    checkpointed = ", gradient checkpointing" if memory.is_checkpointed else ""
    return [
        ("how", f"{memory.precision}, {memory.topology}{checkpointed}, "
         f"{memory.rows_per_device} row(s) at once"),
        *(("", line) for line in aligned(parts)),
        ("at its most" if memory.phase else "at most",
         f"{storage(memory.peak_bytes)} of {storage(memory.device_bytes)}"
         + (f", in phase {memory.phase}: " if memory.phase else ": ")
         + ("fits" if memory.is_fitting else "DOES NOT FIT")),
        ("largest batch", f"{memory.largest_rows:,} rows (a power of two, a tenth kept free)"),
        ("launch with", memory.accelerate_config),
    ]  # fmt: skip


def _cost(plan: Plan, now: datetime.datetime) -> list[tuple[str | None, str]]:
    cost, hardware = plan.cost, plan.hardware
    total = cost.peak_flops / 1e12
    rows = [
        ("rate", f"{total:,.4g} TFLOP/s at an MFU of {cost.mfu:.1%}"
         + (" (assumed)" if hardware.device.mfu_by_size else "")),
        ("", cost.mfu_source),
    ]  # fmt: skip
    if cost.efficiency_high < 1:
        rows.append(
            ("communication", f"leaves {cost.efficiency_low:.1%} to {cost.efficiency_high:.1%} of "
             "it; the lower is counted")
        )  # fmt: skip
    rows.append(("speed", f"{cost.tokens_per_second:,.0f} tokens/s"))
    if cost.seconds is None:
        return rows
    taken = duration(cost.seconds)
    if cost.evaluation_seconds:
        taken += (
            f", of them {duration(cost.evaluation_seconds)} for {cost.evaluations:,} evaluation(s) "
            "and the final one"
        )
    rows.append(("time", taken))
    rows.append(
        (
            "",
            f"begun now it ends {finishing(cost.seconds, now)}; compiling, preparing the text and "
            "saving come on top",
        )
    )
    if cost.kwh is not None:
        rows.append(
            ("energy", f"{cost.kwh:,.3g} kWh, {cost.kg_co2:,.3g} kg CO2e (an upper estimate, as in "
             "Green Algorithms)")
        )  # fmt: skip
    if cost.price is not None:
        rows.append(("price", f"{cost.price:,.2f} for {cost.device_hours:,.4g} device-hours"))
    return rows


def _laws(plan: Plan) -> list[tuple[str | None, str]]:
    laws = plan.laws
    if laws is None:
        return [("", NO_LAWS)]
    most = math.log(plan.model.shape.vocabulary)
    here = laws.predictions["fitted again"].loss
    optima = [["best for these FLOPs", "parameters", "tokens", "per parameter", "loss"]]
    for name, best in laws.optima.items():
        optima.append([
            name, short(best.parameters), short(best.tokens), f"{best.tokens_per_parameter:.3g}",
            f"{best.loss:.3f}" if best.loss and best.loss < most else "",
        ])  # fmt: skip
    optima.append([
        "this recipe", short(plan.model.parameters), short(plan.work.tokens),
        f"{laws.tokens_per_parameter:.3g}", f"{here:.3f}" if here else "",
    ])  # fmt: skip
    rows = [
        ("tokens/parameter", f"{laws.tokens_per_parameter:.3g}: {laws.verdict}"),
        *((WHOLE, line) for line in aligned(optima)),
    ]  # fmt: skip
    # Of approach 3 the laws stand below, beside the loss that they foretell.
    rows += [
        (f"approach {name[0]}", f"{best.law} ({best.source})")
        for name, best in laws.optima.items() if best.loss is None
    ]  # fmt: skip
    rows.append(("approach 3 twice", laws.why_both))
    for name, found in laws.predictions.items():
        loss = f"{found.loss:.3f}" if found.loss else f"none below ln(vocabulary), {most:.2f}"
        rows += [
            (f"loss, {name}", f"{loss}; {found.validity}"),
            ("", f"{found.law} ({found.source})"),
        ]
    return rows + [
        ("critical batch", f"{short(laws.critical_batch_tokens)} tokens at Kaplan's loss; an "
         f"update has {short(plan.work.tokens_per_update)}"),
    ]  # fmt: skip


def _power(value: float) -> str:
    return f"{value:.3g}".replace("e+", "e")
