"""The promises: same curve for the same batch, resumed equals uninterrupted, truthful losses."""

import copy
import gc
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from pipeline import checkpoint, run_folder
from pipeline.arguments import OWNED, share_of_update, training_arguments
from pipeline.blocks import NO_LABEL, Rows
from pipeline.callbacks import TrainingProgressCallback
from pipeline.model import build_model
from pipeline.options import PretrainOptions
from pipeline.pretrained import settled
from pipeline.processes import Processes
from pipeline.recipe import InputError, read_recipe
from pipeline.run_data import obtain_run_data
from pipeline.trainer import PretrainingTrainer
from pipeline.wording import finishing


def make_trainer(recipe_path: Path, folder: Path, **overrides) -> PretrainingTrainer:
    """Return a trainer for the recipe with overrides such as training__max_steps=3."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    recipe = read_recipe(recipe_path, {"training.output_dir": str(folder), **dotted})
    recipe, arguments = training_arguments(settled(recipe))
    data = obtain_run_data(recipe, arguments, Processes(arguments))
    model = build_model(
        recipe.model, data.tokenizer, block_size=recipe.data.block_size, seed=arguments.seed,
        attend_across=recipe.data.attend_across, added_tokens=len(recipe.tokenizer.added_tokens),
    )  # fmt: skip
    trainer = PretrainingTrainer(
        recipe, arguments, model=model, tokenizer=data.tokenizer, blocks=data.blocks
    )
    trainer.flowing = data.flowing
    return trainer


def logged(trainer: PretrainingTrainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(trainer: PretrainingTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def true_loss(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Mean cross-entropy over the predicted tokens, from logits, in fp64."""
    logits = model(input_ids=ids, use_cache=False).logits.double()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_training_loss_is_the_mean_over_predicted_tokens(smoke_recipe, tmp_path, accumulation):
    """Stock Trainer reports 31/32 of it at 32 tokens a row."""
    trainer = make_trainer(
        smoke_recipe, tmp_path, training__max_steps=1, training__logging_steps=1,
        training__eval_strategy="no", training__per_device_train_batch_size=16 // accumulation,
    )  # fmt: skip
    assert trainer.args.gradient_accumulation_steps == accumulation
    seen = []
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: seen.append(rows) or collate(rows)
    expected_model = trainer.model
    before = weights(trainer)
    trainer.train()
    expected_model.load_state_dict(before)
    assert logged(trainer)[0] == pytest.approx(
        true_loss(expected_model, torch.cat([s["input_ids"] for s in seen[:accumulation]])),
        rel=1e-6,
    )


