"""Devices by name and number, budgets, and a run's own figures; each wrong text in a sentence."""

import json
import platform

import psutil
import pytest

from pipeline import devices
from pipeline.devices import CPU_MFU, DEVICES, UNCOMPILED, device_called, product_rates_path
from pipeline.footprint import board_watts
from pipeline.hardware import budget, hardware
from pipeline.recipe import InputError


@pytest.fixture(autouse=True)
def rates(monkeypatch, tmp_path):
    """A machine where no rate was measured yet; returns what writes some."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(known: dict) -> None:
        product_rates_path().parent.mkdir(parents=True)
        product_rates_path().write_text(json.dumps(known))

    return write


# -- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gigabytes", "half", "watts"),
    [
        ("v100", 16, 125, 300), ("t4", 16, 65, 70), ("l4", 24, 121, 72), ("a10", 24, 125, 150),
        ("a6000", 48, 154.85, 300), ("rtx4090", 24, 165.2, 450), ("a100", 80, 312, 400),
        ("a100-40gb", 40, 312, 400), ("h100", 80, 989.5, 700), ("h100-pcie", 80, 756.5, 350),
        ("h200", 141, 989.5, 700), ("b200", 180, 2250, 1000), ("l40s", 48, 362, 350),
    ],
)  # fmt: skip
def test_a_gpu_is_as_its_data_sheet_says(name, gigabytes, half, watts):
    device = DEVICES[name]
    assert device.memory_bytes == gigabytes * 1e9
    assert board_watts(device.title) == (watts, True)
    assert device.flops["fp16"] == half * 1e12 and device.kind == "cuda"
    assert device.source and device.mfu_source and not device.is_measured and 0 < device.mfu < 1
    assert ("bf16" in device.flops) == (name not in ("v100", "t4"))


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"), ("NVIDIA A100-SXM4-80GB", "a100"),
        ("Tesla V100-SXM2-16GB", "v100"), ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("Tesla T4", "t4"), ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA RTX A6000", "a6000"),
    ],
)  # fmt: skip
def test_cuda_s_name_is_found_in_the_table(called, name):
    assert device_called(called).name == name


def test_a_chip_that_only_begins_alike_is_another():
    assert device_called("NVIDIA A10G") is None and device_called("AMD Instinct MI300X") is None


# -- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("h100", "h100", 1), ("8xh100", "h100", 8), ("h100x8", "h100", 8), ("h100×8", "h100", 8),
        ("  8 X H100 ", "h100", 8), ("H100 * 8", "h100", 8), ("NVIDIA H100", "h100", 1),
        ("rtx 4090", "rtx4090", 1), ("RTX4090x2", "rtx4090", 2), ("2xrtx 4090", "rtx4090", 2),
        ("a100 40GB", "a100-40gb", 1), ("16xa100-80gb", "a100", 16), ("apple", "apple-m1", 1),
        ("h100 pcie x 4", "h100-pcie", 4), ("1xcpu", "cpu", 1), ("1,024xh100", "h100", 1024),
    ],
)  # fmt: skip
def test_names_and_numbers_are_read_in_any_spelling(text, name, count):
    found = hardware(text)
    assert (found.device.name, found.count) == (name, count)
    assert found.device.title in found.title and found.title.startswith(f"{count} x") == (count > 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("h10", "the nearest are h100"), ("8xh1000", "the nearest are h100"),
        ("a1000", "the nearest are a10"), ("tpu-v5", "known: cpu, v100"), ("", "known: cpu"),
        ("0xh100", "0 devices cannot train"), ("-2xh100", "-2 devices cannot train"),
        ("h100x1000000", "give 1 to 100,000"), ("2.5xh100", "2.5 is no whole number"),
        ("2xcpu", "cpu is this machine as a whole"), ("8", "is not in the table"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_sentence(text, words):
    with pytest.raises(InputError, match="^hardware: ") as found:
        hardware(text)
    assert words in str(found.value) and "\n" not in str(found.value)


def test_a_rate_is_the_devices_share_of_the_data_sheet():
    found = hardware("8xh100")
    assert found.rate("bf16") == found.rate() == 8 * 989.5e12 * DEVICES["h100"].mfu
    assert not found.is_measured


@pytest.mark.parametrize("name", ["h100", "t4", "apple"])
def test_a_gpu_s_share_is_the_same_at_every_size(name):
    device = DEVICES["apple-m1" if name == "apple" else name]
    for parameters in (1_000, 124_439_808, 10**10):
        assert device.of_step(parameters, is_compiled=True) == device
    left = 1 if name == "apple" else UNCOMPILED["cuda"][0]
    assert device.of_step(10**9, is_compiled=False).mfu == device.mfu * left


def test_a_cpu_s_share_lies_between_those_that_were_measured():
    device = hardware("cpu").device
    shares = [device.of_step(n, is_compiled=True).mfu for n, _ in CPU_MFU]
    assert shares == pytest.approx([share for _, share in CPU_MFU])
    for size, nearest in ((1_000, CPU_MFU[0]), (10**10, CPU_MFU[-1])):
        assert device.of_step(size, is_compiled=True).mfu == pytest.approx(nearest[1])
    (low, first), (high, last) = CPU_MFU[:2]
    halfway = device.of_step(round((low * high) ** 0.5), is_compiled=True).mfu
    assert halfway == pytest.approx((first + last) / 2, abs=1e-6)
    slow = device.of_step(low, is_compiled=False)
    assert slow.mfu == pytest.approx(0.85 * first) == slow.of_step(low, is_compiled=False).mfu


def test_precision_is_what_the_devices_have():
    assert hardware("h100").precision() == "bf16" and hardware("h100").precision("fp16") == "fp16"
    assert hardware("t4").precision() == "fp32" == hardware("apple").precision()
    with pytest.raises(InputError, match="bf16 is asked, but NVIDIA T4, 16 GB multiplies in hard"):
        hardware("t4").rate("bf16")


# -- this machine ---------------------------------------------------------------------------------


def test_cpu_is_this_machine_at_assumed_rates_until_they_are_measured(rates, monkeypatch):
    monkeypatch.setattr(devices, "cores", lambda: 3)
    device = hardware("cpu").device
    assert device.memory_bytes == psutil.virtual_memory().total and device.kind == "cpu"
    assert device.flops["fp32"] == 3 * devices.CORE_FLOPS["fp32"]
    assert "fp32 assumed, 100 GFLOP/s a core" in device.source
    here = f"{platform.node()}, cpu, "
    rates({
        f"{here}3 threads, fp32, torch 2.11.0": 5e11, f"{here}8 threads, fp32, torch 2.11.0": 9e11,
        "elsewhere, cpu, 3 threads, fp32, torch 2.11.0": 7e11,
    })  # fmt: skip
    device = hardware("CPU").device
    assert device.flops["fp32"] == 5e11 and "fp32 measured by a run here" in device.source


@pytest.mark.parametrize("content", ["", "[1]", '{"a": null}'])
def test_a_broken_memory_of_rates_is_none(content):
    product_rates_path().parent.mkdir(parents=True)
    product_rates_path().write_text(content)
    assert "assumed" in hardware("cpu").device.source


# -- a run's figures ------------------------------------------------------------------------------

METRICS = {
    "device": "NVIDIA A100-SXM4-40GB", "world_size": 4, "precision": "bf16", "threads": 2,
    "product_rate_flops": 250e12, "mfu": 0.5, "train_tokens_per_second": 500_000.0,
    "hardware": {"processor": "AMD EPYC", "memory_bytes": 64e9},
}  # fmt: skip


def a_run(folder, **changes):
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({**METRICS, **changes}))
    return folder


def test_a_run_says_what_it_ran_on_and_how_fast(tmp_path):
    run = a_run(tmp_path / "fast")
    for path in (run, run / "metrics.json"):
        found = hardware(str(path))
        assert (found.count, found.device.memory_bytes) == (4, 40e9)
        assert found.is_measured and found.precision() == "bf16"
        assert found.rate() == 4 * 250e12 * 0.5
        assert "the run fast" in found.device.source
        assert "500,000 tokens/s on 4 process(es)" in found.device.mfu_source
        assert found.of_step(1_000, is_compiled=False) == found
    with pytest.raises(InputError, match="was measured in bf16 only"):
        found.rate("fp32")


def test_processes_of_a_run_on_cpus_share_the_machine(tmp_path):
    found = hardware(str(a_run(tmp_path / "run", device="cpu", precision="fp32")))
    assert found.device.memory_bytes == 16e9 and found.device.title == "AMD EPYC, 2 thread(s)"
    assert found.device.threads == 2
    assert found.precision() == "fp32"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mfu": None}, "lacks mfu"),
        ({"world_size": None, "device": None}, "lacks world_size, device"),
        ({"world_size": 0, "device": 3}, "has world_size 0, which no run writes"),
        ({"world_size": 0.5}, "has world_size 0.5"),
        ({"world_size": 4.0}, "has world_size 4.0"),
        ({"device": 3}, "has device 3"),
        ({"device": "cpu", "threads": "abc"}, "has threads 'abc'"),
        ({"hardware": [1]}, "has hardware [1]"),
        ({"hardware": {"memory_bytes": "16"}}, "has hardware {'memory_bytes': '16'}"),
        ({"mfu": 7}, "has mfu 7"),
        ({"mfu": "0.3"}, "has mfu '0.3'"),
        ({"precision": "int8"}, "has precision 'int8'"),
        ({"product_rate_flops": 10**400}, "has product_rate_flops 10000000000000000000000"),
        ({"train_tokens_per_second": float("nan")}, "has train_tokens_per_second nan"),
        ({"device": "Some GPU"}, "its device, Some GPU, is not in the table"),
    ],
)
def test_a_run_that_says_too_little_or_no_sense_is_one_sentence(tmp_path, changes, words):
    with pytest.raises(InputError) as found:
        hardware(str(a_run(tmp_path / "run", **changes)))
    said = str(found.value)
    assert words in said and "or a name of the table, as in 8xh100" in said and len(said) < 300


def test_no_run_or_no_json_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="there is no metrics.json"):
        hardware(str(tmp_path))
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(InputError, match="metrics.json cannot be read as JSON"):
        hardware(str(tmp_path))


# -- budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "count", "seconds"),
    [
        ("8xh100 24h", "h100", 8, 86_400), ("cpu 3h", "cpu", 1, 10_800),
        ("2xa100 90min", "a100", 2, 5_400), ("1xh100 7d", "h100", 1, 604_800),
        ("h100 x 8, 1.5 days", "h100", 8, 129_600), ("rtx 4090 2 H", "rtx4090", 1, 7_200),
        ("cpu 1 week", "cpu", 1, 604_800), ("t4 30s", "t4", 1, 30),
    ],
)  # fmt: skip
def test_a_budget_is_devices_and_time(text, name, count, seconds):
    found, time = budget(text)
    assert (found.device.name, found.count, time) == (name, count, seconds)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("8xh100 0h", "nothing can be trained in 0 h"), ("cpu -3h", "nothing can be trained in -3"),
        ("8xh100 24", "24 has no unit"), ("8xh100 24y", "the unit 'y' is not known"),
        ("8xh100 3m", "the unit 'm' is not known"), ("8xh100", "is not understood"),
        ("cpu 999999999999999999999h", "is longer than 10 years"), ("cpu 11000d", "than 10 years"),
        (f"cpu {'9' * 400}h", "is longer than 10 years"),
        ("24h", "is not understood"), ("", "is not understood"), ("cpu 1.2.3h", "is no number"),
        ("h10 3h", "hardware: 'h10' is not in the table"), ("0xh100 3h", "0 devices cannot train"),
    ],
)  # fmt: skip
def test_a_budget_that_is_none_is_one_sentence(text, words):
    with pytest.raises(InputError) as found:
        budget(text)
    assert words in str(found.value) and "\n" not in str(found.value)
