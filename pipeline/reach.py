"""Whether the Hub can be reached, found out once: if not, only what was fetched before is used."""

import functools
import logging
import os
import socket
from urllib.parse import urlsplit

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
