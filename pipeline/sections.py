"""The sections of a recipe: their fields, meanings, defaults and contradictions.

Each is named after the room that reads it; a room receives its own section and never the whole.
"""

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


def _listed(values: Any, name: str) -> Any:
    """Return a section's values in which one text stands for a list of one."""
    if isinstance(values, dict) and isinstance(values.get(name), str):
        values = {**values, name: [values[name]]}
    return values


def _greedy_or_not_tiny(value: float) -> float:
    if 0 < value < 0.01:  # dividing logits by less overflows
        raise ValueError("temperature must be 0 (greedy) or at least 0.01")
    return value


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

    @field_validator("added_tokens", mode="before")
    @classmethod
    def _one_token_is_a_list(cls, values: Any) -> Any:
        return [values] if isinstance(values, str) else values

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


# What has no meaning for prompts and completions, and what follows from them.
NOT_OF_EXAMPLES = ("text_column", "separator", "join_rows")
EXAMPLES_ARE = {"packing": "best_fit", "attend_across": False}


class SourceFields(Section):
    """Where documents come from and how they are told apart."""

    files: list[str] | None = None
    """Text files, folders (their text and table files), globs, .txt/.jsonl/.csv/.parquet (also
    .gz and .zst), python:stdlib, or python:packages (the installed packages' .py files)."""
    dataset: str | None = None
    """Hub name (or local folder) of a data set, instead of files."""
    dataset_config: str | None = None
    """Configuration of that data set."""
    dataset_split: str = "train"
    """Split of that data set to read documents from."""
    dataset_revision: str | None = None
    """Branch, tag or commit of that data set."""
    format: Literal["text", "prompt_completion", "messages"] = "text"
    """text: documents. Tables with the columns prompt and completion, or messages (each a list of
    role and content): the completion, or what the assistant says, is all that is predicted."""
    text_column: str = "text"
    """Column of a table or data set that holds a document's text."""
    separator: str | None = Field(None, min_length=1)
    """What stands between the documents of a text file (default: a file is one document); \\n and
    \\t are read as line feed and tab."""
    join_rows: bool = False
    """The rows of a table are pieces of one text (WikiText's lines), to be joined by the separator,
    if there is one."""
    errors: Literal["strict", "replace"] = "strict"
    """Bytes or characters that are not Unicode text: stop and name them, or put U+FFFD there."""

    @model_validator(mode="before")
    @classmethod
    def _one_file_is_a_list(cls, values: Any) -> Any:
        return _listed(values, "files")

    @property
    def separator_bytes(self) -> bytes | None:
        """The separator as it stands in a file."""
        if self.separator is None:
            return None
        return self.separator.replace("\\n", "\n").replace("\\t", "\t").encode()


class SourceSection(SourceFields):
    """One of several sources of a mixture."""

    name: str | None = None
    """What tables call it (default: its first file, or the data set)."""
    weight: float | None = Field(None, ge=0)
    """Share of the training tokens; all sources have one and they sum to 1, or none has."""

    @model_validator(mode="after")
    def _one_origin(self) -> "SourceSection":
        if (self.files is None) == (self.dataset is None):
            raise ValueError("every entry of data.sources has exactly one of files and dataset")
        return self


