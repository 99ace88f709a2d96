"""The rule of the learning-rate finder, on curves whose answer is known."""

import math
import random

import pytest

from pipeline.rate_suggestion import Point, has_diverged, rate_at, smoothed, suggested


def rates(start=1e-6, end=1.0, updates=100):
    return [rate_at(n, start=start, end=end, updates=updates) for n in range(updates)]


def curve(rate, *, falls_at=2e-3, to=5.0, rises_at=0.1):
    """A loss of 7.6 that falls around one rate, half of it there, and rises at another."""
    fallen = 1 / (1 + (falls_at / rate) ** 2)
    return 7.6 - (7.6 - to) * fallen + 6 / (1 + (rises_at / rate) ** 3)


def swept(scatter=0.0, seed=0, of=None, **shape):
    source = random.Random(seed)
    return [Point(rate, curve(rate, **shape) + source.gauss(0, scatter)) for rate in of or rates()]


def test_the_rate_grows_by_equal_factors_and_stays_at_the_end():
    found = rates()
    assert found[0] == 1e-6 and found[-1] == 1.0
    factors = [b / a for a, b in zip(found[:-1], found[1:], strict=True)]
    assert factors == pytest.approx([10 ** (6 / 99)] * 99)
    assert rate_at(100, start=1e-6, end=1.0, updates=100) == 1.0  # the scheduler looks ahead


def test_smoothing_keeps_a_level_and_a_slope_and_does_not_lag():
    level = smoothed([Point(rate, 3.0) for rate in rates()])
    assert level == pytest.approx([3.0] * 100)
    line = smoothed([Point(rate, math.log10(rate)) for rate in rates()])
    assert line[50] == pytest.approx(math.log10(rates()[50]), abs=1e-6)
    spike = [Point(rate, float(n == 40)) for n, rate in enumerate(rates())]
    found = smoothed(spike)
    assert found.index(max(found)) == 40 and found[37] == pytest.approx(found[43])


@pytest.mark.parametrize("falls_at", [1e-4, 2e-3])
def test_the_suggestion_is_where_nine_tenths_of_the_fall_are_made(falls_at):
    """Of 1 / (1 + (a/r)^2) that is at 3 a; smoothing widens the fall a little."""
    found = suggested(swept(falls_at=falls_at, rises_at=1000 * falls_at))
    assert found.why_not is None
    assert found.half == pytest.approx(falls_at, rel=0.15)
    assert found.rate == pytest.approx(3 * falls_at, rel=0.3)
    assert 3 * falls_at < found.lowest < 1000 * falls_at


@pytest.mark.parametrize("updates", [60, 100, 400])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_hangs_neither_on_how_many_updates_nor_on_a_scatter(updates, seed):
    clean = suggested(swept())
    found = suggested(swept(scatter=0.1, seed=seed, of=rates(updates=updates)))
    assert found.rate == pytest.approx(clean.rate, rel=0.5)


@pytest.mark.parametrize(
    ("points", "why_not"),
    [
        (swept(of=rates(end=1e-2)), "no rise"),
        (swept(scatter=0.1, of=rates(1e-7, 1e-5)), "no fall"),
        (swept(of=rates(1e-3, 1.0)), "falls at once"),
        (swept(of=rates(0.1, 10.0)), "no fall"),
        ([Point(1e-6, 7.6)], "no fall"),
    ],
)
def test_a_range_too_narrow_gives_no_rate(points, why_not):
    found = suggested(points)
    assert (found.rate, found.why_not) == (None, why_not)


def test_a_sweep_has_diverged_at_one_and_a_half_times_its_lowest_loss():
    points = swept()
    assert not has_diverged([Point(1e-6, 7.6)])
    assert not has_diverged(points[:70])
    rise = [Point(rate, 5.0 if rate < 1e-2 else 7.6) for rate in rates()]
    assert has_diverged(rise)
    assert not has_diverged([Point(p.rate, min(p.loss, 7.4)) for p in rise])
