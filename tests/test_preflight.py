"""What is seen before the first update of every run stops what cannot work, and changes no bit."""

import functools
import json
import logging
import math
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from runs import assert_ended_the_same, trained
from test_trainer import make_trainer

from pipeline import cheap_checks, findings, preflight, pretrain
from pipeline.findings import Finding
from pipeline.recipe import InputError, read_recipe
from pipeline.report_parts import run_parts
from pipeline.run_folder import read_status
from pipeline.run_record import read_run
from pipeline.safety_sections import CHECKS
from pipeline.wording import storage

GB = 10**9


@pytest.fixture(scope="module")
def trainer(smoke_recipe, tmp_path_factory):
    """A trainer that no check changes."""
    return make_trainer(smoke_recipe, tmp_path_factory.mktemp("run"))


@pytest.fixture
def said(caplog):
    """What was shown."""
    caplog.set_level(logging.INFO, "pipeline")
    return lambda: "\n".join(caplog.messages)


def flat(text: str) -> str:
    """Return a text on one line."""
    return " ".join(text.split())


def run(recipe: Path, folder: Path, *more: str) -> None:
    pretrain.main(["--config", str(recipe), "--training.output_dir", str(folder), *more])


SHORT = ["--training.max_steps", "4", "--training.eval_steps", "4", "--training.save_steps", "4"]


# -- the lines ------------------------------------------------------------------------------------


def test_every_run_shows_what_is_cheap_to_see(smoke_recipe, tmp_path, said):
    run(smoke_recipe, tmp_path / "run", *SHORT)
    lines = [line.split()[:2] for line in said().splitlines() if line.startswith("✓")]
    names = ["recipe", "resume", "initial_loss", "memory", "disk", "tokens", "evaluation"]
    assert lines == [["✓", name] for name in names]
    assert "fresh:" in said() and "ln(512) is 6.238" in flat(said())
    kept = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert list(kept) == names and kept["tokens"]["mark"] == "well"
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["preflight_accepted"] == {}
    assert "Accepted" not in [part.title for part in run_parts(read_run(tmp_path / "run"))]


def test_a_run_that_goes_on_says_from_where_and_keeps_what_was_seen(smoke_recipe, tmp_path, said):
    run(smoke_recipe, tmp_path / "run", *SHORT)
    first = json.loads((tmp_path / "run" / "preflight.json").read_text())
    longer = ["--training.max_steps", "6", *SHORT[2:]]
    run(smoke_recipe, tmp_path / "run", *longer)
    assert f"goes on from {tmp_path / 'run' / 'checkpoint-4'}, after update 4 of 6" in flat(said())
    kept = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert kept["initial_loss"] == first["initial_loss"] and kept["resume"] != first["resume"]


def test_marks_and_what_to_do(said, monkeypatch):
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(encoding="utf-8"))
    findings.say(Finding("initial_loss", "9 nats"), [])
    findings.say(Finding("initial_loss", "9 nats", "see to it"), [])
    findings.say(Finding("initial_loss", "9 nats", "see to it"), ["initial_loss"])
    findings.say(Finding("hub", "is away", "start later"), ["initial_loss"])
    findings.say(Finding("speed", "not measured", is_judged=False), [])
    assert said().splitlines() == [
        "✓ initial_loss  9 nats",
        "✗ initial_loss  9 nats",
        "                see to it, or accept it with --preflight.accept initial_loss",
        "⚠ initial_loss  9 nats (accepted: preflight.accept)",
        "✗ hub           is away",
        "                start later",
        "· speed         not measured",
    ]


def test_a_screen_without_the_signs_gets_ascii(said, monkeypatch):
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(encoding="ascii"))
    findings.say(Finding("rows", "façade", shown="│ 東京"), [])
    findings.say(Finding("disk", "full", "make room"), ["disk"])
    assert said().splitlines() == [
        "+ rows          fa\\xe7ade",
        "  \\u2502 \\u6771\\u4eac",
        "! disk          full (accepted: preflight.accept)",
    ]


def test_what_fails_stops_the_run_in_one_sentence():
    failing = [Finding("memory", "too much", "less"), Finding("hub", "away", "later")]
    well = [Finding("tokens", "2 each"), Finding("speed", "none", is_judged=False)]
    findings.judge(well, [])
    findings.judge([*failing[:1], *well], ["memory"])
    with pytest.raises(InputError) as caught:
        findings.judge([*failing, *well], [])
    assert str(caught.value) == "preflight: memory: too much; less; hub: away; later"
    with pytest.raises(InputError) as caught:
        findings.judge([failing[0], Finding("disk", "full", "make room")], ["labels"])
    assert str(caught.value) == (
        "preflight: memory: too much; less; disk: full; make room, or accept them with "
        "--preflight.accept labels memory disk"
    )