class DataSection(SourceFields):
    """Documents, their split into training, validation and test, and the rows cut from them."""

    sources: list[SourceSection] | None = None
    """Several sources instead of one, each with its own files or dataset, and with weights."""
    mixture_tokens: int | None = Field(None, ge=1)
    """With weights: training tokens wanted (default: as many as leave the weights true)."""
    validation_files: list[str] | None = None
    """Files that are the validation text, instead of data.validation_fraction of the sources."""
    test_files: list[str] | None = None
    """Files that are the test text, instead of data.test_fraction of the sources."""
    validation_split: str | None = None
    """Split of data.dataset that is the validation text, as validation_files."""
    test_split: str | None = None
    """Split of data.dataset that is the test text, as test_files."""
    hold_out: Literal["auto", "documents", "tail"] = "auto"
    """Hold out whole documents by a hash of their text, or the end of every document (auto: the
    tail when there are fewer than 100 documents)."""
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    """Share held out for validation."""
    test_fraction: float = Field(0.05, ge=0, lt=1)
    """Share held out for the final test."""
    block_size: int = Field(1024, ge=2)
    """Tokens in a row."""
    packing: Literal["concatenate", "best_fit", "sliding"] = "concatenate"
    """concatenate: one stream cut into rows; best_fit: whole documents, placed so that least is
    filled up; sliding: windows that overlap."""
    stride: int | None = Field(None, ge=1)
    """sliding only: tokens from the start of one row to that of the next."""
    attend_across: bool = True
    """Whether a token sees the documents before its own in the same row; false keeps attention and
    positions within each document."""
    streaming: bool = False
    """Tokenise on the way to the device instead of beforehand, for text larger than the disk."""
    held_out_from_bytes: int = Field(256_000_000, ge=1)
    """streaming only: the held-out documents are those in that much of the text's beginning."""
    path: str | None = None
    """Folder of the prepared rows (default: <training.output_dir>/blocks)."""

    @model_validator(mode="before")
    @classmethod
    def _one_held_out_file_is_a_list(cls, values: Any) -> Any:
        return _listed(_listed(values, "validation_files"), "test_files")

    @model_validator(mode="before")
    @classmethod
    def _examples_are_kept_whole(cls, values: Any) -> Any:
        """State what follows from the format; what contradicts it is found below."""
        if isinstance(values, dict) and _formats(values) - {"text"}:
            values = {**EXAMPLES_ARE, **values}
        return values

    @model_validator(mode="after")
    def _no_contradiction(self) -> "DataSection":
        given = [self.files is not None, self.dataset is not None, self.sources is not None]
        if sum(given) != 1:
            raise ValueError(
                "give exactly one of data.files, data.dataset and data.sources (null takes one "
                "back)"
            )
        stated = self.model_fields_set
        if self.sources is not None:
            misplaced = [n for n in SourceFields.model_fields if n in stated and getattr(self, n)]
            if misplaced:
                raise ValueError(
                    f"data.{misplaced[0]} beside data.sources: state it in each source instead"
                )
            _check_weights(self.sources)
        if self.example_format is not None:
            self._check_examples()
        for split in ("validation", "test"):
            if getattr(self, f"{split}_split") is None:
                continue
            if self.dataset is None or getattr(self, f"{split}_files"):
                raise ValueError(
                    f"data.{split}_split names a split of data.dataset; for files there is "
                    f"data.{split}_files"
                )
        if self.packing == "sliding":
            if self.stride is None or self.stride > self.block_size:
                raise ValueError(
                    "data.packing sliding needs data.stride, from 1 to data.block_size "
                    f"({self.block_size}); got {self.stride}"
                )
        elif self.stride is not None:
            raise ValueError("data.stride has a meaning for data.packing sliding only")
        if self.streaming and self.packing != "concatenate":
            raise ValueError(
                f"data.packing {self.packing} has to see all documents first; with data.streaming "
                "only concatenate works"
            )
        if self.held_out_fraction("validation") + self.held_out_fraction("test") >= 1:
            raise ValueError(
                "data.validation_fraction and data.test_fraction leave nothing to train on: "
                "their sum must be below 1"
            )
        return self

    def _check_examples(self) -> None:
        sources, given = self.sources or [self], f"with data.format {self.example_format}"
        if len({source.format for source in sources}) > 1:
            raise ValueError(
                "data.sources: every source has the same format, since text is packed otherwise "
                "than prompts and completions"
            )
        for name in NOT_OF_EXAMPLES:
            if any(name in s.model_fields_set and getattr(s, name) for s in sources):
                raise ValueError(f"data.{name} has no meaning {given}; leave it out")
        if self.streaming:
            raise ValueError(
                f"data.streaming: {given} examples are kept whole, for which all of them have to "
                "be seen first; leave it out"
            )
        if self.hold_out == "tail":
            raise ValueError(f"data.hold_out tail: {given} examples are held out whole")
        for name, value in EXAMPLES_ARE.items():
            if getattr(self, name) != value:
                said, stated = (str(v).lower() for v in (value, getattr(self, name)))
                raise ValueError(
                    f"data.{name} {stated}: {given} it is {said}, so that no example is cut or "
                    "sees another; leave it out"
                )

    @property
    def example_format(self) -> str | None:
        """prompt_completion or messages; None where documents are predicted from end to end."""
        found = (self.sources or [self])[0].format
        return None if found == "text" else found

    @property
    def all_sources(self) -> list[SourceSection]:
        """The sources, also where there is only one."""
        if self.sources is not None:
            return self.sources
        fields = {n: getattr(self, n) for n in SourceFields.model_fields}
        return [SourceSection(**fields)]

    @property
    def is_weighted(self) -> bool:
        """Whether the sources are mixed by weights."""
        return self.all_sources[0].weight is not None

    def held_out_fraction(self, split: str) -> float:
        """Return the share of the sources' documents that a split takes, 0 if it has its own."""
        return 0.0 if self.has_own(split) else getattr(self, f"{split}_fraction")

    def has_own(self, split: str) -> bool:
        """Whether a held-out split has text of its own."""
        return bool(getattr(self, f"{split}_files") or getattr(self, f"{split}_split"))


def _formats(values: dict[str, Any]) -> set[Any]:
    """Return the formats that a `data:` section states."""
    sources = values.get("sources")
    found = [values, *sources] if isinstance(sources, list) else [values]
    formats = [
        s.get("format") if isinstance(s, dict) else getattr(s, "format", None) for s in found
    ]
    return {one or "text" for one in formats}


