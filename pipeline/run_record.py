"""A run as its folder tells it: recipe, numbers, logs, samples and data, finished or not."""

import json
import math
import re
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any, NamedTuple

import yaml

from pipeline import artifact
from pipeline.checkpoint import STATE, checkpoints, step_of
from pipeline.curves import Panel, panels
from pipeline.footprint import Footprint, footprint
from pipeline.gap import Verdict, verdict
from pipeline.planning import flops_per_token
from pipeline.recipe import InputError
from pipeline.run_files import (
    CONFIG,
    HISTORY,
    METRICS,
    SAMPLES,
    STATUS,
    read_seen,
    read_status,
)
from pipeline.wording import finite

# Keys of a recipe that hold files of the machine: only their names are for others to see.
FILE_KEYS = ("files", "validation_files", "test_files", "benchmark_files", "texts", "path")


class RunRecord(NamedTuple):
    """What a run's folder holds, as it is read by people: nothing in it names a folder."""

    name: str
    state: str
    """finished, or what run_status.json says: running, preempted, failed, unknown."""
    why: str
    recipe: dict[str, Any]
    """As saved, without output_dir; of files only their names."""
    metrics: dict[str, Any]
    """Those of metrics.json; of an unfinished run what its newest checkpoint tells."""
    history: list[dict[str, Any]]
    samples: list[tuple[int, str]]
    """(update, text) of the first, the middle and the last evaluation."""
    data: dict[str, Any]
    """The prepared rows' facts, and of the held-out splits the sha256 of their rows."""
    model_config: dict[str, Any]

    @property
    def is_finished(self) -> bool:
        """Whether the final numbers are there."""
        return self.state == "finished"

    @property
    def panels(self) -> list[Panel]:
        """The curves."""
        return panels(self.history)

    @property
    def verdict(self) -> Verdict:
        """What training and held-out loss say together."""
        keeps = bool(self.recipe.get("training", {}).get("load_best_model_at_end"))
        return verdict(self.history, keeps_best=keeps)

    @property
    def flops(self) -> int | None:
        """Floating-point operations of all updates: what the run counted, or 6N + 12LCT a token."""
        have, config = self.metrics, self.model_config
        if {"flops_per_token", "train_tokens"} <= set(have):
            return have["flops_per_token"] * have["train_tokens"]
        if not {"parameters", "block_size", "train_tokens"} <= set(have) or "n_embd" not in config:
            return None
        per_token = flops_per_token(
            parameters=have["parameters"], layers=config["n_layer"], width=config["n_embd"],
            block_size=have["block_size"],
        )  # fmt: skip
        return per_token * have["train_tokens"]

    @property
    def seconds(self) -> float | None:
        """From the first update to the final numbers; the text was prepared before."""
        spent = self.metrics.get("train_seconds")
        return None if spent is None else spent + self.metrics.get("measuring_seconds", 0.0)

    @property
    def footprint(self) -> Footprint | None:
        """Energy and CO2, where the device is known."""
        have = self.metrics
        if self.seconds is None or "device" not in have:
            return None
        return footprint(
            self.seconds, device=have["device"], world_size=have.get("world_size", 1),
            threads=have.get("threads", 1), memory_bytes=have.get("peak_memory_bytes", 0),
        )  # fmt: skip


