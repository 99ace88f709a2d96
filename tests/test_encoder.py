"""Encoders: the very ids of `tokenizers`, and the fast one only where it gives them."""

import importlib.metadata
import importlib.util
import json
import logging
import random
import sys
import types
import unicodedata

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from pipeline import encoder as encoder_module
from pipeline.encoder import ADVERSARIAL, FAST, REFERENCE, Encoder, choose_encoder

END = "<|endoftext|>"


def json_of(tokenizer):
    return tokenizer.backend_tokenizer.to_str()


def random_texts(count, seed=0):
    """Any characters but surrogates, which have no UTF-8."""
    source = random.Random(seed)
    texts = []
    for _ in range(count):
        limit = source.choice([0x80, 0x800, 0x3100, 0x10000, 0x110000])
        points = [source.randrange(limit) for _ in range(source.randint(0, 60))]
        points += source.choices([9, 10, 13, 32, 39, 0xA0, 0x3000], k=source.randint(0, 20))
        source.shuffle(points)
        texts.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
    return texts


def install(monkeypatch, encode=None, from_json=None):
    """Put a stand-in where gigatoken is imported from; it gives the right ids but for `encode`."""

    class Fake:
        def __init__(self, content):
            self.right = Tokenizer.from_str(content)

        @staticmethod
        def from_json(content):
            return from_json(content) if from_json else Fake(content)

        def encode(self, text):
            ids = np.array(self.right.encode(text, add_special_tokens=False).ids, np.uint32)
            return encode(text, ids) if encode else ids

    module = types.ModuleType(FAST)
    module.Tokenizer = Fake
    monkeypatch.setitem(sys.modules, FAST, module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")


def test_the_ids_are_those_of_the_transformers_tokenizer(tokenizer, texts):
    given = [t for t in [*ADVERSARIAL, *random_texts(200), *texts] if END not in t]
    found = Encoder(json_of(tokenizer)).open().encode(given)
    assert all(ids.dtype == np.uint32 for ids in found)
    assert [ids.tolist() for ids in found] == tokenizer(given, add_special_tokens=False)[
        "input_ids"
    ]
    assert Encoder(json_of(tokenizer)).open().encode([]) == []


@pytest.mark.parametrize("name", [REFERENCE, FAST])
def test_specials_that_a_text_spells_stay_text(tokenizer, name):
    if name == FAST:
        pytest.importorskip(FAST)
    encoder = Encoder(json_of(tokenizer), name).open()
    for text in [END, f"a{END}b", f"{END}{END}", f" {END} \n{END}"]:
        ids = encoder.encode([text])[0]
        assert len(ids) > 1 and tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer(END)["input_ids"] == [tokenizer.eos_token_id]


def test_neither_cuts_nor_pads(tokenizer):
    content = json.loads(json_of(tokenizer))
    other = Tokenizer.from_str(json.dumps(content))
    other.enable_truncation(2)
    other.enable_padding(length=8)
    texts = ["a", "a b c d e f g h i j"]
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert [ids.tolist() for ids in Encoder(other.to_str()).open().encode(texts)] == expected


# -- the memory for words -------------------------------------------------------------------------

ODD = (
    [0x1C, 0x1D, 0x1E, 0x1F, 0x85, 0xA0, 0x200B, 0x2028, 0x2029, 0x202F, 0x3000, 0xFEFF, 0x180E]
    + [9, 10, 11, 12, 13, 32, 32, 32, 39, 39, ord("s"), ord("t"), ord("S"), ord("l"), ord("!")]
    + [0x300, 0x301, 0x483, 0x5B0, 0x64B, 0x93F, 0xBCD, 0x20DD, 0xFE0F, 0x200D, 0x1F468]
    + [ord("7"), 0x660, 0x966, 0xE50, 0x2167, 0xBD, 0xB2, 0x1D7D8, 0x11066, 0x3007]
)


def mixed_texts(count, seed):
    """Words of a few letters between white space, marks and digits of all kinds."""
    source = random.Random(seed)
    return [
        "".join(map(chr, source.choices([*ODD, 0xE9, 0x4E2D, 0x41], k=source.randint(0, 40))))
        for _ in range(count)
    ]


def plain_ids(tokenizer, texts):
    """The ids that `tokenizers` alone gives."""
    backend = Tokenizer.from_str(json_of(tokenizer))
    backend.encode_special_tokens = True
    return [backend.encode(text, add_special_tokens=False).ids for text in texts]


@pytest.mark.slow
@pytest.mark.parametrize("kept", [None, 0, 5])
def test_remembered_words_give_the_ids_of_tokenizers(tokenizer, texts, monkeypatch, kept):
    if kept is not None:
        monkeypatch.setattr("pipeline.encoder.WORDS_KEPT", kept)
    given = [*ADVERSARIAL, *random_texts(300, 3), *mixed_texts(1500, 4), *texts]
    encoder = Encoder(json_of(tokenizer)).open()
    assert encoder._words is not None
    expected = plain_ids(tokenizer, given)
    for times in (1, 7, len(given)):  # all words new, some known, all known
        found = []
        for start in range(0, len(given), times * 50):
            found += encoder.encode(given[start : start + times * 50])
        assert all(ids.dtype == np.uint32 for ids in found)
        for text, ids, theirs in zip(given, found, expected, strict=True):
            assert ids.tolist() == theirs, text
    if kept is not None:
        assert len(encoder._words._known) <= kept


def test_words_that_are_known_are_not_asked_for_again(tokenizer, monkeypatch):
    asked = []
    plain = encoder_module._ids
    monkeypatch.setattr(
        "pipeline.encoder._ids", lambda t, texts: asked.extend(texts) or plain(t, texts)
    )
    encoder = Encoder(json_of(tokenizer)).open()
    encoder.encode(["the model reads, the model learns", "naïve the"])
    assert sorted(asked) == sorted(["the", " model", " reads", ",", " the", " learns", "naïve"])
    asked.clear()
    found = encoder.encode([" the model", "", "the façade reads the model"])
    assert asked == [" façade"]
    expected = plain_ids(tokenizer, [" the model", "", "the façade reads the model"])
    assert [ids.tolist() for ids in found] == expected


@pytest.mark.slow
def test_both_patterns_agree_about_every_assigned_character(tokenizer):
    """Else that text is left to `tokenizers`, and is slow; of newer Unicode a few may differ."""
    words = Encoder(json_of(tokenizer)).open()._words
    assigned = [
        chr(point)
        for point in range(0x80, 0x110000)
        if unicodedata.category(chr(point)) not in ("Cn", "Cs", "Co")
    ]
    assert len(assigned) > 140_000
    assert [f"{ord(c):x}" for c in assigned if not words._agree(c)] == []


def test_a_character_that_the_patterns_disagree_about_is_left_to_tokenizers(tokenizer, monkeypatch):
    odd, texts = "é", ["the café reads", "a naïve model", "é", "the model", "ée\u0301é  é\n"]
    encoder, cut = Encoder(json_of(tokenizer)).open(), []
    agree = encoder_module._Words._agree
    monkeypatch.setattr(
        encoder_module._Words, "_agree", lambda self, c: c != odd and agree(self, c)
    )
    plain = encoder_module._Words._cut
    monkeypatch.setattr(
        encoder_module._Words, "_cut", lambda self, t: cut.append(plain(self, t)) or cut[-1]
    )
    for _ in range(2):
        found = encoder.encode(texts)
        assert [ids.tolist() for ids in found] == plain_ids(tokenizer, texts)
    assert [words is None for words in cut] == [odd in text for text in texts] * 2


def test_the_pattern_for_ascii_is_the_pattern_of_gpt2(tokenizer):
    source = random.Random(7)
    some = "".join(map(chr, [*range(128), *[32] * 60, *[39] * 40, *[10] * 10])) + "strevmdl" * 6
    for _ in range(3000):
        text = "".join(source.choices(some, k=source.randint(0, 25)))
        expected = encoder_module.WORDS.findall(text)
        assert encoder_module.ASCII_WORDS.findall(text) == expected
        assert "".join(expected) == text


@pytest.mark.parametrize("kind", ["prefix space", "no pattern", "normalizer", "dropout"])
def test_other_kinds_of_tokenizer_have_no_memory(tokenizer, kind):
    other = Tokenizer.from_str(json_of(tokenizer))
    if kind == "normalizer":
        other.normalizer = normalizers.NFC()
    elif kind == "dropout":
        other.model.dropout = 0.5
    else:
        other.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=kind == "prefix space", use_regex=kind != "no pattern"
        )
    encoder = Encoder(other.to_str()).open()
    assert encoder._words is None
    if kind != "dropout":
        text = ["the model reads e\u0301"]
        ids = other.encode(text[0], add_special_tokens=False).ids
        assert encoder.encode(text)[0].tolist() == ids