def _check_weights(sources: list[SourceSection]) -> None:
    weights = [source.weight for source in sources]
    if not sources:
        raise ValueError("data.sources is an empty list; give at least one source")
    if all(weight is None for weight in weights):
        return
    if any(weight is None for weight in weights):
        raise ValueError("data.sources: either every source has a weight or none has")
    if abs(sum(weights) - 1) > 1e-6:
        raise ValueError(
            f"data.sources: the weights sum to {sum(weights):g}; they are fractions of the "
            "training tokens and must sum to 1"
        )


class CleaningSection(Section):
    """What is left out of the training text; every step is counted, none is on by itself."""

    deduplicate: bool = False
    """Keep only the first of documents with the same text."""
    decontaminate: Literal["copies", "drop", "cut"] | None = None
    """Training documents that are also held-out text: drop these copies; or drop all that share 13
    tokens in a row with held-out text or a benchmark, or cut those tokens out."""
    benchmark_files: list[str] = Field(default_factory=list)
    """Files to keep out of the training text besides the held-out text (for decontaminate)."""
    shortest: int = Field(1, ge=1)
    """Characters that a document must have."""
    longest: int | None = Field(None, ge=1)
    """Characters that a document may have."""
    normalization: Literal["NFC", "NFD", "NFKC", "NFKD"] | None = None
    """Unicode normalisation of every document, before anything else looks at it."""

    @model_validator(mode="before")
    @classmethod
    def _one_benchmark_is_a_list(cls, values: Any) -> Any:
        return _listed(values, "benchmark_files")

    @model_validator(mode="after")
    def _no_contradiction(self) -> "CleaningSection":
        if self.benchmark_files and self.decontaminate in (None, "copies"):
            raise ValueError("cleaning.benchmark_files needs cleaning.decontaminate: drop or cut")
        if self.longest is not None and self.longest < self.shortest:
            raise ValueError("cleaning.longest is below cleaning.shortest: no document is both")
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

    @model_validator(mode="before")
    @classmethod
    def _one_matrix_is_a_list(cls, values: Any) -> Any:
        return _listed(values, "lora_target_modules")

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelSection":
        if (self.config is None) == (self.pretrained is None):
            raise ValueError(
                "give exactly one of model.config and model.pretrained (null takes one back)"
            )
        lora = ("lora_alpha", "lora_dropout", "lora_target_modules")
        for name, field in type(self).model_fields.items():
            if name in ("config", "pretrained", "attn_implementation"):
                continue
            if getattr(self, name) == field.get_default(call_default_factory=True):
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
    tasks: list[str] = Field(default_factory=list)
    """Tasks that lm-eval runs while training (hellaswag,lambada_openai,...), or YAML files of your
    own; needs the extra [tasks]."""
    tasks_steps: int | None = Field(None, ge=1)
    """Run them each time after this many updates, and at the end on the saved model."""
    tasks_limit: int | None = Field(None, ge=1)
    """Documents of each task (default: all)."""

    @field_validator("tasks", mode="before")
    @classmethod
    def _tasks_at_commas(cls, values: Any) -> Any:
        listed = values.split(",") if isinstance(values, str) else values
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            return listed  # the type is wrong, and pydantic says so
        names = [name.strip() for value in listed for name in value.split(",")]
        return [name for name in names if name]

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

    @model_validator(mode="before")
    @classmethod
    def _one_prompt_is_a_list(cls, values: Any) -> Any:
        return _listed(values, "prompts")


class FaultSection(Section):
    """What a run does when something goes wrong."""

    grace_seconds: float = Field(25.0, gt=0)
    """Time from the first SIGTERM, SIGINT or SIGUSR1 to the end; a save that takes longer is
    skipped, and the last whole checkpoint stands (schedulers and launchers kill after 30)."""
    hang_seconds: float = Field(600.0, gt=0)
    """A process that neither ends a batch nor a save for so long ends the job and says where it
    was; the first update, which compiles, may take as long."""
    rollbacks: int = Field(0, ge=0)
    """Times that a loss or gradient that is not finite sends the run back to the newest whole
    checkpoint, to go on without the rows of that update; after that, and by default, it stops."""


class CardFields(Section):
    """What a model card states that no run can know."""

    license: str | None = None
    """License of the model, as the Hub names it (apache-2.0, mit, cc-by-4.0, other, ...)."""
    language: list[str] = Field(default_factory=list)
    """Languages of its text (en, bn, pt-BR; code for programs)."""

    @model_validator(mode="before")
    @classmethod
    def _one_language_is_a_list(cls, values: Any) -> Any:
        values = _listed(values, "language")
        if isinstance(values, dict) and isinstance(values.get("language"), list):
            # YAML reads a bare `no`, Norwegian, as false.
            spelled = ["no" if code is False else code for code in values["language"]]
            values = {**values, "language": spelled}
        return values

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
    """Times that a push is tried; what is still missing then is sent by publish.py."""