def test_the_held_out_loss_is_that_of_a_plain_computation(smoke_recipe, tmp_path):
    trainer = make_trainer(smoke_recipe, tmp_path, training__max_steps=2)
    trainer.train()
    metrics = trainer.evaluate()
    rows = trainer.eval_dataset
    ids = [row["input_ids"] for row in map(rows.__getitem__, range(len(rows)))]
    stream = torch.cat([ids[0][:1], *(row[1:] for row in ids)])[: rows.tokens]
    nats, tokens = 0.0, 0
    for start in range(0, len(stream) - 1, 31):  # 32 positions, one token shared
        ids = stream[start : start + 32][None]
        nats += true_loss(trainer.model, ids) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert metrics["eval_tokens"] == tokens == rows.tokens - 1
    assert metrics["eval_loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    text = trainer.processing_class.decode(stream[1:], skip_special_tokens=True)
    assert metrics["eval_bytes"] == len(text.encode())
    assert metrics["eval_bits_per_byte"] == pytest.approx(
        nats / math.log(2) / len(text.encode()), rel=1e-6
    )


def test_the_held_out_loss_does_not_depend_on_the_batch_size(smoke_recipe, tmp_path):
    losses = []
    for size in (1, 7, 64):
        trainer = make_trainer(
            smoke_recipe, tmp_path, training__max_steps=1,
            training__per_device_eval_batch_size=size,
        )  # fmt: skip
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_the_same_global_batch_gives_the_same_curve(smoke_recipe, tmp_path):
    curves = []
    for batch_size in (16, 8, 4):
        trainer = make_trainer(
            smoke_recipe, tmp_path, training__per_device_train_batch_size=batch_size,
            training__logging_steps=1, training__max_steps=8, training__eval_strategy="no",
        )  # fmt: skip
        trainer.train()
        curves.append(logged(trainer))
    assert len(curves[0]) == 8
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[2] == pytest.approx(curves[0], rel=1e-5)


def test_the_same_recipe_gives_the_same_bits(smoke_recipe, tmp_path):
    runs = []
    for _ in range(2):
        trainer = make_trainer(smoke_recipe, tmp_path, training__logging_steps=1)
        trainer.train()
        runs.append((logged(trainer), weights(trainer)))
    assert runs[0][0] == runs[1][0]
    assert equal(runs[0][1], runs[1][1])


@pytest.mark.slow
def test_the_same_recipe_gives_the_same_bits_compiled(smoke_recipe, tmp_path):
    """Two threads, bf16 where there is any: the shape of the quickstart's run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    runs = []
    for _ in range(2):
        torch._dynamo.reset()
        trainer = make_trainer(
            smoke_recipe, tmp_path, precision="auto", training__torch_compile="true",
            training__logging_steps=1, training__eval_strategy="no",
            model__attn_implementation="eager",
        )  # fmt: skip
        trainer.train()
        runs.append((logged(trainer), weights(trainer)))
    torch.set_num_threads(threads)
    assert runs[0][0] == runs[1][0]
    assert equal(runs[0][1], runs[1][1])


def test_evaluating_more_often_changes_no_weight(smoke_recipe, tmp_path):
    """With dropout, every draw from the global random state would shift the masks."""
    ends = []
    for every in (3, 7):
        trainer = make_trainer(
            smoke_recipe, tmp_path, training__max_steps=8, training__eval_steps=every,
            model__config__resid_pdrop=0.2,
        )  # fmt: skip
        trainer.train()
        ends.append(weights(trainer))
    assert equal(*ends)


# -- streaming ------------------------------------------------------------------------------------


@pytest.fixture
def small_segments(monkeypatch):
    """Segments of 4 updates, and several shards: 20 updates see both begin anew."""
    monkeypatch.setattr("pipeline.preparation.TOKENS_PER_SEGMENT", 32)
    monkeypatch.setattr("pipeline.sources.SHARD_BYTES", (4000, 4000))


def streamed(recipe_path: Path, folder: Path, **overrides) -> PretrainingTrainer:
    given = {
        "data__streaming": "true", "training__logging_steps": 1, "training__save_steps": 6,
        "training__save_total_limit": 3, "data__hold_out": "documents",
    }  # fmt: skip
    return make_trainer(recipe_path, folder, **given | overrides)


def train(trainer: PretrainingTrainer, resume: str = "never") -> PretrainingTrainer:
    with trainer.flowing():
        trainer.train_from(resume)
    return trainer


def test_a_streamed_run_sees_the_rows_of_the_stream_once_and_in_order(
    smoke_recipe, tmp_path, small_segments
):
    trainer = streamed(smoke_recipe, tmp_path)
    assert len(trainer.train_dataset) == 20 * 16
    seen = []
    step = trainer.training_step
    trainer.training_step = lambda model, inputs, *rest: (
        seen.append(inputs["input_ids"].clone()) or step(model, inputs, *rest)
    )
    train(trainer)
    again = streamed(smoke_recipe, tmp_path)
    with again.flowing():
        ids = again.train_dataset.__getitems__(list(range(320)))["input_ids"]
    assert torch.equal(torch.cat(seen), ids)
    losses = logged(trainer)
    assert len(losses) == 20 and losses[-1] < losses[0] and logged(trainer, "eval_loss")
    assert any("run: 20 updates, 10,240 tokens, streamed" in line for line in trainer._derived())
    assert [path.name for path in (tmp_path / "_ring").iterdir()] == ["bookmarks.jsonl"]


WITH_DROPOUT = {
    "model__config__resid_pdrop": 0.1, "training__per_device_train_batch_size": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def straight(smoke_recipe, tmp_path_factory):
    """A streamed run that nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.preparation.TOKENS_PER_SEGMENT", 32)
        patch.setattr("pipeline.sources.SHARD_BYTES", (4000, 4000))
        folder = tmp_path_factory.mktemp("runs") / "straight"
        return train(streamed(smoke_recipe, folder, **WITH_DROPOUT))


@pytest.mark.parametrize(
    "how",
    [
        "as it was left",
        pytest.param("ring deleted", marks=pytest.mark.slow),
        pytest.param("workers", marks=pytest.mark.slow),
    ],
)
def test_a_streamed_run_resumed_equals_uninterrupted(
    smoke_recipe, tmp_path, small_segments, straight, how
):
    """To the last bit, whatever is left of the ring and whoever reads it."""
    overrides = dict(WITH_DROPOUT)
    if how == "workers":
        overrides["training__dataloader_num_workers"] = 1
    half = streamed(smoke_recipe, tmp_path, **overrides)
    half.add_callback(_StopAt(14))
    with pytest.raises(KeyboardInterrupt):
        train(half)
    if how == "ring deleted":
        shutil.rmtree(tmp_path / "_ring")
    # How many processes read is a part of the recipe, though it changes nothing.
    again = train(streamed(smoke_recipe, tmp_path, **overrides), "auto")

    assert again._clock.first_step == 12
    assert equal(weights(straight), weights(again))
    for name in ("loss", "learning_rate", "eval_loss", "grad_norm"):
        assert logged(straight, name) == logged(again, name)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_text_in_a_stream_is_one_sentence(
    smoke_recipe, tmp_path, small_segments, monkeypatch, workers
):
    """A worker's error comes back with its traceback in the message."""
    folder = tmp_path / "text"
    shutil.copytree(read_recipe(smoke_recipe).data.files[0], folder)
    trainer = streamed(
        smoke_recipe, tmp_path / "run", data__files=str(folder), training__max_steps=200,
        training__dataloader_num_workers=workers, training__eval_strategy="no",
    )  # fmt: skip
    for path in folder.iterdir():
        path.write_bytes(b"\xff" + path.read_bytes())
    with pytest.raises(InputError, match=r"^[^\n]*: byte 0xff at offset 0 is not UTF-8;[^\n]*$"):
        train(trainer)
    # PyTorch waits that long for the worker of an iterator that was given up.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    del trainer
    gc.collect()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"training.max_steps": None}, "data.streaming needs training.max_steps: a stream has no"),
        ({"training.max_steps": -1}, "data.streaming needs training.max_steps: a stream has no"),
        ({"cleaning.deduplicate": True}, "cleaning.deduplicate has to see all documents first"),
        ({"cleaning.decontaminate": "cut"}, "cleaning.decontaminate has to see all documents"),
        ({"data.packing": "best_fit"}, "data.packing best_fit has to see all documents first"),
        ({"data.packing": "sliding", "data.stride": 4}, "data.packing sliding has to see all doc"),
        (
            {"data.files": None, "data.sources": [{"files": ["a"]}, {"files": ["b"]}]},
            "data.streaming needs a weight for each of data.sources",
        ),
    ],
)
def test_what_a_stream_cannot_do(smoke_recipe, overrides, words):
    with pytest.raises(InputError) as caught:
        read_recipe(smoke_recipe, {"data.streaming": True, **overrides})
    assert words in str(caught.value) and "\n" not in str(caught.value)


