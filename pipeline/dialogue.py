"""A person at a terminal and a model: a line is typed, the text streams, settings change."""

import contextlib
from pathlib import Path
from typing import TextIO

from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.options import PRESETS, GenerateOptions
from pipeline.prompts import Messages, chat_ids, context_ids, fitted
from pipeline.recipe import InputError, sentence_of
from pipeline.samples import cut_note, streamed
from pipeline.sections import SamplingFields

SETTINGS = (*SamplingFields.model_fields, "preset")
HELP = f"""A line is a prompt, and the model goes on; Ctrl-C stops it, Ctrl-D ends.
/{" /".join(SETTINGS)}
          each followed by a value, as in /temperature 0.7; the seed rises by one with each text
/new      forget the conversation
/help     this, and the settings as they are
/quit     the end
//        begins a prompt that begins with /
"""


class Dialogue:
    """What was said, and the settings for what comes next."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: GenerateOptions,
        *,
        out: TextIO,
        notes: TextIO,
    ) -> None:
        """Write texts to `out` and all else to `notes`.

        Raises:
            InputError: a chat is asked for, and the tokenizer has no template.
        """
        self._model, self._tokenizer, self._out, self._notes = model, tokenizer, out, notes
        has_template = tokenizer.chat_template is not None
        self._options = options.model_copy(
            update={"chat": has_template if options.chat is None else options.chat}
        )
        self._messages: Messages = []
        if self._options.chat:
            chat_ids([{"role": "user", "content": "?"}], tokenizer)

    def run(self) -> None:
        """Answer lines from the standard input until it ends; Ctrl-C ends a text, not the whole."""
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  `input` then edits lines and remembers them
        kind = "A chat: what is said is kept until /new" if self._options.chat else "Type a prompt"
        self._notes.write(f"{kind}. Ctrl-C stops a text, Ctrl-D ends, /help lists the settings.\n")
        sign = "> " if self._out.isatty() else ""
        while True:
            try:
                self.answer(input(sign))
            except EOFError:
                self._out.write("\n" if sign else "")
                return
            except KeyboardInterrupt:
                self._out.write("\n")
            except UnicodeDecodeError:
                self._notes.write("error: the line is not text in UTF-8\n")
            except InputError as error:
                self._notes.write(f"error: {error}\n")
            self._out.flush()
            self._notes.flush()

    def answer(self, line: str) -> None:
        """Do what a command says, or write the text that a prompt begins.

        Raises:
            InputError: the command or its value is wrong, or the text cannot be written.
        """
        if line.startswith("/") and not line.startswith("//"):
            name, _, value = line[1:].strip().partition(" ")
            self._obey(name, value.strip())
            return
        line = line[1:] if line.startswith("//") else line
        if self._options.chat and not line.strip():
            return
        options, written = self._options, []
        self._options = options.model_copy(update={"seed": (options.seed + 1) % 2**32})
        question = {"role": "user", "content": line}
        if options.chat:
            ids = chat_ids([*self._messages, question], self._tokenizer)
        else:
            ids = context_ids(line, self._tokenizer)
        positions = self._model.config.max_position_embeddings
        context = fitted(ids, positions=positions, max_new_tokens=options.max_new_tokens)
        if len(context) < len(ids):
            self._notes.write(f"{cut_note(len(ids), context, self._model)}\n")
            self._notes.flush()
        self._out.write("" if options.chat else line)
        try:
            for piece in streamed(self._model, self._tokenizer, context, options):
                written.append(piece)
                self._out.write(piece)
                self._out.flush()
            self._out.write("\n")
        finally:  # a stopped answer was read, too
            if options.chat and written:
                self._messages += [question, {"role": "assistant", "content": "".join(written)}]

    def _obey(self, name: str, value: str) -> None:
        options = self._options
        if name in ("quit", "exit"):
            raise EOFError
        if name == "help":
            now = ", ".join(f"{name} {getattr(options, name)}" for name in SETTINGS[:-1])
            self._notes.write(f"{HELP}Now: {now}\n")
        elif name == "new":
            self._messages.clear()
        elif name not in SETTINGS:
            raise InputError(f"/{name}: no such command; /help lists them")
        elif not value:
            raise InputError(f"/{name}: a value is missing, as in /temperature 0.7")
        else:
            replaced = PRESETS["balanced"] if name == "preset" else {}
            kept = {k: v for k, v in options.model_dump().items() if k not in replaced}
            try:
                self._options = GenerateOptions.model_validate(kept | {name: value})
            except ValidationError as error:
                said = sentence_of(error, GenerateOptions, {name: value}, Path(f"/{name}"))
                raise InputError(said.replace("--", "/", 1)) from None
