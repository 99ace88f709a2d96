"""DeepSpeed's ZeRO on CPU processes: the same losses, and checkpoints that fit every other run."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from conftest import ROOT
from forked import Forked, at_update, before, forked, history, start_ranks
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from pipeline import zero
from pipeline.arguments import training_arguments
from pipeline.checkpoint import checkpoints
from pipeline.recipe import InputError, read_recipe
from pipeline.trainer import PretrainingTrainer

# So that the smallest weight is divided too, and is there only while it is used.
EVERYTHING_DIVIDED = {
    "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0,
}  # fmt: skip
KILLED_AT = 13  # three updates after the first checkpoint


@pytest.mark.parametrize("stage", [2, 3])
def test_the_accelerate_config_says_the_stage_and_leaves_the_rest_to_the_recipe(stage):
    path = ROOT / "accelerate_configs" / f"deepspeed_zero{stage}.yaml"
    values = yaml.safe_load(path.read_text())
    assert "mixed_precision" not in values
    given = ["--config_file", str(path), "--main_process_port", "0", "script.py"]
    launched, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    assert launched.use_deepspeed and not launched.cpu and launched.num_processes == 8
    launched.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    _, environment = prepare_deepspeed_cmd_env(launched)
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == str(stage)
    assert environment["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "auto"
    assert environment["ACCELERATE_GRADIENT_CLIPPING"] == "auto"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("GRADIENT_CLIPPING", "1.0", "gradient_clipping: 1.0: set it to auto in the accelerate"),
        ("DEEPSPEED_CONFIG_FILE", "ds.json", "deepspeed_config_file: ds.json is not read; state"),
        ("DEEPSPEED_ZERO_STAGE", "0", "deepspeed_config.zero_stage: must be 1, 2 or 3; got 0"),
        ("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", "do not hold what is offloaded; leave it"),
    ],
)
def test_a_config_that_contradicts_the_recipe_is_refused(
    smoke_recipe, monkeypatch, name, value, said
):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(InputError, match=said):
        training_arguments(read_recipe(smoke_recipe, {}))


@pytest.mark.parametrize(
    "stated",
    [
        {
            "model.pretrained": "gpt2",
            "model.config": None,
            "tokenizer": {},
            "model.frozen_blocks": 1,
        },
        {"faults.rollbacks": 1},
        {"guards.skip_spikes": True},
        {"training.optim": "adafactor"},
        {"reduce_dtype": "bf16"},
    ],
)
def test_what_was_not_tried_is_refused(smoke_recipe, stated):
    name = list(stated)[-1]
    with pytest.raises(InputError, match=f"^{name}.* is not tried under DeepSpeed; leave it out"):
        zero.check(read_recipe(smoke_recipe, stated), precision="fp32")


def test_fp16_is_refused(smoke_recipe):
    with pytest.raises(InputError, match="precision: fp16: is not tried under DeepSpeed"):
        zero.check(read_recipe(smoke_recipe, {}), precision="fp16")


@pytest.fixture(scope="module")
def runs(smoke_recipe, tmp_path_factory) -> "Runs":
    pytest.importorskip("deepspeed")
    with forked() as starter:
        yield Runs(starter, smoke_recipe, tmp_path_factory.mktemp("zero"))


class Runs:
    """Runs of a stage (0: without DeepSpeed) on so many processes, each made once."""

    def __init__(self, starter: Forked, recipe: Path, place: Path) -> None:
        self._starter, self._recipe, self._place = starter, recipe, place

    def finished(self, stage: int, count: int) -> Path:
        folder = self._place / f"finished-{stage}-{count}"
        if not folder.exists():
            self.run(folder, stage, count)
        return folder

    def killed(self, stage: int, count: int) -> Path:
        folder = self._place / f"killed-{stage}-{count}"
        if not folder.exists():
            self.run(folder, stage, count, hook=_die, code=-signal.SIGKILL)
        return folder

    def gone_on(self, killed: Path, stage: int, count: int) -> Path:
        folder = self._place / f"{killed.name}-then-{stage}-{count}"
        shutil.copytree(killed, folder)
        self.run(folder, stage, count, "--resume", "must")
        return folder

    def run(self, folder: Path, stage: int, count: int, *more: str, hook=None, code=0) -> str:
        argv = ["--config", str(self._recipe), "--training.output_dir", str(folder)]
        argv += ["--training.use_cpu", "true", "--training.logging_steps", "1", *more]
        log = folder.with_name(f"{folder.name}.log")

        def prepare(rank: int) -> None:
            if stage:
                _as_launched(stage)
            if hook:
                hook()

        pids = start_ranks(self._starter, count, argv, log, prepare)
        found = [self._starter.code(pid) for pid in pids]
        said = [log.with_name(f"{log.name}.{rank}").read_text() for rank in range(count)]
        assert found == [code] * count, "\n".join(said)
        return said[0]


def _as_launched(stage: int) -> None:
    """Do what accelerate's launcher does, and spare the compilation of a faster all-reduce."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.update(
        ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE=str(stage),
        ACCELERATE_GRADIENT_ACCUMULATION_STEPS="auto", ACCELERATE_GRADIENT_CLIPPING="auto",
    )  # fmt: skip

    def divide_everything(trainer, *_) -> None:
        config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
        config["zero_optimization"] |= EVERYTHING_DIVIDED

    if stage == 3:
        before(PretrainingTrainer, "_prepare_for_training", divide_everything)


