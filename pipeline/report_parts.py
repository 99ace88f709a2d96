"""What is said of a run, in which order: the parts that its page and its model card have in common.

A number is put into words here and nowhere else, so that page and card cannot differ.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from pipeline.curves import Panel
from pipeline.run_record import RunRecord, file_name, without_folders
from pipeline.symptoms import SYMPTOMS, causes
from pipeline.wording import AMOUNT, NOTHING, duration, finite, short, written


class Table(NamedTuple):
    """Cells as text; the first column names the rows, an empty head is none."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def is_numeric(self, column: int) -> bool:
        """Tell whether a column of a headed table holds numbers, which stand flush right."""
        cells = [row[column] for row in self.rows]
        return bool(self.head) and all(
            c == NOTHING or c[0].isdigit() and len(c) < 40 for c in cells
        )


class Part(NamedTuple):
    """A headed part of a report, shown in the order of its fields."""

    title: str
    sentences: Sequence[str] = ()
    is_warning: bool = False
    """Whether the sentences want to be seen."""
    tables: Sequence[Table] = ()
    panels: Sequence[Panel] = ()
    texts: Sequence[tuple[str, str]] = ()
    """(label, text as it was written)."""
    code: str = ""
    """Long, shown when it is asked for."""
    notes: Sequence[str] = ()


# What is measured on held-out text, by its key: what a person calls it and how it is written.
MEASURED = {
    "bits_per_byte": ("bits per byte", ".4f"),
    "perplexity": ("perplexity", ",.2f"),
    "loss": ("loss (nats per token)", ".4f"),
    "word_perplexity": ("perplexity per word", AMOUNT),
    "accuracy": ("next token right", ".2%"),
    "mean_perplexity": ("perplexity, mean of documents", AMOUNT),
}
SPLITS = {"eval": "validation", "test": "test"}


def made_from(record: RunRecord) -> str:
    """Return one sentence: what was trained on what."""
    have, recipe, data = record.metrics, record.recipe, record.data
    size = f" with {have['parameters']:,} parameters" if "parameters" in have else ""
    base = (recipe.get("model") or {}).get("pretrained")
    origin = f"from {base}" if base else "from scratch"
    train_bytes = have.get("train_bytes") or data.get("train", {}).get("bytes", 0)
    text = f"{train_bytes:,} bytes of {source(recipe)}" if train_bytes else source(recipe)
    held_out = (
        f"; held out: {have['eval_bytes']:,} bytes ({have.get('eval_documents', '?')} document(s)) "
        f"for validation, {have.get('test_bytes', 0):,} for the test"
        if record.is_finished and "eval_bytes" in have
        else ""
    )
    return f"GPT-2{size}, {origin}, trained on {text}{held_out}"


def source(recipe: dict[str, Any]) -> str:
    """Name the training text; of a file only its name, for the report is meant to be published."""
    section = recipe.get("data") or {}
    names = []
    for one in section.get("sources") or [section]:
        files = ", ".join(file_name(file) for file in one.get("files") or [])
        names.append(one.get("name") or files or one.get("dataset") or "its text")
    return ", ".join(names)


def headlines(record: RunRecord) -> list[tuple[str, str, str]]:
    """Return (what, number, remark) of the few numbers that come first."""
    have, found = record.metrics, []
    for key in ("bits_per_byte", "perplexity", "loss", "accuracy"):
        label, form = MEASURED[key]
        if finite(have.get(f"eval_{key}")):
            between = interval(have, "eval", key)
            remark = f"95 %: {between}" if between else "validation text"
            found.append((label, format(have[f"eval_{key}"], form), remark))
    if have.get("train_tokens"):
        updates = f"{have['updates']:,} updates" if "updates" in have else ""
        found.append(("tokens trained on", short(have["train_tokens"]), updates))
    if finite(have.get("train_tokens_per_second")):
        lasted = f"{duration(record.seconds)} in all" if record.seconds is not None else "lately"
        found.append(("tokens per second", short(have["train_tokens_per_second"]), lasted))
    return found


def run_parts(record: RunRecord) -> list[Part]:
    """Return what there is to say of a run."""
    parts = [
        _accepted(record), _results(record), _tasks(record), _curves(record), _noticed(record),
        _samples(record),
        _data(record), _cost(record), _made_with(record),
        Part("Recipe", code=yaml.safe_dump(record.recipe, sort_keys=False, allow_unicode=True)),
    ]  # fmt: skip
    return [part for part in parts if part is not None]


