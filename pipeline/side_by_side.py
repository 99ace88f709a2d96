"""Models on the same text, side by side: their numbers, the table that is shown, what is kept."""

import contextlib
import functools
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline import artifact
from pipeline.adaptation import is_adapter
from pipeline.blocks import Rows
from pipeline.data_sections import SourceFields, SourceSection
from pipeline.held_out import held_out_ids, held_out_texts
from pipeline.marks import decoded
from pipeline.measuring import loaded, measure_texts
from pipeline.options import MeasureOptions
from pipeline.perplexity import MEASURES
from pipeline.processes import Processes
from pipeline.reach import check_local
from pipeline.recipe import InputError, read_recipe
from pipeline.run_files import CONFIG
from pipeline.sources import documents_of
from pipeline.tasks import check_tasks, run_tasks
from pipeline.tokenizer import load_tokenizer, tokenizer_fingerprint

# What tells something of another model whatever its tokenizer; the others are per token.
COMPARABLE = ("bits_per_byte", "word_perplexity", "last_word_accuracy")
LOWER_IS_BETTER = {name: "accuracy" not in name for name in (*MEASURES, "last_word_accuracy")}
# Below, resampled documents are too much alike: of 20 samples the 95 % interval holds the mean 93 %
# of the time, of 10 samples 90 %, of 5 samples 84 % (simulated, normal values).
FEW_DOCUMENTS = 20
COUNTS = ("tokens", "bytes", "words", "documents", "nothing_to_predict", "truncated")
# Options of the door that are those of `measure_texts`, under the same names.
PASSED_ON = (
    "block_size", "stride", "batch_size", "add_start_token", "add_end_token", "packed",
    "max_length", "target", "detokenize",
)  # fmt: skip


def compare(options: MeasureOptions, processes: Processes) -> dict[str, Any]:
    """Return the numbers of every model that is named, and of what text they are.

    Raises:
        InputError: a text, model or task cannot be had, or options contradict each other.
    """
    for name in options.model:
        if not (Path(name).exists() and is_adapter(name)):
            check_local(name, "model", "config.json")
    processes.told(lambda: check_tasks(options.tasks), patiently=True)
    settings = {name: getattr(options, name) for name in PASSED_ON}
    joined = options.joined
    if joined is None:  # as in training, unless something is asked that joined texts cannot have
        alone = ("add_start_token", "add_end_token", "packed", "max_length")
        asked = any(getattr(options, name) not in (None, False) for name in alone)
        asked = asked or options.add_start_token is not None
        joined = options.target == "all" and not asked
    found: dict[str, Any] = {"models": {}}
    for name in options.model:
        model, tokenizer = loaded(name)
        numbers: dict[str, Any] = {}
        if options.has_text:
            text = Text(options, tokenizer)
            how = {"joined": joined, **settings}
            if text.format != "text":
                if "target" in options.model_fields_set:
                    raise InputError("--target: of examples the completion is scored; leave it out")
                how |= {"joined": bool(options.joined), "target": "completion"}
            measured = measure_texts(
                text.documents(), model, tokenizer, processes=processes, bytes_to_read=text.size,
                **how,
            )  # fmt: skip
            numbers = measured.numbers()
            found["text"] = text.identity() | {"joined": how["joined"]}
            if text.format == "text":  # of examples the same tokens are scored in any case
                numbers["attend_across"] = getattr(model.config, "attend_across", True)
        numbers["tokenizer_fingerprint"] = tokenizer_fingerprint(tokenizer)
        if options.tasks:
            run = functools.partial(
                run_tasks, model, tokenizer, options.tasks, batch_size=options.batch_size,
                limit=options.tasks_limit,
            )  # fmt: skip
            numbers["tasks"] = processes.told(run, patiently=True)
        found["models"][name] = numbers
    stated = options.model_dump(mode="json", exclude_unset=True, exclude={"model", "json_"})
    return found | {
        "options": stated, "versions": artifact.versions(), "git_commit": artifact.git_commit(),
    }  # fmt: skip


