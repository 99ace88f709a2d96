"""What the machine has: precision by device, threads, determinism, memory, a compiler."""

import atexit
import ctypes
import os
import platform
import subprocess
import sys
import sysconfig
import types

import psutil
import pytest
import torch
from conftest import ROOT

from pipeline import machine
from pipeline.recipe import InputError

HUGE = 2**31 - 1


@pytest.fixture
def prepared(monkeypatch):
    """`prepare_cpu`, returning the threads it sets; what it changes is put back."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    for name in ("OMP_NUM_THREADS", "ACCELERATE_DYNAMO_BACKEND", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def prepare():
        threads.clear()
        machine.prepare_cpu()
        return threads

    yield prepare
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fills


# -- threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cores, allowed, said, threads",
    [
        (8, 16, {}, 8),  # 16 logical processors
        (8, 3, {}, 3),  # taskset
        (None, 4, {}, 1),  # psutil knows no number
        (8, 16, {"LOCAL_WORLD_SIZE": "1"}, 8),
        (8, 16, {"LOCAL_WORLD_SIZE": "3"}, 2),
        (8, 16, {"LOCAL_WORLD_SIZE": "16"}, 1),
        (8, 16, {"OMP_NUM_THREADS": "1", "ACCELERATE_DYNAMO_BACKEND": "no"}, 8),
        (8, 16, {"OMP_NUM_THREADS": "0"}, 8),
        (8, 16, {"OMP_NUM_THREADS": ""}, 8),
    ],
)
def test_without_a_word_the_threads_are_the_share_of_the_cores(
    prepared, monkeypatch, cores, allowed, said, threads
):
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: None if logical else cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(allowed)), raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert prepared() == [threads]


def test_where_no_affinity_is_known_the_cores_count(prepared, monkeypatch):
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 6)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert prepared() == [6]


@pytest.mark.parametrize(
    "said",
    [
        {"OMP_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "5"},
        {"OMP_NUM_THREADS": "5", "ACCELERATE_DYNAMO_BACKEND": "no"},
        {"OMP_NUM_THREADS": "5", "LOCAL_WORLD_SIZE": "4"},
    ],
)
def test_threads_that_are_asked_for_stay(prepared, monkeypatch, said):
    """PyTorch has read the number when it started."""
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert prepared() == [5]


# -- determinism and memory -----------------------------------------------------------------------


def test_the_cpu_is_deterministic_and_fills_nothing(prepared):
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    prepared()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory is False


def test_malloc_is_told_to_keep_its_memory(prepared, monkeypatch):
    told = []

    class Library:
        def mallopt(self, parameter, value):
            told.append((parameter, value))
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    prepared()
    # <malloc.h>: M_TRIM_THRESHOLD is -1, M_MMAP_THRESHOLD -3; an int is all they take.
    assert sorted(told) == [(-3, HUGE), (-1, HUGE)]


@pytest.mark.parametrize("failure", ["no mallopt", "no library"])
def test_another_c_library_keeps_its_own_way(prepared, monkeypatch, failure):
    def library(name):
        if failure == "no library":
            raise OSError("cannot open")
        return object()

    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(ctypes, "CDLL", library)
    assert len(prepared()) == 1
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc's malloc")
@pytest.mark.parametrize("megabytes", [24, 96])
def test_freed_memory_is_used_again(megabytes):
    """Its pages are there: the kernel is not asked for them once more."""
    code = f"""
import resource, torch
from pipeline import machine
machine.prepare_cpu()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty({megabytes} * 2**18).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(20):  # glibc before 2.38 parts an aligned block from what is left of it first
    faults()
