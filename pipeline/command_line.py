"""What a person types: `--section.field value` and door options in, one sentence and a code out."""

import difflib
import logging
import os
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from pipeline.help_text import help_text
from pipeline.interruption import EXIT_CODE, Preempted, ignore
from pipeline.recipe import InputError, Recipe, RunFailed, read_recipe, sentence_of
from pipeline.sections import Section, SourceFields, Temperature

# What gloo and NCCL say when the process at the other end is gone.
CONNECTION_LOST = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited",
)  # fmt: skip

DEFAULT_RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"


class RecipeOptions(Section):
    """Options of every door that reads a recipe."""

    config: str | None = None
    """The recipe (default: recipes/quickstart.yaml)."""
    print_config: bool = False
    """Print the recipe as it would run, and stop."""


class PretrainOptions(RecipeOptions):
    """Options of pretrain.py."""

    resume: str = "auto"
    """auto: from the newest whole checkpoint, else fresh; must; never; or a checkpoint's path."""
    overwrite: bool = False
    """Remove the run that the output folder holds, and start anew."""
    allow_change: list[str] = Field(default_factory=list)
    """Fields that may differ from those of the checkpoint though they are refused otherwise."""


class PrepareOptions(RecipeOptions):
    """Options of prepare_data.py."""

    num_proc: int | None = Field(None, ge=1)
    """Processes that tokenise (default: one for each core, if the text is long enough to pay); the
    rows are the same for any number."""
    show: int | None = Field(None, ge=1)
    """Print that many training rows as text, their documents set apart (of a stream, whose training
    rows are not made yet, validation rows)."""


class TokenizerOptions(RecipeOptions):
    """Options of train_tokenizer.py."""

    compare: str | None = None
    """Folder or Hub name of a tokenizer to compare with, openai-community/gpt2 for instance."""


class MeasureOptions(SourceFields):
    """Options of measure_perplexity.py."""

    model: list[str]
    """Folders or Hub names of the models, each with its tokenizer; several stand side by side."""
    held_out: str | None = None
    """Folder of a run whose held-out text is scored, instead of files or a data set."""
    split: Literal["validation", "test"] = "validation"
    """With held_out: which of its texts."""
    joined: bool | None = None
    """Score the texts laid end to end, end-of-text after each, as held-out text is in training, or
    each by itself (default: joined, unless an option is given that only texts by themselves have).
    """
    block_size: int | None = Field(None, ge=2)
    """Tokens in a window (default: the model's positions)."""
    stride: int | None = Field(None, ge=1)
    """Tokens from the start of one window to that of the next (default and at most block_size - 1);
    the smaller, the more context every token has, and the longer it takes."""
    batch_size: int = Field(8, ge=1)
    """Windows in one forward pass; it changes no number."""
    add_start_token: bool | None = None
    """Texts by themselves: end-of-text before each is the context of its first token (default: yes,
    unless the model was trained with data.attend_across false)."""
    add_end_token: bool = False
    """Texts by themselves: the end-of-text after each is predicted, too."""
    packed: bool = False
    """Texts by themselves: they share windows instead of being filled up; the same numbers."""
    max_length: int | None = Field(None, ge=2)
    """Texts by themselves: tokens of each after which the rest is left out."""
    target: Literal["all", "last_word"] = "all"
    """last_word: only the last word of each text is scored (LAMBADA)."""
    detokenize: Literal["wikitext"] | None = None
    """wikitext: undo WikiText's cutting into words; bytes and words stay those of the text."""
    tasks: list[str] = Field(default_factory=list)
    """Tasks of lm-eval (hellaswag,lambada_openai,...) or YAML files of your own; needs the extra
    [tasks]."""
    tasks_limit: int | None = Field(None, ge=1)
    """Documents of each task (default: all)."""
    json_: str | None = Field(None, alias="json")
    """File to write the numbers to."""

    @field_validator("tasks")
    @classmethod
    def _at_commas(cls, values: list[str]) -> list[str]:
        return [name for value in values for name in value.split(",") if name]

    @model_validator(mode="after")
    def _one_text(self) -> "MeasureOptions":
        given = [n for n in ("files", "dataset", "held_out") if getattr(self, n) is not None]
        if len(given) > 1 or not given and not self.tasks:
            raise ValueError(
                "give the text by exactly one of --files, --dataset and --held_out (or --tasks "
                "alone)"
            )
        if len(set(self.model)) < len(self.model):
            raise ValueError("--model names the same model twice")
        return self

    @property
    def has_text(self) -> bool:
        """Whether there is a text to score, besides tasks."""
        return (self.files or self.dataset or self.held_out) is not None


class WriteReportOptions(Section):
    """Options of write_report.py."""

    runs: list[str] = Field(min_length=1)
    """Folders of runs, finished or not; of several their comparison is written."""
    html: str | None = None
    """File to write (default: report.html in the run's folder; of several runs comparison.html)."""


class GenerateOptions(Section):
    """Options of generate.py."""

    model: str
    """Folder or Hub name of the model and its tokenizer."""
    prompt: str
    """Beginning to continue."""
    max_new_tokens: int = Field(80, ge=1)
    """Length of the continuation in tokens; it stops earlier at end-of-text."""
    temperature: Temperature = 0.8
    """Divides the logits; 0 is greedy."""
    top_k: int = Field(40, ge=0)
    """Sample among this many most likely tokens; 0: all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample among the most likely tokens that together have this probability."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the sampling."""