def test_no_bit_of_a_run_changes_by_what_is_seen(smoke_recipe, tmp_path):
    """With dropout, so that a random number that is drawn would show."""
    more = {"model__config__resid_pdrop": 0.1, "training__max_steps": 6, "training__eval_steps": 3,
            "training__save_steps": 3, "training__logging_steps": 1}  # fmt: skip
    plain = trained(make_trainer(smoke_recipe, tmp_path / "plain", **more))
    seen = make_trainer(smoke_recipe, tmp_path / "seen", **more)
    trained(seen, look=lambda found: preflight.look(seen, found))
    assert seen.seen["initial_loss"]["mark"] == "well"
    assert_ended_the_same(plain, seen)


# -- initial loss ---------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [257, 2048, 50257])
@pytest.mark.parametrize(
    ("above", "words"),
    [
        (0.0, None), (0.49, None), (-0.14, None),
        (0.51, "weights begin too large; see to model.config.initializer_range (GPT-2's is 0.02)"),
        (-0.16, "it knows what it cannot know yet: see with --dry_run whether the labels are one"),
        (math.nan, "the weights that the run begins with give no number: see to model"),
        (math.inf, "give no number"),
    ],
)  # fmt: skip
def test_a_fresh_models_loss(vocabulary, above, words):
    finding = cheap_checks.judged_loss(math.log(vocabulary) + above, vocabulary=vocabulary)
    assert (words in finding.remedy) if words else not finding.remedy
    assert f"ln({vocabulary:,}) is {math.log(vocabulary):.3f}" in finding.text


def test_a_pretrained_models_loss():
    given = {"vocabulary": 512, "pretrained": "gpt2"}
    assert cheap_checks.judged_loss(3.2, **given) == Finding(
        "initial_loss", "3.200 nats per token; ln(512) is 6.238, and gpt2 is below"
    )
    assert "gpt2 knows no more than nothing: see whether its weights are whole, and whether " in (
        cheap_checks.judged_loss(6.3, **given).remedy
    )


def test_weights_that_begin_too_large_stop_a_run_or_are_accepted(smoke_recipe, tmp_path, said):
    scaled = [*SHORT, "--model.config.initializer_range", "0.5"]
    with pytest.raises(InputError) as caught:
        run(smoke_recipe, tmp_path / "run", *scaled)
    words = str(caught.value)
    assert words.startswith("preflight: initial_loss: ") and "\n" not in words
    assert words.endswith("(GPT-2's is 0.02), or accept it with --preflight.accept initial_loss")
    assert "✗ initial_loss" in said() and "✓ evaluation" in said()  # all is shown before
    assert read_status(tmp_path / "run")["state"] == "failed"
    assert not (tmp_path / "run" / "config.yaml").exists()

    run(smoke_recipe, tmp_path / "run", *scaled, "--preflight.accept", "initial_loss")
    assert "⚠ initial_loss" in said()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert list(metrics["preflight_accepted"]) == ["initial_loss"]
    for name in ("report.html", "README.md"):
        page = (tmp_path / "run" / name).read_text()
        assert "Before the first update this failed, and the recipe accepts it" in page
        assert "nats per token; ln(512) is 6.238" in page
    # Of a run that is not finished, too.
    (tmp_path / "run" / "metrics.json").unlink()
    parts = run_parts(read_run(tmp_path / "run"))
    assert parts[0].title == "Accepted" and parts[0].is_warning
    assert parts[0].sentences[1].startswith("initial_loss: ")


def test_a_run_that_is_not_begun_removes_none(smoke_recipe, run_copy, said):
    before = (run_copy / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="preflight: initial_loss: "):
        run(smoke_recipe, run_copy, "--model.config.initializer_range", "0.5", "--overwrite")
    assert (run_copy / "model.safetensors").read_bytes() == before
    assert read_status(run_copy)["state"] == "finished"


def test_what_is_accepted_is_named_as_it_is_called(smoke_recipe):
    with pytest.raises(InputError) as caught:
        read_recipe(smoke_recipe, {"preflight.accept": ["memory", "initial_los"]})
    words = str(caught.value)
    assert words.startswith("--preflight.accept: input should be 'labels', ")
    assert "got 'initial_los'" in words
    assert all(f"'{name}'" in words for name in CHECKS) and "\n" not in words
    for given in ("memory,disk", ["memory", "disk"]):
        accept = read_recipe(smoke_recipe, {"preflight.accept": given}).preflight.accept
        assert accept == ["memory", "disk"]


def test_what_only_a_dry_run_sees_stands_in_the_report_if_it_is_accepted(smoke_recipe, tmp_path):
    trainer = make_trainer(smoke_recipe, tmp_path, preflight__accept="overfitting,memory")
    preflight.look(trainer, None)
    assert trainer.seen["overfitting"] == {
        "mark": "accepted", "finding": "not looked at but by --dry_run"
    }  # fmt: skip
    assert trainer.seen["memory"]["mark"] == "well"


