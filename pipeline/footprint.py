"""What a run costs the world: energy and CO2, an estimate from time and devices alone.

The formula and its defaults are those of Green Algorithms (Lannelongue, Grealey and Inouye 2021,
Advanced Science 8, 2100707): time x (cores + memory) x PUE, each device taken as fully busy.
"""

import re
from typing import NamedTuple

# Green Algorithms' defaults, from data/latest of github.com/GreenAlgorithms/green-algorithms-tool.
WATTS_PER_CORE = 12.0  # TDP_cpu.csv: any processor
WATTS_PER_GB = 0.3725  # referenceValues.csv: memory that is in use
WATTS_OF_ANY_GPU = 200.0  # TDP_gpu.csv: any GPU
PUE = 1.56  # defaults_PUE.csv, an unknown data centre: Uptime Institute's survey of 2024
GRAMS_PER_KWH = 475.0  # CI_aggregated.csv, the world: IEA 2019

# Watts of a whole board by the words of its name, the first row that fits: its maker's maximum. The
# PCIe boards of A100 and H100 were looked up in NVIDIA's product briefs, the others are as they are
# commonly quoted.
BOARDS = (
    (("LAPTOP",), WATTS_OF_ANY_GPU),  # 80 to 175 by its maker's choice
    (("A100", "PCIE", "80GB"), 300), (("A100", "PCIE"), 250), (("A100",), 400),
    (("H100", "PCIE"), 350), (("H100", "NVL"), 400), (("H100",), 700),
    (("H200", "NVL"), 600), (("H200",), 700), (("B200",), 1000),
    (("V100", "PCIE"), 250), (("V100",), 300), (("T4",), 70),
    (("L4",), 72), (("L40",), 300), (("L40S",), 350),
    (("A10",), 150), (("A40",), 300), (("A6000",), 300), (("4090",), 450),
)  # fmt: skip


class Footprint(NamedTuple):
    """An estimate, and what it takes for granted."""

    kwh: float
    grams_co2: float
    """CO2 equivalents."""
    assumption: str


def footprint(
    seconds: float, *, device: str, world_size: int, threads: int, memory_bytes: float
) -> Footprint | None:
    """Return the footprint of `world_size` processes, each with a device; None where unknown.

    Args:
        device: cpu, or a GPU's name as CUDA gives it. There is no figure for Apple's (mps).
        threads: cores that each process keeps busy on a CPU; beside a GPU it is one.
        memory_bytes: of each process on a CPU; a GPU's memory is part of its board.
    """
    if device == "mps":
        return None
    sources = "as in Green Algorithms"
    if device == "cpu":
        gigabytes = memory_bytes * world_size / 1e9
        watts = world_size * threads * WATTS_PER_CORE + gigabytes * WATTS_PER_GB
        parts = (
            f"{world_size * threads} core(s) x {WATTS_PER_CORE:g} W + {gigabytes:.1f} GB of memory "
            f"x {WATTS_PER_GB:g} W"
        )
    else:
        board, known = board_watts(device)
        watts = world_size * (board + WATTS_PER_CORE)
        parts = (
            f"{world_size} x ({board:g} W of {f'an {device}' if known else 'a GPU of any kind'} + "
            f"a core of {WATTS_PER_CORE:g} W)"
        )
        sources = "the GPU by its board's maximum, all else " + sources if known else sources
    kwh = seconds / 3600 * watts / 1000 * PUE
    return Footprint(
        kwh,
        kwh * GRAMS_PER_KWH,
        f"an upper estimate, not a measurement: {parts}, all busy for {seconds:,.0f} s, x {PUE:g} "
        f"for an average data centre (PUE), x {GRAMS_PER_KWH:g} g CO2e/kWh, the world's average; "
        f"{sources} (Lannelongue et al. 2021)",
    )


def board_watts(name: str) -> tuple[float, bool]:
    """Return the watts of a GPU's board, and whether its name is known or any GPU's are taken."""
    words = set(re.split(r"[\s,-]+", name.upper()))
    for needed, watts in BOARDS:
        if words.issuperset(needed):
            return watts, True
    return WATTS_OF_ANY_GPU, False
