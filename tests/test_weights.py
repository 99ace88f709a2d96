"""The table of a model's tensors, read one by one from whatever holds them."""

import json
import shutil
import weakref

import huggingface_hub
import pytest
import torch
from plain_gpt import LinearGPT
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline import inspect_weights, weight_table
from pipeline.recipe import InputError
from pipeline.weights import Kind, open_weights


@pytest.fixture
def folder(tmp_path, rough_model):
    """A model as transformers saves it."""
    rough_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def table_of(capsys, model, *more):
    """Go through the door; return the lines."""
    inspect_weights.main(["--model", str(model), *more])
    return capsys.readouterr().out.splitlines()


def refused(model, *more):
    with pytest.raises(InputError) as caught:
        inspect_weights.main(["--model", str(model), *more])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_tensor_has_a_line_with_what_it_holds(folder, rough_model, capsys):
    head, *lines = table_of(capsys, folder)
    assert head.split() == ["name", "shape", "parameters", "dtype", "mean", "std"]
    state = {n: t for n, t in rough_model.state_dict().items() if n != "lm_head.weight"}
    rows, total = lines[:-2], lines[-2:]
    assert sorted(row.split()[0] for row in rows) == sorted(state)
    for row in rows:
        tensor = state[row.split()[0]]
        assert f"  {' x '.join(map(str, tensor.shape))}  " in row
        count, dtype, mean, std = row.split()[-4:]
        assert count == f"{tensor.numel():,}" and dtype == "float32"
        assert float(mean) == pytest.approx(tensor.double().mean().item(), rel=1e-3)
        assert float(std) == pytest.approx(tensor.double().std(correction=0).item(), rel=1e-3)
    count = sum(p.numel() for p in rough_model.parameters())
    assert total[0] == f"{folder} ({Kind.MODEL}): {count:,} parameters in {len(rows)} tensors"
    assert total[1] == "the output layer is tied: transformer.wte.weight, counted once"


