"""An update that would not be finite is not made; its rows are named, and may be left out."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from runs import Before, assert_ended_the_same, made, same, trained
from safetensors.torch import load_file

from pipeline import artifact, checkpoint, pretrain, run_folder
from pipeline.command_line import enter
from pipeline.guard import Guard, NonFinite, wrong_rows
from pipeline.recipe import RunFailed
from pipeline.trainer import PretrainingTrainer

NAN, INF = math.nan, math.inf


# -- the look -------------------------------------------------------------------------------------


def look(*, loss=1.0, norm=1.0, is_scaled=False, optimizer=None):
    guard = Guard(process_count=1)
    guard.look(7, grad_norm=norm, loss=torch.tensor(loss), optimizer=optimizer, is_scaled=is_scaled)
    guard.settle()


@pytest.mark.parametrize("norm", [0.0, 3, 1e30, torch.tensor(2.0), torch.tensor(2.0).bfloat16()])
@pytest.mark.parametrize("is_scaled", [False, True])
def test_a_finite_update_is_made(norm, is_scaled):
    look(norm=norm, is_scaled=is_scaled)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_neither_the_loss_nor_the_gradient_may_be_anything_else(value, as_tensor):
    norm = torch.tensor(value) if as_tensor else value
    for values in ({"loss": value}, {"norm": norm}, {"loss": value, "norm": norm}):
        with pytest.raises(NonFinite, match="^update 7 was not made: ") as caught:
            look(**values)
        assert caught.value.step == 7


def test_of_fp16_only_the_loss_counts():
    """Its scaler skips what overflowed, and tries smaller numbers."""
    look(norm=INF, is_scaled=True)
    look(norm=torch.tensor(NAN), is_scaled=True)
    with pytest.raises(NonFinite):
        look(loss=NAN, is_scaled=True)


def test_a_gradient_is_not_asked_for():
    loss = torch.tensor(1.0, requires_grad=True)
    Guard(process_count=1).look(1, grad_norm=1.0, loss=loss, optimizer=None, is_scaled=False)


def test_what_is_still_to_come_is_settled_once():
    guard = Guard(process_count=1)
    guard.settle()
    waited = []
    pending = SimpleNamespace(synchronize=lambda: waited.append(True))
    from pipeline.guard import _Pending

    guard._pending = _Pending(3, torch.tensor([1.0, 1.0, 1.0]), pending)
    with pytest.raises(NonFinite) as caught:
        guard.look(4, grad_norm=1.0, loss=torch.tensor(1.0), optimizer=None, is_scaled=False)
    assert caught.value.step == 3 and waited == [True]
    guard.settle()
    guard._pending = _Pending(4, torch.tensor([0.0, 1.0, 1.0]), pending)
    guard.settle()
    assert waited == [True, True] and guard._pending is None


def test_the_sentence_names_the_rows_that_are_to_blame():
    fault, rows = NonFinite(9), list(range(20, 36))
    one, halves = [[25]], [rows[0::2], rows[1::2]]
    assert fault.described(rows, one).endswith("of its 16 rows these give it by themselves: 25")
    assert "20, 21, 22, 23, 24, 25, 26, 27, ...): see to" in fault.described(rows, [[]])
    assert "none of its 16 rows gives it by itself" in fault.described(rows, [[], []])
    assert "all of its 16 rows give it" in fault.described(rows, halves)
    assert "in process 1, and none in the others" in fault.described(rows, [[], halves[1]])
    assert "these give it by themselves: 25" in fault.described(rows, [[], [25]])
    for alone in ([[]], one, halves):
        assert fault.described(rows, alone).startswith("update 9 ")


def test_rows_are_tried_one_by_one(tiny_model):
    batches = {
        row: {"input_ids": torch.full((1, 16), row), "labels": torch.full((1, 16), row)}
        for row in range(4)
    }
    assert wrong_rows(tiny_model, batches) == []
    with torch.no_grad():
        tiny_model.transformer.wte.weight[2] = NAN
    before = [p.grad for p in tiny_model.parameters()]
    # Tied: the row's logit is wrong for all.
    assert wrong_rows(tiny_model, batches) == [0, 1, 2, 3]
    assert [p.grad for p in tiny_model.parameters()] == before

    def forward(input_ids, labels):
        return SimpleNamespace(loss=torch.tensor([1.0, INF, 2.0, NAN])[input_ids[0, 0]])

    assert wrong_rows(forward, batches) == [1, 3]
    assert wrong_rows(forward, {}) == []


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_device_that_is_told_so_makes_no_update(weight_decay):
    """What a GPU relies on, on the CPU: `found_inf`, which a gradient scaler uses as well."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(4))]
    optimizer = torch.optim.AdamW(weights, lr=0.1, weight_decay=weight_decay, fused=True)
    assert optimizer._step_supports_amp_scaling

    def step(found_inf, gradient):
        for weight in weights:
            weight.grad = torch.full_like(weight, gradient)
        optimizer.found_inf = found_inf
        optimizer.step()
        state = [{k: v.clone() for k, v in optimizer.state[w].items()} for w in weights]
        return [w.detach().clone() for w in weights], state

    first = step(torch.tensor(0.0), 1.0)
    assert first[1][0]["step"] == 1
    assert same(step(torch.tensor(1.0), NAN), first)
    assert same(step(torch.tensor(1.0), 1.0), first)
    second = step(torch.tensor(0.0), 1.0)
    assert second[1][0]["step"] == 2
    assert not any(torch.equal(*pair) for pair in zip(first[0], second[0], strict=True))


