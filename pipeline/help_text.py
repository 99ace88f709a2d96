"""What `--help` says: the options of a door, the recipe's keys, and the libraries' own fields."""

import textwrap
import types
import typing
from typing import Any, Literal

import yaml
from pydantic import BaseModel

from pipeline.known_fields import LibraryField, model_config_fields, training_fields
from pipeline.recipe import Recipe
from pipeline.sections import Section

# What pretrain.py makes of these fields instead of Trainer.
PUSHED_OUR_WAY = {
    "push_to_hub": "Push checkpoints and result while the run trains. (default: False)",
    "hub_model_id": "USER/NAME (default: the run folder's name, under the token's user)",
    "hub_strategy": "end, every_save, checkpoint (also the newest whole, on the branch "
    "last-checkpoint), all_checkpoints (each whole, on its branch). (default: every_save)",
    "hub_private_repo": "Whether only its owner may read the repository. (default: True)",
    "hub_token": "Refused: it comes from HF_TOKEN or a login.",
    "hub_always_push": "Refused: every checkpoint is pushed, one after the other.",
    "hub_revision": "Branch that is pushed to. (default: main)",
}


def help_text(
    doc: str, options: type[Section], *, has_recipe: bool = False, about: str = ""
) -> str:
    """Return the help of a door, its docstring first, or of a library's class.

    Args:
        has_recipe: whether the door takes a recipe's keys beside its own options.
        about: "training" or "model.config" for their fields instead.
    """
    if about == "training":
        return _library_help("training", "TrainingArguments", training_fields())
    if about == "model.config":
        return _library_help("model.config", "GPT2Config", model_config_fields())
    lines = [doc.strip(), "", f"{options.__doc__}"]
    lines += _field_lines(options, "")
    if has_recipe:
        lines += ["", Recipe.__doc__ + " These lay over the recipe."]
        lines += _field_lines(Recipe, "")
        for name, field in Recipe.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                lines += ["", f"{name}: {field.annotation.__doc__}"]
                lines += _field_lines(field.annotation, f"{name}.")
        lines += ["", "--help training lists the fields of TrainingArguments;"]
        lines += ["--help model.config those of GPT2Config."]
    return "\n".join(lines)


def _field_lines(model: type[BaseModel], prefix: str) -> list[str]:
    lines = []
    # What must be given comes first; the fields of a section that is built upon would otherwise.
    fields = sorted(model.model_fields.items(), key=lambda item: not item[1].is_required())
    for name, field in fields:
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            continue
        default = field.get_default(call_default_factory=True)
        # A default of None is explained by the field's own sentence.
        stated = field.is_required() or default is None
        required = "" if stated else f" (default: {_spelled(default)})"
        lines += _paragraph(
            f"--{prefix}{field.alias or name} {_kind(field.annotation)}",
            f"{field.description}{required}",
        )
    return lines


def _library_help(section: str, class_name: str, fields: dict[str, LibraryField]) -> str:
    lines = [f"{section}: the fields of the installed transformers.{class_name}"]
    for name, field in fields.items():
        said = f"{field.help} (default: {field.default})".strip()
        text = PUSHED_OUR_WAY.get(name, said) if section == "training" else said
        lines += _paragraph(f"--{section}.{name} {_kind(field.annotation)}", text)
    return "\n".join(lines)


def _paragraph(head: str, text: str) -> list[str]:
    return [
        f"  {head}",
        *textwrap.wrap(
            " ".join(text.split()), 88, initial_indent=" " * 8, subsequent_indent=" " * 8
        ),
    ]


def _spelled(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).split("\n")[0]


def _kind(annotation: Any) -> str:
    parts = [part for part in typing.get_args(annotation) if part is not type(None)]
    if typing.get_origin(annotation) is Literal:
        return "|".join(str(choice) for choice in parts)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType) and len(parts) == 1:
        return _kind(parts[0])
    if parts and isinstance(parts[0], type) and issubclass(parts[0], BaseModel):
        fields = ", ".join(parts[0].model_fields)
        return f"list of {{{fields}}}"
    if parts and typing.get_origin(parts[0]) is Literal:
        return f"list of {_kind(parts[0])}"
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    name = str(annotation) if parts else name
    return name.replace("typing.", "").replace(" | None", "").replace("NoneType", "null")
