"""What devices send by table, and what the pages say of it: every number is computed again."""

import pytest
from conftest import ROOT

from pipeline.batch_memory import Batch
from pipeline.communication import (
    CLUSTERS,
    Cluster,
    Traffic,
    compute_seconds,
    efficiency,
    link_seconds,
    tokens_for,
    traffic,
)
from pipeline.memory_bound import memory_by_part
from pipeline.planning import SIZES, Shape

SMALL, COUNT, ENDS = SIZES["124M"], 124_439_808, (50257 + 1024) * 768
CLUSTER = Cluster(between=10.0, inside=100.0, devices_per_node=8, attained=0.5)


@pytest.mark.parametrize(
    ("topology", "gathered", "reduced"),
    [
        ("none", 0, 0),
        ("ddp", 0, 2 * 4 * COUNT),
        ("fsdp2", 3 * 4 * (2 * (COUNT - ENDS) + ENDS), 4 * COUNT),
        ("zero2", 4 * COUNT, 3 * 4 * COUNT),
        ("zero3", 3 * 2 * 4 * COUNT, 3 * 4 * COUNT),
    ],
)
def test_each_device_sends_so_much(topology, gathered, reduced):
    sent = traffic(SMALL, topology=topology, devices=8, accumulation=3)
    assert sent[:2] == pytest.approx((7 / 8 * gathered, 7 / 8 * reduced))


def test_one_device_sends_nothing_and_bf16_halves_it():
    assert traffic(SMALL, topology="ddp", devices=1) == (0, 0, 0)
    full, half = (traffic(SMALL, topology="ddp", devices=4, reduce_bytes=n) for n in (4, 2))
    assert half.reduced == full.reduced / 2 == 1.5 * 2 * COUNT
    assert full.last == 1.5 * 4 * ENDS


def test_a_ring_is_as_fast_as_its_slowest_link():
    assert link_seconds(100, devices=8, cluster=CLUSTER) == 2.0
    assert link_seconds(100, devices=9, cluster=CLUSTER) == 20.0
    fast = CLUSTER._replace(between=1000.0)
    assert link_seconds(100, devices=9, cluster=fast) == 2.0


def test_computing_takes_operations_over_rates():
    seconds = compute_seconds(
        SMALL, tokens=524_288, block_size=1024, devices=8, cluster=CLUSTERS["400 Gb/s per GPU"]
    )
    assert seconds == pytest.approx(524_288 * 0.859885e9 / (8 * 989e12 * 0.5), rel=1e-5)


@pytest.mark.parametrize(
    ("sent", "accumulation", "alone", "overlapped"),
    [
        (Traffic(0, 0, 0), 1, 1, 1),
        (Traffic(0, 150, 0), 1, 0.5, 3 / 4),  # 2 of 3 s hide behind the backward pass
        (Traffic(0, 150, 0), 2, 0.5, 3 / 5),  # 1 of 3 s
        (Traffic(0, 50, 25), 1, 0.75, 3 / 3.5),  # the last half second has nothing to hide behind
        (Traffic(100, 50, 0), 1, 0.5, 1),  # all but nothing is hidden
        (Traffic(300, 50, 0), 1, 0.3, 3 / 7),
    ],
)
def test_what_is_not_hidden_is_waited_for(sent, accumulation, alone, overlapped):
    asked = {"devices": 8, "cluster": CLUSTER, "accumulation": accumulation}
    assert efficiency(3, sent, is_overlapped=False, **asked) == pytest.approx(alone)
    assert efficiency(3, sent, is_overlapped=True, **asked) == pytest.approx(overlapped)


def test_so_many_tokens_reach_what_is_wanted():
    cluster = CLUSTERS["100 GbE per node"]
    tokens = tokens_for(0.9, SMALL, block_size=1024, devices=64, cluster=cluster)
    compute = compute_seconds(SMALL, tokens=tokens, block_size=1024, devices=64, cluster=cluster)
    sent = traffic(SMALL, topology="ddp", devices=64)
    found = efficiency(compute, sent, devices=64, cluster=cluster, is_overlapped=False)
    assert found == pytest.approx(0.9)


