"""The devices that a run can be planned on: by name with makers' figures, and this machine."""

import json
import math
import os
import platform
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from pipeline.footprint import WATTS_PER_CORE, WATTS_PER_GB, board_watts

# Shares of a device's dense rate that a compiled bf16 step of GPT-2 reaches.
# The quickstart on two Zen 4 cores, 1,400 updates; larger ones reach more, 0.65 at 4 x 192 and 0.74
# at 124M (tests/benchmarks/README.md), so that a plan's time is rather too long.
CPU_MFU = 0.39
A100_MFU = 0.39  # 124M, compiled PyTorch with fused attention: S. Raschka's ladder of speed-ups
H100_MFU = 0.40  # 124M: 40.5 % by llm.c (modded-nanogpt, record 1); 1558M: 49 %
OTHER_MFU = 0.35  # an assumption, a little below the A100's; no figure of GPT-2 was found
APPLE_MFU = 0.20  # an assumption: eager, without fused attention
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
    watts: float
    """Of its whole board at most."""
    mfu: float
    """The share of `flops` that a compiled training step reaches: assumed, unless measured."""
    kind: str
    """cpu, cuda or mps."""
    source: str
    is_measured: bool = False
    """Whether `flops` and `mfu` are a run's."""


def _nvidia(
    name: str, title: str, gigabytes: float, fp32: float, half: float, mfu: float, source: str
) -> Device:
    """Return a GPU from teraFLOP/s of its data sheet; those before Ampere have fp16 and no bf16."""
    names = ("fp16",) if name.startswith(("v100", "t4")) else ("bf16", "fp16")
    flops = {"fp32": fp32 * 1e12} | dict.fromkeys(names, half * 1e12)
    title = f"NVIDIA {title}"
    watts = float(board_watts(title)[0])
    return Device(name, title, gigabytes * 1e9, flops, watts, mfu, "cuda", source)


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
        _nvidia("h200", "H200 SXM, 141 GB", 141, 67, 1979 / 2, H100_MFU, "NVIDIA H200 data sheet"),
        _nvidia(
            "b200", "B200, 180 GB", 180, 600 / 8, 36000 / 16, OTHER_MFU,
            "NVIDIA HGX B200 data sheet, an eighth of it",
        ),
        Device(
            "apple-m1", "Apple M1, 8 GPU cores, 16 GB", 16e9, {"fp32": 2.6e12}, 39, APPLE_MFU,
            "mps", "Apple's announcement of the M1 (2020); watts of a whole Mac mini at most",
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
    flops, source = {}, f"{number} core(s) of this machine; MFU as of the quickstart on two"
    for precision, each in CORE_FLOPS.items():
        if precision == "bf16" and not _has_bf16():
            continue
        found = _best_rate(precision, number)
        flops[precision] = found or number * each
        how = "measured by a run here" if found else f"assumed, {each / 1e9:g} GFLOP/s a core"
        source += f"; {precision} {how}"
    watts = number * WATTS_PER_CORE + memory / 1e9 * WATTS_PER_GB
    return Device(
        "cpu", f"this machine, {number} core(s)", memory, flops, watts, CPU_MFU, "cpu", source
    )


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
    return is_number and math.isfinite(value) and value > 0