class Text:
    """The text that the options name, to be read once, with its fingerprint.

    Attributes:
        size: bytes of its files, None where that is not known.
        format: as `data.format` says.
    """

    def __init__(self, options: MeasureOptions, tokenizer: PreTrainedTokenizerBase) -> None:
        """Find the text; examples that a run encoded with this very tokenizer keep their ids."""
        self._digest, self._count = hashlib.sha256(), 0
        self.size: int | None = None
        if options.held_out is not None:
            run, split = Path(options.held_out), options.split
            self.name = f"{run} ({split})"
            self.size, self.format, self._documents = _held_out(run, split, tokenizer)
            return
        source = SourceSection(**{n: getattr(options, n) for n in SourceSection.model_fields
                                  if n not in ("name", "weight")})  # fmt: skip
        size, found = documents_of(source)
        self.size, self.format = size or None, source.format
        self.name = ", ".join(source.files or [f"{source.dataset} ({source.dataset_split})"])
        self._documents = (document.read() for document in found)

    def documents(self) -> Iterator[Iterator[str]]:
        """Yield each document in pieces."""
        for number, document in enumerate(self._documents):
            self._digest.update(f"\0{number}\0".encode())
            self._count += 1
            yield self._told(document)

    def identity(self) -> dict[str, Any]:
        """Return what was read: name, documents and a sha256 over their text."""
        digest = self._digest.hexdigest()
        found = {"source": self.name, "documents": self._count, "fingerprint": digest}
        return found if self.format == "text" else found | {"format": self.format}

    def _told(self, pieces: Iterator[str]) -> Iterator[str]:
        for piece in pieces:
            self._digest.update(piece.encode())
            yield piece


def table(found: dict[str, Any]) -> str:
    """Return the numbers as a person reads them, one column for each model."""
    models: dict[str, dict[str, Any]] = found["models"]
    lines, notes = [], []
    if "text" in found:
        text = found["text"]
        how = "laid end to end, as in training" if text["joined"] else "each by itself"
        if "format" in text:
            how = "each by itself, of which the completion is scored"
        lines.append(f"{text['source']}: {text['documents']:,} document(s), {how}")
    shown = {_short(name, models): _cells(name, models) for name in models}
    rows = list(dict.fromkeys(row for cells in shown.values() for row in cells))
    beside = max(map(len, rows)) + 2
    widths = {
        name: max(len(name) + 2, *(len(cells.get(row, "-")) + 2 for row in rows))
        for name, cells in shown.items()
    }
    if len(models) > 1:
        lines.append(" " * beside + "".join(f"{name:>{widths[name]}}" for name in shown))
    for row in rows:
        cells = (f"{cells.get(row, '-'):>{widths[name]}}" for name, cells in shown.items())
        lines.append(f"{row:<{beside}}{''.join(cells)}")
    intervals = [numbers.get("confidence_intervals") or {} for numbers in models.values()]
    if "text" in found and any(ends for each in intervals for ends in each.values()):
        notes.append("in brackets: 95 % intervals, by bootstrap over the documents")
        if min(numbers["documents"] for numbers in models.values()) < FEW_DOCUMENTS:
            notes.append(f"with fewer than {FEW_DOCUMENTS} documents they are too narrow")
    elif "text" in found:
        notes.append("one document: no interval (it says nothing of others)")
    if len(models) > 1 and "text" in found:
        known = any(ends for each in intervals for ends in each.values())
        notes.append("* best" + "; < its interval does not overlap with the best one's" * known)
        if not _same_tokenizer(models):
            notes.append(
                "the tokenizers differ: what is per token cannot be compared, bits per byte and "
                "word perplexity can"
            )
        if not _same_boundaries(models):
            notes.append(
                "the models were trained differently where texts meet (attend_across) and are "
                "scored so, over other tokens: nothing is marked"
            )
    return "\n".join([*lines, *(f"({note})" for note in notes)])


