"""Everything of a run that an update changes: copied out of it for a checkpoint, and put back.

The copy is what the training loop waits for. It goes into host memory, which is taken once and
used again (500 MB on two cores: 0.04 s, into new memory 0.21 s); writing it is `checkpoint`'s.
Only tensors, numbers and text are read back: a checkpoint from a stranger can run no code.
"""

import copy
import dataclasses
import functools
import io
import json
import logging
import pickle
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Trainer
from transformers.trainer_callback import ExportableState, TrainerState

from pipeline import adaptation, artifact, zero
from pipeline.checkpoint import STATE, Files
from pipeline.recipe import InputError, first_line
from pipeline.sharding import (
    divided_like,
    is_divided,
    put,
    tensor_bytes,
    whole_copy,
    whole_shape,
)

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
SCALER = "scaler.pt"

# Of a group of parameters: what the recipe says, unlike what an optimizer counts there.
SETTINGS = (
    "initial_lr", "weight_decay", "betas", "eps", "momentum", "newton_schulz_steps", "parts",
)  # fmt: skip

logger = logging.getLogger(__name__)


class TrainingState:
    """The state of one `Trainer`, whatever its weights are divided into."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._copy: Any = None
        self.groups: list[list[torch.nn.Parameter]] = []
        self._unchanging: dict[str, bytes] | None = None

    def files(self, random_states: list[bytes]) -> tuple[Files, int]:
        """Return the files of a checkpoint under Trainer's names, and about how many bytes.

        They hold what is so now, until this is called again. Where the weights are divided all
        processes must ask; the main one gets the files.

        Args:
            random_states: what `random_state` returned in each process.
        """
        trainer = self._trainer
        file, weights = adaptation.stored_weights(trainer.model)
        tensors = {
            "weights": weights,
            "optimizer": self._optimizer_state(),
        }
        self._copy = self._whole_copy(tensors, self._copy, pinned=True)
        if self._copy is None:
            return {}, 0
        files: Files = {
            **self.unchanging_files(),
            file: functools.partial(_write_weights, self._copy["weights"]),
            OPTIMIZER: functools.partial(torch.save, self._copy["optimizer"]),
            SCHEDULER: _bytes_of(trainer.lr_scheduler.state_dict()),
            STATE: functools.partial(_write_state, _copied_state(trainer)),
        }
        if trainer.accelerator.scaler is not None:
            files[SCALER] = _bytes_of(trainer.accelerator.scaler.state_dict())
        files |= dict(zip(_random_names(len(random_states)), random_states, strict=True))
        rest = sum(len(content) for content in files.values() if isinstance(content, bytes))
        return files, tensor_bytes(self._copy) + rest

    def model_files(self) -> Files:
        """Return the files that `from_pretrained` opens, as the weights are now.

        Where the weights are divided all processes must ask; the main one gets the files.
        """
        file, weights = self.whole_weights()
        if weights is None:
            return {}
        return {**self.unchanging_files(), file: functools.partial(_write_weights, weights)}

    def whole_weights(self) -> tuple[str, dict[str, torch.Tensor] | None]:
        """Return a copy of the weights in host memory, and the name of their file.

        Where the weights are divided all processes must ask; the main one gets them.
        """
        file, weights = adaptation.stored_weights(self._trainer.model)
        return file, self._whole_copy(weights, None, pinned=False)

    def _whole_copy(self, tree: Any, last: Any, *, pinned: bool) -> Any:
        is_main = self._trainer.args.process_index == 0
        copied = whole_copy(tree, last, keep=is_main, pinned=pinned)
        if self._trainer.args.device.type == "cuda":
            torch.cuda.synchronize()  # copies into pinned memory may still be under way
        return copied

    def random_state(self) -> bytes:
        """Return the state of every generator of this process."""
        name, keys, *rest = np.random.get_state()
        states = {
            "python": random.getstate(),
            "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
            "cpu": torch.random.get_rng_state(),
        }
        device = self._trainer.args.device
        if device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(device)
        if device.type == "mps":
            states["mps"] = torch.mps.get_rng_state()
        return _bytes_of(states)

    def put_back_weights(self, folder: Path) -> None:
        """Load the weights.

        Raises:
            InputError: they are another model's, or no such file can be read.
        """
        file, weights = adaptation.stored_weights(self._trainer.model)
        path = folder / file
        shapes = {name: whole_shape(weight) for name, weight in weights.items()}
        try:
            with safe_open(path, framework="pt") as stored:
                found = {name: stored.get_slice(name).get_shape() for name in stored.keys()}
                if found == shapes:
                    for name, weight in weights.items():
                        put(weight, stored.get_tensor(name))
        except Exception as error:  # the Rust library has its own
            raise InputError(f"{path}: cannot be loaded: {_said(error)}") from None
        for name in [*shapes, *found]:
            if found.get(name) != shapes.get(name):
                raise InputError(
                    f"{path}: holds the weights of another model: {name} is "
                    f"{found.get(name, 'missing')}, and {shapes.get(name, 'unknown')} here"
                )

    def put_back_optimizer(self, folder: Path, saved: str | None = None) -> None:
        """Load the optimizer and the place in the schedule; rates and decay are the recipe's.

        PyTorch would bring those of the checkpoint back, and a changed one would be ignored.
        `saved` is the `optimizer_name` of the checkpoint: another optimizer begins without a state.

        Raises:
            InputError: they are another optimizer's, or no such file can be read.
        """
        optimizer, scheduler = self._trainer.optimizer, self._trainer.lr_scheduler
        settings = [
            {name: group[name] for name in SETTINGS if name in group}
            for group in optimizer.param_groups
        ]
        state = _loaded(folder / SCHEDULER)
        try:
            # The place is all that is wanted: rates are the recipe's, and as many as the groups.
            scheduler.last_epoch, scheduler._step_count = state["last_epoch"], state["_step_count"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder / SCHEDULER}: is no state: {_said(error)}") from None
        try:
            if saved in (None, self.optimizer_name):
                # Of a mapped file a process takes its part; all of it in each would be too much.
                state = _loaded(folder / OPTIMIZER, mapped=is_divided(self._trainer.model))
                self._put_back_optimizer_state(state)
            else:
                logger.warning(
                    "the state in %s is that of %s: %s begins without one",
                    folder / OPTIMIZER, saved, self.optimizer_name,
                )  # fmt: skip
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{folder / OPTIMIZER}: is another optimizer's state: {_said(error)}"
            ) from None
        scheduler.base_lrs = [group["initial_lr"] for group in settings]
        curves = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        rates = [rate * curve(scheduler.last_epoch) for rate, curve in curves]
        for group, own, rate in zip(optimizer.param_groups, settings, rates, strict=True):
            group.update({**own, "lr": rate})
        scheduler._last_lr = rates

    def _optimizer_state(self) -> dict[str, Any]:
        if self._trainer.is_deepspeed_enabled:
            return zero.optimizer_state(self._trainer.optimizer.optimizer, self.groups)
        return self._trainer.optimizer.state_dict()

    def _put_back_optimizer_state(self, state: dict[str, Any]) -> None:
        if self._trainer.is_deepspeed_enabled:
            zero.put_back_optimizer_state(self._trainer.optimizer.optimizer, self.groups, state)
        else:
            self._trainer.optimizer.load_state_dict(self._divided(state))

    def _divided(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return an optimizer's state with this process's part of what belongs to each weight."""
        if not is_divided(self._trainer.model):
            return state
        groups = self._trainer.optimizer.param_groups
        parameters = [parameter for group in groups for parameter in group["params"]]
        for number, kept in state["state"].items():
            for name, value in kept.items():
                if isinstance(value, torch.Tensor):
                    kept[name] = divided_like(value, parameters[number])
        return state

    @property
    def optimizer_name(self) -> str:
        """The class of the optimizer, without what wraps it."""
        optimizer = self._trainer.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        return type(optimizer).__name__

    def put_back_random_state(self, folder: Path) -> None:
        """Restore this process's generators; of a process that is new, as the first one's.

        Raises:
            InputError: no such file can be read.
        """
        rank, count = self._trainer.args.process_index, self._trainer.args.world_size
        names = [_random_names(count)[rank], *_random_names(1), *_random_names(2)]
        paths = [folder / name for name in names]
        path = next((path for path in paths if path.exists()), paths[0])
        states = _loaded(path)
        try:
            random.setstate(states["python"])
            name, keys, *rest = states["numpy"]
            np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
            torch.random.set_rng_state(states["cpu"])
            device = self._trainer.args.device
            if device.type == "cuda" and "cuda" in states:
                torch.cuda.set_rng_state(states["cuda"], device)
            if device.type == "mps" and "mps" in states:
                torch.mps.set_rng_state(states["mps"])
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise InputError(f"{path}: holds no state of generators: {_said(error)}") from None

    @staticmethod
    def progress(folder: Path) -> TrainerState:
        """Return Trainer's own state in a checkpoint.

        Raises:
            InputError: no such file can be read.
        """
        path = folder / STATE
        try:
            state = TrainerState.load_from_json(str(path))
            if not isinstance(state.log_history, list) or not state.max_steps:
                raise ValueError("it says neither what was logged nor how long the run is")
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: is no state of a Trainer: {_said(error)}") from None
        return state

    def unchanging_files(self) -> dict[str, bytes]:
        """Return what lies beside the weights for `from_pretrained`, read from memory from now on.

        The model's is what its `save_pretrained` writes.
        """
        if self._unchanging is None:
            model, output_dir = self._trainer.model, self._trainer.args.output_dir
            config = copy.deepcopy(model.config)
            # FSDP2 gives the model a class of its own.
            name = type(model).__name__.removeprefix("FSDP")
            config.architectures, config.dtype = [name], model.dtype
            config.use_cache = True
            with tempfile.TemporaryDirectory(prefix=artifact.STAGING, dir=output_dir) as folder:
                if adaptation.has_adapter(model):  # the config is that of its base
                    adaptation.save_adapter_config(model, Path(folder))
                else:
                    config.save_pretrained(folder)
                model.generation_config.save_pretrained(folder)
                self._trainer.processing_class.save_pretrained(folder)
                self._unchanging = {p.name: p.read_bytes() for p in Path(folder).iterdir()}
        return self._unchanging


