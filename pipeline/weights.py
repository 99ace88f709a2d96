"""The weights that a file, a folder or a Hub name holds, read tensor by tensor.

What kind they are is found out by looking. A pickle is read only as tensors, numbers and text: a
checkpoint from a stranger can run no code.
"""

import dataclasses
import enum
import functools
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pipeline.checkpoint import checkpoints
from pipeline.reach import check_local, not_loaded
from pipeline.recipe import InputError, first_line

COMPILED = "_orig_mod."  # torch.compile puts it before every name
# Causal masks that old code saved as well, and what an optimizer keeps in TensorFlow's checkpoints.
MASK = re.compile(r".*\.attn\.(masked_)?bias")
OPTIMIZER = re.compile(r".*/Adam(_\d+)?|beta\d_power|global_step")
FILE_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")

# Names under which transformers and peft save, and nothing else of a repository of gigabytes.
HUB_FILES = (
    "config.json", "model.safetensors", "model.safetensors.index.json",
    "model-*-of-*.safetensors", "adapter_config.json", "adapter_model.safetensors",
)  # fmt: skip


class Kind(enum.StrEnum):
    """What made the weights."""

    NANOGPT = "nanoGPT checkpoint"
    TENSORFLOW = "TensorFlow checkpoint"
    ADAPTER = "LoRA adapter"
    MODEL = "transformers model"
    SAFETENSORS = "safetensors file"
    PYTORCH = "PyTorch file"


@dataclasses.dataclass(frozen=True)
class Weights:
    """Named tensors, each read when it is asked for."""

    kind: Kind
    path: Path
    """The file or folder."""
    tensors: dict[str, Callable[[], torch.Tensor]]
    """By name, in the source's order."""
    settings: dict[str, Any]
    """model_args, hparams.json, config.json or adapter_config.json; empty if there is none."""


def open_weights(name: str) -> Weights:
    """Return the weights in a file, a folder or on the Hub.

    Raises:
        InputError: there are none, a file is missing or damaged, or a pickle holds more than
            tensors, numbers and text.
    """
    path = Path(name)
    if path.is_file():
        return _of_file(path)
    if path.is_dir():
        return _of_folder(path)
    if path.suffix in FILE_ENDINGS:
        raise InputError(f"{name}: no such file; looked in {Path.cwd()}")
    check_local(name, "model", "config.json")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, allow_patterns=list(HUB_FILES))
    except LocalEntryNotFoundError:  # the library speaks of a variable that nobody has set
        raise not_loaded(name, "model", OSError("it was never fetched before")) from None
    except Exception as error:  # network, name
        raise not_loaded(name, "model", error) from None
    try:
        return _of_folder(Path(folder))
    except InputError as error:
        said = str(error).removeprefix(f"{folder}: ")
        raise InputError(f"{name}, as it is on the Hub: {said}") from None


def _of_file(path: Path) -> Weights:
    if path.suffix == ".safetensors":
        return Weights(Kind.SAFETENSORS, path, _lazily(path), {})
    content = _unpickled(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__} and no tensors by name")
    state, settings = content.get("model"), content.get("model_args")
    if isinstance(settings, dict) and _is_state(state):
        return Weights(Kind.NANOGPT, path, _held(state), settings)
    if _is_state(content):
        return Weights(Kind.PYTORCH, path, _held(content), {})
    raise InputError(
        f"{path}: is not a nanoGPT checkpoint ('model', with tensors by name, and 'model_args' are "
        f"looked for; it has {', '.join(map(repr, content)) or 'nothing'})"
    )


def _of_folder(folder: Path) -> Weights:
    def there(name: str) -> bool:
        return (folder / name).is_file()

    if there("adapter_config.json"):
        settings = read_json(folder / "adapter_config.json")
        return Weights(
            Kind.ADAPTER, folder, _lazily(folder / "adapter_model.safetensors"), settings
        )
    settings = read_json(folder / "config.json") if there("config.json") else {}
    if there("model.safetensors"):
        return Weights(Kind.MODEL, folder, _lazily(folder / "model.safetensors"), settings)
    if there("model.safetensors.index.json"):
        return Weights(Kind.MODEL, folder, _sharded(folder), settings)
    if there("pytorch_model.bin"):
        return Weights(Kind.MODEL, folder, _of_file(folder / "pytorch_model.bin").tensors, settings)
    if there("ckpt.pt"):  # a folder that nanoGPT wrote
        return _of_file(folder / "ckpt.pt")
    if there("checkpoint") or there("hparams.json") or list(folder.glob("*.ckpt.*")):
        settings = read_json(folder / "hparams.json") if there("hparams.json") else {}
        return Weights(Kind.TENSORFLOW, folder, _tensorflow(folder), settings)
    if inside := checkpoints(folder):
        raise InputError(f"{folder}: holds checkpoints; name one, such as {inside[-1]}")
    raise InputError(
        f"{folder}: no weights in this folder (model.safetensors, adapter_model.safetensors, "
        "nanoGPT's ckpt.pt or OpenAI's model.ckpt.index)"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: is not a JSON mapping")
    return values


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items())
    )


