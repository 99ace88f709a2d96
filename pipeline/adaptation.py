"""What a pretrained model is given, and what of it is trained: rows, upper blocks, or an adapter.

LoRA (Hu et al. 2022, https://arxiv.org/abs/2106.09685) is peft's, put into the model without a
wrapper: forward, loss and compilation stay the model's own. transformers' `add_adapter` does the
same but asks for a peft that is newer than the newest (0.22, transformers 5.24).
"""

import contextlib
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import GPT2LMHeadModel
from transformers.utils import cached_file

from pipeline.pretrained import ADAPTER_CONFIG
from pipeline.reach import see_hub
from pipeline.recipe import InputError, read_recipe
from pipeline.sections import ModelSection

if TYPE_CHECKING:
    from peft import LoraConfig

WEIGHTS, ADAPTER_WEIGHTS = "model.safetensors", "adapter_model.safetensors"
# How peft names a weight in the file and in the model.
IN_FILE, NAME = "base_model.model.", "default"


def fit_positions(model: GPT2LMHeadModel, positions: int) -> None:
    """Keep the first `positions` position embeddings."""
    table = model.transformer.wpe
    table.weight = torch.nn.Parameter(table.weight[:positions].detach().clone())
    model.config.n_positions = table.num_embeddings = positions


def fit_vocabulary(model: GPT2LMHeadModel, *, known: int, wanted: int) -> None:
    """Give each entry from `known` to `wanted` the mean embedding of those before.

    A model may have more rows than its tokenizer has entries: they were never trained.
    """
    if wanted == known:
        return
    if wanted > model.config.vocab_size:
        model.resize_token_embeddings(wanted, mean_resizing=False)
    with torch.no_grad():
        weight = model.transformer.wte.weight
        weight[known:wanted] = weight[:known].mean(0)


def choose_trained(model: GPT2LMHeadModel, section: ModelSection) -> None:
    """Freeze what the recipe freezes, or put the adapter in.

    Raises:
        InputError: peft is not installed.
    """
    for block in model.transformer.h[: section.frozen_blocks]:
        block.requires_grad_(False)
    if section.frozen_embeddings:
        model.transformer.wte.requires_grad_(False)
        model.transformer.wpe.requires_grad_(False)
    if section.lora_r is not None:
        check_peft("model.lora_r")
        from peft import inject_adapter_in_model

        inject_adapter_in_model(_lora(section), model, NAME)


def still_blocks(model: GPT2LMHeadModel) -> int:
    """Return how many of the lowest blocks no gradient passes: nothing below or in them learns."""
    if any(p.requires_grad for p in (model.transformer.wte.weight, model.transformer.wpe.weight)):
        return 0
    learns = [any(p.requires_grad for p in block.parameters()) for block in model.transformer.h]
    return learns.index(True) if True in learns else len(learns)


def check_peft(what: str) -> None:
    """See that peft is installed.

    Raises:
        InputError: it is not, and `what` needs it.
    """
    if importlib.util.find_spec("peft") is None:
        raise InputError(f"{what} needs the package peft: run pip install -e '.[lora]'")


def has_adapter(model: torch.nn.Module) -> bool:
    """Whether an adapter is trained in this model."""
    return hasattr(model, "peft_config")


def stored_weights(model: torch.nn.Module) -> tuple[str, dict[str, torch.Tensor]]:
    """Return what of a model is saved, of tied weights only the first: file and tensors by name.

    Of a model with an adapter only that, under peft's names.
    """
    weights = model.state_dict(keep_vars=True)
    if has_adapter(model):
        own = {name: weight for name, weight in weights.items() if ".lora_" in name}
        return ADAPTER_WEIGHTS, {_name_in_file(name): weight for name, weight in own.items()}
    first: dict[int, str] = {}
    for name, weight in weights.items():
        first.setdefault(id(weight), name)
    return WEIGHTS, {name: weights[name] for name in first.values()}


def save_adapter_config(model: torch.nn.Module, folder: Path) -> None:
    """Write what peft opens the adapter with; its base is named as the recipe names it."""
    config = model.peft_config[NAME]
    trains, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = trains


def is_adapter(name: str) -> bool:
    """Whether a folder or Hub name holds an adapter and not a whole model."""
    folder = Path(name)
    if folder.exists():
        return (folder / ADAPTER_CONFIG).exists() and not (folder / WEIGHTS).exists()
    see_hub()
    try:
        return _file(name, ADAPTER_CONFIG) is not None
    except OSError:  # no name of the Hub's: whoever loads it says so
        return False


def attends_across(name: str) -> bool:
    """Whether an adapter's run let documents see each other, by the recipe beside it.

    An adapter has no config of its own that would say so; without a recipe they do.
    """
    with contextlib.suppress(InputError):  # another version's recipe, or another program's file
        if (path := _file(name, "config.yaml")) is not None:
            return read_recipe(Path(path)).data.attend_across
    return True


def _file(name: str, file: str) -> str | None:
    """Return the path of a file in a folder or on the Hub, None where there is none."""
    return cached_file(
        name, file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )  # fmt: skip


def _lora(section: ModelSection) -> "LoraConfig":
    from peft import LoraConfig

    name = section.pretrained
    return LoraConfig(
        r=section.lora_r,
        lora_alpha=section.lora_alpha,
        lora_dropout=section.lora_dropout,
        target_modules=sorted(section.lora_target_modules),
        fan_in_fan_out=True,  # GPT-2's Conv1D holds its weight [inputs, outputs]
        base_model_name_or_path=os.path.abspath(name) if os.path.isdir(name) else name,
        revision=section.revision,
        task_type="CAUSAL_LM",
    )


def _name_in_file(name: str) -> str:
    return IN_FILE + name.replace(f".{NAME}.", ".")
