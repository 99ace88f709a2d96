"""What can be typed at each door besides a recipe's keys."""

from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.data_sections import NOT_OF_EXAMPLES, SourceFields
from pipeline.sections import CardFields, SamplingFields, Section, TaskNames


class RecipeOptions(Section):
    """Options of every door that reads a recipe."""

    config: str | None = None
    """The recipe (default: recipes/quickstart.yaml)."""
    print_config: bool = False
    """Print the recipe as it would run, and stop."""


class PretrainOptions(RecipeOptions):
    """Options of pretrain.py."""

    resume: str = "auto"
    """auto: from the newest whole checkpoint, else fresh; must; never; a checkpoint's path; or one
    that was pushed whole, hub:USER/NAME@step-000001000."""
    overwrite: bool = False
    """Remove the run that the output folder holds, and start anew."""
    allow_change: list[str] = Field(default_factory=list)
    """Fields that may differ from those of the checkpoint though they are refused otherwise."""
    dry_run: bool = False
    """Prepare the text, check everything that can be known before the first update, and stop."""

    @model_validator(mode="after")
    def _a_dry_run_changes_nothing(self) -> "PretrainOptions":
        if self.dry_run and self.overwrite:
            raise ValueError(
                "--dry_run removes nothing, and --overwrite a run: leave out one of them, or give "
                "the dry run another --training.output_dir"
            )
        if self.dry_run and self.resume.startswith("hub:"):
            raise ValueError(
                f"--dry_run fetches no checkpoint: leave out it or --resume {self.resume}"
            )
        return self


class PrepareOptions(RecipeOptions):
    """Options of prepare_data.py."""

    num_proc: int | None = Field(None, ge=1)
    """Processes that tokenise (default: one for each core, if the text is long enough to pay); the
    rows are the same for any number."""
    show: int | None = Field(None, ge=1)
    """Print that many training rows as text, their documents set apart (of a stream, whose training
    rows are not made yet, validation rows)."""


class TokenizerOptions(RecipeOptions):
    """Options of train_tokenizer.py."""

    compare: str | None = None
    """Folder or Hub name of a tokenizer to compare with, openai-community/gpt2 for instance."""


class MeasureOptions(SourceFields):
    """Options of measure_perplexity.py."""

    model: list[str]
    """Folders or Hub names of the models, each with its tokenizer; several stand side by side."""
    held_out: str | None = None
    """Folder of a run whose held-out text is scored, instead of files or a data set."""
    split: Literal["validation", "test"] = "validation"
    """With held_out: which of its texts."""
    joined: bool | None = None
    """Score the texts laid end to end, end-of-text after each, as held-out text is in training, or
    each by itself (default: joined, unless an option is given that only texts by themselves have).
    """
    block_size: int | None = Field(None, ge=2)
    """Tokens in a window (default: the model's positions)."""
    stride: int | None = Field(None, ge=1)
    """Tokens from the start of one window to that of the next (default and at most block_size - 1);
    the smaller, the more context every token has, and the longer it takes."""
    batch_size: int = Field(8, ge=1)
    """Windows in one forward pass, of shorter ones as many as have as many tokens; it changes no
    number."""
    add_start_token: bool | None = None
    """Texts by themselves: end-of-text before each is the context of its first token (default: yes,
    unless the model was trained with data.attend_across false)."""
    add_end_token: bool = False
    """Texts by themselves: the end-of-text after each is predicted, too."""
    packed: bool = False
    """Texts by themselves: they share windows instead of being filled up; the same numbers."""
    max_length: int | None = Field(None, ge=2)
    """Texts by themselves: tokens of each after which the rest is left out."""
    target: Literal["all", "last_word"] = "all"
    """last_word: only the last word of each text is scored (LAMBADA)."""
    detokenize: Literal["wikitext"] | None = None
    """wikitext: undo WikiText's cutting into words; bytes and words stay those of the text."""
    tasks: TaskNames = Field(default_factory=list)
    """Tasks of lm-eval (hellaswag,lambada_openai,...) or YAML files of your own; needs the extra
    [tasks]."""
    tasks_limit: int | None = Field(None, ge=1)
    """Documents of each task (default: all)."""
    json_: str | None = Field(None, alias="json")
    """File to write the numbers to."""

    @model_validator(mode="after")
    def _one_text(self) -> "MeasureOptions":
        given = [n for n in ("files", "dataset", "held_out") if getattr(self, n) is not None]
        if len(given) > 1 or not given and not self.tasks:
            raise ValueError(
                "give the text by exactly one of --files, --dataset and --held_out (or --tasks "
                "alone)"
            )
        if len({name.rstrip("/") for name in self.model}) < len(self.model):
            raise ValueError("--model names the same model twice")
        if len(set(self.files or [])) < len(self.files or []):
            raise ValueError("--files names the same file twice")
        stated = self.model_fields_set
        ignored = {
            "split": self.held_out is None,
            "tasks_limit": not self.tasks,
            **{n: not self.has_text for n in ("stride", "block_size", "target", "joined")},
            **{n: self.held_out is not None for n in SourceFields.model_fields},
            **{n: self.held_out is not None or self.format != "text" for n in NOT_OF_EXAMPLES},
            **{n: self.dataset is None for n in SourceFields.model_fields if "dataset_" in n},
        }
        for name in sorted(stated):
            if ignored.get(name):
                raise ValueError(f"--{name} has no meaning with these options; leave it out")
        return self

    @property
    def has_text(self) -> bool:
        """Whether there is a text to score, besides tasks."""
        return (self.files or self.dataset or self.held_out) is not None


