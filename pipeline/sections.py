"""The sections of a recipe: their fields, meanings, defaults and contradictions.

Each is named after the room that reads it; a room receives its own section and never the whole.
"""

import types
import typing
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.licenses import check_language, check_license

SMALLEST_VOCABULARY = 257  # the 256 bytes and <|endoftext|>


class Section(BaseModel):
    """A part of the recipe: frozen, unknown keys refused, text read as the type that is asked."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        coerce_numbers_to_str=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _one_text_is_a_list_of_one(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        names = [n for n, f in cls.model_fields.items() if _is_list_of_text(f.annotation)]
        return values | {n: [values[n]] for n in names if isinstance(values.get(n), str)}


def _is_list_of_text(annotation: Any) -> bool:
    parts = [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(annotation) if part is not types.NoneType]
    if len(parts) != 1 or typing.get_origin(parts[0]) is not list:
        return False
    (inner,) = typing.get_args(parts[0])
    return inner is str or typing.get_origin(inner) is Literal


def _greedy_or_not_tiny(value: float) -> float:
    if 0 < value < 0.01:  # dividing logits by less overflows
        raise ValueError("temperature must be 0 (greedy) or at least 0.01")
    return value


def at_commas(values: list[str]) -> list[str]:
    """Return names of which several may stand in one text, with commas between them."""
    names = [name.strip() for value in values for name in value.split(",")]
    return [name for name in names if name]


TaskNames = Annotated[list[str], AfterValidator(at_commas)]
Temperature = Annotated[float, Field(ge=0), AfterValidator(_greedy_or_not_tiny)]


class TokenizerSection(Section):
    """A byte-level BPE tokenizer: trained on this recipe's training text, or loaded."""

    vocab_size: int | None = Field(None, ge=SMALLEST_VOCABULARY)
    """Entries to train, <|endoftext|> included (at least 257)."""
    pretrained: str | None = None
    """Folder or Hub name of an existing tokenizer, instead of training one."""
    revision: str | None = None
    """Branch, tag or commit of that Hub name."""
    added_tokens: list[str] = Field(default_factory=list)
    """Words that become one token each, besides those of an existing tokenizer; a pretrained model
    begins with the mean of its embeddings for them."""
    sample_bytes: int = Field(100_000_000, ge=1)
    """Training text to train it on, in bytes, taken evenly from all of it: memory stays bounded."""
    sample_document_characters: int = Field(1_000_000, ge=1)
    """Of a longer document only that much is in the sample."""

    @model_validator(mode="after")
    def _no_contradiction(self) -> "TokenizerSection":
        if self.revision is not None and self.pretrained is None:
            raise ValueError("tokenizer.revision has a meaning with tokenizer.pretrained only")
        if self.added_tokens and self.vocab_size is not None:
            raise ValueError(
                "tokenizer.added_tokens are added to an existing tokenizer; one that is trained "
                "anew (tokenizer.vocab_size) learns its entries from the text"
            )
        tokens = self.added_tokens
        if len(set(tokens)) < len(tokens) or any(not token.strip() for token in tokens):
            raise ValueError("tokenizer.added_tokens: an entry is empty or stands there twice")
        return self


# The matrices of a GPT-2's blocks, by the end of their names.
MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


