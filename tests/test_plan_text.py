"""A plan is read in a terminal of 80 columns, whatever it is of; its picture says the same."""

import json
import shlex
import xml.etree.ElementTree as tree

import pytest
from conftest import ROOT
from ladders import ladder, write_metrics

from pipeline import plan, scaling_laws
from pipeline.batch_memory import Batch
from pipeline.plan_picture import PART_COLOURS
from pipeline.planning import SIZES
from pipeline.recipe import InputError

RECIPES = ROOT / "recipes"
SMALL = RECIPES / "gpt2_small.yaml"


@pytest.fixture
def ask(tmp_path, capsys):
    """Ask the door; return its text and its JSON."""

    def ask(*argv) -> tuple[str, dict]:
        plan.main([*map(str, argv), "--json", str(tmp_path / "plan.json")])
        return capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())

    return ask


def in_one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture
def rungs(tmp_path):
    """A ladder of fifteen runs; their folders."""
    runs = ladder(noise=0.004, seed=2)
    return [write_metrics(tmp_path / f"r{n}", run).parent for n, run in enumerate(runs)]


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("--config", SMALL, "--hardware", "512xh100", "--price_per_hour", "2.5"),
        ("--config", SMALL, "--hardware", "t4", "--training.max_steps", "1000000000000"),
        ("--config", RECIPES / "gpt2_xl.yaml", "--hardware", "7xa100", "--topology", "fsdp2"),
        ("--budget", "16xh100 3d", "--recipe", "budget.yaml"),
        ("--budget", "cpu 3h", "--recipe", "budget.yaml"),
    ],
    ids=lambda argv: " ".join(map(str, argv[2:4])),
)
def test_no_line_is_longer_than_a_terminal(ask, argv, tmp_path):
    text, _ = ask(*(tmp_path / one if one == "budget.yaml" else one for one in argv))
    said = [line for line in text.splitlines() if str(tmp_path) not in line]
    assert max(map(len, said)) <= 80


def test_a_launch_line_is_pasted_whole(ask, tmp_path):
    text, answered = ask("--budget", "16xh100 3d", "--recipe", tmp_path / "a.yaml")
    shown = text.split("launch it with\n")[1].replace("\\\n", " ").splitlines()
    assert [shlex.split(line) for line in shown] == [
        shlex.split(line) for line in answered["commands"]
    ]


def test_laws_are_shown_with_their_constants(ask):
    text, found = ask("--config", SMALL, "--hardware", "8xh100")
    said, laws = in_one_line(text), found["laws"]
    assert scaling_laws.WHY_BOTH == laws["why_both"] and laws["why_both"] in said
    for name, one in laws["predictions"].items():
        assert f"loss, {name} {one['loss']:.3f}; {one['validity']} {one['law']} (" in said
        assert one["source"] in said
    assert laws["predictions"]["fitted again"]["constants"] == {
        "E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658
    }  # fmt: skip
    inside, tokens = found["parameters_without_embeddings"], found["work"]["tokens"]
    alone = {"N": (8.8e13 / inside) ** 0.076, "D": (5.4e13 / tokens) ** 0.095}
    for of, loss in alone.items():
        assert laws["predictions"][f"Kaplan L({of})"]["loss"] == pytest.approx(loss)
    for name, one in laws["optima"].items():
        assert one["constants"] and one["law"] in said, name
    assert laws["optima"]["2: isoFLOP curves"]["constants"]["exponent"] == 0.49


def test_an_end_beyond_the_calendar(ask):
    text, _ = ask("--config", SMALL, "--hardware", "t4", "--training.max_steps", 10**12)
    assert "begun now it ends after the year 9999; compiling" in in_one_line(text)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--training.per_device_train_batch_size 0", "must be at least 1; got 0"),
        ("--training.per_device_train_batch_size -2", "must be at least 1; got -2"),
        ("--training.eval_steps -1", "must be above 0; got -1.0"),
        ("--training.max_steps -5", "must be at least 1; got -5"),
        ("--model.config.n_inner 0", "must be at least 1; got 0"),
        ("--model.config.n_inner -4", "must be at least 1; got -4"),
    ],
)
def test_numbers_beyond_their_limits(ask, rungs, option, said):
    name = option.split()[0].removeprefix("--")
    for others in ([], ["--fit", *rungs, "--config", RECIPES / "quickstart.yaml"]):
        with pytest.raises(InputError) as refusal:
            ask(*option.split(), *others)
        assert str(refusal.value) == f"{name}: {said}"


# -- pictures -------------------------------------------------------------------------------------


def test_every_part_of_the_memory_has_a_colour_of_its_own():
    parts = set()
    for kind, topology, optimizer in (
        ("cpu", "none", "muon"), ("cpu", "ddp", "adamw"), ("cuda", "fsdp2", "adamw"),
        ("cuda", "zero3", "adamw"),
    ):  # fmt: skip
        batch = Batch(SIZES["124M"], 1024, "bf16", topology, 2, kind, optimizer, 1.0,
                      is_accumulating=True)  # fmt: skip
        for rows in (1, 8, 64):
            parts |= {name for name, size in batch.held(rows)[1].items() if size}
    assert parts | {"work"} == set(PART_COLOURS)
    assert len(set(PART_COLOURS.values())) == len(PART_COLOURS)


def test_a_picture_says_that_it_does_not_fit_and_how_long_it_takes(ask, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("matplotlib").rcParams, "svg.fonttype", "none")
    ask(
        "--config", SMALL, "--hardware", "t4", "--training.max_steps", 10**8,
        "--training.per_device_train_batch_size", 64, "--picture", tmp_path / "a.svg",
    )  # fmt: skip
    text = "\n".join(tree.parse(tmp_path / "a.svg").getroot().itertext())
    assert "of 16.0 GB, an upper bound: DOES NOT FIT" in text
    assert "1,000 d" in text and "10,000 d" in text


@pytest.mark.slow
def test_a_large_recipe_needs_no_machine_to_be_foretold_and_drawn(ask, rungs, tmp_path):
    """Its operations are more than 64 bits count, and it does not fit on this one."""
    text, found = ask(
        "--fit", *rungs, "--leave_out", rungs[-1], "--picture", tmp_path / "law.png", "--config",
        RECIPES / "gpt2_xl.yaml",
    )  # fmt: skip
    here = found["planned"]
    assert here["parameters"] == 1_557_611_200
    assert 6 * here["parameters"] * here["tokens"] > 2**64
    assert here["low"] < here["loss"] < here["high"] and "this recipe 1.56 B" in in_one_line(text)
    assert (tmp_path / "law.png").read_bytes().startswith(b"\x89PNG")
    assert max(map(len, text.splitlines())) <= 80
