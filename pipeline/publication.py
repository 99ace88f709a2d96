"""What of a run, a checkpoint or a model's folder is published: files, card, branch and title."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pipeline import artifact, hub
from pipeline.checkpoint import STATE, checkpoints, step_of
from pipeline.options import PublishOptions
from pipeline.published_card import published_card, quoted, snippet, stated_license
from pipeline.recipe import InputError
from pipeline.run_identity import IDENTITY, kept_identity, run_identity

CARD, CONFIG, METRICS, STATUS = "README.md", "config.yaml", "metrics.json", "run_status.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
# What a prompt is where a model's folder knows none.
PROMPT = "The "


class Publication(NamedTuple):
    """One commit to be made, and where."""

    folder: Path
    files: dict[str, Path | bytes]
    repo_id: str
    revision: str
    title: str
    is_private: bool
    is_run: bool
    """Whether the folder is a run's, which has a name of its own; else its weights are its name."""
    prompts: list[str]
    options: PublishOptions


def prepared(options: PublishOptions) -> Publication:
    """Read the folder and choose what of it is sent; contacts nobody.

    Raises:
        InputError: it holds nothing that can be published, or the run is not finished.
    """
    folder = Path(options.run)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name that of a finished run, or of a model")
    if step_of(folder) is not None and (folder / STATE).exists():
        raise InputError(
            f"{folder}: is a checkpoint; publish it with --run {folder.parent} --checkpoint "
            f"{folder.name}"
        )
    if (folder / CONFIG).exists() and any((folder / name).exists() for name in (METRICS, STATUS)):
        made = _of_run(folder, options)
    elif options.checkpoint is not None:
        raise InputError(f"{folder}: holds no run ({STATUS} is missing), so --checkpoint is none")
    else:
        made = _of_model(folder, options)
    hub.check_name(made.repo_id, made.revision)
    if not any(name in made.files for name in WEIGHTS):
        raise InputError(f"{folder}: holds no model ({WEIGHTS[0]} is missing)")
    return made


def listing(made: Publication) -> str:
    """Say what is sent where, file by file, and what stays."""
    sizes = {name: _size(content) for name, content in sorted(made.files.items())}
    whose = "private" if made.is_private else "public"
    stays = sorted(
        f"{path.name}/" if path.is_dir() else path.name
        for path in _source(made).iterdir()
        if path.name not in made.files and path.name != IDENTITY
    )
    return "\n".join([
        f"{_source(made)} -> {hub.page(made.repo_id)} ({whose}, branch {made.revision})",
        *(f"{size:>15,}  {name}" for name, size in sizes.items()),
        f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files",
        *([f"stays here: {', '.join(stays)}"] if stays else []),
        *_hints(made),
    ])  # fmt: skip


def card(made: Publication) -> str:
    """Return the model card as it is sent."""
    return _text(made.files.get(CARD, b""))


def sent(made: Publication) -> tuple[Publication, str]:
    """Send it; return it as it is there, and the commit.

    Raises:
        hub.Permanent: the Hub refuses it.
        hub.Temporary: it failed, and the same again may not.
    """
    identity, options = _identity(made), made.options
    if not options.checked:
        access = hub.access(
            made.repo_id, identity=identity, private=made.is_private, revision=made.revision,
            overwrite=options.force,
        )  # fmt: skip
        made = made._replace(is_private=access.is_private)
    commit = hub.push(
        made.files, made.repo_id, identity=identity, title=made.title, revision=made.revision,
        overwrite=options.force, attempts=options.attempts,
    )  # fmt: skip
    return made, commit


def farewell(made: Publication) -> str:
    """Say where the model is, and how it is loaded from there."""
    page = hub.page(made.repo_id)
    code = snippet(quoted(made.repo_id, made.revision), (made.prompts or [PROMPT])[0])
    if not made.is_private:
        return f"{page}\n\n{code}"
    return (
        f"{page} (private: who loads it needs HF_TOKEN or a login; {page}/settings makes it "
        f"public)\n\n{code}"
    )


def wish(failure: hub.Temporary) -> str:
    """Say how long the server asks to wait, for who starts this as a process; often nothing."""
    return "" if failure.retry_after is None else f"retry_after: {failure.retry_after:g}\n"


def sent_space(made: Publication) -> str:
    """Make the Space on which the model can be tried, and return its address.

    Raises:
        hub.Permanent, hub.Temporary: as `sent`.
    """
    from pipeline.space import space_files

    repo_id, identity = f"{made.repo_id}-demo", _identity(made)
    files = space_files(
        made.repo_id,
        title=made.repo_id.partition("/")[2],
        prompts=made.prompts,
        is_adapter="adapter_config.json" in made.files,
        is_private=made.is_private,
        license=stated_license(card(made)) if card(made) else None,
    )
    place = {"identity": identity, "overwrite": made.options.force, "repo_type": "space"}
    hub.access(repo_id, private=made.is_private, **place)
    hub.push(files, repo_id, title=f"A page for {made.repo_id}", **place)
    return hub.page(repo_id, "space")


