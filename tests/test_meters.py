"""What a machine can do is measured once; memory is what the process held."""

import itertools
import json
import mmap
from types import SimpleNamespace

import psutil
import pytest
import torch

from pipeline import meters
from pipeline.devices import product_rates_path
from pipeline.meters import peak_memory_bytes, product_rate

CPU = torch.device("cpu")


# -- the rate of products -------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """What was measured, each time a little faster than before; nothing is multiplied."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = []

    def measure(device, dtype):
        calls.append((device.type, dtype))
        return 1e9 + len(calls)

    monkeypatch.setattr(meters, "_measured", measure)
    return calls


def remembered(tmp_path):
    return tmp_path / "cache" / "gpt2-pretraining-pipeline" / "product_rates.json"


def another_process():
    meters._best.cache_clear()


def test_a_process_measures_once_and_the_best_is_remembered(measured, monkeypatch, tmp_path):
    assert [product_rate(CPU, "fp32") for _ in range(3)] == [1e9 + 1] * 3
    assert measured == [("cpu", torch.float32)]
    assert product_rates_path() == remembered(tmp_path)
    assert list(json.loads(remembered(tmp_path).read_text()).values()) == [1e9 + 1]
    assert [p.name for p in remembered(tmp_path).parent.iterdir()] == ["product_rates.json"]
    another_process()
    assert product_rate(CPU, "fp32") == 1e9 + 2
    another_process()
    monkeypatch.setattr(meters, "_measured", lambda *_: 5.0)  # a busy machine
    assert product_rate(CPU, "fp32") == 1e9 + 2
    assert list(json.loads(remembered(tmp_path).read_text()).values()) == [1e9 + 2]


def test_another_precision_or_number_of_threads_is_another_rate(measured, monkeypatch):
    cases = list(itertools.product(["fp32", "bf16"], [1, 3]))
    for _ in range(2):
        for number, (precision, threads) in enumerate(cases, start=1):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            assert product_rate(CPU, precision) == 1e9 + number
    assert [dtype for _, dtype in measured] == [torch.float32] * 2 + [torch.bfloat16] * 2


def test_another_machine_or_torch_is_another_rate(measured, monkeypatch):
    product_rate(CPU, "fp32")
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    assert product_rate(CPU, "fp32") == 1e9 + 2
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert product_rate(CPU, "fp32") == 1e9 + 3 == product_rate(CPU, "fp32")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[1]", b"3", b"null", b'"text"'], ids=repr
)
def test_a_broken_memory_is_measured_and_written_again(measured, tmp_path, content):
    remembered(tmp_path).parent.mkdir(parents=True)
    remembered(tmp_path).write_bytes(content)
    assert [product_rate(CPU, "fp32") for _ in range(2)] == [1e9 + 1] * 2
    assert len(measured) == 1
    assert list(json.loads(remembered(tmp_path).read_text()).values()) == [1e9 + 1]


@pytest.mark.parametrize("value", [None, "fast", [1.0], True])
def test_a_remembered_rate_that_is_no_number_is_measured_again(measured, tmp_path, value):
    product_rate(CPU, "fp32")
    path = remembered(tmp_path)
    path.write_text(json.dumps({**dict.fromkeys(json.loads(path.read_text()), value), "a": 7.0}))
    another_process()
    assert product_rate(CPU, "fp32") == 1e9 + 2
    assert sorted(json.loads(path.read_text()).values()) == [7.0, 1e9 + 2]


@pytest.mark.parametrize("place", ["the folder is a file", "the file is a folder"])
def test_where_nothing_can_be_written_it_is_measured_each_time(
    measured, tmp_path, monkeypatch, place
):
    if place == "the folder is a file":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "below"))
    else:
        remembered(tmp_path).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert product_rate(CPU, "fp32") == 1e9 + 1
    another_process()
    assert product_rate(CPU, "fp32") == 1e9 + 2
    assert sorted(tmp_path.rglob("*")) == before


def test_without_xdg_it_lies_in_the_home(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    below = tmp_path / ".cache" / "gpt2-pretraining-pipeline"
    assert product_rates_path() == below / "product_rates.json"


def test_the_rate_is_that_of_the_fastest_product_and_the_first_does_not_count(monkeypatch):
    lengths = [0.125, 0.5, 9.0, 0.25, 0.5, 0.5, 0.25, *[8.0] * 9]
    times = iter(itertools.chain(*((10.0, 10.0 + length) for length in lengths)))
    monkeypatch.setattr(meters, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    monkeypatch.setitem(meters.SIDE, "cpu", 16)
    assert len(lengths) == meters.PRODUCTS + 1
    assert meters._measured(CPU, torch.float32) == 2 * 16**3 / 0.25
    assert next(times, None) is None


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_real_machine_has_a_rate(monkeypatch, tmp_path, precision):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(meters.SIDE, "cpu", 64)
    assert 1e3 < product_rate(CPU, precision) < 1e16


# -- memory ---------------------------------------------------------------------------------------


def test_the_peak_holds_what_was_once_allocated():
    """A process may have held more before, and malloc may keep it: what is new is mapped anew."""
    before, process = peak_memory_bytes(CPU), psutil.Process()
    size = max(0, before - process.memory_info().rss) + 200_000_000
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        for page in range(0, size, mmap.PAGESIZE):
            held[page] = 1
        resident, peak = process.memory_info().rss, peak_memory_bytes(CPU)
    assert peak > before + 150_000_000
    # The kernel counts the pages of each thread in lots, and what it says wavers by as much.
    assert peak >= resident - 2_000_000
    assert peak_memory_bytes(CPU) >= peak - 2_000_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_peak_of_a_gpu_is_the_devices():
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = peak_memory_bytes(device)
    held = torch.ones(200_000_000, dtype=torch.uint8, device=device)
    assert held.is_cuda and peak_memory_bytes(device) >= before + 200_000_000
