"""What a run leaves to be read: numbers, picture, card, samples, a recipe that repeats it."""

import json
import math

import pytest
import yaml
from conftest import ROOT

from pipeline import measure_perplexity, pretrain, write_report
from pipeline.report import _json_lines
from pipeline.report_parts import run_parts
from pipeline.run_record import read_run

KEYS = (
    "eval_loss eval_perplexity eval_bits_per_byte eval_tokens eval_bytes train_tokens "
    "train_tokens_per_second train_seconds parameters world_size versions git_commit "
    "data_fingerprint tokenizer_fingerprint test_loss test_bits_per_byte hardware"
).split()


@pytest.fixture(scope="module")
def metrics(finished_run):
    return json.loads((finished_run / "metrics.json").read_text())


def test_metrics_has_every_key(metrics):
    assert not [key for key in KEYS if key not in metrics]
    assert metrics["train_tokens"] == 20 * 512
    assert metrics["world_size"] == 1
    assert set(metrics["versions"]) >= {"torch", "transformers", "tokenizers", "datasets"}


def test_the_held_out_numbers_are_repeated_by_measure_perplexity(
    finished_run, metrics, corpus_folder, tmp_path, capsys
):
    lines = (finished_run / "blocks" / "validation_documents.jsonl").open()
    names = [json.loads(line) for line in lines]
    assert len(names) > 1 and all(name.startswith(str(corpus_folder)) for name in names)
    path = tmp_path / "numbers.json"
    measure_perplexity.main(["--model", str(finished_run), "--files", *names, "--json", str(path)])
    numbers = json.loads(path.read_text())["models"][str(finished_run)]
    assert "perplexity" in capsys.readouterr().out
    for name in ("perplexity", "bits_per_byte", "accuracy", "word_perplexity"):
        assert numbers[name] == pytest.approx(metrics[f"eval_{name}"], rel=1e-6)
    assert numbers["tokens"] == metrics["eval_tokens"]
    assert numbers["bytes"] == metrics["eval_bytes"]


def test_the_picture_is_a_picture(finished_run):
    content = (finished_run / "curves.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 5_000


def test_the_logs_are_kept_in_json_of_every_reader(finished_run):
    text = (finished_run / "history.json").read_text()
    logs = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert {log["step"] for log in logs if "eval_loss" in log} == {10, 20}
    assert text.count("\n") == len(logs) + 1  # a log on each line
    odd = json.loads(_json_lines([{"loss": math.nan, "grad_norm": math.inf, "step": 1}]))
    assert odd == [{"loss": None, "grad_norm": None, "step": 1}]


def test_the_page_follows_from_the_folder_alone(finished_run, run_copy):
    """Wherever it lies, and without what training held in memory."""
    page = (finished_run / "report.html").read_text()
    run_copy = run_copy.rename(run_copy.with_name(finished_run.name))
    write_report.main(["--runs", str(run_copy)])
    assert (run_copy / "report.html").read_text() == page


def test_page_and_card_say_the_same_and_name_no_folder(finished_run, metrics, corpus_folder):
    page, card = ((finished_run / n).read_text() for n in ("report.html", "README.md"))
    for part in run_parts(read_run(finished_run)):
        assert f"<h2>{part.title}</h2>" in page and f"## {part.title}\n" in card
    for text in (page, card):
        assert metrics["data_fingerprint"] in text and corpus_folder.name in text
        assert str(corpus_folder) not in text and str(finished_run) not in text
    assert metrics["hardware"]["processor"] in page


def test_the_card_has_the_numbers_in_the_hub_s_form(finished_run, metrics):
    from huggingface_hub import ModelCard

    card = ModelCard.load(finished_run / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    results = {(r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert results["validation", "loss"] == pytest.approx(metrics["eval_loss"], abs=1e-4)
    assert results["test", "perplexity"] == pytest.approx(metrics["test_perplexity"], abs=1e-4)
    assert f"{metrics['eval_perplexity']:,.2f}" in card.text
    assert "pipeline(" in card.text


def test_samples_are_kept(finished_run):
    text = (finished_run / "samples.txt").read_text()
    assert "--- update 10\ndef " in text and "--- update 20\ndef " in text


@pytest.mark.slow
def test_the_saved_recipe_repeats_the_run(finished_run, metrics, tmp_path):
    recipe = yaml.safe_load((finished_run / "config.yaml").read_text())
    assert recipe["precision"] in ("fp32", "bf16")
    pretrain.main(
        ["--config", str(finished_run / "config.yaml"), "--training.output_dir", str(tmp_path)]
    )
    again = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("eval_loss", "test_loss", "data_fingerprint", "tokenizer_fingerprint"):
        assert again[name] == metrics[name]


def test_the_summary_says_what_was_trained_on_what(finished_run, metrics):
    from pipeline.recipe import read_recipe
    from pipeline.report import summary

    text = summary(read_recipe(finished_run / "config.yaml"))
    for word in (
        f"{metrics['parameters']:,} parameters", f"{metrics['eval_loss']:.4f}",
        f"{metrics['eval_bits_per_byte']:.4f}", "tokens/s", "It writes:", "def ",
        str(finished_run), "from scratch", "report.html",
    ):  # fmt: skip
        assert word in text
    assert "nan" not in text


def test_readme_names_only_recipes_and_configs_that_exist():
    import re

    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"(?:recipes|accelerate_configs|pipeline)/[\w/]+\.(?:yaml|py)", text):
        assert (ROOT / name).exists(), name
