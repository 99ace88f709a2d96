"""How many tokens a recipe's text has: counted where rows are prepared, else estimated."""

import math
import re
from typing import NamedTuple

from pipeline import artifact
from pipeline.data_sections import SourceSection
from pipeline.file_search import find_files
from pipeline.interpolation import between
from pipeline.recipe import Recipe

# Bytes of text that a token of a trained byte-level BPE holds, by its entries: measured on files of
# the standard library that it was not trained on (Python 3.11; Shakespeare's plays give 5 to 20 %
# less, English prose in GPT-2's tokens 10 % more).
BYTES_PER_TOKEN = {
    257: 1.0, 300: 1.47, 512: 2.07, 1024: 2.59, 2048: 3.05, 4096: 3.43, 8192: 3.72, 16384: 3.91,
    50257: 4.02,
}  # fmt: skip
# Data sets of the Hub whose names say how many tokens of GPT-2 they have, and the whole of one (its
# card: 1.3 trillion tokens).
NAMED_TOKENS = re.compile(r"sample-(\d+)BT")
KNOWN_TOKENS = {("HuggingFaceFW/fineweb-edu", "default"): 1.3e12}
PACKED = (".gz", ".zst", ".parquet")  # their bytes are not the text's


class TextSize(NamedTuple):
    """The text that one epoch trains on, held-out text and what does not fill a row left out."""

    tokens: float | None
    """None where it is known only when prepared."""
    source: str
    """How that is known."""
    is_counted: bool = False
    """Whether rows were counted, and not estimated."""
    validation_tokens: float | None = None
    test_tokens: float | None = None


def text_size(recipe: Recipe, vocabulary: int) -> TextSize:
    """Return how many training tokens the recipe's text has.

    Prepared rows tell; else the bytes of its files and `BYTES_PER_TOKEN` do, or a data set's name.

    Raises:
        InputError: a file or folder of `data:` is missing or empty.
    """
    section = recipe.data
    if not section.streaming and (found := _counted(recipe)) is not None:
        return found
    sizes = [_estimated(source, vocabulary) for source in section.all_sources]
    if any(tokens is None for tokens, _ in sizes):
        return TextSize(None, next(why for tokens, why in sizes if tokens is None))
    why = "; ".join(dict.fromkeys(why for _, why in sizes))
    total = sum(tokens for tokens, _ in sizes)
    if section.is_weighted and section.mixture_tokens is not None:
        return TextSize(section.mixture_tokens, "data.mixture_tokens")
    if section.is_weighted:  # the source that runs out first ends the epoch
        weighted = zip(sizes, section.all_sources, strict=True)
        total = min(tokens / source.weight for (tokens, _), source in weighted if source.weight)
        why += "; the weights of data.sources leave out some"
    shares = {split: section.held_out_fraction(split) for split in ("validation", "test")}
    left = 1 - sum(shares.values())
    tokens = math.floor(total * left / section.block_size) * section.block_size
    held_out = (
        None if section.has_own(split) else total * share for split, share in shares.items()
    )
    return TextSize(tokens, f"estimated: {why}", False, *held_out)


def bytes_per_token(vocabulary: int) -> float:
    """Return `BYTES_PER_TOKEN` for a number of entries, straight lines over its logarithm."""
    return between(sorted(BYTES_PER_TOKEN.items()), vocabulary)


def _counted(recipe: Recipe) -> TextSize | None:
    """Return what the recipe's prepared rows hold; None where there are none of its kind."""
    section, folder = recipe.data, recipe.blocks_dir
    manifest = artifact.read_manifest(folder)
    if manifest is None:
        return None
    facts, data = manifest["facts"], manifest["made_from"].get("data") or {}
    if any(data.get(name) != getattr(section, name) for name in ("block_size", "packing")):
        return None
    try:
        rows = facts["train"]["rows"]
        held_out = [facts[split]["tokens"] for split in ("validation", "test")]
        of_sources = [source["rows"] for source in facts["sources"]]
    except (KeyError, TypeError):
        return None
    if section.is_weighted:
        from pipeline.packing import mixture  # NumPy: a tenth of a second

        rows = sum(taken for _, _, taken in mixture(of_sources, section))
    source = f"counted: the rows prepared in {folder}"
    return TextSize(rows * section.block_size, source, True, *held_out)


def _estimated(source: SourceSection, vocabulary: int) -> tuple[float | None, str]:
    """Return a source's tokens, held-out ones too, and how that is known."""
    if source.dataset is not None:
        config = source.dataset_config or "default"
        if named := NAMED_TOKENS.fullmatch(config):
            return float(named[1]) * 1e9, f"the name of {source.dataset}'s {config}"
        if (source.dataset, config) in KNOWN_TOKENS:
            return KNOWN_TOKENS[source.dataset, config], f"the card of {source.dataset}"
        return None, f"known when prepared: {source.dataset} is not looked up on the Hub"
    files = find_files(source)
    if packed := next((path for _, path in files if path.suffix in PACKED), None):
        return None, f"known when prepared: {packed.name} is compressed"
    size, each = sum(path.stat().st_size for _, path in files), bytes_per_token(vocabulary)
    return size / each, f"{size / 1e6:,.1f} MB of files, {each:.2f} bytes a token assumed"
