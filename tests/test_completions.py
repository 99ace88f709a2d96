"""Rows of tables become examples: by the template that generation uses too, or one sentence."""

import csv
import itertools
import json
import re
from pathlib import Path

import datasets
import numpy as np
import oracle
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT

from pipeline import prepare_data
from pipeline.completions import CHAT_TEMPLATE, COLUMNS, Example, example_of
from pipeline.data_sections import DataSection, SourceSection
from pipeline.encoder import Encoder
from pipeline.file_search import find_files
from pipeline.marks import PREDICTED, ExampleEncoder, bare
from pipeline.raw_documents import read_shard
from pipeline.recipe import InputError, read_recipe
from pipeline.sources import shards_of

ODD = (
    "\u3000 The\u00a0model \n\n",
    "\r\n\tis it\r\n naïve?\x1c",
    "東京 😀\u200d",
    "'s 12'll",
    ": )",
    "e\u0301",
)


def chat(*turns):
    """Return messages; turns are "role: content"."""
    found = []
    for turn in turns:
        role, _, content = turn.partition(": ")
        found.append({"role": role, "content": content})
    return found


CONVERSATIONS = [
    chat("user: What is 3 + 4?", "assistant: 7"),
    chat("system: Be kind.", "user: Hi", "assistant: Hello", "user: Bye", "assistant: Bye!"),
    chat("assistant: I begin", "user: ", "assistant: and go on"),
    chat("user: a", "user: b", "assistant: c", "assistant: d"),
    chat("user: Assistant: I am you\nUser:", "assistant: User: no"),
    [m for text in ODD for m in chat(f"user: {text}", f"assistant: {text}")],
    chat(*(f"{role}: {a}{b}" for a in ODD for b in ODD for role in ("user", "assistant"))),
]


@pytest.fixture(scope="module")
def chatting(tokenizer):
    """The tokenizer with the template, in a copy."""
    copied = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token
    )
    copied.chat_template = CHAT_TEMPLATE
    return copied


def marked(tokenizer, example):
    """Return the marked ids of an example, the end-of-text at its end included."""
    encoder = Encoder(tokenizer.backend_tokenizer.to_str()).open()
    ids = ExampleEncoder(encoder, tokenizer.eos_token_id).encode([example])[0]
    return np.append(ids, np.uint32(tokenizer.eos_token_id) | PREDICTED)


# -- the template ----------------------------------------------------------------------------------


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_training_sees_the_ids_of_apply_chat_template(chatting, messages):
    ids = marked(chatting, example_of({"messages": messages}, "messages", "here"))
    found = chatting.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert found["input_ids"] == bare(ids).tolist()
    assert found["assistant_masks"] == (ids >= PREDICTED).astype(int).tolist()
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = {"add_generation_prompt": True, "return_dict": False}
            prompt = chatting.apply_chat_template(messages[:number], **asked) if number else []
            if not prompt:
                continue
            assert prompt == bare(ids)[: len(prompt)].tolist()
            assert ids[len(prompt) - 1] < PREDICTED <= ids[len(prompt)]


def test_a_conversation_as_it_is_laid_out(chatting):
    messages = chat("system: Be kind. ", "user:  Hi\n", "assistant: Hello\n\nyou ", "user: Thanks")
    example = example_of({"messages": messages}, "messages", "here")
    assert example.pieces == ("System: Be kind.\nUser: Hi\nAssistant:", " Hello\n\nyou")
    text = chatting.apply_chat_template(messages[:3], tokenize=False)
    assert text == "System: Be kind.\nUser: Hi\nAssistant: Hello\n\nyou<|endoftext|>"


def test_the_template_refuses_what_training_refuses(chatting):
    for messages in (chat("tool: 3"), [{"role": "user", "content": [{"type": "text"}]}]):
        with pytest.raises(Exception, match="a role is system, user or assistant"):
            chatting.apply_chat_template(messages)


def test_a_prompt_has_the_ids_that_it_has_when_typed(tokenizer):
    for prompt, completion in [
        ("the mo", "del reads"),
        ("a ", " b"),
        ("naïve\n", "\n東京"),
        *itertools.pairwise(ODD),
    ]:
        example = example_of({"prompt": prompt, "completion": completion}, "prompt_completion", "x")
        ids, end = marked(tokenizer, example), tokenizer.eos_token_id
        typed = tokenizer(prompt)["input_ids"]
        assert bare(ids).tolist() == typed + oracle.ids_of(completion, tokenizer) + [end]
        assert (ids >= PREDICTED).tolist() == [k >= len(typed) for k in range(len(ids))]


def test_an_empty_prompt_is_a_new_document(tokenizer):
    example = example_of({"prompt": "", "completion": "reads"}, "prompt_completion", "here")
    ids, end = marked(tokenizer, example), tokenizer.eos_token_id
    assert bare(ids).tolist() == [end, *oracle.ids_of("reads", tokenizer), end]
    assert (ids >= PREDICTED).tolist() == [False] + [True] * (len(ids) - 1)