# -- runs that diverge ----------------------------------------------------------------------------

SMALL = {
    "training__max_steps": 16, "training__save_steps": 2, "training__eval_strategy": "no",
    "training__logging_steps": 3, "training__per_device_train_batch_size": 16,
    "training__save_total_limit": 2,
}  # fmt: skip


def poison(trainer, *rows, value=INF):
    """Let the loss of every batch with one of these rows be no number."""
    ids = trainer.train_dataset.__getitems__(list(rows))["input_ids"]
    forward = trainer.model.forward

    def poisoned(input_ids=None, **kwargs):
        output = forward(input_ids=input_ids, **kwargs)
        is_one = (input_ids[:, None] == ids[None]).all(-1).any()
        if kwargs.get("labels") is not None and is_one:
            output.loss = output.loss * value
        return output

    trainer.model.forward = poisoned
    return trainer


def row_of(trainer, update, place):
    """Return the row at a place of an update, before it is trained."""
    trainer._get_train_sampler()
    return trainer._rows_of(update)[place]


def break_weights(trainer):
    with torch.no_grad():
        trainer.model.transformer.wte.weight[3, 3] = NAN


def steps_on_disk(folder):
    found = checkpoint.checkpoints(folder)
    assert all(artifact.damage(path) is None for path in found)
    for path in found:
        assert all(
            value.isfinite().all() for value in load_file(path / "model.safetensors").values()
        )
    return [checkpoint.step_of(path) for path in found]


@pytest.mark.parametrize("accumulated", [False, True])
def test_weights_that_are_no_numbers_stop_the_run_before_the_update(
    smoke_recipe, tmp_path, accumulated
):
    batch = {"training__per_device_train_batch_size": 8} if accumulated else {}
    trainer = made(smoke_recipe, tmp_path, **SMALL | batch)
    trainer.add_callback(Before(5, lambda: break_weights(trainer)))
    updates = []
    create = trainer.create_optimizer

    def create_optimizer(*args):
        optimizer = create(*args)
        optimizer.register_step_post_hook(lambda *_: updates.append(trainer.state.global_step + 1))
        return optimizer

    trainer.create_optimizer = create_optimizer
    with pytest.raises(RunFailed) as caught:
        trained(trainer)
    said = str(caught.value)
    assert said.startswith("update 5 was not made: ") and said.count("\n") == 0
    assert (
        "all of its 16 rows give it (" in said
        and "; faults.rollbacks is 0. Likely, in this order: too high a rate (training." in said
    )
    assert updates == [1, 2, 3, 4]
    assert steps_on_disk(tmp_path) == [2, 4]


def test_a_run_with_a_rate_beyond_all_reason_stops(smoke_recipe, tmp_path):
    values = {"training__learning_rate": 1e30, "training__max_grad_norm": 0}
    trainer = made(smoke_recipe, tmp_path, **SMALL | values)
    with pytest.raises(RunFailed, match=r"^update [23] was not made: .*the learning rate"):
        trained(trainer)
    assert steps_on_disk(tmp_path) in ([], [2])


def test_weights_that_an_update_makes_infinite_are_not_saved(smoke_recipe, tmp_path):
    values = {"training__learning_rate": 1e39, "training__save_steps": 1}
    with pytest.raises(RunFailed):
        trained(made(smoke_recipe, tmp_path, **SMALL | values))
    assert steps_on_disk(tmp_path) == []


