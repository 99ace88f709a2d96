"""What may differ between a checkpoint and the run that goes on from it, and why not.

A difference is harmless (it changes no weight), applied (the rows keep their order, and the run
goes on with the new value), or refused, unless the person who starts the run allows it by name.
"""

import logging
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from pipeline import artifact
from pipeline.known_fields import training_fields
from pipeline.recipe import InputError, Recipe

logger = logging.getLogger(__name__)

# Where a run lies, how it is shown, when it is saved: nothing of it reaches a weight. Keys of
# `training:` as TrainingArguments names them; a longer name below one of these counts too.
HARMLESS = (
    "data.path", "generation", "evaluation.texts", "faults", "preflight", "hub",
    "training.output_dir",
    "training.report_to", "training.run_name", "training.project", "training.trackio",
    "training.disable_tqdm", "training.log_level", "training.log_on_each_node",
    "training.logging", "training.save_steps", "training.save_total_limit",
    "training.save_strategy", "training.dataloader", "training.skip_memory_metrics",
    "training.ddp_timeout", "training.hub", "training.push_to_hub",
    "training.torch_empty_cache_steps",
)  # fmt: skip

# These keep the order of rows: a run can go on with the new value.
APPLIED = (
    "schedule", "precision", "reduce_dtype", "evaluation", "guards", "optimizer.momentum",
    "optimizer.newton_schulz_steps",
    "optimizer.matrix_rate", "model.attn_implementation", "model.config.attn_pdrop",
    "model.config.embd_pdrop", "model.config.resid_pdrop", "training.learning_rate",
    "training.weight_decay", "training.adam", "training.max_grad_norm", "training.max_steps",
    "training.num_train_epochs", "training.per_device", "training.torch_compile",
    "training.gradient_checkpointing", "training.eval", "training.metric_for_best_model",
    "training.greater_is_better", "training.load_best_model_at_end", "training.use_cpu",
    "training.tf32", "training.ddp", "horizon", "processes", "threads", "versions",
)  # fmt: skip

# All other differences are refused; the longest beginning of a key gives the reason.
REFUSED = {
    "": "it may change what the run learns",
    "tokens_per_update": "an update takes other rows: some would be seen twice, others never",
    "training.seed": "the rows come in another order: some would be seen twice, others never",
    "training.data_seed": "the rows come in another order: some would be seen twice, others never",
    "training.optim": "the state of the optimizer is another one's",
    "optimizer.name": "the state of the optimizer is another one's",
    "data": "the rows are others",
    "cleaning": "the rows are others",
    "rows": "the rows are others",
    "tokenizer": "the same ids mean other text",
    "model": "the weights are another model's",
    "base_fingerprint": "the adapter was trained beside other weights",
}


class Change(NamedTuple):
    """One field in which a run differs from what it goes on from."""

    key: str
    text: str
    """key: old -> new."""
    kind: str
    """harmless, applied or refused."""

    @property
    def reason(self) -> str:
        """Why it is refused."""
        longest = max((k for k in REFUSED if not k or _below(self.key, k)), key=len)
        return REFUSED[longest]


def check(found: Path, now: dict[str, Any], *, horizon: int, allow: Collection[str]) -> int:
    """Say what differs from a checkpoint, and return the update that it was made after.

    Args:
        now: what a checkpoint of the run would be made from.
        horizon: the update with which the run ends.
        allow: fields that may differ though they are refused otherwise.

    Raises:
        InputError: something else differs, or the checkpoint is beyond the horizon.
    """
    manifest = artifact.read_manifest(found)
    was = manifest["made_from"]
    recipe = _with_later_fields(was.get("recipe", {}), Recipe)
    differing = changes(
        {**recipe, **was, "recipe": None, "versions": manifest.get("versions")},
        {**now["recipe"], **now, "recipe": None, "versions": artifact.versions()},
    )
    check_allowed(differing, allow, keys(now["recipe"]))
    if left := refused(differing, allow):
        raise InputError(
            f"{found}: is a checkpoint of another run: {sentence(left)}; else resume it with its "
            "own recipe and text, or start anew in another --training.output_dir"
        )
    step = manifest["facts"].get("step", 0)
    if step > horizon:
        raise InputError(
            f"{found}: has made {step} updates, and the recipe asks for {horizon}; give more "
            "training.max_steps, or name an earlier checkpoint with --resume"
        )
    logger.info("resuming from %s", found)
    for change in differing:
        how = "allowed, and applied" if change.kind == "refused" else change.kind
        logger.info("  differs from the checkpoint: %s (%s)", change.text, how)
    return step


