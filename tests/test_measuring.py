"""Numbers of texts, against sums made another way."""

import math
import random

import evaluate
import numpy as np
import oracle
import pytest
import torch
from conftest import WORDS, roughened
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GPT2LMHeadModel,
    LlamaConfig,
)

from pipeline.measuring import loaded, measure_texts
from pipeline.model import build_model
from pipeline.perplexity import MEASURES, load_metric
from pipeline.recipe import InputError, ModelSection
from pipeline.tokenizer import train_tokenizer

NUMBERS = [name for name in MEASURES]


@pytest.fixture
def model(rough_model):
    return rough_model


def random_texts(source, texts):
    """Return texts of all lengths, cut anywhere, an odd one among them."""
    found = [t[: source.choice([1, 2, 9, 30, 90, 250])] for t in source.sample(texts, 5)]
    return [*found, "<|endoftext|> is text, naïve 東京 😀", "a"]


# -- the figure: twenty and more random configurations ---------------------------------------------


@pytest.mark.parametrize("seed", range(24))
def test_numbers_equal_a_plain_fp64_computation(texts, seed):
    source = random.Random(seed)
    tokenizer = train_tokenizer(texts, vocab_size=source.choice([300, 384, 430]))
    width, heads = source.choice([(32, 2), (48, 4), (64, 1)])
    config = {"n_layer": source.choice([1, 2]), "n_head": heads, "n_embd": width}
    block = source.choice([8, 16, 40])
    model = build_model(ModelSection(config=config), tokenizer, block_size=block, seed=seed)
    model = roughened(model, seed=seed).eval()
    window = source.choice([block, block - 3, 5])
    stride = source.choice([1, 2, window // 2, window - 1])
    given = random_texts(source, texts)
    end = source.random() < 0.5
    options = {"packed": source.random() < 0.4, "batch_size": source.choice([1, 2, 7, 64])}
    if options["packed"]:
        model.set_attn_implementation(source.choice(["eager", "sdpa"]))
    found = measure_texts(
        given, model, tokenizer, block_size=window, stride=stride, add_end_token=end, **options
    ).numbers()
    each = oracle.by_text(model, given, tokenizer, window, stride, end=end)
    expected = oracle.numbers(each, given)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert found["tokens"] == sum(map(len, each)) and found["documents"] == len(given)
    assert found["bytes"] == sum(len(text.encode()) for text in given)
    alone = [math.exp(sum(n for n, _ in text) / len(text)) for text in each]
    assert found["perplexities"] == pytest.approx(alone, rel=1e-5)  # fp32, few tokens each
    # Otherwise any window would give about the same and the test would show little.
    assert found["nats_per_token"] > 1.02 * math.log(len(tokenizer))


@pytest.mark.parametrize("seed", range(6))
def test_texts_laid_end_to_end_equal_a_plain_computation(texts, tokenizer, model, seed):
    source = random.Random(seed)
    given = random_texts(source, texts)
    if seed % 2:
        given = ["", *given[:2], "", *given[2:], ""]
    window = source.choice([16, 9, 3])
    stride = source.choice([1, window // 2, window - 1])
    measured = measure_texts(
        given, model, tokenizer, joined=True, block_size=window, stride=stride,
        batch_size=source.choice([1, 3, 50]),
    )  # fmt: skip
    each = oracle.joined(model, given, tokenizer, window, stride)
    assert measured.score.tokens.tolist() == [len(text) for text in each]
    sums = [math.fsum(n for n, _ in text) for text in each]
    assert measured.score.nats.tolist() == pytest.approx(sums, rel=1e-5, abs=1e-5)
    assert measured.score.nats.sum() == pytest.approx(math.fsum(sums), rel=1e-6)
    assert measured.score.correct.tolist() == [sum(hit for _, hit in text) for text in each]
    first = next(text for text in given if text)
    missing = len(tokenizer.convert_ids_to_tokens(oracle.ids_of(first, tokenizer)[0]))
    assert measured.numbers()["bytes"] == sum(len(t.encode()) for t in given) - missing


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("block_size", [5, 16])
def test_a_model_that_kept_documents_apart_is_scored_so(
    model, tokenizer, beginnings, block_size, attention
):
    """Windows lie as over the stream; what a window holds of a text is run by itself."""
    texts = [text[: 1 + 7 * number] for number, text in enumerate(beginnings[:12])]
    model.set_attn_implementation(attention)
    model.config.attend_across = False
    score = measure_texts(texts, model, tokenizer, joined=True, block_size=block_size).score
    plain, expected, begin, step = oracle.in_fp64(model), [], 0, block_size - 1
    for text in texts:
        ids = oracle.stream_of([text], tokenizer)
        places = range(begin, begin + len(ids))
        nats = 0.0
        for window in range(begin // step, places[-1] // step + 1):
            inside = [p for p in places if window * step <= p <= (window + 1) * step]
            piece = [ids[p - begin] for p in inside]
            nats += math.fsum(n for n, _ in oracle.scores(plain, piece, block_size, step).values())
        expected.append(nats)
        begin += len(ids)
    assert score.nats.tolist() == pytest.approx(expected, rel=1e-5)
    assert score.tokens.tolist() == [len(oracle.stream_of([t], tokenizer)) - 1 for t in texts]


# -- what must not change a number -----------------------------------------------------------------


def test_batches_packing_and_pieces_change_nothing(model, tokenizer, beginnings):
    texts = [text[: 10 + 9 * number] for number, text in enumerate(beginnings[:15])]
    plain = measure_texts(texts, model, tokenizer).numbers()
    pieces = [iter([text[:7], text[7:]]) if " " in text[7:8] else text for text in texts]
    others = [
        measure_texts(texts, model, tokenizer, batch_size=size).numbers() for size in (1, 3, 1000)
    ]
    others.append(measure_texts(texts, model, tokenizer, packed=True).numbers())
    others.append(measure_texts(iter(pieces), model, tokenizer).numbers())
    order = list(range(len(texts)))[::-1]
    turned = measure_texts([texts[n] for n in order], model, tokenizer).numbers()
    for found in others:
        assert found["perplexities"] == pytest.approx(plain["perplexities"], rel=1e-5)
        for name in (*NUMBERS, "tokens", "bytes", "words"):
            assert found[name] == pytest.approx(plain[name], rel=1e-6)
    assert turned["perplexities"][::-1] == pytest.approx(plain["perplexities"], rel=1e-5)


def test_the_smaller_the_stride_the_more_context(model, tokenizer, beginnings):
    """With a model that has learned nothing there is no gain, so only the work is looked at."""
    found = {
        stride: measure_texts(beginnings[:3], model, tokenizer, stride=stride).numbers()
        for stride in (1, 8, 15)
    }
    assert len({numbers["tokens"] for numbers in found.values()}) == 1
    assert len({numbers["perplexity"] for numbers in found.values()}) == 3


def test_another_architecture_is_scored_by_its_own_forward(tokenizer, beginnings):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = roughened(AutoModelForCausalLM.from_config(config), 0.1).eval()
    found = measure_texts(beginnings[:4], model, tokenizer, block_size=20).numbers()
    each = oracle.by_text(model, beginnings[:4], tokenizer, 20, 19)
    expected = oracle.numbers(each, beginnings[:4])
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)


# -- options ---------------------------------------------------------------------------------------


def test_without_a_start_token_the_first_token_is_context(model, tokenizer, beginnings):
    texts = [*beginnings[:4], "a", ""]
    found = measure_texts(texts, model, tokenizer, add_start_token=False)
    each = oracle.by_text(model, texts, tokenizer, 16, 15, start=False)
    assert found.score.tokens.tolist() == [len(text) for text in each]
    assert found.score.nats.sum() == pytest.approx(sum(n for text in each for n, _ in text))
    numbers = found.numbers()
    assert numbers["documents"] == 4 and numbers["nothing_to_predict"] == 2
    assert numbers["perplexities"][4:] == [None, None]
    firsts = [oracle.ids_of(text, tokenizer)[0] for text in texts[:4]]
    missing = sum(len(tokenizer.convert_ids_to_tokens(i)) for i in firsts)
    assert numbers["bytes"] == sum(len(t.encode()) for t in texts[:4]) - missing


def test_the_start_token_follows_how_the_model_was_trained(model, tokenizer, beginnings):
    with_it = measure_texts(beginnings[:3], model, tokenizer).score.tokens.sum()
    model.config.attend_across = False
    assert measure_texts(beginnings[:3], model, tokenizer).score.tokens.sum() == with_it - 3
    asked = measure_texts(beginnings[:3], model, tokenizer, add_start_token=True)
    assert asked.score.tokens.sum() == with_it


@pytest.mark.parametrize("start", [True, False])
def test_texts_are_cut_at_max_length_and_counted(model, tokenizer, beginnings, start):
    texts = [beginnings[0], "the a", beginnings[1]]
    found = measure_texts(texts, model, tokenizer, max_length=12, add_start_token=start).numbers()
    assert found["truncated"] == 2
    kept = [oracle.ids_of(text, tokenizer)[: 12 - start] for text in texts]
    assert found["tokens"] == sum(len(ids) - (not start) for ids in kept)
    plain = oracle.in_fp64(model)
    expected = [
        math.fsum(n for n, _ in oracle.scores(plain, [0] * start + ids, 16, 15).values())
        for ids in kept
    ]
    assert found["nats_per_token"] * found["tokens"] == pytest.approx(sum(expected), rel=1e-6)
    spans = [tokenizer.decode(ids[not start :]) for ids in kept]
    assert found["bytes"] == sum(len(text.encode()) for text in spans)
    assert found["words"] == sum(len(text.split()) for text in spans)


def test_cut_texts_in_pieces_are_cut_as_the_whole(model, tokenizer, beginnings):
    text = beginnings[0]
    cut = text.index(" ", 20)
    whole = measure_texts([text], model, tokenizer, max_length=9).numbers()
    pieces = measure_texts([iter([text[:cut], text[cut:]])], model, tokenizer, max_length=9)
    assert pieces.numbers() == whole and whole["truncated"] == 1


@pytest.mark.parametrize("start", [True, False])
def test_the_last_word_alone_is_scored(model, tokenizer, start):
    texts = [
        "the model reads text and learns whole ",
        "naïve façade",
        "rows of ids that a tokenizer cut with bytes and merges whole gradient steps 東京\n",
        "word",
        "",
    ]
    found = measure_texts(
        texts, model, tokenizer, target="last_word", add_start_token=start
    ).numbers()
    plain = oracle.in_fp64(model)
    nats, exact, tokens = [], [], []
    for text in texts:
        words = text.rstrip().rsplit(" ", 1)
        target = oracle.ids_of(" " * (len(words) > 1) + words[-1], tokenizer)
        context = oracle.ids_of(words[0], tokenizer) if len(words) > 1 else []
        sequence = ([tokenizer.eos_token_id] * start + context + target)[-16:]
        if not target or len(sequence) == len(target):
            continue
        each = list(oracle.scores(plain, sequence, 16, 15, len(sequence) - len(target)).values())
        assert len(each) == len(target)
        nats.append(math.fsum(n for n, _ in each))
        exact.append(all(hit for _, hit in each))
        tokens.append(len(target))
    assert found["tokens"] == sum(tokens) and found["words"] == found["documents"] == len(nats)
    assert found["word_perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-6)
    assert found["last_word_accuracy"] == sum(exact) / len(exact)
    assert found["nothing_to_predict"] == (1 if start else 2)


def test_a_known_last_word_is_found(tokenizer, tiny_model):
    """A head that always says the same token finds just the texts that end in it."""
    words = [text for text in WORDS if len(oracle.ids_of(f" {text}", tokenizer)) == 1]
    ids = oracle.ids_of(f" {words[0]}", tokenizer)
    with torch.no_grad():
        tiny_model.lm_head.weight.zero_()  # the embedding, too: all hidden states are alike
        tiny_model.transformer.ln_f.weight.zero_()
        tiny_model.transformer.ln_f.bias.fill_(1)
        tiny_model.lm_head.weight[ids[0]] = 1
    said, other = words[:2]
    texts = [f"a model reads {said}", f"a {said} {other}", f"of {said}", f"{said} reads"]
    found = measure_texts(texts, tiny_model, tokenizer, target="last_word").numbers()
    assert found["last_word_accuracy"] == 0.5


def test_wikitext_is_put_back_as_the_benchmark_does():
    """Against the convention's own code in lm-eval."""
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    from pipeline.conventions import wikitext

    texts = [
        ' = Robert Boulter = \n \n He said " that \' s it " , and ( in 2000 ) the M @-@ 82 ; 1'
        " @,@ 234 @.@ 5 : [ x ] { y } ! ? \n = = Early life = = \n = = = A = = = \n"
        " 21 ° N of the dogs ' tails",
        " . , ; : a . , b ",
        "s ' s 's N N ( ( a ) ) \" \" ' ' ' ",
    ]
    marks = list(" \n'\".,;:!?()[]{}=°@-N") + ["s '", " @-@ ", " @,@ ", " = = ", "word", "1"]
    source = random.Random(0)
    texts += ["".join(source.choices(marks, k=60)) for _ in range(300)]
    for text in texts:
        assert wikitext(text) == wikitext_detokenizer({"page": text})


def test_detokenised_text_is_scored_and_the_text_itself_is_counted(model, tokenizer):
    text = " = the model = \n of text @-@ rows , and ( ids ) . \n"
    found = measure_texts([text], model, tokenizer, detokenize="wikitext").numbers()
    put_back = " = the model =\nof text-rows, and (ids).\n"
    assert found["tokens"] == len(oracle.ids_of(put_back, tokenizer))
    each = oracle.by_text(model, [put_back], tokenizer, 16, 15)
    assert found["nats_per_token"] == pytest.approx(oracle.numbers(each, [text])["nats_per_token"])
    assert found["bytes"] == len(text.encode()) and found["words"] == len(text.split())


# -- the metric ------------------------------------------------------------------------------------


def test_the_metric_gives_the_same_numbers_and_needs_no_network(model, tokenizer, beginnings):
    metric = load_metric()
    for options in [{}, {"block_size": 7, "stride": 3, "batch_size": 3}, {"joined": True}]:
        found = metric.compute(
            predictions=beginnings[:4], model=model, tokenizer=tokenizer, **options
        )
        assert found == measure_texts(beginnings[:4], model, tokenizer, **options).numbers()
    assert metric.description and "jelinek1977" in metric.citation
    assert "add_start_token" in metric.inputs_description
    assert set(metric.features) == {"predictions"}


def test_the_metric_takes_texts_bit_by_bit_and_stands_beside_another(model, tokenizer, beginnings):
    whole = load_metric().compute(predictions=beginnings[:3], model=model, tokenizer=tokenizer)
    metric = load_metric()
    metric.add_batch(predictions=beginnings[:2])
    metric.add(predictions=beginnings[2])
    assert metric.compute(model=model, tokenizer=tokenizer) == whole
    both = evaluate.combine({"one": load_metric(), "two": load_metric()})
    found = both.compute(predictions=beginnings[:3], model=model, tokenizer=tokenizer)
    assert found["one_perplexity"] == found["two_perplexity"] == whole["perplexity"]


def test_the_metric_takes_a_folder(model, tokenizer, beginnings, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    metric = load_metric()
    found = metric.compute(predictions=beginnings[:2], model=str(tmp_path))
    expected = measure_texts(beginnings[:2], model, tokenizer).numbers()
    assert found["perplexities"] == pytest.approx(expected["perplexities"], rel=1e-6)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert metric.compute(predictions=beginnings[:2], model=opened)["tokens"] == found["tokens"]


def test_intervals_come_with_every_number(model, tokenizer, beginnings):
    found = measure_texts(beginnings, model, tokenizer).numbers()
    for name in NUMBERS:
        low, high = found["confidence_intervals"][name]
        assert low < found[name] < high
    one = measure_texts(beginnings[:1], model, tokenizer).numbers()
    assert set(one["confidence_intervals"].values()) == {None}


# -- sentences -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"block_size": 17}, "block_size is 17, but the model has 16 positions"),
        ({"block_size": 1}, "block_size is 1: a window has a context and a token, so 2"),
        ({"stride": 0}, "stride is 0: windows of 16 tokens begin every 1 to 15 tokens"),
        ({"stride": 16}, "stride is 16: windows of 16 tokens begin every 1 to 15 tokens"),
        ({"block_size": 8, "stride": 9}, "stride is 9: windows of 8 tokens begin every 1 to 7"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"joined": True, "packed": True}, "have a meaning for texts each by itself only"),
        ({"joined": True, "add_start_token": False}, "have a meaning for texts each by itself"),
        ({"target": "first_word"}, "target is 'first_word'; it is all, last_word or completion"),
        ({"target": "last_word", "joined": True}, "target last_word is for texts each by itself"),
        ({"detokenize": "ptb"}, "detokenize is 'ptb'; known: wikitext"),
        ({"max_length": 1}, "max_length is 1: at least 2 tokens"),
        ({"device": "abacus"}, "device abacus: "),
        ({"packed": True}, "attn_implementation: sdpa_causal has no mask"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(tiny_model, tokenizer, options, sentence):
    if options == {"packed": True}:
        tiny_model.set_attn_implementation("sdpa_causal")
    with pytest.raises(InputError) as caught:
        measure_texts(["abc"], tiny_model, tokenizer, **options)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "options", "sentence"),
    [
        ([], {}, "there are no texts to score: the list is empty"),
        ([""], {}, "the text has no token to predict: give more than an empty text"),
        (["", ""], {"joined": True}, "the 2 texts have no token to predict"),
        (["a"], {"add_start_token": False}, "or a single token, which has no context here"),
        (["", "a"], {"add_start_token": False}, "the 2 texts have no token to predict"),
    ],
)
def test_nothing_to_predict_is_refused(tiny_model, tokenizer, given, options, sentence):
    with pytest.raises(InputError) as caught:
        measure_texts(given, tiny_model, tokenizer, **options)
    assert sentence in str(caught.value)


def test_texts_without_a_token_to_predict_are_said(tiny_model, tokenizer, caplog):
    found = measure_texts(["", "the model", "a", ""], tiny_model, tokenizer, add_start_token=False)
    assert found.numbers()["nothing_to_predict"] == 3
    assert "3 of 4 texts have no token to predict (their first one has no context" in caplog.text
    assert all(np.isfinite(found.numbers()[name]) for name in NUMBERS)


@pytest.mark.parametrize(
    ("predictions", "sentence"),
    [
        ([], "there are no texts to score: the list is empty"),
        ("a text", "predictions is one text; give a list of texts"),
        (["a", 3], "predictions[1] is 3 and not text; give a list of str"),
        ([None], "predictions[0] is None and not text"),
        (["a", "\ud800"], "predictions[1] holds half of a surrogate pair"),
    ],
)
def test_what_is_no_list_of_texts_is_one_sentence(tiny_model, tokenizer, predictions, sentence):
    with pytest.raises(InputError) as caught:
        load_metric().compute(predictions=predictions, model=tiny_model, tokenizer=tokenizer)
    assert sentence in str(caught.value)


def test_models_and_tokenizers_that_do_not_belong_together(tiny_model, tokenizer, texts, tmp_path):
    with pytest.raises(InputError, match="390 entries and the model 384"):
        loaded(tiny_model, train_tokenizer(texts, vocab_size=390))
    tiny_model.config.eos_token_id = 5
    with pytest.raises(InputError, match="end-of-text is id 0 in the tokenizer and 5 in the model"):
        loaded(tiny_model, tokenizer)
    with pytest.raises(InputError, match="does not say where its tokenizer is"):
        loaded(tiny_model)
    with pytest.raises(InputError, match="no model in this folder"):
        loaded(str(tmp_path))
    with pytest.raises(InputError, match="give model: a loaded model, a folder or a Hub name"):
        load_metric().compute(predictions=["a"])


# -- corners ---------------------------------------------------------------------------------------


def test_a_text_that_is_cut_does_not_end(model, tokenizer):
    options = {"max_length": 5, "add_end_token": True}
    found = measure_texts(["the model reads text and learns"], model, tokenizer, **options)
    assert found.score.tokens.tolist() == [4] and found.truncated == 1
    short = measure_texts(["a"], model, tokenizer, **options)
    assert short.score.tokens.tolist() == [2] and short.truncated == 0


def test_an_empty_piece_begins_no_text(model, tokenizer):
    whole = measure_texts(["the model reads"], model, tokenizer, add_start_token=False)
    for joined in (False, True):
        options = {"joined": True} if joined else {"add_start_token": False}
        pieces = measure_texts([iter(["", "the model", " reads"])], model, tokenizer, **options)
        assert pieces.score.bytes.tolist() == whole.score.bytes.tolist()


def test_a_giant_text_is_encoded_in_pieces(model, tokenizer, beginnings, monkeypatch):
    text = " ".join(beginnings)
    whole = measure_texts([text], model, tokenizer).numbers()
    monkeypatch.setattr("pipeline.text_files.WINDOW", 300)
    monkeypatch.setattr("pipeline.text_pieces.ENCODED_TOGETHER", 300)
    pieces = measure_texts([text], model, tokenizer).numbers()
    assert pieces["nats_per_token"] == pytest.approx(whole["nats_per_token"], rel=1e-6)
    assert [pieces[n] for n in ("tokens", "bytes", "words")] == [
        whole[n] for n in ("tokens", "bytes", "words")
    ]


def test_what_needs_a_whole_text_gets_it(model, tokenizer, beginnings, monkeypatch):
    text = " ".join(beginnings)
    options = [{"target": "last_word"}, {"detokenize": "wikitext"}]
    whole = [measure_texts([text], model, tokenizer, **o).score.tokens.tolist() for o in options]
    monkeypatch.setattr("pipeline.text_files.WINDOW", 300)
    pieces = [measure_texts([text], model, tokenizer, **o).score.tokens.tolist() for o in options]
    assert pieces == whole


def test_a_last_word_longer_than_the_window_is_scored_whole(model, tokenizer):
    word = "東京" * 20
    ids = oracle.ids_of(f" {word}", tokenizer)
    found = measure_texts([f"the {word}"], model, tokenizer, target="last_word")
    assert found.score.tokens.tolist() == [len(ids)] and len(ids) > 16
    assert found.score.bytes.tolist() == [len(word.encode()) + 1] and found.truncated == 1


def test_what_stands_before_a_last_word_is_context(model, tokenizer):
    one = measure_texts(["the model\nreads"], model, tokenizer, target="last_word")
    assert one.score.bytes.tolist() == [5]  # the line feed is no part of the word
    other = measure_texts(["the model  reads "], model, tokenizer, target="last_word")
    assert other.score.bytes.tolist() == [6]


def test_the_accuracy_of_last_words_has_an_interval(model, tokenizer, beginnings):
    found = measure_texts(beginnings, model, tokenizer, target="last_word").numbers()
    low, high = found["confidence_intervals"]["last_word_accuracy"]
    assert low <= found["last_word_accuracy"] <= high


def test_a_giant_perplexity_is_no_nan(model, tokenizer):
    """Few white spaces: so many nats a word that no float holds the perplexity."""
    texts = ["東京" * 150 + "a" * n for n in range(1, 6)]
    found = measure_texts(texts, model, tokenizer).numbers()
    ends = found["confidence_intervals"]["word_perplexity"]
    assert found["word_perplexity"] == math.inf and (ends is None or not np.isnan(ends).any())


def test_models_that_cannot_be_scored_are_one_sentence(tiny_model, tokenizer, texts, tmp_path):
    masked = BertLMHeadModel(
        BertConfig(
            vocab_size=384,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )  # fmt: skip
    )
    with pytest.raises(InputError, match="a bert sees the tokens after the one that it predicts"):
        measure_texts(["abc"], masked, tokenizer)
    config = LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, eos_token_id=0,
    )  # fmt: skip
    llama = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match="packed is for GPT-2.*this is a llama: leave it out"):
        measure_texts(["abc"], llama, tokenizer, packed=True)
    with pytest.raises(InputError, match="is not the one in .*, where the model is from"):
        tiny_model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        other = train_tokenizer([t.upper() for t in texts], vocab_size=380)
        measure_texts(["abc"], GPT2LMHeadModel.from_pretrained(tmp_path), other)
    with torch.no_grad():
        tiny_model.transformer.ln_f.bias[0] = math.nan
    with pytest.raises(InputError, match="its probabilities are not numbers"):
        measure_texts(["abc"], tiny_model, tokenizer)


def test_too_little_memory_is_one_sentence(tiny_model, tokenizer, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 TB")

    monkeypatch.setattr(tiny_model.transformer, "forward", full)
    with pytest.raises(InputError, match="batch_size 8 x block_size 16: so many tokens in one"):
        measure_texts(["abc"], tiny_model, tokenizer)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"predictions": {"a": "b"}}, "predictions is a dict; give a list of texts"),
        ({"predictions": 3}, "predictions is a int; give a list of texts"),
        ({"model": 3}, "model is 3: give a loaded model, a folder or a Hub name"),
        ({"model": None}, "model is None: give a loaded model"),
        ({"stride": "3"}, "stride is '3': give a whole number of tokens"),
        ({"stridee": 3}, "stridee: unknown option; did you mean stride?"),
        ({"batch_size": 2.5}, "batch_size is 2.5: a forward pass takes at least one window"),
    ],
)
def test_what_the_metric_cannot_take_is_one_sentence(tiny_model, tokenizer, given, sentence):
    options = {"predictions": ["a b"], "model": tiny_model, "tokenizer": tokenizer} | given
    with pytest.raises(InputError) as caught:
        load_metric().compute(**options)
    assert sentence in str(caught.value)


def test_texts_that_come_bit_by_bit_are_checked_too(tiny_model, tokenizer):
    metric = load_metric()
    metric.add_batch(predictions=["ab", None])
    with pytest.raises(InputError, match=r"predictions\[1\] is None and not text"):
        metric.compute(model=tiny_model, tokenizer=tokenizer)
    texts = (text for text in ["ab", "the model"])
    assert load_metric().compute(predictions=texts, model=tiny_model, tokenizer=tokenizer)
