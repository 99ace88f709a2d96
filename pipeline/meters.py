"""How well a run uses its machine: model FLOPs utilisation and peak memory."""

import contextlib
import functools
import json
import platform
import sys
import time
from pathlib import Path

import psutil
import torch

from pipeline import artifact
from pipeline.devices import product_rates_path, read_product_rates

# Side of the square matrices: large enough for the best rate of a device of that kind, small enough
# to be measured within half a second (two cores 0.2 s in fp32, an H200 0.03 s in bf16).
SIDE = {"cpu": 1024, "cuda": 8192}
PRODUCTS = 15
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Meter:
    """What one run makes of its devices: `world_size` of them, each as fast as this one.

    Attributes:
        flops_per_token: of a training step, see `pipeline.planning`.
        product_rate: FLOP/s of a large matrix product on this device.
    """

    def __init__(
        self, flops_per_token: int, *, precision: str, device: torch.device, world_size: int
    ) -> None:
        """Measure the device."""
        self.flops_per_token, self._device = flops_per_token, device
        self._peak_memory_bytes = 0
        self.product_rate = product_rate(device, precision)
        self._all_devices_rate = self.product_rate * world_size

    def read(self, tokens_per_second: float) -> dict[str, float]:
        """Return mfu, the share of the devices' rate that this one is, and peak_memory_bytes."""
        # Linux counts pages by core and adds up now and then: its peak can come out a page lower.
        peak = max(self._peak_memory_bytes, peak_memory_bytes(self._device))
        self._peak_memory_bytes = peak
        return {
            "mfu": tokens_per_second * self.flops_per_token / self._all_devices_rate,
            "peak_memory_bytes": peak,
        }


def product_rate(device: torch.device, precision: str) -> float:
    """Return FLOP/s of a large matrix product: the best that was ever measured on this machine.

    Each process measures once, and a file remembers: a rate that was measured while the machine
    was busy with something else is corrected by the next process.

    Args:
        precision: fp32, bf16 or fp16.
    """
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    tf32 = precision == "fp32" and torch.backends.cuda.matmul.allow_tf32
    kind = f"{precision}{' by TF32' if tf32 and device.type == 'cuda' else ''}"
    key = f"{platform.node()}, {name}{threads}, {kind}, torch {torch.__version__}"
    return _best(key, product_rates_path(), device, DTYPES[precision])


@functools.cache
def _best(key: str, path: Path, device: torch.device, dtype: torch.dtype) -> float:
    known = read_product_rates()
    before, now = known.get(key), _measured(device, dtype)
    if isinstance(before, float) and before >= now:
        return before
    with contextlib.suppress(OSError):  # a home that cannot be written to
        path.parent.mkdir(parents=True, exist_ok=True)
        artifact.write_whole(path, json.dumps(known | {key: now}, indent=1))
    return now


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that this process has held: allocated on CUDA, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    with contextlib.suppress(OSError):  # getrusage would count who started this process, too
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024  # proc(5): in kB
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, else kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    side = SIDE.get(device.type, 4096)
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type)
    seconds = []
    for _ in range(PRODUCTS + 1):
        started = time.perf_counter()
        one @ other
        if wait:
            wait()
        seconds.append(time.perf_counter() - started)
    if device.type == "cuda":  # what was held for this is not the run's
        del one, other
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * side**3 / min(seconds[1:])  # the others were disturbed