# -- the choice -----------------------------------------------------------------------------------


def test_without_the_fast_one_tokenizers_encodes(tokenizer, monkeypatch):
    install(monkeypatch)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    assert choose_encoder(json_of(tokenizer), ["a"]) == Encoder(json_of(tokenizer), REFERENCE)


def test_the_fast_one_is_taken_when_every_id_is_the_same(tokenizer, texts, monkeypatch, caplog):
    install(monkeypatch)
    with caplog.at_level(logging.INFO, "pipeline.encoder"):
        assert choose_encoder(json_of(tokenizer), texts) == Encoder(json_of(tokenizer), FAST)
    assert caplog.messages == []


@pytest.mark.parametrize(
    "change",
    [
        lambda ids: np.append(ids[:-1], ids[-1] + 1),  # one other id
        lambda ids: ids[:-1],
        lambda ids: np.append(ids, 0),
        lambda ids: ids[:0],
    ],
)
@pytest.mark.parametrize("where", ["sample", "adversarial"])
def test_one_other_id_and_tokenizers_encodes(
    tokenizer, texts, monkeypatch, caplog, where, change
):  # fmt: skip
    odd = texts[-1] if where == "sample" else ADVERSARIAL[3]
    install(monkeypatch, lambda text, ids: change(ids) if text == odd else ids)
    with caplog.at_level(logging.INFO, "pipeline.encoder"):
        assert choose_encoder(json_of(tokenizer), texts).name == REFERENCE
    assert caplog.messages == [
        f"encoding with tokenizers: gigatoken 9.9 gives other ids, for instance for {odd[:40]!r}"
    ]


