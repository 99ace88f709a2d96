"""The fields that transformers' configuration classes declare, read from their source.

Reading takes milliseconds, importing seconds: a misspelt key and --help need not wait for torch.
"""

import ast
import builtins
import functools
import importlib.util
import typing
from pathlib import Path
from typing import Any


class LibraryField(typing.NamedTuple):
    """A field that a library's configuration class declares."""

    annotation: Any
    default: str
    help: str


@functools.cache
def training_fields() -> dict[str, LibraryField]:
    """Return the fields of the installed `TrainingArguments`, read from its source."""
    return _declared_fields("training_args.py", "TrainingArguments")


@functools.cache
def model_config_fields() -> dict[str, LibraryField]:
    """Return the fields of the installed `GPT2Config`, read from its source."""
    return _declared_fields("models/gpt2/configuration_gpt2.py", "GPT2Config")


def _declared_fields(file: str, class_name: str) -> dict[str, LibraryField]:
    package = importlib.util.find_spec("transformers").submodule_search_locations[0]
    tree = ast.parse((Path(package) / file).read_text(encoding="utf-8"))
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name).body
    fields = {}
    for node in body:
        if isinstance(node, ast.AnnAssign):
            keywords = {k.arg: k.value for k in getattr(node.value, "keywords", [])}
            default = keywords.get("default", None if keywords else node.value)
            fields[node.target.id] = LibraryField(
                annotation=_plain_type(ast.unparse(node.annotation)),
                default=ast.unparse(default) if default is not None else "none",
                help=_literal(keywords.get("metadata")).get("help", ""),
            )
    return fields


def _literal(node: ast.AST | None) -> dict[str, str]:
    try:
        return ast.literal_eval(node) if node is not None else {}
    except ValueError:  # a help text that is computed
        return {}


def _plain_type(annotation: str) -> Any:
    """Evaluate an annotation; the library's own enumerations become text."""

    class Names(dict):
        def __missing__(self, name: str) -> Any:
            return getattr(typing, name, str)

    return eval(annotation, {"__builtins__": {}}, Names(vars(builtins)))  # noqa: S307
