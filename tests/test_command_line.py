"""What is typed: overrides, door options, help, and the one sentence of a mistake."""

import re
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT

from pipeline.command_line import read_command_line, read_options
from pipeline.options import GenerateOptions, MeasureOptions, PretrainOptions
from pipeline.recipe import InputError, Recipe, Section

DOORS = [
    "pretrain",
    "train_tokenizer",
    "prepare_data",
    "measure_perplexity",
    "generate",
    "convert_weights",
    "inspect_weights",
    "find_learning_rate",
]


def parse(*argv):
    return read_command_line(list(argv), PretrainOptions, doc="A door.")


def test_without_arguments_it_is_the_quickstart():
    recipe, options = parse()
    assert str(recipe.output_dir) == "outputs/quickstart"
    assert (options.resume, options.overwrite) == ("auto", False)


def test_overrides_lists_and_flags():
    recipe, options = parse(
        "--data.files", "a.txt", "b.txt", "--training.max_steps=10", "--overwrite",
        "--generation.prompts", "[x y, z]", "--resume", "must",
    )  # fmt: skip
    assert recipe.data.files == ["a.txt", "b.txt"]
    assert recipe.training["max_steps"] == 10
    assert recipe.generation.prompts == ["x y", "z"]
    assert options.overwrite is True and options.resume == "must"


def test_one_file_is_a_list_of_one():
    assert parse("--data.files", "my_book.txt")[0].data.files == ["my_book.txt"]


def test_one_prompt_is_a_list_of_one():
    assert parse("--generation.prompts", "def ")[0].generation.prompts == ["def "]


def test_null_takes_a_field_of_the_library_back():
    assert "max_steps" not in parse("--training.max_steps", "null")[0].training


def test_null_takes_a_choice_back():
    recipe, _ = parse("--data.files", "null", "--data.dataset", "a/b")
    assert recipe.data.files is None and recipe.data.dataset == "a/b"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--resum", "auto"], "--resum: unknown option; did you mean --resume?"),
        (["--training", "3"], "training"),
        (["--data.files"], "--data.files: a value is missing"),
        (["quickstart"], "'quickstart' stands alone"),
        (["--training.seed", "1", "--training.seed", "2"], "--training.seed is given twice"),
        (["--overwrite", "perhaps"], "--overwrite"),
        (["--data.files", "[draft].txt"], "begins like a YAML list or mapping and is none"),
        (["--evaluation.texts", "{x: 3"], "begins like a YAML list or mapping and is none"),
        (["--training.output_dir", ""], "training.output_dir is empty"),
        (["--config", ""], "cannot be read as a recipe"),
        (["--generation.temperature", "1e-45"], "must be 0 (greedy) or at least 0.01"),
        (["--schedule.warmup_steps", "inf"], "--schedule.warmup_steps"),
        (["--generation.seed", "99999999999999999999"], "--generation.seed"),
        (["--training.qqq", "1"], "known: --help training lists them"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such recipe"),
    ],
)
def test_a_mistake_is_one_sentence(argv, words):
    with pytest.raises(InputError) as caught:
        parse(*argv)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_is_abbreviated():
    with pytest.raises(InputError, match="unknown"):
        parse("--training.max_st", "10")


def test_options_of_doors_without_a_recipe():
    options = read_options(
        ["--model", "m", "--files", "a.txt", "--json", "n.json"], MeasureOptions, doc=""
    )
    assert (options.files, options.json_) == (["a.txt"], "n.json")
    options = read_options(["--model", "m", "--prompt", "[1, 2"], GenerateOptions, doc="")
    assert options.prompt == "[1, 2"
    with pytest.raises(InputError, match="--model is required"):
        read_options(["--prompt", "x"], GenerateOptions, doc="")
    with pytest.raises(InputError, match="did you mean --temperature"):
        read_options(["--model", "m", "--temprature", "1"], GenerateOptions, doc="")
    with pytest.raises(InputError, match="--top_p"):
        read_options(["--model", "m", "--prompt", "x", "--top_p", "2"], GenerateOptions, doc="")


def test_print_config_is_a_recipe(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        parse("--training.max_steps", "7", "--print_config")
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["training"]["max_steps"] == 7
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(printed))
    again, _ = parse("--config", str(tmp_path / "again.yaml"))
    assert again.as_dict() == printed


def test_help_names_every_field_with_sentence_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            for inner, inner_field in field.annotation.model_fields.items():
                assert f"--{name}.{inner} " in text
                assert inner_field.description, f"{name}.{inner} has no sentence"
                assert " ".join(inner_field.description.split()) in text
    assert "--help training" in text


def test_help_training_lists_the_library_s_fields(capsys):
    with pytest.raises(SystemExit):
        parse("--help", "training")
    text = capsys.readouterr().out
    assert "--training.learning_rate float" in text and "(default: 5e-05)" in text


@pytest.mark.parametrize("door", DOORS)
def test_help_answers_before_torch_is_imported(door):
    """One second is promised; here only that no torch is loaded, which is what would cost it."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", f"pipeline/{door}.py", "--help"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "--" in done.stdout
    assert not re.search(r"\| +(torch|transformers|datasets)$", done.stderr, re.M)
    assert time.perf_counter() - started < 30  # it ends; how fast is measured, not tested


def test_a_mistake_ends_with_code_2_and_no_traceback():
    done = subprocess.run(
        [sys.executable, "pipeline/pretrain.py", "--data.blok_size", "3"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: --data.blok_size: unknown key; did you mean data.block_size?\n"
    assert done.stdout == ""