def read_run(folder: Path) -> RunRecord:
    """Return what a run folder tells.

    Raises:
        InputError: there is no such folder, it holds no run, or a file of it is damaged.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name the training.output_dir of a run")
    status = read_status(folder)
    if not (folder / CONFIG).exists() or status is None and not (folder / METRICS).exists():
        raise InputError(
            f"{folder}: holds no run ({CONFIG} and {STATUS} are missing); name the "
            "training.output_dir of a run that has begun to train"
        )
    recipe = _parsed(folder / CONFIG, yaml.safe_load, dict)
    metrics = _parsed(folder / METRICS, json.loads, dict) if (folder / METRICS).exists() else {}
    saved = [path / STATE for path in checkpoints(folder) if (path / STATE).exists()][-1:]
    newest = step_of(saved[0].parent) if saved else 0
    # Of a finished run that goes on for longer the numbers are those of an earlier update.
    is_finished = bool(metrics) and metrics.get("updates", newest) >= newest
    history: list[dict[str, Any]] = []
    if is_finished and (folder / HISTORY).exists():
        history = _parsed(folder / HISTORY, json.loads, list)
    elif saved:
        history = _parsed(saved[0], json.loads, dict).get("log_history", [])
    history = [log for log in history if isinstance(log, dict)]
    state, why = "finished", ""
    if not is_finished:
        metrics = _so_far(history) | {"preflight_accepted": accepted(folder)}
        state, why = (status or {}).get("state", "unknown"), (status or {}).get("why") or ""
        if state == "finished":
            state, why = "unknown", f"{METRICS} is gone"
    blocks = Path((recipe.get("data") or {}).get("path") or folder / "blocks")
    config = folder / "config.json"
    if not config.exists() and saved:
        config = saved[0].with_name("config.json")
    return RunRecord(
        name=folder.resolve().name,
        state=state,
        why=without_folders(str(why)),
        recipe=_shareable(recipe),
        metrics=metrics,
        history=history,
        samples=_samples(folder / SAMPLES) if (folder / SAMPLES).exists() else [],
        data=_data(blocks),
        model_config=_parsed(config, json.loads, dict) if config.exists() else {},
    )


def read_checkpoint(run_folder: Path, checkpoint: Path) -> RunRecord:
    """Return what was known of a run when it made a checkpoint.

    Raises:
        InputError: as `read_run`, or the checkpoint's state is damaged.
    """
    run, config = read_run(run_folder), checkpoint / "config.json"
    history = _parsed(checkpoint / STATE, json.loads, dict).get("log_history", [])
    history = [log for log in history if isinstance(log, dict)]
    samples = run_folder / SAMPLES
    step = step_of(checkpoint) or 0
    return run._replace(
        state="running",
        why="",
        metrics={
            **_so_far(history),
            "updates": step,
            "preflight_accepted": accepted(run_folder),
        },
        history=history,
        samples=_samples(samples, step) if samples.exists() else [],
        model_config=_parsed(config, json.loads, dict) if config.exists() else {},
    )


def accepted(folder: Path) -> dict[str, str]:
    """Return what failed before the first update and was accepted, as name: what was found."""
    found = {
        name: without_folders(str(one.get("finding")))
        for name, one in read_seen(folder).items()
        if isinstance(one, dict) and one.get("mark") == "accepted"
    }
    return found


def without_folders(text: str) -> str:
    """Return a text in which of every path only the name is left: a page is for others to see."""
    return re.sub(
        r"(?<![\w:/<])(?:~|\.{1,2}|[A-Za-z]:)?[/\\](?:[^\s/\\'\"]+[/\\])*(?=\w)", "", text
    )


def _parsed(path: Path, parse: Any, kind: type) -> Any:
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        value = error
    if not isinstance(value, kind):
        raise InputError(
            f"{path}: damaged, or written by something else; put a whole one there, or move it "
            "away to see what the rest of the folder tells"
        )
    return value


def _so_far(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the logs of an unfinished run tell, under the names of metrics.json."""
    last = history[-1] if history else {}
    found = {"updates": last.get("step", 0), "train_tokens": last.get("tokens_seen", 0)}
    for log in history:
        if "loss" in log and finite(log.get("tokens_per_second")):
            found["train_tokens_per_second"] = log["tokens_per_second"]
        if "eval_loss" in log:
            found |= {key: value for key, value in log.items() if key.startswith("eval_")}
    return found


def _samples(path: Path, last: float = math.inf) -> list[tuple[int, str]]:
    """Return (update, texts) of the first, the middle and the last evaluation that wrote any."""
    texts = path.read_text(encoding="utf-8", errors="replace")
    parts = re.split(r"^--- update (\d+)\n", texts, flags=re.MULTILINE)[1:]
    found: dict[int, list[str]] = {}
    for update, text in zip(parts[::2], parts[1::2], strict=True):
        if int(update) <= last:
            found.setdefault(int(update), []).append(text.removesuffix("\n\n"))
    updates = list(found)
    chosen = dict.fromkeys([*updates[:1], *updates[len(updates) // 2 :][:1], *updates[-1:]])
    return [(update, "\n\n".join(found[update])) for update in chosen]


def _data(blocks: Path) -> dict[str, Any]:
    manifest = artifact.read_manifest(blocks)
    if manifest is None:
        return {}
    files = manifest["files"]
    digests = {
        split: files[f"{split}.arrow"]["sha256"]
        for split in ("validation", "test")
        if f"{split}.arrow" in files
    }
    facts = dict(manifest["facts"])
    facts["sources"] = [s | {"name": file_name(s["name"])} for s in facts.get("sources", [])]
    return facts | {"held_out_rows": digests}


def file_name(value: str) -> str:
    """Return the name of a file or folder, anything else as it is (python:stdlib, a Hub name)."""
    is_path = PurePath(value).is_absolute() or PureWindowsPath(value).is_absolute()
    if is_path or value.startswith(("~", "./", "../")):
        return PurePath(value.replace("\\", "/")).name or value
    return value


def _shareable(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe for others to see: no output_dir, of files only their names."""

    def walked(value: Any, key: str, is_file: bool) -> Any:
        if isinstance(value, dict):
            return {k: walked(v, k, is_file or k in FILE_KEYS) for k, v in value.items()}
        if isinstance(value, list):
            return [walked(item, key, is_file) for item in value]
        if isinstance(value, str) and key not in ("prompts", "separator"):
            return PurePath(value).name if is_file and "/" in value else file_name(value)
        return value

    shared = walked(recipe, "", False)
    (shared.get("training") or {}).pop("output_dir", None)
    return shared