class WriteReportOptions(Section):
    """Options of write_report.py."""

    runs: list[str] = Field(min_length=1)
    """Folders of runs, finished or not; of several their comparison is written."""
    html: str | None = None
    """File to write (default: report.html in the run's folder; of several runs comparison.html)."""


class PublishOptions(CardFields):
    """Options of publish.py; license and language are those of the card if they are not given."""

    run: str
    """Folder of a finished run, or of any model with its tokenizer; what a run should have pushed
    while it trained and could not is sent first."""
    repo_id: str | None = None
    """USER/NAME on the Hub (default: training.hub_model_id of the run's recipe)."""
    private: bool | None = None
    """Whether only its owner may read it (default: training.hub_private_repo, else true)."""
    revision: str | None = None
    """Branch (default: main; of a checkpoint one of its own, step-000000100)."""
    checkpoint: str | None = None
    """A checkpoint of the run, checkpoint-100 for instance, instead of the result."""
    whole: bool = False
    """Of a checkpoint: also what it takes to go on from it (optimizer, generators, manifest)."""
    title: str | None = None
    """Title of the commit (default: after how many updates)."""
    space: bool = False
    """Also make a page on which the model can be tried, the Space USER/NAME-demo."""
    force: bool = False
    """Write over another model that is there."""
    prepared: bool = False
    """The folder is one that a run has prepared to be sent as it is."""
    dry_run: bool = False
    """Show the files and the card, and contact nobody."""
    attempts: int = Field(5, ge=1)
    """Times that sending is tried."""

    @model_validator(mode="after")
    def _no_contradiction(self) -> "PublishOptions":
        if self.space and self.checkpoint is not None:
            raise ValueError("--space shows a finished model: leave out it or --checkpoint")
        if self.prepared and self.repo_id is None:
            raise ValueError("--prepared is what a run starts; it needs --repo_id")
        return self


# Temperature and top_k by name: those of the course notes, whose "factual" is as precise as they
# get, and between them what is sampled in training (sections.SamplingFields).
PRESETS = {
    "creative": {"temperature": 1.2, "top_k": 100},
    "balanced": {"temperature": 0.8, "top_k": 40},
    "precise": {"temperature": 0.1, "top_k": 10},
    "factual": {"temperature": 0.1, "top_k": 10},
    "code": {"temperature": 0.3, "top_k": 30},
}


class GenerateOptions(SamplingFields):
    """Options of generate.py."""

    model: str
    """Folder or Hub name of the model (or LoRA adapter) and its tokenizer."""
    prompt: str | None = None
    """Beginning to continue; an empty one starts a new document, and <|endoftext|> in it is the
    control token."""
    prompts_file: str | None = None
    """Beginnings to continue, in batches: .txt with one a line (blank lines are left out), or
    .jsonl with a field "prompt"."""
    interactive: bool = False
    """Type prompts and read on as the model writes (the default at a terminal)."""
    preset: Literal["creative", "balanced", "precise", "factual", "code"] = "balanced"
    """Temperature and top_k by name: creative 1.2 and 100, balanced 0.8 and 40, precise or factual
    0.1 and 10, code 0.3 and 30; one that is given, too, wins."""
    num_samples: int = Field(1, ge=1)
    """Texts for each prompt (transformers: num_return_sequences); the seed of each is one more than
    that of the one before, and gives it alone, too."""
    batch_size: int = Field(16, ge=1)
    """Texts that are written together: more of them are faster, and take more memory."""
    chat: bool | None = None
    """The prompt is a message, put into the tokenizer's chat template (default: in the interactive
    mode, if it has one, where the conversation is kept until /new)."""
    output: str | None = None
    """File to write the texts to, JSON lines, instead of showing them."""

    @model_validator(mode="before")
    @classmethod
    def _preset_beneath(cls, values: Any) -> Any:
        return {**PRESETS.get(str(values.get("preset")), {}), **values}

    @model_validator(mode="after")
    def _one_kind_of_prompt(self) -> "GenerateOptions":
        if (self.prompt is not None) + (self.prompts_file is not None) + self.interactive > 1:
            raise ValueError("give one of --prompt, --prompts_file and --interactive, not several")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"--num_samples {self.num_samples}: greedy (--temperature 0) writes the same text "
                "each time; leave it out or raise the temperature"
            )
        if self.interactive and (self.num_samples > 1 or self.output is not None):
            raise ValueError(
                "--num_samples and --output have no meaning with --interactive; leave them out"
            )
        return self


class ConvertOptions(Section):
    """Options of convert_weights.py."""

    source: str
    """nanoGPT's ckpt.pt, the folder of one of OpenAI's TensorFlow checkpoints, or that of a LoRA
    adapter; which it is, is found out by looking."""
    output_dir: str
    """Folder to write, which transformers opens."""
    tokenizer: str | None = None
    """Folder or Hub name of the tokenizer that the model was trained with (default: the source's
    own, if there is one); rows of the embedding beyond its entries are cut off."""
    activation: Literal["gelu", "gelu_new"] | None = None
    """Of a nanoGPT checkpoint: gelu is exact, gelu_new GPT-2's approximation (default: gelu, which
    nanoGPT has had since 17 May 2023; a checkpoint cannot tell)."""
    overwrite: bool = False
    """Replace what an earlier conversion wrote to output_dir."""


class InspectOptions(Section):
    """Options of inspect_weights.py."""

    model: str
    """Folder (of a model, a checkpoint, a LoRA adapter, a TensorFlow checkpoint), file
    (.safetensors, nanoGPT's ckpt.pt) or Hub name."""
    match: str | None = None
    """Only the tensors with such a name, '*.attn.*' for instance."""
    json_: str | None = Field(None, alias="json")
    """File to write the table to."""
