"""Curves as text: where what stands, in braille and in ASCII."""

import math

import pytest

from pipeline.terminal_curve import can_show, drawn

CURVE = [min(1.0, (n + 1) / 11) * (1 - n / 100) for n in range(100)]


def dots(line: str) -> list[int]:
    """Return the columns of a line in which something is drawn."""
    picture = line[line.index("│") + 1 :]
    return [n for n, sign in enumerate(picture) if sign != " "]


def test_a_curve_has_the_shape_of_its_values():
    lines = drawn(CURVE, width=50, height=8).splitlines()
    assert len(lines) == 9 and lines[0].startswith("0.9 │") and lines[7].startswith("  0 │")
    assert lines[8] == "    └" + "─" * 50
    assert all(dots(line) for line in lines[:8])
    assert min(dots(lines[0])) in (4, 5)  # the peak, at a tenth
    assert max(dots(lines[7])) == 49 and max(dots(lines[3])) < max(dots(lines[6]))
    assert max(map(len, lines)) <= 57


def test_where_the_screen_has_no_braille_it_is_ascii():
    text = drawn(CURVE, marks=[(0.1, "peak")], encoding="ascii", width=50)
    assert text.isascii() and text.count("*") > 40
    assert text.splitlines()[-1] == "     " + " " * 5 + "^ peak"
    assert text.splitlines()[8] == "    +" + "-" * 50
    for encoding in ("latin-1", "cp1252", None, "no such encoding"):
        assert drawn(CURVE, marks=[(0.1, "peak")], encoding=encoding, width=50) == text
    assert can_show("é", "latin-1") and not can_show("é", "ascii")


def test_marks_do_not_overlap_and_stay_within_the_width():
    marks = [(0.0, "begins here"), (0.05, "peak 0.01 at update 50"), (1.0, "floor 0 from 1,400")]
    lines = drawn(CURVE, marks=marks, width=60).splitlines()[9:]
    assert lines == [
        "     ↑ begins here                           floor 0 from 1,400 ↑",
        "        ↑ peak 0.01 at update 50",
    ]
    assert max(map(len, lines)) == 5 + 60


@pytest.mark.parametrize("values", [[0.0], [3.0], [1.0, 1.0], [0.0, 0.0], [-1.0, 1.0], [1e-300]])
def test_edges(values):
    lines = drawn(values, width=10, height=4).splitlines()
    assert len(lines) == 5 and any(dots(line) for line in lines[:4])
    assert all(math.isfinite(float(lines[n].split("│")[0])) for n in (0, 3))