def _copied_state(trainer: Trainer) -> TrainerState:
    """Return Trainer's state with that of its callbacks; logs are never changed, only added."""
    state = copy.copy(trainer.state)
    state.log_history = list(state.log_history)
    exported: dict[str, list[dict[str, Any]]] = {}
    for one in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(one, ExportableState):
            exported.setdefault(type(one).__name__, []).append(copy.deepcopy(one.state()))
    state.stateful_callbacks = {k: v[0] if len(v) == 1 else v for k, v in exported.items()}
    return state


def _write_weights(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Write them, if they are numbers.

    Raises:
        ValueError: an update has made one infinite, which the next one would find out.
    """
    for name, tensor in weights.items():
        # NumPy's one thread: torch would take those that train.
        if not np.isfinite(tensor.numpy()).all():
            raise ValueError(f"{name} is infinite or not a number")
    save_file(weights, path, metadata={"format": "pt"})


def _write_state(state: TrainerState, path: Path) -> None:
    """Write what `TrainerState.load_from_json` reads, the logs entry by entry.

    Its own `save_to_json` copies and spells out all logs at once, more with every save.
    """
    values = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    history = values.pop("log_history")
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2, sort_keys=True).removesuffix("\n}"))
        file.write(',\n  "log_history": [')
        for number, entry in enumerate(history):
            file.write(f"{',' if number else ''}\n    {json.dumps(entry)}")
        file.write("\n  ]\n}\n")


def _random_names(count: int) -> list[str]:
    return ["rng_state.pth"] if count == 1 else [f"rng_state_{n}.pth" for n in range(count)]


def _bytes_of(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _loaded(path: Path, *, mapped: bool = False) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path}: cannot be loaded: it is broken, or holds more than tensors, numbers and "
            "text, which could run any program and is not opened"
        ) from None
    except Exception as error:  # pickle's, zip's, and torch's own
        raise InputError(f"{path}: cannot be loaded: {_said(error)}") from None


def _said(error: Exception) -> str:
    return " ".join(first_line(error).split())
