"""What runs are told of themselves: when, how often, with what numbers, and after a resume."""

import json
import logging
import math

import pytest
import torch
from conftest import make_texts
from runs import assert_ended_the_same, cut_back, made, trained
from transformers import TrainerCallback

from pipeline import artifact, pretrain
from pipeline.gap import Verdict
from pipeline.guard import DeviceWindow, Guard
from pipeline.model_card import model_card
from pipeline.notices import Notices
from pipeline.optimizer import Muon
from pipeline.recipe import InputError, read_recipe
from pipeline.report_page import run_page
from pipeline.run_record import read_checkpoint, read_run
from pipeline.safety_sections import GuardSection

# -- by table -------------------------------------------------------------------------------------


def watching(told=None, *, before=None, is_fresh=True, warmup=0, **section):
    told = [] if told is None else told
    return Notices(
        GuardSection(**({"spike_window": 20} | section)),
        vocabulary=512, is_fresh=is_fresh, warmup_updates=warmup, before=before,
        tell=lambda notice, sentence: told.append((notice["notice"], notice["update"], sentence)),
    )  # fmt: skip


def noticed(losses, norms=None, **section):
    """Return (symptom, update) of what is said of a run."""
    told = []
    notices = watching(told, **section)
    for step, loss in enumerate(losses, start=1):
        notices.update(step, loss=loss, norm=1.0 if norms is None else norms[step - 1])
    return [one[:2] for one in told]


CALM = [3.0 + 0.1 * math.sin(n) for n in range(200)]


def with_spikes(*updates, height=5.0, of=CALM):
    return [height if n in updates else value for n, value in enumerate(of, start=1)]


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        (CALM, []),
        ([3.0] * 200, []),
        ([6.0 - 0.02 * n for n in range(200)], []),
        (with_spikes(10), []),  # half a window is not yet there
        (with_spikes(11), [("spike", 11)]),
        (with_spikes(20, height=1.0), []),
        (with_spikes(40, height=3.41), []),  # 6 deviations of a sine's 0.0707 are 0.424
        (with_spikes(40, height=3.45), [("spike", 40)]),
        (with_spikes(20, of=[3.0] * 200, height=3.01), []),
        (with_spikes(20, of=[3.0] * 200, height=3.02), [("spike", 20)]),
        (with_spikes(20, 30), [("spike", 20)]),  # said once
        (with_spikes(20, 60, 100, 140), [("spike", n) for n in (20, 60, 140)]),  # 1st, 2nd, 4th
    ],
)
def test_spikes(losses, found):
    assert noticed(losses) == found
    assert noticed(losses, spike_sigmas=0) == []
    assert noticed([3.0] * len(losses), losses, spike_sigmas=0, norm_growth=0) == []


def test_norms_spike_at_three_times_their_mean():
    assert noticed(CALM, with_spikes(20, height=2.9, of=[1.0] * 200)) == []
    assert noticed(CALM, with_spikes(20, height=3.1, of=[1.0] * 200)) == [("spike", 20)]
    # What the gradient scaler has skipped says nothing of the norm.
    assert noticed(CALM, with_spikes(20, height=math.inf, of=[1.0] * 200)) == []


@pytest.mark.parametrize(
    ("norms", "section", "found"),
    [
        ([1.0] * 96, {}, []),
        ([1.02**n for n in range(160)], {}, [("growing_norms", 120)]),  # 20 updates: 1.49 times
        ([1.02**n for n in range(160)], {"norm_growth": 0}, []),
        ([1.02**n for n in range(160)], {"norm_growth": 2}, [("growing_norms", 60)]),
        ([9.0] * 40 + [1.0] * 20 + [9.0] * 20, {"warmup": 60}, []),
        ([9.0] * 40 + [1.0] * 20 + [9.0] * 20, {"spike_sigmas": 0}, [("growing_norms", 80)]),
    ],
)
def test_growing_norms(norms, section, found):
    said = noticed([3.0] * len(norms), norms, **section)
    assert [one for one in said if one[0] != "spike"] == found


