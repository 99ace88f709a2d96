"""Energy and CO2 by table: what is multiplied with what, and which boards are known."""

import pytest

from pipeline.footprint import board_watts, footprint


@pytest.mark.parametrize(
    ("device", "world_size", "threads", "memory", "watts"),
    [
        ("cpu", 1, 2, 0, 24),
        ("cpu", 1, 1, 4e9, 12 + 4 * 0.3725),
        ("cpu", 4, 2, 1e9, 96 + 4 * 0.3725),
        (
            "NVIDIA H100 80GB HBM3",
            1,
            16,
            70e9,
            712,
        ),  # its memory is on the board, one core feeds it
        ("NVIDIA A100-SXM4-80GB", 8, 4, 0, 8 * 412),
        ("Some GPU of 2035", 2, 1, 0, 2 * 212),
    ],
)
def test_watts_times_hours_times_pue(device, world_size, threads, memory, watts):
    found = footprint(
        7200, device=device, world_size=world_size, threads=threads, memory_bytes=memory
    )
    assert found.kwh == pytest.approx(2 * watts / 1000 * 1.56)
    assert found.grams_co2 == pytest.approx(found.kwh * 475)


def test_it_says_what_it_takes_for_granted():
    said = footprint(60, device="cpu", world_size=1, threads=2, memory_bytes=1e9).assumption
    for words in ("an upper estimate", "2 core(s) x 12 W", "1.0 GB", "60 s", "x 1.56", "475 g"):
        assert words in said
    one = {"world_size": 1, "threads": 1, "memory_bytes": 0}
    assert "a GPU of any kind" in footprint(60, device="Some GPU", **one).assumption
    said = footprint(60, device="NVIDIA L4", **one).assumption
    assert "72 W of an NVIDIA L4" in said and "its board's maximum" in said


def test_no_time_costs_nothing_and_apple_says_nothing():
    one = {"world_size": 1, "threads": 1, "memory_bytes": 0}
    assert footprint(0, device="cpu", **one).kwh == 0
    assert footprint(60, device="mps", **one) is None


@pytest.mark.parametrize(
    ("name", "watts"),
    [
        ("NVIDIA A100-PCIE-40GB", 250), ("NVIDIA A100 80GB PCIe", 300),
        ("NVIDIA H100 PCIe", 350), ("NVIDIA H100 NVL", 400), ("NVIDIA H200", 700),
        ("NVIDIA H200 NVL", 600), ("NVIDIA B200", 1000), ("Tesla V100-SXM2-16GB", 300),
        ("Tesla T4", 70), ("NVIDIA L40S", 350), ("NVIDIA A10", 150), ("NVIDIA RTX A6000", 300),
        ("NVIDIA GeForce RTX 4090", 450),
    ],
)  # fmt: skip
def test_boards_are_known_by_whole_words(name, watts):
    assert board_watts(name) == (watts, True)


@pytest.mark.parametrize("name", ["NVIDIA A10G", "NVIDIA L400", "AMD Instinct MI300X"])
def test_another_board_is_any_gpu(name):
    assert board_watts(name) == (200, False)
