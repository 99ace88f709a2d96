"""Asking the Hub: within a time, more than once where that helps, and failing in one sentence.

What fails is `Temporary` or `Permanent`; neither ever says the token.
"""

import functools
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from typing import TypeVar
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, get_token, set_client_factory
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session

from pipeline.recipe import InputError, first_line

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Passing states of a server: too slow, two writers at once, too many requests; besides all 5xx.
PASSING = (408, 409, 412, 425, 429)
CONNECT_SECONDS, SILENT_SECONDS = 10.0, 120.0
LONGEST_WAIT = 60.0


class Temporary(Exception):
    """It may work later, `retry_after` seconds from now if the server says so."""

    def __init__(self, sentence: str, retry_after: float | None = None) -> None:
        super().__init__(sentence)
        self.retry_after = retry_after


class Permanent(InputError):
    """It will not work by itself; the message says why and the remedy."""


def api(repo_id: str) -> HfApi:
    """Return the client, with the token of HF_TOKEN or of a login.

    Raises:
        Permanent: there is none.
    """
    _with_time_limits()
    if not get_token():
        raise Permanent(f"{repo_id}: there is no token; {new_token()}")
    return HfApi()


def reader() -> HfApi:
    """Return the client for what may be read by anybody, or by the token if there is one."""
    _with_time_limits()
    return HfApi()


def repeated(work: Callable[[], T], repo_id: str, *, attempts: int) -> T:
    """Return what the work returns; failures that may pass are waited for.

    Between attempts are 1, 2, 4, ... seconds, or those that the server asks for.

    Raises:
        Permanent: it cannot work.
        Temporary: it failed as often as that, or the server asks for more than a minute.
    """
    for attempt in range(attempts):
        try:
            return work()
        except (Temporary, Permanent):
            raise
        except Exception as error:
            failure = _explained(error, repo_id)
            if failure is None:
                raise
        asked = failure.retry_after if isinstance(failure, Temporary) else None
        pause = min(2.0**attempt, LONGEST_WAIT) if asked is None else asked
        if isinstance(failure, Permanent) or attempt == attempts - 1 or pause > LONGEST_WAIT:
            raise failure
        logger.warning("%s; trying again in %g s", failure, pause)
        time.sleep(pause)
    raise AssertionError("attempts is at least 1")


def within(seconds: float, work: Callable[[], T], repo_id: str) -> T:
    """Return what the work returns, if it does in time; else it goes on and nobody listens."""
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, name="asks the Hub", daemon=True).start()
    if not wait([found], seconds).done:
        raise Temporary(f"{repo_id}: {_host()} has not answered within {seconds:g} s")
    return found.result()


def new_token() -> str:
    """Say how one comes by a token that may write."""
    return (
        f"make one that may write at {constants.ENDPOINT}/settings/tokens, and put it into "
        "HF_TOKEN or log in with `hf auth login`"
    )


def _explained(error: Exception, repo_id: str) -> Temporary | Permanent | None:
    """Return what a library's error means for a person; None if it is a mistake of ours."""
    causes = list(_causes(error))
    answered = next((e for e in causes if getattr(e, "response", None) is not None), None)
    if answered is not None:
        # What the library was at (a file, the card), and what the server says to it.
        about = "" if answered is error else f"{first_line(error)}: "
        response, said = answered.response, _said(answered, about)
        answer = f"{repo_id}: {_host()} answers {response.status_code} ({said})"
        status, is_store = response.status_code, isinstance(error, RuntimeError)
        # Links to the store of large files expire, and bytes arrive there broken: new ones help.
        if status in PASSING or status >= 500 or is_store:
            return Temporary(answer, _retry_after(response.headers))
        if status == 401:
            return Permanent(f"{repo_id}: {_host()} refuses the token (401); {new_token()}")
        if status == 403:
            return Permanent(
                f"{repo_id}: the token may not write there (403: {said}); {new_token()}"
            )
        hint = (
            "; see whether the name is right, and what the token may see" if status == 404 else ""
        )
        return Permanent(answer + hint)
    if any(isinstance(e, OfflineModeIsEnabled) for e in causes):
        return Permanent(f"{repo_id}: HF_HUB_OFFLINE is set, so that nothing can be sent; unset it")
    if any(isinstance(e, LocalTokenNotFoundError) for e in causes):
        return Permanent(f"{repo_id}: there is no token; {new_token()}")
    if isinstance(error, OSError) and error.filename is not None:
        return Permanent(f"{error.filename}: cannot be read: {error.strerror}")
    if any(isinstance(e, HTTPError | OSError | json.JSONDecodeError) for e in causes):
        return Temporary(f"{repo_id}: {_host()} cannot be reached ({_said(causes[-1])})")
    if isinstance(error, ValueError):  # a card or an answer that the library does not like
        return Permanent(f"{repo_id}: cannot be sent ({_said(error)})")
    # The Rust library for large files has errors of its own.
    return Temporary(f"{repo_id}: not sent ({_said(error)})") if _is_rust(causes) else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_rust(causes: list[BaseException]) -> bool:
    return any(
        type(e).__module__.startswith("hf_xet") or isinstance(e, RuntimeError) for e in causes
    )


def _said(error: BaseException, about: str = "") -> str:
    """Return what an error says, short and without a token, to stand in a sentence."""
    said = about + (getattr(error, "server_message", None) or first_line(error))
    token = _token_or_none()
    said = said.replace(token, "hf_...") if token else said
    said = re.sub(r"hf_\w{8,}|(?<=[Bb]earer )\S+", "hf_...", " ".join(said.split()))
    return said[:200].rstrip(".")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    value = headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def _host() -> str:
    return urlsplit(constants.ENDPOINT).netloc


def _token_or_none() -> str | None:
    try:
        return get_token()
    except Exception:  # a login by other means that fails, in the middle of explaining a failure
        return None


@functools.cache
def _with_time_limits() -> None:
    """Let every request of this process end: the library's own wait without limit."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # of each of its own attempts
    usual = get_session()
    client, limits = type(usual), type(usual.timeout)
    hooks = usual.event_hooks
    set_client_factory(
        lambda: client(
            follow_redirects=True, event_hooks=hooks,
            timeout=limits(SILENT_SECONDS, connect=CONNECT_SECONDS),
        )
    )  # fmt: skip