def test_stuck_and_diverged():
    guess = math.log(512)
    assert noticed([guess] * 150, spike_window=32) == [("stuck", 100)]
    assert noticed([guess] * 150, stuck_updates=40, spike_window=32) == [("stuck", 40)]
    assert noticed([guess] * 150, is_fresh=False, spike_window=32) == []
    assert noticed([guess] * 50 + [5.0] * 70, spike_window=32) == []
    assert noticed([70.0] * 150, spike_window=32) == [("diverged", 20)]
    assert noticed([70.0] * 150, stuck_updates=0, spike_window=32) == []


def test_overfitting_is_said_when_it_begins():
    told = []
    notices = watching(told)
    for step, kind in enumerate(
        ["unknown", "improving", "overfitting", "overfitting", "flat", "overfitting"], start=1
    ):
        notices.evaluated(step, Verdict(kind, "", f"seen at {step}"))
    assert [one[1] for one in told] == [3, 6]
    first, again = (one[2] for one in told)
    assert first.startswith("update 3: seen at 3\n  likely, in this order:\n  - too little text (")
    assert again.startswith("update 6: again, seen at 6\n")
    watching(told, gap=False).evaluated(9, Verdict("overfitting", "", "seen"))
    assert len(told) == 2


def test_a_message_has_numbers_causes_and_keys():
    told = []
    notices = watching(told, skip_spikes=True)
    skipped = []
    for step, loss in enumerate(with_spikes(20), start=1):
        skipped.append(notices.update(step, loss=loss, norm=1.0))
    assert [n for n, one in enumerate(skipped, start=1) if one] == [20] and notices.skipped == 1
    ((_, _, sentence),) = told
    first, second, *listed = sentence.split("\n")
    assert first.startswith("update 20: the loss is 5, 28.4 ")
    assert first.endswith("standard deviations above the mean before (3); the update was not made")
    assert second == "  likely, in this order:" and "prepare_data.py --show" in listed[0]
    assert "training.learning_rate x 0.1" in listed[1]


def test_a_state_is_all_that_it_takes_to_go_on():
    losses = with_spikes(20, 28, 60, 100, 140)
    norms = [1.02**n for n in range(len(losses))]
    straight = []
    whole = watching(straight)
    for step in range(1, 151):
        whole.update(step, loss=losses[step - 1], norm=norms[step - 1])
    for cut in (5, 19, 20, 25, 61, 120):
        said = []
        part = watching(said)
        for step in range(1, 151):
            part.update(step, loss=losses[step - 1], norm=norms[step - 1])
            if step == cut:
                part = watching(said, before=json.loads(json.dumps(part.state())))
        assert said == straight and part.state() == whole.state()


def test_of_equal_spikes_in_a_row_four_are_skipped():
    """They stay in the window: of n values of which k are equal spikes, z is at most sqrt(n/k)."""
    notices = watching(skip_spikes=True, spike_window=128)
    losses = CALM + [9.0] * 10
    skipped = [notices.update(n, loss=x, norm=1.0) for n, x in enumerate(losses, start=1)]
    assert [n for n, one in enumerate(skipped, start=1) if one] == [201, 202, 203, 204]


# -- updates that are not made --------------------------------------------------------------------


def optimizers(weights):
    yield torch.optim.AdamW(weights, lr=0.1, weight_decay=0.1, fused=True)
    yield Muon([{
        "params": weights, "parts": 1, "momentum": 0.9, "newton_schulz_steps": 5,
    }], lr=0.1, weight_decay=0.1, fused=True)  # fmt: skip


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("on_device", [False, True])
def test_an_optimizer_makes_nothing_of_a_spike(which, on_device):
    """On a CPU its gradients are dropped; a device is told by `found_inf`, here on the CPU."""
    weights = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(2)]
    optimizer = list(optimizers(weights))[which]
    guard = Guard(process_count=1, notices=watching(skip_spikes=True))

    def update(step, loss):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        if on_device:
            told = guard._told(torch.tensor([0.0, loss, 1.0]), optimizer)
            guard._said(step, told.tolist())
        else:
            guard.look(
                step, loss=torch.tensor(loss), grad_norm=1.0, optimizer=optimizer, is_scaled=False
            )
        before = [w.detach().clone() for w in weights]
        state = [{k: v.clone() for k, v in optimizer.state[w].items()} for w in weights]
        optimizer.step()
        after = [dict(optimizer.state[w].items()) for w in weights]
        is_same = all(map(torch.equal, before, weights)) and all(
            torch.equal(one[k], other[k])
            for one, other in zip(state, after, strict=True) for k in other if k in one
        )  # fmt: skip
        return not is_same

    was_made = [update(step, loss) for step, loss in enumerate(with_spikes(20, 60), start=1)]
    assert [n for n, is_made in enumerate(was_made, start=1) if not is_made] == [20, 60]
    assert guard._notices.skipped == 2