def _die() -> None:
    def die() -> None:
        time.sleep(1)  # until the checkpoint is written
        os.kill(os.getpid(), signal.SIGKILL)

    at_update(KILLED_AT, die)


def _last(folder: Path) -> dict:
    path = checkpoints(folder)[-1]
    return {
        "weights": load_file(path / "model.safetensors"),
        "optimizer": torch.load(path / "optimizer.pt", weights_only=True),
        "history": history(path),
    }


def _assert_same_run(one: Path, other: Path, tolerance: float) -> None:
    one, other = _last(one), _last(other)
    losses = [
        [e[name] for e in of["history"] for name in ("loss", "eval_loss") if name in e]
        for of in (one, other)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0, abs=tolerance)
    _assert_close(one, other, tolerance)


def _assert_close(one, other, tolerance: float) -> None:
    """See that two nests have the same shape, and numbers as close as that."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            _assert_close(one[key], other[key], tolerance)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            _assert_close(*pair, tolerance)
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=tolerance, abs=tolerance)
    else:
        assert one == other


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_of_a_stage_train_and_save_what_one_process_does(runs, stage):
    alone, divided = runs.finished(0, 1), runs.finished(stage, 2)
    _assert_same_run(divided, alone, 1e-5)
    model = GPT2LMHeadModel.from_pretrained(divided)
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, weight in _last(divided)["weights"].items():
        assert torch.equal(model.state_dict()[name], weight)
    samples = [(folder / "samples.txt").read_text() for folder in (alone, divided)]
    assert samples[0] == samples[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_stage_goes_on_exactly(runs, stage):
    gone_on = runs.gone_on(runs.killed(stage, 2), stage, 2)
    _assert_same_run(gone_on, runs.finished(stage, 2), 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before_", "after"),
    [((3, 2), (0, 1)), ((2, 2), (0, 2)), ((3, 2), (2, 1)), ((0, 1), (3, 2)), ((2, 2), (3, 1))],
)
def test_a_run_goes_on_whatever_it_was_divided_into(runs, before_, after):
    gone_on = runs.gone_on(runs.killed(*before_), *after)
    _assert_same_run(gone_on, runs.finished(0, 1), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_an_update_of_no_number_ends_the_run(runs, tmp_path, stage):
    def hook() -> None:
        computed = PretrainingTrainer.compute_loss

        def compute_loss(self, *given, **named):
            is_due = self.state.global_step == KILLED_AT - 1 and self.args.process_index == 0
            return computed(self, *given, **named) * (float("nan") if is_due else 1.0)

        PretrainingTrainer.compute_loss = compute_loss

    said = runs.run(tmp_path / "run", stage, 2, hook=hook, code=1)
    assert f"error: update {KILLED_AT} was not made: its loss or gradient is infinite" in said