def state_sentence(record: RunRecord) -> str | None:
    """Return what an unfinished run is about, None for a finished one."""
    if record.is_finished:
        return None
    of = (record.recipe.get("training") or {}).get("max_steps")
    goal = f" of {of:,}" if isinstance(of, int) and of > 0 else ""
    why = f" ({record.why})" if record.why else ""
    return (
        f"This run is not finished: {record.state}{why}. What follows is known from its newest "
        f"checkpoint, after update {record.metrics['updates']:,}{goal}."
    )


def _accepted(record: RunRecord) -> Part | None:
    found = record.metrics.get("preflight_accepted") or {}
    sentences = [f"{name}: {said}." for name, said in found.items()]
    first = "Before the first update this failed, and the recipe accepts it (preflight.accept):"
    return Part("Accepted", [first, *sentences], is_warning=True) if found else None


def _results(record: RunRecord) -> Part | None:
    have = record.metrics
    splits = {prefix: name for prefix, name in SPLITS.items() if f"{prefix}_loss" in have}
    if not splits:
        return None
    rows = []
    for key, (label, form) in MEASURED.items():
        cells = []
        for prefix in splits:
            value, between = have.get(f"{prefix}_{key}"), interval(have, prefix, key)
            cells.append(written(value, form) + (f" ({between})" if between else ""))
        if set(cells) != {NOTHING}:
            rows.append([label, *cells])
    for key in ("documents", "tokens", "bytes"):
        cells = [written(have.get(f"{prefix}_{key}"), ",") for prefix in splits]
        if set(cells) != {NOTHING}:
            rows.append([f"{key} measured", *cells])
    notes = []
    of_examples = "predicted_tokens" in record.data.get("validation", {})
    if record.is_finished:
        notes = [
            "Measured on the saved weights, read back, in fp32, every token of the held-out "
            + ("completions" if of_examples else "text after the first")
            + " predicted once. Bits per byte can be compared between tokenizers, perplexity and "
            "loss per token cannot."
        ]
    known = [
        have[f"{p}_confidence_intervals"] for p in splits if f"{p}_confidence_intervals" in have
    ]
    if any(ends is not None for found in known for ends in found.values()):
        few = min(have.get(f"{prefix}_documents", 0) for prefix in splits) < 20
        notes.append(
            "In brackets: 95 % intervals for other documents like these (by a bootstrap over the "
            "documents), not for another seed"
            + ("; with fewer than 20 documents they are too narrow." if few else ".")
        )
    for prefix, name in splits.items():
        if have.get(f"{prefix}_documents") == 1 and f"{prefix}_confidence_intervals" in have:
            notes.append(f"The {name} text is one document: no interval.")
    return Part(
        "Results on held-out text", tables=[Table(["", *splits.values()], rows)], notes=notes
    )


def _tasks(record: RunRecord) -> Part | None:
    rows = []
    for task, found in (record.metrics.get("tasks") or {}).items():
        for name, value in found.items():
            if name == "samples" or name.endswith("_stderr"):
                continue
            error = found.get(f"{name}_stderr")
            beside = f" \N{PLUS-MINUS SIGN} {error:.2g}" if finite(error) else ""
            documents = written(found.get("samples"), ",")
            rows.append([task, name, written(value, ".4g") + beside, documents])
    notes = ["Beside a value: its standard error."]
    head = ["task", "metric", "value", "documents"]
    return Part("Tasks", tables=[Table(head, rows)], notes=notes) if rows else None


def _curves(record: RunRecord) -> Part:
    drawn = record.panels
    sentences = [record.verdict.sentence]
    if not drawn:
        sentences.append("There are no logs in this folder, and so no curves.")
    scored = (record.recipe.get("evaluation") or {}).get("tokens")
    notes = [f"While training, at most {scored:,} held-out tokens are scored."] if scored else []
    if any(panel.title == "Bits per byte" for panel in drawn):
        notes.append(
            "Bits per byte while training take the training text's bytes per token as a whole: "
            "compare the loss, not these, with held-out text."
        )
    is_warning = record.verdict.kind in ("overfitting", "unstable")
    return Part("Curves", sentences, is_warning, panels=drawn, notes=notes)


def _noticed(record: RunRecord) -> Part | None:
    """Say what `notices` has kept in the logs; a run that was well has nothing to say."""
    found = [log for log in record.history if "notice" in log]
    if not found:
        return None
    rows = [[f"{log['update']:,}", without_folders(str(log["seen"]))] for log in found]
    known = dict.fromkeys(log["notice"] for log in found if log["notice"] in SYMPTOMS)
    notes = [f"Likely causes of {SYMPTOMS[n].title}, in this order: {causes(n)}." for n in known]
    return Part("What was noticed", tables=[Table(["update", "what"], rows)], notes=notes)