@pytest.mark.parametrize(("value", "place"), [(INF, 0), (NAN, 15)])
def test_one_row_that_gives_no_number_is_found(smoke_recipe, tmp_path, value, place):
    trainer = made(smoke_recipe, tmp_path, **SMALL)
    row = row_of(trainer, 6, place)
    poison(trainer, row, value=value)
    with pytest.raises(RunFailed) as caught:
        trained(trainer)
    assert str(caught.value) == (
        "update 6 was not made: its loss or gradient is infinite or not a number; of its 16 rows "
        f"these give it by themselves: {row}; faults.rollbacks is 0. Likely, in this order: rows "
        "unlike the rest (prepare_data.py --show 20, faults.rollbacks: 3); fp16 (precision: bf16); "
        "too high a rate (training.learning_rate x 0.1)"
    )
    assert steps_on_disk(tmp_path) == [2, 4]
    assert list(trainer.seen) == [1, 2, 3, 4, 5, 6]
    assert [e["step"] for e in trainer.state.log_history] == [3]
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("checkpoint-*")}
    again = made(smoke_recipe, tmp_path, **SMALL)
    poison(again, row, value=value)
    with pytest.raises(RunFailed, match=f"^update 6 was not made: .*: {row}; faults"):
        trained(again, "auto")
    assert before == {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("checkpoint-*")}


@pytest.mark.slow
def test_a_row_of_a_later_epoch_is_found(smoke_recipe, tmp_path):
    overrides = SMALL | {"tokens_per_update": 32 * 96, "training__max_steps": 6}
    trainer = made(smoke_recipe, tmp_path, **overrides)
    trainer._get_train_sampler()
    first = {row for update in (1, 2, 3) for row in trainer._rows_of(update)}
    row = next(n for n in trainer._rows_of(5) if n not in first)
    poison(trainer, row)
    with pytest.raises(RunFailed, match=f"^update 5 .* of its 96 rows .*: {row}; "):
        trained(trainer)


@pytest.mark.slow
def test_through_the_door_it_is_one_sentence_and_code_1(
    smoke_recipe, tmp_path, monkeypatch, capsys
):
    begin = PretrainingTrainer.train_from

    def train_from(self, *args, **kwargs):
        self.add_callback(Before(5, lambda: break_weights(self)))
        return begin(self, *args, **kwargs)

    monkeypatch.setattr(PretrainingTrainer, "train_from", train_from)
    argv = ["--config", str(smoke_recipe), "--training.output_dir", str(tmp_path)]
    argv += ["--training.save_steps", "2", "--training.eval_steps", "2"]
    with pytest.raises(SystemExit) as caught:
        enter(lambda: pretrain.main(argv))
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: update 5 was not made: ")
    assert error.count("\n") == 1 and "Traceback" not in error
    status = run_folder.read_status(tmp_path)
    assert status["state"] == "failed"
    assert status["why"] == f"RunFailed: {error.removeprefix('error: ').rstrip()}"
    assert not (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "metrics.json").exists()
    assert steps_on_disk(tmp_path) == [2, 4]
    monkeypatch.setattr(PretrainingTrainer, "train_from", begin)
    with pytest.raises(SystemExit) as caught:
        enter(lambda: pretrain.main(argv))
    assert caught.value.code == 0
    assert run_folder.read_status(tmp_path)["state"] == "finished"


# -- going back -----------------------------------------------------------------------------------

TWO = SMALL | {"faults__rollbacks": 2, "training__save_steps": 3, "training__save_total_limit": 9}


def rows_of_updates(trainer):
    """Return by update the ids of all rows that it saw, as tuples."""
    return {
        update: [tuple(row) for batch in batches for row in batch.tolist()]
        for update, batches in trainer.seen.items()
    }


def ids_of(trainer, rows):
    return [tuple(row) for row in trainer.train_dataset.__getitems__(rows)["input_ids"].tolist()]


