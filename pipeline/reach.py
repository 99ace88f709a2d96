"""A name that a person gave: a folder's, or the Hub's, and whether that can be reached.

That is found out once: if it cannot, only what was fetched before is used.
"""

import functools
import logging
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.recipe import InputError, first_line

logger = logging.getLogger(__name__)

SECONDS = 5.0  # the libraries try for half a minute, each file anew
PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


@functools.cache
def see_hub() -> None:
    """Let huggingface_hub look into its cache alone where no connection to the Hub can be made.

    Behind a proxy nothing is tried: it decides what can be reached.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or any(os.environ.get(name) for name in PROXIES):
        return
    place = urlsplit(constants.ENDPOINT)
    port = place.port or (443 if place.scheme == "https" else 80)
    try:
        socket.create_connection((place.hostname, port), timeout=SECONDS).close()
    except OSError as error:
        logger.warning(
            "%s cannot be reached (%s): only what was fetched from it before is used",
            place.hostname, error.strerror or error,
        )  # fmt: skip
        constants.HF_HUB_OFFLINE = True


def not_loaded(name: str, kind: str, error: BaseException) -> InputError:
    """Return the error for a model, tokenizer or data set that is neither here nor on the Hub."""
    return InputError(
        f"{name}: cannot be loaded as a {kind}: {first_line(error)}; give an existing folder, or "
        "check the name, the network, HF_TOKEN and HF_HUB_OFFLINE"
    )


def check_local(name: str, kind: str, file: str) -> None:
    """Tell a folder's name from a Hub name, which would be looked for on the network.

    Raises:
        InputError: `name` is a folder without `file`, or lies in a folder that has no such one.
    """
    path = Path(name)
    if path.is_file():
        raise InputError(f"{name}: is a file; give its folder, {path.parent}")
    if path.exists():
        if not (path / file).exists():
            raise InputError(f"{name}: no {kind} in this folder ({file} is missing)")
    elif (
        path.is_absolute() or name.startswith(".") or path.parent != Path() and path.parent.is_dir()
    ):
        raise InputError(f"{name}: no such folder; looked in {Path.cwd()}")
    else:
        see_hub()