# -- documents kept apart -------------------------------------------------------------------------


def loss_by_document(model: torch.nn.Module, rows: list[dict[str, torch.Tensor]]) -> float:
    """Mean cross-entropy of the tokens after the first of each document, each run by itself."""
    nats, tokens = 0.0, 0
    model = copy.deepcopy(model).double().eval()
    for row in rows:
        filled = row["labels"] != NO_LABEL  # and the first tokens of documents
        starts = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), len(filled)]
        for start, stop in itertools.pairwise(starts):
            used = filled[start + 1 : stop].sum().item()
            ids = row["input_ids"][start : start + 1 + used][None]
            if not used:
                continue
            logits = model(input_ids=ids, use_cache=False).logits
            loss = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
            nats, tokens = nats + loss.item(), tokens + used
    return nats / tokens


@pytest.mark.parametrize(
    "values",
    [
        {"data__packing": "best_fit"},
        {"data__packing": "best_fit", "model__attn_implementation": "eager"},
        {"data__packing": "concatenate"},
        {"data__packing": "best_fit", "training__per_device_train_batch_size": 4},
    ],
    ids=["best_fit", "eager", "concatenate", "accumulated"],
)
def test_with_documents_apart_the_training_loss_is_that_of_each_by_itself(
    smoke_recipe, tmp_path, values
):
    lines = tmp_path / "lines.txt"
    texts = [p.read_text() for p in sorted(Path(read_recipe(smoke_recipe).data.files[0]).iterdir())]
    lines.write_text("".join(texts))
    given = {
        "data__attend_across": "false", "data__files": str(lines), "data__separator": "\\n",
        "training__max_steps": 1, "training__logging_steps": 1, "training__eval_strategy": "no",
        "training__per_device_train_batch_size": 16, "data__hold_out": "documents",
        "tokenizer__vocab_size": 384,
    }  # fmt: skip
    trainer = make_trainer(smoke_recipe, tmp_path / "run", **given | values)
    rows, step = [], trainer.training_step

    def seen(model, inputs, *rest):
        for number in range(len(inputs["input_ids"])):
            rows.append({name: value[number].clone() for name, value in inputs.items()})
        return step(model, inputs, *rest)

    trainer.training_step = seen
    expected_model = copy.deepcopy(trainer.model)
    expected_model.forward = types.MethodType(GPT2LMHeadModel.forward, expected_model)
    train(trainer)
    assert len(rows) == 16
    documents = sum((row["position_ids"] == 0).sum().item() for row in rows)
    assert documents >= 24
    assert logged(trainer)[0] == pytest.approx(loss_by_document(expected_model, rows), rel=1e-6)
    together = true_loss(expected_model, torch.stack([row["input_ids"] for row in rows]))
    assert logged(trainer)[0] != pytest.approx(together, rel=1e-5)


