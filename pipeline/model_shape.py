"""The shape of a recipe's model and the parameters that it trains, known without torch."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.planning import Shape, known_shape, parameters, parameters_by_part
from pipeline.reach import check_local
from pipeline.recipe import InputError, Recipe
from pipeline.sections import ModelSection

# Fields of GPT2Config that follow from the tokenizer and the rows; stating one is an error.
DERIVED = {
    "vocab_size": "it is the tokenizer's (tokenizer.vocab_size)",
    "n_positions": "it is data.block_size",
    "bos_token_id": "it is the tokenizer's end-of-text",
    "eos_token_id": "it is the tokenizer's end-of-text",
    "pad_token_id": "it is the tokenizer's end-of-text",
}
DEFAULTS = {"n_embd": 768, "n_layer": 12, "n_head": 12}  # GPT2Config's: GPT-2 small
GPT2_VOCABULARY = 50_257  # Radford et al. 2019, section 2.2


class PlannedModel(NamedTuple):
    """A model that has not been built."""

    shape: Shape
    parameters: int
    """With those of an adapter."""
    trained: int
    still: int
    """Parameters of the lowest blocks, below all that is trained: no gradient passes them."""
    still_layers: int
    vocabulary_source: str
    """How the vocabulary is known, or that it is assumed."""


def check_pretrained(
    section: ModelSection, *, positions: int, layers: int, block_size: int
) -> None:
    """Check that a pretrained model has the positions and blocks that the recipe asks of it.

    Raises:
        InputError: it has not.
    """
    if block_size > positions:
        raise InputError(
            f"data.block_size is {block_size}, but {section.pretrained} has {positions} positions; "
            "set data.block_size to that or less"
        )
    if section.frozen_blocks > layers:
        raise InputError(
            f"model.frozen_blocks is {section.frozen_blocks}, but {section.pretrained} has "
            f"{layers} blocks"
        )


def check_config(config: dict[str, Any]) -> None:
    """Check what of `model.config` sets the shape.

    Raises:
        InputError: a derived field is stated, a size is below 1, or the heads do not divide the
            width.
    """
    for name in config:
        if name in DERIVED:
            raise InputError(f"model.config.{name}: is derived, leave it out: {DERIVED[name]}")
    stated = {
        name: size for name in (*DEFAULTS, "n_inner") if (size := config.get(name)) is not None
    }
    sizes = DEFAULTS | stated
    if not all(isinstance(size, int) for size in sizes.values()):
        return  # GPT2Config refuses it
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"model.config.{name}: must be at least 1; got {size}")
    if sizes["n_embd"] % sizes["n_head"]:
        raise InputError(
            f"model.config.n_embd: {sizes['n_embd']} is not a multiple of n_head "
            f"{sizes['n_head']}; every head has n_embd / n_head dimensions"
        )


def planned_model(recipe: Recipe) -> PlannedModel:
    """Return the shape and parameters of a recipe's model.

    Raises:
        InputError: see `check_config`; or the pretrained model is missing, not a GPT-2, smaller
            than the recipe wants it, or on the Hub under a name that is not known here.
    """
    section, block_size = recipe.model, recipe.data.block_size
    entries, source = _vocabulary(recipe)
    if section.pretrained is None:
        check_config(section.config)
        sizes = DEFAULTS | section.config
        shape = Shape(
            sizes["n_layer"], sizes["n_embd"], sizes["n_head"], entries, block_size,
            inner=sizes.get("n_inner"),
        )  # fmt: skip
        count = parameters(shape)
        return PlannedModel(shape, count, count, 0, 0, source)
    shape = _pretrained(section)
    check_pretrained(section, positions=shape.positions, layers=shape.layers, block_size=block_size)
    if section.cut_positions:
        shape = shape._replace(positions=block_size)
    if recipe.tokenizer.added_tokens:
        wanted = max(shape.vocabulary, entries)
        shape = shape._replace(vocabulary=wanted)
    return _trained(section, shape, f"{section.pretrained}'s")


def _trained(section: ModelSection, shape: Shape, source: str) -> PlannedModel:
    """Count what learns, as `pipeline.adaptation` chooses it."""
    count, sizes = parameters(shape), parameters_by_part(shape)
    if section.lora_r is not None:
        width, inner = shape.width, shape.mlp_width
        sides = {
            "attn.c_attn": 4 * width, "attn.c_proj": 2 * width,
            "mlp.c_fc": width + inner, "mlp.c_proj": inner + width,
        }  # fmt: skip
        adapter = section.lora_r * shape.layers * sum(sides[n] for n in section.lora_target_modules)
        return PlannedModel(shape, count + adapter, adapter, 0, 0, source)
    embeddings = sizes["embedding"] + sizes["positions"]
    block = (count - embeddings - 2 * shape.width) // shape.layers  # the last norm is outside
    frozen, frozen_embeddings = section.frozen_blocks * block, section.frozen_embeddings
    trained = count - frozen - embeddings * frozen_embeddings
    is_still = frozen_embeddings  # the embeddings lie below all blocks
    return PlannedModel(
        shape, count, trained, frozen * is_still, section.frozen_blocks * is_still, source
    )


def _vocabulary(recipe: Recipe) -> tuple[int, str]:
    """Return the entries of the recipe's tokenizer and how they are known."""
    section = recipe.tokenizer
    prepared = recipe.tokenizer_dir / "tokenizer.json"
    if section.vocab_size is not None:
        # A short text has fewer pairs than are asked for.
        if prepared.is_file() and (found := _entries(prepared)) < section.vocab_size:
            return found, f"the trained tokenizer's, in {recipe.tokenizer_dir}"
        return section.vocab_size, "tokenizer.vocab_size"
    name = section.pretrained
    if name is None:  # the pretrained model's
        if not section.added_tokens:
            return 0, ""
        return _pretrained(recipe.model).vocabulary + len(section.added_tokens), ""
    if (Path(name) / "tokenizer.json").is_file():
        return _entries(Path(name) / "tokenizer.json") + len(section.added_tokens), f"{name}'s"
    if known_shape(name) is not None:
        return known_shape(name).vocabulary + len(section.added_tokens), f"{name}'s"
    return (
        GPT2_VOCABULARY + len(section.added_tokens),
        f"assumed, GPT-2's: {name} is not looked up on the Hub",
    )


def _entries(file: Path) -> int:
    """Return the number of a tokenizer's entries, special tokens included."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        ids = set(found["model"]["vocab"].values())
        return len(ids | {token["id"] for token in found.get("added_tokens") or []})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise InputError(
            f"{file}: cannot be read as a tokenizer; write it again, or name another"
        ) from None


def _pretrained(section: ModelSection) -> Shape:
    name = section.pretrained
    folder = Path(name)
    if not folder.exists():
        if (known := known_shape(name)) is not None:
            return known
        raise InputError(
            f"model.pretrained {name}: no such folder here, and a plan fetches nothing from the "
            "Hub; give OpenAI's gpt2, gpt2-medium, gpt2-large or gpt2-xl, or the folder of a model"
        )
    check_local(name, "model", "config.json")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.get("model_type")
        shape = Shape(
            config["n_layer"], config["n_embd"], config["n_head"], config["vocab_size"],
            config["n_positions"], inner=config.get("n_inner"),
        )  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise InputError(
            f"{folder / 'config.json'}: cannot be read as the configuration of a GPT-2; write it "
            "again, or name another model"
        ) from None
    if kind != "gpt2":
        raise InputError(f"model.pretrained {name}: is a {kind}, not a GPT-2")
    return shape
