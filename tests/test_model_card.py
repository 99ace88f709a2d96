"""The card says what the page says, in Markdown that text cannot break."""

import re

from huggingface_hub import ModelCard
from run_folders import write_run

from pipeline.model_card import model_card
from pipeline.report_parts import run_parts
from pipeline.run_record import read_run


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
