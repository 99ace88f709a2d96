"""Shapes, parameters and vocabularies without torch are those of the models with it."""

import json

import pytest

from pipeline import adaptation, attention, memory_plan
from pipeline.model import build_model, parameter_count
from pipeline.model_shape import planned_model
from pipeline.recipe import InputError, read_recipe
from pipeline.sections import ModelSection

FINE_TUNING = {
    "data.block_size": 16, "tokens_per_update": 256, "tokenizer.vocab_size": None,
    "model.config": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cut_positions": True},
        {"frozen_blocks": 1},
        {"frozen_blocks": 1, "frozen_embeddings": True},
        {"frozen_blocks": 2, "frozen_embeddings": True},
        {"frozen_embeddings": True},
    ],
    ids=str,
)
def test_what_learns_is_what_the_model_says(smoke_recipe, finished_run, tokenizer, changes):
    section = ModelSection(pretrained=str(finished_run), **changes)
    overrides = {f"model.{name}": value for name, value in changes.items()}
    recipe = read_recipe(
        smoke_recipe, FINE_TUNING | overrides | {"model.pretrained": str(finished_run)}
    )
    found = planned_model(recipe)
    model = build_model(section, tokenizer, block_size=16, seed=0)
    still = adaptation.still_blocks(model)
    assert found.parameters == parameter_count(model)
    assert found.trained == parameter_count(model, trained=True)
    assert found.still_layers == still
    assert found.still == sum(map(parameter_count, model.transformer.h[:still]))


def test_an_adapter_is_counted(smoke_recipe, finished_run, tokenizer):
    pytest.importorskip("peft")
    section = ModelSection(
        pretrained=str(finished_run), lora_r=3, lora_target_modules=["attn.c_attn", "mlp.c_proj"]
    )
    model = build_model(section, tokenizer, block_size=16, seed=0)
    values = {
        "model.pretrained": str(finished_run), "model.lora_r": 3,
        "model.lora_target_modules": ["attn.c_attn", "mlp.c_proj"],
    }  # fmt: skip
    found = planned_model(read_recipe(smoke_recipe, FINE_TUNING | values))
    assert found.trained == parameter_count(model, trained=True)
    assert found.parameters == parameter_count(model)


def test_a_width_of_its_own_for_the_mlp_counts(smoke_recipe, tokenizer):
    config = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_inner": 48}
    model = build_model(ModelSection(config=config), tokenizer, block_size=32, seed=0)
    recipe = read_recipe(
        smoke_recipe, {"model.config": config, "tokenizer.vocab_size": len(tokenizer)}
    )
    assert planned_model(recipe).parameters == parameter_count(model)


@pytest.mark.parametrize("name", ["n_layer", "n_head", "n_embd", "n_inner"])
@pytest.mark.parametrize("size", [0, -4])
def test_a_size_of_nothing(smoke_recipe, name, size):
    recipe = read_recipe(smoke_recipe, {f"model.config.{name}": size})
    with pytest.raises(InputError) as refusal:
        planned_model(recipe)
    assert str(refusal.value) == f"model.config.{name}: must be at least 1; got {size}"


def test_vocabularies(smoke_recipe, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    here = {"training.output_dir": str(tmp_path)}
    asked = planned_model(read_recipe(smoke_recipe, here))
    # The text had only so many pairs: the trained tokenizer has fewer entries than were asked for.
    assert asked.shape.vocabulary == len(tokenizer) < 512
    loaded = {"tokenizer.vocab_size": None, "tokenizer.pretrained": str(tmp_path / "tokenizer")}
    assert planned_model(read_recipe(smoke_recipe, loaded)).shape.vocabulary == len(tokenizer)
    more = loaded | {"tokenizer.added_tokens": ["<a>", "<b>"]}
    assert planned_model(read_recipe(smoke_recipe, more)).shape.vocabulary == len(tokenizer) + 2
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read as a tokenizer"):
        planned_model(read_recipe(smoke_recipe, loaded))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.block_size": 64}, "data.block_size is 64, but .* has 32 positions"),
        ({"model.frozen_blocks": 3}, "model.frozen_blocks is 3, but .* has 2 blocks"),
        ({"model.pretrained": "."}, "no model in this folder"),
    ],
)
def test_a_pretrained_model_that_does_not_fit(smoke_recipe, finished_run, changes, words):
    values = FINE_TUNING | {"model.pretrained": str(finished_run)} | changes
    with pytest.raises(InputError, match=words):
        planned_model(read_recipe(smoke_recipe, values))


def test_another_kind_of_model(smoke_recipe, tmp_path):
    values = FINE_TUNING | {"model.pretrained": str(tmp_path)}
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="cannot be read as the configuration of a GPT-2"):
        planned_model(read_recipe(smoke_recipe, values))
    sizes = dict.fromkeys(("n_layer", "n_embd", "n_head", "vocab_size", "n_positions"), 32)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom", **sizes}))
    with pytest.raises(InputError, match="is a bloom, not a GPT-2"):
        planned_model(read_recipe(smoke_recipe, values))


def test_the_attention_that_is_planned_is_the_one_that_is_chosen(smoke_recipe):
    assert memory_plan.LONGEST_BLOCKWISE == attention.LONGEST_BLOCKWISE
    for block_size in (512, 513):
        for attend_across in (True, False):
            recipe = read_recipe(
                smoke_recipe,
                {"data.block_size": block_size, "data.attend_across": attend_across},
            )
            for kind in ("cpu", "cuda"):
                chosen = attention.fastest(
                    block_size=block_size, attend_across=attend_across, on_cpu=kind == "cpu"
                )
                found = memory_plan.is_blockwise(recipe, kind)
                assert found == (chosen == "blockwise_causal")
