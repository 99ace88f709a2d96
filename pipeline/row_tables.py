"""What prepared rows hold: tables for a person, rows as text, and whether it is enough."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import artifact, marks
from pipeline.corpus import SPLITS
from pipeline.data_sections import DataSection
from pipeline.packing import mixture
from pipeline.recipe import InputError
from pipeline.row_file import RowFile
from pipeline.tokenizer import FolderTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What is counted of each source besides its documents, bytes, tokens and rows.
COUNTED = ("empty", "short", "long", "copies", "dropped", "cut")


def describe(folder: Path, section: DataSection) -> str:
    """Return tables of what the splits hold, where it came from, and what was left out."""
    facts = artifact.read_manifest(folder)["facts"]
    lines = [_line("split", "documents", "bytes", "tokens", "rows", "left out")]
    for split in SPLITS:
        f = facts[split]
        lines.append(
            _line(split, f["documents"], f["bytes"], f["tokens"], f["rows"], f["left_out"])
        )
    if section.streaming:
        return "\n".join(lines[:1] + lines[2:])
    train = facts["train"]
    if section.example_format is not None:
        found = {n: sum(facts[split][n] for split in SPLITS) for n in ("shortened", "too_long")}
        lines.append(
            f"{section.example_format}: {train['predicted_tokens']:,} of the training tokens are "
            f"predicted; {train['padding']:.2%} of the room in the rows is padding; of examples "
            f"longer than a row {found['shortened']:,} lost their beginning, {found['too_long']:,} "
            "whose completion does not fit are left out"
        )
    elif section.packing == "best_fit":
        lines.append(
            f"best_fit: {train['padding']:.2%} of the room in the rows is padding, "
            f"{train['truncation']:.2%} of the documents are longer than a row and cut"
        )
    sources = facts["sources"]
    shares = mixture([source["rows"] for source in sources], section)
    total = max(1, sum(taken for _, _, taken in shares))
    lines += ["", _line("source", "documents", "bytes", "tokens", "copies", "dropped", "B/token")]
    lines[-1] += f"{'share':>8}"
    for number, source in enumerate(sources):
        dropped = sum(source[name] for name in ("empty", "short", "long", "dropped"))
        ratio = source["bytes"] / max(1, source["tokens"] - source["documents"])
        row = _line(
            source["name"], source["documents"], source["bytes"], source["tokens"],
            source["copies"], dropped, f"{ratio:.3f}",
        )  # fmt: skip
        held_out = number >= len(shares)
        lines.append(row + ("" if held_out else f"{shares[number][2] / total:>8.1%}"))
    counted = {n: f"{sum(s[n] for s in sources):,}" for n in COUNTED}
    lines.append(
        f"dropped: {counted['empty']} empty, {counted['short']} short, {counted['long']} long, "
        f"{counted['dropped']} for text that is held out; cut for such text: {counted['cut']}"
    )
    return "\n".join(lines + _used_up(facts, section))


def show(folder: Path, tokenizer: PreTrainedTokenizerBase | FolderTokenizer, count: int) -> str:
    """Return `count` rows, spread evenly, as text with their documents set apart.

    They are training rows; of a stream, which has none yet, validation rows.
    """
    manifest, lines = artifact.read_manifest(folder), []
    facts, data = manifest["facts"], manifest["made_from"]["data"]
    is_cut, of_examples = data["packing"] == "best_fit", "format" in data
    rows = RowFile.open(folder / f"{'train' if facts['train']['rows'] else 'validation'}.arrow")
    for index in np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int).tolist():
        documents, begins = rows.documents_of(index), rows.row(index)[1][:1].tolist() == [0]
        used = sum(len(document) for document in documents)
        filled = f", {rows.block_size - used} filled up" if used < rows.block_size else ""
        lines.append(f"--- row {index:,}: {len(documents)} document(s){filled}")
        for number, document in enumerate(documents):
            if of_examples:
                shown = "[an example] "
                for place, part in enumerate(marks.runs(document)):
                    shown += "[predicted]" if place % 2 else "[given]"
                    shown += tokenizer.decode(marks.bare(part))
                lines.append(shown)
                continue
            mark = "[a document begins]" if number or begins else "[a document goes on]"
            # Where long documents are cut, their parts are placed like documents.
            lines.append("[a document, or a part of a long one]" if is_cut else mark)
            lines.append(tokenizer.decode(document))
    return "\n".join(lines)


def check_enough(facts: dict[str, Any], section: DataSection) -> None:
    """See that there are rows to train on and to validate with.

    Raises:
        InputError: there are none.
    """
    train = facts["train"]
    if not train["rows"] and train.get("too_long"):
        raise InputError(
            f"no completion fits into a row of {section.block_size} tokens with a token before it: "
            f"all {train['too_long']:,} training examples are left out; set a larger "
            "data.block_size"
        )
    if not train["rows"]:
        counts = (source[name] for source in facts["sources"] for name in COUNTED[1:-1])
        left_out = sum(counts)
        cleaned = f" ({left_out:,} documents were left out by cleaning)" if left_out else ""
        raise InputError(
            f"the training text has {train['tokens']} tokens{cleaned} and a row needs "
            f"{section.block_size}: give more text in data.files or a smaller data.block_size"
        )
    check_held_out(facts, section)
    check_mixture(facts, section)


def check_mixture(facts: dict[str, Any], section: DataSection) -> None:
    """See that the sources with a weight hold a row.

    Raises:
        InputError: they do not.
    """
    shares = mixture([source["rows"] for source in facts["sources"]], section)
    if not sum(taken for _, _, taken in shares):
        raise InputError(
            "the mixture is empty: the sources that have a weight above 0 hold less than a row "
            f"of {section.block_size} tokens; check data.sources"
        )


def check_held_out(facts: dict[str, Any], section: DataSection) -> None:
    """See that there are rows to validate with.

    Raises:
        InputError: there are none.
    """
    if not facts["validation"]["rows"] and section.example_format is not None:
        raise InputError(
            f"no example is held out for validation ({facts['train']['documents']} are left for "
            f"training, data.validation_fraction {section.validation_fraction}): raise the "
            "fraction, give more examples, or data.validation_files"
        )
    if not facts["validation"]["rows"]:
        raise InputError(
            f"no text is held out for validation ({facts['train']['documents']} documents, "
            f"data.validation_fraction {section.validation_fraction}): raise the fraction, give "
            "more documents, or set data.hold_out to tail"
        )


def _used_up(facts: dict[str, Any], section: DataSection) -> list[str]:
    """Say which source ran out before its share."""
    if not section.is_weighted:
        return []
    weights = [source.weight for source in section.all_sources]
    taken = mixture([source["rows"] for source in facts["sources"]], section)
    total = max(1, sum(t for _, _, t in taken))
    lines = [
        f"mixture: {total:,} of the {facts['train']['rows']:,} rows, "
        f"{total * section.block_size:,} tokens"
    ]
    for number, (_, available, used) in enumerate(taken):
        name, wanted = facts["sources"][number]["name"], weights[number]
        if section.mixture_tokens is not None:
            asked = wanted * section.mixture_tokens
            if used * section.block_size < asked - section.block_size:
                lines.append(
                    f"{name} ran out: {used * section.block_size:,} tokens of the "
                    f"{asked:,.0f} that its weight {wanted:g} asks for ({used / total:.1%} of all)"
                )
        elif used < available:
            lines.append(f"{name}: {1 - used / available:.1%} is left out to keep the weights")
        elif wanted:
            lines.append(
                f"{name} is used up: it limits the mixture; data.mixture_tokens lifts that"
            )
    return lines


def _line(name: str, *values: Any) -> str:
    name = name if len(name) < 24 else f"...{name[-20:]}"
    return f"{name:<24}" + "".join(
        f"{value:>14,}" if isinstance(value, int) else f"{value:>14}" for value in values
    )
