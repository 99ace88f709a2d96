"""What a plan counts on: the devices that a person names, or those of a run, at its rates.

No torch: a plan answers before anything is loaded.
"""

import difflib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from pipeline.devices import DEVICES, Device, device_called, is_positive, known_device
from pipeline.recipe import InputError
from pipeline.run_files import METRICS

MOST = 100_000  # devices: what the largest clusters have
MOST_YEARS = 10  # of a budget
YEAR = 365.25 * 86_400  # seconds
UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}  # seconds
_UNIT_NAMES = {
    "sec": "s", "second": "s", "minute": "min", "hr": "h", "hour": "h", "day": "d", "week": "w",
}  # fmt: skip


PRECISIONS = ("fp32", "bf16", "fp16")
LONGEST_SAID = 40  # characters of a damaged value


class Hardware(NamedTuple):
    """Devices of one kind; a CPU is the whole machine."""

    device: Device
    count: int

    @property
    def is_measured(self) -> bool:
        """Whether rates are those of a run; else they are a data sheet's and an assumed share."""
        return self.device.is_measured

    @property
    def title(self) -> str:
        """What a person calls it."""
        return f"{self.count} x {self.device.title}" if self.count > 1 else self.device.title

    def precision(self, asked: str = "auto") -> str:
        """Return fp32, bf16 or fp16: what a run takes here (`pipeline.machine.precision`).

        Raises:
            InputError: the devices lack it, or a run measured them in another.
        """
        has = self.device.flops
        if asked == "auto":
            return "bf16" if "bf16" in has else next(iter(has)) if self.is_measured else "fp32"
        if asked not in has:
            why = "was measured in" if self.is_measured else "multiplies in hardware"
            raise InputError(
                f"precision: {asked} is asked, but {self.device.title} {why} {', '.join(has)} only;"
                " set precision to that, or name other hardware"
            )
        return asked

    def of_step(self, parameters: int, *, is_compiled: bool) -> "Hardware":
        """Return the same at the MFU that is assumed of such a step (`Device.of_step`)."""
        device = self.device.of_step(parameters, is_compiled=is_compiled)
        return self._replace(device=device)

    def rate(self, precision: str = "auto") -> float:
        """Return the FLOP/s of a training step that all devices reach together: rate x MFU.

        Raises:
            InputError: as `precision`.
        """
        device = self.device
        return self.count * device.flops[self.precision(precision)] * device.mfu


def hardware(text: str) -> Hardware:
    """Return the devices that a text names: `cpu`, `h100`, `8xh100`, `h100 x 8`, or a run.

    `cpu` is this machine. A run folder or its metrics.json gives the devices, their number and
    the rates that this run had.

    Raises:
        InputError: the name is not in the table, the number is none, or the run says too little.
    """
    asked = text.strip()
    number, name = None, asked
    if known_device(asked) is None:
        if _is_path(asked):
            return _measured(Path(asked).expanduser())
        if ahead := re.fullmatch(r"([-+]?[\d.,_]+)\s*[x×*]\s*(.+)", asked, re.IGNORECASE):
            number, name = ahead.groups()
        elif behind := re.fullmatch(r"(.+?)\s*[x×*]\s*([-+]?[\d.,_]+)", asked, re.IGNORECASE):
            name, number = behind.groups()
    count = 1 if number is None else _count(number, asked)
    device = known_device(name)
    if device is None:
        names = ["cpu", *DEVICES]
        plain = re.sub(r"[^a-z0-9]", "", name.lower())
        close = difflib.get_close_matches(plain, names, n=3, cutoff=0.55)
        raise InputError(
            f"hardware: {asked!r} is not in the table; "
            + (f"the nearest are {', '.join(close)}" if close else f"known: {', '.join(names)}")
            + " (several: 8xh100), or give the folder of a run for its measured figures"
        )
    if device.kind == "cpu" and number is not None and count > 1:
        raise InputError(
            f"hardware: {asked!r}: cpu is this machine as a whole, so there is one; give cpu"
        )
    return Hardware(device, count)