def test_a_run_goes_back_and_on_without_the_rows_of_the_update(smoke_recipe, tmp_path, caplog):
    plain = trained(made(smoke_recipe, tmp_path / "plain", **TWO))
    trainer = made(smoke_recipe, tmp_path / "run", **TWO)
    row, rows = row_of(trainer, 8, 5), trainer._rows_of(8)
    poison(trainer, row)
    trained(trainer)

    assert f"of its 16 rows these give it by themselves: {row}. Going back to " in caplog.text
    assert "checkpoint-6, without the rows of that update from here on (1 of 2)" in caplog.text
    assert trainer.state.global_step == 16
    seen, otherwise = rows_of_updates(trainer), rows_of_updates(plain)
    unwanted = set(ids_of(trainer, rows))
    assert set(otherwise[8]) == unwanted
    assert {update for update in seen if seen[update] != otherwise[update]} == {8}
    assert len(seen[8]) == 16 and not unwanted & set(seen[8])
    assert [e["step"] for e in trainer.state.log_history if "loss" in e] == [3, 6, 9, 12, 15]
    facts = artifact.read_manifest(tmp_path / "run" / "checkpoint-16")["facts"]
    assert facts["left_out"] == sorted(rows) and facts["rollbacks"] == 1
    (notice,) = [e for e in trainer.state.log_history if "notice" in e]
    assert (notice["notice"], notice["update"], notice["step"]) == ("rows_not_finite", 8, 6)
    assert notice["seen"].endswith("; the run went back to checkpoint-6, and on without its rows")
    assert artifact.read_manifest(tmp_path / "run" / "checkpoint-6")["facts"]["left_out"] == []


@pytest.mark.slow
def test_later_epochs_leave_the_rows_out_as_well(smoke_recipe, tmp_path):
    overrides = TWO | {
        "tokens_per_update": 32 * 48, "training__max_steps": None,
        "training__num_train_epochs": 3, "training__save_steps": 2,
    }  # fmt: skip
    trainer = made(smoke_recipe, tmp_path, **overrides)
    row, rows = row_of(trainer, 4, 40), trainer._rows_of(4)
    poison(trainer, row)
    trained(trainer)
    assert trainer.state.global_step == 21 and list(trainer.seen) == list(range(1, 22))
    seen = rows_of_updates(trainer)
    unwanted = set(ids_of(trainer, rows))
    assert {len(found) for found in seen.values()} == {48}
    assert not any(unwanted & set(found) for found in seen.values())


@pytest.mark.parametrize("stop", [7, 14])
@pytest.mark.slow
def test_a_run_killed_after_it_went_back_ends_as_one_that_was_not(smoke_recipe, tmp_path, stop):
    """Killed before its next checkpoint it meets the row again; after it, it knows of it."""
    overrides = TWO | {"model__config__resid_pdrop": 0.1}
    straight = made(smoke_recipe, tmp_path / "straight", **overrides)
    row = row_of(straight, 8, 5)
    trained(poison(straight, row))

    half = poison(made(smoke_recipe, tmp_path / "half", **overrides), row)
    if stop == 7:
        times = []

        def die_the_second_time():
            times.append(True)
            if len(times) == 2:
                raise KeyboardInterrupt

        half.add_callback(Before(8, die_the_second_time))
        with pytest.raises(KeyboardInterrupt):
            half.train_from("never")
        half._writer.wait()
    else:
        trained(half, stop=stop)
    again = poison(made(smoke_recipe, tmp_path / "half", **overrides), row)
    trained(again, "auto")
    assert again._clock.first_step == {7: 6, 14: 12}[stop]
    assert again._left_out == straight._left_out and again._rollbacks == 1
    assert_ended_the_same(straight, again)


@pytest.mark.slow
def test_more_bad_updates_than_rollbacks_end_the_run(smoke_recipe, tmp_path):
    overrides = TWO | {"faults__rollbacks": 1}
    trainer = made(smoke_recipe, tmp_path, **overrides)
    rows = [row_of(trainer, 5, 1), row_of(trainer, 11, 2)]
    poison(trainer, *rows)
    with pytest.raises(RunFailed) as caught:
        trained(trainer)
    assert str(caught.value).startswith("update 11 was not made: ")
    assert f": {rows[1]}; faults.rollbacks is 1, and all are used. Likely" in str(caught.value)
    assert steps_on_disk(tmp_path) == [3, 6, 9]

    more = poison(made(smoke_recipe, tmp_path, **overrides | {"faults__rollbacks": 2}), *rows)
    trained(more, "auto")
    assert more.state.global_step == 16 and more._rollbacks == 2


