"""Processes that share the weights (FSDP2) learn and save what one process does."""

import signal
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import (
    at_update,
    before,
    differences,
    divide_weights,
    forked,
    history,
    outcome,
    send,
    start_ranks,
    steps_saved,
    with_data_of,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.interruption import EXIT_CODE
from pipeline.trainer import PretrainingTrainer

pytestmark = pytest.mark.slow

UPDATES = 50


def arguments(
    recipe: Path, folder: Path, *more: str, updates: int = UPDATES, eval_steps: int = 25
) -> list[str]:
    """One row of 8 accumulated by one process is one of 4 in each of two."""
    return [
        "--config", str(recipe), "--training.output_dir", str(folder), "--training.use_cpu", "true",
        "--training.max_steps", str(updates), "--training.eval_steps", str(eval_steps),
        "--training.save_steps", "20", "--training.logging_steps", "1",
        "--training.per_device_train_batch_size", "2", *more,
    ]  # fmt: skip


def run(starter, count: int, argv: list[str], folder: Path, hook=None, code=0) -> list[str]:
    """Run so many processes to the end; return what each said."""
    log = folder.with_name(f"{folder.name}.log")
    logs = [log.with_name(f"{log.name}.{rank}") for rank in range(count)]
    for one in logs:
        one.unlink(missing_ok=True)
    found = [starter.code(pid) for pid in start_ranks(starter, count, argv, log, hook)]
    said = [one.read_text() for one in logs]
    assert found == [code] * count, "\n".join(said)
    return said


def keep_rows(folder: Path, rank: int) -> None:
    """Write down which rows this process takes at which update."""
    file = folder.with_name(f"{folder.name}.rows.{rank}").open("a", buffering=1)

    def look(self, model, inputs, *rest, **kwargs) -> None:
        for row in inputs["input_ids"].tolist():
            file.write(f"{self.state.global_step + 1} {row}\n")

    before(PretrainingTrainer, "training_step", look)


def rows_kept(folder: Path) -> dict[int, list[str]]:
    """Return the rows of each update, of all processes."""
    found = defaultdict(list)
    for path in folder.parent.glob(f"{folder.name}.rows.*"):
        for line in path.read_text().splitlines():
            step, row = line.split(" ", 1)
            found[int(step)].append(row)
    return {step: sorted(rows) for step, rows in found.items()}


def divided(folder: Path):
    """Return a hook: the processes share the weights, and what they are fed is written down."""

    def hook(rank: int) -> None:
        divide_weights()
        keep_rows(folder, rank)

    return hook


@pytest.fixture(scope="module")
def runs(smoke_recipe, tmp_path_factory) -> dict[str, Path]:
    """The same run by one process, by two, and by two that share the weights."""
    place = tmp_path_factory.mktemp("topologies")
    found = {name: place / name for name in ("one", "ddp", "fsdp2")}
    with forked() as starter:
        for name, folder in found.items():
            if name != "one":
                with_data_of(found["one"], folder)
            hook = divided(folder) if name == "fsdp2" else lambda rank, f=folder: keep_rows(f, rank)
            run(starter, 1 if name == "one" else 2, arguments(smoke_recipe, folder), folder, hook)
    return found


def logged(folder: Path, name: str, step: int = UPDATES) -> list[float]:
    return [e[name] for e in history(folder / f"checkpoint-{step}") if name in e]


@pytest.mark.parametrize("other", ["ddp", "fsdp2"])
def test_the_curve_and_the_rows_are_those_of_one_process(runs, other):
    one, other = runs["one"], runs[other]
    for name in ("loss", "grad_norm", "learning_rate"):
        assert len(logged(one, name)) == UPDATES
        assert logged(other, name) == pytest.approx(logged(one, name), abs=1e-5)
    assert logged(other, "eval_loss") == pytest.approx(logged(one, "eval_loss"), abs=1e-6)
    found = [outcome(run)["metrics"] for run in (one, other)]
    assert found[1]["eval_loss"] == pytest.approx(found[0]["eval_loss"], abs=1e-6)
    assert [m["parameters"] for m in found] == [found[0]["parameters"]] * 2
    assert len(rows_kept(one)) == UPDATES
    assert rows_kept(other) == rows_kept(one)


def test_documents_that_are_kept_apart_are_divided_too(smoke_recipe, tmp_path):
    """Then rows have labels of other numbers, which all processes must know of."""
    more = ["--data.attend_across", "false", "--data.packing", "best_fit"]
    folders = {name: tmp_path / name for name in ("one", "ddp", "fsdp2")}
    with forked() as starter:
        for name, folder in folders.items():
            if name != "one":
                with_data_of(folders["one"], folder)
            argv = arguments(smoke_recipe, folder, *more, updates=8, eval_steps=4)
            hook = divided(folder) if name == "fsdp2" else None
            run(starter, 1 if name == "one" else 2, argv, folder, hook)
    for name in ("loss", "eval_loss", "grad_norm"):
        one, *others = (logged(folder, name, 8) for folder in folders.values())
        assert others == [pytest.approx(one, abs=1e-5)] * 2


def test_what_shared_weights_end_in_is_an_ordinary_folder(runs):
    one, other = runs["one"], runs["fsdp2"]
    assert sorted(p.name for p in other.iterdir()) == sorted(p.name for p in one.iterdir())
    for folder in (other, other / f"checkpoint-{UPDATES}"):
        stored = load_file(folder / "model.safetensors")
        assert not [name for name in stored if "_orig_mod" in name or "lm_head" in name]
        model, messages = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not messages["missing_keys"] and not messages["unexpected_keys"]
        assert type(model).__name__ == "GPT2LMHeadModel" == model.config.architectures[0]
        assert model.lm_head.weight is model.transformer.wte.weight and model.config.use_cache
        for name, weight in stored.items():
            assert torch.equal(model.state_dict()[name], weight)
    ids = AutoTokenizer.from_pretrained(other)("def main(self):", return_tensors="pt").input_ids
    logits = [AutoModelForCausalLM.from_pretrained(run)(ids).logits for run in (one, other)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)
    assert (other / "samples.txt").read_text().count("--- update") == 2


def test_shared_weights_go_on_to_the_last_bit(smoke_recipe, runs, tmp_path):
    folder = with_data_of(runs["one"], tmp_path / "run")
    argv = arguments(smoke_recipe, folder)

    def first(rank: int) -> None:
        divided(folder)(rank)
        if rank == 1:
            at_update(30, lambda: send(signal.SIGTERM))

    with forked() as starter:
        run(starter, 2, argv, folder, first, code=EXIT_CODE)
        assert 30 <= steps_saved(folder)[-1] <= 32
        run(starter, 2, argv, folder, divided(folder))
    assert rows_kept(folder) == rows_kept(runs["one"])
    assert differences(outcome(folder), outcome(runs["fsdp2"])) == []


WAYS = {"fsdp2 by three": (3, 4), "one": (1, 7), "ddp": (2, 10), "fsdp2": (2, None)}


def test_a_run_goes_from_any_topology_to_any_other(smoke_recipe, runs, tmp_path):
    """In the middle of an epoch: processes and where each of them is stopped."""
    straight, folder = tmp_path / "straight", tmp_path / "run"
    with_data_of(runs["one"], straight), with_data_of(runs["one"], folder)

    def hook(way: str, stop: int | None):
        def change(rank: int) -> None:
            (divided(folder) if "fsdp2" in way else lambda r: keep_rows(folder, r))(rank)
            if stop is not None and rank == 0:
                at_update(stop, lambda: send(signal.SIGTERM))

        return change

    with forked() as starter:
        wide = ["--tokens_per_update", "1536"]
        argv = arguments(smoke_recipe, straight, *wide, updates=12, eval_steps=6)
        run(starter, 1, argv, straight, lambda rank: keep_rows(straight, rank))
        for way, (count, stop) in WAYS.items():
            code = 0 if stop is None else EXIT_CODE
            argv = arguments(smoke_recipe, folder, *wide, updates=12, eval_steps=6)
            said = run(starter, count, argv, folder, hook(way, stop), code)
    assert "differs from the checkpoint: processes.sharding: " in said[0]
    assert rows_kept(folder) == rows_kept(straight)
    assert [len(rows) for rows in rows_kept(folder).values()] == [48] * 12
    for name in ("loss", "eval_loss", "grad_norm", "learning_rate"):
        found = logged(folder, name, 12)
        assert found == pytest.approx(logged(straight, name, 12), abs=1e-5) and len(found) > 1


def test_a_number_that_is_none_is_found_and_its_rows_named(smoke_recipe, runs, tmp_path):
    def poison(self, *rest, **kwargs) -> None:
        if self.state.global_step == 6:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.to_local().fill_(float("nan"))

    def hook(rank: int) -> None:
        divide_weights()
        if rank == 1:
            before(PretrainingTrainer, "training_step", poison)

    folder = with_data_of(runs["one"], tmp_path / "run")
    with forked() as starter:
        said = run(starter, 2, arguments(smoke_recipe, folder), folder, hook, code=1)
    assert "error: update 7 was not made: its loss or gradient is infinite" in said[0]
    assert "all of its 16 rows give it" in said[0]
    assert steps_saved(folder) == []


def test_compiled_blocks_learn_what_plain_ones_do(smoke_recipe, runs, tmp_path):
    more = ["--training.torch_compile", "true", "--training.torch_compile_backend", "aot_eager"]
    losses, stopped = beginning(smoke_recipe, runs, tmp_path, *more)
    assert losses == pytest.approx(logged(runs["one"], "loss")[: len(losses)], abs=1e-4)
    names = load_file(runs["one"] / "model.safetensors").keys()
    assert names == load_file(stopped / "model.safetensors").keys()


def test_bf16_between_shared_weights_changes_little(smoke_recipe, runs, tmp_path):
    losses, _ = beginning(smoke_recipe, runs, tmp_path, "--reduce_dtype", "bf16")
    found = np.abs(np.array(losses) - logged(runs["one"], "loss")[: len(losses)])
    assert 0 < found.max() < 1e-2


def beginning(recipe: Path, runs: dict[str, Path], tmp_path: Path, *more: str):
    """Return the first losses of a run by shared weights, and the checkpoint after them."""

    def hook(rank: int) -> None:
        divide_weights()
        if rank == 0:
            at_update(8, lambda: send(signal.SIGTERM))

    folder = with_data_of(runs["one"], tmp_path / "run")
    with forked() as starter:
        run(starter, 2, arguments(recipe, folder, *more), folder, hook, code=EXIT_CODE)
    (step,) = steps_saved(folder)
    losses = logged(folder, "loss", step)
    assert len(losses) == step >= 8
    return losses, folder / f"checkpoint-{step}"
