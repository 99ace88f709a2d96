"""Prompts: read from what is typed or a file, and as the ids that a model goes on from.

No torch: a file that is missing or wrong is said before a model is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.options import GenerateOptions
from pipeline.recipe import InputError, first_line
from pipeline.text_files import named_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]  # {"role": "user", "content": ...}, as chat templates take them


def read_prompts(options: GenerateOptions, *, at_terminal: bool) -> list[str] | None:
    """Return the prompts that the options give, None where a person will type them.

    Raises:
        InputError: there are none, or the file is missing or not what its name says.
    """
    if options.prompts_file is not None:
        return _read_file(options.prompts_file)
    if options.prompt is not None:
        _check_text(options.prompt, "--prompt")
        return [options.prompt]
    if options.interactive:
        return None
    if not at_terminal:
        raise InputError(
            "give the beginning of the text by --prompt or --prompts_file (or type it, with "
            "--interactive)"
        )
    if options.num_samples > 1 or options.output is not None:
        raise InputError("--num_samples and --output need --prompt or --prompts_file")
    return None


def context_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return a prompt's ids, of an empty one end-of-text, after which a document begins.

    <|endoftext|> and other special tokens that are spelt out in a prompt are control tokens.

    Raises:
        InputError: it holds bytes that are not UTF-8.
    """
    _check_text(prompt, "the prompt")
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    return ids or [tokenizer.eos_token_id]


def chat_ids(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of a conversation in the tokenizer's template, up to the model's answer.

    Raises:
        InputError: the tokenizer has no template, or it refuses the conversation.
    """
    if tokenizer.chat_template is None:
        raise InputError(
            "--chat: this model's tokenizer has no chat template, it goes on with texts; leave "
            "--chat out"
        )
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # whatever a template does and raises
        raise InputError(
            f"--chat: the tokenizer's chat template fails: {first_line(error)}"
        ) from None
    return context_ids(text, tokenizer)


def fitted(ids: list[int], *, positions: int, max_new_tokens: int) -> list[int]:
    """Return the end of a prompt that leaves room for what is new, at least half the positions.

    A prompt with fewer tokens than positions is left as it is: the text goes on from its last half
    when the positions are full.
    """
    if len(ids) < positions:
        return ids
    return ids[-max(1, positions // 2, positions - max_new_tokens) :]


def _read_file(name: str) -> list[str]:
    path = Path(name)
    if path.suffix not in (".txt", ".jsonl"):
        raise InputError(
            f"--prompts_file {name}: prompts are read from .txt, one a line, or .jsonl with a "
            'field "prompt"'
        )
    try:
        with named_errors(f"--prompts_file {name}"):
            text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"--prompts_file {name}: byte {error.object[error.start]:#04x} at offset {error.start} "
            "is not UTF-8; convert the file"
        ) from None
    lines = enumerate((line.removesuffix("\r") for line in text.split("\n")), 1)
    filled = [(number, line) for number, line in lines if line.strip()]
    if path.suffix == ".jsonl":
        prompts = [_prompt_of(line, f"--prompts_file {name}, line {n}") for n, line in filled]
    else:
        prompts = [line for _, line in filled]
    if not prompts:
        raise InputError(f"--prompts_file {name}: there is no prompt in this file")
    return prompts


def _prompt_of(line: str, where: str) -> str:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: is not JSON: {first_line(error)}") from None
    if not isinstance(values, dict) or "prompt" not in values:
        has = f"has {', '.join(values)}" if isinstance(values, dict) and values else "has no fields"
        raise InputError(f'{where}: has no field "prompt"; it {has}')
    if not isinstance(values["prompt"], str):
        raise InputError(f'{where}: "prompt" is {values["prompt"]!r}, not text')
    _check_text(values["prompt"], where)
    return values["prompt"]


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # what Python makes of bytes on a command line that are not UTF-8
        raise InputError(f"{where}: is not text in UTF-8") from None
