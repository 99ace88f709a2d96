"""Ids to text one by one: nothing is shown in halves, and the whole is what `decode` says."""

import random

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from pipeline.whole_characters import WholeCharacters

TEXTS = [
    "বাংলা 😀 東京",
    "plain",
    "naïve façade\n\n\ttab",
    "👩🏽‍🚀 مرحبا 🇧🇩",
    "\ufffd itself \x00",
    "",
]


def pieces_of(tokenizer, ids):
    characters = WholeCharacters(tokenizer)
    return [*(characters.push(number) for number in ids), characters.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_valid_text_never_shows_half_a_character(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == text == tokenizer.decode(ids)
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")
    assert pieces[-1] == ""


def test_only_what_is_incomplete_is_held_back(tokenizer):
    text = "বাংলা 😀 東京"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > len(text)  # characters do lie across ids
    characters, shown = WholeCharacters(tokenizer), ""
    for count, number in enumerate(ids, 1):
        shown += characters.push(number)
        assert shown == tokenizer.decode(ids[:count]).rstrip("\ufffd")


def test_an_unfinished_character_is_what_decode_makes_of_it(tokenizer):
    ids = tokenizer("a🦆")["input_ids"][:-1]
    assert pieces_of(tokenizer, ids)[-1] == "\ufffd"
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


def test_any_ids_are_what_decode_makes_of_them(tokenizer):
    source = random.Random(0)
    for _ in range(300):
        ids = source.choices(range(384), k=source.randrange(1, 40))
        found = "".join(pieces_of(tokenizer, ids))
        assert found == tokenizer.decode(ids, skip_special_tokens=True)


def test_added_entries_are_text_and_special_ones_are_not_shown(tokenizer):
    larger = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        eos_token="<|endoftext|>",
    )
    larger.add_tokens(["<tool>", "né €", AddedToken("<hidden>", special=True)])
    ids = larger("a<tool>né €<hidden>b<|endoftext|>😀")["input_ids"]
    assert {384, 385, 386, 0} <= set(ids)
    expected = larger.decode(ids, skip_special_tokens=True)
    assert "".join(pieces_of(larger, [*ids, 400])) == expected
    assert "hidden" not in expected and "<tool>" in expected
