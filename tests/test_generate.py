"""generate.py as it is typed: prompts, samples, presets, chats, and a person at a terminal."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, roughened
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from pipeline import generate
from pipeline.command_line import read_options
from pipeline.model import build_model
from pipeline.options import GenerateOptions
from pipeline.prompts import read_prompts
from pipeline.recipe import InputError
from pipeline.sections import ModelSection

POSITIONS = 32
CYCLE = "ক🚀Ж 東京"  # each of its tokens comes once, and most are parts of characters
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def small_model(tokenizer, block_size=POSITIONS):
    section = ModelSection(config={"n_layer": 2, "n_head": 2, "n_embd": 32})
    return build_model(section, tokenizer, block_size=block_size, seed=0)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A saved model that writes anything."""
    path = tmp_path_factory.mktemp("model")
    roughened(small_model(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def chat_folder(folder, tokenizer, tmp_path_factory):
    """The same model, whose tokenizer has a chat template."""
    path = tmp_path_factory.mktemp("chat")
    roughened(small_model(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture
def write(folder, capsys):
    """What the door writes, and what it says besides; a program shows no bars (`enter`)."""
    disable_progress_bar()

    def run(*argv, model=folder, count=12):
        generate.main(["--model", str(model), "--max_new_tokens", str(count), *map(str, argv)])
        return capsys.readouterr()

    yield run
    enable_progress_bar()


@pytest.fixture
def typed(monkeypatch, write):
    """What comes of lines that are given to the interactive mode."""

    def run(*lines, argv=(), **options):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return write("--interactive", *argv, **options)

    return run


def read(*argv):
    return read_options(["--model", "m", *argv], GenerateOptions, doc="")


@pytest.mark.parametrize(
    ("name", "temperature", "top_k"),
    [
        ("creative", 1.2, 100),
        ("balanced", 0.8, 40),
        ("precise", 0.1, 10),
        ("factual", 0.1, 10),
        ("code", 0.3, 30),
    ],
)
def test_a_preset_is_a_temperature_and_a_top_k_and_what_is_given_wins(name, temperature, top_k):
    options = read("--preset", name)
    assert (options.temperature, options.top_k) == (temperature, top_k)
    options = read("--top_k", "3", "--preset", name)
    assert (options.temperature, options.top_k) == (temperature, 3)
    options = read("--preset", name, "--temperature", "0")
    assert (options.temperature, options.top_k) == (0, top_k)


def test_without_a_preset_it_is_balanced():
    assert read() == read("--preset", "balanced")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--temperature", "0.001"], "must be 0 (greedy) or at least 0.01"),
        (["--top_p", "0"], "--top_p: input should be greater than 0; got '0'"),
        (["--repetition_penalty", "0"], "--repetition_penalty: input should be greater than 0"),
        (["--num_samples", "0"], "--num_samples: input should be greater than or equal to 1"),
        (["--preset", "wild"], "--preset: input should be 'creative', 'balanced'"),
        (["--preset", "a", "b"], "--preset: input should be"),
        (["--prompt", "a", "--prompts_file", "b.txt"], "one of --prompt, --prompts_file and"),
        (["--prompt", "a", "--interactive"], "one of --prompt, --prompts_file and --interactive"),
        (["--prompt", "a", "--num_samples", "2", "--temperature", "0"], "the same text each time"),
        (["--interactive", "--num_samples", "2"], "no meaning with --interactive"),
        (["--interactive", "--output", "a.jsonl"], "no meaning with --interactive"),
        ([], "give the beginning of the text by --prompt or --prompts_file (or type it"),
        (["--prompt", "a\udcff"], "--prompt: is not text in UTF-8"),
        (["--prompts_file", "nowhere.txt"], "nowhere.txt: cannot be read: No such file"),
        (["--prompts_file", "empty.txt"], "empty.txt: there is no prompt in this file"),
        (["--prompts_file", "empty.jsonl"], "empty.jsonl: there is no prompt in this file"),
        (["--prompts_file", "latin.txt"], "latin.txt: byte 0xe9 at offset 3 is not UTF-8"),
        (["--prompts_file", "table.csv"], "prompts are read from .txt, one a line, or .jsonl"),
        (["--prompts_file", "other.jsonl"], 'line 3: has no field "prompt"; it has text, id'),
        (["--prompts_file", "list.jsonl"], 'line 1: has no field "prompt"; it has no fields'),
        (["--prompts_file", "number.jsonl"], 'line 1: "prompt" is 3, not text'),
        (["--prompts_file", "torn.jsonl"], "line 2: is not JSON: Expecting"),
        (["--prompts_file", "half.jsonl"], "line 1: is not text in UTF-8"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_before_a_model_is_loaded(tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "table.csv").write_text("prompt\na\n")
    (tmp_path / "other.jsonl").write_text('{"prompt": "a"}\n\n{"text": "b", "id": 1}\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "number.jsonl").write_text('{"prompt": 3}\n')
    (tmp_path / "torn.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "half.jsonl").write_text('{"prompt": "\\ud83d"}\n')
    with pytest.raises(InputError) as caught:
        generate.main(["--model", "nowhere", *argv])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_person_at_a_terminal_is_asked_where_no_prompt_is_given():
    assert read_prompts(read(), at_terminal=True) is None
    assert read_prompts(read("--interactive"), at_terminal=False) is None
    assert read_prompts(read("--prompt", ""), at_terminal=True) == [""]
    for argv in (["--num_samples", "2"], ["--output", "a.jsonl"]):
        with pytest.raises(InputError, match="need --prompt or --prompts_file"):
            read_prompts(read(*argv), at_terminal=True)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--output", "texts.json"], "texts.json: JSON lines are written; give a name in .jsonl"),
        (["--output", "no/where.jsonl"], "no/where.jsonl: cannot be written"),
        (["--chat"], "--chat: this model's tokenizer has no chat template"),
    ],
)
def test_mistakes_that_only_show_with_the_model(tmp_path, monkeypatch, write, argv, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        write("--prompt", "a", *argv)
    assert words in str(caught.value)


@pytest.mark.slow
def test_a_text_alone_is_that_of_the_file_and_of_its_seed(write, tmp_path):
    """Prompts of several lengths, two samples each, in batches of three, against one by one."""
    prompts = ["the model", "a", "loss falls when the tokens repeat", "東京 😀", "<|endoftext|>x"]
    (tmp_path / "p.txt").write_text("\r\n".join(["", *prompts, ""]), encoding="utf-8")
    output = tmp_path / "texts.jsonl"
    common = ["--repetition_penalty", "1.1", "--top_p", "0.95"]
    said = write(
        "--prompts_file", tmp_path / "p.txt", "--num_samples", 2, "--seed", 7, "--batch_size", 3,
        "--output", output, *common, count=45,
    )  # fmt: skip
    assert said.out == f"10 text(s) in {output}\n"
    assert "東京 😀" in output.read_text(encoding="utf-8")
    found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [one["prompt"] for one in found] == [prompt for prompt in prompts for _ in range(2)]
    assert [(one["sample"], one["seed"]) for one in found] == [(1, 7), (2, 8)] * 5
    assert {one["finished"] for one in found} <= {"length", "end-of-text"}
    for one in found:
        alone = write("--prompt", one["prompt"], "--seed", one["seed"], *common, count=45)
        assert alone.out == f"{one['prompt']}{one['text']}\n"
    assert len({one["text"] for one in found}) == 10


def test_several_texts_are_numbered(write, tmp_path):
    found = write("--prompt", "the", "--num_samples", 2, "--seed", 4).out
    first, second = (write("--prompt", "the", "--seed", seed).out for seed in (4, 5))
    assert found == f"--- sample 1 of 2, seed 4\n{first}\n--- sample 2 of 2, seed 5\n{second}\n"
    (tmp_path / "p.jsonl").write_text('{"prompt": "the", "id": 1}\n\n{"prompt": ""}\n')
    found = write("--prompts_file", tmp_path / "p.jsonl", "--seed", 4).out
    new = write("--prompt", "", "--seed", 4).out  # a new document
    assert found == f"--- prompt 1 of 2\n{first}\n--- prompt 2 of 2\n{new}\n"
    assert write("--prompt", "<|endoftext|>", "--seed", 4).out == f"<|endoftext|>{new}"


def test_a_prompt_that_is_too_long_is_cut_and_that_is_said_once(write, tmp_path, tokenizer):
    long = "loss falls when the tokens repeat " * 9
    length = len(tokenizer(long)["input_ids"])
    said = (
        f"the prompt has {length} tokens and the model {POSITIONS} positions: it goes on from the "
        "last {} of them\n"
    )
    assert length > POSITIONS
    assert write("--prompt", long, count=12).err == said.format(20)
    assert write("--prompt", long, count=100).err == said.format(16)
    (tmp_path / "p.txt").write_text(f"a\n{long}\n")
    found = write("--prompts_file", tmp_path / "p.txt", "--num_samples", 2, count=12)
    assert found.err == f"prompt 2: {said.format(20)}"
    assert found.out.count(long) == 2


def test_it_ends_at_end_of_text_and_does_not_show_it(write, folder, tokenizer, tmp_path):
    """A model that writes end-of-text wherever a temperature of 1 lets it: one time in 30."""
    model = roughened(small_model(tokenizer))
    model.lm_head.register_forward_hook(
        lambda _module, _inputs, logits: logits.scatter_add(
            -1, torch.zeros_like(logits[..., :1]).long(), torch.full_like(logits[..., :1], 2.0)
        )
    )
    from pipeline import samples

    options = GenerateOptions(
        model="m", num_samples=40, output=str(tmp_path / "o.jsonl"), temperature=3, top_k=0
    )
    samples.write(model, tokenizer, ["the"], options, out=io.StringIO(), notes=io.StringIO())
    found = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    kinds = [one["finished"] for one in found]
    assert {"length", "end-of-text"} == set(kinds)
    assert not any("<|endoftext|>" in one["text"] for one in found)
    ended = next(one for one in found if one["finished"] == "end-of-text")
    alone, out = options.model_copy(update={"seed": ended["seed"]}), io.StringIO()
    alone = alone.model_copy(update={"num_samples": 1, "output": None})
    samples.write(model, tokenizer, ["the"], alone, out=out, notes=io.StringIO())
    assert out.getvalue() == f"the{ended['text']}\n"


def test_too_little_memory_is_one_sentence(write, monkeypatch, tmp_path):
    from pipeline import samples

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(samples, "new_ids", fail)
    with pytest.raises(InputError, match="does not fit into memory; lower --max_new_tokens"):
        write("--prompt", "a")
    with pytest.raises(InputError, match="--batch_size 16: so many texts together do not fit"):
        write("--prompt", "a", "--num_samples", 3)


def test_a_damaged_model_is_one_sentence(write, tokenizer, tmp_path):
    model = small_model(tokenizer)
    model.transformer.ln_f.bias.data[0] = float("nan")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="logits are not finite numbers; its weights are damaged"):
        write("--prompt", "a", model=tmp_path)


def test_a_chat_prompt_is_put_into_the_template(write, chat_folder):
    asked = "user: the model\nassistant: "
    bare = write("--prompt", asked, model=chat_folder).out
    found = write("--prompt", "the model", "--chat", model=chat_folder).out
    assert bare == asked + found
    assert write("--prompt", "the model", model=chat_folder).out.startswith("the model")


def test_a_template_that_fails_is_one_sentence(write, chat_folder, tmp_path, tokenizer):
    small_model(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('only in pairs') }}")
    with pytest.raises(InputError, match="chat template fails: only in pairs"):
        write("--prompt", "a", "--chat", model=tmp_path)


def test_a_lora_adapter_opens(folder, tokenizer, write, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(
        target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True
    )
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    context = tokenizer("the model", return_tensors="pt")
    expected = adapted.eval().generate(**context, do_sample=False, max_new_tokens=12)
    text = tokenizer.decode(expected[0], skip_special_tokens=True)
    greedy = ["--prompt", "the model", "--temperature", "0"]
    assert write(*greedy, model=tmp_path).out == f"{text}\n" != write(*greedy).out


def test_lines_are_prompts_and_the_seed_rises(typed, write):
    found = typed("the model", "", "//x", argv=["--seed", "3"])
    expected = [
        write("--prompt", prompt, "--seed", seed).out
        for prompt, seed in [("the model", 3), ("", 4), ("/x", 5)]
    ]
    assert found.out == "".join(expected)
    assert found.err.count("\n") == 1 and "Ctrl-D ends" in found.err


def test_settings_change_between_lines(typed, write):
    found = typed(
        "/temperature 0", "/max_new_tokens 5", "the", "/preset creative", "/seed 9", "the",
        "/top_p 0.5", "/help",
    )  # fmt: skip
    first = write("--prompt", "the", "--temperature", 0, count=5).out
    second = write("--prompt", "the", "--preset", "creative", "--seed", 9, count=5).out
    assert found.out == first + second
    assert "Now: max_new_tokens 5, temperature 1.2, top_k 100, top_p 0.5" in found.err
    assert "seed 10\n" in found.err and "/temperature /top_k" in found.err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/temperature", "/temperature: a value is missing, as in /temperature 0.7"),
        ("/temperature warm", "/temperature: input should be a valid number"),
        ("/temperature 0.001", "/temperature: temperature must be 0 (greedy) or at least 0.01"),
        ("/top_p 0", "/top_p: input should be greater than 0; got '0'"),
        ("/preset wild", "/preset: input should be 'creative'"),
        ("/model x", "/model: no such command; /help lists them"),
        ("/", "/: no such command"),
        ("a\udcff", "the prompt: is not text in UTF-8"),
    ],
)
def test_a_wrong_line_is_one_sentence_and_the_next_works(typed, line, words):
    found = typed(line, "the")
    assert found.err.splitlines()[1].startswith(f"error: {words}")
    assert found.err.count("\n") == 2
    assert found.out.startswith("the") and found.out.count("the") >= 1


def test_a_conversation_is_kept_until_new(typed, write, chat_folder):
    options = ["--temperature", "0"]
    found = typed("the", "", "x", "/new", "x", argv=options, model=chat_folder, count=4)
    said = found.err.splitlines()
    assert said[0].startswith("A chat: ")
    first = write("--prompt", "user: the\nassistant: ", *options, model=chat_folder, count=4).out
    first = first.removeprefix("user: the\nassistant: ")
    assert found.out.startswith(first)
    # The second question holds the first and its answer, and no longer fits.
    history = f"user: the\nassistant: {first.rstrip()}\nuser: x\nassistant: "
    second = write("--prompt", history, *options, model=chat_folder, count=4)
    assert second.err and said[1] == second.err.rstrip("\n")
    alone = write("--prompt", "x", "--chat", *options, model=chat_folder, count=4).out
    assert found.out == first + second.out.removeprefix(history) + alone


def test_a_model_with_a_template_goes_on_with_texts_if_asked(typed, write, chat_folder):
    found = typed("the", argv=["--chat", "false"], model=chat_folder)
    assert found.out == write("--prompt", "the", model=chat_folder).out


@pytest.fixture(scope="module")
def bengali(tokenizer, tmp_path_factory):
    """A saved model that has learnt one line of characters that lie across tokens, endlessly."""
    torch.manual_seed(0)
    model = small_model(tokenizer, block_size=64).train()
    ids = torch.tensor(tokenizer(CYCLE)["input_ids"])
    assert len(set(ids.tolist())) == len(ids) > 1.5 * len(CYCLE)
    rows = torch.stack([ids.repeat(9).roll(-shift)[:64] for shift in range(len(ids))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tmp_path_factory.mktemp("bengali")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


class Terminal:
    """The door behind a pseudo terminal, as a person has it."""

    def __init__(self, *argv):
        self.screen = b""
        pid, self._file = pty.fork()
        if not pid:
            environment = os.environ | {"TERM": "dumb", "PYTHONPATH": str(ROOT), "COLUMNS": "9999"}
            words = [sys.executable, str(ROOT / "pipeline" / "generate.py"), *map(str, argv)]
            os.execve(sys.executable, words, environment)
        self._pid = pid

    def type(self, keys):
        """Press keys; return nothing."""
        os.write(self._file, keys.encode())

    def until(self, found, seconds=120.0):
        """Read until `found` says so of all that came since; return that."""
        begun, end = len(self.screen), time.monotonic() + seconds
        while not found(self.screen[begun:]):
            ready, _, _ = select.select([self._file], [], [], end - time.monotonic())
            assert ready, f"nothing more after {self.screen[begun:]!r}"
            self.screen += os.read(self._file, 4096)
        return self.screen[begun:]

    def ended(self):
        """Return the exit code."""
        with_output = True
        while with_output:
            try:
                content = os.read(self._file, 4096)
            except OSError:  # the other end is closed
                content = b""
            self.screen += content
            with_output = bool(content)
        _, status = os.waitpid(self._pid, 0)
        self._pid = None
        os.close(self._file)
        return os.waitstatus_to_exitcode(status)

    def close(self):
        """End what a failed test leaves."""
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)
            self.ended()


@pytest.mark.slow
def test_a_person_at_a_terminal_reads_whole_characters_and_stops_them(bengali, write):
    plain = write("--prompt", CYCLE, "--temperature", 0, model=bengali, count=60).out
    assert plain == CYCLE * 7 + "\n"
    long = write("--prompt", "ক", "--temperature", 0, model=bengali, count=307).out
    assert long == CYCLE * 31 + "\n"
    terminal = Terminal("--model", bengali, "--temperature", "0", "--max_new_tokens", "60")
    try:
        terminal.until(lambda read: read.endswith(b"> "))
        terminal.type(f"{CYCLE}\n")
        read = terminal.until(lambda read: read.count(b"\n") > 1 and read.endswith(b"> "))
        assert read.decode().replace("\r\n", "\n").split("\n", 1)[1] == f"{plain}> "

        terminal.type("/max_new_tokens 1000000\n")
        terminal.until(lambda read: read.endswith(b"\n> "))
        terminal.type("ক\n")
        for _ in range(5):  # it comes in pieces, and none ends within a character
            terminal.until(lambda read: len(read) > 100)
        terminal.type("\x03")
        read = terminal.until(lambda read: read.endswith(b"\r\n> "))
        assert "\ufffd" not in terminal.screen.decode()

        time.sleep(0.5)  # Python may miss a signal while readline begins to wait for a key
        terminal.type("half a prompt\x03")  # at the prompt it only empties the line
        terminal.until(lambda read: read.endswith(b"\r\n> "))
        terminal.type("/max_new_tokens 3\n/seed 5\nthe\n/help\n")
        read = terminal.until(lambda read: b"Now: " in read and read.endswith(b"> "))
        assert b"max_new_tokens 3, " in read and b"seed 6" in read
        terminal.type("\x04")
        assert terminal.ended() == 0
        assert b"Traceback" not in terminal.screen and b"interrupted" not in terminal.screen
    finally:
        terminal.close()


@pytest.mark.slow
def test_a_pipe_gets_the_bytes_of_the_text_in_pieces(bengali, write):
    argv = [
        "--prompt",
        CYCLE,
        "--temperature",
        "0",
        "--max_new_tokens",
        "61",
    ]  # the last is half a character
    plain = write("--prompt", CYCLE, "--temperature", 0, model=bengali, count=61).out
    assert plain == CYCLE * 7 + "\ufffd\n"
    done = subprocess.run(
        [sys.executable, "pipeline/generate.py", "--model", str(bengali), *argv],
        cwd=ROOT, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == plain.encode() and done.stderr == b""
