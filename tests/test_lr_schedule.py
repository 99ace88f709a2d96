"""The learning rate at every step that matters: the first, the peak, the floor, and long after."""

import functools
import math
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from pipeline.lr_schedule import (
    cosine_with_floor,
    cosine_with_restarts,
    linear_with_floor,
    schedule,
    warmup_stable_decay,
)
from pipeline.recipe import InputError, ScheduleSection

NAMES = ["cosine", "linear", "wsd", "cosine_restarts"]
COMMON = {"warmup_steps": 10, "decay_steps": 110, "floor": 0.1}
CURVES = {
    "cosine": functools.partial(cosine_with_floor, **COMMON),
    "linear": functools.partial(linear_with_floor, **COMMON),
    "wsd": functools.partial(warmup_stable_decay, **COMMON, decay_fraction=0.5),
    "cosine_restarts": functools.partial(cosine_with_restarts, **COMMON, cycles=4),
}
QUARTER = 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2  # a cosine from 1 to 0.1 after a quarter of its way


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "step, factor",
    [(0, 1 / 11), (4, 5 / 11), (9, 10 / 11), (10, 1), (110, 0.1), (111, 0.1), (10**9, 0.1)],
)
def test_every_schedule_shares_warm_up_peak_and_floor(name, step, factor):
    assert CURVES[name](step) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize(
    "name, step, factor",
    [
        ("cosine", 35, QUARTER),
        ("cosine", 60, 0.55),
        ("cosine", 85, 1.1 - QUARTER),
        ("cosine", 109, 0.1 + 0.9 * math.sin(math.pi / 200) ** 2),
        ("linear", 35, 0.775),
        ("linear", 60, 0.55),
        ("linear", 109, 0.109),
        ("wsd", 30, 1),
        ("wsd", 55, 1),
        ("wsd", 66, 0.82),
        ("wsd", 109, 0.1 + 0.9 / 55),
        ("cosine_restarts", 22, 0.1 + 0.9 * math.cos(math.pi * 12 / 50) ** 2),
        ("cosine_restarts", 34, 0.1 + 0.9 * math.sin(math.pi / 50) ** 2),
        ("cosine_restarts", 35, 1),
        ("cosine_restarts", 60, 1),
        ("cosine_restarts", 85, 1),
        ("cosine_restarts", 109, 0.1 + 0.9 * math.sin(math.pi / 50) ** 2),
    ],
)
def test_table(name, step, factor):
    assert CURVES[name](step) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("warmup", [0, 1, 10, 49])
def test_after_the_warm_up_it_only_falls(name, floor, warmup):
    section = ScheduleSection(name=name, warmup_steps=warmup, floor=floor)
    factors = [schedule(section, max_steps=50)(step) for step in range(150)]
    up, down = factors[: warmup + 1], factors[warmup:]
    assert up == sorted(up) and up[0] > 0 and up[-1] == 1
    assert down == sorted(down, reverse=True)
    assert set(factors[50:]) == {floor}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_steps", [1, 2, 3, 7])
@pytest.mark.parametrize("warmup", [0, 0.02, 0.4])
def test_the_shortest_runs_stay_between_floor_and_peak(name, max_steps, warmup):
    factor = schedule(ScheduleSection(name=name, warmup_steps=warmup), max_steps=max_steps)
    assert factor(0) > 0
    assert factor(round(warmup * max_steps)) == pytest.approx(1)
    assert all(0 < factor(step) <= 1 for step in range(2 * max_steps))
    assert all(factor(max_steps + more) == 0.1 for more in range(5))


def test_cosine_agrees_with_its_formula():
    factor = schedule(ScheduleSection(warmup_steps=37, floor=0.05), max_steps=1000)
    for step in range(37, 1000):
        angle = math.pi * (step - 37) / 963
        assert factor(step) == pytest.approx(1 - 0.95 * math.sin(angle / 2) ** 2, abs=1e-12)


