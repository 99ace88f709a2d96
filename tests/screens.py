"""The screens on which pages are looked at, and where pictures of them are kept."""

import os
from pathlib import Path

from conftest import ROOT

DESK = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True,
         "has_touch": True}  # fmt: skip


def keep_picture(page, name: str) -> None:
    """Keep a picture of the whole page."""
    folder = Path(os.environ.get("CI_ARTEFACTS") or ROOT / "outputs" / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png", full_page=True)
