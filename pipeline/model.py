"""A `GPT2LMHeadModel`, fresh or pretrained, that fits tokenizer and block."""

import copy
import functools
import logging
import math
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from pipeline import adaptation
from pipeline.attention import check_documents_are_apart
from pipeline.blocks import NO_LABEL
from pipeline.linear_cross_entropy import linear_cross_entropy
from pipeline.merging import merged_model
from pipeline.model_shape import check_config, check_pretrained
from pipeline.pretrained import pretrained_config
from pipeline.reach import check_local, not_loaded
from pipeline.recipe import InputError, first_line
from pipeline.sections import ModelSection
from pipeline.weights import open_weights

# Pre-training passes over its text about once, where dropout only slows learning (nanoGPT, llm.c);
# GPT2Config's own default is 0.1.
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


# Rows are never padded, so there is no mask to pass; that pad is end-of-text is GPT-2's way.
logging.getLogger("transformers.modeling_utils").addFilter(
    lambda record: "passing in an `attention_mask`" not in str(record.msg)
)


def check_model(section: ModelSection, *, block_size: int) -> None:
    """Check what can be known before any data is read.

    Raises:
        InputError: see `check_config`; GPT2Config refuses a value, or the pretrained model
            is missing, not a GPT-2, or has fewer positions than `block_size`.
    """
    if section.pretrained is not None:
        config = pretrained_config(section)
        if section.lora_r is not None:
            adaptation.check_peft("model.lora_r")
        check_pretrained(
            section, positions=config.n_positions, layers=config.n_layer, block_size=block_size
        )
        return
    check_config(section.config)
    config = _fresh_config(section, vocab_size=257, block_size=block_size, end_of_text=0)
    for name in NO_DROPOUT:
        if not 0 <= getattr(config, name) < 1:
            raise InputError(
                f"model.config.{name}: is a probability, at least 0 and below 1; got "
                f"{section.config[name]}"
            )
    if config.activation_function not in ACT2FN:
        raise InputError(
            f"model.config.activation_function: {config.activation_function!r} is not one of "
            f"{', '.join(sorted(ACT2FN))}"
        )


def build_model(
    section: ModelSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    seed: int,
    attend_across: bool = True,
    added_tokens: int = 0,
) -> GPT2LMHeadModel:
    """Return the model in fp32, its vocabulary, positions and special ids set.

    Of a pretrained model the tokenizer's last `added_tokens` entries begin with the mean embedding.

    Fresh weights follow GPT-2 (Radford et al. 2019): normal with standard deviation 0.02, the
    projections into the residual stream 0.02 / sqrt(2 * layers). With `attend_across` false the
    config says so, for whoever measures the model, and the attention surely keeps documents apart.

    Raises:
        InputError: see `check_model`; or the tokenizer has ids that a pretrained model lacks; or
            the attention cannot keep documents apart.
    """
    check_model(section, block_size=block_size)
    end_of_text = tokenizer.eos_token_id
    torch.manual_seed(seed)
    options = {"attn_implementation": section.attn_implementation}
    try:
        if section.pretrained is not None:
            model = GPT2LMHeadModel.from_pretrained(
                section.pretrained, revision=section.revision, dtype="float32", **options
            )
        else:
            config = _fresh_config(
                section,
                vocab_size=len(tokenizer),
                block_size=block_size,
                end_of_text=end_of_text,
            )
            model = GPT2LMHeadModel._from_config(config, **options)
    except Exception as error:  # an attention unknown or not installed; weights missing or torn
        if "attn_implementation" in str(error) or isinstance(error, ImportError):
            raise InputError(f"model.attn_implementation: {first_line(error)}") from None
        if section.pretrained is None:
            raise InputError(f"model.config: {first_line(error)}") from None
        raise not_loaded(f"model.pretrained {section.pretrained}", "model", error) from None
    known = len(tokenizer) - added_tokens
    if known > model.config.vocab_size:
        raise InputError(
            f"the tokenizer has {known} entries, but {section.pretrained} knows only "
            f"{model.config.vocab_size}; leave out tokenizer: to use the model's own"
        )
    if section.pretrained is not None:
        adaptation.fit_vocabulary(model, known=known, wanted=len(tokenizer))
        if section.cut_positions:
            adaptation.fit_positions(model, block_size)
        adaptation.choose_trained(model, section)
    if not attend_across:
        check_documents_are_apart(model)
    if not attend_across or hasattr(model.config, "attend_across"):
        model.config.attend_across = attend_across
    set_generation_fields(model, end_of_text)
    # `GPT2LMHeadModel` has no loss type of its own, and Trainer then divides the summed loss by
    # block_size instead of by the block_size - 1 tokens that are predicted.
    model.loss_type = "ForCausalLM"
    model.forward = types.MethodType(_forward_with_loss_or_logits, model)
    _use_fused_activation(model)
    return model


