"""The batch script for Slurm, with stand-ins for Slurm's commands that do here what those do."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT
from forked import (
    differences,
    forked,
    outcome,
    start_ranks,
    state_of,
    steps_saved,
    until,
    with_data_of,
)

SCRIPT = ROOT / "accelerate_configs" / "slurm" / "train.slurm"
JOB = str(os.getpid())  # the port follows from it

# With proctrack/cgroup, Slurm's usual choice, a signal reaches a task's first process only.
STAND_INS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\necho $$ >"$PLACE/task"\n'
    'SLURM_NODEID=0 exec "$@"\n',
    "scancel": '[[ "$*" == "--signal=TERM $SLURM_JOB_ID" ]] && kill -TERM "$(<"$PLACE/task")"\n',
    "scontrol": 'case "$*" in "show hostnames $SLURM_JOB_NODELIST") echo 127.0.0.1 ;;\n'
    '*) echo "$*" >>"$PLACE/asked" ;; esac\n',
}


class Slurm:
    """One job, started as often as a test likes; what it said, and what it asked Slurm for."""

    def __init__(self, place: Path) -> None:
        self.place, self.log = place, place / "said"
        for name, text in STAND_INS.items():
            (place / name).write_text(f"#!/usr/bin/env bash\n{text}")
            (place / name).chmod(0o755)
        self.job: subprocess.Popen | None = None

    def start(self, *words: str, **environment: str) -> subprocess.Popen:
        """Start the script for two processes on the CPU, with the config that it names itself."""
        bins = os.pathsep.join((str(self.place), str(Path(sys.executable).parent)))
        environment = {
            "PATH": f"{bins}{os.pathsep}{os.environ['PATH']}", "PLACE": str(self.place),
            "PYTHONPATH": str(ROOT), "PROCESSES_PER_NODE": "2", "SLURM_JOB_ID": JOB,
            "SLURM_NNODES": "1",
            "SLURM_CPUS_PER_TASK": "2", "SLURM_JOB_NODELIST": "node[1-1]",
        } | environment  # fmt: skip
        self.job = subprocess.Popen(
            ["bash", str(SCRIPT), *words], cwd=ROOT, env=os.environ | environment,
            stdout=self.log.open("w"), stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        return self.job

    def run(self, *words: str, **environment: str) -> tuple[int, str]:
        """Run it to its end; return its code and what it said."""
        code = self.start(*words, **environment).wait(90)
        return code, self.log.read_text()

    @property
    def asked(self) -> list[str]:
        """What `scontrol` was asked for, besides names of hosts."""
        path = self.place / "asked"
        return path.read_text().splitlines() if path.exists() else []

    def end(self) -> None:
        if self.job is not None and self.job.poll() is None:
            for process in psutil.Process(self.job.pid).children(recursive=True):
                process.kill()
            self.job.kill()
            self.job.wait()


@pytest.fixture
def slurm(tmp_path):
    (tmp_path / "slurm").mkdir()
    slurm = Slurm(tmp_path / "slurm")
    yield slurm
    slurm.end()


def test_the_script_is_one_for_bash_and_for_the_installed_launcher():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    if (shellcheck := shutil.which("shellcheck")) is not None:
        subprocess.run([shellcheck, str(SCRIPT)], check=True)
    lines = [line for line in SCRIPT.read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(line for line in lines if not line.lstrip().startswith("srun "))
    given = set(re.findall(r"(?<=\s)--[a-z_]+", text[text.index("accelerate launch") :]))
    given -= set(re.findall(r"--signal|--time", text))  # Slurm's
    topology = {"num_machines", "num_processes", "machine_rank", "main_process_ip"}
    assert {f"--{name}" for name in topology | {"main_process_port", "config_file"}} <= given
    assert given <= set(launch_command_parser()._option_string_actions)


@pytest.mark.slow
def test_what_cannot_be_started_says_so_and_is_not_queued_again(slurm, smoke_recipe):
    code, said = slurm.run()
    assert code == 2 and said.startswith("train.slurm: which recipe? sbatch accelerate_configs/")
    code, said = slurm.run(str(smoke_recipe), SLURM_JOB_ID="")
    assert code == 2 and said == (
        "train.slurm: this is no job of Slurm; submit it: sbatch "
        "accelerate_configs/slurm/train.slurm RECIPE\n"
    )
    code, said = slurm.run(str(smoke_recipe), PROCESSES_PER_NODE="")
    assert code == 2 and said == (
        "train.slurm: no GPUs in this job: give sbatch --gpus-per-node, or, for CPUs, set "
        "PROCESSES_PER_NODE\n"
    )
    code, said = slurm.run(str(smoke_recipe), "--training.max_step", "3")
    assert code == 2
    assert said == "error: --training.max_step: unknown key; did you mean training.max_steps?\n"
    assert slurm.asked == [] and not (slurm.place / "task").exists()


@pytest.mark.slow
def test_what_an_earlier_allocation_left_is_not_taken_for_this_one_s(slurm, smoke_recipe, tmp_path):
    """A launcher that cannot start leaves the status as it was; it would be queued for ever."""
    (tmp_path / "run_status.json").write_text('{\n "state": "preempted"\n}')
    (slurm.place / "srun").write_text("#!/usr/bin/env bash\necho broken\nexit 3\n")
    words = [str(smoke_recipe), "--training.output_dir", str(tmp_path)]
    code, said = slurm.run(*words)
    assert code == 3 and slurm.asked == []
    assert said == (
        "broken\ntrain.slurm: it failed by itself and is not queued again; the reason stands "
        f"above, and in {tmp_path}/run_status.json\n"
    )


@pytest.mark.slow
def test_a_run_goes_over_several_allocations_and_learns_what_one_would(
    slurm, smoke_recipe, tmp_path
):
    more = [
        "--training.max_steps", "120", "--training.save_steps", "20", "--training.eval_steps",
        "60", "--training.logging_steps", "20",
    ]  # fmt: skip
    straight, folder = tmp_path / "straight", tmp_path / "run"
    with forked() as starter:
        words = ["--config", str(smoke_recipe), "--training.output_dir", str(straight), *more]
        words += ["--training.use_cpu", "true"]  # the script finds that out
        pids = start_ranks(starter, 2, words, tmp_path / "log")
        assert [starter.code(pid) for pid in pids] == [0, 0]
    with_data_of(straight, folder)
    words = [str(smoke_recipe), "--training.output_dir", str(folder), *more]

    job = slurm.start(*words)
    until((folder / "checkpoint-20").exists)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 0, slurm.log.read_text()
    assert state_of(folder) == "preempted" and 20 <= steps_saved(folder)[-1] < 120
    assert slurm.asked == [f"requeue {JOB}"]
    assert f"job {JOB} is queued again" in slurm.log.read_text()

    stopped = steps_saved(folder)[-1]
    code, said = slurm.run(*words)
    assert code == 0 and f"resuming from {folder}/checkpoint-{stopped}\n" in said
    assert said.endswith("train.slurm: finished\n")
    assert "120 updates" in said and "x 2 process(es)" in said
    assert differences(outcome(folder), outcome(straight)) == []

    code, said = slurm.run(*words, PROCESSES_PER_NODE="1")
    assert code == 0 and "resuming" not in said and said.endswith("train.slurm: finished\n")
    assert slurm.asked == [f"requeue {JOB}"]
