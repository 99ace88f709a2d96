"""What may differ between a checkpoint and its run, and that what may not differ does not."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel
from runs import (
    Before,
    assert_ended_the_same,
    contents,
    cut_back,
    logs,
    made,
    rates,
    same,
    trained,
)

from pipeline import artifact, checkpoint, interruption, pretrain, resumption, run_folder
from pipeline.command_line import enter
from pipeline.known_fields import model_config_fields, training_fields
from pipeline.lr_schedule import schedule
from pipeline.recipe import InputError, Recipe, read_recipe
from pipeline.row_order import PLACES_AT_ONCE, RowOrder

# -- the tables -----------------------------------------------------------------------------------


def nested(key, value):
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def change(key, old=1, new=2):
    (found,) = resumption.changes(nested(key, old), nested(key, new))
    assert found.key == key
    return found


def fields(model, prefix=""):
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


NOT_REFUSED = {
    "precision": "applied", "reduce_dtype": "applied", "optimizer.momentum": "applied",
    "optimizer.matrix_rate": "applied",
    "optimizer.newton_schulz_steps": "applied", "data.path": "harmless",
    "model.attn_implementation": "applied",
    "evaluation.texts": "harmless", "schedule": "applied", "evaluation": "applied",
    "guards": "applied",
    "generation": "harmless", "faults": "harmless", "hub": "harmless",
    "preflight": "harmless",
}  # fmt: skip


@pytest.mark.parametrize("key", [*fields(Recipe)])
def test_every_field_of_the_recipe_has_its_class(key):
    expected = NOT_REFUSED.get(key, NOT_REFUSED.get(key.split(".")[0], "refused"))
    assert change(key).kind == expected


REASONS = {
    "data": "the rows are others", "cleaning": "the rows are others",
    "tokenizer": "the same ids mean other text", "model": "the weights are another model's",
    "optimizer": "the state of the optimizer is another one's",
    "tokens_per_update": "an update takes other rows: some would be seen twice, others never",
    "training": "it may change what the run learns",
}  # fmt: skip


@pytest.mark.parametrize("key", [k for k in fields(Recipe) if change(k).kind == "refused"])
def test_what_is_refused_has_a_reason(key):
    assert change(key).reason == REASONS[key.split(".")[0]]


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("training.seed", "the rows come in another order"),
        ("training.data_seed", "the rows come in another order"),
        ("training.optim", "the state of the optimizer is another one's"),
        ("training.optim_args", "the state of the optimizer is another one's"),
        ("training.neftune_noise_alpha", "it may change what the run learns"),
        ("rows", "the rows are others"),
        ("tokenizer_fingerprint", "the same ids mean other text"),
        ("something_new", "it may change what the run learns"),
    ],
)
def test_the_longest_name_gives_the_reason(key, reason):
    assert change(key).kind == "refused" and change(key).reason.startswith(reason)


APPLIED_TRAINING = {
    "per_device_train_batch_size", "per_device_eval_batch_size", "num_train_epochs", "max_steps",
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "tf32", "gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_compile",
    "torch_compile_backend", "torch_compile_mode", "eval_strategy", "eval_steps", "eval_delay",
    "eval_on_start", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "use_cpu",
}  # fmt: skip
HARMLESS_TRAINING = {
    "output_dir", "log_on_each_node", "log_level", "log_level_replica", "disable_tqdm",
    "report_to", "run_name", "project", "save_strategy", "save_steps", "save_total_limit",
    "ddp_timeout", "skip_memory_metrics", "push_to_hub",
}  # fmt: skip


HARMLESS_BEGINNINGS = ("logging_", "trackio_", "dataloader_", "hub_", "torch_empty_cache")


@pytest.mark.parametrize("name", sorted(training_fields()))
def test_known_fields_are_refused_unless_they_are_known(name):
    kind = change(f"training.{name}").kind
    if name in APPLIED_TRAINING or name.startswith("ddp_") and name not in HARMLESS_TRAINING:
        assert kind == "applied"
    elif name in HARMLESS_TRAINING or name.startswith(HARMLESS_BEGINNINGS):
        assert kind == "harmless"
    else:
        assert kind == "refused"


def test_of_the_model_only_dropout_may_change():
    applied = {n for n in model_config_fields() if change(f"model.config.{n}").kind == "applied"}
    assert applied == {"resid_pdrop", "embd_pdrop", "attn_pdrop"}
    others = {change(f"model.config.{n}").kind for n in model_config_fields().keys() - applied}
    assert others == {"refused"}


@pytest.mark.parametrize("key", ["horizon", "processes.count", "threads", "versions.torch"])
def test_the_machine_may_change(key):
    assert change(key).kind == "applied"


def test_a_name_is_its_own_and_that_of_longer_ones_only():
    kinds = [change(key).kind for key in ("scheduled", "training.evaluation", "training.adamant")]
    assert kinds == ["refused"] * 3
    assert change("training.eval_of_another_version").kind == "applied"
    assert change("data_of_another_version").reason == "the rows are others"


def test_a_field_that_came_later_had_its_default(smoke_recipe):
    now = resumption.described(read_recipe(smoke_recipe))
    before = json.loads(json.dumps(now))
    del before["optimizer"], before["data"]["packing"], before["model"]["attn_implementation"]
    found = resumption._with_later_fields(before, Recipe)
    assert resumption.changes(found, now) == []
    del before["data"]["block_size"]  # the smoke recipe states another than the default
    text = [c.text for c in resumption.changes(resumption._with_later_fields(before, Recipe), now)]
    assert text == ["data.block_size: 1024 -> 32"]


def test_all_leaves_that_differ_are_found_and_none_that_are_equal():
    old = {"a": {"b": 1, "c": [1, 2]}, "training": {"seed": 0, "max_steps": 9}, "precision": "x"}
    new = {"a": {"b": 1, "c": [1, 3]}, "training": {"max_steps": 9, "run_name": "r"}}
    found = {c.key: (c.text, c.kind) for c in resumption.changes(old, new)}
    assert found == {
        "a.c": ("a.c: [1, 2] -> [1, 3]", "refused"),
        "training.seed": ("training.seed: 0 -> null", "refused"),
        "training.run_name": ('training.run_name: null -> "r"', "harmless"),
        "precision": ('precision: "x" -> null', "applied"),
    }
    assert resumption.changes(new, new) == []


def test_what_is_allowed_by_name_or_by_section_is_not_refused():
    found = [change(key) for key in ("training.seed", "data.files", "data.separator", "schedule.x")]
    left = [c.key for c in resumption.refused(found, [])]
    assert left == ["training.seed", "data.files", "data.separator"]
    assert [c.key for c in resumption.refused(found, ["data"])] == ["training.seed"]
    assert [c.key for c in resumption.refused(found, ["data.files"])] == [left[0], left[2]]
    assert resumption.refused(found, ["training.seed", "data"]) == []


def test_the_sentence_names_each_change_its_reason_and_the_remedy():
    said = resumption.sentence([change("training.seed"), change("data.files", "a", "b")])
    assert said == (
        "training.seed: 1 -> 2 (the rows come in another order: some would be seen twice, others "
        'never); data.files: "a" -> "b" (the rows are others); to go on all the same add '
        "--allow_change training.seed data.files"
    )


@pytest.mark.parametrize("name", ["training.sed", "training.seeds", "trainin", "seed"])
def test_allowing_what_is_no_field_is_most_likely_misspelt(name):
    found = [change("training.seed"), change("schedule.floor"), change("data.files")]
    resumption.check_allowed(found, ["training.seed", "data", "training"])
    resumption.check_allowed(found, ["cleaning.shortest"], ["cleaning.shortest"])
    resumption.check_allowed(found, ["training.learning_rate"])  # which no recipe need state
    with pytest.raises(InputError) as caught:
        resumption.check_allowed(found, ["data", name])
    assert str(caught.value) == (
        f"--allow_change {name}: there is no such field; what is refused: data.files, training.seed"
    )


# -- exactness ------------------------------------------------------------------------------------

BASE = {
    "training__max_steps": 12, "training__save_steps": 4, "training__eval_steps": 4,
    "training__logging_steps": 3, "training__save_total_limit": 6,
    "training__per_device_train_batch_size": 16, "model__config__resid_pdrop": 0.1,
}  # fmt: skip
# 7 updates an epoch.
EPOCHS = {
    "tokens_per_update": 32 * 48, "training__per_device_train_batch_size": 24,
    "training__max_steps": None, "training__num_train_epochs": 2, "training__eval_steps": 5,
}  # fmt: skip
BY_EPOCH = {"save_strategy": "epoch", "eval_strategy": "epoch", "logging_strategy": "epoch"}
BY_EPOCH = {f"training__{name}": value for name, value in BY_EPOCH.items()}
UNTIL_IT_GETS_WORSE = {
    "training__learning_rate": 3.0, "training__max_grad_norm": 0, "training__eval_steps": 2,
    "training__save_steps": 2, "training__load_best_model_at_end": "true",
    "schedule__warmup_steps": 6, "evaluation__early_stopping_patience": 3,
}  # fmt: skip
COMPILED = {"training__torch_compile": "true", "training__torch_compile_backend": "aot_eager"}

# Overrides, and after which update the newest checkpoint was made.
EXACT = {
    "a logged window begins before the checkpoint": ({}, [8]),
    "accumulated": ({"training__per_device_train_batch_size": 8}, [8]),
    "a window longer than between checkpoints": ({"training__logging_steps": 9}, [8]),
    "nothing logged": ({"training__logging_strategy": "no"}, [8]),
    "never evaluated": ({"training__eval_strategy": "no"}, [8]),
    "evaluated elsewhere": ({"training__eval_steps": 3}, [8]),
    "evaluated before": ({"training__eval_on_start": "true"}, [8]),
    "not clipped": ({"training__max_grad_norm": 0}, [8]),
    "in the first and second epoch": ({**EPOCHS, "training__save_steps": 5}, [5, 10]),
    "at an epoch's end": ({**EPOCHS, "training__save_steps": 7}, [7]),
    "epoch and a half": ({**EPOCHS, "training__num_train_epochs": 1.5}, [4]),
    "all by epoch": ({**EPOCHS, **BY_EPOCH}, [7]),
    "saved by steps, the rest by epoch": (
        {**EPOCHS, **BY_EPOCH, "training__save_strategy": "steps", "training__save_steps": 7}, [7],
    ),
    "sgd": ({"training__optim": "sgd", "training__optim_args": "momentum=0.9"}, [8]),
    "adamw_torch": ({"training__optim": "adamw_torch"}, [8]),
    "adafactor": ({"training__optim": "adafactor"}, [8]),
    "muon": ({"optimizer__name": "muon"}, [8]),
    "muon, accumulated": (
        {"optimizer__name": "muon", "training__per_device_train_batch_size": 8}, [8],
    ),
    "muon in bf16": ({"optimizer__name": "muon", "precision": "bf16"}, [8]),
    "workers": ({**EPOCHS, "training__save_steps": 5, "training__dataloader_num_workers": 1}, [10]),
    "stopped early": (UNTIL_IT_GETS_WORSE, [2, 6]),
    "rows with documents apart": (
        {"data__packing": "best_fit", "data__attend_across": "false"}, [8],
    ),
    "bf16": ({"precision": "bf16"}, [8]),
    "two workers": (
        {**EPOCHS, "training__save_steps": 7, "training__dataloader_num_workers": 2}, [7],
    ),
    "gradient checkpointing": ({"training__gradient_checkpointing": "true"}, [8]),
    "noise": ({"training__neftune_noise_alpha": 5.0}, [8]),
    "rmsprop": ({"training__optim": "rmsprop"}, [8]),
    "adagrad": ({"training__optim": "adagrad"}, [8]),
    "compiled": (COMPILED, [8]),
    "compiled and accumulated": ({**COMPILED, "training__per_device_train_batch_size": 8}, [8]),
}  # fmt: skip
QUICK = ("a logged window begins before the checkpoint", "accumulated", "at an epoch's end", "muon")


def marks(case):
    return [] if case in QUICK else [pytest.mark.slow]


@pytest.mark.parametrize("case", [pytest.param(case, marks=marks(case)) for case in EXACT])
def test_resumed_equals_uninterrupted(smoke_recipe, tmp_path, case):
    """Rows, losses, norms, rates, samples, every file of every later checkpoint, and the end."""
    overrides, places = EXACT[case]
    overrides = BASE | overrides
    bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if overrides.get("precision") == "bf16" and not bf16:
        pytest.skip("this processor has no bf16")
    straight = trained(made(smoke_recipe, tmp_path / "straight", **overrides))
    steps = straight.state.global_step
    assert list(straight.seen) == list(range(1, steps + 1)) and steps > max(places)
    for place in places:
        folder = cut_back(tmp_path / "straight", tmp_path / f"from-{place}", place)
        again = trained(made(smoke_recipe, folder, **overrides), "auto")
        assert again._clock.first_step == place
        assert list(again.seen) == list(range(place + 1, steps + 1))
        assert all(same(batches, straight.seen[n]) for n, batches in again.seen.items())
        assert_ended_the_same(straight, again)


@pytest.mark.slow
def test_a_run_killed_twice_is_still_the_same(smoke_recipe, tmp_path):
    straight = trained(made(smoke_recipe, tmp_path / "straight", **BASE))
    trained(made(smoke_recipe, tmp_path / "killed", **BASE), stop=7)
    trained(made(smoke_recipe, tmp_path / "killed", **BASE), "auto", stop=11)
    again = trained(made(smoke_recipe, tmp_path / "killed", **BASE), "must")
    assert again._clock.first_step == 8
    assert_ended_the_same(straight, again)


@pytest.mark.slow
def test_how_often_is_evaluated_changes_no_weight_of_a_resumed_run(smoke_recipe, tmp_path):
    straight = trained(made(smoke_recipe, tmp_path / "straight", **BASE))
    for number, values in enumerate(
        [{"training__eval_strategy": "no"}, {"training__eval_steps": 1, "evaluation__tokens": 200}]
    ):
        folder = cut_back(tmp_path / "straight", tmp_path / str(number), 4)
        again = trained(made(smoke_recipe, folder, **BASE | values), "auto")
        assert same(straight.model.state_dict(), again.model.state_dict())


@pytest.mark.slow
def test_what_is_harmless_changes_no_weight(smoke_recipe, tmp_path):
    straight = trained(made(smoke_recipe, tmp_path / "straight", **BASE))
    folder = cut_back(tmp_path / "straight", tmp_path / "run", 4)
    shutil.move(folder / "blocks", tmp_path / "elsewhere")
    values = {
        "training__logging_steps": 1, "training__save_steps": 5, "training__logging_first_step": 1,
        "training__dataloader_num_workers": 2, "training__dataloader_prefetch_factor": 3,
        "training__run_name": "other", "training__save_total_limit": 2,
        "data__path": str(tmp_path / "elsewhere"), "generation__prompts": ["the", "a"],
        "generation__max_new_tokens": 3, "faults__rollbacks": 3, "faults__hang_seconds": 99,
    }  # fmt: skip
    again = trained(made(smoke_recipe, folder, **BASE | values), "auto")
    assert again._clock.first_step == 4
    assert all(same(batches, straight.seen[n]) for n, batches in again.seen.items())
    assert same(straight.model.state_dict(), again.model.state_dict())
    assert same(straight.optimizer.state_dict(), again.optimizer.state_dict())


STOPS = [(how, step) for how in ("by epoch", "by steps", "mixed") for step in (1, 6, 7, 8, 13)]


@pytest.mark.parametrize(
    ("how", "step"),
    [pytest.param(*p, marks=[] if p == ("mixed", 7) else [pytest.mark.slow]) for p in STOPS],
)
def test_a_run_that_was_asked_to_stop_is_the_same(smoke_recipe, tmp_path, monkeypatch, how, step):
    """Also at the end of an epoch, between its last update and what is due at its end."""
    overrides = {**BASE, **EPOCHS, **({} if how == "by steps" else BY_EPOCH)}
    if how == "mixed":
        overrides["training__save_strategy"] = "steps"
    straight = trained(made(smoke_recipe, tmp_path / "straight", **overrides))
    folder = tmp_path / "stopped"
    stopped = made(smoke_recipe, folder, **overrides)
    with monkeypatch.context() as patch:
        asked = lambda: "SIGTERM" if stopped.state.global_step >= step else None  # noqa: E731
        patch.setattr(interruption, "reason", asked)
        with pytest.raises(interruption.Preempted, match=f"^SIGTERM, after update {step}$"):
            trained(stopped)
    again = trained(made(smoke_recipe, folder, **overrides), "auto")
    assert again._clock.first_step == step
    assert logs(straight) == logs(again)
    assert same(straight.seen, {**stopped.seen, **again.seen})
    assert same(straight.model.state_dict(), again.model.state_dict())
    assert same(straight.optimizer.state_dict(), again.optimizer.state_dict())


def test_a_run_that_was_moved_goes_on_with_its_best_checkpoint(smoke_recipe, tmp_path):
    overrides = BASE | UNTIL_IT_GETS_WORSE
    straight = trained(made(smoke_recipe, tmp_path / "straight", **overrides))
    folder = cut_back(tmp_path / "straight", tmp_path / "moved", 6)
    shutil.rmtree(tmp_path / "straight")
    again = trained(made(smoke_recipe, folder, **overrides), "auto")
    assert again.state.best_model_checkpoint.startswith(str(folder))
    assert logs(straight) == logs(again)
    assert same(straight.model.state_dict(), again.model.state_dict())


@pytest.fixture
def small_segments(monkeypatch):
    monkeypatch.setattr("pipeline.preparation.TOKENS_PER_SEGMENT", 32)
    monkeypatch.setattr("pipeline.sources.SHARD_BYTES", (4000, 4000))


@pytest.mark.slow
def test_a_stream_goes_on_and_goes_back(smoke_recipe, tmp_path, small_segments):
    """Also where the producer is already far ahead: it has to make again what it removed."""
    overrides = {**BASE, "data__streaming": "true", "training__max_steps": 20}
    straight = trained(made(smoke_recipe, tmp_path / "straight", **overrides))
    folder = cut_back(tmp_path / "straight", tmp_path / "resumed", 4)
    again = made(smoke_recipe, folder, **overrides)
    with again.flowing():
        again.train_dataset.__getitems__([19 * 16])
        ring = {path.name for path in (folder / "_ring").glob("segment-*")}
        assert "segment-000000001.arrow" not in ring
        again.train_from("auto")
    assert list(again.seen) == list(range(5, 21))
    assert all(same(batches, straight.seen[n]) for n, batches in again.seen.items())
    assert_ended_the_same(straight, again)


# -- what changes is applied ----------------------------------------------------------------------

PLAIN = {
    "training__max_steps": 20, "training__save_steps": 8, "training__eval_strategy": "no",
    "training__logging_steps": 1, "training__per_device_train_batch_size": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def twenty(smoke_recipe, tmp_path_factory):
    """A run of 20 updates that has kept its checkpoints after 8, 16 and 20."""
    folder = tmp_path_factory.mktemp("runs") / "twenty"
    return trained(made(smoke_recipe, folder, **PLAIN, training__save_total_limit=9))


@pytest.fixture
def eight(twenty, tmp_path):
    """The folder of that run, killed while it had one checkpoint."""
    return cut_back(Path(twenty.args.output_dir), tmp_path / "eight", 8)


def sets_groups(**values):
    def act(trainer):
        for group in trainer.optimizer.param_groups:
            group.update(values)

    return act


def sets_decay(trainer):
    matrices, _ = trainer.optimizer.param_groups
    matrices["weight_decay"] = 0.5


def sets_rates(peak=1e-3, max_steps=20, **values):
    def act(trainer):
        scheduler, step = trainer.lr_scheduler, trainer.state.global_step
        curve = schedule(trainer.recipe.schedule.model_copy(update=values), max_steps=max_steps)
        scheduler.base_lrs, scheduler.lr_lambdas = [peak] * 2, [curve] * 2
        scheduler._last_lr = [peak * curve(step)] * 2
        sets_groups(lr=peak * curve(step))(trainer)

    return act


def sets_muons_rates(peak=1e-3, matrix_rate=2.0):
    def act(trainer):
        scheduler, step = trainer.lr_scheduler, trainer.state.global_step
        peaks = [peak, peak, peak * matrix_rate, peak * matrix_rate]
        now = [own * scheduler.lr_lambdas[0](step) for own in peaks]
        scheduler.base_lrs, scheduler._last_lr = peaks, now
        for group, rate in zip(trainer.optimizer.param_groups, now, strict=True):
            group["lr"] = rate

    return act


def sets_matrices(**values):
    def act(trainer):
        groups = [g for g in trainer.optimizer.param_groups if "momentum" in g]
        assert len(groups) == 2
        for group in groups:
            group.update(values)

    return act


slow = pytest.mark.slow

CHANGED = {
    "training__learning_rate": (5e-3, sets_rates(peak=5e-3)),
    "training__adam_beta2": (0.5, sets_groups(betas=(0.9, 0.5))),
    "training__adam_epsilon": (1e-3, sets_groups(eps=1e-3)),
    "schedule__floor": (0.7, sets_rates(floor=0.7)),
    "schedule__name": ("wsd", sets_rates(name="wsd")),
    "training__max_steps": (30, sets_rates(max_steps=30, horizon_steps=1.0)),
    "training__weight_decay": (0.5, sets_decay),
    "training__max_grad_norm": (0.05, lambda trainer: setattr(trainer.args, "max_grad_norm", 0.05)),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n, marks=[] if n in ("training__learning_rate", "training__max_steps") else slow
        )
        for n in CHANGED
    ],
)
def test_a_changed_value_counts_from_the_checkpoint_on(
    smoke_recipe, tmp_path, twenty, eight, caplog, name
):
    """As if it had been changed in a run that went on."""
    value, act = CHANGED[name]
    before = {}
    if name == "training__max_steps":
        before = {"training__max_steps": 30, "schedule__horizon_steps": 20}
    straight = made(smoke_recipe, tmp_path / "straight", **PLAIN | before)
    straight.add_callback(Before(9, lambda: act(straight)))
    trained(straight)
    caplog.set_level("INFO", "pipeline")
    again = trained(made(smoke_recipe, eight, **PLAIN | {name: value}), "auto")

    assert again._clock.first_step == 8
    assert f"differs from the checkpoint: {name.replace('__', '.')}: " in caplog.text
    assert logs(straight) == logs(again)
    assert same(straight.model.state_dict(), again.model.state_dict())
    if not before:
        assert not same(twenty.model.state_dict(), again.model.state_dict())


MUON = PLAIN | {"optimizer__name": "muon", "optimizer__matrix_rate": 2.0}
MUONS_CHANGED = {
    "training__learning_rate": (5e-3, sets_muons_rates(peak=5e-3)),
    "optimizer__matrix_rate": (0.5, sets_muons_rates(matrix_rate=0.5)),
    "optimizer__momentum": (0.6, sets_matrices(momentum=0.6)),
    "optimizer__newton_schulz_steps": (2, sets_matrices(newton_schulz_steps=2)),
}


@pytest.fixture(scope="module")
def muons(smoke_recipe, tmp_path_factory):
    """The same run with Muon."""
    folder = tmp_path_factory.mktemp("runs") / "muons"
    return trained(made(smoke_recipe, folder, **MUON, training__save_total_limit=9))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n == "optimizer__matrix_rate" else slow)
        for n in MUONS_CHANGED
    ],
)  # fmt: skip
def test_a_changed_value_of_muon_counts_from_the_checkpoint_on(smoke_recipe, tmp_path, muons, name):
    """With the moments of before: as if it had been changed in a run that went on."""
    value, act = MUONS_CHANGED[name]
    straight = made(smoke_recipe, tmp_path / "straight", **MUON)
    straight.add_callback(Before(9, lambda: act(straight)))
    trained(straight)
    eight = cut_back(Path(muons.args.output_dir), tmp_path / "eight", 8)
    again = trained(made(smoke_recipe, eight, **MUON | {name: value}), "auto")
    assert again._clock.first_step == 8
    assert logs(straight) == logs(again)
    assert same(straight.model.state_dict(), again.model.state_dict())
    assert same(straight.optimizer.state_dict()["state"], again.optimizer.state_dict()["state"])
    assert not same(muons.model.state_dict(), again.model.state_dict())


@pytest.mark.parametrize(
    ("there", "here"), [("AdamW", "Muon"), pytest.param("Muon", "AdamW", marks=slow)]
)
def test_another_optimizer_that_is_allowed_begins_without_a_state(
    smoke_recipe, tmp_path, request, caplog, there, here
):
    found = request.getfixturevalue({"AdamW": "twenty", "Muon": "muons"}[there])
    source = Path(found.args.output_dir) / "checkpoint-16"
    overrides = {"AdamW": PLAIN, "Muon": MUON}[here]
    again = made(smoke_recipe, tmp_path, **overrides)
    with pytest.raises(InputError) as caught:
        again.train_from(str(source))
    change = f'optimizer.name: "{there.lower()}" -> "{here.lower()}"'
    assert f"{change} (the state of the optimizer is another one's); to go on" in str(caught.value)
    assert again.state.global_step == 0 and not checkpoint.checkpoints(tmp_path)

    trained(again, str(source), allow_change=["optimizer.name"])
    assert f"is that of {there}: {here} begins without one" in caplog.text
    assert list(again.seen) == [17, 18, 19, 20]
    assert all(same(batches, found.seen[n]) for n, batches in again.seen.items())
    states = again.optimizer.state_dict()["state"].values()
    assert {int(state["step"]) for state in states if "exp_avg" in state} == {4}
    matrices = [state for state in states if "exp_avg" not in state]
    assert all("momentum_buffer" in state for state in matrices)
    assert len(matrices) == (8 if here == "Muon" else 0)
    curve = schedule(again.recipe.schedule, max_steps=20)
    expected = {n: 1e-3 * curve(n - 1) for n in range(17, 21)}
    assert {n: r for n, r in rates(again).items() if n > 16} == pytest.approx(expected, rel=1e-12)
    peaks = [group["initial_lr"] for group in again.optimizer.param_groups]
    assert peaks == ([1e-3, 1e-3, 2e-3, 2e-3] if here == "Muon" else [1e-3, 1e-3])


def test_rates_are_those_of_the_new_schedule_after_the_checkpoint_and_not_before(
    smoke_recipe, twenty, eight
):
    values = {"training__max_steps": 30, "schedule__floor": 0.3, "training__learning_rate": 2e-3}
    again = trained(made(smoke_recipe, eight, **PLAIN | values), "auto")
    curve = schedule(again.recipe.schedule, max_steps=30)
    expected = {n: 2e-3 * curve(n - 1) if n > 8 else rates(twenty)[n] for n in range(1, 31)}
    assert rates(again) == pytest.approx(expected, rel=1e-12)
    assert again.optimizer.param_groups[0]["initial_lr"] == 2e-3


@pytest.mark.slow
def test_a_finished_run_given_more_updates_goes_on_after_its_last_one(
    smoke_recipe, tmp_path, twenty
):
    """As one that was killed at its last checkpoint: that it had ended leaves no trace."""
    folder = cut_back(Path(twenty.args.output_dir), tmp_path / "longer", 20)
    longer = trained(made(smoke_recipe, folder, **PLAIN | {"training__max_steps": 30}), "auto")
    assert longer._clock.first_step == 20 and longer.state.global_step == 30
    curve = schedule(longer.recipe.schedule, max_steps=30)
    assert rates(longer) == pytest.approx(
        rates(twenty) | {n: 1e-3 * curve(n - 1) for n in range(21, 31)}, rel=1e-12
    )
    values = {"training__max_steps": 30, "schedule__horizon_steps": 20}
    straight = made(smoke_recipe, tmp_path / "straight", **PLAIN | values)
    lengthen = sets_rates(max_steps=30, horizon_steps=1.0)
    straight.add_callback(Before(21, lambda: lengthen(straight)))
    trained(straight)
    assert same(straight.seen, {**twenty.seen, **longer.seen})
    assert same(straight.model.state_dict(), longer.model.state_dict())
    steps = [[e for e in logs(run) if "loss" in e] for run in (straight, longer)]
    assert steps[0] == steps[1]


def test_fewer_updates_than_were_made_are_refused(smoke_recipe, eight):
    trainer = made(smoke_recipe, eight, **PLAIN | {"training__max_steps": 7})
    before = contents(eight)
    with pytest.raises(InputError) as caught:
        trainer.train_from("auto")
    assert str(caught.value) == (
        f"{eight}/checkpoint-8: has made 8 updates, and the recipe asks for 7; give more "
        "training.max_steps, or name an earlier checkpoint with --resume"
    )
    assert contents(eight) == before
    same_number = made(smoke_recipe, eight, **PLAIN | {"training__max_steps": 8})
    trained(same_number, "auto")
    assert same_number.state.global_step == 8 and same_number.seen == {}


def test_how_often_is_logged_saved_and_evaluated_follows_the_recipe_not_the_checkpoint(
    smoke_recipe, eight
):
    values = {
        "training__logging_steps": 2, "training__save_steps": 5, "training__eval_strategy": "steps",
        "training__eval_steps": 3, "training__save_total_limit": 9,
    }  # fmt: skip
    again = trained(made(smoke_recipe, eight, **PLAIN | values), "auto")
    history = [e for e in again.state.log_history if e["step"] > 8]
    assert [e["step"] for e in history if "loss" in e] == [10, 12, 14, 16, 18, 20]
    assert [e["step"] for e in history if "eval_loss" in e] == [9, 12, 15, 18, 20]
    assert [p.name for p in checkpoint.checkpoints(eight)] == [
        f"checkpoint-{n}" for n in (8, 10, 15, 20)
    ]


@pytest.mark.slow
def test_a_changed_patience_is_the_one_that_counts(smoke_recipe, tmp_path):
    overrides = BASE | {
        "training__learning_rate": 1e-12, "training__eval_steps": 1, "training__save_steps": 1,
        "training__max_steps": 20, "training__save_total_limit": 20,
        "evaluation__early_stopping_patience": 4, "training__logging_strategy": "no",
    }  # fmt: skip
    first = trained(made(smoke_recipe, tmp_path / "first", **overrides))
    stopped = first.state.global_step
    assert 5 <= stopped < 18
    for patience in (2, 6):
        folder = cut_back(tmp_path / "first", tmp_path / str(patience), stopped - 3)
        overrides["evaluation__early_stopping_patience"] = patience
        again = trained(made(smoke_recipe, folder, **overrides), "auto")
        assert again.state.global_step == stopped - 4 + patience


def test_a_run_that_stopped_early_goes_on_with_more_patience(smoke_recipe, tmp_path, caplog):
    overrides = BASE | {
        "training__learning_rate": 1e-12, "training__eval_steps": 1, "training__save_steps": 1,
        "evaluation__early_stopping_patience": 3, "training__logging_strategy": "no",
    }  # fmt: skip
    first = trained(made(smoke_recipe, tmp_path, **overrides))
    assert first.state.global_step < 9
    caplog.set_level("INFO", "pipeline")
    longer = trained(
        made(smoke_recipe, tmp_path, **overrides | {"training__max_steps": 16}), "auto"
    )
    assert longer.state.global_step == first.state.global_step
    assert "the run has stopped early: 3 evaluations were not better" in caplog.text
    patient = {"evaluation__early_stopping_patience": 6}
    again = trained(made(smoke_recipe, tmp_path, **overrides | patient), "auto")
    assert again.state.global_step == first.state.global_step + 3


def test_another_batch_in_the_device_sees_the_same_rows_in_each_update(smoke_recipe, twenty, eight):
    values = {"training__per_device_train_batch_size": 4}
    again = trained(made(smoke_recipe, eight, **PLAIN | values), "auto")
    assert list(again.seen) == list(range(9, 21))
    for update, batches in again.seen.items():
        assert [len(batch) for batch in batches] == [4] * 4
        assert torch.equal(torch.cat(batches), torch.cat(twenty.seen[update]))
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (twenty, again)]
    assert len(losses[0]) == 20 and losses[1] == pytest.approx(losses[0], rel=1e-5)


REFUSED = {
    "training__seed": (1, "training.seed: null -> 1 (the rows come in another order"),
    "training__data_seed": (1, "training.data_seed: null -> 1 (the rows come in another order"),
    "tokens_per_update": (1024, "tokens_per_update: 512 -> 1024 (an update takes other rows"),
    "optimizer__name": ("muon", 'optimizer.name: "adamw" -> "muon" (the state of the optimizer'),
    "training__optim": ("sgd", 'training.optim: null -> "sgd" (the state of the optimizer is'),
    "model__config__activation_function": ("relu", '-> "relu" (the weights are another model\'s)'),
    "cleaning__longest": (500, "cleaning.longest: null -> 500 (the rows are others)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_another_run_is_refused_with_the_reason(smoke_recipe, tmp_path, twenty, name):
    value, words = REFUSED[name]
    source = Path(twenty.args.output_dir) / "checkpoint-16"
    trainer = made(smoke_recipe, tmp_path / "new", **PLAIN | {name: value})
    with pytest.raises(InputError) as caught:
        trainer.train_from(str(source))
    said = str(caught.value)
    assert said.startswith(f"{source}: is a checkpoint of another run: ") and "\n" not in said
    assert words in said and f"--allow_change {name.replace('__', '.')}" in said
    assert not checkpoint.checkpoints(tmp_path / "new")


@pytest.mark.parametrize("name", ["training__seed", "cleaning__longest"])
def test_what_is_allowed_by_name_goes_on(smoke_recipe, tmp_path, twenty, caplog, name):
    value, _ = REFUSED[name]
    source = str(Path(twenty.args.output_dir) / "checkpoint-16")
    trainer = made(smoke_recipe, tmp_path, **PLAIN | {name: value})
    allow = [name.replace("__", ".")] + (["rows"] if name.startswith("cleaning") else [])
    caplog.set_level("INFO", "pipeline")
    trained(trainer, source, allow_change=allow)
    assert list(trainer.seen) == [17, 18, 19, 20]
    assert not same(trainer.seen[17], twenty.seen[17])
    assert f"{allow[0]}: null -> {value} (allowed, and applied)" in caplog.text


def test_a_checkpoint_of_elsewhere_sets_later_ones_of_the_folder_aside(
    smoke_recipe, tmp_path, twenty
):
    """Rotation would take the run's own for old ones, and the next start another's for newest."""
    source = str(Path(twenty.args.output_dir) / "checkpoint-16")
    for step in (540, 550):
        folder = tmp_path / f"checkpoint-{step}"
        with artifact.staged(folder, {}) as (staging, facts):
            (staging / "trainer_state.json").write_text("{}")
            facts["step"] = step
    again = trained(made(smoke_recipe, tmp_path, **PLAIN), source)
    assert again.state.global_step == 20
    assert checkpoint.newest_whole(tmp_path).name == "checkpoint-20"
    assert len(list(tmp_path.glob("checkpoint-5*.superseded-1"))) == 2


def test_a_misspelt_permission_is_one_sentence(smoke_recipe, tmp_path, twenty):
    source = str(Path(twenty.args.output_dir) / "checkpoint-16")
    trainer = made(smoke_recipe, tmp_path, **PLAIN | {"training__seed": 1})
    with pytest.raises(
        InputError, match="^--allow_change training.sed: there is no .*training.seed$"
    ):
        trainer.train_from(source, allow_change=["training.sed"])


# -- through the door -----------------------------------------------------------------------------


def door(recipe, folder, *words):
    """Return the exit code of pretrain.py."""
    argv = ["--config", str(recipe), "--training.output_dir", str(folder), *map(str, words)]
    with pytest.raises(SystemExit) as caught:
        enter(lambda: pretrain.main(argv))
    return caught.value.code


@pytest.mark.slow
def test_a_finished_run_stays_as_it_is_to_the_last_byte(smoke_recipe, run_copy, capsys):
    before = contents(run_copy)
    for words in ([], ["--resume", "must"], ["--training.logging_steps", "3"]):
        assert door(smoke_recipe, run_copy, *words) == 0
        assert contents(run_copy) == before
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--training.learning_rate", "0.5"], "training.learning_rate: 0.001 -> 0.5"),
        (["--schedule.floor", "0.5"], "schedule.floor: 0.1 -> 0.5"),
        (["--training.max_steps", "12"], "training.max_steps"),
    ],
)
def test_what_would_not_be_applied_to_a_finished_run_is_said(
    smoke_recipe, run_copy, capsys, words, said
):
    before = contents(run_copy)
    assert door(smoke_recipe, run_copy, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert said in error and str(run_copy) in error
    assert contents(run_copy) == before


@pytest.mark.slow
def test_a_finished_run_of_another_seed_goes_on_when_that_is_allowed(
    smoke_recipe, run_copy, capsys
):
    before = contents(run_copy)
    words = ["--training.seed", "3", "--training.max_steps", "24"]
    assert door(smoke_recipe, run_copy, *words) == 2
    assert "--allow_change training.seed" in capsys.readouterr().err
    assert contents(run_copy) == before
    assert door(smoke_recipe, run_copy, *words, "--allow_change", "training.seed") == 0
    assert run_folder.read_status(run_copy)["state"] == "finished"
    assert json.loads((run_copy / "metrics.json").read_text())["train_tokens"] == 24 * 512
    assert read_recipe(run_copy / "config.yaml").training["seed"] == 3
    assert checkpoint.checkpoints(run_copy)[-1].name == "checkpoint-24"


def test_the_same_command_goes_on_also_with_a_permission_in_it(smoke_recipe, run_copy, monkeypatch):
    """A scheduler repeats it word by word, and the checkpoint is by then of the new seed."""
    from pipeline.trainer import PretrainingTrainer

    words = ["--training.seed", "3", "--training.max_steps", "24", "--training.save_steps", "22"]
    words += ["--allow_change", "training.seed"]
    with monkeypatch.context() as patch:
        patch.setattr(PretrainingTrainer, "save_result", lambda self: 1 / 0)
        assert door(smoke_recipe, run_copy, *words) == 1
    assert door(smoke_recipe, run_copy, *words) == 0
    assert run_folder.read_status(run_copy)["state"] == "finished"


@pytest.fixture
def unfinished(run_copy):
    """The finished run as it was before its last checkpoint."""
    for name in ("metrics.json", "model.safetensors", "config.json", "README.md", "curves.png"):
        (run_copy / name).unlink()
    shutil.rmtree(run_copy / "checkpoint-20")
    (run_copy / "run_status.json").write_text(json.dumps({"state": "running"}))
    return run_copy


def model_of(folder):
    return (folder / "model.safetensors").read_bytes()


def test_auto_goes_on_to_the_same_model(smoke_recipe, unfinished, finished_run, caplog):
    assert door(smoke_recipe, unfinished) == 0
    assert "resuming from" in caplog.text and f"{unfinished}/checkpoint-10" in caplog.text
    assert model_of(unfinished) == model_of(finished_run)


@pytest.mark.slow
def test_a_checkpoint_of_another_folder_named_relative_to_here(
    smoke_recipe, tmp_path, finished_run, monkeypatch
):
    monkeypatch.chdir(finished_run)
    before = contents(finished_run)
    assert door(smoke_recipe, tmp_path / "new", "--resume", "checkpoint-10") == 0
    assert model_of(tmp_path / "new") == model_of(finished_run)
    assert contents(finished_run) == before
    state = json.loads((tmp_path / "new" / "checkpoint-20" / "trainer_state.json").read_text())
    assert [e["step"] for e in state["log_history"] if "loss" in e] == [5, 10, 15, 20]


@pytest.mark.slow
def test_an_earlier_checkpoint_of_the_run_itself_is_gone_on_from(
    smoke_recipe, run_copy, finished_run
):
    """The ones after it are of a run that is given up: neither kept as newest nor resumed."""
    (run_copy / "run_status.json").write_text(json.dumps({"state": "failed"}))
    words = ["--training.learning_rate", "0.002", "--training.save_steps", "3"]
    assert door(smoke_recipe, run_copy, *words, "--resume", run_copy / "checkpoint-10") == 0
    assert [p.name for p in checkpoint.checkpoints(run_copy)] == ["checkpoint-18", "checkpoint-20"]
    state = json.loads((run_copy / "checkpoint-20" / "trainer_state.json").read_text())
    assert state["save_steps"] == 3
    assert model_of(run_copy) != model_of(finished_run)


def damaged(folder):
    path = folder / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-9] + bytes(9))
    return folder, "optimizer.pt differs from what was written; name a whole checkpoint, or use"


def truncated(folder):
    os.truncate(folder / "model.safetensors", 100)
    return folder, "model.safetensors has 100 bytes instead of"


def no_checkpoint(folder):
    return folder.parent, "run: holds checkpoints; name one, such as"


def a_file(folder):
    return folder / "model.safetensors", "no such folder; name a whole checkpoint, or use auto"


@pytest.mark.parametrize("how", [damaged, truncated, no_checkpoint, a_file])
def test_a_path_that_is_no_whole_checkpoint_is_one_sentence(
    smoke_recipe, tmp_path, run_copy, capsys, how
):
    named, words = how(run_copy / "checkpoint-10")
    assert door(smoke_recipe, tmp_path / "new", "--resume", named) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --resume {named}: ") and error.count("\n") == 1
    assert words in error
    assert not (tmp_path / "new" / "model.safetensors").exists()


def test_an_artifact_that_is_no_checkpoint_is_one_sentence(
    smoke_recipe, tmp_path, finished_run, capsys
):
    named = finished_run / "blocks"
    assert door(smoke_recipe, tmp_path / "new", "--resume", named) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --resume {named}: ") and error.count("\n") == 1


@pytest.mark.slow
def test_must_and_never(smoke_recipe, tmp_path, unfinished, finished_run, capsys):
    assert door(smoke_recipe, tmp_path / "new", "--resume", "must") == 2
    assert "--resume must: no whole checkpoint in" in capsys.readouterr().err
    before = contents(unfinished)
    assert door(smoke_recipe, unfinished, "--resume", "never") == 2
    assert "--resume never starts a fresh one; add --overwrite" in capsys.readouterr().err
    assert contents(unfinished) == before
    assert door(smoke_recipe, unfinished, "--resume", "must") == 0
    assert model_of(unfinished) == model_of(finished_run)


def test_a_default_of_the_library_that_is_spelled_out_makes_no_other_run(smoke_recipe, run_copy):
    assert door(smoke_recipe, run_copy, "--training.seed", 42) == 0


# -- as fast after a million updates --------------------------------------------------------------


def at_update(checkpoint_folder, step, folder):
    """Copy a checkpoint and say of it that it was made after another update."""
    manifest = artifact.read_manifest(checkpoint_folder)
    staging = folder.with_name("_staging-forged")
    shutil.copytree(checkpoint_folder, staging)
    (staging / artifact.MANIFEST).unlink()
    state = json.loads((staging / "trainer_state.json").read_text())
    (staging / "trainer_state.json").write_text(json.dumps({**state, "global_step": step}))
    place = torch.load(staging / "scheduler.pt", weights_only=True)
    torch.save({**place, "last_epoch": step, "_step_count": step + 1}, staging / "scheduler.pt")
    facts = manifest["facts"] | {"step": step, "last_logged_step": step}
    artifact.commit(staging, folder, manifest["made_from"], facts)
    return folder


def test_the_place_after_a_million_updates_is_found_without_a_walk(
    smoke_recipe, tmp_path, twenty, monkeypatch
):
    """What is counted is how many rows the order is asked for, and how many are read."""
    asked = []
    rows = RowOrder.rows

    def counted(self, epoch, start, stop):
        found = rows(self, epoch, start, stop)
        asked.append((epoch, start, len(found)))
        return found

    counts = {}
    for step in (8, 1_000_000):
        source = Path(twenty.args.output_dir) / "checkpoint-8"
        found = at_update(source, step, tmp_path / str(step) / f"checkpoint-{step}")
        values = {**PLAIN, "training__max_steps": step + 3}
        trainer = made(smoke_recipe, found.parent, **values)
        read = []
        fetch = trainer.train_dataset.__getitems__
        trainer.train_dataset.__getitems__ = lambda i, fetch=fetch, r=read: r.extend(i) or fetch(i)
        with monkeypatch.context() as patch:
            patch.setattr(RowOrder, "rows", counted)
            asked.clear()
            trained(trainer, "auto")
        assert list(trainer.seen) == [step + 1, step + 2, step + 3]
        per_epoch = trainer._updates_per_epoch
        epoch, place = divmod(step, per_epoch)
        assert asked[0] == (epoch, place * 16, per_epoch * 16 - place * 16)
        expected = [trainer._rows_of(update) for update in trainer.seen]
        seen = [torch.cat(batches) for batches in trainer.seen.values()]
        for ids, numbers in zip(seen, expected, strict=True):
            assert torch.equal(ids, fetch(numbers)["input_ids"])
        counts[step] = (len(asked), len(read))
    assert counts[8][0] <= 2 and counts[1_000_000][0] <= 2
    assert counts[1_000_000][1] <= 3 * 16 + 2 * 16  # what a DataLoader reads ahead
    assert PLACES_AT_ONCE >= 342
