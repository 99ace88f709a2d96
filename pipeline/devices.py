"""The devices that a run can be planned on: by name with makers' figures, and this machine."""

import json
import os
import platform
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from pipeline.interpolation import between

# Shares of a device's dense rate that a compiled bf16 step of GPT-2 reaches, and their sources.
# Of two Zen 4 cores, by parameters (tests/benchmarks/README.md): the quickstart's run, 1,400
# updates by Muon; then steps by AdamW of 4 x 192 (16 x 128 tokens), 6 x 384 (8 x 256) and GPT-2
# small (2 x 512), there with 512 positions.
CPU_MFU = (
    (1_071_872, 0.39), (2_590_848, 0.649), (12_318_720, 0.692), (124_046_592, 0.744),
)  # fmt: skip
CPU_MFU_SOURCE = (
    "by size, between those measured on two Zen 4 cores: the quickstart 39 %; by AdamW 4 x 192 "
    "64.9 %, 6 x 384 69.2 %, 124M 74.4 % (tests/benchmarks/README.md)"
)
GPU_MFU_AT = 124_439_808  # parameters of the models that those of GPUs are of
A100_MFU = 0.39, "124M, compiled PyTorch, as in S. Raschka's ladder of speed-ups"
H100_MFU = 0.40, "llm.c on 8 x H100, 124M 40.5 % and 1558M 49 %"
H200_MFU = 0.40, "the H100's: llm.c on 8 of them, 124M 40.5 % and 1558M 49 %"
OTHER_MFU = 0.35, "an assumption, a little below the A100's"  # no figure of GPT-2 was found
APPLE_MFU = 0.20, "an assumption"  # eager, without fused attention
# What is left of it where `training.torch_compile` is off, by kind (an Apple GPU's is eager).
UNCOMPILED = {
    # Compilation alone is worth 1.18 there (tests/benchmarks/README.md, the levers).
    "cpu": (0.85, "4 x 192 on two Zen 4 cores"),
    # 91,901 of 112,046 tokens/s, step 8 (rasbt/LLMs-from-scratch, ch05/10_llm-training-speed).
    "cuda": (0.82, "124M on an A100, S. Raschka's ladder"),
}
# FLOP/s of a core's large products where this machine's were never measured: those of one Zen 4
# core here (AVX-512), an assumption for any other.
CORE_FLOPS = {"fp32": 100e9, "bf16": 220e9}


class Device(NamedTuple):
    """A device of a kind, and how its figures are known."""

    name: str
    title: str
    memory_bytes: float
    """As the maker writes it, in powers of ten."""
    flops: dict[str, float]
    """FLOP/s of dense products by precision (fp32 without TF32); those that it has in hardware."""
    mfu: float
    """The share of `flops` that a compiled training step reaches: assumed, unless measured."""
    mfu_source: str
    kind: str
    """cpu, cuda or mps."""
    source: str
    """Of `flops`."""
    mfu_by_size: tuple[tuple[int, float], ...] = ()
    """Parameters of the models that an assumed share is of, rising, and their shares; empty where
    it is measured or stated."""
    threads: int = 1
    """Cores that each process keeps busy."""
    is_measured: bool = False
    """Whether `flops` and `mfu` are a run's."""

    def of_step(self, parameters: int, *, is_compiled: bool) -> "Device":
        """Return the device at the share that a step of so many parameters is assumed to reach.

        Between the sizes that are known (`interpolation.between`); not compiled, `UNCOMPILED` of
        it.
        """
        if not self.mfu_by_size:
            return self
        share = between(self.mfu_by_size, parameters)
        left = 1.0 if is_compiled or self.kind not in UNCOMPILED else UNCOMPILED[self.kind][0]
        return self._replace(mfu=share * left)


def _nvidia(
    name: str, title: str, gigabytes: float, fp32: float, half: float, mfu: tuple[float, str],
    source: str,
) -> Device:  # fmt: skip
    """Return a GPU from teraFLOP/s of its data sheet; those before Ampere have fp16 and no bf16."""
    names = ("fp16",) if name.startswith(("v100", "t4")) else ("bf16", "fp16")
    flops = {"fp32": fp32 * 1e12} | dict.fromkeys(names, half * 1e12)
    by_size = ((GPU_MFU_AT, mfu[0]),)
    return Device(
        name, f"NVIDIA {title}", gigabytes * 1e9, flops, *mfu, "cuda", source, by_size
    )  # fmt: skip