# -- memory, disk, tokens, evaluations ------------------------------------------------------------


def test_a_batch_that_does_not_fit(trainer, monkeypatch):
    monkeypatch.setattr("pipeline.machine.held_memory", lambda device: 400_000_000)
    monkeypatch.setattr("pipeline.machine.free_memory", lambda device: GB)
    batch = cheap_checks.batch_memory(trainer)
    least, most = batch.least_bytes(8), batch.peak_bytes(8)
    assert least < most < 1.4 * GB / 0.9
    assert cheap_checks.memory(trainer).text == (
        f"about {storage(most)} at the most; 1.40 GB are there on cpu"
    )
    monkeypatch.setattr("pipeline.machine.free_memory", lambda device: most - 400_000_000)
    assert cheap_checks.memory(trainer).text.endswith("on cpu, which may not be enough")
    monkeypatch.setattr(trainer.args, "per_device_train_batch_size", 8192)
    room = int(batch._replace(is_accumulating=True).peak_bytes(1024) / 0.9) + 1_000 - 400_000_000
    monkeypatch.setattr("pipeline.machine.free_memory", lambda device: room)
    assert cheap_checks.memory(trainer).remedy == (
        "1024 rows at once fit (--training.per_device_train_batch_size 1024, the update stays the "
        "same); --training.gradient_checkpointing true keeps less for the backward pass"
    )
    monkeypatch.setattr(trainer.args, "per_device_train_batch_size", 8)
    monkeypatch.setattr("pipeline.machine.free_memory", lambda device: 10_000)
    finding = cheap_checks.memory(trainer)
    assert finding.text == (f"at least {storage(least)} are needed, and 400 MB are there on cpu")
    assert finding.remedy == (
        "not even one row at once fits: take a smaller model.config or data.block_size; "
        "--training.gradient_checkpointing true keeps less for the backward pass"
    )


def test_free_memory_is_below_what_the_machine_has():
    from pipeline import machine

    free = machine.free_memory(torch.device("cpu"))
    assert 0 < free < machine.hardware()["memory_bytes"]
    assert 100e6 < machine.held_memory(torch.device("cpu")) < machine.hardware()["memory_bytes"]


def test_a_full_disk_is_seen_before_it_is_full(trainer, smoke_recipe, tmp_path, monkeypatch):
    assert not cheap_checks.disk(trainer, None).remedy
    little = shutil._ntuple_diskusage(9_999, 0, 1_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: little)
    finding = cheap_checks.disk(trainer, None)
    assert "the checkpoints that the recipe wants need" in finding.text
    assert finding.remedy.startswith("make room, lower training.save_total_limit, or choose")
    with pytest.raises(InputError, match=r"preflight: disk: .*preflight.accept disk$"):
        run(smoke_recipe, tmp_path / "run", *SHORT)


def test_a_full_disk_can_be_accepted(smoke_recipe, tmp_path, monkeypatch):
    trainer = make_trainer(smoke_recipe, tmp_path, training__max_steps=1, preflight__accept="disk")
    little = shutil._ntuple_diskusage(9_999, 0, 1_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: little)
    trained(trainer, look=lambda found: preflight.look(trainer, found))
    assert trainer.seen["disk"]["mark"] == "accepted" and trainer.state.global_step == 1


def test_tokens_of_each_parameter(trainer):
    text = cheap_checks.tokens(trainer).text
    assert text.startswith("10.2 k / 42.9 k parameters = 0.239 each: ")
    assert "compute-optimal for this size (20 per parameter" in text


def test_evaluations_that_cost_more_than_the_training():
    judged = functools.partial(cheap_checks.judged_evaluation, how="by their products")
    assert judged(0, 5, 10, seconds=1).text == "none while training"
    assert (
        judged(10, 1, 90, seconds=1).text == "10 while training, 10.0% of the run by their products"
    )
    assert not judged(10, 10, 10, seconds=5.9).remedy  # nobody waits long for it
    finding = judged(10, 10, 10, seconds=60)
    assert finding.text == ("10 while training, 90.9% of the run by their products, 10 min or more")
    assert finding.remedy == (
        "more than half: lower evaluation.tokens, or evaluate after more updates "
        "(training.eval_steps)"
    )


@pytest.mark.parametrize(
    ("values", "step", "count"),
    [
        ({}, 0, 2), ({}, 10, 1), ({}, 20, 0), ({"eval_on_start": True}, 0, 3),
        ({"eval_on_start": True}, 10, 1), ({"eval_strategy": "no"}, 0, 0),
        ({"eval_steps": 0.25}, 0, 4), ({"eval_steps": 7}, 7, 1),
    ],
)  # fmt: skip
def test_how_often_held_out_text_is_measured(trainer, monkeypatch, values, step, count):
    for name, value in values.items():
        monkeypatch.setattr(trainer.args, name, value)
    assert trainer.evaluations_left(step) == count