# -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_stopped_after_its_last_update_trains_no_further(smoke_recipe, tmp_path):
    """Between the last checkpoint and the report much can happen; Trainer would train one more."""
    overrides = {"training__load_best_model_at_end": "true"}
    straight = make_trainer(smoke_recipe, tmp_path / "straight", **overrides)
    straight.train_from("never")
    stopped = make_trainer(smoke_recipe, tmp_path / "stopped", **overrides)
    stopped.train_from("never")  # and then nothing of what follows
    again = make_trainer(smoke_recipe, tmp_path / "stopped", **overrides)
    again.train_from("auto")
    assert again.state.global_step == 20
    assert equal(weights(straight), weights(again))
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "stopped")][-1] == "checkpoint-20"
    assert [e for e in again.history if "loss" in e] == [e for e in stopped.history if "loss" in e]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model__config__activation_function": "relu"}, "activation_function: null -> .relu"),
        ({"model__config__n_embd": 64}, "n_embd: 32 -> 64"),
        ({"training__seed": 1}, "seed: null -> 1"),
        ({"data__validation_fraction": 0.2}, "rows: "),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    smoke_recipe, finished_run, tmp_path, overrides, words
):
    """Many a change has the same shapes, and would train on as if nothing were wrong."""
    trainer = make_trainer(smoke_recipe, tmp_path, **overrides)
    with pytest.raises(InputError, match=f"is a checkpoint of another run: .*{words}"):
        trainer.train_from(str(finished_run / "checkpoint-10"))


def test_every_update_has_the_whole_budget_over_the_end_of_an_epoch(smoke_recipe, tmp_path):
    """Stock Trainer ends each epoch in a smaller update and still counts it as one."""
    trainer = make_trainer(
        smoke_recipe, tmp_path, tokens_per_update=32 * 8 * 7, training__max_steps=None,
        training__num_train_epochs=2, training__eval_strategy="no", training__logging_steps=1,
    )  # fmt: skip
    rows = []
    step = trainer.training_step
    trainer.training_step = lambda model, inputs, *rest: (
        rows.append(len(inputs["input_ids"])) or step(model, inputs, *rest)
    )
    trainer.train()
    assert trainer.state.global_step == 2 * (len(trainer.train_dataset) // 56)
    assert sum(rows) == trainer.state.global_step * 56
    assert any(f"run: {trainer.state.global_step} updates" in line for line in trainer._derived())


def test_what_was_spent_before_a_resume_counts(smoke_recipe, tmp_path):
    half = make_trainer(smoke_recipe, tmp_path)
    half.add_callback(_StopAt(14))
    with pytest.raises(KeyboardInterrupt):
        half.train_from("never")
    before = half._clock.spent(14)
    again = make_trainer(smoke_recipe, tmp_path)
    again.train_from("auto")
    spent = again._spent
    assert spent["timed_updates"] == 9 + 9  # the first update of each process is not timed
    assert spent["train_seconds"] > again._clock.compile_seconds + before["compile_seconds"]
    assert spent["compile_seconds"] > again._clock.compile_seconds


def test_a_finished_run_trains_no_further(smoke_recipe, run_copy):
    """Stock Trainer trains one more step at each restart."""
    before = (run_copy / "model.safetensors").read_bytes()
    from pipeline import pretrain

    pretrain.main(["--config", str(smoke_recipe), "--training.output_dir", str(run_copy)])
    assert (run_copy / "model.safetensors").read_bytes() == before
    assert [p.name for p in checkpoint.checkpoints(run_copy)] == ["checkpoint-10", "checkpoint-20"]


def test_every_log_has_perplexity_bits_tokens_and_speed(finished_run):
    state = json.loads((finished_run / "checkpoint-20" / "trainer_state.json").read_text())
    training = [e for e in state["log_history"] if "loss" in e]
    held_out = [e for e in state["log_history"] if "eval_loss" in e]
    assert [e["step"] for e in training] == [5, 10, 15, 20]
    assert [e["step"] for e in held_out] == [10, 20]
    for entry in training:
        assert entry["perplexity"] == pytest.approx(math.exp(entry["loss"]))
        assert entry["bits_per_byte"] > 0 and entry["tokens_per_second"] > 0
        assert entry["tokens_seen"] == entry["step"] * 512
        assert_metered(entry)
    assert training[0]["logging_fraction"] == 0  # no log was written before the first
    assert all(entry["logging_fraction"] > 0 for entry in training[1:])
    for entry in held_out:
        assert entry["eval_perplexity"] == pytest.approx(math.exp(entry["eval_loss"]))
        assert entry["tokens_per_second"] > 0 and entry["tokens_seen"] == entry["step"] * 512
    assert training[-1]["loss"] < training[0]["loss"]
    metrics = json.loads((finished_run / "metrics.json").read_text())
    assert_metered(metrics)
    # 2 layers x 32 at 32 tokens: what a token takes, over what the machine gives.
    flops = 6 * metrics["parameters"] + 12 * 2 * 32 * 32
    assert metrics["mfu"] == pytest.approx(
        metrics["train_tokens_per_second"] * flops / metrics["product_rate_flops"]
    )
    rates = [entry["mfu"] / entry["tokens_per_second"] for entry in training]
    assert rates == pytest.approx([metrics["mfu"] / metrics["train_tokens_per_second"]] * 4)
    assert metrics["peak_memory_bytes"] >= training[-1]["peak_memory_bytes"]


def assert_metered(numbers: dict[str, float]) -> None:
    """See that numbers hold the meters, each within its bounds."""
    assert numbers["mfu"] > 0  # on a machine that others use it may be anything
    assert 1e7 < numbers["peak_memory_bytes"] < 1e12
    assert 0 < numbers["data_wait_fraction"] < 1 and 0 <= numbers["logging_fraction"] < 1
    assert numbers["data_wait_fraction"] + numbers["logging_fraction"] <= 1


@pytest.mark.slow
def test_waiting_for_slow_data_shows(smoke_recipe, tmp_path):
    """In each window and of the whole run, and not as logging."""
    trainer = make_trainer(
        smoke_recipe, tmp_path, training__max_steps=6, training__logging_steps=1,
        training__eval_strategy="no", training__save_strategy="no",
        training__per_device_train_batch_size=16,
    )  # fmt: skip
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: time.sleep(0.15) or collate(rows)
    trainer.train_from("never")
    windows = [e for e in trainer.state.log_history if "data_wait_fraction" in e][1:]
    assert len(windows) == 5
    shares = [w["data_wait_fraction"] for w in windows]
    assert statistics.median(shares) > 0.5 and trainer._spent["data_wait_fraction"] > 0.5
    assert statistics.median(w["logging_fraction"] for w in windows) < 0.4
    assert 5 * 0.15 <= trainer._spent["data_seconds"] <= trainer._spent["update_seconds"]


def test_extra_texts_and_samples(smoke_recipe, tmp_path):
    (tmp_path / "extra.txt").write_text("the model reads text and learns what comes next.\n" * 9)
    trainer = make_trainer(
        smoke_recipe, tmp_path / "run", training__max_steps=10,
        evaluation__texts={"book": str(tmp_path / "extra.txt")},
    )  # fmt: skip
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "eval_book_perplexity" in e)
    rows: Rows = Rows.held_out(
        [(tmp_path / "extra.txt").read_text()], trainer.processing_class, block_size=32
    )
    assert entry["eval_book_tokens"] == rows.tokens - 1
    assert entry["eval_book_perplexity"] > 1
    samples = (tmp_path / "run" / "samples.txt").read_text()
    assert samples.startswith("--- update 10\ndef ")