# Makers' data sheets. Where one gives tensor rates with sparsity, half of them: no weight of ours
# is sparse.
DEVICES = {
    device.name: device
    for device in (
        _nvidia("v100", "V100 SXM2, 16 GB", 16, 15.7, 125, OTHER_MFU, "NVIDIA V100 data sheet"),
        _nvidia(
            "v100-32gb", "V100 SXM2, 32 GB", 32, 15.7, 125, OTHER_MFU, "NVIDIA V100 data sheet"
        ),
        _nvidia("t4", "T4, 16 GB", 16, 8.1, 65, OTHER_MFU, "NVIDIA T4 data sheet"),
        _nvidia("l4", "L4, 24 GB", 24, 30.3, 242 / 2, OTHER_MFU, "NVIDIA L4 data sheet"),
        _nvidia("a10", "A10, 24 GB", 24, 31.2, 125, OTHER_MFU, "NVIDIA A10 data sheet"),
        _nvidia(
            "a6000", "RTX A6000, 48 GB", 48, 38.7, 309.7 / 2, OTHER_MFU,
            "NVIDIA RTX A6000 data sheet",
        ),
        _nvidia("l40s", "L40S, 48 GB", 48, 91.6, 362, OTHER_MFU, "NVIDIA L40S data sheet"),
        _nvidia(
            "rtx4090", "GeForce RTX 4090, 24 GB", 24, 82.6, 165.2, OTHER_MFU,
            "NVIDIA Ada white paper, appendix A, products added up in fp32",
        ),
        _nvidia("a100", "A100 SXM4, 80 GB", 80, 19.5, 312, A100_MFU, "NVIDIA A100 data sheet"),
        _nvidia("a100-40gb", "A100 SXM4, 40 GB", 40, 19.5, 312, A100_MFU, "NVIDIA A100 data sheet"),
        _nvidia("h100", "H100 SXM, 80 GB", 80, 67, 1979 / 2, H100_MFU, "NVIDIA H100 data sheet"),
        _nvidia(
            "h100-pcie", "H100 PCIe, 80 GB", 80, 51, 1513 / 2, H100_MFU, "NVIDIA H100 data sheet"
        ),
        _nvidia("h200", "H200 SXM, 141 GB", 141, 67, 1979 / 2, H200_MFU, "NVIDIA H200 data sheet"),
        _nvidia(
            "b200", "B200, 180 GB", 180, 600 / 8, 36000 / 16, OTHER_MFU,
            "NVIDIA HGX B200 data sheet, an eighth of it",
        ),
        Device(
            "apple-m1", "Apple M1, 8 GPU cores, 16 GB", 16e9, {"fp32": 2.6e12},
            *APPLE_MFU, "mps", "Apple's announcement of the M1 (2020)",
            ((GPU_MFU_AT, APPLE_MFU[0]),),
        ),
    )
}  # fmt: skip
# Other ways to write a name, without blanks and signs.
_ALSO = {
    "a10080gb": "a100", "4090": "rtx4090", "geforcertx4090": "rtx4090", "rtxa6000": "a6000",
    "h100sxm": "h100", "h10080gb": "h100", "v10016gb": "v100", "h200sxm": "h200",
    "apple": "apple-m1", "m1": "apple-m1", "mps": "apple-m1",
}  # fmt: skip


def known_device(name: str) -> Device | None:
    """Return the device of that name, however it is written; `cpu` is this machine."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("nvidia")
    if plain == "cpu":
        return this_machine()
    by_plain_name = {known.replace("-", ""): known for known in DEVICES}
    return DEVICES.get(_ALSO.get(plain) or by_plain_name.get(plain, ""))


def device_called(name: str) -> Device | None:
    """Return the device of the table that CUDA calls so, "NVIDIA A100-SXM4-40GB" for one."""
    words = set(re.split(r"[\s-]+", name.upper()))
    for device in reversed(DEVICES.values()):  # of two with the same chip the special one first
        chip, *special = device.name.upper().removeprefix("RTX").split("-")
        if {chip, *special} <= words:
            return device
    return None


def this_machine() -> Device:
    """Return this machine's processor: its rates as runs here have measured them, else assumed."""
    number, memory = cores(), psutil.virtual_memory().total
    flops, source = {}, f"{number} core(s) of this machine"
    for precision, each in CORE_FLOPS.items():
        if precision == "bf16" and not _has_bf16():
            continue
        found = _best_rate(precision, number)
        flops[precision] = found or number * each
        how = "measured by a run here" if found else f"assumed, {each / 1e9:g} GFLOP/s a core"
        source += f"; {precision} {how}"
    return Device(
        "cpu", f"this machine, {number} core(s)", memory, flops, CPU_MFU[0][1], CPU_MFU_SOURCE,
        "cpu", source, CPU_MFU, number,
    )  # fmt: skip


def _best_rate(precision: str, threads: int) -> float | None:
    """Return FLOP/s as remembered of this machine, with as many threads if there is such a one."""
    pattern = re.compile(
        rf"{re.escape(platform.node())}, cpu, (\d+) threads, {precision}, torch .*"
    )
    found = [
        (int(key[1]) == threads, rate)
        for text, rate in read_product_rates().items()
        if (key := pattern.fullmatch(text)) and is_positive(rate)
    ]
    return max(found)[1] if found else None


def _has_bf16() -> bool:
    """Tell whether the processor multiplies bf16 itself, as `pipeline.machine.has_bf16` asks."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split("flags")[1].split("\n")[0].split()
    except (OSError, IndexError):
        return False
    return "avx512_bf16" in flags or "amx_tile" in flags


def cores() -> int:
    """Return the physical cores that this process may use."""
    found = psutil.cpu_count(logical=False) or 1
    if hasattr(os, "sched_getaffinity"):  # a container or taskset may allow fewer
        found = min(found, len(os.sched_getaffinity(0)))
    return max(1, found)


def product_rates_path() -> Path:
    """Return the file that remembers measured rates; deleting it measures them again."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache.startswith("~"):  # a user without a home
        cache = tempfile.gettempdir()
    return Path(cache) / "gpt2-pretraining-pipeline" / "product_rates.json"


def read_product_rates() -> dict[str, Any]:
    """Return what that file holds, nothing if it cannot be read."""
    try:
        found = json.loads(product_rates_path().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_positive(value: Any) -> bool:
    """Tell whether a value read from a file is a finite number above zero."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value <= sys.float_info.max
