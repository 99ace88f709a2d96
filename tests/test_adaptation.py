"""What of a pretrained model is trained: added tokens, frozen blocks, an adapter beside it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from runs import assert_ended_the_same, cut_back, made, rates, trained
from test_trainer import weights
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from pipeline import adaptation, pretrain
from pipeline.blocks import Rows
from pipeline.model import build_model, load_model, parameter_count
from pipeline.planning import flops_per_token
from pipeline.pretrained import settled
from pipeline.recipe import InputError, ModelSection, read_recipe
from pipeline.tokenizer import text_encoder, token_bytes

SHORT = {
    "training__max_steps": 6, "training__save_steps": 3, "training__eval_steps": 3,
    "training__logging_steps": 1, "training__learning_rate": 0.01,
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe_from(smoke_recipe, finished_run, tmp_path_factory):
    """The smoke recipe, going on from a copy of the finished run."""
    base = shutil.copytree(finished_run, tmp_path_factory.mktemp("base") / "base")
    values = yaml.safe_load(smoke_recipe.read_text())
    del values["tokenizer"]
    values["model"] = {"pretrained": str(base)}
    path = tmp_path_factory.mktemp("recipes") / "from.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def base(recipe_from) -> Path:
    """The folder of that run."""
    return Path(yaml.safe_load(recipe_from.read_text())["model"]["pretrained"])


@pytest.fixture
def batch():
    """Ids that every model here knows."""
    return torch.randint(0, 384, (2, 16), generator=torch.Generator().manual_seed(0))


def logits(model, batch):
    with torch.no_grad():
        return model.eval().cpu()(batch).logits


# -- tokens and positions -------------------------------------------------------------------------


def test_added_tokens_begin_with_the_mean_and_change_no_other_logit(
    recipe_from, base, tmp_path, batch
):
    words = ["reads text", "zyzzyva", "東京"]
    trainer = made(recipe_from, tmp_path / "run", tokenizer__added_tokens=words, **SHORT)
    old = AutoModelForCausalLM.from_pretrained(base)
    known = old.config.vocab_size
    table = trainer.model.transformer.wte.weight
    assert table.shape[0] == known + 3 == trainer.model.config.vocab_size
    assert trainer.model.lm_head.weight is table
    mean = old.transformer.wte.weight.detach().mean(0)
    assert torch.allclose(table[known:], mean.expand(3, -1), atol=1e-7)
    found = logits(trainer.model, batch)[..., :known]
    assert torch.allclose(found, logits(old, batch), atol=1e-5)
    encoder = text_encoder(trainer.processing_class)
    ids = encoder.encode("it reads text 東京", add_special_tokens=False).ids
    assert {known, known + 2} <= set(ids) and trainer.processing_class.decode(ids) == (
        "it reads text 東京"
    )
    lengths = token_bytes(trainer.processing_class)
    assert lengths[known:].tolist() == [len(word.encode()) for word in words]
    # They are in the rows that it learns from.
    rows = Rows.open(tmp_path / "run" / "blocks", "train")
    seen = np.concatenate([rows.row(index)[0] for index in range(len(rows))])
    assert (seen == known + 2).sum() > 5 and (seen == known + 1).sum() == 0
    trained(trainer).save_result()
    again = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert again("zyzzyva")["input_ids"] == [known + 1]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert torch.allclose(logits(stock, batch), logits(trainer.model, batch), atol=1e-5)


def test_rows_that_no_token_had_are_taken_before_the_table_grows(tokenizer, tmp_path):
    """GPT-2's 50,257 entries are often padded to 50,304."""
    torch.manual_seed(0)
    padded = GPT2LMHeadModel(GPT2Config(
        n_layer=1, n_head=2, n_embd=32, n_positions=16, vocab_size=len(tokenizer) + 10,
        bos_token_id=0, eos_token_id=0,
    ))  # fmt: skip
    padded.save_pretrained(tmp_path)
    known = len(tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(_saved(tokenizer, tmp_path))
    tokenizer.add_tokens(["zyzzyva", "blorpt"])
    model = build_model(
        ModelSection(pretrained=str(tmp_path)), tokenizer, block_size=16, seed=0, added_tokens=2
    )
    table, before = model.transformer.wte.weight, padded.transformer.wte.weight
    assert model.config.vocab_size == known + 10
    assert torch.allclose(table[known : known + 2], before[:known].mean(0).expand(2, -1))
    assert torch.equal(table[known + 2 :], before[known + 2 :])


def _saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder


def test_positions_are_cut_to_the_block_on_request_only(base, tokenizer, tmp_path, batch):
    tokenizer = AutoTokenizer.from_pretrained(base)
    old = AutoModelForCausalLM.from_pretrained(base)
    for cut in (False, True):
        section = ModelSection(pretrained=str(base), cut_positions=cut)
        model = build_model(section, tokenizer, block_size=16, seed=0)
        assert model.config.n_positions == (16 if cut else 32)
        assert torch.allclose(logits(model, batch), logits(old, batch), atol=1e-5)
        model.save_pretrained(tmp_path / str(cut))
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / str(cut))
        assert len(stock.transformer.wpe.weight) == model.config.n_positions
        assert torch.equal(logits(stock, batch), logits(old, batch))


