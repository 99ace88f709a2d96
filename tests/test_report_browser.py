"""The report in a real browser: at a desk and on a phone, by day and night, with no network."""

import json

import pytest
from run_folders import history, write_run
from screens import DESK, PHONE, keep_picture

from pipeline import write_report

pytestmark = pytest.mark.browser

SCREENS = {"desk": DESK, "phone": PHONE, "desk-dark": DESK | {"color_scheme": "dark"}}
SAMPLE = "--- update {0}\nOnce upon a time {0} </pre><b>\n" + "x" * 300 + "\n\n"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A run's page, an overfitting run's with a thousand logs, and their comparison."""
    folder = tmp_path_factory.mktemp("runs")
    tasks = {"hellaswag": {"acc": 0.25, "acc_stderr": 0.01}}
    long_name = "a-run-with-a-name-that-is-longer-than-any-phone-is-wide-0123456789"
    for name, best in (("run", None), (long_name, 300)):
        run = write_run(folder / name, tasks=tasks, eval_loss=3.0 + len(name) / 10)
        (run / "history.json").write_text(json.dumps(history(1000 if best else 40, best=best)))
        (run / "samples.txt").write_text("".join(SAMPLE.format(n) for n in (10, 20, 30)))
        write_report.main(["--runs", str(run)])
    both = [str(folder / name) for name in ("run", long_name)]
    write_report.main(["--runs", *both, "--html", str(folder / "comparison.html")])
    return {
        "run": folder / "run" / "report.html",
        "overfitting": folder / long_name / "report.html",
        "comparison": folder / "comparison.html",
    }


@pytest.fixture(params=SCREENS)
def opened(request, browser, pages):
    """Open a page by name; at the end: nothing was asked of a network, and nothing went wrong."""
    context = browser.new_context(**SCREENS[request.param])
    asked, wrong = [], []

    def open_page(name):
        page = context.new_page()
        page.on("request", lambda wanted: asked.append(wanted.url))
        page.on("console", lambda said: wrong.append(said.text) if said.type != "log" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(pages[name].as_uri())
        page.wait_for_function("document.querySelectorAll('.chart .main-svg').length > 0")
        keep_picture(page, f"{name}-{request.param}")
        return page

    yield open_page
    context.close()
    assert all(url.startswith("file://") for url in asked) and not wrong


@pytest.mark.parametrize("name", ["run", "overfitting", "comparison"])
def test_it_fits_the_screen_and_every_chart_is_drawn(opened, name):
    page = opened(name)
    width = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1], "the page is wider than the screen"
    charts = page.locator(".chart")
    curves = page.evaluate("figures.map(({ data }) => data.length)")
    assert charts.count() == len(curves) == 6
    for number in range(6):
        chart = charts.nth(number)
        drawn = chart.locator(".main-svg").first.bounding_box()
        assert drawn["width"] > 250 and drawn["height"] > 200
        assert drawn["x"] + drawn["width"] <= width[1]
        lines = chart.locator(".scatterlayer path.js-line").all()
        assert len(lines) == curves[number]
        assert max(line.bounding_box()["width"] for line in lines) > 0.5 * drawn["width"]


def test_pointing_at_a_curve_tells_its_values(opened):
    page = opened("run")
    chart = page.locator(".chart").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    place = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    if page.evaluate("matchMedia('(pointer: coarse)').matches"):
        page.touchscreen.tap(*place)
    else:
        page.mouse.move(*place)
    page.wait_for_function("document.querySelector('.chart .hoverlayer').textContent.length > 20")
    said = chart.locator(".hoverlayer").text_content()
    assert "training : " in said and "held-out : " in said and "(update " in said


@pytest.mark.parametrize(
    ("name", "titles"),
    [
        ("run", ["Results on held-out text", "Tasks", "Curves", "What it wrote", "Data", "Cost",
                 "Made with", "Recipe"]),
        ("comparison", ["Results on held-out text", "Curves", "Cost", "What differs"]),
    ],
)  # fmt: skip
def test_every_part_is_there(opened, name, titles):
    page = opened(name)
    assert page.locator("h2").all_text_contents() == titles
    for box in page.locator("section").all():
        assert box.bounding_box()["height"] > 50


def test_samples_stand_as_they_were_written(opened):
    page = opened("run")
    assert "</pre><b>" in page.locator(".texts pre").first.text_content()
    assert page.locator(".texts pre b").count() == 0


def test_overfitting_stands_out_and_the_recipe_opens(opened):
    page = opened("overfitting")
    assert "Overfitting" in page.locator("p.warn").first.text_content()
    page.locator("summary").click()
    assert page.locator("details pre").is_visible()


def test_text_can_be_read_on_its_ground(opened):
    """By day and by night, in the page and in the charts: WCAG 2's contrast of 4.5."""
    page = opened("run")

    def luminance(colour):
        parts = [int(part) / 255 for part in colour.split("(")[1].rstrip(")").split(",")[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    ground = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    for selector, key in (("p", "color"), (".note", "color"), (".chart .xtick text", "fill")):
        style = f"getComputedStyle(document.querySelector('{selector}')).{key}"
        light, dark = sorted((ground, luminance(page.evaluate(style))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, selector
