"""How well a run uses its machine: model FLOPs utilisation and peak memory."""

import contextlib
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch

from pipeline import artifact

# Side of the square matrices: large enough for the best rate of a device of that kind, small enough
# to be measured within half a second (two cores 0.4 s, an H200 0.01 s).
SIDE = {"cpu": 2048, "cuda": 8192}
PRODUCTS = 7
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def flops_per_token(*, parameters: int, layers: int, width: int, block_size: int) -> int:
    """Return the floating-point operations of a training step per token: 6N + 12 L C T.

    Each weight multiplies and adds once forwards and twice backwards (Kaplan et al. 2020); queries
    meet keys, and probabilities values, over the whole block as PaLM counts it (Chowdhery et al.
    2022, appendix B), though half of it is above the diagonal and need not be computed.
    """
    return 6 * parameters + 12 * layers * width * block_size


def product_rate(device: torch.device, precision: str) -> float:
    """Return FLOP/s of a large matrix product, measured once per machine and then remembered.

    Args:
        precision: fp32, bf16 or fp16.
    """
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    key = f"{platform.node()}, {name}{threads}, {precision}, torch {torch.__version__}"
    path = memory_path()
    known: dict[str, float] = {}
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        known = found if isinstance(found, dict) else {}
    if not isinstance(known.get(key), float):
        known[key] = _measured(device, DTYPES[precision])
        with contextlib.suppress(OSError):  # a home that cannot be written to: measured each time
            path.parent.mkdir(parents=True, exist_ok=True)
            artifact.write_whole(path, json.dumps(known, indent=1))
    return known[key]


def memory_path() -> Path:
    """Return the file that remembers measured rates; deleting it measures them again."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache.startswith("~"):  # a user without a home
        cache = tempfile.gettempdir()
    return Path(cache) / "gpt2-pretraining-pipeline" / "product_rates.json"


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that this process has held: on a GPU of the device, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, else kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    side = SIDE.get(device.type, 4096)
    one, other = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type)
    seconds = []
    for _ in range(PRODUCTS + 1):
        started = time.perf_counter()
        one @ other
        if wait:
            wait()
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / min(seconds[1:])  # the others were disturbed
