"""The picture of a fit is drawn whole, whatever there is to be drawn."""

import xml.etree.ElementTree as tree

import pytest
from ladders import ladder, without_largest
from matplotlib.image import imread

from pipeline.law_fit import fit
from pipeline.law_picture import draw


@pytest.fixture(scope="module")
def kept_and_left_out():
    return without_largest(ladder(noise=0.004, seed=2))


@pytest.mark.parametrize("planned", [None, (12e6, 60e6)])
def test_a_png_of_1280_pixels_without_a_warning(tmp_path, kept_and_left_out, recwarn, planned):
    kept, left_out = kept_and_left_out
    draw(fit(kept), tmp_path / "law.png", left_out, planned)
    image = imread(tmp_path / "law.png")
    assert image.shape[1] == 1280
    assert 0.05 < (image[..., :3].min(2) < 0.95).mean() < 0.5
    assert not recwarn.list


@pytest.mark.slow
def test_an_svg_says_what_is_drawn(tmp_path, kept_and_left_out, monkeypatch):
    monkeypatch.setitem(__import__("matplotlib").rcParams, "svg.fonttype", "none")
    kept, left_out = kept_and_left_out
    path = tmp_path / "law.svg"
    found = fit(kept)
    draw(found, path, left_out)
    text = "\n".join(tree.parse(path).getroot().itertext())
    for expected in ("run, fitted", "run, left out", "predicted, with 95 %", "frontier"):
        assert expected in text
    smallest = min(run.flops for run in kept)
    assert f"{smallest:.1e}".replace("e+", "e") in text
    draw(found, path)
    text = "\n".join(tree.parse(path).getroot().itertext())
    assert "run, left out" not in text
    assert "predicted" not in text
