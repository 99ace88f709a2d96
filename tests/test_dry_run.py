"""A dry run sees what is broken, leaves nothing behind, and works where a run does."""

import json
import logging
import re
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forked import divide_weights, forked, start_ranks
from loopback_hub import READ, USER, LoopbackHub
from runs import assert_ended_the_same, contents, same, trained
from test_trainer import make_trainer, streamed

from pipeline import checkpoint, dry_run, findings, pretrain, row_text, trial_checks
from pipeline.findings import Finding
from pipeline.guard import NonFinite
from pipeline.options import PretrainOptions
from pipeline.recipe import InputError
from pipeline.row_text import as_text
from pipeline.trainer import PretrainingTrainer
from pipeline.trial import OneBatch

LINES = [
    "recipe", "resume", "rows", "labels", "initial_loss", "gradient", "schedule", "memory", "disk",
    "tokens", "overfitting", "speed", "evaluation",
]  # fmt: skip


@pytest.fixture(scope="module")
def trainer(smoke_recipe, tmp_path_factory):
    """A trainer that no check changes."""
    return make_trainer(smoke_recipe, tmp_path_factory.mktemp("run"))


@pytest.fixture
def said(caplog):
    """What was shown, on one line."""
    caplog.set_level(logging.INFO, "pipeline")
    return lambda: " ".join(" ".join(caplog.messages).split())


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Three updates are timed, however soon they are over."""
    monkeypatch.setattr(trial_checks, "TIMED_SECONDS", 0.0)


def look(recipe: Path, folder: Path, *more: str) -> None:
    pretrain.main(
        ["--config", str(recipe), "--training.output_dir", str(folder), "--dry_run", *more]
    )


def marks(said: str) -> list[str]:
    """Return the names of the lines that are well."""
    return [name for name in LINES if f"✓ {name} " in said]


# -- the folder -----------------------------------------------------------------------------------


def test_all_is_seen_and_nothing_is_there_but_prepared_text(smoke_recipe, tmp_path, said):
    look(smoke_recipe, tmp_path / "run")
    assert marks(said()) == LINES and "✗" not in said()
    assert "nothing is trained" in said() and "attn_implementation: " in said()
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"tokenizer", "blocks", "_digests-blocks.json"}


@pytest.mark.slow
def test_an_unfinished_run_and_its_checkpoints_stay_as_they_are(smoke_recipe, run_copy, said):
    shutil.rmtree(run_copy / "checkpoint-20")
    (run_copy / "metrics.json").unlink()
    (run_copy / "run_status.json").write_text(json.dumps({"state": "preempted"}))
    before = contents(run_copy)
    look(smoke_recipe, run_copy)
    assert contents(run_copy) == before
    assert f"goes on from {run_copy / 'checkpoint-10'}, after update 10 of 20" in said()
    assert "goes on after 10" in said() and "✓ evaluation 1 while training" in said()


@pytest.mark.slow
def test_a_finished_run_is_told(smoke_recipe, run_copy, said):
    before = contents(run_copy)
    look(smoke_recipe, run_copy)
    assert contents(run_copy) == before and marks(said()) == LINES
    assert "the run has finished: after 20 updates nothing is left" in said()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--overwrite"], "--dry_run removes nothing, and --overwrite a run: leave out one of"),
        (["--resume", "hub:a/b@c"], "--dry_run fetches no checkpoint: leave out it or --resume hu"),
        (["--tokens_per_update", "1024"], "holds another run: tokens_per_update: 512 -> 1024"),
        (["--resume", "checkpoint-7"], "--resume checkpoint-7: no such folder; name a whole"),
        (["--dry-run"], "--dry-run: unknown option; did you mean --dry_run?"),
    ],
)
def test_what_a_dry_run_refuses(smoke_recipe, finished_run, more, words):
    with pytest.raises(InputError) as caught:
        look(smoke_recipe, finished_run, *more)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_in_which_a_run_is_at_work_is_refused(smoke_recipe, run_copy):
    from pipeline import locks

    with locks.held(run_copy), pytest.raises(InputError, match="another process is at work in it"):
        look(smoke_recipe, run_copy)


# -- nothing is left of a trial -------------------------------------------------------------------

MORE = {
    "training__max_steps": 6, "training__eval_steps": 3, "training__save_steps": 3,
    "training__logging_steps": 1, "model__config__resid_pdrop": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("optimizer", ["muon", pytest.param("adamw", marks=pytest.mark.slow)])
def test_a_run_after_a_trial_is_the_run_without_one(smoke_recipe, tmp_path, optimizer):
    more = MORE | {
        "training__learning_rate": 0.01,
        "optimizer__name": optimizer,
        "training__per_device_train_batch_size": 4,
    }
    plain = trained(make_trainer(smoke_recipe, tmp_path / "plain", **more))
    tried = make_trainer(smoke_recipe, tmp_path / "tried", **more)
    assert tried.args.gradient_accumulation_steps == 4
    weights = {name: value.clone() for name, value in tried.model.state_dict().items()}
    before = dict(vars(tried)), tried._training_state.random_state()
    noticed = tried._notices.state()
    learnt, _ = trial_checks.overfitting(tried)
    assert not learnt.remedy
    assert tried.tried(lambda update, loss: update == 3).tokens_per_second > 0
    for check in (dry_run.labels, dry_run.gradient, trial_checks.evaluation_seconds):
        check(tried)
    assert same(weights, tried.model.state_dict())
    assert all(p.grad is None for p in tried.model.parameters())
    after = dict(vars(tried)), tried._training_state.random_state()
    assert before[1] == after[1] and tried._notices.state() == noticed
    kept = [name for name in before[0] if name not in ("model_wrapped", "deepspeed")]
    assert all(before[0][name] is after[0][name] for name in kept)
    assert tried.optimizer is None and tried.state.global_step == 0
    trained(tried)
    assert_ended_the_same(plain, tried)


def test_a_trial_that_fails_is_put_back(smoke_recipe, tmp_path):
    trainer = make_trainer(smoke_recipe, tmp_path)
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}

    def fail(update, loss):
        if update == 2:
            raise NonFinite(2)

    with pytest.raises(NonFinite):
        trainer.tried(fail)
    assert same(weights, trainer.model.state_dict()) and trainer.optimizer is None


# -- what is broken -------------------------------------------------------------------------------


def test_labels_that_are_not_shifted(trainer, monkeypatch):
    assert not dry_run.labels(trainer).remedy
    plain = trainer.model.forward

    def forward(input_ids=None, labels=None, **kwargs):
        if labels is None:
            return plain(input_ids, **kwargs)
        logits = plain(input_ids).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return types.SimpleNamespace(loss=loss)

    monkeypatch.setattr(trainer.model, "forward", forward)
    finding = dry_run.labels(trainer)
    assert finding.remedy == (
        "the labels are not one token ahead: see to the model's loss (pipeline/model.py) and its "
        "attention (model.attn_implementation)"
    )


def test_labels_that_are_not_the_tokens(trainer, monkeypatch):
    rows = OneBatch(trainer.train_dataset, 8)
    batch = rows.__getitems__(list(range(8)))
    batch["labels"] = batch["input_ids"].roll(1, dims=1)
    monkeypatch.setattr(type(trainer.train_dataset), "__getitems__", lambda self, indices: batch)
    finding = dry_run.labels(trainer)
    assert finding.text.endswith("labels are not the tokens of their rows")
    assert finding.remedy == "prepare the text anew, in another --training.output_dir"


@pytest.fixture(scope="module")
def apart(smoke_recipe, tmp_path_factory):
    """A trainer whose documents do not see each other."""
    return make_trainer(smoke_recipe, tmp_path_factory.mktemp("run"), data__attend_across=False)


def test_documents_that_are_kept_apart(apart):
    text = dry_run.labels(apart).text
    assert text.endswith("documents are kept apart") and "boundaries in 8 rows: 0" not in text


@pytest.mark.parametrize("what", ["labels", "position_ids"])
def test_documents_that_should_be_apart_and_are_not(apart, monkeypatch, what):
    plain = type(apart.train_dataset).__getitems__

    def joined(self, indices):
        batch = plain(self, indices)
        if what == "labels":
            return batch | {"labels": batch["input_ids"]}
        return batch | {"position_ids": torch.arange(self.block_size).expand(len(indices), -1)}

    monkeypatch.setattr(type(apart.train_dataset), "__getitems__", joined)
    finding = dry_run.labels(apart)
    assert finding.text.endswith("a document is not apart from the one before") and finding.remedy


def test_a_weight_that_no_gradient_reaches(trainer):
    mlp = trainer.model.transformer.h[1].mlp
    assert dry_run.gradient(trainer).text.startswith("reaches all 28 trained weights; its norm is ")
    hook = mlp.register_forward_hook(lambda module, given, out: out.detach())
    finding = dry_run.gradient(trainer)
    hook.remove()
    assert finding.text == (
        "none reaches 6 of 28 trained weights: transformer.h.1.ln_2.weight, "
        "transformer.h.1.ln_2.bias, transformer.h.1.mlp.c_fc.weight, ..."
    )
    assert finding.remedy.startswith("they would stay as they are: see to the model's forward, or")
    for parameter in trainer.model.parameters():
        parameter.requires_grad_(False)
    trainer.model.transformer.ln_f.weight.requires_grad_(True)
    hook = trainer.model.transformer.ln_f.register_forward_hook(lambda m, given, out: out.detach())
    assert "none reaches 1 of 1 trained weights" in dry_run.gradient(trainer).text
    hook.remove()
    for parameter in trainer.model.parameters():
        parameter.requires_grad_(True)


def test_a_gradient_that_is_not_finite(trainer):
    mlp = trainer.model.transformer.h[1].mlp
    hook = mlp.register_forward_hook(lambda module, given, out: out * float("inf"))
    finding = dry_run.gradient(trainer)
    hook.remove()
    assert (
        finding.text.startswith("its norm is nan, in ") and "see to the weights" in finding.remedy
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "way"), [(1e-6, "raise it tenfold"), (1e-4, "raise it tenfold"), (30, "lower it to a")]
)  # fmt: skip
def test_a_rate_at_which_nothing_is_learnt(smoke_recipe, tmp_path, monkeypatch, rate, way):
    monkeypatch.setattr(trial_checks, "UPDATES", 60)
    trainer = make_trainer(smoke_recipe, tmp_path, training__learning_rate=rate)
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    finding, _ = trial_checks.overfitting(trainer)
    assert (
        finding.text.startswith("one batch of 256 tokens: loss 6.") and "in 59 up" in finding.text
    )
    assert f"at a rate of {rate:g}, not to half of it" in finding.text
    assert finding.remedy.startswith(f"see to training.learning_rate: {way}")
    assert same(weights, trainer.model.state_dict())


def test_what_the_losses_of_one_batch_say():
    judged = trial_checks.judged_losses
    given = {"tokens": 256, "rate": 0.01}
    well = judged([6.0, 4.0, 3.0], **given)
    assert well == Finding(
        "overfitting",
        "one batch of 256 tokens: loss 6.000 to 3.000 in 2 updates at a rate of 0.01; all is put "
        "back",
    )
    slow = judged([6.0, 5.0], **given, lasted=61.0)
    assert not slow.is_judged and slow.text.endswith("and no more after 1 min 1 s: not judged")
    broken = judged([6.0, 50.0], **given, broke="; update 3 was not made: ...")
    assert "not to half of it; update 3 was not made" in broken.text
    assert broken.remedy == "see to training.learning_rate: lower it to a tenth"
    assert judged([6.0, float("nan")], **given).remedy.endswith("lower it to a tenth")
    assert judged([], **given, broke="; it broke").remedy.endswith("lower it to a tenth")


def test_what_fails_is_exit_code_2_after_all_lines(smoke_recipe, tmp_path, said, monkeypatch):
    monkeypatch.setattr(
        trial_checks, "overfitting", lambda trainer: (Finding("overfitting", "no", "do"), 1e6)
    )
    with pytest.raises(InputError) as caught:
        look(smoke_recipe, tmp_path, "--model.config.initializer_range", "0.5")
    words = str(caught.value)
    assert words.startswith("preflight: initial_loss: ") and words.endswith(
        "; overfitting: no; do, or accept them with --preflight.accept initial_loss overfitting"
    )
    assert "✗ initial_loss" in said() and "✗ overfitting" in said() and "✓ speed" in said()
    accepted = ["--preflight.accept", "initial_loss", "overfitting"]
    look(smoke_recipe, tmp_path, "--model.config.initializer_range", "0.5", *accepted)
    assert "⚠ overfitting no (accepted: preflight.accept)" in said()


def test_what_does_not_fit_is_not_tried(smoke_recipe, tmp_path, said, monkeypatch):
    monkeypatch.setattr("pipeline.machine.free_memory", lambda device: 0)
    monkeypatch.setattr("pipeline.machine.held_memory", lambda device: 1_000_000)
    monkeypatch.setattr(PretrainingTrainer, "tried", lambda *given, **more: pytest.fail("tried"))
    with pytest.raises(InputError, match="^preflight: memory: at least .* --preflight.accept mem"):
        look(smoke_recipe, tmp_path)
    assert "· overfitting not tried: the memory does not suffice" in said()
    assert "· speed not tried" in said() and "✓ evaluation" in said()


def test_memory_that_is_gone_while_trying_is_told_with_all_the_rest(trainer, monkeypatch):
    def full(given):
        raise MemoryError

    monkeypatch.setattr(trial_checks, "overfitting", full)
    seen = []
    trial_checks.see_all(trainer, None, seen.append)
    (finding,) = seen
    assert finding.name == "speed" and "memory" in finding.text and finding.remedy


# -- the Hub --------------------------------------------------------------------------------------


def test_the_hub_is_asked_and_nothing_is_made_there(smoke_recipe, tmp_path, said, monkeypatch):
    push = ["--training.push_to_hub", "true", "--training.hub_model_id", f"{USER}/run"]
    quick = ["--preflight.accept", "overfitting", "--training.learning_rate", "0.01"]
    with LoopbackHub() as running:
        running.seen_by(monkeypatch)
        look(smoke_recipe, tmp_path / "run", *push, *quick)
        assert f"✓ hub reached as {USER}: " in said() and f"{USER}/run will be made" in said()
        assert not running.repositories and {one["method"] for one in running.log} == {"GET"}
        running.seen_by(monkeypatch, token=READ)
        with pytest.raises(InputError, match=f"^preflight: hub: {USER}/run: the token may only r"):
            look(smoke_recipe, tmp_path / "run", *push, *quick)
    assert "push" not in " ".join(path.name for path in (tmp_path / "run").iterdir())


# -- every kind of run ----------------------------------------------------------------------------


def run_of(trainer, folder: Path) -> types.SimpleNamespace:
    return types.SimpleNamespace(finished=False, find=lambda: None)


@pytest.fixture(scope="module")
def messages(tmp_path_factory) -> Path:
    """Examples of prompt and completion."""
    path = tmp_path_factory.mktemp("examples") / "examples.jsonl"
    examples = [
        {"prompt": f"the model reads {n} and", "completion": f" learns what comes next {n}."}
        for n in range(200)
    ]
    path.write_text("\n".join(map(json.dumps, examples)))
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "examples",
        "apart",
        pytest.param("stream", marks=pytest.mark.slow),
        pytest.param("lora", marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_run_can_be_looked_at(
    smoke_recipe,
    finished_run,
    tmp_path,
    said,
    messages,
    monkeypatch,
    kind,
):
    make, values = make_trainer, {"training__learning_rate": 0.01}
    if kind == "stream":
        make = streamed
        monkeypatch.setattr("pipeline.preparation.TOKENS_PER_SEGMENT", 32 * 16)
    if kind == "examples":
        values |= {"data__files": str(messages), "data__format": "prompt_completion",
                   "tokenizer__vocab_size": 300}  # fmt: skip
    if kind == "apart":
        values |= {"data__attend_across": False, "training__per_device_train_batch_size": 4}
    if kind == "lora":
        base = shutil.copytree(finished_run, tmp_path / "base")
        monkeypatch.setattr(trial_checks, "UPDATES", 20)
        values |= {"model__config": None, "model__pretrained": str(base), "model__lora_r": 4,
                   "tokenizer__vocab_size": None, "preflight__accept": "overfitting"}  # fmt: skip
    trainer = make(smoke_recipe, tmp_path / "run", **values)
    pusher = types.SimpleNamespace(look=lambda: "")
    with trainer.flowing():
        dry_run.look(trainer, run_of(trainer, tmp_path), pusher, PretrainOptions(dry_run=True))
    # What an adapter makes of a model this small and hardly trained is not half of its loss.
    wanted = [name for name in LINES if name != "overfitting" or kind != "lora"]
    assert marks(said()) == wanted and ("⚠ overfitting" in said()) == (kind == "lora")


@pytest.mark.slow
@pytest.mark.parametrize("is_divided", [False, True])
def test_two_processes_look_together(smoke_recipe, tmp_path, is_divided):
    argv = ["--config", str(smoke_recipe), "--training.output_dir", str(tmp_path / "run"),
            "--training.use_cpu", "true", "--dry_run"]  # fmt: skip
    with forked() as starter:
        hook = (lambda rank: divide_weights()) if is_divided else None
        for more, code in (([], 0), (["--model.config.initializer_range", "0.5"], 2)):
            log = tmp_path / f"log{code}"
            pids = start_ranks(starter, 2, [*argv, *more], log, hook)
            assert [starter.code(pid) for pid in pids] == [code, code]
            words, others = (
                log.with_name(f"{log.name}.0").read_text(),
                log.with_name(f"{log.name}.1"),
            )
            assert words.count("overfitting  ") == 1 and "speed" in words
            assert "✓" not in others.read_text()
        assert words.count("error: preflight: initial_loss: ") == 1
    assert checkpoint.checkpoints(tmp_path / "run") == []


# -- rows as text ---------------------------------------------------------------------------------


def test_rows_stand_above_what_they_predict(trainer, apart):
    shown = as_text(apart.train_dataset, apart.processing_class, 2).splitlines()
    assert max(map(len, shown)) <= 76 + 2
    tokens, predicts = (
        next(line for line in shown if line.startswith(f"  {name}") and "||" in line)
        for name in ("token", "predicts")
    )
    cell = re.compile(r'"(?:[^"\\]|\\.)*"|\|\||-(?= )')
    parts, ahead = ([p for p in cell.findall(line)] for line in (tokens, predicts))
    # The first token of a document is not predicted from the last one's end.
    assert ahead[ahead.index("||") - 1] == "-" and parts.index("||") == ahead.index("||")
    assert parts[1] == ahead[0]
    together = as_text(trainer.train_dataset, trainer.processing_class, 3)
    assert together.count("row ") >= 3 and " - " not in together.split("predicts")[1][:40]
    assert len(np.unique(together.splitlines())) > 3


def test_a_line_of_wide_signs_is_as_wide_as_any():
    assert list(row_text._cut("ab" + 5 * "東京", 6)) == ["ab東京", "東京東", "京東京", "東京"]
    assert list(row_text._cut("", 6)) == []


def test_the_schedule_is_drawn_with_its_marks(trainer):
    finding = dry_run.learning_rate(trainer, step=10)
    assert finding.text == "cosine, no warm-up, 20 in all"
    assert "peak 0.001 at update 1" in finding.shown and "goes on after 10" in finding.shown
    assert "0.000106 at the end" in finding.shown
    assert findings.as_seen([finding], []) == {
        "schedule": {"mark": "well", "finding": finding.text}
    }
