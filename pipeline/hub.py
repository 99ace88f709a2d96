"""The Hub: may this run write there, and one commit that is there whole or not at all.

A push looks at the head of the branch, sends what differs from it and names it as the parent: two
writers at once do not mix, and a push whose answer was lost is found done when it is repeated.
"""

import contextlib
import fnmatch
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import HFValidationError, validate_repo_id

from pipeline.hub_client import Permanent, Temporary, api, new_token, repeated, within
from pipeline.recipe import InputError, first_line
from pipeline.run_identity import IDENTITY, identity_file

Files = Mapping[str, Path | bytes]

# What may leave the machine, by name: everything else in a run's folder stays where it is.
MODEL_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
    "model-*-of-*.safetensors", "adapter_config.json", "adapter_model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "README.md",
    "curves.png", "metrics.json", "history.json", "config.yaml", "samples.txt", IDENTITY,
)  # fmt: skip
STATE_FILES = (
    "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json",
    "manifest.json",
)  # fmt: skip
# A repository with one of these holds a model (a Space: a page) that is not to be written over.
HOLDINGS = {
    "model": ("*.safetensors", "*.bin", "*.gguf", "*.h5", "config.json", "adapter_config.json"),
    "space": ("app.py",),
}


class Access(NamedTuple):
    """What is known of a repository that can be written to."""

    user: str
    url: str
    is_private: bool
    holds: str
    """nothing, ours (this run's model), or another's."""


def is_sent(name: str, *, whole: bool = False) -> bool:
    """Tell whether a file may be published (`whole`: in a checkpoint that can be resumed)."""
    patterns = MODEL_FILES + STATE_FILES * whole
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def files_of(folder: Path, *, whole: bool = False) -> dict[str, Path | bytes]:
    """Return the files of a folder that may be published, for `push`, which adds whose they are."""
    found = (path for path in sorted(folder.iterdir()) if path.is_file())
    files = {path.name: path for path in found if is_sent(path.name, whole=whole)}
    return {name: path for name, path in files.items() if name != IDENTITY}


