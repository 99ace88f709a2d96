"""A checkpoint that was pushed whole, fetched back: `--resume hub:USER/NAME@step-000001000`."""

import json
import logging
import os
import shutil
from pathlib import Path

from pipeline import artifact
from pipeline.checkpoint import STATE
from pipeline.hub import check_name
from pipeline.hub_client import Temporary, reader, repeated
from pipeline.recipe import InputError
from pipeline.run_identity import IDENTITY, kept_identity

logger = logging.getLogger(__name__)

PREFIX = "hub:"
ATTEMPTS = 2  # the library itself tries each request five times


def fetched(resume: str, run_folder: Path) -> Path:
    """Return the checkpoint that `--resume hub:USER/NAME@BRANCH` means, fetched into a run folder.

    What arrives is compared with the checkpoint's own list of its files, and is there whole or not
    at all. A run folder that has no name on the Hub takes that of the run it goes on from.

    Raises:
        InputError: there is none, it was not pushed whole, it arrived damaged, the Hub cannot be
            reached, or the folder holds another checkpoint of that number.
    """
    repo_id, _, revision = resume.removeprefix(PREFIX).partition("@")
    try:
        check_name(repo_id, revision or "main")
    except InputError as error:
        raise InputError(f"--resume {resume}: {error}") from None
    staging = run_folder / f"{artifact.STAGING}fetched"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with artifact.full_disk_said(run_folder):
            return repeated(
                lambda: _fetch(resume, repo_id, revision or "main", staging, run_folder), repo_id,
                attempts=ATTEMPTS,
            )  # fmt: skip
    except Temporary as error:
        raise InputError(f"--resume {resume}: {error}; try again later") from None
    except InputError as error:
        if str(error).startswith("--resume"):
            raise
        raise InputError(f"--resume {resume}: {error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _fetch(resume: str, repo_id: str, revision: str, staging: Path, run_folder: Path) -> Path:
    client = reader()
    info = client.repo_info(repo_id, revision=revision)
    there = {sibling.rfilename for sibling in info.siblings}
    if not {artifact.MANIFEST, STATE} <= there:
        branches = [branch.name for branch in client.list_repo_refs(repo_id).branches]
        raise InputError(
            f"--resume {resume}: holds no checkpoint that was pushed whole (training.hub_strategy "
            f"checkpoint and all_checkpoints push such); branches there: {', '.join(branches)}"
        )
    place = {"revision": info.sha, "local_dir": staging}
    manifest = json.loads(
        Path(client.hf_hub_download(repo_id, artifact.MANIFEST, **place)).read_text()
    )
    folder = run_folder / f"checkpoint-{manifest['facts']['step']}"
    if folder.exists() and artifact.damage(folder) is None:
        if artifact.read_manifest(folder)["files"] != manifest["files"]:
            raise InputError(
                f"--resume {resume}: {folder} is another checkpoint of that number; choose another "
                "--training.output_dir"
            )
        return folder
    size = sum(file["size"] for file in manifest["files"].values())
    logger.info("fetching %s (%.2f GB) into %s", resume, size / 1e9, folder)
    wanted = [*manifest["files"], artifact.MANIFEST]
    client.snapshot_download(repo_id, allow_patterns=wanted, **place)
    if wrong := artifact.damage(staging):
        raise InputError(f"--resume {resume}: arrived damaged: {wrong}; try again")
    if IDENTITY in there and kept_identity(run_folder) is None:
        client.hf_hub_download(repo_id, IDENTITY, **place)
        os.replace(staging / IDENTITY, run_folder / IDENTITY)
    shutil.rmtree(staging / ".cache", ignore_errors=True)
    if folder.exists():
        os.rename(folder, artifact.free_name(folder, "damaged"))
    os.rename(staging, folder)
    return folder
