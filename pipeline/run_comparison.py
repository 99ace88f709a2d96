"""Several runs side by side: numbers, curves, recipes, and which numbers may be compared."""

from typing import Any

from pipeline.curves import overlaid
from pipeline.report_parts import (
    MEASURED,
    SPLITS,
    Part,
    Table,
    interval,
    made_from,
    state_sentence,
)
from pipeline.run_record import RunRecord
from pipeline.wording import NOTHING, duration, finite, written

BEST, APART = "\N{BLACK STAR}", "\N{NOT EQUAL TO}"
HIGHER_IS_BETTER = ("accuracy",)
NOT_PER_TOKEN = ("bits_per_byte", "word_perplexity")  # so that tokenizers may differ


def comparison_parts(records: list[RunRecord]) -> list[Part]:
    """Return what there is to say of several runs, whose names differ."""
    names = [record.name for record in records]
    marks = (
        f"{BEST} the best; {APART} its 95 % interval, by a bootstrap over documents, does not "
        "overlap with the best one's. Nothing is marked that cannot be compared."
    )
    results = Table(["", *names], _results(records))
    curves = overlaid({record.name: record.panels for record in records})
    verdicts = [f"{r.name}: {r.verdict.sentence}" for r in records]
    origins = [f"{r.name}: {made_from(r)}." for r in records]
    differences = _differences(records)
    return [
        Part("Results on held-out text", tables=[results], notes=[marks]),
        Part("Curves", verdicts, panels=curves,
             notes=["Where a panel has curves of several kinds, held-out is the solid one."]),
        Part("Cost", tables=[Table(["", *names], _costs(records))]),
        Part("What differs", origins,
             tables=[Table(["key", *names], differences)] if differences else [],
             notes=[f"{NOTHING} not stated: the default." if differences else
                    "Recipes, data, versions and commits are the same."]),
    ]  # fmt: skip


def comparable(records: list[RunRecord], prefix: str) -> str:
    """Return what of a held-out split's numbers can be compared.

    all: it is the same rows; text: the same text in other tokens; none: another text; unknown: a
    run's rows are gone.
    """
    split = SPLITS[prefix]
    rows = {record.data.get("held_out_rows", {}).get(split) for record in records}
    # Another text with the same number of documents and bytes would be a rare accident.
    sizes = {
        (record.data.get(split, {}).get("documents"), record.data.get(split, {}).get("bytes"))
        for record in records
    }
    if None in rows:
        return "unknown"
    if len(rows) == 1:
        return "all"
    return "text" if len(sizes) == 1 else "none"


def warnings(records: list[RunRecord]) -> list[str]:
    """Return what a reader has to know first: what cannot be compared, what is not finished."""
    sentences = {
        "text": "The {} text is the same in all runs, its tokens are not (another tokenizer or "
        "block): of its numbers only bits per byte and perplexity per word can be compared.",
        "none": "The {} text differs between the runs: its numbers cannot be compared, and bits "
        "per byte only as far as the texts are alike.",
        "unknown": "The prepared rows of a run are gone, so that nobody knows whether the {} text "
        "is the same in all: compare its numbers with care.",
    }
    states = [f"{r.name}: {said}" for r in records if (said := state_sentence(r))]
    return states + [
        sentences[kind].format(split)
        for prefix, split in SPLITS.items()
        if any(f"{prefix}_loss" in record.metrics for record in records)
        and (kind := comparable(records, prefix)) in sentences
    ]


def _results(records: list[RunRecord]) -> list[list[str]]:
    rows = []
    for prefix, split in SPLITS.items():
        kind = comparable(records, prefix)
        for key, (label, form) in MEASURED.items():
            values = [record.metrics.get(f"{prefix}_{key}") for record in records]
            if not any(map(finite, values)):
                continue
            is_marked = kind == "all" or kind == "text" and key in NOT_PER_TOKEN
            marks = _marks(records, prefix, key) if is_marked else [""] * len(records)
            betweens = [interval(record.metrics, prefix, key) for record in records]
            cells = [
                written(value, form) + f" {mark}" * bool(mark) + f" ({between})" * bool(between)
                for value, mark, between in zip(values, marks, betweens, strict=True)
            ]
            rows.append([f"{split}: {label}", *cells])
    return rows


def _marks(records: list[RunRecord], prefix: str, key: str) -> list[str]:
    """Return of each run whether it is the best, and whether it is surely not."""
    values = [record.metrics.get(f"{prefix}_{key}") for record in records]
    # An unfinished run has measured a part of the text only.
    measured = {record.metrics.get(f"{prefix}_bytes") for record in records}
    if len(measured) > 1 or not all(map(finite, values)):
        return [""] * len(records)
    pick = max if key in HIGHER_IS_BETTER else min
    best = pick(values)
    known = [
        (record.metrics.get(f"{prefix}_confidence_intervals") or {}).get(key) for record in records
    ]
    of_best = known[values.index(best)]

    def mark(value: Any, between: list[float] | None) -> str:
        if value == best:
            return BEST
        apart = between and of_best and (between[0] > of_best[1] or between[1] < of_best[0])
        return APART if apart else ""

    return [mark(value, between) for value, between in zip(values, known, strict=True)]


def _costs(records: list[RunRecord]) -> list[list[str]]:
    have, prints = [record.metrics for record in records], [r.footprint for r in records]
    rows = [
        [label, *(written(one.get(key), form) for one in have)]
        for label, key, form in (
            ("parameters", "parameters", ","),
            ("updates", "updates", ","),
            ("tokens trained on", "train_tokens", ","),
            ("tokens per second", "train_tokens_per_second", ",.0f"),
        )
    ]
    times = (NOTHING if r.seconds is None else duration(r.seconds) for r in records)
    return [
        *rows,
        ["time", *times],
        ["floating-point operations", *(written(r.flops, ".3g") for r in records)],
        ["device", *(one.get("device", NOTHING) for one in have)],
        ["energy (estimate), Wh", *(f"{p.kwh * 1000:,.3g}" if p else NOTHING for p in prints)],
        ["CO2e (estimate), g", *(f"{p.grams_co2:,.3g}" if p else NOTHING for p in prints)],
    ]


def _differences(records: list[RunRecord]) -> list[list[str]]:
    """Return the keys of recipe, versions and data in which the runs differ, with values."""
    flat = []
    for record in records:
        have = record.metrics
        origin = {key: have.get(key) for key in ("versions", "git_commit", "data_fingerprint")}
        flat.append(_flat(record.recipe | origin))
    keys = dict.fromkeys(key for one in flat for key in one)
    return [
        [key, *(_value(one.get(key)) for one in flat)]
        for key in keys
        if len({str(one.get(key)) for one in flat}) > 1
    ]


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return NOTHING if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        is_section = isinstance(value, dict) and value
        found |= _flat(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
    return found
