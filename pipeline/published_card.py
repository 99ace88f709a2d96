"""A model card on its way to the Hub: the model's name, license and languages are put in."""

import re
from collections.abc import Sequence

from huggingface_hub import ModelCard
from yaml import YAMLError

from pipeline.recipe import InputError

# What a card says for the model's name as long as it has none; earlier versions wrote its folder's.
UNNAMED, ANY_UNNAMED = '"path/to/model"', r'"path/to/[^"\n]+"'


def snippet(name: str, prompt: str) -> str:
    """Return the Python that loads a model and lets it write; `name` is an expression."""
    return f"""from transformers import pipeline
write = pipeline("text-generation", {name})
print(write({prompt!r})[0]["generated_text"])"""


def quoted(repo_id: str, revision: str = "main") -> str:
    """Return a model's name as arguments of a Python call."""
    return f'"{repo_id}"' + (f', revision="{revision}"' if revision != "main" else "")


def published_card(
    card: str,
    repo_id: str,
    *,
    revision: str = "main",
    license: str | None = None,
    language: Sequence[str] = (),
) -> str:
    """Return a card, perhaps edited by hand, with the model's name on the Hub.

    `license` and `language` take the place of its own, if they are given.

    Raises:
        InputError: its metadata cannot be read.
    """
    card = re.sub(ANY_UNNAMED, quoted(repo_id, revision), card)
    try:
        read = ModelCard(card)
    except (ValueError, YAMLError) as error:
        said = " ".join(str(error).split())
        raise InputError(
            f"README.md: its metadata cannot be read: {said}; correct what stands between the two "
            "lines of ---"
        ) from None
    if not license and not language:
        return card
    read.data.license = license or read.data.license
    read.data.language = list(language) or read.data.language
    return str(read)


def stated_license(card: str) -> str | None:
    """Return the license that a card states."""
    return ModelCard(card).data.license
