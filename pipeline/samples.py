"""Texts for many prompts: in batches, numbered for a person, or as JSON lines."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TextIO

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline import artifact
from pipeline.generation import end_ids, new_ids
from pipeline.options import GenerateOptions
from pipeline.prompts import chat_ids, context_ids, fitted
from pipeline.recipe import InputError
from pipeline.sections import SamplingFields
from pipeline.whole_characters import WholeCharacters

# So many batches are sorted by length: a person reads on meanwhile, and little is lost with them.
SORTED_TOGETHER = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """A text that a model wrote."""

    prompt: str
    text: str
    """What came after the prompt, end-of-text left out."""
    sample: int
    """Its number among those of its prompt, from 1."""
    seed: int
    """With it and the same settings the text comes again, by itself."""
    finished: Literal["end-of-text", "length"]


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    options: GenerateOptions,
    *,
    out: TextIO,
    notes: TextIO,
) -> None:
    """Write `num_samples` texts for each prompt: a single one as it comes, several numbered.

    With `options.output` they go into that file, a JSON object a line, in place of `out`. `notes`
    is told of prompts that are cut.

    Raises:
        InputError: the file cannot be written, a prompt cannot be encoded, too little memory, or a
            model whose logits are no numbers.
    """
    contexts = [_context(prompt, model, tokenizer, options) for prompt in prompts]
    for number, (context, length) in enumerate(contexts, 1):
        if len(context) < length:
            which = f"prompt {number}: " if len(prompts) > 1 else ""
            notes.write(f"{which}{cut_note(length, context, model)}\n")
    ids = [context for context, _ in contexts]
    if options.output is not None:
        _keep(_samples(model, tokenizer, prompts, ids, options), options.output)
        out.write(f"{len(prompts) * options.num_samples:,} text(s) in {options.output}\n")
    elif len(prompts) * options.num_samples == 1:
        out.write("" if options.chat else prompts[0])
        for piece in streamed(model, tokenizer, ids[0], options):
            out.write(piece)
            out.flush()
        out.write("\n")
    else:
        for number, sample in _samples(model, tokenizer, prompts, ids, options):
            head = [f"prompt {number} of {len(prompts)}"] if len(prompts) > 1 else []
            if options.num_samples > 1:
                head += [f"sample {sample.sample} of {options.num_samples}, seed {sample.seed}"]
            text = sample.text if options.chat else sample.prompt + sample.text
            out.write(f"--- {', '.join(head)}\n{text}\n\n")
            out.flush()


def streamed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: list[int],
    sampling: SamplingFields,
) -> Iterator[str]:
    """Yield a text in whole characters, as it is written.

    Raises:
        InputError: see `write`.
    """
    characters, ends = WholeCharacters(tokenizer), end_ids(model, tokenizer)
    with _said(1):
        for [number] in new_ids(model, [context], [sampling.seed], sampling, ends):
            if number not in ends and (piece := characters.push(number)):
                yield piece
    if rest := characters.flush():
        yield rest


def cut_note(length: int, context: list[int], model: PreTrainedModel) -> str:
    """Return the sentence that says what of a long prompt of so many tokens is read."""
    return (
        f"the prompt has {length:,} tokens and the model {model.config.max_position_embeddings:,} "
        f"positions: it goes on from the last {len(context):,} of them"
    )


def _context(
    prompt: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: GenerateOptions,
) -> tuple[list[int], int]:
    """Return the ids to go on from and how many the prompt has."""
    if options.chat:
        ids = chat_ids([{"role": "user", "content": prompt}], tokenizer)
    else:
        ids = context_ids(prompt, tokenizer)
    positions = model.config.max_position_embeddings
    return fitted(ids, positions=positions, max_new_tokens=options.max_new_tokens), len(ids)


def _samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    contexts: list[list[int]],
    options: GenerateOptions,
) -> Iterator[tuple[int, Sample]]:
    """Yield each text with the number of its prompt, from 1, in their order."""
    ends, size = end_ids(model, tokenizer), options.batch_size
    wanted = [(p, n) for p in range(len(prompts)) for n in range(options.num_samples)]
    with tqdm(total=len(wanted), desc="writing", unit="text", delay=2, disable=None) as bar:
        for start in range(0, len(wanted), SORTED_TOGETHER * size):
            part = wanted[start : start + SORTED_TOGETHER * size]
            found: dict[tuple[int, int], Sample] = {}
            # Longest first: what does not fit into memory is known at once.
            by_length = sorted(part, key=lambda one: -len(contexts[one[0]]))
            for batch in (by_length[i : i + size] for i in range(0, len(part), size)):
                seeds = [(options.seed + n) % 2**32 for _, n in batch]
                ids: list[list[int]] = [[] for _ in batch]
                with _said(size):
                    for step in new_ids(
                        model, [contexts[p] for p, _ in batch], seeds, options, ends
                    ):
                        for row, number in enumerate(step):
                            ids[row] += [] if number is None else [number]
                for (p, n), seed, written in zip(batch, seeds, ids, strict=True):
                    found[p, n] = Sample(
                        prompt=prompts[p],
                        text=tokenizer.decode(written, skip_special_tokens=True),
                        sample=n + 1,
                        seed=seed,
                        finished="end-of-text" if written[-1] in ends else "length",
                    )
                bar.update(len(batch))
            yield from ((p + 1, found[p, n]) for p, n in part)


@contextlib.contextmanager
def _said(batch_size: int) -> Iterator[None]:
    """Turn what a person can mend into a sentence."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if "finite" in str(error):
            raise InputError(
                "the model's logits are not finite numbers; its weights are damaged, take an "
                "earlier checkpoint"
            ) from None
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        raise InputError(
            f"--batch_size {batch_size}: so many texts together do not fit into memory; lower it"
            if batch_size > 1
            else "the text does not fit into memory; lower --max_new_tokens or shorten the prompt"
        ) from None


def _keep(samples: Iterator[tuple[int, Sample]], output: str) -> None:
    """Write JSON lines as they come: those before an interruption stay."""
    path = Path(output)
    if path.suffix != ".jsonl":
        raise InputError(f"--output {output}: JSON lines are written; give a name in .jsonl")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"--output {output}: cannot be written; give a file in a folder that can")
    with artifact.full_disk_said(path.parent), path.open("w", encoding="utf-8") as file:
        for _, sample in samples:
            file.write(json.dumps(dataclasses.asdict(sample), ensure_ascii=False) + "\n")
            file.flush()