def _samples(record: RunRecord) -> Part | None:
    texts = [(f"update {update:,}", text) for update, text in record.samples]
    if not texts and record.metrics.get("sample"):
        texts = [("the saved model", record.metrics["sample"])]
    return Part("What it wrote", texts=texts) if texts else None


def _data(record: RunRecord) -> Part:
    facts, have = record.data, record.metrics
    counts = ("documents", "bytes", "tokens")
    splits = [
        [name, *(written(facts[name].get(count), ",") for count in counts)]
        for name in ("train", *SPLITS.values())
        if facts.get(name, {}).get("tokens")
    ]
    sources = [
        [one["name"], *(written(one.get(count), ",") for count in counts)]
        for one in facts.get("sources", [])
        if one.get("tokens")  # a stream's are read as they come, and not counted beforehand
    ]
    prints = [
        [label, digest]
        for label, digest in (
            ("prepared rows", have.get("data_fingerprint")),
            ("tokenizer", have.get("tokenizer_fingerprint")),
            *((f"{name} rows", d) for name, d in facts.get("held_out_rows", {}).items()),
        )
        if digest
    ]
    tables = [
        Table(head, rows)
        for head, rows in (
            (["split", *counts], splits),
            (["source, all splits", *counts], sources),
            (["sha256 of", "fingerprint"], prints),
        )
        if rows
    ]
    gone = [] if facts else ["The prepared rows are not where the run had them, nor their counts."]
    is_stream = (record.recipe.get("data") or {}).get("streaming")
    streamed = ["The training text was streamed; of it only a sample was counted."]
    return Part("Data", sentences=[*gone, *(streamed if is_stream else [])], tables=tables)


def _cost(record: RunRecord) -> Part | None:
    have, found = record.metrics, record.footprint
    if record.seconds is None:
        return None
    rows = [["time", duration(record.seconds)]]
    parts = (("compile", "the first update, with compilation"), ("evaluation", "evaluations"),
             ("measuring", "the final numbers"))  # fmt: skip
    for key, label in parts:
        if finite(have.get(f"{key}_seconds")):
            rows.append([f"of it {label}", duration(have[f"{key}_seconds"])])
    rows.append(["tokens", f"{have['train_tokens']:,}"])
    rows.append(["speed of the updates", f"{have['train_tokens_per_second']:,.0f} tokens/s"])
    if record.flops is not None:
        rows.append(["floating-point operations", f"{record.flops:.3g}"])
    if finite(have.get("mfu")):
        rows.append(["of the devices' matrix-product rate", f"{have['mfu']:.0%}"])
    if finite(have.get("peak_memory_bytes")):
        rows.append(
            ["memory at its peak, each process", f"{have['peak_memory_bytes'] / 1e9:.2f} GB"]
        )
    notes = ["Operations: 6 x parameters + 12 x layers x width x block for each token."]
    if found is not None:
        rows.append(["energy (estimate)", f"{found.kwh * 1000:,.3g} Wh"])
        rows.append(["CO2 (estimate)", f"{found.grams_co2:,.3g} g CO2e"])
        notes.append(f"Energy and CO2 are {found.assumption}.")
    return Part("Cost", tables=[Table([], rows)], notes=notes)


def _made_with(record: RunRecord) -> Part | None:
    have = record.metrics
    hardware = have.get("hardware") or {}
    rows = [
        ("device", have.get("device")),
        ("processor", hardware.get("processor")),
        ("cores of the machine", hardware.get("cores")),
        ("memory of the machine", f"{hardware['memory_bytes'] / 1e9:.0f} GB"
         if finite(hardware.get("memory_bytes")) else None),
        ("system", hardware.get("system")),
        ("processes", have.get("world_size")),
        ("threads of each", have.get("threads")),
        ("precision", have.get("precision")),
        ("git commit", have.get("git_commit")),
        *(have.get("versions") or {}).items(),
    ]  # fmt: skip
    known = [[name, str(value)] for name, value in rows if value is not None]
    return Part("Made with", tables=[Table([], known)]) if known else None


def interval(have: dict[str, Any], prefix: str, key: str) -> str:
    """Return the 95 % interval of a held-out number in words, empty where there is none."""
    between = (have.get(f"{prefix}_confidence_intervals") or {}).get(key)
    if not between or not all(map(finite, between)):
        return ""
    form = MEASURED[key][1]
    return f"{written(between[0], form)} to {written(between[1], form)}"
