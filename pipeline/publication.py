"""What of a run, a checkpoint or a model's folder is published: files, card, branch and title."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pipeline import artifact, hub
from pipeline.checkpoint import STATE, checkpoints, step_of
from pipeline.options import PublishOptions
from pipeline.published_card import published_card, stated_license
from pipeline.push_list import LIST, PLACE, RESULT, PushList, Revision
from pipeline.recipe import InputError
from pipeline.run_files import CARD, CONFIG, METRICS, STATUS, read_status
from pipeline.run_identity import IDENTITY, identity_file, kept_identity

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


class Publication(NamedTuple):
    """One commit to be made, and where."""

    folder: Path
    """Where its files lie."""
    files: dict[str, Path | bytes]
    identity: str | None
    """Whose the repository is: the run's, which has a name of its own, or the weights'."""
    repo_id: str
    revision: str
    title: str
    updates: int
    is_private: bool
    prompts: list[str]
    options: PublishOptions
    run: Path | None = None
    """The folder of the run that it is of, if any."""
    before: tuple["Publication", ...] = ()
    """What is sent first: what the run should have sent, and could not."""
    waits_as: Revision | None = None
    """What it is on the run's list, if it is there."""


def prepared(options: PublishOptions, *, is_fresh: bool = False) -> Publication:
    """Read the folder and choose what of it is sent; contacts nobody.

    Args:
        is_fresh: a checkpoint was just written, and need not be verified.

    Raises:
        InputError: it holds nothing that can be published, or the run is not finished.
    """
    folder = Path(options.run)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name that of a finished run, or of a model")
    if options.prepared:
        made = _as_it_is(folder, options)
    elif step_of(folder) is not None and (folder / STATE).exists():
        raise InputError(
            f"{folder}: is a checkpoint; publish it with --run {folder.parent} --checkpoint "
            f"{folder.name}"
        )
    elif (folder / CONFIG).exists() and any((folder / name).exists() for name in (METRICS, STATUS)):
        made = _of_run(folder, options, is_fresh) if is_fresh else _with_waiting(folder, options)
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
    identity = {IDENTITY: identity_file(made.identity or "0" * 32)}  # as long as any
    files = made.files | identity
    sizes = {name: _size(content) for name, content in sorted(files.items())}
    whose = "private" if made.is_private else "public"
    stays = sorted(
        f"{path.name}/" if path.is_dir() else path.name
        for path in made.folder.iterdir()
        if path.name not in (*made.files, IDENTITY, LIST, PLACE)
    )
    return "\n".join([
        *(f"first, what the run could not send: {one.waits_as.said}" for one in made.before),
        f"{made.folder} -> {hub.page(made.repo_id)} ({whose}, branch {made.revision})",
        *(f"{size:>15,}  {name}" for name, size in sizes.items()),
        f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files",
        *([f"and the page to try it: {hub.page(f'{made.repo_id}-demo', 'space')}"]
          if made.options.space else []),
        *([f"stays here: {', '.join(stays)}"] if stays else []),
        *_hints(made),
    ])  # fmt: skip


def card(made: Publication) -> str:
    """Return the model card as it is sent."""
    return _text(made.files.get(CARD, b""))


def _with_waiting(folder: Path, options: PublishOptions) -> Publication:
    """Return what of a run is asked for, after what the run itself could not send."""
    push_list = PushList(folder)
    is_theirs = options.repo_id in (None, push_list.repo_id) and options.revision is None
    if options.checkpoint is not None or not is_theirs or not push_list.waiting:
        return _of_run(folder, options)
    stated = options.private
    options = options.model_copy(
        update={
            "repo_id": push_list.repo_id,
            "private": push_list.is_private if stated is None else stated,
        }
    )
    before = []
    for revision in push_list.waiting:
        place = push_list.place_of(revision)
        if not (place / IDENTITY).is_file():  # a person has removed it
            continue
        own = options.model_copy(update={"revision": revision.branch, "title": revision.title})
        before.append(_as_it_is(place, own)._replace(run=folder, waits_as=revision))
    if (read_status(folder) or {}).get("state") != "finished":  # it goes on another time
        if not before:
            return _of_run(folder, options)
        return before[-1]._replace(before=tuple(before[:-1]))
    before = [one for one in before if one.waits_as.name != RESULT]  # it is made anew
    branch = push_list.result_branch or "main"
    made = _of_run(folder, options.model_copy(update={"revision": branch}))
    return made._replace(before=tuple(before))


