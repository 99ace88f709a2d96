"""What was looked at before a run: a line each, with a mark, and the sentence that stops a run."""

import logging
import shutil
import sys
import textwrap
from collections.abc import Collection
from typing import NamedTuple

from pipeline.recipe import InputError
from pipeline.safety_sections import CHECKS
from pipeline.terminal_curve import can_show

logger = logging.getLogger(__name__)

WIDEST = 100  # a line of text that is longer is not read
NAME = 14  # characters of the longest name, and one
# Of what is well, fails, fails and is accepted, and was not judged: a sign, and ASCII for it.
SIGNS = {
    "well": ("\N{CHECK MARK}", "+"),
    "fails": ("\N{BALLOT X}", "x"),
    "accepted": ("\N{WARNING SIGN}", "!"),
    "open": ("\N{MIDDLE DOT}", "-"),
}


class Finding(NamedTuple):
    """What one check has found."""

    name: str
    text: str
    remedy: str = ""
    """What to do; it is there if the check fails."""
    shown: str = ""
    """What stands below, as it is."""
    is_judged: bool = True

    def mark(self, accept: Collection[str]) -> str:
        """Return well, fails, accepted or open."""
        if self.remedy:
            return "accepted" if self.name in accept else "fails"
        return "well" if self.is_judged else "open"


def say(finding: Finding, accept: Collection[str]) -> None:
    """Show a finding, in signs that the screen has."""
    mark, encoding = finding.mark(accept), sys.stdout.encoding or "ascii"
    width = min(shutil.get_terminal_size().columns, WIDEST)
    has_signs = can_show("".join(sign for sign, _ in SIGNS.values()), encoding)
    head = f"{SIGNS[mark][not has_signs]} {finding.name:<{NAME}}"
    said = finding.text
    if mark == "accepted":
        said += " (accepted: preflight.accept)"
    lines = _wrapped(said, head, width)
    if mark == "fails":
        remedy = f"{finding.remedy}{_way_out([finding], accept)}"
        lines += _wrapped(remedy, " " * (NAME + 2), width)
    if finding.shown:
        lines.append(textwrap.indent(finding.shown, "  "))
    text = "\n".join(lines)
    logger.info("%s", text.encode(encoding, "backslashreplace").decode(encoding))


def judge(findings: Collection[Finding], accept: Collection[str]) -> None:
    """See that nothing fails but what is accepted.

    Raises:
        InputError: something does, with what and what to do.
    """
    failing = [finding for finding in findings if finding.mark(accept) == "fails"]
    if failing:
        said = "; ".join(f"{f.name}: {f.text}; {f.remedy}" for f in failing)
        raise InputError(f"preflight: {said}{_way_out(failing, accept)}")


def as_seen(findings: Collection[Finding], accept: Collection[str]) -> dict[str, dict[str, str]]:
    """Return what the report keeps of findings, by name."""
    return {f.name: {"mark": f.mark(accept), "finding": f.text} for f in findings}


def _way_out(failing: Collection[Finding], accept: Collection[str]) -> str:
    names = [finding.name for finding in failing]
    if any(name not in CHECKS for name in names):
        return ""
    what = "it" if len(names) == 1 else "them"
    return f", or accept {what} with --preflight.accept {' '.join([*accept, *names])}"


def _wrapped(text: str, head: str, width: int) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=head, subsequent_indent=" " * (NAME + 2),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
