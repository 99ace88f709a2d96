"""Counts and times in words, by table."""

import datetime
import math

import pytest

from pipeline.wording import NOTHING, duration, finishing, short, storage, written


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0.0 s"), (0.31, "0.3 s"), (37.4, "37 s"), (60, "1 min"), (723, "12 min 3 s"),
        (3600, "1 h"), (11_520, "3 h 12 min"), (187_300, "2 d 4 h"), (8.64e8, "10,000 d"),
    ],
)  # fmt: skip
def test_durations(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (0.5, "0.5"), (999, "999"), (999.7, "1 k"), (1000, "1 k"), (614_400, "614 k"),
     (999_800, "1 M"), (1_071_872, "1.07 M"), (1e10, "10 B"), (2.5e15, "2.5e+03 T")],
)  # fmt: skip
def test_counts(value, said):
    assert short(value) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(1234.5, "1,234.50"), (0, "0.00"), (None, NOTHING), (math.nan, NOTHING), (math.inf, NOTHING),
     (10**400, NOTHING)],
)  # fmt: skip
def test_what_is_no_number_is_a_dash(value, said):
    assert written(value, ",.2f") == said


@pytest.mark.parametrize(
    ("size", "said"),
    [(0, "0.00 B"), (512, "512 B"), (999_600, "1.00 MB"), (1.494e9, "1.49 GB"), (2e12, "2.00 TB")],
)
def test_bytes(size, said):
    assert storage(size) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(90, "2026-01-01 00:01"), (8e10, "4561-02-05 22:13"), (1e12, "after the year 9999"),
     (1e300, "after the year 9999")],
)  # fmt: skip
def test_an_end(seconds, said):
    assert finishing(seconds, datetime.datetime(2026, 1, 1)) == said
