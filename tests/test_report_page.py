"""The page as a file, and the door that writes it: one run, several, and every mistake."""

import json
import re

import pytest
from run_folders import make_unfinished, write_run

from pipeline import write_report
from pipeline.recipe import InputError
from pipeline.report_page import GENERATOR


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", eval_loss=9.0)
    return tmp_path


def own(page):
    """A page without the library in it."""
    scripts = re.findall(r"<script>.*?</script>", page, re.DOTALL)
    return page.replace(max(scripts, key=len), "")


def test_one_run_s_page_is_in_its_folder(runs, capsys):
    write_report.main(["--runs", "a"])
    assert capsys.readouterr().out == "a/report.html\n"
    page = (runs / "a" / "report.html").read_text()
    assert "Plotly" in page and f'content="{GENERATOR}"' in page and "1.7500" in page
    assert not re.search(r"https?://|src=|<link|@import|url\(", own(page))
    assert str(runs) not in page and "somebody" not in page
    json.loads(re.search(r"const figures = (.*);", page)[1])


def test_the_same_folder_gives_the_same_page(runs):
    write_report.main(["--runs", "a"])
    first = (runs / "a" / "report.html").read_bytes()
    write_report.main(["--runs", "a"])
    assert (runs / "a" / "report.html").read_bytes() == first


def test_text_is_never_html(runs):
    bad = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>"
    (runs / "a" / "samples.txt").write_text(f"--- update 1\n{bad}\n\n")
    recipe = (runs / "a" / "config.yaml").read_text()
    (runs / "a" / "config.yaml").write_text(f"{recipe}\nfaults: {{note: '{bad}'}}\n")
    history = [
        {"step": 1, "tokens_seen": 1, f"eval_{bad}_loss": 1.0, f"eval_{bad}_perplexity": 2.0}
    ]
    (runs / "a" / "history.json").write_text(json.dumps(history))
    write_report.main(["--runs", "a"])
    page = own((runs / "a" / "report.html").read_text())
    assert "<img" not in page and "<script>alert" not in page
    assert page.count("</script>") == 1 and "&lt;script&gt;alert(1)" in page


def test_several_runs_are_compared_and_told_apart(runs, capsys):
    write_run(runs / "deep" / "a")
    write_report.main(["--runs", "a", "b", "deep/a"])
    assert capsys.readouterr().out == "comparison.html\n"
    page = (runs / "comparison.html").read_text()
    assert "Comparison of 3 runs" in page and "deep/a: training" in page
    assert "\N{BLACK STAR}" in own(page)
    write_report.main(["--runs", "a", "b", "--html", "other.html"])
    write_report.main(["--runs", "a", "b", "--html", "other.html"])  # ours may be overwritten
    assert "Comparison of 2 runs" in (runs / "other.html").read_text()


def test_an_unfinished_run_and_one_without_logs_have_a_page(runs):
    make_unfinished(runs / "a")
    write_report.main(["--runs", "a"])
    assert "This run is not finished: preempted" in (runs / "a" / "report.html").read_text()
    (runs / "b" / "history.json").write_text("[]")
    write_report.main(["--runs", "b"])
    page = (runs / "b" / "report.html").read_text()
    assert "no logs in this folder" in page and "<script>" not in page


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--runs nowhere", "nowhere: no such folder; name the training.output_dir of a run"),
        ("--runs empty", "empty: holds no run (config.yaml and run_status.json are missing)"),
        ("--runs a ./a", "--runs a: is named twice; name different runs"),
        ("--runs a --html no/where.html", "no/where.html: cannot be written; give --html a file"),
        ("--runs a --html no/p.html", "no/p.html: cannot be written; give --html a file in a fold"),
        ("--runs a --html a.pdf", "--html a.pdf: is a page; give it a name that ends in .html"),
        ("--runs a --html mine.html", "mine.html: is there already, and no page of ours; give"),
        ("--runs a b damaged", "damaged/metrics.json: damaged, or written by something else"),
        ("--html x.html", "--runs is required"),
        ("--runs a --htm x.html", "did you mean --html?"),
    ],
)
def test_a_mistake_is_one_sentence(runs, argv, words):
    (runs / "empty").mkdir()
    (runs / "mine.html").write_text("<html>a diary</html>")
    (write_run(runs / "damaged") / "metrics.json").write_text("{")
    with pytest.raises(InputError) as caught:
        write_report.main(argv.split())
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert (runs / "mine.html").read_text() == "<html>a diary</html>"
    assert not (runs / "comparison.html").exists()


def test_a_stranger_s_report_in_a_run_s_folder_stays(runs):
    (runs / "a" / "report.html").write_text("a diary")
    with pytest.raises(InputError, match="a/report.html: is there already, and no page of ours"):
        write_report.main(["--runs", "a"])


def test_help_needs_no_torch(capsys):
    with pytest.raises(SystemExit):
        write_report.main(["--help"])
    assert "--runs" in capsys.readouterr().out
