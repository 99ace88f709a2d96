"""A LoRA adapter, merged into the model that it was trained on."""

import warnings

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.reach import check_local
from pipeline.recipe import InputError, first_line
from pipeline.weights import Weights

# Largest difference of a logit before and after merging, which adds the same numbers in another
# order (1e-4 at 12 x 768 with random weights of logits up to 15). What cannot be merged is off by
# far more.
ROUNDING = 1e-3


def base_of(weights: Weights) -> str:
    """Return the folder or Hub name of the model that an adapter was trained on.

    Raises:
        InputError: it is not a LoRA adapter, or it names none.
    """
    kind, name = (weights.settings.get(k) for k in ("peft_type", "base_model_name_or_path"))
    if kind != "LORA":
        raise InputError(f"{weights.path}: is an adapter of type {kind}; only LORA can be merged")
    if not isinstance(name, str) or not name:
        raise InputError(
            f"{weights.path}: adapter_config.json names no base model "
            "(base_model_name_or_path); write its folder or Hub name there"
        )
    return name


def merged_model(weights: Weights) -> PreTrainedModel:
    """Return the base model in fp32 with the adapter merged into it.

    An embedding that the adapter resized or trained comes from the adapter. Where the head computes
    something else than the embedding since then, the two are no longer tied.

    Raises:
        InputError: see `base_of`; or peft is missing, the base cannot be found or is of another
            size, or what the adapter computes cannot be had without it.
    """
    name = base_of(weights)
    model = _base(weights, name)
    embedding = model.get_input_embeddings().weight
    adapted = _adapted(weights, model, name)
    before = _logits(adapted, model)
    if not before.isfinite().all():
        raise InputError(f"{weights.path}: with {name} it computes values that are not finite")
    _untie(adapted, embedding)
    try:
        with warnings.catch_warnings(action="ignore"):  # that the head is no longer tied
            merged = adapted.merge_and_unload()
    except Exception as error:  # kinds of LoRA that depend on the input
        raise InputError(f"{weights.path}: cannot be merged: {first_line(error)}") from None
    difference = (_logits(merged, merged) - before).abs().max().item()
    if not difference <= ROUNDING:
        raise InputError(
            f"{weights.path}: cannot be merged: the plain model's logits would differ by "
            f"{difference:.3g}; use it with peft"
        )
    head, embedding = merged.get_output_embeddings().weight, merged.get_input_embeddings().weight
    merged.config.tie_word_embeddings = torch.equal(head, embedding)
    merged.tie_weights()
    return merged


def _adapted(weights: Weights, model: PreTrainedModel, name: str) -> torch.nn.Module:
    """Return the base model with the adapter beside its weights."""
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError:
        raise InputError(
            f"{weights.path}: is a LoRA adapter, and merging it needs peft: "
            "pip install -e '.[lora]'"
        ) from None
    refused = f"{weights.path}: does not fit its base model {name}"
    try:
        with warnings.catch_warnings(action="ignore"):  # of missing keys, which are looked at below
            adapted = PeftModel.from_pretrained(model, str(weights.path)).eval()
    except Exception as error:  # sizes, modules that the base has not, a config from elsewhere
        raise InputError(f"{refused}: {' '.join(str(error).split())[:200]}") from None
    # What has no place in the base, and what the base would have besides, peft only warns of.
    held = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    differing = {k for k in weights.tensors if ".lora_" in k} ^ {k for k in held if ".lora_" in k}
    if differing:
        raise InputError(
            f"{refused}, which is of another size or architecture: {min(differing)} is only in one "
            "of them"
        )
    return adapted


def _base(weights: Weights, name: str) -> PreTrainedModel:
    try:
        check_local(name, "model", "config.json")
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype="float32", trust_remote_code=False,
            revision=weights.settings.get("revision") or "main",
        )  # fmt: skip
    except Exception as error:  # network, name, file format
        raise InputError(
            f"{weights.path}: its base model {name} (base_model_name_or_path in "
            f"adapter_config.json) cannot be loaded: {first_line(error)}; write there where it is"
        ) from None
    _resize(model, weights)
    return model


def _resize(model: PreTrainedModel, weights: Weights) -> None:
    """Give the base model as many embeddings as the adapter has."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    for key, get in weights.tensors.items():
        if key.startswith(f"base_model.model.{name}.") and key.endswith(".weight"):
            rows = len(get())
            if rows != len(embedding.weight):
                model.resize_token_embeddings(rows, mean_resizing=False)
            return


def _untie(adapted: torch.nn.Module, embedding: torch.nn.Parameter) -> None:
    """Give each module that holds the base's embedding one of its own.

    Merging changes weights in place: an adapter of one of two tied modules would change both.
    """
    holders = [m for m in adapted.modules() if m._parameters.get("weight") is embedding]
    for module in holders[1:]:
        module.weight = torch.nn.Parameter(embedding.detach().clone(), requires_grad=False)


@torch.no_grad()
def _logits(model: torch.nn.Module, base: PreTrainedModel) -> torch.Tensor:
    """Return the logits of a text of some random ids."""
    size, positions = base.config.vocab_size, base.config.max_position_embeddings
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(size, (1, min(32, positions)), generator=source)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
