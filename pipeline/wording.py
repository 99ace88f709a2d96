"""Numbers as a person reads them: counts, times, and what is not known."""

import datetime
import math
import textwrap
from typing import Any

NOTHING = "\N{EM DASH}"


AMOUNT = "amount"  # a form: five digits, and from a hundred thousand on three and a unit


def finite(value: Any) -> bool:
    """Tell whether a value is a number that can be shown."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer beyond what a float holds
        return False


def written(value: Any, form: str) -> str:
    """Return a number in its form, a dash where there is none."""
    if not finite(value):
        return NOTHING
    if form == AMOUNT:
        return short(value) if value >= 1e5 else format(value, ",.5g")
    return format(value, form)


def short(value: float) -> str:
    """Return a count in three digits: 614 k, 1.07 M."""
    units = ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k"), (1, ""))
    fitting = (one for one in units if value >= 0.9995 * one[0])  # what rounds to 1,000 k is 1 M
    size, unit = next(fitting, units[-1])
    return f"{value / size:.3g}{unit}"


def duration(seconds: float) -> str:
    """Return a time as a person says it: 0.3 s, 37 s, 12 min 3 s, 3 h 12 min, 2 d 4 h."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    units = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))
    large = next(number for number, (size, _) in enumerate(units) if seconds >= size)
    (size, unit), (small, small_unit) = units[large], units[large + 1]
    rest = int(seconds % size // small)
    return f"{int(seconds // size):,} {unit}" + (f" {rest} {small_unit}" if rest else "")


def storage(size: float) -> str:
    """Return bytes in three digits: 512 MB, 1.49 GB."""
    units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
    large, unit = next((u for u in units if size >= 0.9995 * u[0]), units[-1])
    return f"{size / large:#.3g}".rstrip(".") + f" {unit}"


def pasted(command: str, width: int) -> list[str]:
    """Return a command over as many lines as it takes, each but the last ending in a backslash."""
    lines = textwrap.wrap(
        command, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def finishing(seconds: float, now: datetime.datetime | None = None) -> str:
    """Return when something ends that takes so long from now on, in local time."""
    try:
        end = (now or datetime.datetime.now()) + datetime.timedelta(seconds=seconds)
    except OverflowError:
        return f"after the year {datetime.MAXYEAR}"
    return f"{end:%Y-%m-%d %H:%M}"
