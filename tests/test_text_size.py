"""How many tokens a text has, and how many updates of them a run makes."""

import json

import pytest
from conftest import ROOT
from runs import made

from pipeline.recipe import read_recipe
from pipeline.run_plan import updates_of
from pipeline.text_size import bytes_per_token, text_size

SMALL = ROOT / "recipes" / "gpt2_small.yaml"


def test_bytes_per_token_grow_with_the_vocabulary():
    found = [bytes_per_token(n) for n in (257, 300, 700, 1500, 2048, 30_000, 50_257, 10**6)]
    assert found == sorted(found) and found[0] == 1 and found[4] == 3.05
    assert found[-1] == found[-2] == 4.02
    assert 2.07 < found[2] < 2.59


def test_rows_that_are_prepared_are_counted(finished_run):
    recipe = read_recipe(finished_run / "config.yaml")
    facts = json.loads((finished_run / "blocks" / "manifest.json").read_text())["facts"]
    found = text_size(recipe, 512)
    assert found.is_counted and found.tokens == facts["train"]["rows"] * 32
    assert found.validation_tokens == facts["validation"]["tokens"]
    assert found.test_tokens == facts["test"]["tokens"]
    other = read_recipe(finished_run / "config.yaml", {"data.block_size": 16})
    assert not text_size(other, 512).is_counted  # those rows are another recipe's


def test_files_are_estimated_from_their_bytes(smoke_recipe, corpus_folder, tmp_path):
    recipe = read_recipe(smoke_recipe, {"training.output_dir": str(tmp_path)})
    size = sum(path.stat().st_size for path in corpus_folder.iterdir())
    found = text_size(recipe, 2048)
    assert found.tokens == pytest.approx(size / 3.05 * 0.9, abs=32)
    shares = recipe.data.validation_fraction, recipe.data.test_fraction
    assert found.validation_tokens == pytest.approx(size / 3.05 * shares[0])
    assert found.test_tokens == pytest.approx(size / 3.05 * shares[1]) and sum(shares) == 0.1
    assert "3.05 bytes a token assumed" in found.source and not found.is_counted


def test_weights_leave_out_what_is_too_much(smoke_recipe, corpus_folder, tmp_path):
    files = sorted(map(str, corpus_folder.iterdir()))
    sources = [{"files": files[:60], "weight": 0.9}, {"files": files[60:], "weight": 0.1}]
    values = {"training.output_dir": str(tmp_path), "data.files": None, "data.sources": sources}
    recipe = read_recipe(smoke_recipe, values)
    first = sum((corpus_folder / file).stat().st_size for file in files[:60])
    assert text_size(recipe, 2048).tokens == pytest.approx(first / 3.05 / 0.9 * 0.9, abs=32)
    stated = read_recipe(smoke_recipe, values | {"data.mixture_tokens": 12_345})
    assert text_size(stated, 2048).tokens == 12_345


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({}, 10e9 * 0.998),
        ({"data.dataset_config": "sample-100BT"}, 100e9 * 0.998),
        ({"data.dataset_config": None}, 1.3e12 * 0.998),
        ({"data.dataset": "another", "data.dataset_config": None}, None),
    ],
)
def test_data_sets_are_known_by_their_names_alone(tmp_path, changes, tokens):
    recipe = read_recipe(SMALL, changes | {"training.output_dir": str(tmp_path)})
    found = text_size(recipe, 50_257)
    assert found.tokens == (None if tokens is None else pytest.approx(tokens, rel=1e-6))
    if tokens is None:
        assert "known when prepared" in found.source


def test_compressed_files_are_known_when_prepared(smoke_recipe, tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(b"abc")
    recipe = read_recipe(
        smoke_recipe,
        {"data.files": str(tmp_path / "a.txt.gz"), "training.output_dir": str(tmp_path)},
    )
    found = text_size(recipe, 512)
    assert found.tokens is None and "a.txt.gz is compressed" in found.source


@pytest.mark.parametrize(("batch", "budget"), [(8, 512), (4, 512), (16, 512), (2, 448)])
def test_updates_of_epochs_are_trainer_s(smoke_recipe, tmp_path, batch, budget):
    changes = {
        "tokens_per_update": budget, "training__per_device_train_batch_size": batch,
        "training__max_steps": None, "training__num_train_epochs": 1.3,
    }  # fmt: skip
    trainer = made(smoke_recipe, tmp_path, **changes)
    loader = trainer.get_train_dataloader()
    epochs = {name.replace("__", "."): value for name, value in changes.items()}
    recipe = read_recipe(smoke_recipe, epochs | {"training.output_dir": str(tmp_path)})
    tokens = len(trainer.train_dataset) * 32
    found = updates_of(recipe, tokens)
    assert found == trainer.set_initial_training_values(trainer.args, loader)[-1]
    assert updates_of(recipe, None) is None
