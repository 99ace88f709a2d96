"""The sections of a recipe about text: what is read, how it is split, cleaned and cut to rows."""

from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.sections import Section

# What has no meaning for prompts and completions, and what follows from them.
NOT_OF_EXAMPLES = ("text_column", "separator", "join_rows")
EXAMPLES_ARE = {"packing": "best_fit", "attend_across": False}


class SourceFields(Section):
    """Where documents come from and how they are told apart."""

    files: list[str] | None = None
    """Text files, folders (their text and table files), globs, .txt/.jsonl/.csv/.parquet (also
    .gz and .zst), python:stdlib, or python:packages (the installed packages' .py files)."""
    dataset: str | None = None
    """Hub name (or local folder) of a data set, instead of files."""
    dataset_config: str | None = None
    """Configuration of that data set."""
    dataset_split: str = "train"
    """Split of that data set to read documents from."""
    dataset_revision: str | None = None
    """Branch, tag or commit of that data set."""
    format: Literal["text", "prompt_completion", "messages"] = "text"
    """text: documents. Tables with the columns prompt and completion, or messages (each a list of
    role and content): the completion, or what the assistant says, is all that is predicted."""
    text_column: str = "text"
    """Column of a table or data set that holds a document's text."""
    separator: str | None = Field(None, min_length=1)
    """What stands between the documents of a text file (default: a file is one document); \\n and
    \\t are read as line feed and tab."""
    join_rows: bool = False
    """The rows of a table are pieces of one text (WikiText's lines), to be joined by the separator,
    if there is one."""
    errors: Literal["strict", "replace"] = "strict"
    """Bytes or characters that are not Unicode text: stop and name them, or put U+FFFD there."""

    @property
    def separator_bytes(self) -> bytes | None:
        """The separator as it stands in a file."""
        if self.separator is None:
            return None
        return self.separator.replace("\\n", "\n").replace("\\t", "\t").encode()


class SourceSection(SourceFields):
    """One of several sources of a mixture."""

    name: str | None = None
    """What tables call it (default: its first file, or the data set)."""
    weight: float | None = Field(None, ge=0)
    """Share of the training tokens; all sources have one and they sum to 1, or none has."""

    @model_validator(mode="after")
    def _one_origin(self) -> "SourceSection":
        if (self.files is None) == (self.dataset is None):
            raise ValueError("every entry of data.sources has exactly one of files and dataset")
        return self


