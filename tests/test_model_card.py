"""The card says what the page says, in Markdown that text cannot break."""

import re

import pytest
from huggingface_hub import ModelCard
from run_folders import make_unfinished, write_run

from pipeline.licenses import LICENSES, check_language
from pipeline.model_card import model_card
from pipeline.published_card import published_card, stated_license
from pipeline.report_parts import run_parts
from pipeline.run_record import read_checkpoint, read_run


def test_it_has_every_part_and_the_hub_s_numbers(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    text = model_card(run, base_model="openai-community/gpt2")
    card = ModelCard(text)
    assert card.data.base_model == "openai-community/gpt2"
    assert {(r.dataset_split, r.metric_type) for r in card.data.eval_results} >= {
        ("validation", "bits_per_byte"), ("test", "loss"),
    }  # fmt: skip
    for part in run_parts(run):
        assert f"## {part.title}\n" in text
    assert "| bits per byte | 1.7500 (1.7000 to 1.8000) | 1.8000 |" in text
    assert "(curves.png)" in text and "<details>" in text and "max_steps: 40" in text
    assert str(tmp_path) not in text and "somebody" not in text
    assert ModelCard(model_card(run)).data.base_model is None


def test_samples_and_names_break_nothing(tmp_path):
    folder = write_run(tmp_path / "run", recipe={"data": {"files": ["a|b<c>_d.txt"]}})
    (folder / "samples.txt").write_text("--- update 1\n```\n````\n# no head\n\n")
    text = model_card(read_run(folder))
    fence = re.search(r"^(`{5,})\n```\n````\n# no head\n\1$", text, re.MULTILINE)
    assert fence
    assert "\\<c\\>" in text.split("## Results")[0]


def test_numbers_that_are_none_are_left_out_of_the_metadata(tmp_path):
    run = read_run(write_run(tmp_path / "run", eval_perplexity=float("inf")))
    kinds = {(r.dataset_split, r.metric_type) for r in ModelCard(model_card(run)).data.eval_results}
    assert ("validation", "loss") in kinds and ("validation", "perplexity") not in kinds


def test_the_hub_is_told_what_the_recipe_knows(tmp_path):
    recipe = {
        "hub": {"license": "cc-by-4.0", "language": ["no", "code"]},
        "data": {
            "sources": [
                {"dataset": "Salesforce/wikitext", "weight": 0.5},
                {"dataset": "stas/openwebtext-10k", "weight": 0.5},
            ]
        },
        "model": {"pretrained": "openai-community/gpt2"},
    }
    run = read_run(write_run(tmp_path / "run", recipe=recipe))
    data = ModelCard(model_card(run, base_model="openai-community/gpt2")).data
    assert data.license == "cc-by-4.0" and data.language == ["no", "code"]
    assert data.datasets == ["Salesforce/wikitext", "stas/openwebtext-10k"]
    assert data.base_model_relation == "finetune" and "fine-tuning" in data.tags
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.eval_results[0].dataset_type == "Salesforce/wikitext"


def test_an_adapter_names_its_base(tmp_path):
    recipe = {"model": {"pretrained": "openai-community/gpt2", "lora_r": 8}}
    run = read_run(write_run(tmp_path / "run", recipe=recipe))
    card = ModelCard(model_card(run, base_model="openai-community/gpt2"))
    assert card.data.library_name == "peft" and card.data.base_model_relation == "adapter"
    assert "takes peft, and `openai-community/gpt2` is loaded with it" in card.text


def test_a_folder_is_no_data_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "texts").mkdir(parents=True)
    run = read_run(write_run(tmp_path / "run", recipe={"data": {"dataset": "my/texts"}}))
    assert ModelCard(model_card(run)).data.datasets is None


def test_a_checkpoint_s_card_tells_what_was_known_then(tmp_path):
    folder = make_unfinished(write_run(tmp_path / "run"), step=20)
    text = model_card(read_checkpoint(folder, folder / "checkpoint-20"))
    assert "A checkpoint after 20 of 40 updates, before training had ended." in text
    assert "update 20" in text and "update 30" not in text
    splits = {result.dataset_split for result in ModelCard(text).data.eval_results}
    assert splits == {"validation"} and "metrics.json" not in text


def test_a_card_gets_the_model_s_name(tmp_path):
    card = model_card(read_run(write_run(tmp_path / "run")))
    assert '"path/to/model")' in card and stated_license(card) is None
    sent = published_card(card, "user/name", revision="old", license="mit", language=["bn", "en"])
    assert '"user/name", revision="old")' in sent and "path/to" not in sent
    data = ModelCard(sent).data
    assert (data.license, data.language) == ("mit", ["bn", "en"])
    assert ModelCard(sent).data.eval_results == ModelCard(card).data.eval_results
    assert ModelCard(sent).text.split("## ", 2)[2] == ModelCard(card).text.split("## ", 2)[2]
    assert stated_license(published_card(sent, "user/other")) == "mit"
    assert published_card(card, "a/b").count("a/b") == card.count("path/to/model")


def test_licenses_and_languages_are_the_hub_s():
    assert {"mit", "apache-2.0", "other", "unknown"} <= set(LICENSES)
    assert len(set(LICENSES)) == len(LICENSES) and all(n == n.lower() for n in LICENSES)
    for code in ("en", "bn", "fil", "pt-BR", "zh-Hans-CN", "code", "multilingual"):
        assert check_language(code) == code
    for code in ("English", "EN", "e", "en_US", ""):
        with pytest.raises(ValueError, match="is no code of one; the Hub wants two or three"):
            check_language(code)
