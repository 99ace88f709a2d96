"""A page on which a model writes, as Hugging Face Spaces run it; `demo.json` says which model.

With MODEL=path/to/a/folder it is the model of that folder.
"""

import html
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio as gr
import torch
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

# Tokens, while others wait: each of GPT-2 small's reads 0.5 GB of weights, and two cores read some
# 10 GB a second, so that this many take half a minute.
LONGEST_TEXT = 500
LONGEST_PROMPT = 100_000  # characters; of more the end is taken, and no model here sees as many
MOST_WAITING = 30  # people, beyond whom one is told that the queue is full

# The head of the page in line with what is below it, and a long title within a narrow screen.
CSS = """
#head .html-container, #head a { padding: 0; }
#head h1, #head p { overflow-wrap: anywhere; }
"""


class Stream(TextIteratorStreamer):
    """The text as it comes, through several calls of `generate`, and never half a character."""

    def __init__(self, tokenizer) -> None:
        super().__init__(
            tokenizer,
            skip_prompt=True,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        self.is_wanted = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, or the next token; leave `generate` where nobody waits for it."""
        if not self.is_wanted:
            raise InterruptedError("nobody waits for the text")
        super().put(value)

    def end(self) -> None:
        """End a call of `generate`, not the text: the next call begins with a prompt again."""
        self.next_tokens_are_prompt = True

    def close(self) -> None:
        """End the text."""
        super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass text on, less the character that is unfinished where the text was cut."""
        super().on_finalized_text(text.rstrip("\ufffd") if stream_end else text, stream_end)


class Writer:
    """A model with its tokenizer, and the text that it writes."""

    def __init__(self, name: str) -> None:
        """Load them from the Hub or a folder; an adapter comes with the model that it adapts."""
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError):  # an adapter without one has its model's
            self.tokenizer = AutoTokenizer.from_pretrained(self.model.name_or_path)

    def write(
        self,
        prompt: str | None,
        temperature: float,
        top_k: int,
        top_p: float,
        new_tokens: int,
        seed: int | None,
    ) -> Iterator[tuple[str, str]]:
        """Yield the prompt with what is written so far, and a note about it."""
        end_of_text = self.tokenizer.eos_token_id
        prompt = (prompt or "")[-LONGEST_PROMPT:]
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        context = torch.tensor([ids or [end_of_text]])  # an empty prompt begins a document
        notes = []
        if context.shape[1] >= self.positions:
            notes = [
                f"The prompt is too long for this model, which sees {self.positions} tokens at "
                f"once: it read only the last {self.read_again}."
            ]
        sampling = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature}
            sampling |= {"top_k": int(top_k), "top_p": top_p}
        stream = Stream(self.tokenizer)
        text = prompt
        with ThreadPoolExecutor(max_workers=1) as executor:
            new_tokens = min(int(new_tokens), LONGEST_TEXT)
            work = (stream, context, new_tokens, sampling, int(seed or 0))
            written = executor.submit(self._write_into, *work)
            try:
                yield text, " ".join(notes)
                for piece in filter(None, stream):
                    text += piece
                    yield text, " ".join(notes)
            finally:  # also when somebody presses Stop or closes the page
                stream.is_wanted = False
        if written.result():
            notes.append("The model ended the text here.")
        yield text, " ".join(notes)

    @property
    def positions(self) -> int:
        """Tokens that the model sees at once."""
        return self.model.config.max_position_embeddings

    @property
    def read_again(self) -> int:
        """Tokens from whose end the text goes on when all positions are taken."""
        return max(1, self.positions // 2)

    def _write_into(
        self,
        stream: Stream,
        context: torch.Tensor,
        new_tokens: int,
        sampling: dict,
        seed: int,
    ) -> bool:
        """Write, and return whether the model ended the text itself."""
        end_of_text = self.tokenizer.eos_token_id
        torch.manual_seed(seed)  # the process's own: one text is written at a time
        try:
            while new_tokens > 0:
                if context.shape[1] >= self.positions:
                    context = context[:, -self.read_again :]
                length = min(new_tokens, self.positions - context.shape[1])
                context = self.model.generate(
                    input_ids=context,
                    attention_mask=torch.ones_like(context),
                    max_new_tokens=length,
                    eos_token_id=end_of_text,
                    pad_token_id=end_of_text,
                    streamer=stream,
                    **sampling,
                )
                if context[0, -1] == end_of_text:
                    return True
                new_tokens -= length
            return False
        except InterruptedError:
            return False
        finally:
            stream.close()


def reason(error: BaseException, name: str) -> str:
    """Return what a person can do about a model that cannot be loaded."""
    cause = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None and cause.response.status_code in (401, 403, 404):
        return (
            f"{name} is not on the Hub, or it is private and this Space may not read it: give the "
            "Space a secret HF_TOKEN (Settings, Variables and secrets), a token that may."
        )
    if isinstance(error, NotADirectoryError):
        return f"MODEL={name} is no folder; it names the folder of a saved model."
    said = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return (
        f"{name} could not be loaded ({type(error).__name__}: {said}). If it is the network, "
        "restart the Space; if not, publish the model again."
    )


def head(title: str, sentence: str) -> None:
    """Put a title and a sentence, which may have tags, on the page."""
    gr.HTML(f"<h1>{html.escape(title)}</h1><p>{sentence}</p>", elem_id="head")


def writing_page(writer: Writer, *, title: str, model: str, prompts: list[str]) -> gr.Blocks:
    """Return the page with its text boxes, its settings and its buttons."""
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        model = html.escape(model)
        link = f'<a href="https://huggingface.co/{model}" target="_blank">{model}</a>'
        head(title, f"{link} goes on from your text. It makes up what it writes.")
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(
                    label="Prompt",
                    lines=5,
                    max_lines=12,
                    max_length=LONGEST_PROMPT,
                    placeholder="A beginning, which the model goes on from. Empty: a new text.",
                )
                with gr.Row():
                    go = gr.Button("Write", variant="primary", min_width=100)
                    stop = gr.Button("Stop", min_width=100)
                if prompts:
                    gr.Examples([[text] for text in prompts], prompt, label="Prompts to try")
            with gr.Column():
                text = gr.Textbox(label="Text", lines=12, max_lines=24, buttons=["copy"])
                note = gr.Markdown()
        with gr.Accordion("Settings"):
            with gr.Row():
                temperature = gr.Slider(
                    0, 2, 0.8, step=0.05, label="Temperature",
                    info="Low: likely words; high: surprising ones; 0: always the likeliest.",
                )  # fmt: skip
                top_k = gr.Slider(
                    0, 200, 40, step=1, label="Top-k",
                    info="Choose among this many likeliest tokens; 0: all.",
                )  # fmt: skip
                top_p = gr.Slider(
                    0.05, 1, 1, step=0.05, label="Top-p",
                    info="Choose among the likeliest that together have this probability.",
                )  # fmt: skip
            with gr.Row():
                new_tokens = gr.Slider(
                    1, LONGEST_TEXT, 80, step=1, label="Length",
                    info="Tokens at most; a token is a word or a part of one.",
                )  # fmt: skip
                seed = gr.Number(
                    0, minimum=0, maximum=2**32 - 1, precision=0, label="Seed",
                    info="The same seed and settings write the same text.",
                )  # fmt: skip
        writing = gr.on(
            [go.click, prompt.submit],
            writer.write,
            [prompt, temperature, top_k, top_p, new_tokens, seed],
            [text, note],
            concurrency_limit=1,
            show_progress="minimal",
            api_name="write",
        )
        stop.click(None, cancels=[writing])
    return page


def failure_page(title: str, sentence: str) -> gr.Blocks:
    """Return the page that says why there is nothing to try."""
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        head(title, html.escape(sentence))
    return page


def main() -> None:
    """Load the model, serve the page."""
    demo = json.loads(Path(__file__).with_name("demo.json").read_text(encoding="utf-8"))
    name = os.environ.get("MODEL") or demo["model"]
    try:
        if os.environ.get("MODEL") and not Path(name).is_dir():
            raise NotADirectoryError(name)
        page = writing_page(Writer(name), **demo)
    except Exception as error:  # network, name, token, file format
        sentence = reason(error, name)
        logging.exception(sentence)
        page = failure_page(demo["title"], sentence)
    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"])
    theme.set(block_info_text_color="*neutral_500")  # its own cannot be read on white
    page.queue(max_size=MOST_WAITING)
    page.launch(
        theme=theme, css=CSS, ssr_mode=False, run_history=False, footer_links=["api", "gradio"]
    )


if __name__ == "__main__":
    main()