print(sum(faults() for _ in range(10)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 10 * megabytes * 256 / 100  # pages of 4 KB, one in a hundred


# -- precision ------------------------------------------------------------------------------------


def device(monkeypatch, kind):
    """Pretend that the machine has this device; return whether the CPU is used."""
    on_cuda = kind.startswith("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_cuda or "unused" in kind)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: kind == "cuda with bf16"
    )
    avx512, amx = "avx512" in kind, "amx" in kind
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    return kind.startswith("cpu")


NO_BF16 = "precision: bf16 is not in this device's hardware; use auto or fp32"
NO_FP16 = "precision: fp16 needs a CUDA GPU, and none is used here; use auto or fp32"


@pytest.mark.parametrize(
    "kind, auto, bf16, fp16",
    [
        ("cpu", "fp32", NO_BF16, NO_FP16),
        ("cpu avx512", "bf16", "bf16", NO_FP16),
        ("cpu amx", "bf16", "bf16", NO_FP16),
        ("cpu, a GPU unused", "fp32", NO_BF16, NO_FP16),
        ("cuda with bf16", "bf16", "bf16", "fp16"),
        ("cuda", "fp32", NO_BF16, "fp16"),
        ("mps", "fp32", NO_BF16, NO_FP16),
        ("mps, its cpu has amx", "fp32", NO_BF16, NO_FP16),
    ],
)
def test_the_precision_is_what_the_device_has(monkeypatch, kind, auto, bf16, fp16):
    on_cpu = device(monkeypatch, kind)
    for asked, expected in {"auto": auto, "bf16": bf16, "fp16": fp16, "fp32": "fp32"}.items():
        if expected.startswith("precision:"):
            with pytest.raises(InputError) as caught:
                machine.precision(asked, on_cpu=on_cpu)
            assert str(caught.value) == expected
        else:
            assert machine.precision(asked, on_cpu=on_cpu) == expected


# -- compiler and name ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "installed, stated, header, found",
    [
        (["g++"], None, True, True),
        (["clang++"], None, True, True),
        ([], "/opt/my-c++", True, True),
        ([], None, True, False),
        (["g++"], None, False, False),
        ([], "/opt/my-c++", False, False),
    ],
)
def test_compiling_takes_a_compiler_and_pythons_header(
    monkeypatch, tmp_path, installed, stated, header, found
):
    monkeypatch.setattr("shutil.which", lambda name: name if name in installed else None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if stated:
        monkeypatch.setenv("CXX", stated)
    if header:
        (tmp_path / "Python.h").touch()
    assert machine.has_compiler() is found


def compiling(*, compiles=True, device="cpu", rank=0):
    """As much of TrainingArguments as says whether something is compiled for a CPU."""
    return types.SimpleNamespace(
        torch_compile=compiles, device=torch.device(device), local_process_index=rank
    )


@pytest.mark.parametrize(
    ("given", "started"),
    [({}, 1), ({"rank": 1}, 0), ({"compiles": False}, 0), ({"device": "cuda"}, 0)],
)
def test_the_compiler_is_warmed_once_where_it_is_used(monkeypatch, given, started):
    calls, at_exit = [], []
    process = types.SimpleNamespace(kill=lambda: None)
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: calls.append((a, k)) or process)
    monkeypatch.setattr(atexit, "register", at_exit.append)
    machine.warm_compiler(compiling(**given))
    assert len(calls) == started and at_exit == [process.kill] * started
    machine.warm_compiler(compiling(), is_wanted=False)
    assert len(calls) == started
    for (command,), streams in calls:
        assert command[0] == sys.executable and set(streams.values()) == {subprocess.DEVNULL}


@pytest.mark.slow
def test_a_warm_compiler_has_its_headers_precompiled(monkeypatch, tmp_path):
    for name in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    at_exit = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    machine.warm_compiler(compiling())
    process = at_exit[0].__self__
    assert process.wait(timeout=300) == 0
    assert list(tmp_path.rglob("*.gch")) + list(tmp_path.rglob("*.pch"))


def test_a_device_has_a_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert machine.device_name(torch.device("cpu")) == "cpu"
    assert machine.device_name(torch.device("mps")) == "mps"
    assert machine.device_name(torch.device("cuda:3")) == "GPU 3"


def test_the_hardware_is_named():
    found = machine.hardware()
    assert found["processor"] and found["cores"] >= 1 and found["memory_bytes"] > 1e8
    assert platform.system() in found["system"]


@pytest.mark.parametrize(
    ("system", "text", "name"),
    [
        (
            "linux",
            "processor : 0\nmodel name\t: A Processor @ 2 GHz\nstepping : 1\n",
            "A Processor",
        ),
        ("linux", "CPU implementer : 0x41\n", "by platform"),  # as many ARM machines say
        ("darwin", "Apple M3\n", "Apple M3"),
    ],
)
def test_a_processor_s_name_is_its_maker_s(monkeypatch, system, text, name):
    said = subprocess.CompletedProcess([], 0, stdout=text)
    monkeypatch.setattr(machine.sys, "platform", system)
    monkeypatch.setattr(machine.subprocess, "run", lambda *given, **options: said)
    monkeypatch.setattr(machine.Path, "read_text", lambda path: text)
    monkeypatch.setattr(machine.platform, "processor", lambda: "by platform")
    assert machine.hardware()["processor"].startswith(name)