def test_a_tokenizer_that_the_fast_one_cannot_read_is_left_to_tokenizers(
    tokenizer, monkeypatch, caplog
):
    def refuse(content):
        raise RuntimeError("no such thing")

    install(monkeypatch, from_json=refuse)
    with caplog.at_level(logging.INFO, "pipeline.encoder"):
        assert choose_encoder(json_of(tokenizer), ["a"]).name == REFERENCE
    assert caplog.messages == [
        "encoding with tokenizers: gigatoken cannot read this tokenizer (no such thing)"
    ]


@pytest.mark.parametrize("kind", ["prefix space", "no pattern", "pattern", "normalizer", "dropout"])
def test_only_tokenizers_of_gpt2s_kind_are_for_the_fast_one(tokenizer, monkeypatch, kind):
    def not_asked(content):
        raise AssertionError("the fast encoder was opened")

    install(monkeypatch, from_json=not_asked)
    other = Tokenizer.from_str(json_of(tokenizer))
    if kind == "normalizer":
        other.normalizer = normalizers.NFC()
    elif kind == "dropout":
        other.model.dropout = 0.1
    else:
        other.pre_tokenizer = {
            "prefix space": pre_tokenizers.ByteLevel(add_prefix_space=True),
            "no pattern": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            "pattern": pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(False)]),
        }[kind]
    assert choose_encoder(other.to_str(), ["a"]).name == REFERENCE


# -- the real one ---------------------------------------------------------------------------------


def test_gigatoken_gives_the_ids_of_tokenizers(tokenizer, texts):
    pytest.importorskip(FAST)
    content = json_of(tokenizer)
    assert choose_encoder(content, texts).name == FAST
    given = [*ADVERSARIAL, *random_texts(2000, seed=1), *texts, "".join(random_texts(500, seed=2))]
    fast, reference = (Encoder(content, name).open() for name in (FAST, REFERENCE))
    for text, a, b in zip(given, fast.encode(given), reference.encode(given), strict=True):
        assert np.array_equal(a, b), text


def test_added_words_are_the_same_ids_with_either_encoder(tokenizer):
    pytest.importorskip(FAST)
    other = Tokenizer.from_str(json_of(tokenizer))
    other.add_tokens(["<think>"])
    chosen = choose_encoder(other.to_str(), ["a sample without it"])
    text = ["so <think> it"]
    expected = Encoder(other.to_str()).open().encode(text)[0]
    assert np.array_equal(chosen.open().encode(text)[0], expected)
