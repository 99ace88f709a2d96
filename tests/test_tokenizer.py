"""Characters to ids and back: nothing lost, one control id, the same file each time."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline import sources, text_files
from pipeline import tokenizer as tokenizer_module
from pipeline.corpus import Corpus
from pipeline.recipe import DataSection, InputError, ModelSection, TokenizerSection
from pipeline.tokenizer import (
    await_tokenizer,
    compare,
    load_tokenizer,
    obtain_tokenizer,
    text_encoder,
    token_bytes,
    tokenizer_fingerprint,
    train_tokenizer,
    training_sample,
)

END = "<|endoftext|>"
ALL_CONTROLS = "".join(map(chr, [*range(32), *range(127, 160)]))
TEXTS = [
    "",
    " ",
    "  leading, trailing  ",
    "\r\n\t\v\f mixed \n\n\n white   space\u00a0\u2003\u3000",
    "naïve café Straße, cafe\u0301",
    "東京都に行きました。中文字符",
    "مرحبا بالعالم, שלום",
    "👩‍👩‍👧‍👦🏳️‍🌈😀 " * 3,
    "ሰላም ᚠᛇᚻ 𓀀𓂀 \U0010ffff\ufffd\ufeff",  # scripts that the training text does not have
    "before\x00after",
    ALL_CONTROLS,
    "Don't you'll I'VE 12345 3.14 x_1=f(a[0])",
    f"{END}",
    f"a{END}{END} b <|endoftext| > <|ENDOFTEXT|>",
]


def random_texts(count, seed=0):
    """Any characters but surrogates, which have no UTF-8."""
    source = random.Random(seed)
    texts = []
    for _ in range(count):
        limit = source.choice([0x80, 0x800, 0x10000, 0x110000])
        points = (source.randrange(limit) for _ in range(source.randint(1, 60)))
        texts.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
    return texts


EVERY_TEXT = [*TEXTS, *random_texts(200)]


def test_any_text_survives_the_round_trip(tokenizer):
    for text in EVERY_TEXT:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert max(ids, default=0) < len(tokenizer)


def test_the_encoder_of_corpus_text_round_trips_and_never_gives_the_control_id(tokenizer):
    encoder = text_encoder(tokenizer)
    for text in EVERY_TEXT:
        ids = encoder.encode(text, add_special_tokens=False).ids
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_text_that_spells_the_control_token(tokenizer, tmp_path):
    text = f"one{END}two"
    ids = text_encoder(tokenizer).encode(text, add_special_tokens=False).ids
    assert tokenizer.eos_token_id not in ids and tokenizer.decode(ids) == text
    # The setting is the encoder's own: neither the tokenizer nor what is saved of it has it.
    tokenizer.save_pretrained(tmp_path)
    for kept in [tokenizer, AutoTokenizer.from_pretrained(tmp_path)]:
        assert kept(END)["input_ids"] == [kept.eos_token_id]
        assert kept(text)["input_ids"].count(kept.eos_token_id) == 1


def test_encoder_and_tokenizer_do_not_set_each_other(tokenizer):
    encoder = text_encoder(tokenizer)
    before = encoder.encode(END, add_special_tokens=False).ids
    assert len(before) > 1
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=1)
    assert tokenizer(END)["input_ids"] == [tokenizer.eos_token_id]
    assert encoder.encode(END, add_special_tokens=False).ids == before
    assert not tokenizer.backend_tokenizer.encode_special_tokens


def test_the_encoder_neither_cuts_nor_pads(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    other(["a", "b c d e f g"], truncation=True, max_length=2, padding="max_length")
    texts = ["a", "a b c d e f g h i j"]
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    found = text_encoder(other).encode_batch_fast(texts, add_special_tokens=False)
    assert [encoding.ids for encoding in found] == expected


def test_the_special_tokens_are_one_id(tokenizer):
    assert tokenizer(END)["input_ids"] == [tokenizer.eos_token_id]
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert tokenizer.all_special_tokens == [END]
    assert tokenizer.decode([tokenizer.eos_token_id]) == END
    assert tokenizer.decode([tokenizer.eos_token_id], skip_special_tokens=True) == ""


@pytest.mark.parametrize("vocab_size", [257, 258, 300, 384])
def test_the_vocabulary_is_exactly_as_asked(texts, vocab_size):
    trained = train_tokenizer(texts, vocab_size=vocab_size)
    assert len(trained) == trained.vocab_size == vocab_size
    assert sorted(trained.get_vocab().values()) == list(range(vocab_size))
    for text in EVERY_TEXT:
        assert trained.decode(trained(text)["input_ids"]) == text


def test_the_smallest_vocabulary_is_the_bytes(texts):
    smallest = train_tokenizer(texts, vocab_size=257)
    encoder = text_encoder(smallest)
    for text in EVERY_TEXT:
        assert len(encoder.encode(text).ids) == len(text.encode())


@pytest.mark.parametrize("texts_given, available", [([], 257), (["aaaa"], 259), (["ab ab"], 259)])
def test_a_vocabulary_that_the_text_cannot_fill_names_what_it_can(texts_given, available):
    with pytest.raises(InputError) as caught:
        train_tokenizer(texts_given, vocab_size=50000)
    message = str(caught.value)
    assert "tokenizer.vocab_size is 50000" in message and f" {available} entries" in message
    assert len(train_tokenizer(texts_given, vocab_size=available)) == available


@pytest.mark.slow
def test_the_same_texts_give_the_same_file_in_any_process(texts, tmp_path):
    digests = []
    for number in range(2):
        train_tokenizer(iter(texts), vocab_size=384).save_pretrained(tmp_path / str(number))
        content = (tmp_path / str(number) / "tokenizer.json").read_bytes()
        digests.append(hashlib.sha256(content).hexdigest())
    # Rust's and Python's hash seeds differ from process to process; this one's is set apart too.
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    code = (
        "import json, sys\n"
        "from pipeline.tokenizer import train_tokenizer\n"
        "texts = json.load(open(sys.argv[1]))\n"
        "train_tokenizer(texts, vocab_size=384).save_pretrained(sys.argv[2])\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "texts.json"), str(tmp_path / "other")],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
    )
    content = (tmp_path / "other" / "tokenizer.json").read_bytes()
    digests.append(hashlib.sha256(content).hexdigest())
    assert len(set(digests)) == 1


def test_other_texts_give_another_fingerprint(texts, tokenizer):
    same = train_tokenizer(texts, vocab_size=384)
    assert tokenizer_fingerprint(same) == tokenizer_fingerprint(tokenizer)
    for other in [
        train_tokenizer(texts, vocab_size=383),
        train_tokenizer(["qq zz " * 9 + text for text in texts], vocab_size=384),
    ]:
        assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)


def test_token_bytes_add_up_to_the_text(tokenizer):
    lengths = token_bytes(tokenizer)
    encoder = text_encoder(tokenizer)
    assert lengths.shape == (len(tokenizer),)
    assert lengths[tokenizer.eos_token_id] == 0
    assert (lengths == 0).sum() == 1 and lengths.max() > 1
    for text in EVERY_TEXT:
        ids = encoder.encode(text, add_special_tokens=False).ids
        assert lengths[ids].sum() == len(text.encode())


def test_the_saved_folder_opens_with_transformers_alone(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for opened in [AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))]:
        assert opened.is_fast and len(opened) == len(tokenizer)
        assert (opened.bos_token, opened.eos_token, opened.pad_token) == (END, END, END)
        for text in EVERY_TEXT:
            ids = opened(text)["input_ids"]
            assert ids == tokenizer(text)["input_ids"]
            assert opened.decode(ids) == text
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path))) == tokenizer_fingerprint(tokenizer)


def test_missing_bos_and_pad_become_end_of_text(tokenizer, tmp_path):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=END)
    bare.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.bos_token_id == loaded.pad_token_id == loaded.eos_token_id
    assert len(loaded) == len(tokenizer)


def test_two_files_as_gpt2_was_published_are_a_tokenizer(tokenizer, tmp_path):
    tokenizer.backend_tokenizer.model.save(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["merges.txt", "vocab.json"]
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.eos_token_id == loaded.pad_token_id == tokenizer.eos_token_id
    for text in EVERY_TEXT:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match="no tokenizer in this folder.*tokenizer_config.json"):
        load_tokenizer(str(tmp_path))


def test_an_unknown_name_is_one_sentence():
    with pytest.raises(InputError) as caught:
        load_tokenizer("nobody/no-such-tokenizer")
    message = str(caught.value)
    assert message.startswith("nobody/no-such-tokenizer: cannot be loaded") and "\n" not in message


def test_a_broken_tokenizer_file_is_one_sentence(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path))}: [^\n]*$"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_end_of_text_is_refused(tokenizer, tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path):
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, END: 1, "a": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="only byte-level BPE"):
        load_tokenizer(str(tmp_path))


@pytest.fixture
def corpus(tmp_path, texts):
    folder = tmp_path / "text"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_text(text)
    return Corpus(
        DataSection(files=[str(folder)], hold_out="tail", validation_fraction=0.5, test_fraction=0)
    )


def test_obtain_trains_on_training_text_only_and_once(corpus, texts, tmp_path):
    section = TokenizerSection(vocab_size=300)
    folder = tmp_path / "tokenizer"
    first = obtain_tokenizer(section, corpus, folder)
    alone = train_tokenizer([text[: len(text) // 2] for text in texts], vocab_size=300)
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(alone)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = obtain_tokenizer(section, corpus, folder)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(first)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_obtain_refuses_a_folder_made_by_another_recipe(corpus, tmp_path):
    obtain_tokenizer(TokenizerSection(vocab_size=300), corpus, tmp_path / "tokenizer")
    with pytest.raises(InputError, match=r"tokenizer\.vocab_size: 300 -> 301"):
        obtain_tokenizer(TokenizerSection(vocab_size=301), corpus, tmp_path / "tokenizer")


def test_obtain_leaves_nothing_where_training_is_refused(corpus, tmp_path):
    with pytest.raises(InputError, match="entries"):
        obtain_tokenizer(TokenizerSection(vocab_size=60000), corpus, tmp_path / "new" / "tokenizer")
    assert list((tmp_path / "new").iterdir()) == []


def test_obtain_loads_what_is_named_and_writes_nothing(corpus, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "given")
    given = str(tmp_path / "given")
    for section, model in [
        (TokenizerSection(pretrained=given), None),
        (TokenizerSection(), ModelSection(pretrained=given)),
    ]:
        found = obtain_tokenizer(section, corpus, tmp_path / "unused", model=model)
        assert tokenizer_fingerprint(found) == tokenizer_fingerprint(tokenizer)
    assert not (tmp_path / "unused").exists()


def test_obtain_refuses_other_entries_than_the_model_was_trained_with(
    corpus, texts, tokenizer, tmp_path
):
    tokenizer.save_pretrained(tmp_path / "model")
    train_tokenizer(texts, vocab_size=300).save_pretrained(tmp_path / "other")
    given, model = str(tmp_path / "other"), ModelSection(pretrained=str(tmp_path / "model"))
    with pytest.raises(
        InputError, match=f"^tokenizer.pretrained {given}: .*{model.pretrained} was trained"
    ):
        obtain_tokenizer(TokenizerSection(pretrained=given), corpus, tmp_path / "t", model=model)
    tokenizer.save_pretrained(given)
    obtain_tokenizer(TokenizerSection(pretrained=given), corpus, tmp_path / "t", model=model)


# -- the sample it is trained on ------------------------------------------------------------------


def test_a_sample_as_large_as_the_text_is_the_training_text(corpus):
    found = "".join(training_sample(corpus, TokenizerSection(vocab_size=300)))
    assert found == "".join(corpus.texts("train"))


def test_a_sample_is_taken_evenly_from_all_over_the_training_text(corpus, texts, monkeypatch):
    monkeypatch.setattr(sources, "SHARD_BYTES", (1, 1))  # a shard for each file
    corpus = Corpus(corpus.reader.section)
    wanted = sum(len(text.encode()) for text in texts) // 10
    section = TokenizerSection(vocab_size=300, sample_bytes=wanted)
    found = list(training_sample(corpus, section))
    assert len(found) == len(texts)
    for part, text in zip(found, texts, strict=True):
        assert text.startswith(part) and part
        assert abs(len(part.encode()) - len(text.encode()) / 10) < 5
    assert sum(len(part.encode()) for part in found) <= wanted + len(corpus.shards)  # rounded up


def test_a_sample_has_only_the_beginning_of_a_long_document(corpus, texts, monkeypatch):
    monkeypatch.setattr(text_files, "WINDOW", 64)
    section = TokenizerSection(vocab_size=300, sample_document_characters=100)
    found = "".join(training_sample(corpus, section))
    assert found == "".join(text[: len(text) // 2][:100] for text in texts)


@pytest.mark.parametrize("given", [False, True])
def test_a_sample_has_no_text_that_is_held_out(texts, tmp_path, given):
    for folder, part in [("t", texts[:30]), ("v", texts[30:])]:
        (tmp_path / folder).mkdir()
        for number, text in enumerate(part):
            (tmp_path / folder / f"{number:03}.txt").write_text(text)
    values = {"validation_files": [str(tmp_path / "v")]} if given else {"validation_fraction": 0.4}
    data = DataSection(files=[str(tmp_path / "t")], hold_out="documents", test_fraction=0, **values)
    corpus = Corpus(data)
    found = list(training_sample(corpus, TokenizerSection(vocab_size=300)))
    assert found == list(corpus.texts("train"))
    assert (found == texts[:30]) is given and set(corpus.texts("validation")).isdisjoint(found)


def test_compare_says_how_many_bytes_a_token_stands_for(texts, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("".join(texts[:10]))
    (tmp_path / "b.txt").write_text("東京都に行きました。" * 100)
    files = [{"files": str(tmp_path / f"{name}.txt"), "name": name} for name in "ab"]
    corpus = Corpus(DataSection(sources=files))
    smallest = train_tokenizer(texts, vocab_size=257)
    head, a, b = compare(corpus, {"ours": tokenizer, "bytes": smallest}).splitlines()
    assert head.split() == ["bytes", "per", "token", "ours", "bytes"]
    assert a.split()[0] == "a" and b.split()[0] == "b"
    assert a.split()[2] == b.split()[2] == "1.000"
    # A tail is cut where it is: at most a token is another one.
    text = "".join(texts[:10])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert abs(float(a.split()[1]) - len(text.encode()) / len(ids)) < 0.02
    assert len({len(line) for line in (head, a, b)}) == 1


def test_other_machines_wait_for_the_tokenizer(corpus, tmp_path, monkeypatch):
    section, folder, waited = TokenizerSection(vocab_size=300), tmp_path / "tokenizer", []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 2:
            obtain_tokenizer(section, corpus, folder)

    monkeypatch.setattr(tokenizer_module.time, "sleep", sleep)
    await_tokenizer(section, folder, rank=0)
    await_tokenizer(TokenizerSection(pretrained="any"), folder, rank=1)
    assert waited == []
    await_tokenizer(section, folder, rank=1)
    assert len(waited) == 2 and load_tokenizer(str(folder)) is not None


def test_text_of_nothing_is_said_to_be_nothing(tmp_path):
    (tmp_path / "nl.jsonl").write_text('{"text": ""}\n' * 200)
    corpus = Corpus(DataSection(files=[str(tmp_path / "nl.jsonl")]))
    with pytest.raises(InputError, match="there is no training text: every document is empty"):
        obtain_tokenizer(TokenizerSection(vocab_size=300), corpus, tmp_path / "tokenizer")
