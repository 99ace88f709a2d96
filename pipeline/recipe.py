"""The one YAML that describes a run: its sections, their checks, reading and saving.

Sections are named after the rooms that read them. `training:` goes to `TrainingArguments` and
`model.config:` to `GPT2Config` under the names those libraries use; both are checked against the
installed source, which is read and not imported, so that a misspelt key costs no torch import.
"""

import difflib
import functools
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, create_model, model_validator

from pipeline.data_sections import CleaningSection, DataSection, SourceSection
from pipeline.known_fields import model_config_fields, training_fields
from pipeline.safety_sections import FaultSection, GuardSection, PreflightSection
from pipeline.sections import (
    SMALLEST_VOCABULARY,
    EvaluationSection,
    GenerationSection,
    HubSection,
    ModelSection,
    OptimizerSection,
    ScheduleSection,
    Section,
    TokenizerSection,
)

# Keys that transformers 5 no longer has, and where their meaning lives now.
RENAMED = {
    "training.warmup_ratio": "schedule.warmup_steps (below 1: a fraction)",
    "training.overwrite_output_dir": "the flag --overwrite",
    "training.evaluation_strategy": "training.eval_strategy",
    "training.logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR",
    "training.no_cuda": "training.use_cpu",
}


class InputError(ValueError):
    """What a person gave cannot work; the message says what, where and the remedy."""


class InputErrorTold(InputError):
    """The main process has met it, and says it; this one was told."""


class RunFailed(Exception):
    """A run cannot go on, and no input is to blame; the message says what happened and when."""


class CutOff(RunFailed):
    """No other process can be reached: each says it, on its own machine's screen."""