# -- the pages ------------------------------------------------------------------------------------

PAGE = ROOT / "accelerate_configs" / "README.md"
TOKENS, BLOCK = 524_288, 1024
ROWS = {"124M": 32, "355M": 16, "774M": 8, "1558M": 8}  # per_device_train_batch_size of the recipes
COUNTS = [(size, devices) for size in SIZES for devices in (8, 64, 512)]
NETWORKS = list(CLUSTERS.values())


def table(path, header: str) -> list[list[str]]:
    """Return the cells of the table below the line that begins so."""
    lines = path.read_text().splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(header))
    assert not any(line.startswith(header) for line in lines[start + 1 :])
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def short(number: float) -> str:
    """Return three digits, or all before the point."""
    return f"{number:,.{2 if number < 10 else 1 if number < 100 else 0}f}"


def over_links(devices: int, cell) -> list[str]:
    """Return a cell for NVLink and for each network, those that are there."""
    if devices <= 8:
        return [cell(NETWORKS[0]), *["–"] * len(NETWORKS)]
    return ["–", *map(cell, NETWORKS)]


def split(size: str, devices: int) -> tuple[int, int]:
    """Return rows of a batch and batches of an update on each device."""
    each = TOKENS // BLOCK // devices
    rows = min(ROWS[size], each)
    return rows, each // rows


def percent(size: str, devices: int, cluster: Cluster, topology="ddp", batches=0) -> str:
    """Return the efficiency with nothing overlapped, and overlapped."""
    of = {"devices": devices, "cluster": cluster}
    compute = compute_seconds(SIZES[size], tokens=TOKENS, block_size=BLOCK, **of)
    of["accumulation"] = batches or split(size, devices)[1]
    asked = {"devices": devices, "accumulation": of["accumulation"]}
    sent = traffic(SIZES[size], topology=topology, **asked)
    least, most = (efficiency(compute, sent, is_overlapped=o, **of) for o in (False, True))
    return f"{int(100 * least)} to {int(100 * most)} %"


def times(size: str, devices: int) -> list[str]:
    """Return a row: what DDP sends, and how long it takes."""
    sent = traffic(SIZES[size], topology="ddp", devices=devices).reduced
    asked = {"tokens": TOKENS, "block_size": BLOCK, "devices": devices}
    compute = compute_seconds(SIZES[size], cluster=NETWORKS[0], **asked)

    def wait(cluster: Cluster) -> str:
        return short(1e3 * link_seconds(sent, devices=devices, cluster=cluster))

    links = over_links(devices, wait)
    return [size, str(devices), short(sent / 1e9), short(compute * 1e3), *links]


def efficiencies(size: str, devices: int) -> list[str]:
    """Return a row: the efficiency of DDP."""
    rows, batches = split(size, devices)
    links = over_links(devices, lambda cluster: percent(size, devices, cluster))
    return [size, str(devices), f"{rows} x {batches}", *links]


def enough(size: str, devices: int) -> list[str]:
    """Return a row: the tokens that make DDP efficient."""

    def tokens(cluster: Cluster) -> str:
        asked = {"block_size": BLOCK, "devices": devices, "cluster": cluster}
        return short(tokens_for(0.95, SIZES[size], **asked) / 1e6)

    return [size, str(devices), *over_links(devices, tokens)]


def held(size: str) -> list[str]:
    """Return a row: the memory of each topology, in GB."""

    def parts(rows: int, **asked) -> dict[str, int]:
        return memory_by_part(SIZES[size], rows=rows, block_size=BLOCK, **asked)

    fixed = [
        sum(b for part, b in parts(1, **asked).items() if part not in ("activations", "loss"))
        for asked in (
            {"topology": "none"}, {"topology": "ddp", "devices": 8},
            {"topology": "fsdp2", "devices": 8}, {"topology": "fsdp2", "devices": 64},
            {"topology": "zero2", "devices": 8}, {"topology": "zero3", "devices": 8},
        )
    ]  # fmt: skip
    each = parts(2)["activations"] - parts(1)["activations"]
    return [size, *(short(n / 1e9) for n in (*fixed, each, parts(8)["loss"]))]