def test_tensorboard_gets_perplexity(smoke_recipe, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = make_trainer(
        smoke_recipe, tmp_path / "run", training__report_to="tensorboard", training__max_steps=10
    )
    trainer.train()
    events = EventAccumulator(str(next((tmp_path / "logs").rglob("events.*")).parent))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/perplexity", "train/tokens_seen", "eval/perplexity", "eval/loss"} <= tags


def test_early_stopping_and_the_best_model(smoke_recipe, tmp_path):
    """A rate so high that the loss gets worse: the best is the first evaluation."""
    trainer = make_trainer(
        smoke_recipe, tmp_path, training__learning_rate=3.0, training__eval_steps=2,
        training__save_steps=2, training__load_best_model_at_end="true",
        training__max_grad_norm=0, evaluation__early_stopping_patience=2,
        schedule__warmup_steps=10,
    )  # fmt: skip
    trainer.train()
    held_out = logged(trainer, "eval_loss")
    best = held_out.index(min(held_out))
    assert trainer.state.global_step < 20
    assert len(held_out) == best + 3
    assert Path(trainer.state.best_model_checkpoint) == tmp_path / f"checkpoint-{2 * (best + 1)}"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(held_out), rel=1e-6)


def test_weight_decay_is_on_matrices_only(smoke_recipe, tmp_path):
    trainer = make_trainer(smoke_recipe, tmp_path, training__weight_decay=0.1)
    trainer.create_optimizer()
    decayed, plain = trainer.optimizer.param_groups
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0
    assert all(p.ndim == 2 for p in decayed["params"])
    assert all(p.ndim == 1 for p in plain["params"])
    count = len(list(trainer.model.parameters()))
    assert len(decayed["params"]) + len(plain["params"]) == count