class ModelSection(Section):
    """A GPT2LMHeadModel: fresh from `config`, or `pretrained` and what of it is trained."""

    config: dict[str, Any] | None = None
    """Fields of GPT2Config; vocabulary, positions and special ids are derived; dropout is 0."""
    pretrained: str | None = None
    """Folder or Hub name of a GPT-2 to go on from, instead of `config`."""
    revision: str | None = None
    """Branch, tag or commit of that Hub name (default: main as it is at the start)."""
    cut_positions: bool = False
    """Keep only the first data.block_size of the pretrained positions, instead of all."""
    frozen_blocks: int = Field(0, ge=0)
    """How many of the pretrained blocks, counted from the lowest, stay as they are."""
    frozen_embeddings: bool = False
    """The pretrained embeddings of tokens (and with them the head, which is the same matrix) and of
    positions stay as they are."""
    lora_r: int | None = Field(None, ge=1)
    """Train an adapter of this rank beside the pretrained weights (LoRA), which stay as they are;
    needs the extra [lora]."""
    lora_alpha: float = Field(16.0, gt=0)
    """LoRA: the adapter's output is multiplied by lora_alpha / lora_r."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """LoRA: probability with which an input of the adapter is dropped."""
    lora_target_modules: list[Literal[MATRICES]] = Field(default_factory=lambda: list(MATRICES))
    """LoRA: which matrices of each block have an adapter."""
    attn_implementation: str | None = None
    """Attention: blockwise_causal, sdpa_causal, or one of transformers': eager, sdpa,
    flash_attention_2, ... (default: fastest for device, block and data.attend_across)."""

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelSection":
        if (self.config is None) == (self.pretrained is None):
            raise ValueError(
                "give exactly one of model.config and model.pretrained (null takes one back)"
            )
        lora, stated = ("lora_alpha", "lora_dropout", "lora_target_modules"), self.model_fields_set
        for name, field in type(self).model_fields.items():
            if name in ("config", "pretrained", "attn_implementation"):
                continue
            is_default = getattr(self, name) == field.get_default(call_default_factory=True)
            if name in lora and name in stated and "lora_r" not in stated:
                is_default = False  # whoever states it wants an adapter
            if is_default:
                continue
            if self.pretrained is None:
                raise ValueError(f"model.{name} has a meaning with model.pretrained only")
            if name in lora and self.lora_r is None:
                raise ValueError(f"model.{name} has a meaning with model.lora_r only")
            if name.startswith("frozen") and self.lora_r is not None:
                raise ValueError(
                    f"model.{name}: with model.lora_r all pretrained weights stay as they are; "
                    "leave it out"
                )
        if not self.lora_target_modules:
            raise ValueError("model.lora_target_modules is empty: no matrix would be trained")
        return self


class OptimizerSection(Section):
    """The update rule; rate, decay, betas and clipping are training.learning_rate and its like."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw: what training.optim says; muon: Muon for the matrices of the blocks, AdamW besides."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """muon only: share of the last momentum in the next."""
    newton_schulz_steps: int = Field(5, ge=1, le=20)
    """muon only: steps of the iteration that evens out the singular values."""
    matrix_rate: float = Field(1.0, gt=0)
    """muon only: rate of the matrices as a multiple of training.learning_rate."""

    @model_validator(mode="after")
    def _no_muon_beside_adamw(self) -> "OptimizerSection":
        if self.name == "muon":
            return self
        for name, field in type(self).model_fields.items():
            if name != "name" and getattr(self, name) != field.default:
                raise ValueError(
                    f"optimizer.{name} has a meaning for optimizer.name muon only; leave it out"
                )
        return self


class ScheduleSection(Section):
    """The learning rate over the updates; its peak is training.learning_rate."""

    name: Literal["cosine", "linear", "wsd", "cosine_restarts"] = "cosine"
    """Shape after the warm-up; wsd: stay at the peak, then fall linearly."""
    warmup_steps: float = Field(0.02, ge=0)
    """Linear warm-up in updates; below 1, a fraction of the horizon."""
    horizon_steps: float = Field(1.0, gt=0)
    """Update at which the floor is reached; up to 1, a fraction of all updates."""
    floor: float = Field(0.1, ge=0, le=1)
    """Fraction of the peak that remains at the horizon and ever after."""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """wsd only: share of the horizon over which the rate falls."""
    cycles: int = Field(4, ge=1)
    """cosine_restarts only: how many cosines up to the horizon."""
    goes_on: bool = False
    """After model.pretrained: the rate goes on where that model's run stopped, as if it had been
    planned as long as both together (default: the schedule begins anew)."""
    past_updates: int = Field(0, ge=0)
    """Updates that lie behind (with goes_on default: as many as the model's folder tells)."""

    @model_validator(mode="after")
    def _no_past_without_going_on(self) -> "ScheduleSection":
        if self.past_updates and not self.goes_on:
            raise ValueError("schedule.past_updates has a meaning with schedule.goes_on only")
        return self