def test_cosine_agrees_with_transformers_up_to_the_horizon_and_stays_down_beyond():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 0, 100, min_lr_rate=0.1)
    theirs = theirs.lr_lambdas[0]
    ours = schedule(ScheduleSection(warmup_steps=0, floor=0.1), max_steps=100)
    for step in range(101):
        assert ours(step) == pytest.approx(theirs(step), abs=1e-9)
    # Were this to fail, transformers has learnt to stay down and our own cosine could go.
    assert theirs(200) == pytest.approx(1)
    assert ours(200) == 0.1


@pytest.mark.parametrize("decay_fraction, start", [(0.2, 80), (0.5, 50), (1.0, 10), (0.95, 10)])
def test_wsd_leaves_the_peak_after_its_stable_share(decay_fraction, start):
    section = ScheduleSection(name="wsd", warmup_steps=10, decay_fraction=decay_fraction)
    factor = schedule(section, max_steps=100)
    assert [factor(step) for step in range(10, start + 1)] == [1] * (start - 9)
    assert factor(start + 1) == pytest.approx(1 - 0.9 / (100 - start))


@pytest.mark.parametrize("cycles", [1, 2, 5])
def test_restarts_climb_back_once_a_cycle(cycles):
    section = ScheduleSection(name="cosine_restarts", warmup_steps=0, cycles=cycles)
    factor = schedule(section, max_steps=100)
    length = 100 // cycles
    assert [step for step in range(200) if factor(step) == 1] == list(range(0, 100, length))


@pytest.mark.parametrize(
    "warmup, horizon, peak_at, floor_at",
    [
        (0, 1.0, 0, 1000),
        (0.02, 1.0, 20, 1000),
        (0.02, 0.5, 10, 500),  # a fraction of the horizon, not of the run
        (1, 1.0, 1, 1000),  # one update, where 1.0 would be the whole horizon as a fraction
        (20, 1.0, 20, 1000),
        (20, 600, 20, 600),
        (0.1, 2000, 200, 2000),
    ],
)
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_fractions_and_steps(name, warmup, horizon, peak_at, floor_at):
    section = ScheduleSection(name=name, warmup_steps=warmup, horizon_steps=horizon)
    factor = schedule(section, max_steps=1000)
    assert factor(peak_at) == 1
    assert peak_at == 0 or factor(peak_at - 1) < 1
    assert factor(peak_at + 1) < 1
    assert factor(floor_at - 1) > 0.1
    assert factor(floor_at) == 0.1


@pytest.mark.parametrize(
    "warmup, horizon, numbers",
    [(100, 1.0, ("100", "100")), (250, 1.0, ("250", "100")), (70, 0.5, ("70", "50"))],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_warm_up_as_long_as_the_horizon_is_refused(name, warmup, horizon, numbers):
    section = ScheduleSection(name=name, warmup_steps=warmup, horizon_steps=horizon)
    with pytest.raises(InputError) as refusal:
        schedule(section, max_steps=100)
    message = str(refusal.value)
    assert "schedule.warmup_steps" in message
    assert f"to {numbers[0]} updates" in message and f"to {numbers[1]}:" in message


@pytest.mark.parametrize("name", NAMES)
def test_a_schedule_is_a_partial_that_survives_pickling(name):
    factor = schedule(ScheduleSection(name=name), max_steps=100)
    # LambdaLR keeps the attributes of any other callable in the checkpoint and restores them,
    # so that a changed horizon would silently not count.
    assert type(factor) is functools.partial
    copy = pickle.loads(pickle.dumps(factor))
    assert [copy(step) for step in range(120)] == [factor(step) for step in range(120)]


def test_schedule_and_recipe_import_nothing_heavy():
    code = (
        "import sys, pipeline.lr_schedule, pipeline.recipe\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'tokenizers', 'accelerate'}\n"
        "sys.exit(' '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
