"""Weights of nanoGPT and of OpenAI's TensorFlow code, as a `GPT2LMHeadModel` has them.

All three name the same parameters. nanoGPT keeps its matrices transposed (nn.Linear instead of
Conv1D) and may have no biases; OpenAI's matrices have a leading dimension of 1.
"""

import re
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.recipe import InputError
from pipeline.weights import MASK, OPTIMIZER, Kind, Weights

HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
TRANSPOSED = re.compile(r".*\.(c_attn|c_proj|c_fc)\.weight")  # in nn.Linear
GELU, TANH_GELU = "gelu", "gelu_new"  # transformers' names: exact, and GPT-2's approximation
# GPT2Config's names for what model_args and hparams.json say.
SIZES = {
    Kind.NANOGPT: {
        "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd",
        "n_positions": "block_size", "vocab_size": "vocab_size",
    },
    Kind.TENSORFLOW: {
        "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd",
        "n_positions": "n_ctx", "vocab_size": "n_vocab",
    },
}  # fmt: skip


def foreign_model(
    weights: Weights, *, activation: str | None = None, vocab_size: int | None = None
) -> GPT2LMHeadModel:
    """Return nanoGPT's or OpenAI's weights as a model in fp32.

    Args:
        activation: what the config says instead of the kind's own.
        vocab_size: the embedding's rows from there on are cut off.

    Raises:
        InputError: the sizes are not stated or do not fit the tensors, a tensor is missing or has
            no place in a GPT-2, or a value is not finite.
    """
    config = config_of(weights)
    config.activation_function = activation or activation_of(weights)
    with torch.device("meta"):  # names and shapes, no memory
        shapes = {n: t.shape for n, t in GPT2LMHeadModel(config).state_dict().items()}
    state = gpt2_state(weights, shapes)
    if vocab_size is not None:
        config.vocab_size = vocab_size
        for name in {EMBEDDING, HEAD} & state.keys():
            state[name] = state[name][:vocab_size].clone()
    config.tie_word_embeddings = HEAD not in state or torch.equal(state[HEAD], state[EMBEDDING])
    if config.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model.eval()


def activation_of(weights: Weights) -> str:
    """Return the activation function of the code that wrote the weights, as far as it is known.

    OpenAI's has the approximation. nanoGPT's has nn.GELU(), which is exact, since commit 594068e7
    of 17 May 2023, and the approximation before; model_args say `bias` since 27 January 2023.
    """
    is_exact = weights.kind == Kind.NANOGPT and "bias" in weights.settings
    return GELU if is_exact else TANH_GELU


def config_of(weights: Weights) -> GPT2Config:
    """Return the configuration that the sizes beside the weights say.

    Raises:
        InputError: one is missing or cannot be.
    """
    names = SIZES[weights.kind]
    stated = {name: weights.settings.get(theirs) for name, theirs in names.items()}
    for name, value in stated.items():
        if not isinstance(value, int) or value < 1:
            said = f"got {value!r}" if names[name] in weights.settings else "it is missing"
            raise InputError(
                f"{weights.path}: {_source(weights)} must give {names[name]} as a number of at "
                f"least 1; {said}"
            )
    if stated["n_embd"] % stated["n_head"]:
        raise InputError(
            f"{weights.path}: n_embd {stated['n_embd']} is not a multiple of n_head "
            f"{stated['n_head']}; that is no GPT-2"
        )
    # OpenAI published no dropout rate; GPT2Config's own is what the Hub's copies of GPT-2 have.
    dropout = weights.settings.get("dropout", GPT2Config().resid_pdrop)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT2Config(**stated, **rates, bos_token_id=None, eos_token_id=None)


def gpt2_state(weights: Weights, shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Return the tensors in fp32 under GPT2LMHeadModel's names, of these shapes.

    The head is there only if the source has one. Biases that a source has nowhere are zeros.

    Raises:
        InputError: see `foreign_model`.
    """
    is_nanogpt = weights.kind == Kind.NANOGPT
    theirs = {name: name if is_nanogpt else tensorflow_name(name) for name in shapes}
    known = {n for n in weights.tensors if not MASK.fullmatch(n) and not OPTIMIZER.fullmatch(n)}
    if unknown := sorted(known - set(theirs.values())):
        raise InputError(
            f"{weights.path}: a GPT-2 of the sizes in {_source(weights)} has no place for "
            f"{unknown[0]}" + (f" and {len(unknown) - 1} more" if unknown[1:] else "")
        )
    has_biases = not is_nanogpt or any(name.endswith(".bias") for name in known)
    state = {}
    for name, shape in shapes.items():
        if theirs[name] in known:
            state[name] = _fitting(weights, theirs[name], shape, TRANSPOSED.fullmatch(name))
        elif name.endswith(".bias") and not has_biases:
            state[name] = torch.zeros(shape)
        elif name != HEAD:
            raise InputError(f"{weights.path}: lacks {theirs[name]}")
    return state


def tensorflow_name(name: str) -> str:
    """Return OpenAI's name of a parameter: transformer.h.0.ln_1.weight is model/h0/ln_1/g."""
    name = re.sub(r"\.h\.(\d+)\.", r".h\1.", name.removeprefix("transformer"))
    if name.endswith(("wte.weight", "wpe.weight")):
        return "model" + name.removesuffix(".weight").replace(".", "/")
    weight = "g" if ".ln_" in name else "w"
    name = re.sub(r"weight$", weight, re.sub(r"bias$", "b", name))
    return "model" + name.replace(".", "/")


def _fitting(
    weights: Weights, name: str, shape: torch.Size, is_matrix: re.Match[str] | None
) -> torch.Tensor:
    """Return a tensor of a source in fp32 and of this shape, in memory of its own."""
    tensor, wanted = weights.tensors[name](), tuple(shape)
    if is_matrix and weights.kind == Kind.NANOGPT:
        wanted = wanted[::-1]
    elif is_matrix:
        wanted = (1, *wanted)
    if tuple(tensor.shape) != wanted:
        raise InputError(
            f"{weights.path}: {name} is {_spelled(tensor.shape)}, and by the sizes in "
            f"{_source(weights)} it should be {_spelled(wanted)}"
        )
    if is_matrix:
        tensor = tensor.T if weights.kind == Kind.NANOGPT else tensor[0]
    tensor = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not tensor.isfinite().all():
        raise InputError(
            f"{weights.path}: {name} holds values that are not finite; "
            f"python pipeline/inspect_weights.py --model {weights.path} shows all such tensors"
        )
    return tensor


def _source(weights: Weights) -> str:
    return "model_args" if weights.kind == Kind.NANOGPT else "hparams.json"


def _spelled(shape: Any) -> str:
    return " x ".join(map(str, shape))
