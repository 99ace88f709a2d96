"""A curve as text: in braille, which has eight dots a character, or in ASCII where that is all."""

from collections.abc import Sequence

WIDTH, HEIGHT = 60, 8
# Unicode's braille patterns: the bit of each dot, [row][column] of a character's 4 x 2.
BRAILLE = 0x2800
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def can_show(text: str, encoding: str | None) -> bool:
    """Tell whether a screen of this encoding has all the characters of a text."""
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def drawn(
    values: Sequence[float],
    *,
    marks: Sequence[tuple[float, str]] = (),
    encoding: str | None = "utf-8",
    width: int = WIDTH,
    height: int = HEIGHT,
    form: str = ".3g",
) -> str:
    """Return a curve through values at even distances, with axes, in `height` + 1 lines and more.

    The vertical axis begins at zero, or below if values do.

    Args:
        values: at least one; finite.
        marks: (place from 0 to 1, what is there), pointed out below the horizontal axis.
        encoding: of the screen.
        width: of the curve in characters; labels of the axis stand on its left.
        form: how a value is written.
    """
    is_braille = can_show("\u28ff\u2502\u2514\u2500\u2191", encoding)
    across, down = (2, 4) if is_braille else (1, 1)
    top, bottom = max(*values, 0.0), min(*values, 0.0)
    if top == bottom:
        top = bottom + 1
    columns, rows = width * across, height * down
    heights = []
    for column in range(columns):
        place = column * (len(values) - 1) / max(1, columns - 1)
        before = min(int(place), len(values) - 1)
        after, share = min(before + 1, len(values) - 1), place - before
        value = values[before] * (1 - share) + values[after] * share
        heights.append(round((top - value) / (top - bottom) * (rows - 1)))
    dots = [[False] * columns for _ in range(rows)]
    for column, row in enumerate(heights):
        last = heights[max(0, column - 1)]
        # A leap is drawn as a line that belongs to the column it ends in.
        for between in range(min(row, last + (row > last)), max(row, last - (row < last)) + 1):
            dots[between][column] = True
    pictured = _braille(dots) if is_braille else ["".join(" *"[d] for d in row) for row in dots]
    labels = {0: format(top, form), height - 1: format(bottom, form)}
    margin = max(map(len, labels.values()))
    upright, corner, dash, arrow = "\u2502\u2514\u2500\u2191" if is_braille else "|+-^"
    lines = [
        f"{labels.get(n, ''):>{margin}} {upright}{line}".rstrip() for n, line in enumerate(pictured)
    ]
    lines.append(f"{'':>{margin}} {corner}{dash * width}")
    indent = " " * (margin + 2)
    return "\n".join(lines + [indent + line for line in _pointed(marks, width, arrow)])


def _braille(dots: list[list[bool]]) -> list[str]:
    lines = []
    for top in range(0, len(dots), len(DOTS)):
        line = ""
        for left in range(0, len(dots[0]), 2):
            bits = sum(
                bit * dots[top + down][left + right]
                for down, pair in enumerate(DOTS)
                for right, bit in enumerate(pair)
            )
            line += chr(BRAILLE + bits) if bits else " "
        lines.append(line)
    return lines


def _pointed(marks: Sequence[tuple[float, str]], width: int, arrow: str) -> list[str]:
    """Return lines with a mark below each place; where two would overlap, on several lines."""
    lines: list[str] = []
    for place, text in sorted(marks):
        column = round(place * (width - 1))
        on_left = column + 2 + len(text) > width and column >= len(text) + 1
        start = column - len(text) - 1 if on_left else column
        piece = f"{text} {arrow}" if on_left else f"{arrow} {text}"
        for number, line in enumerate(lines):
            if len(line) < start or not line:
                lines[number] = line.ljust(start) + piece
                break
        else:
            lines.append(" " * start + piece)
    return lines