class EvaluationSection(Section):
    """What is measured besides the held-out loss."""

    texts: dict[str, str] = Field(default_factory=dict)
    """Perplexity of extra texts at each evaluation, as name: text file."""
    tokens: int | None = Field(None, ge=2)
    """Held-out tokens scored at each evaluation while training, and of each of evaluation.texts
    (default: all; the final numbers always use all)."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after this many evaluations without a better held-out loss."""
    tasks: TaskNames = Field(default_factory=list)
    """Tasks that lm-eval runs while training (hellaswag,lambada_openai,...), or YAML files of your
    own; needs the extra [tasks]."""
    tasks_steps: int | None = Field(None, ge=1)
    """Run them each time after this many updates, and at the end on the saved model."""
    tasks_limit: int | None = Field(None, ge=1)
    """Documents of each task (default: all)."""

    @model_validator(mode="after")
    def _tasks_at_some_time(self) -> "EvaluationSection":
        if self.tasks and self.tasks_steps is None:
            raise ValueError(
                "evaluation.tasks needs evaluation.tasks_steps: the updates after which they run "
                "each time"
            )
        for name in ("tasks_steps", "tasks_limit"):
            if getattr(self, name) is not None and not self.tasks:
                raise ValueError(f"evaluation.{name} has a meaning with evaluation.tasks only")
        return self


class SamplingFields(Section):
    """How a continuation is drawn from a model's probabilities, in transformers' words."""

    max_new_tokens: int = Field(80, ge=1)
    """Length of a continuation in tokens; it stops earlier at end-of-text."""
    temperature: Temperature = 0.8
    """Divides the logits; 0 is greedy."""
    top_k: int = Field(40, ge=0)
    """Sample among this many most likely tokens; 0: all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample among the most likely tokens that together have this probability."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Above 1, tokens that the text has already are less likely (1.2 is the CTRL paper's); 1: off.
    """
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the samples."""


class GenerationSection(SamplingFields):
    """What the model is asked to write at each evaluation and for the summary."""

    prompts: list[str] = Field(default_factory=list)
    """Beginnings to continue."""
    max_new_tokens: int = Field(64, ge=1)
    """Length of a continuation in tokens."""


class CardFields(Section):
    """What a model card states that no run can know."""

    license: str | None = None
    """License of the model, as the Hub names it (apache-2.0, mit, cc-by-4.0, other, ...)."""
    language: list[str] = Field(default_factory=list)
    """Languages of its text (en, bn, pt-BR; code for programs)."""

    @field_validator("language", mode="before")
    @classmethod
    def _norwegian_is_no_boolean(cls, values: Any) -> Any:
        if not isinstance(values, list):
            return values
        return ["no" if code is False else code for code in values]  # YAML's bare `no`

    @field_validator("license")
    @classmethod
    def _a_license_of_the_hub(cls, name: str | None) -> str | None:
        return None if name is None else check_license(name)

    @field_validator("language")
    @classmethod
    def _codes_of_languages(cls, codes: list[str]) -> list[str]:
        return [check_language(code) for code in codes]


class HubSection(CardFields):
    """What the Hub is sent and told, if training.push_to_hub is true."""

    branches: bool = False
    """Each checkpoint also stays on a branch of its own, step-000001000."""
    overwrite: bool = False
    """Whether a repository that holds another model may be written over."""
    timeout_seconds: float = Field(3600.0, gt=0)
    """A push that takes longer is given up, and tried again."""
    attempts: int = Field(5, ge=1)
    """Times that pushes may fail in a row when the run has ended (until then they are tried again
    and again); what is still missing then is sent by publish.py."""
