"""What the machine has, and how it is set up for training: precision, threads, memory, compiler."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from pipeline.devices import cores
from pipeline.recipe import InputError

if TYPE_CHECKING:
    from transformers import TrainingArguments

# glibc's malloc gives a block of 128 KB to 32 MB and more back to the kernel as soon as it is free,
# and the next update pays for every page again: 1.36 times a stock step of GPT-2 small on two
# cores. Numbers of the two parameters: <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
_HIGHEST_BEFORE_2_35 = 32 * 2**20  # glibc refuses a higher threshold, HEAP_MAX_SIZE / 2


def prepare_cpu() -> None:
    """Set threads, determinism and memory for training on the CPU."""
    torch.set_num_threads(_threads())
    # Compiled GPT-2 on two threads otherwise adds embedding gradients in changing order.
    torch.use_deterministic_algorithms(True)
    # Filling every new tensor with NaN, to expose reads of it, costs a fifth of a small step.
    torch.utils.deterministic.fill_uninitialized_memory = False
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        if not mallopt(_M_MMAP_THRESHOLD, _NEVER):
            mallopt(_M_MMAP_THRESHOLD, _HIGHEST_BEFORE_2_35)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)


def device_name(device: torch.device) -> str:
    """Return what a person calls the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def hardware() -> dict[str, str | int]:
    """Return processor, cores (physical ones), memory_bytes and system of this machine."""
    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
    }


def has_bf16(device_type: str) -> bool:
    """Tell whether the device multiplies bf16 itself: emulated products are slower than fp32."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False  # MPS: it depends on the macOS version


def precision(asked: str, *, on_cpu: bool) -> str:
    """Return fp32, bf16 or fp16 for the device at hand.

    auto is bf16 where the hardware multiplies it: 1.7 to 1.9 times as fast as fp32 on two cores at
    4 x 128, with heads of 8 as with heads of 64.

    Raises:
        InputError: its hardware lacks what is asked.
    """
    cuda = torch.cuda.is_available() and not on_cpu
    can = has_bf16("cuda" if cuda else "cpu" if on_cpu else "mps")
    if asked == "auto":
        return "bf16" if can else "fp32"
    if asked == "bf16" and not can:
        raise InputError("precision: bf16 is not in this device's hardware; use auto or fp32")
    if asked == "fp16" and not cuda:
        raise InputError(
            "precision: fp16 needs a CUDA GPU, and none is used here; use auto or fp32"
        )
    return asked


def warm_compiler(arguments: TrainingArguments, *, is_wanted: bool = True) -> None:
    """Let another process prepare what compiling for a CPU needs, while the text is prepared.

    Precompiled headers and tests of the processor, which PyTorch keeps in its cache on disk: 7 of
    53 seconds of a first compilation here. Nothing where nothing is compiled for a CPU, or it is
    not wanted: beside a dry run, which compiles nothing, it would only slow down what is timed.
    """
    is_needed = is_wanted and arguments.torch_compile and arguments.device.type == "cpu"
    if not is_needed or arguments.local_process_index:  # one for a machine
        return
    code = "import torch; torch.compile(torch.sin)(torch.ones(64))"
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    process = subprocess.Popen([sys.executable, "-P", "-c", code], **quiet)
    atexit.register(process.kill)


def has_compiler() -> bool:
    """Tell whether torch.compile can build programs for a CPU."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return bool(compiler) and Path(sysconfig.get_path("include"), "Python.h").exists()


def _processor() -> str:
    """Return the processor's name as its maker gives it, where the system tells it."""
    with contextlib.suppress(OSError, IndexError, subprocess.SubprocessError):
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
            return said.stdout.strip()
        text = Path("/proc/cpuinfo").read_text()
        return text.split("model name")[1].split("\n")[0].strip("\t :")  # not on every ARM
    return platform.processor() or platform.machine()


def _threads() -> int:
    """Return the threads of this process: what OMP_NUM_THREADS says, else its share of the cores.

    `accelerate launch` without a config sets OMP_NUM_THREADS to 1, which nobody has asked for.
    """
    said = os.environ.get("OMP_NUM_THREADS", "").strip()  # or a list, which torch has read
    by_launcher = said == "1" and "ACCELERATE_DYNAMO_BACKEND" in os.environ
    if said not in ("", "0") and not by_launcher:
        return torch.get_num_threads()
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def free_memory(device: torch.device) -> int:
    """Return the bytes that a run can still take on its device, those that it holds left out.

    Of a CPU it is the host's memory, or what its control group is allowed, if that is less; swap
    does not count.
    """
    if device.type == "cuda":
        # What this process's allocator has reserved and does not use is the run's as well.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    for folder, limit, usage, cached in _CONTROL_GROUPS:
        with contextlib.suppress(OSError, ValueError, IndexError):  # no such group, or "max"
            stat = (folder / "memory.stat").read_text().split()
            held = int((folder / usage).read_text()) - int(stat[stat.index(cached) + 1])
            free = min(free, int((folder / limit).read_text()) - held)
    return max(0, free)


def held_memory(device: torch.device) -> int:
    """Return the bytes that this process holds: allocated on CUDA, else resident."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


# Where Linux says what a container may take and what it holds, and of that, what is only a file's
# pages and given back when they are needed: versions 2 and 1 (kernel documentation, cgroup-v2).
_CONTROL_GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (
        Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)  # fmt: skip
