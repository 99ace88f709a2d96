"""What a checkpoint holds: a stock model's folder and all of the state, each thing once."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from runs import made, same, trained
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2LMHeadModel, Trainer

from pipeline.adaptation import WEIGHTS, stored_weights
from pipeline.recipe import InputError
from pipeline.sharding import tensor_bytes, whole_copy
from pipeline.training_state import OPTIMIZER, SCHEDULER, STATE

SHORT = {
    "training__max_steps": 3, "training__eval_strategy": "no", "training__save_strategy": "no",
    "training__logging_steps": 1, "training__per_device_train_batch_size": 16,
}  # fmt: skip


@pytest.fixture
def trainer(smoke_recipe, tmp_path):
    """A trainer after three updates that were not saved."""
    return trained(made(smoke_recipe, tmp_path / "run", **SHORT))


def files_of(trainer):
    state = trainer._training_state
    return state.files([state.random_state()])


def written(trainer, folder):
    """Write the files of a checkpoint, and nothing else of one."""
    folder.mkdir()
    for name, content in files_of(trainer)[0].items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            content(folder / name)
    return folder


def update(trainer):
    """Make one more update of the trainer's weights."""
    batch = trainer.train_dataset.__getitems__(list(range(16)))
    trainer.model.train()(**batch).loss.backward()
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    trainer.model.zero_grad()
    trainer.state.global_step += 1
    trainer.state.log_history.append({"step": trainer.state.global_step})
    torch.rand(3), random.random(), np.random.rand()


# -- as stock transformers writes it --------------------------------------------------------------


def test_the_files_are_those_of_save_pretrained(trainer, tmp_path):
    ours = written(trainer, tmp_path / "ours")
    trainer.model.config.use_cache = True
    trainer.model.save_pretrained(tmp_path / "stock")
    trainer.processing_class.save_pretrained(tmp_path / "stock")
    stock = {path.name for path in (tmp_path / "stock").iterdir()}
    state = {OPTIMIZER, SCHEDULER, STATE, "rng_state.pth"}
    assert {path.name for path in ours.iterdir()} == stock | state
    for name in stock:
        expected = (tmp_path / "stock" / name).read_bytes()
        # Trainer of transformers 5.17 makes a list of it when training begins.
        expected = expected.replace(b'"eos_token_id": [\n    0\n  ]', b'"eos_token_id": 0')
        assert (ours / name).read_bytes() == expected, name


def test_the_names_are_those_of_a_stock_trainer(trainer, tmp_path):
    ours = written(trainer, tmp_path / "ours")
    Trainer._save_checkpoint(trainer, trainer.model, None)
    stock = tmp_path / "run" / "checkpoint-3"
    pickled = stock / "training_args.bin"  # could run anything, and holds any token
    pickled.unlink()
    assert {path.name for path in stock.iterdir()} == {path.name for path in ours.iterdir()}
    assert (ours / WEIGHTS).read_bytes() == (stock / WEIGHTS).read_bytes()
    for name in (OPTIMIZER, SCHEDULER):
        one, other = (torch.load(f / name, weights_only=True) for f in (ours, stock))
        assert same(one, other)
    states = [json.loads((folder / STATE).read_text()) for folder in (ours, stock)]
    assert states[0] == states[1]


def test_a_checkpoint_opens_in_stock_transformers(trainer, tmp_path):
    folder = written(trainer, tmp_path / "ours")
    model, said = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.use_cache and model.dtype == torch.float32
    assert model.lm_head.weight is model.transformer.wte.weight
    ids = trainer.eval_dataset.__getitems__([0, 1])["input_ids"]
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == trainer.processing_class.get_vocab()