def test_the_gradient_is_clipped(smoke_recipe, tmp_path):
    trainer = make_trainer(
        smoke_recipe, tmp_path, training__max_grad_norm=0.01, training__max_steps=1,
        training__eval_strategy="no",
    )  # fmt: skip
    norms = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        norms.append(torch.cat([g.flatten() for g in grads]).norm().item())
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        trainer.train()
    assert norms[0] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("budget", "block", "batch", "world", "share"),
    [
        (2048, 128, 16, 1, (16, 1)), (2048, 128, 4, 2, (4, 2)), (524288, 1024, 32, 8, (32, 2)),
        (512, 32, 8, 1, (8, 2)), (2048, 128, 16, 2, (8, 1)), (524288, 1024, 32, 512, (1, 1)),
    ],
)  # fmt: skip
def test_batch_and_accumulation_follow_from_the_budget(budget, block, batch, world, share):
    found = share_of_update(budget, block_size=block, batch_size=batch, world_size=world)
    assert found == share


@pytest.mark.parametrize(
    "values", [{}, {"data__attend_across": False}, {"data__packing": "best_fit"}]
)
def test_the_labels_of_an_update_are_as_many_as_it_is_divided_by(smoke_recipe, tmp_path, values):
    trainer = make_trainer(smoke_recipe, tmp_path, **values)
    batches = list(itertools.islice(trainer.get_train_dataloader(), 2))
    count = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    assert trainer._get_num_items_in_batch(batches, torch.device("cpu")) == count


@pytest.mark.parametrize(
    ("budget", "world", "size", "nearest"),
    [
        (2000, 1, 1024, "1024 and 2048"), (1025, 1, 1024, "1024 and 2048"), (100, 1, 128, "128"),
        (1000, 3, 384, "768 and 1152"),
    ],
)  # fmt: skip
def test_a_budget_that_does_not_divide_names_those_that_do(budget, world, size, nearest):
    with pytest.raises(
        InputError, match=rf"multiple of .* = {size}; the nearest that are: {nearest}"
    ):
        share_of_update(budget, block_size=128, batch_size=8, world_size=world)


@pytest.mark.parametrize("name", sorted(OWNED))
def test_what_is_derived_is_not_stated(smoke_recipe, tmp_path, name):
    from pipeline.known_fields import training_fields

    if name not in training_fields():
        return  # a field of another transformers version
    recipe = read_recipe(smoke_recipe, {"training.output_dir": str(tmp_path)})
    recipe = recipe.with_values(training={**recipe.training, name: 1})
    with pytest.raises(InputError, match=f"training.{name}: leave it out; "):
        training_arguments(recipe)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"training.learning_rate": 0}, "training.learning_rate: must be above 0; got 0"),
        ({"training.adam_beta1": 2}, "training.adam_beta1: must be at least 0 and below 1"),
        ({"training.seed": 2**40}, "training.seed: must be below 4294967296"),
        ({"training.num_train_epochs": 2}, "num_train_epochs and training.max_steps contradict"),
        ({"training.metric_for_best_model": "accuracy"}, "'accuracy' is not measured; use one of"),
        ({"training.torch_compile_backend": "nope"}, "torch_compile_backend: 'nope' is not one of"),
        ({"training.optim": "adamw_bnb_8bit"}, "training: .*bitsandbytes"),
        ({"training.dataloader_num_workers": -1}, "dataloader_num_workers: must be at least 0"),
        ({"evaluation.texts": {"book": "nowhere.txt"}}, "nowhere.txt: cannot be read"),
        ({"training.max_steps": 0}, "training.max_steps: must be at least 1; got 0"),
        (
            {"training.num_train_epochs": 0, "training.max_steps": None},
            "training.num_train_epochs: must be above 0",
        ),
        ({"training.per_device_train_batch_size": 0}, "must be at least 1"),
        ({"training.save_total_limit": 1}, "training.save_total_limit: must be at least 2"),
        ({"training.seed": -1}, "training.seed: must be at least 0"),
        ({"training.ddp_timeout": 0}, "training.ddp_timeout: must be above 0"),
        ({"training.eval_strategy": "sometimes"}, "training: .*sometimes"),
        ({"training.optim": "adamw_torhc"}, "training: .*adamw_torhc"),
        (
            {"training.optim": "sgd", "optimizer.name": "muon"},
            "^training.optim: sgd contradicts optimizer.name: muon, which brings its own; leave "
            "one of them out$",
        ),
        (
            {"training.eval_strategy": "no", "evaluation.early_stopping_patience": 2},
            "early_stopping_patience counts evaluations",
        ),
        ({"precision": "fp16"}, "precision: fp16 needs a CUDA GPU"),
    ],
)
def test_values_that_cannot_work(smoke_recipe, tmp_path, overrides, words):
    if overrides.get("precision") == "fp16" and torch.cuda.is_available():
        overrides = {**overrides, "training.use_cpu": True}
    recipe = read_recipe(smoke_recipe, {"training.output_dir": str(tmp_path), **overrides})
    with pytest.raises(InputError, match=words):
        training_arguments(recipe)


