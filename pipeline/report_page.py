"""The report as one HTML file: it opens offline, on a phone too, and asks no server."""

import functools
import importlib.util
import os
from pathlib import Path

import jinja2
from markupsafe import Markup

from pipeline import artifact
from pipeline.curves import figure
from pipeline.recipe import InputError
from pipeline.report_parts import headlines, made_from, run_parts, state_sentence
from pipeline.run_comparison import BEST, comparison_parts, warnings
from pipeline.run_files import PAGE
from pipeline.run_record import RunRecord, read_run

COMPARISON = "comparison.html"
# By this a page of ours is known, which may be overwritten.
GENERATOR = "gpt2-pretraining-pipeline"
HEAD_BYTES = 1000  # in which it stands


def run_page(record: RunRecord) -> str:
    """Return the page of one run."""
    said = state_sentence(record)
    return _rendered(
        title=record.name, lead=made_from(record), warnings=[said] if said else [],
        tiles=headlines(record), parts=run_parts(record),
    )  # fmt: skip


def comparison_page(records: list[RunRecord]) -> str:
    """Return the page of several runs."""
    title = f"Comparison of {len(records)} runs"
    return _rendered(title=title, warnings=warnings(records), parts=comparison_parts(records))


def write_pages(runs: list[str], html: str | None) -> Path:
    """Write the page of one run, or of several in comparison, and return its path.

    `html` is that path (default: report.html in the run's folder, of several runs comparison.html
    here).

    Raises:
        InputError: a folder that is no run or whose files are damaged, a run that is named twice,
            or a path that cannot be written to or holds something else.
    """
    folders = [Path(run) for run in runs]
    for number, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:number]]:
            raise InputError(f"--runs {folder}: is named twice; name different runs")
    records = [read_run(folder) for folder in folders]
    pages = [(folder / PAGE).resolve() for folder in folders]
    if html is not None and len(folders) > 1 and Path(html).resolve() in pages:
        raise InputError(f"--html {html}: is the page of one run; give the comparison another name")
    if html is not None and Path(html).suffix != ".html":
        raise InputError(f"--html {html}: is a page; give it a name that ends in .html")
    default = folders[0] / PAGE if len(folders) == 1 else Path(COMPARISON)
    target = default if html is None else Path(html)
    _check_target(target)
    if len(records) == 1:
        text = run_page(records[0])
    else:
        names = _told_apart(folders)
        text = comparison_page(
            [r._replace(name=name) for r, name in zip(records, names, strict=True)]
        )
    with artifact.full_disk_said(target.parent):
        artifact.write_whole(target, text)
    return target


def _check_target(target: Path) -> None:
    if target.is_dir() or not os.access(target.parent, os.W_OK):
        raise InputError(f"{target}: cannot be written; give --html a file in a folder that can")
    if target.exists() and GENERATOR not in _beginning(target):
        raise InputError(
            f"{target}: is there already, and no page of ours; give --html another name"
        )


def _beginning(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES).decode(errors="replace")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _told_apart(folders: list[Path]) -> list[str]:
    """Return the shortest ends of the paths by which they differ."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _rendered(**values: object) -> str:
    figures = [figure(panel) for part in values["parts"] for panel in part.panels]
    return _template().render(
        figures=figures, library=_plotly() if figures else "", best=BEST, generator=GENERATOR,
        **values,
    )  # fmt: skip


@functools.cache
def _template() -> jinja2.Template:
    folder = Path(__file__).parent / "templates"
    loader = jinja2.FileSystemLoader(folder)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html")


def _plotly() -> Markup:
    """Return plotly.js as the plotly package ships it, found without importing that package."""
    folder = Path(importlib.util.find_spec("plotly").origin).parent
    return Markup((folder / "package_data" / "plotly.min.js").read_text(encoding="utf-8"))
