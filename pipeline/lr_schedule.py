"""The learning rate as a pure function of the step: the fraction of the peak at each update.

Every function counts the first update as step 0, warms up linearly to 1 at `warmup_steps` without
ever being 0, reaches `floor` at `decay_steps` and stays there for ever. That last part is why they
exist: `cosine_with_min_lr` of transformers climbs back to the peak after its horizon.
"""

import functools
import math
from collections.abc import Callable

from pipeline.recipe import InputError
from pipeline.sections import ScheduleSection


def cosine_with_floor(step: int, *, warmup_steps: int, decay_steps: int, floor: float) -> float:
    """Return half a cosine from 1 down to `floor` (Loshchilov & Hutter 2017; GPT-3's schedule)."""
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    if step >= decay_steps:
        return floor
    return _cosine((step - warmup_steps) / (decay_steps - warmup_steps), floor)


def linear_with_floor(step: int, *, warmup_steps: int, decay_steps: int, floor: float) -> float:
    """Return a straight line from 1 down to `floor`."""
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    if step >= decay_steps:
        return floor
    return 1 - (1 - floor) * (step - warmup_steps) / (decay_steps - warmup_steps)


def warmup_stable_decay(
    step: int, *, warmup_steps: int, decay_steps: int, floor: float, decay_fraction: float
) -> float:
    """Return 1 until the last `decay_fraction` of the horizon, then a line (Hu et al. 2024)."""
    start = max(warmup_steps, round(decay_steps * (1 - decay_fraction)))
    if warmup_steps <= step < start:
        return 1.0
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    return linear_with_floor(step, warmup_steps=start, decay_steps=decay_steps, floor=floor)


def cosine_with_restarts(
    step: int, *, warmup_steps: int, decay_steps: int, floor: float, cycles: int
) -> float:
    """Return `cycles` cosines of equal length, each from 1 to `floor` (SGDR, without growth)."""
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    if step >= decay_steps:
        return floor
    progress = cycles * (step - warmup_steps) / (decay_steps - warmup_steps)
    return _cosine(progress % 1, floor)


def schedule(section: ScheduleSection, *, max_steps: int) -> Callable[[int], float]:
    """Return the recipe's schedule for a run of `max_steps` updates.

    With `past_updates` it is the end of the schedule of a run that many updates longer. A
    `functools.partial` of a function: what a checkpoint restores into it is nothing, so that a
    changed horizon counts.

    Raises:
        InputError: the warm-up is not shorter than the horizon.
    """
    warmup_steps, decay_steps = _bounds(section, max_steps)
    if warmup_steps >= decay_steps:
        raise InputError(
            f"schedule.warmup_steps comes to {warmup_steps} updates and the horizon to "
            f"{decay_steps}: the warm-up must be the shorter"
        )
    common = {"warmup_steps": warmup_steps, "decay_steps": decay_steps, "floor": section.floor}
    curve, own = {
        "cosine": (cosine_with_floor, {}),
        "linear": (linear_with_floor, {}),
        "wsd": (warmup_stable_decay, {"decay_fraction": section.decay_fraction}),
        "cosine_restarts": (cosine_with_restarts, {"cycles": section.cycles}),
    }[section.name]
    curve = functools.partial(curve, **common, **own)
    return functools.partial(_later, curve, section.past_updates) if section.past_updates else curve


def warmup_left(section: ScheduleSection, *, max_steps: int) -> int:
    """Return how many of a run's `max_steps` updates belong to the warm-up."""
    return max(0, _bounds(section, max_steps)[0] - section.past_updates)


def _bounds(section: ScheduleSection, max_steps: int) -> tuple[int, int]:
    whole = section.past_updates + max_steps
    decay_steps = _steps(section.horizon_steps, whole, whole_is_a_fraction=True)
    return _steps(section.warmup_steps, decay_steps, whole_is_a_fraction=False), decay_steps


def _later(curve: Callable[[int], float], past: int, step: int) -> float:
    return curve(past + step)


def _steps(value: float, whole: int, *, whole_is_a_fraction: bool) -> int:
    is_fraction = value <= 1 if whole_is_a_fraction else value < 1
    return round(value * whole) if is_fraction else round(value)


def _warmup(step: int, warmup_steps: int) -> float:
    return (step + 1) / (warmup_steps + 1)  # never 0: the first update must count


def _cosine(progress: float, floor: float) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