def budget(text: str) -> tuple[Hardware, float]:
    """Return the devices that a text names and for how many seconds: `8xh100 24h`, `cpu 90min`.

    Raises:
        InputError: it lacks one of them, the time is zero or has no unit, or see `hardware`.
    """
    form = "give devices and a time, as in '8xh100 24h', 'cpu 3h' or '2xa100 90min'"
    found = re.fullmatch(r"(.*\S)[\s,]+([-+]?[\d.]+)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    if found is None:
        raise InputError(f"budget: {text.strip()!r} is not understood; {form}")
    name, number, unit = found.groups()
    unit = unit.lower()
    unit = unit if unit in UNITS else _UNIT_NAMES.get(unit.removesuffix("s"), unit)
    if unit not in UNITS:
        said = f"the unit {unit!r} is not known" if unit else f"{number} has no unit"
        raise InputError(f"budget: {text.strip()!r}: {said}; {form} (units: {', '.join(UNITS)})")
    try:
        seconds = float(number) * UNITS[unit]
    except ValueError:
        raise InputError(f"budget: {text.strip()!r}: {number} is no number; {form}") from None
    if not seconds > 0:
        raise InputError(
            f"budget: {text.strip()!r}: nothing can be trained in {number} {unit}; give a time "
            "above zero"
        )
    if seconds > MOST_YEARS * YEAR:
        raise InputError(
            f"budget: {text.strip()!r}: is longer than {MOST_YEARS} years; give a shorter time"
        )
    return hardware(name.rstrip(" ,")), seconds


def _count(number: str, asked: str) -> int:
    try:
        count = int(number.replace(",", ""))
    except ValueError:
        raise InputError(
            f"hardware: {asked!r}: {number} is no whole number of devices; as in 8xh100"
        ) from None
    if not 0 < count <= MOST:
        raise InputError(
            f"hardware: {asked!r}: {count} devices cannot train; give 1 to {MOST:,}, as in 8xh100"
        )
    return count


def _is_path(text: str) -> bool:
    return os.path.isdir(text) or "/" in text or os.sep in text or text.endswith(".json")


def _measured(path: Path) -> Hardware:
    """Return the devices of a finished run, at the rates that it had."""
    file = path if path.suffix == ".json" else path / METRICS
    where = f"hardware: {path}: "
    remedy = "give the folder of a finished run, or a name of the table, as in 8xh100"
    try:
        have = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{where}there is no {file.name}; {remedy}") from None
    except (OSError, ValueError):
        raise InputError(f"{where}{file.name} cannot be read as JSON; {remedy}") from None
    have = have if isinstance(have, dict) else {}
    wanted = ("world_size", "product_rate_flops", "mfu", "train_tokens_per_second")
    missing = [name for name in (*wanted, "device", "precision") if have.get(name) is None]
    if missing:
        raise InputError(f"{where}{file.name} lacks {', '.join(missing)}; {remedy}")
    machine = {} if have.get("hardware") is None else have["hardware"]
    is_damaged = {name: not is_positive(have[name]) for name in wanted} | {
        "world_size": not _is_whole(have["world_size"], MOST),
        "device": not isinstance(have["device"], str),
        "precision": have["precision"] not in PRECISIONS,
        "threads": have.get("threads") is not None and not _is_whole(have["threads"], MOST),
        "hardware": not isinstance(machine, dict)
        or machine.get("memory_bytes") is not None
        and not is_positive(machine["memory_bytes"]),
    }
    is_damaged["mfu"] = is_damaged["mfu"] or have["mfu"] > 1
    if any(is_damaged.values()):
        name = next(name for name in is_damaged if is_damaged[name])
        said = repr(have[name])
        said = said if len(said) < LONGEST_SAID else said[: LONGEST_SAID - 3] + "..."
        raise InputError(f"{where}{file.name} has {name} {said}, which no run writes; {remedy}")
    name, count = have["device"], have["world_size"]
    of_table = device_called(name)
    memory = machine.get("memory_bytes")
    if name == "cpu":
        threads = have.get("threads") or 1
        each = (memory or psutil.virtual_memory().total) / count  # processes share the machine
        title = f"{machine.get('processor') or 'CPU'}, {threads} thread(s)"
        found = Device("cpu", title, each, {}, 0, "", "cpu", "", threads=threads)
    elif name == "mps":
        found = DEVICES["apple-m1"]._replace(title="Apple GPU")
        found = found._replace(memory_bytes=memory or found.memory_bytes)
    elif of_table is not None:
        found = of_table
    else:
        raise InputError(
            f"{where}its device, {name}, is not in the table, so its memory is not known; {remedy}"
        )
    rate, mfu = float(have["product_rate_flops"]), float(have["mfu"])
    run = f"measured by the run {file.resolve().parent.name}"
    source = f"products at {rate / 1e12:.3g} TFLOP/s in {have['precision']}, {run}"
    speed = f"{have['train_tokens_per_second']:,.0f} tokens/s on {count} process(es), {run}"
    return Hardware(
        found._replace(
            flops={have["precision"]: rate}, source=source, mfu=mfu, mfu_source=speed,
            mfu_by_size=(), is_measured=True,
        ),
        count,
    )  # fmt: skip


def _is_whole(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most