def _as_it_is(folder: Path, options: PublishOptions) -> Publication:
    """Return what a run has prepared: a folder of which everything is sent."""
    identity = kept_identity(folder)
    if identity is None:
        raise InputError(f"{folder}: is none that a run has prepared; leave out --prepared")
    return Publication(
        folder=folder,
        files=hub.files_of(folder, whole=True),
        identity=identity,
        repo_id=options.repo_id or "",
        revision=options.revision or "main",
        title=options.title or "",
        updates=0,
        is_private=options.private is not False,
        prompts=[],
        options=options,
    )


def _of_run(folder: Path, options: PublishOptions, is_fresh: bool = False) -> Publication:
    from pipeline.model_card import hub_name, model_card
    from pipeline.run_record import read_checkpoint, read_run

    record = read_run(folder)
    stated = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    training = stated.get("training") or {}
    if options.checkpoint is not None:
        source = _checkpoint(folder, options.checkpoint, is_fresh)
        record = read_checkpoint(folder, source)
    else:
        _check_finished(folder, record.state)
        if options.whole:
            raise InputError("--whole has a meaning with --checkpoint only: a result is no state")
        source = folder
    _check_base(source)
    files: dict[str, Path | bytes] = hub.files_of(source, whole=options.whole)
    if CARD in files:
        text = _text(files[CARD])
    else:
        base_model = hub_name((stated.get("model") or {}).get("pretrained"))
        text = model_card(record, base_model=base_model)
    recipe = {**record.recipe, "training": _without_hub(record.recipe.get("training") or {})}
    files[CONFIG] = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).encode()
    updates, of = record.metrics.get("updates", 0), training.get("max_steps")
    goal = f" of {of:,}" if options.checkpoint and isinstance(of, int) and of > updates else ""
    what = "After" if options.checkpoint else "The result after"
    private = training.get("hub_private_repo")
    made = Publication(
        folder=source,
        files=files,
        identity=kept_identity(folder),
        repo_id=options.repo_id or training.get("hub_model_id") or _unnamed(folder),
        revision=options.revision or (_branch(source) if options.checkpoint else "main"),
        title=options.title or f"{what} {updates:,}{goal} updates",
        updates=updates,
        is_private=options.private if options.private is not None else private is not False,
        prompts=(record.recipe.get("generation") or {}).get("prompts") or [],
        options=options,
        run=folder,
    )
    return _with_card(made, text)


def _of_model(folder: Path, options: PublishOptions) -> Publication:
    files: dict[str, Path | bytes] = hub.files_of(folder, whole=options.whole)
    _check_base(folder)
    weights = [folder / name for name in files if name.endswith(".safetensors")]
    made = Publication(
        folder=folder,
        files=files,
        identity=kept_identity(folder) or f"weights-{artifact.fingerprint_of(weights)}",
        repo_id=options.repo_id or _unnamed(folder),
        revision=options.revision or "main",
        title=options.title or f"The model of {folder.resolve().name}",
        updates=0,
        is_private=options.private is not False,
        prompts=[],
        options=options,
    )
    if CARD in made.files:
        return _with_card(made, _text(made.files[CARD]))
    name = made.repo_id.partition("/")[2]
    return _with_card(made, f"---\npipeline_tag: text-generation\n---\n\n# {name}\n")


def _check_base(folder: Path) -> None:
    """See that the base of an adapter is one that others have, too."""
    path = folder / "adapter_config.json"
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path}: cannot be read as an adapter's configuration") from None
    if Path(base).exists() or Path(base).is_absolute():
        raise InputError(
            f"{folder}: an adapter on the model in {base}, which nobody has but you; publish both "
            f"in one: python pipeline/convert_weights.py --source {folder} --output_dir "
            f"{folder}-merged, then --run {folder}-merged"
        )


def _with_card(made: Publication, text: str) -> Publication:
    options = made.options
    text = published_card(
        text, made.repo_id, revision=made.revision, license=options.license,
        language=options.language,
    )  # fmt: skip
    return made._replace(files={**made.files, CARD: text.encode()})


def _checkpoint(folder: Path, name: str, is_fresh: bool) -> Path:
    """Return a whole checkpoint of the run."""
    name = f"checkpoint-{name}" if name.isdigit() else name
    found = Path(name) if Path(name).is_dir() and "/" in name else folder / name
    if step_of(found) is None or not found.is_dir():
        have = ", ".join(path.name for path in checkpoints(folder)) or "it has none"
        raise InputError(f"--checkpoint {name}: no checkpoint of {folder}; there: {have}")
    if wrong := artifact.damage(found, contents=not is_fresh):
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
