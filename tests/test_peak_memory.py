"""What a plan says a process holds, beside what PyTorch's profiler and the kernel say it held."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from pipeline import optimizer, peak_memory
from pipeline.model import build_model
from pipeline.optimizer import muon
from pipeline.peak_memory import peak
from pipeline.planning import SIZES, Shape, parameters
from pipeline.sections import ModelSection, OptimizerSection

SHAPE = Shape(3, 128, 2, vocabulary=1024, positions=192)
ROWS, BLOCK = 4, 192


class Vocabulary:
    """What a model asks of a tokenizer."""

    eos_token_id = 0

    def __len__(self) -> int:
        return SHAPE.vocabulary


def most_allocated(work) -> int:
    """Return by how many bytes the allocations rise at most while it works."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    changes.sort(key=lambda change: change[0])
    return max(itertools.accumulate(size for _, size in changes))


def a_model(*, name: str = "blockwise_causal", is_checkpointed: bool = False):
    config = {"n_layer": SHAPE.layers, "n_head": SHAPE.heads, "n_embd": SHAPE.width}
    section = ModelSection(config=config, attn_implementation=name)
    model = build_model(section, Vocabulary(), block_size=BLOCK, seed=0).train()
    if is_checkpointed:
        old = model.gradient_checkpointing_enable  # its name before transformers 5.24
        getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
    return model


@pytest.mark.parametrize("is_accumulating", [False, True], ids=["one batch", "several"])
@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["whole", "checkpointed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["blockwise_causal", "sdpa_causal"])
def test_an_update_allocates_so_much(name, precision, is_checkpointed, is_accumulating):
    model = a_model(name=name, is_checkpointed=is_checkpointed)
    adamw = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, SHAPE.vocabulary, (ROWS, BLOCK))

    def update():
        for _ in range(1 + is_accumulating):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = model(ids, labels=ids).loss
            loss.backward()
        adamw.step()
        adamw.zero_grad()

    update()
    asked = {"rows": ROWS, "block_size": BLOCK, "precision": precision}
    found = peak(
        SHAPE, **asked, is_checkpointed=is_checkpointed, is_accumulating=is_accumulating,
        is_blockwise=name == "blockwise_causal",
    ).parts  # fmt: skip
    allocated = sum(found.values()) - found["holes"] - found["checkpoint"] - found["process"]
    before = 12 * parameters(SHAPE)  # weights and both averages
    assert allocated == pytest.approx(before + most_allocated(update), rel=0.05)


def test_an_update_by_muon_allocates_so_much():
    from transformers import TrainingArguments

    model = a_model()
    made = muon(model, OptimizerSection(name="muon"), TrainingArguments(use_cpu=True))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    made.step()
    assert sum(t.nbytes for s in made.state.values() for t in s.values()) == pytest.approx(
        peak_memory.optimizer_bytes(SHAPE, "muon"), rel=0.001
    )
    half = optimizer._dtype_of_products(torch.device("cpu")) == torch.bfloat16
    computed = peak_memory._muon_bytes(SHAPE)
    assert most_allocated(made.step) == pytest.approx(computed, rel=0.15 if half else 0.5)


def test_what_the_optimizer_says_is_the_same_here():
    assert peak_memory.MUON_BATCH_BYTES == optimizer.BATCH_BYTES


def test_the_most_is_held_where_the_shape_says():
    """Few tokens: the embedding's gradients; many: the loss; checkpointed: a layer once more."""
    asked = {"block_size": 512, "precision": "fp32", "is_blockwise": True}
    small = SIZES["124M"]._replace(positions=512)
    assert peak(small, rows=2, **asked).phase == "loss"
    assert peak(small, rows=2, **asked, is_checkpointed=True).phase == "embedding"
    deep = Shape(6, 384, 6, 4096, 256)
    assert peak(deep, rows=8, **asked, is_checkpointed=True).phase == "backward"
    wide = Shape(4, 1024, 16, 512, 64)
    assert peak(wide, rows=1, block_size=64, optimizer="muon").phase == "optimizer"


def test_on_a_gpu_only_what_is_allocated_there_counts():
    asked = {"rows": 8, "block_size": 1024}
    on_cpu, on_gpu = (peak(SIZES["124M"], kind=k, **asked).parts for k in ("cpu", "cuda"))
    assert set(on_cpu) - set(on_gpu) == {"holes", "checkpoint", "process"}
    assert on_cpu["checkpoint"] == 12 * 124_439_808
    assert "checkpoint" in on_cpu and peak(SIZES["124M"], is_saving=False, **asked).parts[
        "checkpoint"
    ] == 0  # fmt: skip


@pytest.mark.slow
def test_a_training_process_holds_within_a_tenth_of_what_is_planned(tmp_path):
    shape, rows, block = Shape(4, 256, 4, 1024, 256), 8, 256
    config = {"n_layer": shape.layers, "n_head": shape.heads, "n_embd": shape.width}
    text = tmp_path / "text.txt"
    modules = sorted(Path(os.__file__).parent.glob("*.py"))[:40]
    text.write_text("\n".join(module.read_text(errors="replace") for module in modules))
    values = {
        "training.output_dir": tmp_path / "run", "data.files": text,
        "model.config": json.dumps(config),
        "tokens_per_update": rows * block, "data.block_size": block,
        "tokenizer.vocab_size": shape.vocabulary, "training.max_steps": 6,
        "training.per_device_train_batch_size": rows, "training.save_steps": 3,
        "training.eval_steps": 3, "evaluation.tokens": 4096,
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "pipeline" / "pretrain.py")]
    command += ["--config", str(ROOT / "recipes" / "smoke.yaml")]
    command += [part for name, value in values.items() for part in (f"--{name}", str(value))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    measured = json.loads((tmp_path / "run" / "metrics.json").read_text())["peak_memory_bytes"]
    planned = peak(shape, rows=rows, block_size=block, precision="fp32", is_blockwise=True)
    assert planned.total == pytest.approx(measured, rel=0.1)
