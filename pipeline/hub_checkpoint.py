"""A checkpoint that was pushed whole, fetched back: `--resume hub:USER/NAME@step-000001000`."""

import contextlib
import logging
import os
import re
import shutil
from pathlib import Path

from huggingface_hub.errors import RevisionNotFoundError

from pipeline import artifact
from pipeline.checkpoint import STATE, newest_whole
from pipeline.hub import check_name, is_sent
from pipeline.hub_client import Permanent, Temporary, reader, repeated
from pipeline.recipe import InputError
from pipeline.run_identity import IDENTITY, kept_identity

logger = logging.getLogger(__name__)

PREFIX = "hub:"
PLACE = "_fetched"  # beside the run's own checkpoints: it counts as none of them
ATTEMPTS = 2  # the library itself tries each request five times


def fetched(resume: str, run_folder: Path) -> Path:
    """Return the checkpoint that `--resume hub:USER/NAME@BRANCH` means, fetched into a run folder.

    What arrives is compared with the checkpoint's own list of its files, and is there whole or not
    at all. A run that has come further than its first start has checkpoints of its own, and goes
    on from the newest. One without a name on the Hub takes that of the run that it goes on from.

    Raises:
        InputError: there is none, it was not pushed whole, it arrived damaged, or the Hub cannot
            be reached.
    """
    if (own := newest_whole(run_folder)) is not None:
        logger.info("%s has checkpoints of its own: nothing is fetched from %s", run_folder, resume)
        return own
    repo_id, _, revision = resume.removeprefix(PREFIX).partition("@")
    try:
        check_name(repo_id, revision or "main")
        with artifact.full_disk_said(run_folder):
            return repeated(
                lambda: _fetch(repo_id, revision or "main", run_folder), repo_id, attempts=ATTEMPTS
            )
    except Temporary as error:
        raise InputError(f"--resume {resume}: {error}; try again later") from None
    except InputError as error:
        raise InputError(f"--resume {resume}: {error}") from None


def _fetch(repo_id: str, revision: str, run_folder: Path) -> Path:
    client, there = reader(), set()
    with contextlib.suppress(RevisionNotFoundError):
        info = client.repo_info(repo_id, revision=revision)
        there = {sibling.rfilename for sibling in info.siblings}
    if not {artifact.MANIFEST, STATE} <= there:
        branches = sorted(branch.name for branch in client.list_repo_refs(repo_id).branches)
        raise Permanent(
            f"the branch {revision} holds no checkpoint that was pushed whole "
            "(training.hub_strategy checkpoint and all_checkpoints push such); branches there: "
            f"{', '.join(branches)}"
        )
    staging = run_folder / f"{artifact.STAGING}fetched"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        place = {"revision": info.sha, "local_dir": staging}
        client.hf_hub_download(repo_id, artifact.MANIFEST, **place)
        manifest = _checked(staging)
        folder = run_folder / PLACE / f"checkpoint-{manifest['facts']['step']}"
        if artifact.read_manifest(folder) != manifest or artifact.damage(folder):
            size = sum(file["size"] for file in manifest["files"].values())
            logger.info("fetching %s@%s (%.1f MB)", repo_id, revision, size / 1e6)
            client.snapshot_download(repo_id, allow_patterns=list(manifest["files"]), **place)
            if wrong := artifact.damage(staging):
                raise Permanent(f"arrived damaged: {wrong}; try again")
            shutil.rmtree(staging / ".cache", ignore_errors=True)
            shutil.rmtree(folder.parent, ignore_errors=True)
            folder.parent.mkdir()
            os.rename(staging, folder)
        if IDENTITY in there and kept_identity(run_folder) is None:
            client.hf_hub_download(repo_id, IDENTITY, **place)
            os.replace(staging / IDENTITY, run_folder / IDENTITY)
        return folder
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _checked(folder: Path) -> dict:
    """Return a stranger's manifest, if it is one of a checkpoint and names plain files of one."""
    manifest = artifact.read_manifest(folder) or {"facts": {}, "files": {}, "made_from": {}}
    step, names = manifest["facts"].get("step"), manifest["files"]
    is_one = type(step) is int and step >= 0 and STATE in names
    is_one = is_one and isinstance(manifest["made_from"].get("recipe"), dict)
    if not is_one or not all(re.fullmatch(r"[\w.-]+", n) and is_sent(n, whole=True) for n in names):
        raise Permanent(f"its {artifact.MANIFEST} is not that of a checkpoint of ours")
    return manifest