# -- frozen ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_frozen_stays_to_the_last_bit_and_the_rest_learns(recipe_from, tmp_path, optimizer):
    trainer = made(
        recipe_from, tmp_path / "run", model__frozen_blocks=1, model__frozen_embeddings=True,
        optimizer__name=optimizer, **SHORT,
    )  # fmt: skip
    before = weights(trainer)
    trained(trainer)
    for name, weight in weights(trainer).items():
        is_frozen = name.startswith(("transformer.h.0.", "transformer.w", "lm_head"))
        assert torch.equal(weight, before[name]) == is_frozen, name
    assert set(trainer.optimizer.state) <= {
        p for p in trainer.model.parameters() if p.requires_grad
    }


def test_the_work_of_a_step_counts_only_gradients_that_are_made():
    common = {"parameters": 1000, "layers": 4, "width": 8, "block_size": 16}
    full = flops_per_token(**common)
    assert full == 6 * 1000 + 12 * 4 * 8 * 16
    assert flops_per_token(**common, trained=10) == 4 * 1000 + 20 + 12 * 4 * 8 * 16
    still = flops_per_token(**common, trained=400, still=600, still_layers=3)
    assert still == 2000 + 2 * 400 + 2 * 400 + (4 * 4 + 8 * 1) * 8 * 16


@pytest.mark.parametrize(
    "values, still",
    [
        ({}, 0),
        ({"frozen_blocks": 1}, 0),  # the embeddings below learn
        ({"frozen_embeddings": True}, 0),
        ({"frozen_blocks": 1, "frozen_embeddings": True}, 1),
        ({"frozen_blocks": 2, "frozen_embeddings": True}, 2),
        ({"lora_r": 2}, 0),
    ],
)
def test_blocks_that_no_gradient_passes(base, values, still):
    section = ModelSection(pretrained=str(base), **values)
    model = build_model(section, AutoTokenizer.from_pretrained(base), block_size=16, seed=0)
    assert adaptation.still_blocks(model) == still
    labels = torch.ones(1, 16, dtype=torch.long)
    model(input_ids=labels, labels=labels).loss.backward()
    has = [any(p.grad is not None for p in b.parameters()) for b in model.transformer.h]
    assert has == [number >= max(still, values.get("frozen_blocks", 0)) for number in range(2)]


# -- LoRA -----------------------------------------------------------------------------------------


LORA = {"model__lora_r": 4, "model__lora_dropout": 0.1}


