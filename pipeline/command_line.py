"""What a person types: `--section.field value` and door options in, one sentence and a code out."""

import difflib
import logging
import os
import sys
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline import failures
from pipeline.help_text import help_text
from pipeline.interruption import EXIT_CODE, Preempted, ignore
from pipeline.options import RecipeOptions
from pipeline.recipe import (
    CutOff,
    InputError,
    InputErrorTold,
    Recipe,
    RunFailed,
    read_recipe,
    sentence_of,
)
from pipeline.sections import Section

DEFAULT_RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"


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
    names = {_option_name(options, name) for name in options.model_fields}
    own = {key: value for key, value in given.items() if key in names}
    rest = {key: value for key, value in given.items() if key not in own}
    door = _options(options, own)
    for key in rest:
        if key.split(".")[0] not in Recipe.model_fields:
            raise InputError(_unknown_option(key, [*names, *Recipe.model_fields]))
    recipe = read_recipe(DEFAULT_RECIPE if door.config is None else Path(door.config), rest)
    if door.print_config:
        _finish(yaml.safe_dump(recipe.as_dict(), sort_keys=False, allow_unicode=True))
    return recipe, door


def enter(main: Callable[[], int | None]) -> typing.NoReturn:
    """Run a door's `main` as a program: a person's mistake is one sentence and exit code 2."""
    is_main_process = failures.rank() == 0
    # Reading and writing weights takes no time worth a bar; whoever wants them sets it to 0.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("pipeline").setLevel(logging.INFO)
    if not is_main_process:
        _leave_it_to_the_main_process()
    try:
        code = main()
    except InputError as error:
        failures.say(f"error: {error}\n", error, is_common=isinstance(error, InputErrorTold))
        code = 2
    except RunFailed as error:
        failures.say(f"error: {error}\n", error, is_common=not isinstance(error, CutOff))
        code = 1
    except Preempted:
        ignore()
        code = EXIT_CODE
    except KeyboardInterrupt:
        if is_main_process:
            sys.stderr.write("\ninterrupted\n")
        code = 130
    except BrokenPipeError:  # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except SystemExit:
        raise
    except BaseException as error:
        failures.say_unexpected(error)
        code = 1
    sys.stdout.flush()
    sys.exit(code or 0)


def _leave_it_to_the_main_process() -> None:
    """Be silent about what all processes come upon: how the run goes, what libraries warn of."""
    logging.getLogger("pipeline").setLevel(logging.CRITICAL)
    logging.getLogger().setLevel(logging.ERROR)
    for library in ("TRANSFORMERS", "DATASETS", "HF_HUB"):  # read when they are imported
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:  # what python -W says
        warnings.simplefilter("ignore")


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
            form = "--section.field value" if issubclass(options, RecipeOptions) else "--name value"
            raise InputError(f"{word!r} stands alone; options are written {form}")
        else:
            given[key].append(word)
    if "help" in given:
        return {"help": " ".join(given["help"])}
    return {key: _value(key, words, options) for key, words in given.items()}


def _value(key: str, words: list[str], options: type[Section]) -> Any:
    if not words:
        field = options.model_fields.get(key)
        if field is not None and field.annotation in (bool, bool | None):
            return True
        names = [_option_name(options, name) for name in options.model_fields]
        if key.split(".")[0] not in {*names, *Recipe.model_fields}:
            raise InputError(_unknown_option(key, names))
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