def first_line(error: BaseException) -> str:
    """Return what a library's error says in its first line, to be put into a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


class Recipe(Section):
    """Everything that describes a run."""

    tokens_per_update: int = Field(ge=1)
    """Tokens in one optimizer step over all devices; gradient accumulation follows from it."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward pass; weights stay fp32 (auto: bf16 where the device has it)."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Gradients while processes add them up; with DDP bf16 needs CUDA."""
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    data: DataSection
    cleaning: CleaningSection = Field(default_factory=CleaningSection)
    model: ModelSection
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    generation: GenerationSection = Field(default_factory=GenerationSection)
    faults: FaultSection = Field(default_factory=FaultSection)
    guards: GuardSection = Field(default_factory=GuardSection)
    preflight: PreflightSection = Field(default_factory=PreflightSection)
    hub: HubSection = Field(default_factory=HubSection)
    training: dict[str, Any] = Field(default_factory=dict)
    """Any field of transformers.TrainingArguments, under its own name."""

    @model_validator(mode="after")
    def _one_tokenizer(self) -> "Recipe":
        if self.model.pretrained is not None and self.tokenizer.vocab_size is not None:
            raise ValueError(
                "a tokenizer trained anew does not fit a pretrained model; leave out "
                "tokenizer.vocab_size (null takes it back) to use the model's own"
            )
        given = [self.tokenizer.vocab_size is not None, self.tokenizer.pretrained is not None]
        if all(given):
            raise ValueError("give only one of tokenizer.vocab_size and tokenizer.pretrained")
        if not any(given) and self.model.pretrained is None:
            raise ValueError("give tokenizer.vocab_size to train one, or tokenizer.pretrained")
        return self

    @model_validator(mode="after")
    def _a_pretrained_model(self) -> "Recipe":
        if self.model.pretrained is None:
            if self.schedule.goes_on:
                raise ValueError("schedule.goes_on has a meaning with model.pretrained only")
        elif self.model.lora_r is not None:
            if self.tokenizer.added_tokens:
                raise ValueError(
                    "tokenizer.added_tokens need embeddings of their own, and with model.lora_r "
                    "these stay as they are; leave one of them out"
                )
            if self.optimizer.name == "muon":
                raise ValueError(
                    "optimizer.name muon evens out whole matrices, and with model.lora_r only "
                    "their adapter is trained; use adamw"
                )
        return self

    @model_validator(mode="after")
    def _a_stream_is_never_seen_whole(self) -> "Recipe":
        if not self.data.streaming:
            return self
        for name in ("deduplicate", "decontaminate"):
            if getattr(self.cleaning, name) not in (False, None, "copies"):
                raise ValueError(
                    f"cleaning.{name} has to see all documents first; it cannot be had with "
                    "data.streaming"
                )
        if self.training.get("max_steps") in (None, -1, "-1"):  # the library's "not given"
            raise ValueError("data.streaming needs training.max_steps: a stream has no end")
        sources = self.data.all_sources
        if len(sources) > 1 and not self.data.is_weighted:
            raise ValueError(
                "data.streaming needs a weight for each of data.sources: how long they are is "
                "not known"
            )
        return self

    @model_validator(mode="after")
    def _an_example_is_whole(self) -> "Recipe":
        if self.data.example_format is not None and self.cleaning.decontaminate == "cut":
            raise ValueError(
                f"cleaning.decontaminate cut: with data.format {self.data.example_format} it would "
                "leave half of an example; drop takes out the whole"
            )
        return self

    @property
    def output_dir(self) -> Path:
        """The run folder."""
        return Path(self.training["output_dir"])

    @property
    def tokenizer_dir(self) -> Path:
        """The folder of the tokenizer that this recipe trains."""
        return self.output_dir / "tokenizer"

    @property
    def blocks_dir(self) -> Path:
        """The folder of the prepared rows."""
        return Path(self.data.path) if self.data.path else self.output_dir / "blocks"

    @property
    def ring_dir(self) -> Path:
        """The folder through which streamed rows pass."""
        return self.output_dir / "_ring"

    @property
    def digests_path(self) -> Path:
        """The file that keeps the fingerprints of the corpus's files."""
        return self.blocks_dir.parent / f"_digests-{self.blocks_dir.name}.json"

    def with_values(self, **values: Any) -> "Recipe":
        """Return a copy in which choices left open (`auto`) are replaced by what was chosen."""
        return Recipe.model_validate({**self.as_dict(), **values})

    def as_dict(self) -> dict[str, Any]:
        """Return what was stated, defaults left out, as plain YAML types."""
        return self.model_dump(mode="json", exclude_unset=True)

    def as_yaml(self) -> str:
        """Return the recipe as YAML; reading that gives this recipe back."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)


def read_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe, lay dotted `overrides` over it and check every key and value.

    Raises:
        InputError: the file cannot be read, a key is unknown or renamed, a value has the wrong
            type or range, or two choices contradict each other.
    """
    overrides = overrides or {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe; the project's own are in recipes/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a recipe: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: a recipe is a YAML mapping of sections, see recipes/")
    for key, value in overrides.items():
        _lay_over(values, key, value)
    origin = f"{path}" + ("" if not overrides else " with the command line")
    training = {} if values.get("training") is None else values["training"]
    if isinstance(training, dict) and training.get("output_dir") is None:
        values["training"] = {**training, "output_dir": f"outputs/{path.stem}"}
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise InputError(sentence_of(error, Recipe, overrides, path)) from None
    training = _check_known_fields("training", recipe.training, overrides, path)
    if training.get("output_dir") == "":
        raise InputError(f"{origin}: training.output_dir is empty; leave it out for the default")
    checked = {"training": training}
    if recipe.model.config is not None:
        config = _check_known_fields("model.config", recipe.model.config, overrides, path)
        checked["model"] = {**recipe.model.model_dump(exclude_unset=True), "config": config}
    return recipe.with_values(**checked)


@functools.cache  # with torch loaded pydantic takes a tenth of a second for each
def _library_section(name: str) -> type[BaseModel]:
    fields = {"training": training_fields, "model.config": model_config_fields}[name]()
    return create_model(
        name, __base__=Section, **{n: (f.annotation, None) for n, f in fields.items()}
    )


def _check_known_fields(
    section: str, values: dict[str, Any], overrides: dict[str, Any], path: Path
) -> dict[str, Any]:
    model = _library_section(section)
    # YAML reads a bare `no` as false; the strategies of transformers spell it "no".
    values = {k: "no" if v is False and k.endswith("_strategy") else v for k, v in values.items()}
    values = {k: v for k, v in values.items() if v is not None}  # null takes a value back
    try:
        return model.model_validate(values).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise InputError(sentence_of(error, model, overrides, path, section)) from None


def _lay_over(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    for name in sections:
        if not isinstance(values.get(name), dict):
            values[name] = {}
        values = values[name]
    values[last] = value


def sentence_of(
    error: ValidationError,
    model: type[BaseModel],
    overrides: dict[str, Any],
    path: Path,
    section: str = "",
) -> str:
    """Turn the first of pydantic's findings into one sentence with file, key, value and remedy."""
    finding = error.errors()[0]
    parts = [
        str(p)
        for p in finding["loc"]
        if str(p) in _all_names(model) or isinstance(p, int) or p is finding["loc"][0]
    ]
    if finding["type"] in ("extra_forbidden", "missing"):
        parts = [str(p) for p in finding["loc"]]
    key = ".".join([section, *parts] if section else parts)
    # A list on the command line is one value, whichever of its items is wrong.
    named = re.sub(r"\.\d+$", "", key)
    where = f"--{named}" if named in overrides else f"{path}: {key}" if key else f"{path}"
    if finding["type"] == "extra_forbidden":
        if key in RENAMED:
            return f"{where}: this key is gone in transformers 5; use {RENAMED[key]}"
        known = _names_beside(model, parts)
        close = difflib.get_close_matches(parts[-1], known, n=1, cutoff=0.5)
        beside = key.removesuffix(parts[-1])
        about = f"--help {section}" if section else "--help"
        listed = ", ".join(known) if len(known) < 20 else f"{about} lists them"
        remedy = f"did you mean {beside}{close[0]}?" if close else f"known: {listed}"
        return f"{where}: unknown key; {remedy}"
    if finding["type"] == "missing":
        return f"{where}: this key is required"
    message = finding["msg"].removeprefix("Value error, ")
    if finding["type"] == "value_error":
        return f"{path}: {message}"
    if key == "tokenizer.vocab_size" and finding["type"] == "greater_than_equal":
        message = (
            f"a byte-level tokenizer needs the 256 bytes and <|endoftext|>, so at least "
            f"{SMALLEST_VOCABULARY}"
        )
    return f"{where}: {message[0].lower()}{message[1:]}; got {finding['input']!r}"


def _all_names(model: type[BaseModel]) -> set[str]:
    names = set(model.model_fields) | set(SourceSection.model_fields)
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names |= _all_names(field.annotation)
    return names


def _names_beside(model: type[BaseModel], parts: list[str]) -> list[str]:
    for name in parts[:-1]:
        if name.isdigit():  # the place in data.sources
            model = SourceSection
        elif name != "sources":
            model = model.model_fields[name].annotation
    return list(model.model_fields)
