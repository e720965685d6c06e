"""Requests to the Hub: repeated while it is busy, with a checked token, and with errors of one line."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

from ..errors import HubError, OutputError, UsageError, ZooError, first_line

__all__ = [
    "BUSY",
    "PATIENCE",
    "SILENCE",
    "GaveUp",
    "Patience",
    "cause",
    "check_token",
    "explain",
    "network_error",
    "status_of",
    "trouble",
    "unavailable",
]

PATIENCE = 60.0
"""Seconds for which requests to a busy Hub are repeated, in all, in one load or push."""
SILENCE = 60.0
"""Seconds without a byte after which a request fails."""
BUSY = (408, 429, 500, 502, 503, 504)
"""HTTP statuses after which a request is repeated."""

log = logging.getLogger("rlpjepa_zoo")
T = TypeVar("T")


def check_token(token: str | None) -> str | None:
    """The token without surrounding white space; None stands for the stored login.

    Raises:
        UsageError: the token is not one word of printable characters. The message does not show it.
    """
    token = None if token is None else token.strip()
    if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise UsageError("token: expected one word of printable characters, such as hf_...")
    return token


class GaveUp(Exception):
    """The Hub client has repeated the request itself, so it is not repeated again; `__cause__` is the error."""


class Patience:
    """Repeats calls while the Hub is busy, until `PATIENCE` seconds are spent on failed calls and pauses.

    Args:
        where: name of the repository, for messages.
        again: whether a call may be repeated after an error.
    """

    def __init__(self, where: str, again: Callable[[BaseException], bool] = lambda error: True) -> None:
        self.where, self.again, self.left, self.wait = where, again, PATIENCE, 1.0

    def __call__(self, call: Callable[[], T]) -> T:
        from huggingface_hub import get_session

        while True:
            session = get_session()
            if session.timeout.read is None:  # the client would wait without limit
                session.timeout = type(session.timeout)(SILENCE, connect=10.0)
            started = time.monotonic()
            try:
                return call()
            except Exception as error:
                self.left -= min(time.monotonic() - started, SILENCE)  # the time of a long transfer that broke off is not waiting
                pause = _pause(error, self.wait)
                if pause is None or not self.again(error) or pause > self.left:
                    raise
                log.warning("%s: %s; trying again in %.0f s", self.where, cause(error), pause)
                time.sleep(pause)
                self.left -= pause
                self.wait = min(2 * self.wait, 8.0)


def _chain(error: BaseException) -> list[BaseException]:
    """The error and its causes; the Hub client raises "not in the cache" from the real error."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__
    return chain