def _held_out(
    run: Path, split: str, for_tokenizer: PreTrainedTokenizerBase
) -> tuple[int, str, Iterator[Iterator[str]]]:
    """Return the bytes, format and documents of a run's held-out text, out of its rows.

    Examples that were cut to a row are encoded again with another tokenizer only.
    """
    if not (run / CONFIG).exists():
        raise InputError(f"--held_out {run}: no run of ours ({CONFIG} is missing)")
    folder = run / "blocks"
    if artifact.read_manifest(folder) is None:
        folder = read_recipe(run / CONFIG).blocks_dir
    if (damage := artifact.damage(folder, contents=False)) is not None:
        raise InputError(f"--held_out {run}: its prepared rows are not whole: {damage}")
    manifest, tokenizer = artifact.read_manifest(folder), load_tokenizer(str(run))
    if manifest["made_from"]["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise InputError(
            f"--held_out {run}: the rows in {folder} are another run's: they were made with "
            "another tokenizer"
        )
    if not manifest["facts"][split]["rows"]:
        raise InputError(f"--held_out {run}: has no {split} text; take the other --split")
    rows, size = Rows.open(folder, split), manifest["facts"][split]["bytes"]
    if not rows.is_marked:
        return size, "text", (iter([text]) for text, _ in held_out_texts(rows, tokenizer))
    is_same = tokenizer_fingerprint(for_tokenizer) == tokenizer_fingerprint(tokenizer)
    examples = (decoded(ids, tokenizer, keep_ids=is_same) for ids in held_out_ids(rows))
    return size, manifest["made_from"]["data"]["format"], (iter([one]) for one in examples)


def _cells(name: str, models: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return what the table says of one model, by row."""
    numbers = models[name]
    intervals, cells = numbers.get("confidence_intervals", {}), {}
    for measure in (*MEASURES, "last_word_accuracy"):
        if (value := numbers.get(measure)) is None:
            continue
        ends = intervals.get(measure)
        between = "" if ends is None else f" [{ends[0]:.5g}, {ends[1]:.5g}]"
        mark = _mark(measure, name, models) if len(models) > 1 else ""
        cells[measure] = f"{value:,.6g}{between}{mark}"
    if "bytes_per_token" in numbers:
        cells["bytes_per_token"] = f"{numbers['bytes_per_token']:.4g}"
    cells |= {count: f"{numbers[count]:,}" for count in COUNTS if numbers.get(count) is not None}
    for task, results in numbers.get("tasks", {}).items():
        cells |= {f"{task} {metric}": f"{value:,.6g}" for metric, value in results.items()}
    return cells


def _mark(measure: str, name: str, models: dict[str, dict[str, Any]]) -> str:
    """Return "*" for the best model, "<" where it is surely not; "" where that cannot be said."""
    if not _same_boundaries(models) or measure not in COMPARABLE and not _same_tokenizer(models):
        return ""
    sign = 1 if LOWER_IS_BETTER[measure] else -1
    known = {n: sign * m[measure] for n, m in models.items() if m.get(measure) is not None}
    best = min(known, key=known.get)
    if known[name] == known[best]:
        return " *"
    ends = [models[n].get("confidence_intervals", {}).get(measure) for n in (name, best)]
    if None in ends:
        return "  "
    (low, high), (best_low, best_high) = ends
    return " <" if high < best_low or low > best_high else "  "


def _same_boundaries(models: dict[str, dict[str, Any]]) -> bool:
    return len({numbers.get("attend_across") for numbers in models.values()}) == 1


def _same_tokenizer(models: dict[str, dict[str, Any]]) -> bool:
    return len({numbers["tokenizer_fingerprint"] for numbers in models.values()}) == 1


def _short(name: str, models: dict[str, dict[str, Any]]) -> str:
    last = Path(name).name
    return last if sum(Path(other).name == last for other in models) == 1 else name


@contextlib.contextmanager
def said_as_options() -> Iterator[None]:
    """Let sentences about a recipe's `data.` speak of the door's options of the same names."""
    names = "|".join(SourceFields.model_fields)
    try:
        yield
    except InputError as error:
        said = re.sub(rf"(?<![\w./-])(?:--)?data\.({names})\b", r"--\1", str(error))
        raise InputError(said) from None