@pytest.mark.slow
def test_two_rollbacks_leave_out_the_rows_of_both(smoke_recipe, tmp_path):
    trainer = made(smoke_recipe, tmp_path, **TWO)
    rows = [row_of(trainer, 5, 1), row_of(trainer, 11, 2)]
    unwanted = trainer._rows_of(5) + trainer._rows_of(11)
    trained(poison(trainer, *rows))
    assert trainer._left_out == set(unwanted) and trainer._rollbacks == 2
    seen = rows_of_updates(trainer)
    assert not set(ids_of(trainer, unwanted[:16])) & set(seen[5])
    assert not any(set(ids_of(trainer, unwanted)) & set(seen[n]) for n in range(10, 17))


def test_before_the_first_checkpoint_there_is_no_way_back(smoke_recipe, tmp_path):
    trainer = made(smoke_recipe, tmp_path, **TWO)
    poison(trainer, row_of(trainer, 2, 3))
    with pytest.raises(RunFailed, match="; there is no whole checkpoint to go back to. Likely, "):
        trained(trainer)
    assert steps_on_disk(tmp_path) == []


@pytest.mark.slow
def test_weights_that_stay_wrong_use_up_the_rollbacks(smoke_recipe, tmp_path):
    trainer = made(smoke_recipe, tmp_path, **TWO)
    trainer.add_callback(Before(5, lambda: break_weights(trainer)))
    with pytest.raises(
        RunFailed, match="^update 5 .*faults.rollbacks is 2, and all are used. Likely, "
    ):
        trained(trainer)
    assert steps_on_disk(tmp_path) == [3]


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_not_the_one_to_go_back_to(smoke_recipe, tmp_path):
    trainer = made(smoke_recipe, tmp_path, **TWO)
    poison(trainer, row_of(trainer, 8, 5))

    made_after = []

    def damage():
        if not made_after:
            trainer._writer.wait()
            (tmp_path / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
        made_after.append(trainer._clock.first_step)

    trainer.add_callback(Before(8, damage))
    trained(trainer)
    assert made_after == [0, 3] and trainer.state.global_step == 16
    assert steps_on_disk(tmp_path) == [3, 6, 9, 12, 15, 16]
    assert (tmp_path / "checkpoint-6.damaged-1").is_dir()


@pytest.mark.slow
def test_half_of_the_rows_are_never_left_out(smoke_recipe, tmp_path):
    overrides = TWO | {
        "tokens_per_update": 32 * 96, "training__max_steps": 9, "training__save_steps": 1,
        "faults__rollbacks": 9,
    }  # fmt: skip
    trainer = made(smoke_recipe, tmp_path, **overrides)
    trainer.add_callback(Before(3, lambda: break_weights(trainer)))
    with pytest.raises(RunFailed, match="; half of all rows would be left out. Likely, "):
        trained(trainer)
    assert trainer._rollbacks == 1


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_stream_goes_back_too(smoke_recipe, tmp_path, monkeypatch, workers):
    monkeypatch.setattr("pipeline.preparation.TOKENS_PER_SEGMENT", 32)
    monkeypatch.setattr("pipeline.sources.SHARD_BYTES", (4000, 4000))
    overrides = TWO | {
        "data__streaming": "true", "training__save_steps": 7, "training__logging_steps": 1,
        "training__dataloader_num_workers": workers,
    }  # fmt: skip
    plain = made(smoke_recipe, tmp_path / "plain", **overrides)
    with plain.flowing():
        ids = plain.train_dataset.__getitems__(list(range(16 * 16)))["input_ids"]
    trainer = made(smoke_recipe, tmp_path / "run", **overrides)
    row = 12 * 16 + 4
    forward = trainer.model.forward

    def poisoned(input_ids=None, **kwargs):
        output = forward(input_ids=input_ids, **kwargs)
        if (input_ids == ids[row]).all(-1).any():
            output.loss = output.loss * NAN
        return output

    trainer.model.forward = poisoned
    trained(trainer)
    assert trainer.state.global_step == 16 and trainer._rollbacks == 1
    assert trainer._left_out == set(range(12 * 16, 13 * 16))
    for update, batches in trainer.seen.items():
        start = 16 * (update - 1 if update != 13 else 11)
        assert torch.equal(torch.cat(batches), ids[start : start + 16])
    state = json.loads((tmp_path / "run" / "checkpoint-16" / "trainer_state.json").read_text())
    assert [e["step"] for e in state["log_history"] if "loss" in e] == list(range(1, 17))