class DataSection(SourceFields):
    """Documents, their split into training, validation and test, and the rows cut from them."""

    sources: list[SourceSection] | None = None
    """Several sources instead of one, each with its own files or dataset, and with weights."""
    mixture_tokens: int | None = Field(None, ge=1)
    """With weights: training tokens wanted (default: as many as leave the weights true)."""
    validation_files: list[str] | None = None
    """Files that are the validation text, instead of data.validation_fraction of the sources."""
    test_files: list[str] | None = None
    """Files that are the test text, instead of data.test_fraction of the sources."""
    validation_split: str | None = None
    """Split of data.dataset that is the validation text, as validation_files."""
    test_split: str | None = None
    """Split of data.dataset that is the test text, as test_files."""
    hold_out: Literal["auto", "documents", "tail"] = "auto"
    """Hold out whole documents by a hash of their text, or the end of every document (auto: the
    tail when there are fewer than 100 documents)."""
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    """Share held out for validation."""
    test_fraction: float = Field(0.05, ge=0, lt=1)
    """Share held out for the final test."""
    block_size: int = Field(1024, ge=2)
    """Tokens in a row."""
    packing: Literal["concatenate", "best_fit", "sliding"] = "concatenate"
    """concatenate: one stream cut into rows; best_fit: whole documents, placed so that least is
    filled up; sliding: windows that overlap."""
    stride: int | None = Field(None, ge=1)
    """sliding only: tokens from the start of one row to that of the next."""
    attend_across: bool = True
    """Whether a token sees the documents before its own in the same row; false keeps attention and
    positions within each document."""
    streaming: bool = False
    """Tokenise on the way to the device instead of beforehand, for text larger than the disk."""
    held_out_from_bytes: int = Field(256_000_000, ge=1)
    """streaming only: the held-out documents are those in that much of the text's beginning."""
    path: str | None = None
    """Folder of the prepared rows (default: <training.output_dir>/blocks)."""

    @model_validator(mode="before")
    @classmethod
    def _examples_are_kept_whole(cls, values: Any) -> Any:
        """State what follows from the format; what contradicts it is found below."""
        if isinstance(values, dict) and _formats(values) - {"text"}:
            values = {**EXAMPLES_ARE, **values}
        return values

    @model_validator(mode="after")
    def _no_contradiction(self) -> "DataSection":
        given = [self.files is not None, self.dataset is not None, self.sources is not None]
        if sum(given) != 1:
            raise ValueError(
                "give exactly one of data.files, data.dataset and data.sources (null takes one "
                "back)"
            )
        stated = self.model_fields_set
        if self.sources is not None:
            misplaced = [n for n in SourceFields.model_fields if n in stated and getattr(self, n)]
            if misplaced:
                raise ValueError(
                    f"data.{misplaced[0]} beside data.sources: state it in each source instead"
                )
            _check_weights(self.sources)
        if self.example_format is not None:
            self._check_examples()
        for split in ("validation", "test"):
            if getattr(self, f"{split}_split") is None:
                continue
            if self.dataset is None or getattr(self, f"{split}_files"):
                raise ValueError(
                    f"data.{split}_split names a split of data.dataset; for files there is "
                    f"data.{split}_files"
                )
        if self.packing == "sliding":
            if self.stride is None or self.stride > self.block_size:
                raise ValueError(
                    "data.packing sliding needs data.stride, from 1 to data.block_size "
                    f"({self.block_size}); got {self.stride}"
                )
        elif self.stride is not None:
            raise ValueError("data.stride has a meaning for data.packing sliding only")
        if self.streaming and self.packing != "concatenate":
            raise ValueError(
                f"data.packing {self.packing} has to see all documents first; with data.streaming "
                "only concatenate works"
            )
        if self.held_out_fraction("validation") + self.held_out_fraction("test") >= 1:
            raise ValueError(
                "data.validation_fraction and data.test_fraction leave nothing to train on: "
                "their sum must be below 1"
            )
        return self

    def _check_examples(self) -> None:
        sources, given = self.sources or [self], f"with data.format {self.example_format}"
        if len({source.format for source in sources}) > 1:
            raise ValueError(
                "data.sources: every source has the same format, since text is packed otherwise "
                "than prompts and completions"
            )
        for name in NOT_OF_EXAMPLES:
            if any(name in s.model_fields_set and getattr(s, name) for s in sources):
                raise ValueError(f"data.{name} has no meaning {given}; leave it out")
        if self.streaming:
            raise ValueError(
                f"data.streaming: {given} examples are kept whole, for which all of them have to "
                "be seen first; leave it out"
            )
        if self.hold_out == "tail":
            raise ValueError(f"data.hold_out tail: {given} examples are held out whole")
        for name, value in EXAMPLES_ARE.items():
            if getattr(self, name) != value:
                said, stated = (str(v).lower() for v in (value, getattr(self, name)))
                raise ValueError(
                    f"data.{name} {stated}: {given} it is {said}, so that no example is cut or "
                    "sees another; leave it out"
                )

    @property
    def example_format(self) -> str | None:
        """prompt_completion or messages; None where documents are predicted from end to end."""
        found = (self.sources or [self])[0].format
        return None if found == "text" else found

    @property
    def all_sources(self) -> list[SourceSection]:
        """The sources, also where there is only one."""
        if self.sources is not None:
            return self.sources
        fields = {n: getattr(self, n) for n in SourceFields.model_fields}
        return [SourceSection(**fields)]

    @property
    def is_weighted(self) -> bool:
        """Whether the sources are mixed by weights."""
        return self.all_sources[0].weight is not None

    def held_out_fraction(self, split: str) -> float:
        """Return the share of the sources' documents that a split takes, 0 if it has its own."""
        return 0.0 if self.has_own(split) else getattr(self, f"{split}_fraction")

    def has_own(self, split: str) -> bool:
        """Whether a held-out split has text of its own."""
        return bool(getattr(self, f"{split}_files") or getattr(self, f"{split}_split"))


def _formats(values: dict[str, Any]) -> set[Any]:
    """Return the formats that a `data:` section states."""
    sources = values.get("sources")
    found = [values, *sources] if isinstance(sources, list) else [values]
    formats = [
        s.get("format") if isinstance(s, dict) else getattr(s, "format", None) for s in found
    ]
    return {one or "text" for one in formats}


def _check_weights(sources: list[SourceSection]) -> None:
    weights = [source.weight for source in sources]
    if not sources:
        raise ValueError("data.sources is an empty list; give at least one source")
    if all(weight is None for weight in weights):
        return
    if any(weight is None for weight in weights):
        raise ValueError("data.sources: either every source has a weight or none has")
    if abs(sum(weights) - 1) > 1e-6:
        raise ValueError(
            f"data.sources: the weights sum to {sum(weights):g}; they are fractions of the "
            "training tokens and must sum to 1"
        )


class CleaningSection(Section):
    """What is left out of the training text; every step is counted, none is on by itself."""

    deduplicate: bool = False
    """Keep only the first of documents with the same text."""
    decontaminate: Literal["copies", "drop", "cut"] | None = None
    """Training documents that are also held-out text: drop these copies; or drop all that share 13
    tokens in a row with held-out text or a benchmark, or cut those tokens out."""
    benchmark_files: list[str] = Field(default_factory=list)
    """Files to keep out of the training text besides the held-out text (for decontaminate)."""
    shortest: int = Field(1, ge=1)
    """Characters that a document must have."""
    longest: int | None = Field(None, ge=1)
    """Characters that a document may have."""
    normalization: Literal["NFC", "NFD", "NFKC", "NFKD"] | None = None
    """Unicode normalisation of every document, before anything else looks at it."""

    @model_validator(mode="after")
    def _no_contradiction(self) -> "CleaningSection":
        if self.benchmark_files and self.decontaminate in (None, "copies"):
            raise ValueError("cleaning.benchmark_files needs cleaning.decontaminate: drop or cut")
        if self.longest is not None and self.longest < self.shortest:
            raise ValueError("cleaning.longest is below cleaning.shortest: no document is both")
        return self