def test_the_training_goes_on_without_a_cache(trainer, tmp_path):
    before = trainer.model.config.to_dict()
    assert before["use_cache"] is False
    written(trainer, tmp_path / "ours")
    assert trainer.model.config.to_dict() == before
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["use_cache"] is True


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_share_their_memory_are_stored_once(smoke_recipe, tmp_path, tied):
    values = {"model__config__tie_word_embeddings": tied}
    trainer = trained(made(smoke_recipe, tmp_path / "run", **SHORT, **values))
    folder = written(trainer, tmp_path / "ours")
    with safe_open(folder / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
    assert ("lm_head.weight" in names) != tied and "transformer.wte.weight" in names
    assert names == set(stored_weights(trainer.model)[1])
    trainer.model.save_pretrained(tmp_path / "stock")
    assert load_file(tmp_path / "stock" / WEIGHTS).keys() == names
    model = GPT2LMHeadModel.from_pretrained(folder)
    assert same(dict(model.state_dict()), dict(trainer.model.state_dict()))


def test_no_file_can_run_code(trainer, tmp_path):
    folder = written(trainer, tmp_path / "ours")
    for path in folder.glob("*.pt*"):
        torch.load(path, weights_only=True)
    assert len(list(folder.glob("*.pt*"))) == 3


# -- a copy ---------------------------------------------------------------------------------------


def test_the_size_is_about_that_of_the_files(trainer, tmp_path):
    _, size = files_of(trainer)
    folder = written(trainer, tmp_path / "ours")
    whole = sum(path.stat().st_size for path in folder.iterdir())
    parameters = sum(p.numel() for p in trainer.model.parameters()) * 4
    assert 3 * parameters < size <= whole < 1.2 * size


def test_later_updates_do_not_change_what_waswhole_copy(trainer, tmp_path):
    expected = written(trainer, tmp_path / "expected")
    files, _ = files_of(trainer)
    for _ in range(3):
        update(trainer)
    late = tmp_path / "late"
    late.mkdir()
    for name, content in files.items():
        late.joinpath(name).write_bytes(content) if isinstance(content, bytes) else content(
            late / name
        )
    for path in expected.iterdir():
        assert (late / path.name).read_bytes() == path.read_bytes(), path.name
    now = written(trainer, tmp_path / "now")
    changed = {p.name for p in now.iterdir() if p.read_bytes() != (late / p.name).read_bytes()}
    assert changed == {WEIGHTS, OPTIMIZER, SCHEDULER, STATE, "rng_state.pth"}


def test_the_next_copy_takes_the_place_of_the_last(trainer, tmp_path):
    files_of(trainer)
    weights = trainer._training_state._copy["weights"]
    places = {name: tensor.data_ptr() for name, tensor in weights.items()}
    update(trainer)
    files_of(trainer)
    weights = trainer._training_state._copy["weights"]
    assert {name: tensor.data_ptr() for name, tensor in weights.items()} == places
    model = trainer.model.state_dict()
    assert all(torch.equal(weights[name], model[name]) for name in weights)
    assert not {t.data_ptr() for t in weights.values()} & {t.data_ptr() for t in model.values()}


def test_a_copy_fits_whatever_came_before():
    one = {"a": torch.ones(2), "b": [torch.ones(3), {"c": (torch.zeros(1), "x", 5)}], "d": None}
    for last in (None, 3, [], {}, {"a": torch.ones(3)}, {"b": [1]}, {"a": 1, "b": one}, one):
        found = whole_copy(one, copy.deepcopy(last))
        assert same(found, one)
        assert found["a"] is not one["a"] and found["b"][0] is not one["b"][0]
        assert type(found["b"][1]["c"]) is tuple
    for dtype in (torch.bfloat16, torch.int64):
        found = whole_copy({"a": torch.ones(2, dtype=dtype)}, {"a": torch.ones(2)})
        assert found["a"].dtype == dtype
    last = whole_copy([torch.ones(2), torch.ones(3)], None)
    assert same(whole_copy([torch.zeros(2)], last), [torch.zeros(2)])


def test_the_bytes_of_nested_tensors():
    tree = {"a": torch.zeros(3), "b": [torch.zeros(2, dtype=torch.int64), (torch.zeros(()), "x")]}
    assert tensor_bytes(tree) == 12 + 16 + 4
    assert tensor_bytes("x") == tensor_bytes(None) == tensor_bytes({}) == 0


# -- put back -------------------------------------------------------------------------------------


def test_all_of_it_comes_back(trainer, smoke_recipe, tmp_path):
    folder = written(trainer, tmp_path / "ours")
    drawn = [torch.rand(2).tolist(), random.random(), np.random.rand()]
    other = made(smoke_recipe, tmp_path / "other", **SHORT)
    other.create_optimizer_and_scheduler(3)
    state = other._training_state
    state.put_back_weights(folder)
    state.put_back_optimizer(folder)
    state.put_back_random_state(folder)
    assert [torch.rand(2).tolist(), random.random(), np.random.rand()] == drawn
    assert same(dict(other.model.state_dict()), dict(trainer.model.state_dict()))
    assert other.model.lm_head.weight is other.model.transformer.wte.weight
    assert same(other.optimizer.state_dict(), trainer.optimizer.state_dict())
    assert other.lr_scheduler.state_dict() == trainer.lr_scheduler.state_dict()
    assert other.optimizer.param_groups[0]["lr"] == trainer.optimizer.param_groups[0]["lr"]


def test_rates_and_decay_are_the_recipe_s(trainer, smoke_recipe, tmp_path):
    folder = written(trainer, tmp_path / "ours")
    values = {"training__learning_rate": 0.5, "training__adam_beta2": 0.7, "schedule__floor": 1}
    other = made(smoke_recipe, tmp_path / "other", **SHORT | values)
    other.create_optimizer_and_scheduler(3)
    other._training_state.put_back_optimizer(folder)
    for group in other.optimizer.param_groups:
        assert group["lr"] == group["initial_lr"] == 0.5 and group["betas"] == (0.9, 0.7)
    assert other.lr_scheduler.get_last_lr() == [0.5, 0.5] and other.lr_scheduler.last_epoch == 3
    moments = [t.optimizer.state_dict()["state"] for t in (other, trainer)]
    assert same(*moments)


def refused(action, *, path, words):
    with pytest.raises(InputError) as caught:
        action()
    said = str(caught.value)
    assert said.startswith(f"{path}: ") and "\n" not in said and words in said, said


def test_a_file_that_is_missing_or_broken(trainer, tmp_path):
    folder, state = written(trainer, tmp_path / "ours"), trainer._training_state
    actions = {
        WEIGHTS: state.put_back_weights, OPTIMIZER: state.put_back_optimizer,
        SCHEDULER: state.put_back_optimizer, "rng_state.pth": state.put_back_random_state,
    }  # fmt: skip
    for name, put_back in actions.items():
        content = (folder / name).read_bytes()
        for broken in (content[:100], b"", b"not one at all"):
            (folder / name).write_bytes(broken)
            words = "cannot be loaded: "
            refused(lambda p=put_back: p(folder), path=folder / name, words=words)
        (folder / name).write_bytes(content)


class Evil:
    """A pickle that makes a file when it is opened."""

    def __init__(self, path):
        self._path = str(path)

    def __reduce__(self):
        return open, (self._path, "w")


@pytest.mark.parametrize("name", [OPTIMIZER, SCHEDULER, "rng_state.pth"])
def test_a_pickle_is_not_opened(trainer, tmp_path, name):
    folder, state = written(trainer, tmp_path / "ours"), trainer._training_state
    torch.save(Evil(tmp_path / "opened"), folder / name)
    put_back = state.put_back_random_state if "rng" in name else state.put_back_optimizer
    refused(lambda: put_back(folder), path=folder / name, words="holds more than tensors")
    assert not (tmp_path / "opened").exists()


def test_nobody_is_told_to_open_a_pickle(trainer, tmp_path):
    folder = written(trainer, tmp_path / "ours")
    torch.save(Evil(tmp_path / "opened"), folder / OPTIMIZER)
    with pytest.raises(InputError) as caught:
        trainer._training_state.put_back_optimizer(folder)
    assert "\x1b" not in str(caught.value) and "can still be loaded" not in str(caught.value)


def test_another_model_s_weights_are_named(trainer, tmp_path):
    folder, state = written(trainer, tmp_path / "ours"), trainer._training_state
    path, weights = folder / WEIGHTS, load_file(folder / WEIGHTS)
    more = {**weights, "transformer.h.2.ln_1.weight": torch.ones(32)}
    less = {k: v for k, v in weights.items() if k != "transformer.h.1.ln_1.bias"}
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for content, name in (
        (more, "h.2.ln_1.weight is [32], and unk"),
        (less, "h.1.ln_1.bias is mi"),
    ):
        save_file(content, path)
        words = f"holds the weights of another model: transformer.{name}"
        refused(lambda: state.put_back_weights(folder), path=path, words=words)
    assert same(before, dict(trainer.model.state_dict()))


def test_weights_of_another_shape_are_named(trainer, tmp_path):
    folder, state = written(trainer, tmp_path / "ours"), trainer._training_state
    weights = load_file(folder / WEIGHTS)
    weights["transformer.wpe.weight"] = torch.zeros(64, 32)
    save_file(weights, folder / WEIGHTS)
    refused(
        lambda: state.put_back_weights(folder),
        path=folder / WEIGHTS,
        words="transformer.wpe.weight is [64, 32], and [",
    )


def test_a_state_of_other_groups_is_another_optimizer_s(trainer, tmp_path):
    folder, state = written(trainer, tmp_path / "ours"), trainer._training_state
    saved = torch.load(folder / OPTIMIZER, weights_only=True)
    torch.save({**saved, "param_groups": saved["param_groups"][:1]}, folder / OPTIMIZER)
    words = "is another optimizer's state: "
    refused(lambda: state.put_back_optimizer(folder), path=folder / OPTIMIZER, words=words)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("sgd", "adamw_torch"), ("adafactor", "adamw_torch"), ("adamw_torch", "rmsprop"),
        ("adamw_torch", "sgd"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_another_optimizer_begins_without_a_state(smoke_recipe, tmp_path, caplog, one, other):
    args = {"training__optim_args": "momentum=0.9"} if one == "sgd" else {}
    first = trained(made(smoke_recipe, tmp_path / "one", **SHORT, training__optim=one, **args))
    folder = written(first, tmp_path / "files")
    second = made(smoke_recipe, tmp_path / "two", **SHORT, training__optim=other)
    second.create_optimizer_and_scheduler(3)
    state, name = second._training_state, first._training_state.optimizer_name
    state.put_back_optimizer(folder, name)
    assert second.optimizer.state_dict()["state"] == {}
    assert second.lr_scheduler.last_epoch == 3
    assert f"is that of {name}: {state.optimizer_name} begins without one" in caplog.text