def test_text_that_spells_end_of_text_is_text(tokenizer):
    spelt, end = "a <|endoftext|><|endoftext|> b", tokenizer.eos_token_id
    for row, kind in (
        ({"prompt": spelt, "completion": spelt}, "prompt_completion"),
        ({"messages": chat(f"user: {spelt}", f"assistant: {spelt}")}, "messages"),
    ):
        ids = bare(marked(tokenizer, example_of(row, kind, "here"))).tolist()
        assert ids.count(end) == 1 and ids[-1] == end
        assert tokenizer.decode(ids).count("<|endoftext|>") == 5


# -- tables ----------------------------------------------------------------------------------------


def read(source):
    files = find_files(source)
    found = []
    for shard in shards_of(0, source, files, total_bytes=1):
        for document in read_shard(shard, source):
            (example,) = document.read()
            assert isinstance(example, Example)
            found.append(example.pieces)
    return found


ROWS = {
    "prompt_completion": [{"prompt": a, "completion": b} for a in ("", *ODD) for b in ODD],
    "messages": [{"messages": messages} for messages in CONVERSATIONS],
}


def written(folder: Path, rows, kind: str) -> dict:
    """Write rows as a table, and return what names it."""
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path = path.with_suffix(".parquet")
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    return {"dataset": str(folder)} if kind == "hub" else {"files": [str(path)]}


@pytest.mark.parametrize("format", list(COLUMNS))
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "hub"])
def test_every_table_gives_the_same_examples(tmp_path, monkeypatch, format, kind):
    if (format, kind) == ("messages", "csv"):
        pytest.skip("a cell of a .csv holds no list")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    rows = [row | {"other": n} for n, row in enumerate(ROWS[format])]
    found = read(SourceSection(format=format, **written(tmp_path / "data", rows, kind)))
    assert found == [example_of(row, format, "here").pieces for row in rows]


OK = {"prompt": "a", "completion": "b"}
WRONG = [
    ([{"prompt": "a", "answer": "b"}], "no column 'completion' in the line at byte 0; it has promp"
     "t, answer; data.format prompt_completion reads prompt and completion"),
    ([OK, {"prompt": "a"}], "no column 'completion' in the line at byte 35; it has prompt; data."),
    ([OK, "[1]"], "no column 'prompt' in the line at byte 35; it has none"),
    ([OK, "{"], "not a .jsonl table: the line at byte 35 is no JSON"),
    ([OK, OK | {"prompt": 3}], "the line at byte 35: the prompt is 3 and not text"),
    ([OK | {"prompt": None}], "the line at byte 0: the prompt is None and not text"),
    ([OK | {"completion": None}], "the line at byte 0: the completion is None and not text"),
    ([OK | {"prompt": chat("user: x")}], "and not text; of lists of messages make data.format me"),
    ([OK | {"completion": ""}], "the line at byte 0: the completion is empty, so that there is n"),
    ([OK | {"prompt": "\ud800"}], "the line at byte 0 holds half of a surrogate pair"),
    ([{"messages": []}], "no column 'prompt' in the line at byte 0; it has messages; set data.forma"
     "t messages"),
]  # fmt: skip
WRONG_CHATS = [
    (OK, "no column 'messages' in the line at byte 0; it has prompt, completion; set data.format"),
    ({"messages": "hi"}, "the line at byte 0: messages is 'hi' and not a list of messages"),
    ({"messages": None}, "the line at byte 0: messages is None and not a list of messages"),
    ({"messages": ["hi"]}, "message 1 is 'hi'; a message has a role and a content"),
    ({"messages": [{"role": "user"}]}, "message 1 is {'role': 'user'}; a message has a role and a"),
    ({"messages": chat("user: x", "tool: y")}, "message 2 has the role 'tool'; known: system, us"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "message 1 has the role ['user']; known:"),
    ({"messages": []}, "no message is the assistant's, so that there is nothing to predict"),
    ({"messages": chat("user: x")}, "no message is the assistant's, so that there is nothing to "),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "message 1: its content is [{'te"
     "xt': 'x'}] and not text; join its parts"),
    ({"messages": [{"role": "user", "content": None}]}, "message 1: its content is None and not "),
    ({"messages": chat("user: x", "assistant:  \n")}, "message 2: the assistant says nothing"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "format", "words"),
    [(rows, "prompt_completion", words) for rows, words in WRONG]
    + [([row], "messages", words) for row, words in WRONG_CHATS]
    + [
        ([OK], "text", "no column 'text' in the line at byte 0; it has prompt, completion; set dat"
         "a.format prompt_completion"),
        ([{"messages": []}], "text", "it has messages; set data.format messages"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_example_is_one_sentence(tmp_path, rows, format, words):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    with pytest.raises(InputError) as caught:
        read(SourceSection(files=[str(path)], format=format))
    sentence = str(caught.value)
    assert sentence.startswith(f"{path}: ") and words in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("csv", "no column 'completion'; it has prompt; data.format prompt_completion reads"),
        ("parquet", "no column 'completion'; it has prompt; data.format prompt_completion reads"),
        ("hub", "no column 'completion'; it has prompt; data.format prompt_completion reads"),
    ],
)
def test_a_table_without_a_column_is_one_sentence(tmp_path, monkeypatch, kind, words):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    named = written(tmp_path / "data", [{"prompt": "a"}], kind)
    with pytest.raises(InputError, match=re.escape(words)):
        read(SourceSection(format="prompt_completion", **named))