def set_generation_fields(model: PreTrainedModel, end_of_text: int | None) -> None:
    """Say in the configs that bos, eos and pad are end-of-text, and how long a text may become."""
    # Stock `pipeline("text-generation")` otherwise asks for more tokens than there are positions.
    positions = model.config.max_position_embeddings
    model.generation_config.max_new_tokens = max(1, positions // 2)
    model.config.bos_token_id = model.generation_config.bos_token_id = end_of_text
    model.config.eos_token_id = model.generation_config.eos_token_id = end_of_text
    model.config.pad_token_id = model.generation_config.pad_token_id = end_of_text


@functools.wraps(GPT2LMHeadModel.forward)
def _forward_with_loss_or_logits(
    self: GPT2LMHeadModel,
    input_ids: torch.Tensor | None = None,
    *args: Any,
    labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs: Any,
) -> CausalLMOutputWithCrossAttentions:
    """Return the stock output without labels, and with them the same loss alone.

    As in the stock model, position t predicts label t + 1, and the sum is divided by
    `num_items_in_batch`, the labels of the whole update in all processes, or by this batch's own.
    """
    if labels is None:
        return GPT2LMHeadModel.forward(self, input_ids, *args, **kwargs)
    kwargs |= {"use_cache": False, "return_dict": True}  # a cache hides where documents begin
    hidden = self.transformer(input_ids, *args, **kwargs).last_hidden_state
    wanted = labels[:, 1:]
    nats = linear_cross_entropy(hidden[:, :-1].flatten(0, 1), self.lm_head.weight, wanted.flatten())
    count = (wanted != NO_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
    return CausalLMOutputWithCrossAttentions(loss=nats / count)


def _use_fused_activation(model: PreTrainedModel) -> None:
    """Take one kernel for GPT-2's activation; the config goes on saying `gelu_new`."""
    if isinstance(model, GPT2LMHeadModel) and model.config.activation_function == "gelu_new":
        for block in model.transformer.h:
            block.mlp.act = TanhGELU()


class TanhGELU(torch.nn.Module):
    """GPT-2's activation (`gelu_new` in its config) in one kernel instead of eight.

    Compiled for a CPU it is written with the logistic function, 1 + tanh(u) = 2 / (1 + exp(-2u)):
    a vectorised exp costs a third of a tanh.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (Hendrycks & Gimpel 2016)."""
        if torch.compiler.is_compiling() and x.device.type == "cpu":
            return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
        return F.gelu(x, approximate="tanh")


def model_with(weights: dict[str, torch.Tensor], config: GPT2Config) -> GPT2LMHeadModel:
    """Return a model of its own with these weights, to be used and not trained."""
    attention = config._attn_implementation
    model = GPT2LMHeadModel._from_config(copy.deepcopy(config), attn_implementation=attention)
    model.load_state_dict(weights, strict=False)  # a tied one is stored once
    model.tie_weights()
    _use_fused_activation(model)
    return model.eval()


def load_model(name: str) -> PreTrainedModel:
    """Return the causal language model in a folder or on the Hub, in fp32, on the best device.

    An adapter comes with its base, its products added to the weights.

    Raises:
        InputError: there is none, or it is an adapter and peft is not installed.
    """
    if not Path(name).exists():
        check_local(name, "model", "config.json")
    if adaptation.is_adapter(name):
        model = merged_model(open_weights(name))
        model.config.attend_across = adaptation.attends_across(name)
    else:
        check_local(name, "model", "config.json")
        try:
            model = AutoModelForCausalLM.from_pretrained(
                name, dtype="float32", trust_remote_code=False
            )
        except Exception as error:  # network, name, file format
            raise not_loaded(name, "model", error) from None
    _use_fused_activation(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to("mps" if torch.backends.mps.is_available() else device).eval()


def parameter_count(model: GPT2LMHeadModel, *, trained: bool = False) -> int:
    """Return the number of parameters, or of those that are trained, the tied embedding once."""
    return sum(
        getattr(p, "ds_numel", p.numel())
        for p in model.parameters()
        if p.requires_grad or not trained
    )


def _fresh_config(
    section: ModelSection, *, vocab_size: int, block_size: int, end_of_text: int
) -> GPT2Config:
    try:
        return GPT2Config(
            **NO_DROPOUT
            | section.config
            | {
                "vocab_size": vocab_size,
                "n_positions": block_size,
                "bos_token_id": end_of_text,
                "eos_token_id": end_of_text,
                "pad_token_id": end_of_text,
            }
        )
    except Exception as error:  # huggingface_hub's strict dataclasses raise classes of their own
        raise InputError(f"model.config: {' '.join(str(error).split())}") from None