def status_of(error: BaseException) -> int | None:
    """HTTP status of the Hub's answer; None without an answer."""
    for cause in _chain(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def network_error(error: BaseException) -> BaseException | None:
    """The error of the HTTP library below the Hub client: no connection, a timeout, a broken answer."""
    if status_of(error) is not None:
        return None
    return next((cause for cause in _chain(error) if type(cause).__module__.split(".")[0].startswith("httpx")), None)


def _pause(error: BaseException, wait: float) -> float | None:
    """Seconds to wait before the call is repeated; None if it is not repeated."""
    from huggingface_hub import errors as hub

    if isinstance(error, GaveUp | hub.LocalEntryNotFoundError):
        return None
    status = status_of(error)
    if status is not None:
        retry_after = _retry_after(error)
        return (float(retry_after) if retry_after.isdigit() else wait) if status in BUSY else None
    broken = network_error(error)
    if broken is None or type(broken).__name__ in ("LocalProtocolError", "UnsupportedProtocol", "InvalidURL"):
        return None
    unreachable = type(broken).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError")
    return None if unreachable and wait > 1 else wait  # an unreachable address is tried once more only


def _retry_after(error: BaseException) -> str:
    """The Retry-After header of the Hub's answer; empty without one."""
    return next((cause.response.headers.get("Retry-After", "") for cause in _chain(error) if hasattr(cause, "response")), "")


def unavailable(error: BaseException) -> bool:
    """Whether the Hub is down or unreachable, so that a cached copy may be used; False if it refused the request."""
    status = status_of(error)
    return status in BUSY if status is not None else network_error(error) is not None


def cause(error: BaseException) -> str:
    """The error of the Hub or the network in a few words."""
    status = status_of(error)
    if status is None:
        return _without_tokens(first_line(network_error(error) or error))
    retry_after = _retry_after(error)
    return f"the Hub answered {status}" + (f" and asks to wait {retry_after} s" if retry_after.isdigit() else "")


def explain(error: Exception, where: str, pushing: bool = False) -> ZooError:
    """Convert a Hub error to one line that says how to fix it."""
    from huggingface_hub import errors as hub

    status, login = status_of(error), "run `hf auth login`, or set HF_TOKEN"
    unchanged = "; the repository was not changed, push again later" if pushing else "; try again later"
    if isinstance(error, OSError) and isinstance(error.errno, int) and status is None and network_error(error) is None:
        place = error.filename or "the folder of the Hub's cache"
        return OutputError(f"{place}: cannot be used: {error.strerror}; give another cache_dir, or set HF_HOME")
    if isinstance(error, hub.GatedRepoError):
        return HubError(f"{where}: access is gated; accept the terms on its Hub page and {login}")
    if isinstance(error, hub.RevisionNotFoundError):
        return HubError(f"{where}: no such {'branch' if pushing else 'branch, tag or commit'}; see the repository's list of versions")
    if isinstance(error, hub.OfflineModeIsEnabled):
        return HubError(
            f"{where}: HF_HUB_OFFLINE is set{'' if pushing else ' and it is not in the local cache'}; unset it to reach the Hub"
        )
    if status in BUSY:
        return HubError(f"{where}: {cause(error)}, and retries failed{unchanged}")
    if isinstance(error, hub.RepositoryNotFoundError):
        return HubError(f"{where}: not found, or private; check the name, or {login} with an account that may see it")
    if status == 401:
        return HubError(f"{where}: not logged in, or the access token is not valid; {login}")
    if status == 403:
        what = f"no permission to write to '{where.split('/')[0]}'" if pushing else "no access"
        return HubError(
            f"{where}: {what} ({_message(error)}); {login} with a token that has it" + (", or open a pull request" if pushing else "")
        )
    if status == 412:
        return HubError(f"{where}: somebody else pushed meanwhile; look at what is there, and push again")
    if network_error(error) is not None:
        fix = "; push again, it completes what is missing" if pushing else "; check the network, or give a folder"
        return HubError(f"{where}: the Hub cannot be reached ({cause(error)}){fix}")
    if isinstance(error, hub.LocalEntryNotFoundError):
        return HubError(f"{where}: not in the local cache and the Hub cannot be reached; go online once, or give a folder")
    if isinstance(error, ValueError) and "metadata" in str(error):
        return HubError(f"{where}: the Hub refused the metadata of the card: {_message(error)}")
    return HubError(f"{where}: the Hub or the network failed: {_message(error)}")


def trouble(error: BaseException, where: str) -> ZooError | None:
    """The one-line error of a Hub or network failure inside another library, such as datasets; None for other failures."""
    from huggingface_hub import errors as hub

    if isinstance(error, ConnectionError) and "OfflineModeIsEnabled" in str(error):  # datasets raises it without the cause
        return explain(hub.OfflineModeIsEnabled(), where)
    kinds = (hub.HfHubHTTPError, hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError, ConnectionError)
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, kinds) or network_error(current) is not None:
            return explain(current, where)  # type: ignore[arg-type]
        current = current.__cause__ or current.__context__
    return None


def _message(error: Exception) -> str:
    """The server's message, or the lines of the error joined to one."""
    text = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return _without_tokens(" ".join(str(text).split()))[:300]


def _without_tokens(text: str) -> str:
    return re.sub(r"hf_\w+|(?<=Bearer )\S+", "(token)", text)