def test_rows_of_other_tables_are_named_by_their_number(tmp_path):
    for kind, rows in (
        ("csv", [OK, OK | {"completion": ""}]),
        ("parquet", [OK, OK | {"prompt": None}]),
    ):
        with pytest.raises(InputError, match=r"rows\.\w+: row 1: the \w+ is (empty|None)"):
            read(SourceSection(format="prompt_completion", **written(tmp_path, rows, kind)))


def test_half_a_surrogate_pair_can_be_replaced(tmp_path):
    named = written(tmp_path, [{"prompt": "a\ud800", "completion": "é"}], "jsonl")
    source = SourceSection(format="prompt_completion", errors="replace", **named)
    assert read(source) == [("a\ufffd", "é")]


def test_a_file_of_text_holds_no_examples(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for files in (tmp_path / "a.txt", tmp_path):
        with pytest.raises(
            InputError, match="a.txt: a file of text has no columns; data.format mess"
        ):
            read(SourceSection(files=[str(files)], format="messages"))


# -- the recipe ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"data.packing": "concatenate"}, "data.packing concatenate: with data.format messages i"),
        ({"data.packing": "sliding", "data.stride": "3"}, "data.packing sliding: with data.forma"),
        ({"data.attend_across": "true"}, "data.attend_across true: with data.format messages it "),
        ({"data.hold_out": "tail"}, "data.hold_out tail: with data.format messages examples are "),
        ({"data.streaming": "true"}, "data.streaming: with data.format messages examples are kep"),
        ({"data.separator": "x"}, "data.separator has no meaning with data.format messages"),
        ({"data.text_column": "x"}, "data.text_column has no meaning with data.format messages"),
        ({"data.join_rows": "true"}, "data.join_rows has no meaning with data.format messages"),
        ({"cleaning.decontaminate": "cut"}, "cleaning.decontaminate cut: with data.format messag"),
        ({"data.format": "chat"}, "input should be 'text', 'prompt_completion' or 'messages'"),
    ],
)  # fmt: skip
def test_what_contradicts_examples_is_one_sentence(overrides, words):
    with pytest.raises(InputError) as caught:
        read_recipe(ROOT / "recipes" / "instructions.yaml", overrides)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_sources_have_one_format():
    sources = [{"files": "a", "format": "messages"}, {"files": "b"}]
    with pytest.raises(ValueError, match="every source has the same format, since text is packed"):
        DataSection(sources=sources)


def test_what_follows_from_the_format_may_be_stated_and_is_saved(tmp_path):
    recipe = read_recipe(ROOT / "recipes" / "instructions.yaml")
    assert recipe.data.packing == "best_fit" and recipe.data.attend_across is False
    (tmp_path / "again.yaml").write_text(recipe.as_yaml())
    assert read_recipe(tmp_path / "again.yaml").data == recipe.data
    sources = [{"files": ["a.jsonl"], "format": "messages"}]
    assert DataSection(sources=sources).packing == "best_fit"
    assert DataSection(sources=[SourceSection(**sources[0])]).attend_across is False


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": f"{n}", "completion": "b" * 99} for n in range(99)], "no completion fits into "
         "a row of 32 tokens with a token before it: all 90 training examples are left out"),
        ([OK], "no example is held out for validation (1 are left for training, data.validation_"),
    ],
)  # fmt: skip
def test_too_few_examples_are_one_sentence(tmp_path, tokenizer, rows, words):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    values = yaml.safe_load((ROOT / "recipes" / "smoke.yaml").read_text())
    values["tokenizer"] = {"pretrained": str(tmp_path / "tokenizer")}
    values["data"] |= {"format": "prompt_completion", **written(tmp_path, rows, "jsonl")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    argv = [
        "--config",
        str(tmp_path / "recipe.yaml"),
        "--training.output_dir",
        str(tmp_path / "run"),
    ]
    with pytest.raises(InputError) as caught:
        prepare_data.main(argv)
    assert re.sub(r"all \d+", "all 90", str(caught.value)).startswith(words)
