"""Weights from elsewhere become a folder that transformers opens, and that is whole or absent."""

import dataclasses
import shlex
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline import artifact
from pipeline.foreign_weights import SIZES, activation_of, config_of, foreign_model
from pipeline.merging import base_of, merged_model
from pipeline.model import parameter_count, set_generation_fields
from pipeline.options import ConvertOptions
from pipeline.recipe import InputError
from pipeline.tokenizer import load_tokenizer
from pipeline.weights import Kind, Weights, open_weights

GPT2_VOCABULARY = 50_257  # GPT-2's entries; the last is <|endoftext|>
LARGEST_PADDING = 128  # tables of embeddings are filled up to a multiple of 64 or of this
PADDED_VOCABULARY = 50_304  # nanoGPT's default: those, up to a multiple of 64


@dataclasses.dataclass(frozen=True)
class _Converted:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    origin: str
    notes: list[str]
    """What a person should know who did not look at the source."""

    @property
    def size(self) -> str:
        vocabulary = self.model.config.vocab_size
        return f"{parameter_count(self.model):,} parameters, a vocabulary of {vocabulary:,}"


def convert(options: ConvertOptions) -> str:
    """Write the source's weights to the output folder and return a summary.

    Raises:
        InputError: the source is missing, damaged or of no known kind; tokenizer and weights do not
            fit; or the output folder is not free.
    """
    weights, folder = _source(options), Path(options.output_dir)
    sources = [Path(options.source), weights.path]
    if weights.kind == Kind.ADAPTER:
        sources.append(Path(base_of(weights)))
    _check_free(folder, sources, overwrite=options.overwrite)
    own = _own_tokenizer(weights)
    if own is not None and options.tokenizer is not None:
        raise InputError(f"--tokenizer: {options.source} has its own tokenizer; leave it out")
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer is not None else own
    if weights.kind == Kind.ADAPTER:
        converted = _merged(weights, tokenizer)
    else:
        converted = _translated(weights, tokenizer, options.activation)
    made_from = {"converted_from": str(weights.path)}
    with artifact.staged(folder, made_from) as (staging, facts):
        facts["notes"] = converted.notes
        converted.model.save_pretrained(staging)
        if converted.tokenizer is not None:
            converted.tokenizer.save_pretrained(staging)
        (staging / "README.md").write_text(_card(folder.name, converted), encoding="utf-8")
    return _summary(folder, converted)


def _source(options: ConvertOptions) -> Weights:
    source = Path(options.source)
    if not source.exists():
        raise InputError(f"--source {source}: no such file or folder; looked in {Path.cwd()}")
    weights = open_weights(options.source)
    if weights.kind == Kind.MODEL:
        raise InputError(f"--source {source}: is a folder of transformers already")
    if weights.kind not in (*SIZES, Kind.ADAPTER):
        raise InputError(
            f"--source {source}: is a {weights.kind} and does not say its model's sizes; give "
            "nanoGPT's ckpt.pt, the folder of an OpenAI checkpoint, or that of a LoRA adapter"
        )
    if options.activation is not None and weights.kind != Kind.NANOGPT:
        raise InputError(
            f"--activation: has no meaning with a {weights.kind}, which {source} is; leave it out"
        )
    return weights


def _check_free(folder: Path, sources: list[Path], *, overwrite: bool) -> None:
    if not folder.exists():
        return
    for source in sources:
        if source.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"--output_dir {folder}: {source} lies there; name another folder")
    manifest = artifact.read_manifest(folder)
    if manifest is None or "converted_from" not in manifest["made_from"]:
        raise InputError(
            f"--output_dir {folder}: exists, and no conversion wrote it; name another folder"
        )
    if not overwrite:
        raise InputError(
            f"--output_dir {folder}: holds an earlier conversion; add --overwrite to replace it, "
            "or name another folder"
        )


def _own_tokenizer(weights: Weights) -> PreTrainedTokenizerBase | None:
    folder = weights.path
    if weights.kind == Kind.ADAPTER and (folder / "tokenizer_config.json").exists():
        return load_tokenizer(str(folder))
    # As OpenAI named the files, and as transformers does.
    files = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}
    if weights.kind != Kind.TENSORFLOW or not all((folder / name).is_file() for name in files):
        return None
    with tempfile.TemporaryDirectory() as copy:
        for theirs, name in files.items():
            shutil.copyfile(folder / theirs, Path(copy) / name)
        try:
            tokenizer = load_tokenizer(copy)
        except InputError as error:
            raise InputError(str(error).replace(copy, f"{folder / 'encoder.json'}")) from None
    tokenizer.name_or_path = str(folder)
    return tokenizer