def sharded(rows: int, batches: int) -> list[str]:
    """Return a row: what 1558M sends on 64 GPUs by each topology, in GB, and the efficiency."""
    cells = []
    for topology in ("ddp", "fsdp2", "zero2", "zero3"):
        asked = {"devices": 64, "accumulation": batches}
        sent = traffic(SIZES["1558M"], topology=topology, **asked)
        cells.append(short((sent.gathered + sent.reduced) / 1e9))
    both = [percent("1558M", 64, NETWORKS[0], t, batches) for t in ("ddp", "fsdp2")]
    return [f"{rows} x {batches}", *cells, *both]


def topology(size: str, devices: int) -> list[str]:
    """Return a row: the config that fits, and the rows that its batch can have."""

    batches = [
        Batch(SIZES[size], BLOCK, topology=name, devices=devices)
        for name in (("ddp", "fsdp2") if devices > 1 else ("none",))
    ]

    def cell(gigabytes: int) -> str:
        rows = {batch.topology: batch.largest_rows(gigabytes * 1e9) for batch in batches}
        for least in (4, 1):  # the config that sends least of those in which so many rows fit
            for topology, most in rows.items():
                if most >= least:
                    return f"`{'single_gpu' if topology == 'none' else topology}`, {most}"
        return "–"

    return [size, str(devices), *map(cell, (16, 24, 40, 80, 141))]


TABLES = {
    "| model | GPUs | sent": [times(*of) for of in COUNTS],
    "| model | GPUs | rows x batches": [efficiencies(*of) for of in COUNTS],
    "| model | GPUs | NVLink, million tokens": [
        enough(size, devices) for size in ("124M", "1558M") for devices in (8, 64, 512)
    ],
    "| model | single_gpu": [held(size) for size in SIZES],
    "| rows x batches": [sharded(*of) for of in ((8, 1), (4, 2), (1, 8))],
}


@pytest.mark.parametrize("header", TABLES)
def test_the_page_says_what_is_computed(header):
    assert table(PAGE, header) == TABLES[header]


def test_the_page_measured_what_is_computed():
    """Rows: what, processes, batches, gradient, computed MB, MB on the wire."""
    shape, found = Shape(4, 256, 4, 4096, 128), table(PAGE, "| measured")
    assert len(found) >= 8
    for what, processes, batches, gradient, computed, on_the_wire in found:
        sent = traffic(
            shape, topology="fsdp2" if "FSDP2" in what else "ddp", devices=int(processes),
            accumulation=int(batches),
            reduce_bytes={"fp32": 4, "bf16": 2}[gradient] * (2 if "FSDP2" in what else 1),
        )  # fmt: skip
        assert computed == f"{(sent.gathered + sent.reduced) / 1e6:.2f}"
        assert float(computed) == pytest.approx(float(on_the_wire), rel=0.004)


def test_the_page_held_what_is_computed():
    """Bytes a parameter on two processes, in fp32, while batches are added up and afterwards."""
    for name, adding, measured, after, measured_after in table(PAGE, "| held"):
        kind = "none" if name == "single_gpu" else name
        parts = memory_by_part(
            SMALL, rows=1, block_size=1, precision="fp32", topology=kind, devices=2
        )
        held = parts["weights"] + parts["gradients"] + parts["optimizer"]
        held += parts["buffers"] * (kind == "ddp")  # FSDP2's are there during the passes only
        # A gradient that was whole becomes a part of one: the bound has both.
        expected = held - 4 * COUNT / 2 if kind == "fsdp2" else held
        reduced = held - 4 * COUNT if kind in ("ddp", "fsdp2") else held
        assert [float(adding), float(after)] == [expected / COUNT, reduced / COUNT]
        assert float(adding) == pytest.approx(float(measured), rel=0.04)
        assert float(after) == pytest.approx(float(measured_after), rel=0.04)


def test_the_readme_says_which_config_to_take():
    header = "| model | GPUs | 16 GB"
    assert table(ROOT / "README.md", header) == [topology(s, n) for s in SIZES for n in (1, 8)]