def _of_run(folder: Path, options: PublishOptions) -> Publication:
    from pipeline.model_card import hub_name, model_card
    from pipeline.run_record import read_checkpoint, read_run

    record = read_run(folder)
    stated = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    training = stated.get("training") or {}
    if options.checkpoint is not None:
        source = _checkpoint(folder, options.checkpoint)
        record = read_checkpoint(folder, source)
        base_model = hub_name((stated.get("model") or {}).get("pretrained"))
        text = model_card(record, base_model=base_model)
    else:
        _check_finished(folder, record.state)
        if options.whole:
            raise InputError("--whole has a meaning with --checkpoint only: a result is no state")
        source = folder
        text = _text(folder / CARD) if (folder / CARD).exists() else model_card(record)
    files = _allowed(source, whole=options.whole)
    recipe = {**record.recipe, "training": _without_hub(record.recipe.get("training") or {})}
    files[CONFIG] = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).encode()
    updates, of = record.metrics.get("updates", 0), training.get("max_steps")
    goal = f" of {of:,}" if options.checkpoint and isinstance(of, int) and of > updates else ""
    private = training.get("hub_private_repo")
    made = Publication(
        folder=folder,
        files=files,
        repo_id=options.repo_id or training.get("hub_model_id") or _unnamed(folder),
        revision=options.revision or (_branch(source) if options.checkpoint else "main"),
        title=options.title or f"After {updates:,}{goal} updates",
        is_private=options.private if options.private is not None else private is not False,
        is_run=True,
        prompts=(record.recipe.get("generation") or {}).get("prompts") or [],
        options=options,
    )
    return _with_card(made, text)


def _of_model(folder: Path, options: PublishOptions) -> Publication:
    made = Publication(
        folder=folder,
        files=_allowed(folder, whole=options.whole),
        repo_id=options.repo_id or _unnamed(folder),
        revision=options.revision or "main",
        title=options.title or f"The model of {folder.resolve().name}",
        is_private=options.private is not False,
        is_run=False,
        prompts=[],
        options=options,
    )
    if CARD in made.files:
        return _with_card(made, _text(made.files[CARD]))
    name = made.repo_id.partition("/")[2]
    return _with_card(made, f"---\npipeline_tag: text-generation\n---\n\n# {name}\n")


def _with_card(made: Publication, text: str) -> Publication:
    options = made.options
    text = published_card(
        text, made.repo_id, revision=made.revision, license=options.license,
        language=options.language,
    )  # fmt: skip
    return made._replace(files={**made.files, CARD: text.encode()})


def _allowed(folder: Path, *, whole: bool = False) -> dict[str, Path | bytes]:
    """Return the files of a folder that may be sent."""
    found = (path for path in sorted(folder.iterdir()) if path.is_file())
    files = {path.name: path for path in found if hub.is_sent(path.name, whole=whole)}
    files.pop(IDENTITY, None)  # written anew by the push
    return files


def _checkpoint(folder: Path, name: str) -> Path:
    """Return a whole checkpoint of the run."""
    found = Path(name) if Path(name).is_dir() and "/" in name else folder / name
    if step_of(found) is None or not found.is_dir():
        have = ", ".join(path.name for path in checkpoints(folder)) or "it has none"
        raise InputError(f"--checkpoint {name}: no checkpoint of {folder}; there: {have}")
    if wrong := artifact.damage(found):
        raise InputError(f"--checkpoint {name}: {wrong}; publish another one")
    return found


def _check_finished(folder: Path, state: str) -> None:
    if state == "finished":
        return
    newest = checkpoints(folder)[-1:]
    remedy = (
        f"publish what it has with --checkpoint {newest[0].name}, or let it end"
        if newest
        else "it has no checkpoint that could be published either; let it go on"
    )
    raise InputError(f"{folder}: the run is not finished ({state}); {remedy}")


def _unnamed(folder: Path) -> str:
    raise InputError(
        f"--repo_id is missing: where to, USER/NAME ({folder} has no training.hub_model_id that "
        "says so)"
    )


def _branch(checkpoint: Path) -> str:
    return f"step-{step_of(checkpoint):09}"


def _without_hub(training: dict[str, Any]) -> dict[str, Any]:
    """Leave out where the run was pushed to: whoever repeats it has a place of his own."""
    return {k: v for k, v in training.items() if not re.match(r"hub_|push_to_hub", k)}


def _identity(made: Publication) -> str:
    if made.is_run:
        return run_identity(made.folder)
    weights = [made.folder / name for name in made.files if name.endswith(".safetensors")]
    return kept_identity(made.folder) or f"weights-{artifact.fingerprint_of(weights)}"


def _source(made: Publication) -> Path:
    return (
        _checkpoint(made.folder, made.options.checkpoint)
        if made.options.checkpoint
        else made.folder
    )


def _hints(made: Publication) -> list[str]:
    hints = []
    if stated_license(card(made)) is None:
        hints.append("no license is stated, so that nobody else may use it: --license mit, say")
    if made.options.whole:
        hints.append("manifest.json names the files of the text with their folders")
    return hints


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _text(content: Path | bytes) -> str:
    data = content if isinstance(content, bytes) else content.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{content}: is not UTF-8 at byte {error.start}") from None
