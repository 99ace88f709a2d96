"""A Hub that is out of reach is found out once, at once, and what was fetched before is used."""

import subprocess
import sys
import time

import pytest
from huggingface_hub import constants

from pipeline import reach


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in reach.PROXIES:
        monkeypatch.delenv(name, raising=False)
    reach.see_hub.cache_clear()
    yield
    reach.see_hub.cache_clear()


def test_where_nothing_answers_the_cache_alone_is_used(monkeypatch, caplog):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    reach.see_hub()
    assert constants.HF_HUB_OFFLINE
    assert "127.0.0.1 cannot be reached (Connection refused): only what was fetch" in caplog.text


def test_where_somebody_answers_nothing_changes(monkeypatch):
    from loopback_hub import LoopbackHub

    with LoopbackHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        reach.see_hub()
    assert not constants.HF_HUB_OFFLINE


def test_a_proxy_decides_for_itself(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:8080")
    reach.see_hub()
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.slow
def test_a_hub_name_without_a_network_is_one_sentence_in_seconds(tmp_path):
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.generate", "--model", "user/model", "--prompt", "a"],
        env={"PATH": "", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and time.monotonic() - started < 20  # 25 s and more without it
    assert done.stderr.splitlines()[-1].startswith("error: user/model: cannot be loaded as a model")
