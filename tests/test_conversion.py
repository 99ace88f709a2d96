"""Weights of nanoGPT and of OpenAI become a folder that computes the same logits."""

import json
import os
import sys

import numpy as np
import plain_gpt
import pytest
import torch
from conftest import ROOT
from plain_gpt import LinearGPT
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from pipeline import artifact, convert_weights, generate
from pipeline.foreign_weights import foreign_model
from pipeline.recipe import InputError
from pipeline.weights import Kind, Weights

IDS = torch.tensor([5, 3, 200, 7, 0, 1, 2, 383, 90, 11])


def saved(model, folder, name="ckpt.pt", **options):
    """Write a model as nanoGPT does."""
    torch.save(model.checkpoint(**options), folder / name)
    return folder / name


def converted(source, folder, *more):
    """Go through the door."""
    convert_weights.main(["--source", str(source), "--output_dir", str(folder), *map(str, more)])
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def refused(source, folder, *more):
    """Go through the door, and return the sentence; nothing is left behind."""
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(InputError) as caught:
        converted(source, folder, *more)
    assert sorted(folder.parent.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@torch.no_grad()
def logits_of(model, ids=IDS):
    return model(ids[None]).logits[0]


@pytest.fixture(scope="module")
def tokenizer_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    """A nanoGPT checkpoint whose vocabulary is the test tokenizer's."""
    return saved(LinearGPT(vocab_size=384), tmp_path)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_nanogpt_checkpoint_gives_the_same_logits(tmp_path, tokenizer_folder, bias, prefix):
    original = LinearGPT(vocab_size=384, bias=bias)
    source = saved(original, tmp_path, prefix=prefix)
    model = converted(source, tmp_path / "out", "--tokenizer", tokenizer_folder)
    assert torch.allclose(logits_of(model), original(IDS), atol=1e-4)
    assert logits_of(model).std() > 0.3  # the comparison says something
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.transformer.wte.weight


def test_the_folder_is_a_whole_model_that_stock_transformers_and_our_doors_open(
    checkpoint, tmp_path, tokenizer, tokenizer_folder, capsys
):
    model = converted(checkpoint, tmp_path / "out", "--tokenizer", tokenizer_folder)
    said = capsys.readouterr().out
    count = sum(p.numel() for p in LinearGPT(vocab_size=384).parameters())
    assert f"{tmp_path / 'out'}: {count:,} parameters, a vocabulary of 384" in said
    assert f"python pipeline/generate.py --model {tmp_path / 'out'}" in said
    own = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert own.get_vocab() == tokenizer.get_vocab()
    end = tokenizer.eos_token_id
    for config in (model.config, model.generation_config):
        assert [config.bos_token_id, config.eos_token_id, config.pad_token_id] == [end] * 3
    write = pipeline("text-generation", str(tmp_path / "out"))
    assert write("the model", do_sample=False)[0]["generated_text"].startswith("the model")
    generate.main(["--model", str(tmp_path / "out"), "--prompt", "the", "--max_new_tokens", "3"])
    assert artifact.damage(tmp_path / "out") is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the nanoGPT checkpoint ckpt.pt" in card and "library_name: transformers" in card
    assert str(tmp_path) not in card


def test_rows_beyond_the_tokenizers_entries_are_cut_off_and_that_is_said(
    tmp_path, tokenizer_folder, capsys
):
    original = LinearGPT(vocab_size=448)
    source = saved(original, tmp_path)
    model = converted(source, tmp_path / "out", "--tokenizer", tokenizer_folder)
    assert model.config.vocab_size == len(model.transformer.wte.weight) == 384
    assert torch.allclose(logits_of(model), original(IDS)[:, :384], atol=1e-4)
    said = "64 rows of the embedding beyond the tokenizer's 384 entries are cut off"
    assert said in capsys.readouterr().out
    # The rows are gone from the file as well.
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 4 * (384 * 32 + 27_000)


def test_a_tokenizer_that_cannot_be_the_models_is_refused(tmp_path, tokenizer_folder):
    source = saved(LinearGPT(vocab_size=512), tmp_path)
    with pytest.raises(InputError, match="384 entries, and the embedding 512 rows: .*not the mode"):
        converted(source, tmp_path / "out", "--tokenizer", tokenizer_folder)
    assert not (tmp_path / "out").exists()


def test_without_a_tokenizer_only_gpt2s_padded_vocabulary_is_cut(tmp_path, capsys):
    for vocabulary, kept, end in ((448, 448, None), (50_304, 50_257, 50_256)):
        original = LinearGPT(vocab_size=vocabulary)
        source = saved(original, tmp_path, f"{vocabulary}.pt")
        model = converted(source, tmp_path / f"{vocabulary}")
        assert model.config.vocab_size == kept
        assert model.config.eos_token_id == model.generation_config.eos_token_id == end
        assert torch.allclose(logits_of(model), original(IDS)[:, :kept], atol=1e-4)
        said = capsys.readouterr().out
        assert ("47 rows of the embedding beyond GPT-2's 50,257 entries" in said) is (end == 50_256)
        assert "there is no tokenizer in the folder; with --tokenizer" in said
        assert "generate.py" not in said


@pytest.mark.parametrize(
    ("given", "dated", "tanh"),
    [([], True, False), (["--activation", "gelu_new"], True, True), ([], False, True)],
)
def test_the_activation_is_nanogpts_or_the_stated_one(tmp_path, capsys, given, dated, tanh):
    """Before model_args said `bias`, nanoGPT had the approximation for sure."""
    original = LinearGPT(vocab_size=384, tanh=tanh)
    content = original.checkpoint()
    if not dated:
        del content["model_args"]["bias"]
    torch.save(content, tmp_path / "ckpt.pt")
    model = converted(tmp_path / "ckpt.pt", tmp_path / "out", *given)
    assert model.config.activation_function == ("gelu_new" if tanh else "gelu")
    assert torch.allclose(logits_of(model), original(IDS), atol=1e-4)
    assert f"the activation function is gelu{'_new' * tanh} (" in capsys.readouterr().out
    other = LinearGPT(vocab_size=384, tanh=not tanh)  # the two differ visibly
    assert not torch.allclose(logits_of(model), other(IDS), atol=1e-4)


def test_masks_of_old_checkpoints_are_ignored_and_a_head_of_its_own_is_kept(tmp_path):
    original = LinearGPT(vocab_size=384)
    original.lm_head.weight = torch.nn.Parameter(torch.randn(384, 32))
    content = original.checkpoint()
    for layer in range(2):
        content["model"][f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    torch.save(content, tmp_path / "ckpt.pt")
    model = converted(tmp_path / "ckpt.pt", tmp_path / "out")
    assert not model.config.tie_word_embeddings
    assert torch.allclose(logits_of(model), original(IDS), atol=1e-4)


def test_weights_of_half_precision_become_fp32(tmp_path):
    original = LinearGPT(vocab_size=384).bfloat16()
    model = converted(saved(original, tmp_path), tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.allclose(logits_of(model), original.float()(IDS), atol=1e-4)


class Code:
    """What runs a command when a pickle is read."""

    def __reduce__(self):
        return os.system, ("touch " + os.environ["CODE_RAN"],)


def test_a_pickle_with_code_in_it_is_refused_and_the_code_does_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("CODE_RAN", str(tmp_path / "ran"))
    torch.save({**LinearGPT(vocab_size=384).checkpoint(), "config": Code()}, tmp_path / "ckpt.pt")
    said = refused(tmp_path / "ckpt.pt", tmp_path / "out")
    assert said.startswith(f"{tmp_path / 'ckpt.pt'}: holds more than tensors, numbers and text")
    assert "posix.system" in said and "could run a stranger's code" in said
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("model_args"), "is not a nanoGPT checkpoint ('model', with tensors by"),
        (lambda c: c["model_args"].pop("n_head"), "model_args must give n_head as a number of at"),
        (lambda c: c["model_args"].update(n_head=3), "n_embd 32 is not a multiple of n_head 3"),
        (lambda c: c["model_args"].update(n_layer=3), "lacks transformer.h.2.ln_1.weight"),
        (lambda c: c["model_args"].update(n_layer=1), "no place for transformer.h.1.attn.c_attn"),
        (
            lambda c: c["model_args"].update(block_size=32),
            "wpe.weight is 16 x 32, and by the sizes in model_args it should be 32 x 32",
        ),
        (
            lambda c: c["model"].update({"transformer.h.0.mlp.c_fc.weight": torch.ones(32, 128)}),
            "transformer.h.0.mlp.c_fc.weight is 32 x 128, and by the sizes in model_args it should "
            "be 128 x 32",
        ),
        (lambda c: c["model"].pop("transformer.h.1.ln_2.bias"), "lacks transformer.h.1.ln_2.bias"),
        (
            lambda c: c["model"]["transformer.ln_f.weight"].fill_(torch.nan),
            "transformer.ln_f.weight holds values that are not finite",
        ),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_not_as_it_says_is_refused(tmp_path, change, said):
    content = LinearGPT(vocab_size=384).checkpoint()
    change(content)
    torch.save(content, tmp_path / "ckpt.pt")
    message = refused(tmp_path / "ckpt.pt", tmp_path / "out")
    assert said in message and str(tmp_path / "ckpt.pt") in message


def test_other_files_and_folders_are_refused(tmp_path, checkpoint, tiny_model, tokenizer_folder):
    out = tmp_path / "out"
    whole = checkpoint.read_bytes()
    torn, text, state = (tmp_path / name for name in ("torn.pt", "text.pt", "state.pt"))
    torn.write_bytes(whole[: len(whole) // 2])
    text.write_text("not a checkpoint\n")
    torch.save(LinearGPT(vocab_size=384).state_dict(), state)
    for path in (torn, text):
        assert f"{path}: cannot be read as a PyTorch checkpoint" in refused(path, out)
    assert "is a PyTorch file and does not say its model's sizes" in refused(state, out)
    assert "no such file or folder; looked in" in refused(tmp_path / "none.pt", out)
    assert "no weights in this folder" in refused(tokenizer_folder, out)
    tiny_model.save_pretrained(tmp_path / "model")
    assert "is a folder of transformers already" in refused(tmp_path / "model", out)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, tokenizer_folder):
    source = saved(LinearGPT(vocab_size=300), tmp_path)
    said = refused(source, tmp_path / "out", "--tokenizer", tokenizer_folder)
    assert "has 384 entries, but the embedding of" in said and "only 300 rows; give by" in said
    said = refused(source, tmp_path / "out", "--tokenizer", tmp_path / "none")
    assert "no such folder" in said


def test_an_output_folder_that_exists_is_not_touched(tmp_path, checkpoint, capsys):
    out = tmp_path / "out"
    converted(checkpoint, out)
    before = (out / "model.safetensors").read_bytes()
    assert "holds an earlier conversion; add --overwrite" in refused(checkpoint, out)
    torch.save(LinearGPT(vocab_size=384, seed=1).checkpoint(), checkpoint)
    converted(checkpoint, out, "--overwrite")
    assert (out / "model.safetensors").read_bytes() != before
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["out"]  # nothing is left beside
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    said = refused(checkpoint, theirs, "--overwrite")
    assert "exists, and no conversion wrote it; name another folder" in said
    assert "lies there; name another folder" in refused(checkpoint, tmp_path, "--overwrite")


def test_tensorflow_variables_give_the_same_logits():
    """The mapping alone: no file, no TensorFlow."""
    variables = plain_gpt.tensorflow_variables(vocab_size=400)
    variables |= {
        "model/wte/Adam": np.ones(3),
        "beta1_power": np.ones(()),
        "global_step": np.ones(()),
    }
    weights = tensorflow_weights(variables)
    model = foreign_model(weights, vocab_size=384)
    expected = plain_gpt.tensorflow_logits(variables, IDS.numpy())[:, :384]
    assert np.allclose(logits_of(model).numpy(), expected, atol=1e-4)
    assert model.config.activation_function == "gelu_new"


def tensorflow_weights(variables, **settings):
    sizes = {**plain_gpt.SIZES, "n_vocab": 400, "n_ctx": 16, **settings}
    tensors = {n: lambda v=v: torch.as_tensor(v) for n, v in variables.items()}
    return Weights(Kind.TENSORFLOW, ROOT / "117M", tensors, sizes)


def test_tensorflow_variables_that_do_not_fit_are_refused():
    variables = plain_gpt.tensorflow_variables(vocab_size=400)

    def said(changed=variables, **settings):
        with pytest.raises(InputError) as caught:
            foreign_model(tensorflow_weights(changed, **settings))
        return str(caught.value)

    assert "model/wpe is 16 x 32, and by the sizes in hparams.json it should be 8 x 32" in said(
        n_ctx=8
    )
    assert "hparams.json must give n_vocab as a number of at least 1; got '400'" in said(
        n_vocab="400"
    )
    assert "lacks model/h0/mlp/c_fc/b" in said(
        {n: v for n, v in variables.items() if n != "model/h0/mlp/c_fc/b"}
    )
    flat = variables | {"model/h1/attn/c_attn/w": variables["model/h1/attn/c_attn/w"][0]}
    assert "model/h1/attn/c_attn/w is 32 x 96" in said(flat)
    assert "has no place for model/h2/ln_1/g" in said(
        variables | {"model/h2/ln_1/g": np.ones(32, np.float32)}
    )


def test_a_tensorflow_folder_without_its_parts_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "117M"
    folder.mkdir()
    (folder / "hparams.json").write_text(json.dumps(plain_gpt.SIZES))
    said = refused(folder, tmp_path / "out")
    assert "model.ckpt.index: is missing; a TensorFlow checkpoint has it" in said
    (folder / "model.ckpt.index").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # as if it were not installed
    said = refused(folder, tmp_path / "out")
    assert said.endswith("reading it needs TensorFlow: pip install -e '.[tensorflow]'")
    said = refused(folder, tmp_path / "out", "--activation", "gelu")
    assert "needs TensorFlow" in said
    (folder / "hparams.json").write_text("{")
    assert "hparams.json: cannot be read as JSON" in refused(folder, tmp_path / "out")


@pytest.mark.slow
def test_a_real_tensorflow_checkpoint_with_its_tokenizer_is_converted(tmp_path, tokenizer, texts):
    tensorflow = pytest.importorskip("tensorflow")
    folder, variables = tmp_path / "117M", plain_gpt.tensorflow_variables(vocab_size=384)
    with tensorflow.Graph().as_default(), tensorflow.compat.v1.Session() as session:
        v1 = tensorflow.compat.v1
        for name, value in variables.items():
            v1.get_variable(name, initializer=value, use_resource=False)
        session.run(v1.global_variables_initializer())
        folder.mkdir()
        v1.train.Saver().save(session, str(folder / "model.ckpt"))
    sizes = {**plain_gpt.SIZES, "n_vocab": 384, "n_ctx": 16}
    (folder / "hparams.json").write_text(json.dumps(sizes))
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "encoder.json").write_text(json.dumps(backend["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in backend["merges"])
    (folder / "vocab.bpe").write_text(f"#version: 0.2\n{merges}\n")
    model = converted(folder, tmp_path / "out")
    expected = plain_gpt.tensorflow_logits(variables, IDS.numpy())
    assert np.allclose(logits_of(model).numpy(), expected, atol=1e-4)
    own = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [own(text)["input_ids"] for text in texts] == [tokenizer(t)["input_ids"] for t in texts]
    assert model.config.eos_token_id == own.eos_token_id == tokenizer.eos_token_id
    said = refused(folder, tmp_path / "other", "--tokenizer", tmp_path / "out")
    assert "has its own tokenizer; leave it out" in said
    assert "has no meaning with a TensorFlow checkpoint" in refused(
        folder, tmp_path / "other", "--activation", "gelu"
    )
    (folder / "model.ckpt.data-00000-of-00001").unlink()
    assert "cannot be read as a TensorFlow checkpoint" in refused(folder, tmp_path / "other")
