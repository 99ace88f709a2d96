"""The launcher starts what its config says, or the run says what came instead."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config import load_config_from_file
from conftest import ROOT

from pipeline import launch
from pipeline.arguments import training_arguments
from pipeline.recipe import InputError, read_recipe

CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
LAUNCHER = str(Path(sys.executable).with_name("accelerate"))

# Of accelerate's config, what says where a run is; all else is the recipe's.
TOPOLOGY = {
    "compute_environment", "distributed_type", "num_machines", "num_processes", "machine_rank",
    "main_process_ip", "main_process_port", "main_training_function", "rdzv_backend",
    "same_network", "use_cpu", "gpu_ids", "fsdp_config", "deepspeed_config",
}  # fmt: skip

SEVERAL = (
    "; accelerate_configs/cpu_2.yaml starts several on a CPU, accelerate_configs/ddp.yaml one for "
    "each GPU"
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """Nothing that a launcher of the tests has set."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_")) or name in launch.COUNTS:
            monkeypatch.delenv(name)
    monkeypatch.setattr("accelerate.commands.config.default_config_file", "/nowhere.yaml")


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A function that writes a config, accelerate.yaml here."""
    monkeypatch.chdir(tmp_path)

    def write(**values) -> str:
        (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(values))
        return "accelerate.yaml"

    return write


# -- the committed configs ------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_says_where_and_for_which_machine(path):
    text, name = path.read_text(), f"accelerate_configs/{path.name}"
    config = load_config_from_file(str(path))
    assert set(yaml.safe_load(text)) <= TOPOLOGY
    assert config.mixed_precision is None and not config.dynamo_config
    for section in (config.fsdp_config, config.deepspeed_config):
        assert section.get("gradient_accumulation_steps", "auto") == "auto"
    head = re.match(r"(#.*\n)+", text)[0]
    command = re.sub(r" \\\n# +", " ", head)
    assert f"  accelerate launch --quiet --config_file {name} " in command
    scripts = re.findall(r"pipeline/\w+\.py|accelerate_configs/\w+\.yaml|recipes/\w+\.yaml", head)
    assert any(script.startswith("pipeline/") for script in scripts)
    assert all((ROOT / script).exists() for script in scripts)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_configs_own_number_of_processes_is_what_its_launcher_starts(path, monkeypatch):
    values = yaml.safe_load(path.read_text())
    wanted = launch.read(["--config_file", str(path), "x.py"])
    assert wanted.processes == values["num_processes"]
    assert "starts one" not in wanted.because or wanted.processes == 1
    assert (wanted.devices == "cpu") is values.get("use_cpu", False)
    assert (wanted.sharding is not None) is (values["distributed_type"] in ("FSDP", "DEEPSPEED"))


# -- what was asked for ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "rest"),
    [
        ("python /venv/bin/accelerate launch --cpu x.py launch", "--cpu x.py launch"),
        ("python3.11 -u /venv/bin/accelerate-launch --cpu x.py", "--cpu x.py"),
        ("python -m accelerate.commands.launch x.py", "x.py"),
        ("python -P -m accelerate.commands.accelerate_cli launch x.py", "x.py"),
        ("python /venv/bin/torchrun --nproc_per_node 2 x.py", None),
        ("mpirun -n 2 python accelerate.py", None),
        ("python /venv/bin/accelerate test", None),
        ("", None),
    ],
)
def test_the_launchers_command_line_is_recognized(command, rest):
    assert launch.words_of(command.split()) == (None if rest is None else rest.split())


@pytest.mark.parametrize(
    ("words", "processes", "because", "devices"),
    [
        ("--cpu --num_processes 2 x.py", 2, "--cpu starts one" + SEVERAL, "cpu"),
        ("--cpu x.py --num_processes 2", None, "--cpu starts one" + SEVERAL, "cpu"),
        ("x.py", None, "without --multi_gpu and a config there is one" + SEVERAL, None),
        (
            "--multi-gpu --num-processes=5 x.py", 5,
            "it counts those of all machines, and must be a multiple of num_machines", None,
        ),
    ],
)  # fmt: skip
def test_what_a_command_line_asks_for(words, processes, because, devices):
    wanted = launch.read(words.split())
    assert (wanted.processes, wanted.because, wanted.devices) == (processes, because, devices)
    assert wanted.sharding is None and wanted.accumulation is None


def test_flags_come_before_the_config(config):
    file = config(distributed_type="MULTI_GPU", num_processes=8, use_cpu=True)
    assert launch.read(["--config_file", file, "x.py"]).processes == 8
    wanted = launch.read(["--config_file", file, "--num_processes", "2", "x.py"])
    assert (wanted.processes, wanted.count_from) == (2, "--num_processes 2")


def test_without_a_launcher_nothing_is_asked_for_and_nothing_looked_up(monkeypatch):
    monkeypatch.setattr(launch, "psutil", None)
    assert launch.asked() == launch.Asked()


def test_a_launcher_that_cannot_be_read_asks_for_nothing(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert launch.asked() == launch.Asked()  # pytest's own parent is none


# -- what came of it ------------------------------------------------------------------------------


def refusal(wanted: launch.Asked, precision: str = "fp32") -> str:
    with pytest.raises(InputError) as caught:
        launch.check(wanted, precision=precision)
    return str(caught.value)


def test_the_number_of_processes(config, monkeypatch):
    wanted = launch.read("--cpu --num_processes 2 x.py".split())
    assert refusal(wanted) == (
        "2 processes were asked for (--num_processes 2), and the launcher started 1: --cpu starts "
        "one" + SEVERAL
    )
    file = config(distributed_type="MULTI_CPU", num_processes=4, use_cpu=True)
    wanted = launch.read(["--config_file", file, "x.py"])
    assert refusal(wanted) == (
        "4 processes were asked for (num_processes in accelerate.yaml), and the launcher started "
        "1: distributed_type: MULTI_CPU in accelerate.yaml starts one" + SEVERAL
    )
    monkeypatch.setenv("WORLD_SIZE", "4")
    launch.check(wanted, precision="fp32")
    wanted = launch.read("--multi_gpu --num_processes 5 --num_machines 2 x.py".split())
    assert refusal(wanted) == (
        "5 processes were asked for (--num_processes 5), and the launcher started 4: it counts "
        "those of all machines, and must be a multiple of num_machines"
    )


@pytest.mark.parametrize("kind", ["MULTI_CPU", "MULTI_GPU", "NO"])
def test_a_section_that_the_launcher_leaves_out(config, kind):
    file = config(distributed_type=kind, num_processes=1, fsdp_config={"fsdp_version": 2})
    assert refusal(launch.read(["--config_file", file, "x.py"])) == (
        "the launcher was asked to shard the model (fsdp_config in accelerate.yaml) and left that "
        "out: it heeds the section of its distributed_type only; take "
        "accelerate_configs/fsdp2.yaml, or remove the section"
    )


def test_a_flag_may_take_a_section_back(config):
    file = config(distributed_type="FSDP", num_processes=1, fsdp_config={"fsdp_version": 2})
    wanted = launch.read(["--config_file", file, "--multi_gpu", "--num_processes", "1", "x.py"])
    assert wanted.sharding is None


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
            "the launcher is asked for FSDP without fsdp_version: 2, which means version 1; this "
            "trainer shards with version 2: take accelerate_configs/fsdp2.yaml",
        ),
        (
            {"ACCELERATE_USE_MEGATRON_LM": "true"},
            "the launcher is asked for Megatron-LM, which GPT2LMHeadModel is not made for; take "
            "accelerate_configs/fsdp2.yaml",
        ),
        (
            {"PARALLELISM_CONFIG_TP_SIZE": "2"},
            "the launcher is asked for tensor parallelism (parallelism_config_tp_size), which "
            "this trainer does not know; take accelerate_configs/fsdp2.yaml",
        ),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            "the launcher states gradient_accumulation_steps 4: leave it out; it is derived from "
            "tokens_per_update",
        ),
        (
            {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
            "the launcher states dynamo_backend inductor, and compiling is the recipe's: leave it "
            "out, and use training.torch_compile and training.torch_compile_backend",
        ),
        (
            {"ACCELERATE_MIXED_PRECISION": "fp16"},
            "the launcher states mixed_precision fp16, and the recipe comes to fp32 here: leave "
            "it out of the accelerate config and command; precision has one owner, the recipe "
            "(precision: auto, fp32, bf16 or fp16)",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_the_launchers_to_say(monkeypatch, environment, sentence):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert refusal(launch.Asked()) == sentence


@pytest.mark.parametrize(
    "environment",
    [
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
        {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "NO"},
        {"ACCELERATE_MIXED_PRECISION": "no", "PARALLELISM_CONFIG_CP_SIZE": "1"},
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"},
    ],
)
def test_what_a_launcher_says_by_itself_contradicts_nothing(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launch.check(launch.Asked(), precision="bf16")


def test_accumulation_in_a_section(config, monkeypatch):
    section = {"fsdp_version": 2, "gradient_accumulation_steps": 8}
    file = config(distributed_type="FSDP", num_processes=1, fsdp_config=section)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert refusal(launch.read(["--config_file", file, "x.py"])) == (
        "the launcher states gradient_accumulation_steps in the fsdp_config of accelerate.yaml: "
        "leave it out; it is derived from tokens_per_update"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_gpus_that_are_not_there():
    wanted = launch.read(["--config_file", str(ROOT / "accelerate_configs/ddp.yaml"), "x.py"])
    with pytest.raises(InputError) as caught:
        launch.on_cpu(wanted, by_recipe=False)
    assert str(caught.value) == (
        "the launcher is asked for GPUs (distributed_type: MULTI_GPU without use_cpu: true in "
        f"{ROOT}/accelerate_configs/ddp.yaml), and torch finds none here; "
        "accelerate_configs/cpu_2.yaml starts several processes on one CPU, and --training.use_cpu "
        "true has any of the configs use CPUs"
    )
    assert launch.on_cpu(wanted, by_recipe=True) and launch.on_cpu(launch.Asked(), by_recipe=False)


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(InputError, match="started 8 processes here, and there are 4 GPUs; give --"):
        launch.on_cpu(launch.Asked(), by_recipe=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert not launch.on_cpu(launch.Asked(), by_recipe=False)


def test_a_no_without_quotes_is_one_too(tmp_path):
    """YAML reads it as false."""
    file = tmp_path / "accelerate.yaml"
    file.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: NO\nnum_processes: 2\n")
    said = refusal(launch.read(["--config_file", str(file), "x.py"]))
    assert said.startswith("2 processes were asked for") and "distributed_type: NO in" in said


def arguments_for(count: int, backend: str | None, kind: str, precision: str = "no"):
    state = SimpleNamespace(backend=backend, distributed_type=SimpleNamespace(value=kind))
    return SimpleNamespace(
        distributed_state=state, world_size=count, mixed_precision=precision,
        device=torch.device("cpu"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "environment", "line"),
    [
        (arguments_for(1, None, "NO"), {}, "launch: 1 process, cpu, fp32"),
        (
            arguments_for(2, "gloo", "MULTI_CPU", "bf16"),
            {"LOCAL_WORLD_SIZE": "2"},
            "launch: 2 processes, cpu (gloo), bf16, a copy of the model in each (DDP)",
        ),
        (
            arguments_for(16, "nccl", "MULTI_GPU"),
            {"LOCAL_WORLD_SIZE": "8", "ACCELERATE_USE_FSDP": "true"},
            "launch: 16 processes on 2 machines, cpu (nccl), fp32, sharded (FSDP2)",
        ),
        (
            arguments_for(8, "nccl", "DEEPSPEED"),
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            "launch: 8 processes, cpu (nccl), fp32, sharded (DeepSpeed ZeRO-3)",
        ),
    ],
)
def test_the_line_that_says_what_came(monkeypatch, arguments, environment, line):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch.came(arguments) == line


def test_a_sharding_that_accelerate_drops(smoke_recipe, tmp_path, monkeypatch):
    """One process on the CPU, as `accelerate` sets it up: it forgets about FSDP."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    values = {"training.output_dir": str(tmp_path), "training.use_cpu": True}
    with pytest.raises(InputError, match="was asked for FSDP, which accelerate leaves out on a CP"):
        training_arguments(read_recipe(smoke_recipe, values))


# -- real launchers -------------------------------------------------------------------------------


def launched(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [LAUNCHER, "launch", "--quiet", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.slow
def test_the_documented_command_starts_two_processes(smoke_recipe, tmp_path):
    done = launched(
        "--config_file", "accelerate_configs/cpu_2.yaml", "--main_process_port", "0",
        "pipeline/pretrain.py", "--config", str(smoke_recipe),
        "--training.output_dir", str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = "launch: 2 processes, cpu (gloo), fp32, a copy of the model in each (DDP)\n"
    assert done.stdout.startswith(line) and done.stdout.count("launch: ") == 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["world_size"] == 2


@pytest.mark.slow
def test_the_trap_is_told(smoke_recipe, tmp_path):
    done = launched(
        "--cpu", "--num_processes", "2", "pipeline/pretrain.py", "--config", str(smoke_recipe),
        "--training.output_dir", str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 1  # of the launcher; the run's own is 2
    assert "error: 2 processes were asked for (--num_processes 2), and the" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert not (tmp_path / "run").exists()