def _held(state: dict[str, torch.Tensor]) -> dict[str, Callable[[], torch.Tensor]]:
    def get(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach()

    return {name.removeprefix(COMPILED): functools.partial(get, t) for name, t in state.items()}


def _unpickled(path: Path) -> Any:
    """Return what torch.save wrote; the tensors stay in the file until they are used."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles of other versions
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # a torn archive, another format, or a class
        said = re.search(r"GLOBAL (\S+)", str(error))
        if said:
            raise InputError(
                f"{path}: holds more than tensors, numbers and text ({said[1]}), and reading that "
                "could run a stranger's code; save its state dict anew and plainly"
            ) from None
        raise InputError(
            f"{path}: cannot be read as a PyTorch checkpoint (torn, of another format, or with "
            "more in it than tensors, numbers and text)"
        ) from None


def _lazily(path: Path) -> dict[str, Callable[[], torch.Tensor]]:
    if not path.is_file():
        raise InputError(f"{path}: is missing")
    try:
        file = safe_open(path, "pt")
        names = sorted(file.keys(), key=_numbers_as_numbers)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: is not a whole safetensors file: {first_line(error)}; get or save it again"
        ) from None
    return {name: functools.partial(file.get_tensor, name) for name in names}


def _numbers_as_numbers(name: str) -> list[Any]:
    """Return a key for sorting in which h.10 comes after h.9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _sharded(folder: Path) -> dict[str, Callable[[], torch.Tensor]]:
    index = folder / "model.safetensors.index.json"
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
        raise InputError(f"{index}: has no weight_map of names to files")
    shards = {place: _lazily(folder / Path(place).name) for place in sorted(set(places.values()))}
    for name, place in places.items():
        if name not in shards[place]:
            raise InputError(f"{folder / place}: lacks {name}, which {index.name} says is there")
    names = sorted(places, key=_numbers_as_numbers)
    return {name: shards[places[name]][name] for name in names}


def _tensorflow(folder: Path) -> dict[str, Callable[[], torch.Tensor]]:
    prefix = _tensorflow_prefix(folder)
    # It greets with pages about the processor.
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"} | os.environ
    try:
        import tensorflow
    except ImportError:
        raise InputError(
            f"{folder}: is a TensorFlow checkpoint, and reading it needs TensorFlow: "
            "pip install -e '.[tensorflow]'"
        ) from None
    try:
        reader = tensorflow.train.load_checkpoint(str(prefix))
        kinds = reader.get_variable_to_dtype_map()
    except Exception as error:  # not such a file, or torn
        raise _not_tensorflow(prefix, error) from None

    def get(name: str) -> torch.Tensor:
        try:
            value = reader.get_tensor(name)
        except Exception as error:  # the file with the data is missing or torn
            raise _not_tensorflow(prefix, error) from None
        if kinds[name] == tensorflow.bfloat16:  # which NumPy does not know
            return torch.from_numpy(value.astype("float32")).bfloat16()
        return torch.as_tensor(value)

    names = [name for name, kind in kinds.items() if kind != tensorflow.string]
    names.sort(key=_numbers_as_numbers)
    return {name: functools.partial(get, name) for name in names}


def _not_tensorflow(prefix: Path, error: Exception) -> InputError:
    return InputError(
        f"{prefix}: cannot be read as a TensorFlow checkpoint: {first_line(error)}; get it again"
    )


def _tensorflow_prefix(folder: Path) -> Path:
    """Return what the names of the checkpoint's files begin with; the newest's of several."""
    stated = None
    if (folder / "checkpoint").is_file():
        text = (folder / "checkpoint").read_text(encoding="utf-8", errors="replace")
        stated = re.search(r'^model_checkpoint_path: "(.+)"', text, re.MULTILINE)
    # The folder may have been moved since; the name stays.
    name = Path(stated[1]).name if stated else "model.ckpt"
    if not (folder / f"{name}.index").is_file():
        raise InputError(f"{folder / name}.index: is missing; a TensorFlow checkpoint has it")
    return folder / name