@pytest.fixture(scope="module")
def lora(recipe_from, tmp_path_factory):
    """A finished LoRA run and its folder."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    trainer = trained(made(recipe_from, folder, **LORA, **SHORT))
    trainer.save_result()
    return trainer


def test_the_adapter_learns_and_nothing_else(lora, base):
    old = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for name, weight in lora.model.state_dict().items():
        if ".lora_B" in name:  # begins at zero
            assert weight.abs().max() > 0
        elif ".lora_A" not in name:
            assert torch.equal(weight, old[name.replace(".base_layer", "")]), name
    # r (inputs + outputs) for each of the four matrices of the two blocks.
    width = 32
    each = (width + 3 * width) + (width + width) + 2 * (width + 4 * width)
    assert parameter_count(lora.model, trained=True) == 2 * 4 * each
    assert len(lora.optimizer.param_groups[0]["params"]) == 2 * 4 * 2


@pytest.mark.parametrize("place", ["result", "checkpoint"])
def test_peft_opens_the_folder_and_says_what_the_run_s_model_says(lora, batch, place):
    folder = Path(lora.args.output_dir)
    folder = folder if place == "result" else folder / "checkpoint-6"
    assert not (folder / "model.safetensors").exists() and not (folder / "config.json").exists()
    found = logits(AutoPeftModelForCausalLM.from_pretrained(folder), batch)
    assert torch.allclose(found, logits(lora.model, batch), atol=1e-5)
    merged = load_model(str(folder))
    assert type(merged) is GPT2LMHeadModel
    assert torch.allclose(logits(merged, batch), found, atol=1e-4)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == lora.processing_class.get_vocab()


def test_a_resumed_adapter_is_the_uninterrupted_one(lora, recipe_from, tmp_path):
    folder = cut_back(Path(lora.args.output_dir), tmp_path / "run", 3)
    again = trained(made(recipe_from, folder, **LORA, **SHORT), "must")
    assert_ended_the_same(lora, again)


def test_an_adapter_is_not_resumed_beside_other_weights(lora, recipe_from, base, tmp_path):
    folder = cut_back(Path(lora.args.output_dir), tmp_path / "run", 3)
    other = shutil.copytree(base, tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.transformer.wpe.weight.data += 0.01
    model.save_pretrained(other)
    values = yaml.safe_load(recipe_from.read_text())
    values["model"]["pretrained"] = str(other)
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match="base_fingerprint: .*was trained beside other weights"):
        trained(made(path, folder, **LORA, **SHORT), "must", allow_change=["model.pretrained"])


def test_the_door_trains_an_adapter_and_measures_it(recipe_from, tmp_path, capsys, caplog):
    caplog.set_level("INFO", logger="pipeline")
    pretrain.main([
        "--config", str(recipe_from), "--training.output_dir", str(tmp_path / "run"),
        "--model.lora_r", "2", "--model.lora_target_modules", "attn.c_attn",
        "--training.max_steps", "4", "--data.attend_across", "false",
    ])  # fmt: skip
    out = capsys.readouterr().out
    assert "(512 of them trained, " in caplog.text
    assert "the adapter (peft opens the folder; convert_weights.py makes it one with" in out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["trained_parameters"] == 2 * 2 * 4 * 32 and metrics["eval_loss"] > 0
    assert load_model(str(tmp_path / "run")).config.attend_across is False


def test_an_adapter_is_no_base(lora, recipe_from):
    folder = Path(lora.args.output_dir)
    with pytest.raises(InputError, match="is a LoRA adapter; .*convert_weights.py --source"):
        settled(read_recipe(recipe_from, {"model.pretrained": str(folder)}))


def test_an_adapter_without_its_base_is_one_sentence(lora, tmp_path):
    folder = shutil.copytree(lora.args.output_dir, tmp_path / "run")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="its base model .*gone .*cannot be loaded"):
        load_model(str(folder))


def test_without_peft_one_sentence_says_what_to_install(recipe_from, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"model.lora_r needs the package peft: run pip install"):
        adaptation.check_peft("model.lora_r")


# -- the schedule ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_schedule_goes_on_or_begins_anew(recipe_from, smoke_recipe, tmp_path):
    """The base has made 20 updates: those of a run of 30 follow, or those of a run of 10."""
    values = SHORT | {"training__max_steps": 10, "schedule__warmup_steps": 4}
    kept = trained(made(recipe_from, tmp_path / "kept", schedule__goes_on=True, **values))
    anew = trained(made(recipe_from, tmp_path / "anew", **values))
    assert kept.recipe.schedule.past_updates == 20
    whole = trained(made(smoke_recipe, tmp_path / "whole", **values | {"training__max_steps": 30}))
    expected = [rates(whole)[step] for step in range(21, 31)]
    assert list(rates(kept).values()) == pytest.approx(expected, rel=1e-12)
    assert list(rates(anew).values())[0] == pytest.approx(0.01 / 5)
    # A run that goes on from that one has both behind it, also from one of its checkpoints.
    kept.save_result()
    section = read_recipe(
        recipe_from,
        {"model.pretrained": str(tmp_path / "kept" / "checkpoint-9"), "schedule.goes_on": "true"},
    )
    assert settled(section).schedule.past_updates == 29


def test_a_model_that_does_not_say_how_far_it_came_needs_past_updates(recipe_from, base, tmp_path):
    bare = shutil.copytree(base, tmp_path / "bare")
    (bare / "metrics.json").unlink()
    values = {"model.pretrained": str(bare), "schedule.goes_on": "true"}
    with pytest.raises(InputError, match="nothing at .*bare tells after how many .*; state"):
        settled(read_recipe(recipe_from, values))
    found = settled(read_recipe(recipe_from, values | {"schedule.past_updates": "7"}))
    assert found.schedule.past_updates == 7


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"model.frozen_blocks": "3"}, "model.frozen_blocks is 3, but .*base has 2 blocks"),
        ({"data.block_size": "64", "tokens_per_update": "512"}, "block_size is 64, but .* has 32"),
        ({"model.revision": "main"}, "model.revision: .*base is a folder, which has none"),
        ({"tokenizer.added_tokens": "a"}, "added_tokens: 'a' is an entry of .*base already"),
        ({"tokenizer.added_tokens": '["b c", "b c"]'}, "an entry is empty or stands there twice"),
        ({"model.lora_alpha": "8"}, "model.lora_alpha has a meaning with model.lora_r only"),
        ({"model.lora_alpha": "16"}, "model.lora_alpha has a meaning with model.lora_r only"),
        (
            {"model.lora_r": "2", "model.frozen_blocks": "1"},
            "frozen_blocks: with model.lora_r",
        ),
        ({"model.lora_r": "2", "optimizer.name": "muon"}, "muon evens out whole matrices"),
        ({"model.lora_r": "2", "tokenizer.added_tokens": "b c"}, "need embeddings of their own"),
        ({"model.lora_r": "2", "model.lora_target_modules": "wte"}, "lora_target_modules: input"),
        ({"model.lora_r": "2", "model.lora_target_modules": "[]"}, "lora_target_modules is empty"),
        ({"schedule.past_updates": "7"}, "past_updates has a meaning with schedule.goes_on only"),
    ],
)
def test_what_cannot_be_is_one_sentence(recipe_from, tmp_path, values, sentence):
    argv = [word for key, value in values.items() for word in (f"--{key}", value)]
    with pytest.raises(InputError, match=sentence):
        pretrain.main(
            ["--config", str(recipe_from), "--training.output_dir", str(tmp_path / "run"), *argv]
        )


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"model.lora_r": "2"}, "model.lora_r has a meaning with model.pretrained only"),
        ({"model.frozen_blocks": "1"}, "model.frozen_blocks has a meaning with model.pretrained"),
        ({"schedule.goes_on": "true"}, "schedule.goes_on has a meaning with model.pretrained only"),
        ({"tokenizer.added_tokens": "abc"}, "added to an existing tokenizer; one that is trained"),
        (
            {"tokenizer.revision": "abc"},
            "revision has a meaning with tokenizer.pretrained",
        ),
    ],
)
def test_a_fresh_model_has_none_of_this(smoke_recipe, values, sentence):
    with pytest.raises(InputError, match=sentence):
        read_recipe(smoke_recipe, values)
