"""What a model's tensors are: shapes, types, means, deviations, and whether all is finite."""

import fnmatch
import math
import re
from typing import Any, NamedTuple

import torch

from pipeline.recipe import InputError
from pipeline.weights import MASK, OPTIMIZER, Kind, Weights, open_weights

HEAD = re.compile(r"(.*\.)?lm_head\.weight")
EMBEDDING = re.compile(r"(.*\.)?(wte|embed_tokens|embed_in)\.weight")
VALUES_AT_ONCE = 1 << 20  # sums are taken in fp64, and of so many at a time: 8 MB


class Row(NamedTuple):
    """One tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    mean: float
    """Of the finite values; NaN if there are none."""
    std: float
    """Of all the values there are: divided by their number, not by one less."""
    not_finite: dict[str, int]
    """How many are nan and inf, those that occur."""
    remark: str
    """Why it is no parameter, or not one of its own; empty for a parameter."""

    @property
    def parameters(self) -> int:
        """How many values it has."""
        return torch.Size(self.shape).numel()


class Table(NamedTuple):
    """The tensors of one source."""

    model: str
    kind: Kind
    rows: list[Row]
    left_out: int
    """Tensors that no --match took."""
    note: str
    """What is not in the source and yet part of the model; may be empty."""

    @property
    def parameters(self) -> int:
        """Values of all rows that are parameters, tied ones counted once."""
        return sum(row.parameters for row in self.rows if not row.remark)


def look(model: str, *, match: str | None = None) -> Table:
    """Read the tensors of a source one by one.

    Args:
        match: only those whose name this pattern (`*.attn.*`) takes.

    Raises:
        InputError: see `open_weights`; or there is no such name.
    """
    weights = open_weights(model)
    names = [n for n in weights.tensors if match is None or fnmatch.fnmatchcase(n, match)]
    if not names:
        some = ", ".join(list(weights.tensors)[:3])
        raise InputError(f"--match {match}: no tensor of {model} has such a name; it has {some}")
    rows = [_row(name, weights.tensors[name]()) for name in names]
    rows = [row._replace(remark=_tied_to(row, rows, weights)) if not row.remark else row
            for row in rows]  # fmt: skip
    left_out = len(weights.tensors) - len(names)
    return Table(model, weights.kind, rows, left_out, _note(weights))


def as_text(table: Table) -> str:
    """Return the table with aligned columns, the total below it."""
    cells = [("name", "shape", "parameters", "dtype", "mean", "std", "")]
    for row in table.rows:
        counted = f"{row.parameters:,}" if not row.remark else "-"
        wrong = [f"{count:,} {what}" for what, count in row.not_finite.items()]
        said = "; ".join([*(["NOT FINITE: " + ", ".join(wrong)] if wrong else []), row.remark])
        numbers = (_number(row.mean, "+.3e"), _number(row.std, ".3e"))
        cells.append(
            (row.name, _spelled(row.shape), counted, row.dtype, *numbers, said.strip("; "))
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = "<>><>><"  # names and words to the left, numbers to the right
    lines = [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)
        )
        for line in cells
    ]
    return "\n".join(line.rstrip() for line in [*lines, *_total(table)])


def as_dict(table: Table) -> dict[str, Any]:
    """Return the table as plain JSON types."""
    return {
        "model": table.model,
        "kind": str(table.kind),
        "parameters": table.parameters,
        "note": table.note,
        "tensors": [
            {**row._asdict(), "shape": list(row.shape), "parameters": row.parameters}
            for row in table.rows
        ],
    }


def _total(table: Table) -> list[str]:
    of_all = f" of {len(table.rows) + table.left_out}" if table.left_out else ""
    lines = [
        f"{table.model} ({table.kind}): {table.parameters:,} parameters in "
        f"{len(table.rows)}{of_all} tensors"
    ]
    lines += [table.note] * (table.note != "")
    if wrong := sum(bool(row.not_finite) for row in table.rows):
        lines.append(f"{wrong} of them not finite")
    return lines


def _row(name: str, tensor: torch.Tensor) -> Row:
    mean, std, not_finite = _moments(tensor)
    remark = ""
    if MASK.fullmatch(name) and tensor.dim() != 1:
        remark = "a causal mask, no parameter"
    elif OPTIMIZER.fullmatch(name):
        remark = "an optimizer's, no parameter"
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Row(name, tuple(tensor.shape), dtype, mean, std, not_finite, remark)


def _moments(tensor: torch.Tensor) -> tuple[float, float, dict[str, int]]:
    """Return mean and standard deviation of the finite values, and how many are not."""
    parts = tensor.reshape(-1).split(VALUES_AT_ONCE)
    nan = count = 0
    total = square = 0.0
    for part in parts:
        nan += int(part.double().isnan().sum())
        values = _finite(part)
        count += len(values)
        total += values.sum().item()
    mean = total / count if count else float("nan")
    for part in parts:
        square += (_finite(part) - mean).square().sum().item()
    std = (square / count) ** 0.5 if count else float("nan")
    numbers = {"nan": nan, "inf": tensor.numel() - count - nan}
    return mean, std, {name: number for name, number in numbers.items() if number}


def _finite(part: torch.Tensor) -> torch.Tensor:
    values = part.double()
    return values[values.isfinite()]


def _tied_to(row: Row, rows: list[Row], weights: Weights) -> str:
    """Say which embedding the output layer is, if it is one."""
    if not HEAD.fullmatch(row.name):
        return ""
    for other in rows:
        alike = EMBEDDING.fullmatch(other.name) and other.shape == row.shape
        if alike and torch.equal(weights.tensors[row.name](), weights.tensors[other.name]()):
            return f"tied: is {other.name}, counted once"
    return ""


def _note(weights: Weights) -> str:
    """Say where the output layer is if there is none among the tensors."""
    embedding = next((name for name in weights.tensors if EMBEDDING.fullmatch(name)), None)
    if weights.kind == Kind.TENSORFLOW:
        return "the output layer is tied: model/wte, counted once"
    if any(HEAD.fullmatch(name) for name in weights.tensors) or embedding is None:
        return ""
    is_gpt2 = weights.settings.get("model_type") == "gpt2"
    if weights.settings.get("tie_word_embeddings", is_gpt2):
        return f"the output layer is tied: {embedding}, counted once"
    return ""


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _spelled(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"
