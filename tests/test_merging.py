"""A LoRA adapter is merged into a plain folder that computes the same logits."""

import json
import shutil
import sys

import pytest
import torch
from conftest import roughened
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from pipeline import convert_weights
from pipeline.recipe import InputError

peft = pytest.importorskip("peft")

IDS = torch.tensor([[5, 3, 200, 7, 0, 1, 2, 383, 90, 11]])


def base_model(vocab_size=384, n_layer=2, n_embd=32):
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=16, n_embd=n_embd, n_layer=n_layer, n_head=2,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return roughened(GPT2LMHeadModel(config)).eval()


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    """A model with its tokenizer; read it, do not change it."""
    folder = tmp_path_factory.mktemp("base")
    base_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapter(base, folder, *, rows=None, tokenizer=None, **settings):
    """Save a random adapter of the base model, as peft does, and return its logits."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    config = peft.LoraConfig(
        r=2, task_type="CAUSAL_LM", **{"target_modules": ["c_attn"], **settings}
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config).eval()
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=source)
        adapted.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return adapted(input_ids=IDS).logits


def convert(source, folder, *more):
    convert_weights.main(["--source", str(source), "--output_dir", str(folder), *map(str, more)])


def refused(source, folder, *more):
    with pytest.raises(InputError) as caught:
        convert(source, folder, *more)
    assert not folder.exists() and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.filterwarnings("ignore")  # peft's, of what is tied
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_rslora": True, "bias": "all"},
        {"use_dora": True},
        {"modules_to_save": ["wte"]},
        {"modules_to_save": ["wte", "lm_head"]},
        {"modules_to_save": ["wte"], "ensure_weight_tying": True},
        {"target_modules": ["c_attn", "wte"]},
        {"target_modules": ["c_attn", "lm_head"]},
        {"rows": 390},
        {"rows": 390, "modules_to_save": ["wte", "lm_head"]},
        {"rows": 390, "trainable_token_indices": [384, 385]},
    ],
    ids=str,
)
def test_the_merged_model_gives_the_adapters_logits(base, tmp_path, settings):
    expected = adapter(base, tmp_path / "adapter", **settings)
    convert(tmp_path / "adapter", tmp_path / "out")
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits
        before = AutoModelForCausalLM.from_pretrained(base)(IDS).logits
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found[..., :384], before, atol=0.1)
    assert not any("lora" in name for name in load_file(tmp_path / "out" / "model.safetensors"))


def test_the_adapters_tokenizer_comes_along_or_the_bases(base, tokenizer, tmp_path, capsys):
    adapter(base, tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "a")
    assert AutoTokenizer.from_pretrained(tmp_path / "a").get_vocab() == tokenizer.get_vocab()
    said = capsys.readouterr().out
    assert f"from the LoRA adapter plain, merged into {base.name}\n" in said
    larger = AutoTokenizer.from_pretrained(base)
    larger.add_special_tokens({"eos_token": "<|turn|>"})
    larger.chat_template = "{{ messages[0].content }}<|turn|>"
    adapter(base, tmp_path / "chat", rows=385, tokenizer=larger, modules_to_save=["wte"])
    convert(tmp_path / "chat", tmp_path / "b")
    found = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert found.eos_token == "<|turn|>" and found.chat_template == larger.chat_template
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 384
    assert "the output layer has weights of its own" in capsys.readouterr().out
    said = refused(tmp_path / "chat", tmp_path / "c", "--tokenizer", base)
    assert "has its own tokenizer; leave it out" in said


def test_a_tokenizer_with_more_entries_than_the_embedding_is_refused(base, tmp_path):
    larger = AutoTokenizer.from_pretrained(base)
    larger.add_tokens(["<|turn|>"])
    adapter(base, tmp_path / "adapter", tokenizer=larger)
    said = refused(tmp_path / "adapter", tmp_path / "out")
    assert "has 385 entries, but the embedding of" in said and "only 384 rows" in said


def test_a_base_without_a_tokenizer_needs_one_named(base, tmp_path, tokenizer):
    base_model().save_pretrained(tmp_path / "bare")
    expected = adapter(tmp_path / "bare", tmp_path / "adapter")
    said = refused(tmp_path / "adapter", tmp_path / "out")
    assert "no tokenizer in this folder" in said
    assert said.endswith("--tokenizer names another place")
    convert(tmp_path / "adapter", tmp_path / "out", "--tokenizer", base)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(model(IDS).logits, expected, atol=1e-4)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(tokenizer)


def test_an_adapter_that_computes_nothing_finite_is_refused(base, tmp_path):
    adapter(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({n: t.fill_(torch.nan) for n, t in load_file(file).items()}, file)
    assert refused(tmp_path / "adapter", tmp_path / "out").endswith("values that are not finite")


def change(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize("sizes", [{"n_layer": 1}, {"n_layer": 3}, {"n_embd": 16}])
def test_a_base_of_another_size_is_refused(base, tmp_path, sizes):
    adapter(base, tmp_path / "adapter")
    base_model(**sizes).save_pretrained(tmp_path / "other")
    change(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "other"))
    said = refused(tmp_path / "adapter", tmp_path / "out")
    assert f"does not fit its base model {tmp_path / 'other'}" in said


def test_adapters_that_lack_something_are_refused(base, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    adapter(base, whole)

    def said(name, *, without=None, **settings):
        folder = shutil.copytree(whole, tmp_path / name)
        change(folder, **settings)
        if without:
            (folder / without).unlink()
        return refused(folder, out)

    gone = str(tmp_path / "gone")
    message = said("a", base_model_name_or_path=gone)
    assert f"its base model {gone} (base_model_name_or_path in adapter_config.json)" in message
    assert "no such folder" in message and message.endswith("write there where it is")
    message = said("b", base_model_name_or_path="nobody/no-such-model")
    assert "its base model nobody/no-such-model" in message and "cannot be loaded" in message
    assert "names no base model" in said("c", base_model_name_or_path=None)
    assert "an adapter of type IA3; only LORA can be merged" in said("d", peft_type="IA3")
    message = said("e", without="adapter_model.safetensors")
    assert "adapter_model.safetensors: is missing" in message
    (whole / "adapter_model.safetensors").write_bytes(b"torn")
    assert "adapter_model.safetensors: is not a whole safetensors file" in said("f")
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    adapter_file = {"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": torch.ones(2, 2)}
    save_file(adapter_file, whole / "adapter_model.safetensors")
    assert said("g").endswith("merging it needs peft: pip install -e '.[lora]'")


def test_the_base_is_not_overwritten(base, tmp_path):
    adapter(base, tmp_path / "first")
    convert(tmp_path / "first", tmp_path / "out")
    adapter(tmp_path / "out", tmp_path / "second")
    with pytest.raises(InputError, match="out lies there; name another folder"):
        convert(tmp_path / "second", tmp_path / "out", "--overwrite")
