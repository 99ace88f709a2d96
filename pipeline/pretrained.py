"""The model that a run goes on from: which one it is exactly, and how far it had come."""

import contextlib
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GPT2Config
from transformers.utils import cached_file

from pipeline import artifact
from pipeline.checkpoint import STATE
from pipeline.reach import check_local, not_loaded
from pipeline.recipe import InputError, Recipe
from pipeline.run_files import METRICS
from pipeline.sections import ModelSection

ADAPTER_CONFIG = "adapter_config.json"


def settled(recipe: Recipe) -> Recipe:
    """Return the recipe with the Hub model's commit, and with the updates that lie behind.

    A branch may move on: the recipe that is saved with the run names what was there at its start.

    Raises:
        InputError: see `pretrained_config`; or nothing tells how far that model had come.
    """
    section, schedule = recipe.model, recipe.schedule
    if section.pretrained is None:
        return recipe
    values: dict[str, Any] = {}
    pretrained_config(section)
    if not Path(section.pretrained).exists():
        # In the cache of the Hub's files a folder is named after its commit.
        commit = Path(cached_file(section.pretrained, "config.json", revision=section.revision))
        stated = section.model_dump(exclude_unset=True)
        values["model"] = stated | {"revision": commit.parent.name}
    if schedule.goes_on and not schedule.past_updates:
        stated = schedule.model_dump(exclude_unset=True)
        values["schedule"] = stated | {"past_updates": updates_behind(section)}
    return recipe.with_values(**values)


def pretrained_config(section: ModelSection) -> GPT2Config:
    """Return the configuration of `model.pretrained`.

    Raises:
        InputError: there is no such model, it is an adapter, or not a GPT-2.
    """
    name = section.pretrained
    if (Path(name) / ADAPTER_CONFIG).exists():
        raise InputError(
            f"model.pretrained {name}: is a LoRA adapter; make it one with its base first: "
            f"python pipeline/convert_weights.py --source {name} --output_dir {name}-merged"
        )
    check_local(name, "model", "config.json")
    if section.revision is not None and Path(name).exists():
        raise InputError(f"model.revision: {name} is a folder, which has none; leave it out")
    try:
        config = AutoConfig.from_pretrained(
            name, revision=section.revision, trust_remote_code=False
        )
    except Exception as error:  # network, name, file format
        raise not_loaded(f"model.pretrained {name}", "model", error) from None
    if not isinstance(config, GPT2Config):
        raise InputError(f"model.pretrained {name}: is a {config.model_type}, not a GPT-2")
    return config


def fetch_weights(section: ModelSection) -> None:
    """Have the weights of `model.pretrained` in the cache of the Hub's files, if they are there."""
    for file in ("model.safetensors", "pytorch_model.bin"):
        with contextlib.suppress(OSError):  # whoever opens it says what is wrong
            if cached_file(section.pretrained, file, revision=section.revision) is not None:
                return


def updates_behind(section: ModelSection) -> int:
    """Return after how many updates the weights of `model.pretrained` were saved.

    Raises:
        InputError: neither a run's numbers nor a checkpoint's state lie beside them.
    """
    name = section.pretrained
    for file, key in ((METRICS, "updates"), (STATE, "global_step")):
        try:
            path = cached_file(
                name, file, revision=section.revision, _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )  # fmt: skip
            if path is not None:
                found = json.loads(Path(path).read_text(encoding="utf-8"))
                return int(found[key]) + _behind_that(Path(path).parent, found)
        except (OSError, ValueError, TypeError, KeyError):  # another program's file of that name
            continue
    raise InputError(
        f"schedule.goes_on: nothing at {name} tells after how many updates its weights were saved "
        f"({METRICS} of a run, or {STATE} of a checkpoint); state schedule.past_updates"
    )


def _behind_that(folder: Path, metrics: dict[str, Any]) -> int:
    """Return the updates before those of the run itself, if that one had gone on, too."""
    if "past_updates" in metrics:
        return int(metrics["past_updates"])
    manifest = artifact.read_manifest(folder) or {"made_from": {}}
    recipe = manifest["made_from"].get("recipe") or {}
    return int((recipe.get("schedule") or {}).get("past_updates") or 0)


def weights_fingerprint(section: ModelSection) -> str | None:
    """Return a sha256 over the weights that an adapter is trained on; None where there is none.

    Those of the Hub are known by their commit. All others come out of a checkpoint again.
    """
    if section.lora_r is None or not Path(section.pretrained).exists():
        return None
    folder = Path(section.pretrained)
    return artifact.fingerprint_of(sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]))