def read_options(argv: Sequence[str] | None, options: type[Section], *, doc: str) -> typing.Any:
    """Return the door's options from `argv` (default: the process's own).

    Raises:
        InputError: an option is unknown, missing or of the wrong type.
        SystemExit: with code 0, after --help.
    """
    given = _words(sys.argv[1:] if argv is None else argv, options)
    if "help" in given:
        _finish(help_text(doc, options))
    names = {_option_name(options, name) for name in options.model_fields}
    unknown = next((key for key in given if key not in names), None)
    if unknown is not None:
        raise InputError(_unknown_option(unknown, sorted(names)))
    return _options(options, given)


def read_command_line(
    argv: Sequence[str] | None, options: type[RecipeOptions], *, doc: str
) -> tuple[Recipe, typing.Any]:
    """Return the recipe and the door's options from `argv` (default: the process's own).

    Raises:
        InputError: an option or a key of the recipe is wrong.
        SystemExit: with code 0, after --help and --print_config.
    """
    given = _words(sys.argv[1:] if argv is None else argv, options)
    if "help" in given:
        _finish(help_text(doc, options, has_recipe=True, about=given["help"]))
    own = {key: value for key, value in given.items() if key in options.model_fields}
    rest = {key: value for key, value in given.items() if key not in own}
    door = _options(options, own)
    for key in rest:
        if key.split(".")[0] not in Recipe.model_fields:
            raise InputError(_unknown_option(key, [*options.model_fields, *Recipe.model_fields]))
    recipe = read_recipe(DEFAULT_RECIPE if door.config is None else Path(door.config), rest)
    if door.print_config:
        _finish(yaml.safe_dump(recipe.as_dict(), sort_keys=False, allow_unicode=True))
    return recipe, door


def enter(main: Callable[[], int | None]) -> typing.NoReturn:
    """Run a door's `main` as a program: a person's mistake is one sentence and exit code 2."""
    is_main_process = os.environ.get("RANK", "0") == "0"
    # Reading and writing weights takes no time worth a bar; whoever wants them sets it to 0.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("pipeline").setLevel(logging.INFO if is_main_process else logging.WARNING)
    try:
        code = main()
    except InputError as error:
        if is_main_process:
            sys.stderr.write(f"error: {error}\n")
        code = 2
    except RunFailed as error:
        if is_main_process:
            sys.stderr.write(f"error: {error}\n")
        code = 1
    except Preempted:
        ignore()
        code = EXIT_CODE
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        code = 130
    except BrokenPipeError:  # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except SystemExit:
        raise
    except BaseException as error:
        if "RANK" in os.environ and any(words in str(error) for words in CONNECTION_LOST):
            # It has a traceback of its own; ours would only hide that.
            rank = os.environ["RANK"]
            sys.stderr.write(f"process {rank}: ends because another process has ended\n")
        else:
            traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.exit(code or 0)


def _words(argv: Sequence[str], options: type[Section]) -> dict[str, Any]:
    """Split `--key value ...` and `--key=value` into a mapping; nothing is abbreviated."""
    given: dict[str, Any] = {}
    key = None
    for word in argv:
        if word in ("-h", "--help"):
            key = "help"
            given[key] = []
        elif word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            if key in given:
                raise InputError(f"--{key} is given twice")
            given[key] = [value] if equals else []
        elif key is None:
            raise InputError(f"{word!r} stands alone; options are written --section.field value")
        else:
            given[key].append(word)
    if "help" in given:
        return {"help": " ".join(given["help"])}
    return {key: _value(key, words, options) for key, words in given.items()}


def _value(key: str, words: list[str], options: type[Section]) -> Any:
    if not words:
        field = options.model_fields.get(key)
        if field is not None and field.annotation is bool:
            return True
        raise InputError(f"--{key}: a value is missing")
    if len(words) > 1:
        return words
    word = words[0]
    # Text stays text (a prompt may look like YAML); only what cannot be text is read as YAML.
    if word != "null" and not (word.startswith(("[", "{")) and "." in key):
        return word
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        raise InputError(
            f"--{key}: {word!r} begins like a YAML list or mapping and is none; put text that "
            "begins with a bracket in quotes of its own, as in '\"[a\"'"
        ) from None


def _option_name(options: type[Section], name: str) -> str:
    return options.model_fields[name].alias or name


def _options(options: type[Section], given: dict[str, Any]) -> Any:
    lists = [n for n, f in options.model_fields.items() if f.annotation == list[str]]
    given = {k: [v] if k in lists and isinstance(v, str) else v for k, v in given.items()}
    try:
        return options.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # options that contradict each other
            raise InputError(first["msg"].removeprefix("Value error, ")) from None
        key = str(first["loc"][0])
        if first["type"] == "missing":
            raise InputError(f"--{key} is required; --help lists the options") from None
        overrides = {key: given.get(key)}
        raise InputError(sentence_of(error, options, overrides, Path("command line"))) from None


def _unknown_option(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key.split(".")[0], known, n=1, cutoff=0.5)
    remedy = f"did you mean --{close[0]}?" if close else "--help lists the options"
    return f"--{key}: unknown option; {remedy}"


def _finish(text: str) -> typing.NoReturn:
    sys.stdout.write(text.rstrip("\n") + "\n")
    raise SystemExit(0)
