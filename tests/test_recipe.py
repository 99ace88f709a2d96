"""Recipes load, checks speak in sentences, and what is saved repeats the run."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from pipeline.known_fields import model_config_fields, training_fields
from pipeline.recipe import InputError, read_recipe

RECIPES = sorted((ROOT / "recipes").glob("**/*.yaml"))
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_makes_training_arguments(path, tmp_path):
    from pipeline.arguments import training_arguments

    recipe = read_recipe(path, {"training.output_dir": str(tmp_path / "run")})
    resolved, arguments = training_arguments(recipe)
    assert arguments.gradient_accumulation_steps >= 1
    assert resolved.precision in ("fp32", "bf16", "fp16")
    head = path.read_text().split("\n\n")[0]
    assert "tokens per update" in head and "accelerate launch" in head


def test_the_run_folder_is_named_after_the_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    values = yaml.safe_load(QUICKSTART.read_text())
    path.write_text(yaml.safe_dump(values))
    assert read_recipe(path).output_dir == Path("outputs/mine")


def test_saving_and_reading_back_changes_nothing(tmp_path):
    overrides = {"training.learning_rate": "6e-4", "generation.prompts": ["a: b", "é"]}
    recipe = read_recipe(QUICKSTART, overrides)
    (tmp_path / "config.yaml").write_text(recipe.as_yaml())
    again = read_recipe(tmp_path / "config.yaml")
    assert again == recipe
    assert again.training["learning_rate"] == 0.0006


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("training.learning_rate", "6e-4", 6e-4),  # YAML itself reads 6e-4 as text
        ("training.max_steps", "10", 10),
        ("training.torch_compile", "false", False),  # a string would be true
        ("training.eval_strategy", False, "no"),  # YAML reads a bare `no` as false
        ("training.logging_steps", "5", 5.0),
        ("model.config.n_layer", "3", 3),
        ("model.config.resid_pdrop", "0.1", 0.1),
    ],
)
def test_values_get_the_library_s_types(key, text, value):
    recipe = read_recipe(QUICKSTART, {key: text})
    *sections, last = key.split(".")
    found = recipe.training if sections == ["training"] else recipe.model.config
    assert found[last] == value and type(found[last]) is type(value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"data.blok_size": "3"}, ["--data.blok_size", "did you mean data.block_size"]),
        ({"training.max_step": "3"}, ["training.max_step", "did you mean training.max_steps"]),
        ({"model.config.n_layers": "3"}, ["did you mean model.config.n_layer"]),
        ({"data.block_size": "x"}, ["--data.block_size", "valid integer", "'x'"]),
        ({"training.learning_rate": "fast"}, ["--training.learning_rate", "number", "'fast'"]),
        ({"training.learning_rate": "nan"}, ["--training.learning_rate", "finite"]),
        ({"training.learning_rate": "inf"}, ["--training.learning_rate", "finite"]),
        ({"training.bf16": "maybe"}, ["--training.bf16", "boolean", "'maybe'"]),
        ({"tokenizer.vocab_size": "256"}, ["256 bytes", "at least 257", "'256'"]),
        ({"schedule.floor": "1.5"}, ["--schedule.floor", "less than or equal to 1"]),
        ({"schedule.name": "cosin"}, ["'cosine'", "'linear'", "'wsd'", "'cosin'"]),
        ({"optimizer.name": "moun"}, ["--optimizer.name", "'adamw' or 'muon'", "'moun'"]),
        ({"optimizer.momentum": "1"}, ["--optimizer.momentum", "less than 1", "'1'"]),
        ({"optimizer.momentum": "-0.1"}, ["--optimizer.momentum", "greater than or equal to 0"]),
        ({"optimizer.matrix_rate": "0"}, ["--optimizer.matrix_rate", "greater than 0", "'0'"]),
        ({"optimizer.newton_schulz_steps": "0"}, ["newton_schulz_steps", "equal to 1", "'0'"]),
        ({"optimizer.newton_schulz_steps": "21"}, ["newton_schulz_steps", "equal to 20"]),
        ({"optimizer.newton_schulz_steps": "2.5"}, ["newton_schulz_steps", "integer"]),
        (
            {"optimizer.name": "adamw", "optimizer.momentum": "0.9"},
            ["optimizer.momentum has a meaning for optimizer.name muon only"],
        ),
        ({"optimizer.learning_rate": "1"}, ["--optimizer.learning_rate", "unknown key"]),
        ({"precision": "bf17"}, ["--precision", "'bf16'", "'bf17'"]),
        ({"data.dataset": "x/y"}, ["exactly one of data.files, data.dataset and data.sources"]),
        (
            {"model.pretrained": "x", "model.config": None},
            ["a tokenizer trained anew does not fit a pretrained model"],
        ),
        ({"model.pretrained": "x"}, ["exactly one of model.config and model.pretrained"]),
        ({"tokenizer.pretrained": "x"}, ["only one of tokenizer.vocab_size"]),
        ({"tokenizer.vocab_size": None}, ["give tokenizer.vocab_size"]),
        ({"data.validation_fraction": "0.6", "data.test_fraction": "0.4"}, ["below 1"]),
        ({"hub.license": "Apache 2.0"}, ["license 'Apache 2.0' is none", "mean apache-2.0?"]),
        ({"hub.language": "English"}, ["language 'English' is no code", "en, bn"]),
        ({"hub.branch": "true"}, ["--hub.branch", "did you mean hub.branches"]),
        ({"training.warmup_ratio": "0.1"}, ["gone in transformers 5", "schedule.warmup_steps"]),
        ({"training.overwrite_output_dir": "true"}, ["--overwrite"]),
    ],
)
def test_a_wrong_key_or_value_is_one_sentence(overrides, words):
    with pytest.raises(InputError) as caught:
        read_recipe(QUICKSTART, overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for word in words:
        assert word in sentence


def test_norwegian_is_a_language_and_one_is_a_list(tmp_path):
    text = QUICKSTART.read_text()
    for line, languages in {"[no, en]": ["no", "en"], "bn": ["bn"]}.items():
        path = tmp_path / "recipe.yaml"
        path.write_text(f"{text}\nhub: {{language: {line}}}\n")
        assert read_recipe(path).hub.language == languages


def test_a_mistake_in_the_file_names_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(QUICKSTART.read_text().replace("block_size:", "blok_size:"))
    with pytest.raises(InputError, match=r"mine\.yaml: data\.blok_size: unknown key"):
        read_recipe(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such recipe"),
        ("a: [", "not YAML"),
        ("just text", "mapping of sections"),
        ("data: {files: a.txt}", "is required"),
        ("training: []\ntokens_per_update: 8\ndata: {files: a}\nmodel: {config: {}}", "training"),
        ("training: 3\ntokens_per_update: 8\ndata: {files: a}\nmodel: {config: {}}", "training"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, content, words):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=words):
        read_recipe(path)


def test_the_fields_read_from_the_source_are_the_installed_ones():
    from transformers import GPT2Config, TrainingArguments

    declared = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    assert set(training_fields()) == declared
    assert set(model_config_fields()) <= set(vars(GPT2Config())) | {"use_cache"}
    assert training_fields()["max_steps"].annotation is int
