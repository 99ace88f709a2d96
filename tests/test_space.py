"""The page on which a published model can be tried: its files, its text, and a real browser."""

import contextlib
import http.server
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from conftest import roughened
from screens import DESK, PHONE, keep_picture

from pipeline.recipe import ModelSection
from pipeline.space import space_files

SCREENS = {"desk": DESK, "phone": PHONE}
# Both try to break out of YAML, JSON, HTML, Markdown, Jinja or Python.
TITLE = """Bo's "model": #1 <script>document.title = 'broken'</script> {{ x }} ```"""
PROMPTS = [
    'def read("""x\'):\n\treturn {}\n',
    "বাংলা লেখা 😀",
    "</script><b>**bold**</b>",
    "\\n%s ${x} {{ x }}",
]
MANY_SCRIPTS = "বাংলা লেখা 😀👩‍👩‍👧 東京 مرحبا naïve!\n— क्षत्रिय 🇧🇩."


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Path:
    """The folder of a Space with a title and prompts that try to break out."""
    folder = tmp_path_factory.mktemp("space")
    for name, content in space_files("me/model", title=TITLE, prompts=PROMPTS).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def app(space):
    """The Space's program as a module."""
    spec = importlib.util.spec_from_file_location("space_app", space / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model_folder(tokenizer, tmp_path_factory) -> Path:
    """A folder of a model with 16 positions whose text hangs on every token; its tokenizer, too."""
    from pipeline.model import build_model

    folder = tmp_path_factory.mktemp("models") / "model"
    section = ModelSection(config={"n_layer": 2, "n_head": 2, "n_embd": 32})
    roughened(build_model(section, tokenizer, block_size=16, seed=0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def writer(app, model_folder):
    """The model of that folder as the page has it."""
    return app.Writer(str(model_folder))


def last(texts) -> tuple[str, str]:
    """Return the whole text and the last note."""
    return list(texts)[-1]


def greedy_ids(model, ids: list[int], new_tokens: int) -> list[int]:
    """Return the likeliest tokens one after the other, up to end-of-text.

    Full positions leave their second half.
    """
    import torch

    window, new = list(ids), []
    positions = model.config.n_positions
    for _ in range(new_tokens):
        if len(window) >= positions:
            window = window[-(positions // 2) :]
        with torch.no_grad():
            likeliest = int(model(torch.tensor([window])).logits[0, -1].argmax())
        if likeliest == model.config.eos_token_id:
            break
        new.append(likeliest)
        window.append(likeliest)
    return new


def test_the_readme_says_what_the_hub_reads(space):
    beginning, front_matter, text = (space / "README.md").read_text("utf-8").split("---\n")
    assert beginning == ""
    values = yaml.safe_load(front_matter)
    assert values.pop("emoji") == "📝"
    assert {values.pop("colorFrom"), values.pop("colorTo")} == {"blue", "indigo"}
    assert values.pop("sdk_version").split(".")[0] == version("gradio").split(".")[0]
    assert values == {
        "title": TITLE,
        "sdk": "gradio",
        "python_version": "3.11",
        "app_file": "app.py",
        "models": ["me/model"],
    }
    assert "`HF_TOKEN`" in text and "read its repository and no more" in text


def test_title_and_prompts_arrive_unharmed(space):
    assert json.loads((space / "demo.json").read_text("utf-8")) == {
        "model": "me/model",
        "title": TITLE,
        "prompts": PROMPTS,
    }
    title = space_files("me/model", title="two\n---\nlines", prompts=[])["README.md"].decode()
    assert yaml.safe_load(title.split("---\n")[1])["title"] == "two --- lines"


def test_requirements_readme_and_licence_follow_the_model():
    files = space_files(
        "me/adapter", title="t", prompts=[], is_adapter=True, license="apache-2.0", is_private=True
    )
    requirements = files["requirements.txt"].decode().splitlines()
    assert "peft>=0.17" in requirements and "transformers>=5.17,<6" in requirements
    readme = files["README.md"].decode()
    assert yaml.safe_load(readme.split("---\n")[1])["license"] == "apache-2.0"
    assert "its repository and that of the model it adapts" in readme
    public = space_files("me/model", title="t", prompts=[], is_private=False)
    assert "HF_TOKEN" not in public["README.md"].decode()
    assert "peft" not in public["requirements.txt"].decode()
    compile(files["app.py"], "app.py", "exec")


@pytest.mark.slow
def test_greedy_text_comes_in_pieces_and_goes_on_past_the_positions(writer, tokenizer):
    prompt = "the model reads"
    texts = [text for text, _ in writer.write(prompt, 0, 40, 1.0, 60, 0)]
    new = greedy_ids(writer.model, tokenizer(prompt)["input_ids"], 60)
    assert len(new) == 60
    assert texts[-1] == (prompt + tokenizer.decode(new)).rstrip("\ufffd")
    assert texts[0] == prompt and len(set(texts)) > 3
    assert all(b.startswith(a) for a, b in zip(texts, texts[1:], strict=False))


def test_a_prompt_longer_than_the_positions_is_read_from_its_end(writer, tokenizer):
    prompt = "the model reads text and learns what comes next from what came before it. " * 3
    text, note = last(writer.write(prompt, 0, 40, 1.0, 5, 0))
    new = greedy_ids(writer.model, tokenizer(prompt)["input_ids"], 5)
    assert text == (prompt + tokenizer.decode(new)).rstrip("\ufffd")
    assert note == (
        "The prompt is too long for this model, which sees 16 tokens at once: it read only the "
        "last 8."
    )


def test_the_model_ends_a_text(writer, tokenizer):
    ids = tokenizer("the model")["input_ids"]
    new = greedy_ids(writer.model, ids, 4)
    writer.tokenizer.eos_token = tokenizer.convert_ids_to_tokens(new[3])
    text, note = last(writer.write("the model", 0, 40, 1.0, 60, 0))
    assert text == ("the model" + tokenizer.decode(new[: new.index(new[3])])).rstrip("\ufffd")
    assert note == "The model ended the text here."


def test_an_empty_prompt_begins_a_document(writer, tokenizer):
    new = greedy_ids(writer.model, [tokenizer.eos_token_id], 6)
    assert last(writer.write("", 0, 40, 1.0, 6, None))[0] == tokenizer.decode(new).rstrip("\ufffd")


def test_a_seed_repeats_its_text_and_settings_are_heeded(writer):
    def text(**settings):
        values = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "new_tokens": 12, "seed": 0}
        return last(writer.write("the model", **values | settings))[0]

    assert text() == text() != text(seed=1)
    assert text(top_k=1) == text(top_p=1e-6) == text(temperature=0) != text()


def test_nobody_has_more_written_or_read_than_the_longest_text(app, writer, monkeypatch):
    monkeypatch.setattr(app, "LONGEST_TEXT", 4)
    monkeypatch.setattr(app, "LONGEST_PROMPT", 3)
    assert last(writer.write("abcdef", 0, 0, 1.0, 1, 0)) == last(
        writer.write("def", 0, 0, 1.0, 1, 0)
    )
    assert last(writer.write("a", 0, 0, 1.0, 10**9, 0)) == last(writer.write("a", 0, 0, 1.0, 4, 0))


def test_text_that_nobody_waits_for_is_left_off(writer):
    calls, before = [], threading.active_count()
    writer.model.register_forward_hook(lambda *_: calls.append(1))
    texts = writer.write("the model", 1.0, 0, 1.0, 500, 0)
    next(texts), next(texts)
    texts.close()
    assert threading.active_count() == before and len(calls) < 450
    assert last(writer.write("the model", 0, 0, 1.0, 3, 0))[0].startswith("the model")


def test_no_character_is_ever_halved(app, tokenizer):
    import torch

    ids = tokenizer(MANY_SCRIPTS)["input_ids"]
    assert len(ids) > 1.5 * len(MANY_SCRIPTS), "characters of several tokens"
    for length in range(1, len(ids) + 1):
        stream = app.Stream(tokenizer)
        stream.put(torch.tensor([ids[:3]]))  # the prompt
        for number in ids[:length]:
            stream.put(torch.tensor([number]))
        stream.close()
        pieces = list(stream)
        assert "\ufffd" not in "".join(pieces)
        assert MANY_SCRIPTS.startswith("".join(pieces))
    assert "".join(pieces) == MANY_SCRIPTS


def test_an_adapter_writes_with_its_model(app, model_folder, tokenizer, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    config = LoraConfig(
        r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False
    )
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    ids = tokenizer("the model")["input_ids"]
    plain = app.Writer(str(model_folder))
    expected = greedy_ids(adapted.merge_and_unload(), ids, 8)
    assert expected != greedy_ids(plain.model, ids, 8)
    text, _ = last(app.Writer(str(tmp_path / "adapter")).write("the model", 0, 40, 1.0, 8, 0))
    assert text == ("the model" + tokenizer.decode(expected)).rstrip("\ufffd")


def test_a_folder_without_a_model_is_said(app, tmp_path):
    with pytest.raises(Exception) as caught:
        app.Writer(str(tmp_path))
    said = app.reason(caught.value, "here")
    assert said.startswith("here could not be loaded (") and "\n" not in said
    assert said.endswith("; if not, publish the model again.")


@contextlib.contextmanager
def serving(folder: Path, **environment: str):
    """Run a Space's program as Spaces do, and give its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder / "tmp"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "app.py"]
    process = subprocess.Popen(command, cwd=folder, env={**os.environ, **settings, **environment})
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def opened(page, address: str, seconds: float = 120):
    """Open a page of a program that may still be starting; nothing is asked of another address."""
    for _ in range(int(seconds / 0.2)):
        with contextlib.suppress(OSError), urllib.request.urlopen(address):
            break
        time.sleep(0.2)
    page.on("request", lambda wanted: page.asked.append(wanted.url))
    page.asked = []
    page.goto(address)
    page.locator("h1").wait_for()
    assert page.locator("h1").inner_text() == page.title() == TITLE
    return page


@contextlib.contextmanager
def hub_that_refuses():
    """Give the address of a Hub that says of every repository what it says without a token."""

    class Refusal(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(401)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("X-Error-Message", "Repository not found")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def addresses(space, model_folder, tmp_path_factory):
    """The address of the page with a model, and of one that may not read its model."""
    private = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path_factory.mktemp("home"))}
    with (
        hub_that_refuses() as hub,
        serving(space, MODEL=str(model_folder)) as good,
        serving(space, HF_ENDPOINT=hub, **private) as bad,
    ):
        yield {"good": good, "bad": bad}


@pytest.fixture(params=SCREENS)
def screen(request, browser):
    """The name of a screen, and pages on it."""
    context = browser.new_context(**SCREENS[request.param])
    yield request.param, context
    context.close()


def ask(page, prompt: str, **settings: float) -> None:
    """Type a prompt and settings by their labels, and press Write."""
    page.get_by_label("Prompt").fill(prompt)
    for label, value in settings.items():
        box = page.get_by_role("spinbutton", name=label.replace("_", "-"))
        box.fill(str(value))
        box.press("Tab")
    page.get_by_role("button", name="Write").click()


def wait_for_text(page, condition: str, text: str = "") -> None:
    """Wait until what is written fulfils a condition, in JavaScript."""
    values = "const written = document.querySelectorAll('textarea')[1].value"
    page.wait_for_function(f"text => {{ {values}; return {condition} }}", arg=text)


@pytest.fixture(scope="module")
def greedy(model_folder) -> str:
    """What `generate` writes after "the model" in 8 tokens, the likeliest each time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = tokenizer("the model", return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True).rstrip("\ufffd")


@pytest.mark.browser
def test_the_page_writes_what_generate_does(addresses, screen, greedy):
    name, context = screen
    page = opened(context.new_page(), addresses["good"])
    ask(page, "the model", Temperature=0, Length=8)
    wait_for_text(page, "written == text", greedy)
    assert len(greedy) > len("the model")
    keep_picture(page, f"space-{name}")
    for box in page.locator("h1, p, textarea, button, .block").all():
        place = box.bounding_box() or {"x": 0, "width": 0}  # what is not shown has none
        assert 0 <= place["x"] <= place["x"] + place["width"] <= page.viewport_size["width"]
    assert page.locator("textarea").nth(1).bounding_box()["height"] > 200
    assert all(url.startswith((addresses["good"], "data:")) for url in page.asked)


@pytest.mark.browser
def test_a_prompt_that_is_too_long_is_said_on_the_page(addresses, screen):
    name, context = screen
    page = opened(context.new_page(), addresses["good"])
    ask(page, MANY_SCRIPTS, Temperature=0, Length=8)
    page.get_by_text("it read only the last 8.").wait_for()
    wait_for_text(page, "written.startsWith(text)", MANY_SCRIPTS)
    keep_picture(page, f"space-long-prompt-{name}")


@pytest.mark.browser
def test_settings_are_heeded_and_two_people_get_their_own_text(addresses, browser, greedy):
    pages = [opened(browser.new_page(), addresses["good"]) for _ in range(2)]
    ask(pages[0], "the model", Temperature=1.5, Top_k=1, Length=8)
    ask(pages[1], "a whole book", Temperature=1.5, Top_p=0.05, Length=20, Seed=3)
    wait_for_text(pages[0], "written == text", greedy)
    wait_for_text(pages[1], "written.startsWith(text) && written != text", "a whole book")
    ask(pages[0], "the model", Top_k=0, Seed=1)
    wait_for_text(pages[0], "written.startsWith('the model') && written != text", greedy)


@pytest.mark.browser
def test_prompts_to_try_arrive_unharmed_and_stop_stops(addresses, browser):
    page = opened(browser.new_page(), addresses["good"])
    examples = page.locator(".gallery-item")
    examples.nth(len(PROMPTS) - 1).wait_for()
    for number, prompt in enumerate(PROMPTS):
        examples.nth(number).click()
        page.wait_for_function(
            "text => document.querySelector('textarea').value == text", arg=prompt
        )
    ask(page, "the model", Temperature=1, Length=500)
    wait_for_text(page, "written.length > 40")
    page.get_by_role("button", name="Stop").click()
    page.wait_for_timeout(500)
    text = page.locator("textarea").nth(1).input_value()
    page.wait_for_timeout(500)
    assert page.locator("textarea").nth(1).input_value() == text
    ask(page, "a whole book", Length=1)  # the next one is written
    wait_for_text(page, "written.startsWith('a whole book')")


@pytest.mark.browser
def test_a_model_that_may_not_be_read_is_said_on_the_page(addresses, screen):
    name, context = screen
    page = opened(context.new_page(), addresses["bad"])
    assert page.locator("h1 + p").inner_text() == (
        "me/model is not on the Hub, or it is private and this Space may not read it: give the "
        "Space a secret HF_TOKEN (Settings, Variables and secrets), a token that may."
    )
    keep_picture(page, f"space-no-model-{name}")