def test_the_gradient_scaler_alone_skips_updates(smoke_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.machine.precision", lambda *_, **__: "fp16")  # as on a GPU
    values = {"training.output_dir": str(tmp_path), "guards.skip_spikes": "true"}
    with pytest.raises(
        InputError, match="^guards.skip_spikes: with precision fp16 the gradient sc"
    ):
        training_arguments(read_recipe(smoke_recipe, values))


def test_fp16_is_refused_where_weights_are_divided(smoke_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr("pipeline.machine.precision", lambda wanted, on_cpu: wanted)
    values = {"training.output_dir": str(tmp_path), "precision": "fp16"}
    with pytest.raises(InputError, match="precision: fp16 is not tried where the accelerate conf"):
        training_arguments(read_recipe(smoke_recipe, values))


@pytest.mark.parametrize("launcher", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_muon_is_refused_where_matrices_are_sharded(smoke_recipe, tmp_path, monkeypatch, launcher):
    """As `accelerate launch` says it to each process, before anything is set up for it."""
    monkeypatch.setattr("accelerate.utils.DeepSpeedPlugin", Mock)  # its package may not be there
    monkeypatch.setenv(launcher, "true")
    values = {"training.output_dir": str(tmp_path), "optimizer.name": "muon"}
    with pytest.raises(InputError) as caught:
        training_arguments(read_recipe(smoke_recipe, values))
    assert str(caught.value) == (
        "optimizer.name: muon needs every matrix whole, and the accelerate config shards them "
        "(FSDP or DeepSpeed); use adamw, or accelerate_configs/ddp.yaml"
    )


@pytest.mark.parametrize("said", ["0", "false"])
def test_muon_goes_where_a_launcher_shards_nothing(smoke_recipe, tmp_path, monkeypatch, said):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", said)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", said)
    values = {"training.output_dir": str(tmp_path), "optimizer.name": "muon"}
    recipe, _ = training_arguments(read_recipe(smoke_recipe, values))
    assert recipe.optimizer.name == "muon"


def test_a_reporter_that_is_not_installed(smoke_recipe, tmp_path):
    values = {"training.output_dir": str(tmp_path), "training.report_to": "mlflow"}
    with pytest.raises(InputError, match="report_to: the package mlflow is not installed"):
        training_arguments(read_recipe(smoke_recipe, values))


def test_a_reporter_that_nobody_knows(smoke_recipe, tmp_path):
    with pytest.raises(InputError, match="training: nope is not supported"):
        make_trainer(smoke_recipe, tmp_path, training__report_to="nope")


def test_every_choice_that_was_made_is_in_the_recipe(smoke_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.machine.has_compiler", lambda: False)
    values = {"training.output_dir": str(tmp_path), "training.use_cpu": True}
    recipe = read_recipe(smoke_recipe, {**values, "training.torch_compile": True})
    resolved, _ = training_arguments(recipe)
    assert resolved.training["torch_compile"] is False
    assert resolved.model.attn_implementation == "blockwise_causal"


def test_the_attention_of_cpus_is_warned_of_elsewhere(smoke_recipe, tmp_path, monkeypatch, caplog):
    values = {"training.output_dir": str(tmp_path), "training.use_cpu": True}
    values["model.attn_implementation"] = "blockwise_causal"
    training_arguments(read_recipe(smoke_recipe, values))
    assert "is the faster one on CPUs only" not in caplog.text
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr("pipeline.arguments.join", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        training_arguments(read_recipe(smoke_recipe, {**values, "training.use_cpu": False}))
    assert "blockwise_causal is the faster one on CPUs only" in caplog.text


def test_bf16_is_refused_where_the_device_lacks_it(smoke_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    values = {"training.output_dir": str(tmp_path), "training.use_cpu": True}
    with pytest.raises(InputError, match="precision: bf16 is not in this device's hardware"):
        training_arguments(read_recipe(smoke_recipe, {**values, "precision": "bf16"}))
    recipe, arguments = training_arguments(
        read_recipe(smoke_recipe, {**values, "precision": "auto"})
    )
    assert recipe.precision == "fp32" and not arguments.bf16


def test_without_a_compiler_it_goes_on_and_says_so(smoke_recipe, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("pipeline.machine.has_compiler", lambda: False)
    values = {"training.output_dir": str(tmp_path), "training.use_cpu": True}
    recipe = read_recipe(smoke_recipe, {**values, "training.torch_compile": True})
    _, arguments = training_arguments(recipe)
    assert not arguments.torch_compile
    assert "no C++ compiler" in caplog.text


def test_too_little_text_for_one_update(smoke_recipe, tmp_path):
    with pytest.raises(InputError, match="one update takes 65536: give more text"):
        make_trainer(
            smoke_recipe, tmp_path, tokens_per_update=32 * 65536,
            training__per_device_train_batch_size=65536,
        )  # fmt: skip


def test_out_of_memory_is_one_sentence(smoke_recipe, tmp_path, monkeypatch):
    trainer = make_trainer(smoke_recipe, tmp_path)

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(trainer, "compute_loss", fail)
    with pytest.raises(InputError, match="with 8 rows of 32 tokens.*train_batch_size 4"):
        trainer.train_from("never")


@pytest.mark.slow
def test_what_cannot_be_compiled_as_one_graph_is_one_sentence(smoke_recipe, tmp_path):
    trainer = make_trainer(smoke_recipe, tmp_path, training__torch_compile=True)

    def with_a_break(module, arguments, result):
        torch._dynamo.graph_break()
        return result

    trainer.model.transformer.ln_f.register_forward_hook(with_a_break)
    with pytest.raises(InputError, match=r"training\.torch_compile: .+; set it to false") as caught:
        trainer.train_from("never")
    assert "\n" not in str(caught.value)


def test_a_warm_up_beyond_the_horizon(smoke_recipe, tmp_path):
    with pytest.raises(InputError, match="schedule.warmup_steps comes to 20 updates"):
        make_trainer(smoke_recipe, tmp_path, schedule__warmup_steps=20)


def test_what_is_saved_opens_in_stock_transformers(finished_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    model = AutoModelForCausalLM.from_pretrained(finished_run)
    tokenizer = AutoTokenizer.from_pretrained(finished_run)
    assert type(model).__name__ == "GPT2LMHeadModel" and model.dtype == torch.float32
    assert model.config.use_cache and model.config.n_positions == 32
    assert model.config.vocab_size == len(tokenizer) == 512
    end = tokenizer.eos_token_id
    assert (model.config.bos_token_id, model.config.eos_token_id) == (end, end)
    # As in the model card, without a length: it must not run out of the model's positions.
    text = pipeline("text-generation", model=str(finished_run))("the model")
    assert text[0]["generated_text"].startswith("the model")
    names = {p.name for p in finished_run.rglob("*")}
    assert "training_args.bin" not in names  # a pickle, with any token that was given
    saved = load_file(finished_run / "model.safetensors")
    last = load_file(finished_run / "checkpoint-20" / "model.safetensors")
    assert equal(saved, last)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_run_killed_with_kill_9_goes_on_bit_for_bit(smoke_recipe, tmp_path, streaming):
    """A real process, killed after its first checkpoint; the same command then finishes."""
    command = [
        sys.executable, "pipeline/pretrain.py", "--config", str(smoke_recipe),
        "--training.max_steps", "60", "--training.save_steps", "4",
        "--data.streaming", streaming, "--training.output_dir",
    ]  # fmt: skip
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    subprocess.run([*command, str(straight)], cwd=ROOT, check=True, capture_output=True)
    victim = subprocess.Popen(
        [*command, str(killed)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while victim.poll() is None and not list(killed.glob("checkpoint-*")):
        pass
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert not (killed / "metrics.json").exists()
    done = subprocess.run(
        [*command, str(killed)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert f"resuming from {killed}/checkpoint-" in done.stdout
    one, other = (load_file(f / "model.safetensors") for f in (straight, killed))
    assert equal(one, other)
    assert run_folder.read_status(killed)["state"] == "finished"


def test_the_time_left_does_not_count_the_compilation(monkeypatch, capsys):
    now = [0.0]
    clock = types.SimpleNamespace(perf_counter=lambda: now[0], time=time.time)
    monkeypatch.setattr("pipeline.callbacks.time", clock)
    names = ("loss", "tokens_per_second", "mfu", "peak_memory_bytes", "data_wait_fraction")
    logs = dict.fromkeys([*names, "logging_fraction"], 1.0)
    bar, given = TrainingProgressCallback(), types.SimpleNamespace(disable_tqdm=True)
    state = types.SimpleNamespace(global_step=4, max_steps=14, is_world_process_zero=True)
    bar.on_train_begin(given, state, None)
    for step, seconds in ((5, 60.0), (6, 2.0), (7, 4.0)):
        now[0] += seconds
        state.global_step = step
        bar.on_step_end(given, state, None)
        bar.on_log(given, state, None, logs)
    lines = capsys.readouterr().out.splitlines()
    assert ["left" in line for line in lines] == [False, True, False, True]
    assert lines[1].endswith(", 00:16 left") and lines[3].endswith(", 00:21 left")
    assert lines[2] == f"update 6/14: at this speed the run ends at {finishing(16)}"


def test_options_have_the_documented_defaults():
    assert PretrainOptions().resume == "auto"


class _StopAt:
    """Die at an update as Ctrl-C would."""

    def __new__(cls, step: int):
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == step:
                    raise KeyboardInterrupt

        return Stop()