def test_the_columns_are_aligned_and_blocks_come_in_their_order(tmp_path, capsys):
    config = GPT2Config(vocab_size=1000, n_positions=8, n_embd=4, n_layer=11, n_head=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    lines = table_of(capsys, tmp_path, "--match", "*.ln_1.weight")
    assert [line.split(".")[2] for line in lines[1:-2]] == [str(n) for n in range(11)]
    assert len({len(line) for line in lines[:-2]}) == 1
    assert lines[-2].endswith("44 parameters in 11 of 136 tensors")


@pytest.mark.parametrize("compiled", [True, False])
def test_a_nanogpt_checkpoint_counts_its_tied_head_once_and_no_mask(tmp_path, capsys, compiled):
    model = LinearGPT(vocab_size=384)
    content = model.checkpoint(prefix="_orig_mod." * compiled)
    content["model"]["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    torch.save(content, tmp_path / "ckpt.pt")
    count = sum(p.numel() for p in model.parameters())
    for source in (tmp_path / "ckpt.pt", tmp_path):
        lines = table_of(capsys, source)
        assert f" ({Kind.NANOGPT}): {count:,} parameters in 30 tensors" in lines[-1]
        said = {line.split()[0]: line for line in lines}
        tied = said["lm_head.weight"]
        assert tied.endswith("tied: is transformer.wte.weight, counted once")
        assert said["transformer.h.0.attn.bias"].endswith("a causal mask, no parameter")


def test_a_head_of_its_own_is_counted(tmp_path, capsys):
    save_file(
        {"wte.weight": torch.zeros(4, 2), "lm_head.weight": torch.ones(4, 2)},
        tmp_path / "a.safetensors",
    )
    assert "16 parameters in 2 tensors" in table_of(capsys, tmp_path / "a.safetensors")[-1]


def test_values_that_are_not_finite_are_counted_and_the_rest_is_measured(tmp_path, capsys):
    values = torch.arange(2_000_000.0)  # more than are summed at once
    values[[3, 1_500_000]], values[7], values[8] = torch.nan, torch.inf, -torch.inf
    tensors = {"a": values, "b": torch.full((2,), torch.nan), "c": torch.zeros(0, 4)}
    tensors |= {"d": torch.tensor(5), "e": torch.ones(3, 1, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "a.safetensors")
    lines = table_of(capsys, tmp_path / "a.safetensors", "--json", str(tmp_path / "a.json"))
    rows = {line.split()[0]: line for line in lines}
    assert rows["a"].endswith("NOT FINITE: 2 nan, 2 inf") and rows["b"].endswith("2 nan")
    assert lines[-1] == "2 of them not finite"
    found = {row["name"]: row for row in json.loads((tmp_path / "a.json").read_text())["tensors"]}
    rest = values[values.isfinite()].double()
    assert found["a"]["mean"] == pytest.approx(rest.mean().item())
    assert found["a"]["std"] == pytest.approx(rest.std(correction=0).item())
    assert found["b"]["mean"] is None and found["c"]["std"] is None
    assert found["c"]["parameters"] == 0 and found["c"]["shape"] == [0, 4]
    assert found["d"]["mean"] == 5 and found["d"]["shape"] == [] and found["d"]["dtype"] == "int64"
    assert found["e"]["dtype"] == "bfloat16" and found["e"]["not_finite"] == {}


def test_tensors_are_read_one_at_a_time_and_none_that_is_not_asked_for(folder, monkeypatch):
    weights, alive, most = open_weights(str(folder)), [0], [0]

    class Counted:
        def __init__(self, get):
            self.get = get

        def __call__(self):
            tensor = self.get().clone()
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            weakref.finalize(tensor, lambda: alive.__setitem__(0, alive[0] - 1))
            return tensor

    for name, get in weights.tensors.items():
        weights.tensors[name] = Counted(get) if "h.0" in name else None
    monkeypatch.setattr(weight_table, "open_weights", lambda _: weights)
    assert len(weight_table.look(str(folder), match="*.h.0.*").rows) == 12
    assert most == [1] and alive == [0]


def test_a_sharded_model_is_one_table(tmp_path, rough_model, folder, capsys):
    rough_model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    whole, parts = table_of(capsys, folder), table_of(capsys, tmp_path / "sharded")
    assert whole[:-2] == parts[:-2] and whole[-1] == parts[-1]
    gone = sorted((tmp_path / "sharded").glob("model-*.safetensors"))[1]
    gone.unlink()
    assert refused(tmp_path / "sharded") == f"{gone}: is missing"


def test_a_model_kept_as_a_pickle_is_looked_at(tmp_path, rough_model, folder, capsys):
    torch.save(rough_model.state_dict(), tmp_path / "pytorch_model.bin")
    lines, total = table_of(capsys, tmp_path), table_of(capsys, folder)[-2]
    assert lines[-1].split()[-5] == total.split()[-5]
    assert any(line.endswith("tied: is transformer.wte.weight, counted once") for line in lines)


def test_a_checkpoint_of_a_run_and_an_adapter_are_looked_at(folder, tmp_path, capsys):
    checkpoint = shutil.copytree(folder, tmp_path / "run" / "checkpoint-10")
    assert "tied: transformer.wte.weight" in table_of(capsys, checkpoint)[-1]
    assert refused(tmp_path / "run").endswith(f"holds checkpoints; name one, such as {checkpoint}")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
    save_file({name: torch.ones(2, 32)}, adapter / "adapter_model.safetensors")
    assert f"({Kind.ADAPTER}): 64 parameters in 1 tensors" in table_of(capsys, adapter)[-1]


def test_a_model_on_the_hub_is_looked_at_as_it_was_downloaded(
    tmp_path, folder, monkeypatch, capsys
):
    """From the cache, as huggingface_hub lays it out."""
    kept = tmp_path / "hub" / "models--somebody--small"
    shutil.copytree(folder, kept / "snapshots" / ("a" * 40))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    lines, local = table_of(capsys, "somebody/small"), table_of(capsys, folder)
    assert lines[:-2] == local[:-2] and lines[-2].startswith("somebody/small (")
    (kept / "snapshots" / ("a" * 40) / "model.safetensors").unlink()
    assert refused("somebody/small").startswith(
        "somebody/small, as it is on the Hub: no weights in"
    )
    assert "check the name, the network, HF_TOKEN and HF_HUB_OFFLINE" in refused("somebody/else")


def test_the_pattern_and_the_file_for_numbers_are_checked(folder, tmp_path):
    assert "--match *.nothing: no tensor of" in refused(folder, "--match", "*.nothing")
    (tmp_path / "notes.txt").write_text("notes")
    said = refused(folder, "--json", str(tmp_path / "notes.txt"))
    assert "holds something other than JSON" in said
    assert "no such file; looked in" in refused("outputs/ckpt.pt")
    assert "no such folder; looked in" in refused(tmp_path / "none")
    assert "no weights in this folder" in refused(tmp_path)


def test_damaged_files_are_named(folder, tmp_path, monkeypatch):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert f"{file}: is not a whole safetensors file" in refused(folder)
    file.unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text("[]")
    assert refused(folder) == f"{index}: is not a JSON mapping"
    index.write_text("{}")
    assert refused(folder) == f"{index}: has no weight_map of names to files"
    save_file({"a": torch.ones(1)}, folder / "part.safetensors")
    index.write_text('{"weight_map": {"b": "part.safetensors"}}')
    assert "part.safetensors: lacks b, which model.safetensors.index.json says" in refused(folder)
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    assert refused(tmp_path / "list.pt").endswith("holds a list and no tensors by name")
