"""Rows as text, each token above the one that it predicts: what a model is given, to be read."""

import itertools
import json
import unicodedata
from collections.abc import Iterator

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.blocks import NO_LABEL, Rows

WIDTH = 76  # of a screen of 80, indented
LONGEST = 12  # characters of a token that are shown
TEXT_LINES = 4  # of a row
LOOKED_AT = 200  # rows, for one in which a document begins
NOTHING = "-"  # is predicted here


def as_text(rows: Rows, tokenizer: PreTrainedTokenizerBase, count: int) -> str:
    """Return the text of some rows, and some of their tokens above those that they predict.

    `||` stands where a document begins; one of the rows is the first in which one does, if that is
    among the first few, and what is around is shown.
    """
    size = min(len(rows), LOOKED_AT)
    begun = [n for n in range(size) if (rows.row(n)[1] > 0).any()]
    spread = torch.linspace(0, len(rows) - 1, min(count, len(rows))).long().tolist()
    indices = sorted(dict.fromkeys([*begun[:1], *spread][:count]))
    return "\n".join(line for index in indices for line in _row(rows, tokenizer, index))


def _row(rows: Rows, tokenizer: PreTrainedTokenizerBase, index: int) -> list[str]:
    batch, (_, starts, used) = rows.__getitems__([index]), rows.row(index)
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    begins = set(starts.tolist())
    ends = sorted({0, *begins, used})
    text = " || ".join(
        _escaped(tokenizer.decode(ids[start:end])) for start, end in itertools.pairwise(ends)
    )
    lines = [f"row {index:,}: documents in it: {len(begins - {0}) + 1}"]
    inside = [start for start in starts.tolist() if start > 0]
    if inside:  # the text around it
        place = len(_escaped(tokenizer.decode(ids[: inside[0]])))
        text = text[max(0, place - WIDTH * TEXT_LINES // 2) :]
    lines += [f"  {line}" for line in itertools.islice(_cut(text, WIDTH - 2), TEXT_LINES)]
    first = max(0, inside[0] - 4) if inside else 0
    predicted = [label for label in labels[1:]] + [NO_LABEL]
    if not inside and any(p != NO_LABEL for p in predicted):  # of an example the completion
        first = max(0, next(n for n, p in enumerate(predicted) if p != NO_LABEL) - 2)
    reads, predicts = "  token     ", "  predicts  "
    for place in range(first, used):
        cells = [_shown(tokenizer, one) for one in (ids[place], predicted[place])]
        widths = [_columns(cell) for cell in cells]
        width = max(widths) + 1
        bar = "|| " if place in begins and place > 0 else ""
        if _columns(reads) + len(bar) + width > WIDTH:
            break
        reads += bar + cells[0] + " " * (width - widths[0])
        predicts += bar + cells[1] + " " * (width - widths[1])
    return [*lines, reads.rstrip(), predicts.rstrip()]


def _shown(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    if token == NO_LABEL:
        return NOTHING
    text = json.dumps(tokenizer.decode([token]), ensure_ascii=False)
    return text if len(text) <= LONGEST + 2 else f'{text[:LONGEST]}.."'


def _columns(text: str) -> int:
    """Return how many columns a terminal takes for a text."""
    wide = sum(unicodedata.east_asian_width(sign) in "WF" for sign in text)
    return len(text) + wide - sum(bool(unicodedata.combining(sign)) for sign in text)


def _cut(text: str, columns: int) -> Iterator[str]:
    """Yield a text in lines of so many columns."""
    while text:
        size = min(len(text), columns)
        while _columns(text[:size]) > columns:
            size -= 1
        yield text[:size]
        text = text[size:]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