def test_the_device_decides_as_the_host_does():
    source = torch.Generator().manual_seed(0)
    values = torch.randn(400, 2, generator=source) * 0.3 + 4
    values[::17] += 3 * torch.rand(24, 1, generator=source)
    host = watching(skip_spikes=True)
    window = DeviceWindow(watching(skip_spikes=True), torch.device("cpu"))
    decided = []
    for step, pair in enumerate(values, start=1):
        if step == 100:  # as after a resume
            window = DeviceWindow(host, torch.device("cpu"))
        loss, norm = pair.tolist()
        decided.append((host.update(step, loss=loss, norm=norm), bool(window.is_spike(pair))))
    assert all(one == other for one, other in decided) and 3 < sum(one for one, _ in decided) < 40


# -- real runs ------------------------------------------------------------------------------------

SICK = {
    "training__max_steps": 64, "training__save_steps": 20, "training__save_total_limit": 9,
    "training__eval_strategy": "no", "training__logging_steps": 7,
    "training__per_device_train_batch_size": 16, "guards__spike_window": 20,
}  # fmt: skip


def fed(trainer, update):
    """Let the rows of an update be noise, which no model has learnt."""
    step = trainer.training_step

    def training_step(model, inputs, *rest):
        if trainer.state.global_step + 1 == update:
            source = torch.Generator().manual_seed(0)
            ids = torch.randint(0, 384, inputs["input_ids"].shape, generator=source)
            inputs = {**inputs, "input_ids": ids, "labels": ids.clone()}
        return step(model, inputs, *rest)

    trainer.training_step = training_step
    return trainer


class Kept(TrainerCallback):
    """Keeps a weight after each update."""

    def __init__(self) -> None:
        self.weights: dict[int, torch.Tensor] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        self.weights[state.global_step] = model.transformer.wpe.weight.detach().clone()


def notices_of(trainer):
    return [e for e in trainer.state.log_history if "notice" in e]


@pytest.mark.parametrize("skips", [pytest.param(False, marks=pytest.mark.slow), True])
def test_noise_among_the_rows_is_a_spike_also_after_a_resume_within_its_window(
    smoke_recipe, tmp_path, skips, caplog
):
    caplog.set_level(logging.WARNING)
    values = SICK | {"guards__skip_spikes": skips}
    straight = fed(made(smoke_recipe, tmp_path / "straight", **values), 46)
    kept = Kept()
    straight.add_callback(kept)
    trained(straight)
    (notice,) = notices_of(straight)
    assert notice["notice"] == "spike" and notice["update"] == 46
    assert notice["seen"].endswith("; the update was not made") == skips
    assert notice["seen"].startswith("the loss is ")
    assert caplog.text.count("update 46: the loss is ") == 1
    assert torch.equal(kept.weights[45], kept.weights[46]) == skips
    assert not torch.equal(kept.weights[46], kept.weights[47])
    last = straight.state.log_history[-2]
    assert last.get("skipped_updates") == (1 if skips else None)
    cut = cut_back(tmp_path / "straight", tmp_path / "cut", 40)
    resumed = trained(fed(made(smoke_recipe, cut, **values), 46), "auto")
    assert_ended_the_same(straight, resumed)
    facts = [
        artifact.read_manifest(f / "checkpoint-64")["facts"] for f in (tmp_path / "straight", cut)
    ]
    assert facts[0]["guards"] == facts[1]["guards"]
    assert len(facts[0]["guards"]["losses"]) == 20
    again = trained(made(smoke_recipe, cut, **values), "auto")  # which has nothing left to do
    assert notices_of(again) == [notice] and caplog.text.count("update 46: ") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "symptom", "words"),
    [
        (1e-9, "stuck", "too low a rate (training.learning_rate x 10 (find_learning_rate.py))"),
        (1.0, "diverged", "too high a rate (training.learning_rate x 0.1)"),
    ],
)
def test_a_rate_beyond_reason_is_said(smoke_recipe, tmp_path, caplog, rate, symptom, words):
    caplog.set_level(logging.WARNING)
    values = SICK | {"training__learning_rate": rate, "guards__stuck_updates": 40}
    values |= {"training__max_steps": 50}
    trainer = trained(made(smoke_recipe, tmp_path, **values))
    (notice,) = [n for n in notices_of(trainer) if n["notice"] in ("stuck", "diverged")]
    assert notice["notice"] == symptom and "guessing gives ln(" in notice["seen"]
    assert f"update {notice['update']}: the loss is " in caplog.text and words in caplog.text