def _merged(weights: Weights, tokenizer: PreTrainedTokenizerBase | None) -> _Converted:
    model, base = merged_model(weights), base_of(weights)
    if tokenizer is None:
        try:
            tokenizer = load_tokenizer(base)
        except InputError as error:
            raise InputError(f"{error}; --tokenizer names another place") from None
    _check_fits(tokenizer, model.config.vocab_size, weights)
    set_generation_fields(model, tokenizer.eos_token_id)
    notes = []
    if not model.config.tie_word_embeddings:
        notes.append("the output layer has weights of its own, not the embedding's")
    named = Path(base).name if Path(base).exists() else base
    origin = f"the LoRA adapter {weights.path.name}, merged into {named}"
    return _Converted(model, tokenizer, origin, notes)


def _translated(
    weights: Weights, tokenizer: PreTrainedTokenizerBase | None, activation: str | None
) -> _Converted:
    had, notes = config_of(weights).vocab_size, []
    rows, end_of_text = had, None
    if tokenizer is not None:
        _check_fits(tokenizer, had, weights)
        rows, end_of_text = len(tokenizer), tokenizer.eos_token_id
    elif had in (GPT2_VOCABULARY, PADDED_VOCABULARY):
        rows, end_of_text = GPT2_VOCABULARY, GPT2_VOCABULARY - 1
    if had - rows >= LARGEST_PADDING:
        raise InputError(
            f"--tokenizer has {rows:,} entries, and the embedding {had:,} rows: that is more than "
            f"filling up to a multiple of {LARGEST_PADDING}, so it is not the model's; give the "
            "tokenizer that it was trained with"
        )
    if rows < had:
        whose = "GPT-2's" if tokenizer is None else "the tokenizer's"
        notes.append(
            f"{had - rows:,} rows of the embedding beyond {whose} {rows:,} entries are cut off"
        )
    model = foreign_model(weights, activation=activation, vocab_size=rows)
    set_generation_fields(model, end_of_text)
    if weights.kind == Kind.NANOGPT:
        why = (
            "as --activation said" if activation is not None
            else "nanoGPT's since 17 May 2023; of an older checkpoint say --activation gelu_new"
            if activation_of(weights) == "gelu"
            else "nanoGPT's of January 2023, from before model_args said bias"
        )  # fmt: skip
        notes.append(f"the activation function is {model.config.activation_function} ({why})")
    if tokenizer is None:
        known = end_of_text is not None
        name = "openai-community/gpt2" if known else "FOLDER"
        notes.append(
            f"there is no tokenizer in the folder; with --tokenizer {name} there would be one"
        )
    return _Converted(model, tokenizer, f"the {weights.kind} {weights.path.name}", notes)


def _check_fits(tokenizer: PreTrainedTokenizerBase, rows: int, weights: Weights) -> None:
    if len(tokenizer) > rows:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path} has {len(tokenizer):,} entries, but the "
            f"embedding of {weights.path} only {rows:,} rows; give by --tokenizer the one that it "
            "was trained with"
        )


def _card(name: str, converted: _Converted) -> str:
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["gpt2"]
    )  # fmt: skip
    snippet = f"""
```python
from transformers import pipeline
write = pipeline("text-generation", "path/to/{name}")
print(write("The ")[0]["generated_text"])
```
"""
    notes = "".join(f"- {note[0].upper()}{note[1:]}.\n" for note in converted.notes)
    return f"""---
{data.to_yaml()}
---

# {name}

{converted.size}, in fp32. Converted from {converted.origin}; the logits are the same.

{notes}{snippet if converted.tokenizer is not None else ""}"""


def _summary(folder: Path, converted: _Converted) -> str:
    lines = [*converted.notes, f"{folder}: {converted.size}, from {converted.origin}"]
    if converted.tokenizer is not None:
        named = shlex.quote(str(folder))
        lines.append(f'python pipeline/generate.py --model {named} --prompt "Once upon a time"')
    return "\n".join(lines)