def _with_later_fields(values: dict[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    """Return a checkpoint's recipe with the defaults of fields that did not exist when it was made.

    A field comes with the default that changes nothing for those who do not state it.
    """
    filled = dict(values)
    for name, field in section.model_fields.items():
        inner = field.annotation
        is_section = isinstance(inner, type) and issubclass(inner, BaseModel)
        if name not in values and not field.is_required():
            default = field.get_default(call_default_factory=True)
            filled[name] = default.model_dump(mode="json") if is_section else default
        elif is_section and isinstance(values.get(name), dict):
            filled[name] = _with_later_fields(values[name], inner)
    return filled


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Return every leaf in which two nested descriptions of a run differ."""
    found = []
    for text in artifact.differences(old, new):
        key = text.partition(": ")[0]
        kind = "refused"
        if any(_below(key, name) for name in HARMLESS):
            kind = "harmless"
        elif any(_below(key, name) for name in APPLIED):
            kind = "applied"
        found.append(Change(key, text, kind))
    return found


def refused(found: list[Change], allow: Collection[str]) -> list[Change]:
    """Return the changes that nobody has allowed."""
    left = [change for change in found if change.kind == "refused"]
    return [c for c in left if not any(_is_named(c.key, name) for name in allow)]


def check_allowed(found: list[Change], allow: Collection[str], known: Collection[str] = ()) -> None:
    """See that what is allowed is a field: one that does not differ (any more) needs nothing.

    Raises:
        InputError: it is none; most likely it is misspelt.
    """
    names = sorted(change.key for change in found if change.kind == "refused")
    for name in allow:
        section, _, field = name.partition(".")
        is_a_librarys = section == "training" and field in training_fields()
        if not is_a_librarys and not any(_is_named(key, name) for key in {*names, *known}):
            raise InputError(
                f"--allow_change {name}: there is no such field; "
                + (f"what is refused: {', '.join(names)}" if names else "leave it out")
            )


def is_longer(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Tell whether a run that had ended has something left to do under another recipe."""

    def patience(values: dict[str, Any]) -> float:
        return values["evaluation"]["early_stopping_patience"] or math.inf

    return patience(new) > patience(old) or any(
        float(new["training"].get(name) or 0) > float(old["training"].get(name) or 0)
        for name in ("max_steps", "num_train_epochs")
    )


def sentence(left: list[Change], *, can_go_on: bool = True) -> str:
    """Return what is refused and why, and how to allow it where a run has something left to do."""
    listed = "; ".join(f"{c.text} ({c.reason})" for c in left)
    allowed = f"; to go on all the same add --allow_change {' '.join(c.key for c in left)}"
    return listed + allowed * can_go_on


def described(recipe: Recipe) -> dict[str, Any]:
    """Return what the recipe says about a run as plain values; a default may be spelled out."""
    values = recipe.model_dump(mode="json")
    fields = training_fields()
    values["training"] = {
        name: value
        for name, value in values["training"].items()
        if name not in fields or repr(value) != fields[name].default
    }
    return values


def keys(values: dict[str, Any], key: str = "") -> list[str]:
    """Return the dotted names of nested fields, and those that only a checkpoint knows."""
    found = [] if key else ["rows", "tokenizer_fingerprint", "base_fingerprint"]
    for name, value in values.items():
        inner = f"{key}.{name}" if key else name
        found += [inner, *(keys(value, inner) if isinstance(value, dict) else [])]
    return found


def _below(key: str, name: str) -> bool:
    """Whether `key` is `name`, lies below it, or is a longer name of the same beginning."""
    return key == name or key.startswith((f"{name}.", f"{name}_"))


def _is_named(key: str, name: str) -> bool:
    """Whether a person who writes `name` means `key`: the field, or a section that it lies in."""
    return key == name or key.startswith(f"{name}.")