@pytest.mark.slow
def test_a_text_learnt_by_heart_is_said_once(smoke_recipe, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    for name, seed in (("train", 1), ("other", 2)):
        (tmp_path / f"{name}.txt").write_text("".join(make_texts(4, seed)), encoding="utf-8")
    values = SICK | {
        "data__files": [str(tmp_path / "train.txt")], "tokenizer__vocab_size": 300,
        "data__validation_files": [str(tmp_path / "other.txt")], "data__test_fraction": 0,
        "training__learning_rate": 1e-2,
        "training__max_steps": 120, "training__eval_strategy": "steps", "training__eval_steps": 20,
        "training__save_steps": 120,
    }  # fmt: skip
    trainer = trained(made(smoke_recipe, tmp_path / "run", **values))
    found = [n for n in notices_of(trainer) if n["notice"] == "overfitting"]
    assert len(found) == 1 and "Overfitting: the held-out loss rose from" in found[0]["seen"]
    assert caplog.text.count("likely, in this order:\n  - too little text (more or more") == 1


@pytest.mark.slow
def test_what_was_noticed_is_in_the_report_and_a_healthy_run_has_no_such_part(
    smoke_recipe, finished_run, tmp_path, capsys
):
    assert "What was noticed" not in (finished_run / "report.html").read_text()
    argv = ["--config", str(smoke_recipe), "--training.output_dir", str(tmp_path / "run")]
    argv += ["--training.max_steps", "24", "--training.learning_rate", "1e-9"]
    pretrain.main([*argv, "--guards.stuck_updates", "22"])
    record = read_run(tmp_path / "run")
    (log,) = [log for log in record.history if "notice" in log]
    assert log["update"] == 22
    checkpoint = read_checkpoint(tmp_path / "run", tmp_path / "run" / "checkpoint-24")
    for text in (
        (tmp_path / "run" / "report.html").read_text(),
        (tmp_path / "run" / "README.md").read_text(), model_card(checkpoint), run_page(record),
    ):  # fmt: skip
        assert "What was noticed" in text and "guessing gives ln(" in text
        assert "too low a rate (training" in text


# -- the recipe -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"guards.skip_spikes": "true", "guards.spike_sigmas": "0"}, "needs guards.spike_sigmas"),
        ({"guards.norm_growth": "0.5"}, "guards.norm_growth is a factor above 1, or 0 for off"),
        ({"guards.spike_window": "5"}, "--guards.spike_window: input should be greater than"),
        ({"guards.spike_sigma": "5"}, "did you mean guards.spike_sigmas?"),
    ],
)
def test_wrong_guards_are_one_sentence(smoke_recipe, overrides, words):
    with pytest.raises(InputError) as caught:
        read_recipe(smoke_recipe, overrides)
    assert words in str(caught.value) and "\n" not in str(caught.value)