def check_name(repo_id: str, revision: str = "main") -> None:
    """See that names could be those of a repository and a branch; asks nobody.

    Raises:
        InputError: they could not.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise Permanent(f"{repo_id!r}: no name of a repository: {first_line(error)}") from None
    if repo_id.count("/") != 1:
        raise Permanent(f"{repo_id!r}: no name of a repository; write it USER/NAME")
    if not re.fullmatch(r"(?!.*\.\.)[\w][\w.+-]*", revision, re.ASCII):
        raise Permanent(
            f"{revision!r}: no name of a branch; it has letters, digits and the signs . + - _"
        )


@contextlib.contextmanager
def at_the_start() -> Iterator[None]:
    """Ask the Hub before a run begins, which does not wait for it.

    Raises:
        InputError: what may work later does not work now.
    """
    try:
        yield
    except Temporary as error:
        raise InputError(
            f"{error}; start again later, or train without it (--training.push_to_hub false) and "
            "send the result afterwards with publish.py"
        ) from None


def user_name(name: str, seconds: float = 30.0) -> str:
    """Return whose token it is, for a repository that is named without its owner.

    Raises:
        Permanent, Temporary: as `access`.
    """

    def ask() -> str:
        return api(name).whoami()["name"]

    return within(seconds, lambda: repeated(ask, name, attempts=3), name)


def looked_at(repo_id: str, *, seconds: float = 30.0) -> str:
    """Ask whose token it is and whether the repository is there, change nothing, and say it.

    Raises:
        Permanent, Temporary: as `access`.
    """
    check_name(repo_id)

    def ask() -> str:
        client = api(repo_id)
        user = client.whoami()
        if (user.get("auth") or {}).get("accessToken", {}).get("role") == "read":
            raise Permanent(f"{repo_id}: the token may only read; {new_token()}")
        try:
            info = client.repo_info(repo_id)
        except RepositoryNotFoundError:
            there = "will be made"
        else:
            there = f"is there, {'private' if info.private else 'public'}"
        return f"reached as {user.get('name', '')}: {page(repo_id, 'model')} {there}"

    return within(seconds, lambda: repeated(ask, repo_id, attempts=3), repo_id)


def access(
    repo_id: str,
    *,
    identity: str,
    private: bool = True,
    revision: str = "main",
    overwrite: bool = False,
    repo_type: str = "model",
    seconds: float = 30.0,
) -> Access:
    """Make the repository if it is not there, and see that the token may write this model to it.

    Args:
        identity: what `run_identity` says of the run.
        overwrite: whether another model may be replaced.
        seconds: after that the Hub counts as out of reach, also if it says nothing at all.

    Raises:
        Permanent: no token, one that is refused or may not write, another model is there.
        Temporary: the Hub cannot be reached, or not within `seconds`.
    """
    check_name(repo_id, revision)
    url = page(repo_id, repo_type)

    def ask() -> Access:
        client = api(repo_id)
        user = client.whoami()
        role = (user.get("auth") or {}).get("accessToken", {}).get("role")
        if role == "read":
            raise Permanent(f"{repo_id}: the token may only read; {new_token()}")
        sdk = {"space_sdk": "gradio"} if repo_type == "space" else {}
        client.create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type, **sdk)
        info = client.repo_info(repo_id, repo_type=repo_type)
        if private and not info.private:
            raise Permanent(
                f"{repo_id}: is public; make it private at {url}/settings, or say that the whole "
                "world may read it (training.hub_private_repo false, publish.py --private false)"
            )
        # Asked with the right to write, which `create_repo` does not need if the place exists.
        addition = CommitOperationAdd(IDENTITY, identity_file(identity))
        client.preupload_lfs_files(repo_id, [addition], repo_type=repo_type)
        try:
            _, there = _look(client, repo_id, revision, repo_type)
        except RevisionNotFoundError:
            _, there = _look(client, repo_id, "main", repo_type)
        holds = _holds(there, identity, repo_type)
        _check_owner(holds, repo_id, repo_type, overwrite)
        return Access(user.get("name", ""), url, bool(info.private), holds)

    return within(seconds, lambda: repeated(ask, repo_id, attempts=3), repo_id)


def push(
    files: Files,
    repo_id: str,
    *,
    identity: str,
    title: str,
    revision: str = "main",
    overwrite: bool = False,
    repo_type: str = "model",
    attempts: int = 5,
) -> str:
    """Let a branch hold these files in one commit, and return the commit.

    Files of ours that are not among them are removed; a stranger's stay. If the branch holds them
    already there is no commit. What failed is tried again after 1, 2, 4, ... seconds, or after
    those that the server asks for.

    Raises:
        Permanent: it cannot work.
        Temporary: it did not in `attempts`.
    """
    check_name(repo_id, revision)
    wanted = {**files, IDENTITY: identity_file(identity)}
    assert repo_type != "model" or all(is_sent(name, whole=True) for name in wanted), wanted.keys()

    def send() -> str:
        client = api(repo_id)
        try:
            head, there = _look(client, repo_id, revision, repo_type)
        except RevisionNotFoundError:
            client.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
            head, there = _look(client, repo_id, revision, repo_type)
        _check_owner(_holds(there, identity, repo_type), repo_id, repo_type, overwrite)
        changes: list[Any] = [
            CommitOperationAdd(name, content)
            for name, content in wanted.items()
            if name not in there or not _is_same(content, there[name])
        ]
        if repo_type == "model":
            gone = [n for n in there if n not in wanted and is_sent(n, whole=True)]
            changes += [CommitOperationDelete(name) for name in gone]
        if not changes:
            return head
        return client.create_commit(
            repo_id, changes, commit_message=title, revision=revision, parent_commit=head,
            repo_type=repo_type,
        ).oid  # fmt: skip

    return repeated(send, repo_id, attempts=attempts)


def page(repo_id: str, repo_type: str = "model") -> str:
    """Return the address of a repository's page."""
    return f"{constants.ENDPOINT}/{constants.REPO_TYPES_URL_PREFIXES.get(repo_type, '')}{repo_id}"


def _look(client: HfApi, repo_id: str, revision: str, repo_type: str) -> tuple[str, dict[str, Any]]:
    """Return a branch's head and its files by name."""
    head = client.repo_info(repo_id, revision=revision, repo_type=repo_type).sha
    tree = client.list_repo_tree(repo_id, recursive=True, revision=head, repo_type=repo_type)
    return head, {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _is_same(content: Path | bytes, there: RepoFile) -> bool:
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if size != there.size:
        return False
    if there.lfs is None:
        data = content if isinstance(content, bytes) else content.read_bytes()
        return _git_name(data) == there.blob_id
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest() == there.lfs.sha256
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == there.lfs.sha256


def _git_name(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _holds(there: dict[str, RepoFile], identity: str, repo_type: str) -> str:
    if IDENTITY in there and there[IDENTITY].blob_id == _git_name(identity_file(identity)):
        return "ours"
    patterns = HOLDINGS[repo_type]
    # Also one that is named like ours and is not: another run's first commit.
    found = IDENTITY in there or any(fnmatch.fnmatch(n, p) for n in there for p in patterns)
    return "another's" if found else "nothing"


def _check_owner(holds: str, repo_id: str, repo_type: str, overwrite: bool) -> None:
    if holds == "another's" and not overwrite:
        raise Permanent(
            f"{repo_id}: holds another {repo_type}, which this would replace; choose another name, "
            "or say that it may be overwritten (hub.overwrite true, publish.py --force)"
        )
