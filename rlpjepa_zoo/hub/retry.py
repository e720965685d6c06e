"""Asking the Hub: how long, with which token, and what its errors mean in one line."""

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
    "access",
    "away",
    "cause",
    "explain",
    "network_error",
    "status_of",
    "trouble",
]

PATIENCE = 60.0
"""Seconds for which a busy Hub is asked again, in all, in one load or push."""
SILENCE = 60.0
"""Seconds without a byte after which a request has failed."""
BUSY = (408, 429, 500, 502, 503, 504)

log = logging.getLogger("rlpjepa_zoo")
T = TypeVar("T")


def access(token: str | None) -> str | None:
    """A token as it is sent; None stands for the stored login.

    Raises:
        UsageError: not one word of printable characters. The message does not repeat it.
    """
    token = None if token is None else token.strip()
    if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise UsageError("token: expected one word of printable characters, such as hf_...")
    return token


class GaveUp(Exception):
    """The Hub client itself has asked several times, so we do not ask again; the cause says why."""


class Patience:
    """Calls that are repeated while the Hub is busy, until `PATIENCE` seconds are spent on failed calls and pauses."""

    def __init__(self, where: str, again: Callable[[BaseException], bool] = lambda error: True) -> None:
        self.where, self.again, self.left, self.wait = where, again, PATIENCE, 1.0

    def __call__(self, call: Callable[[], T]) -> T:
        from huggingface_hub import get_session

        while True:
            session = get_session()
            if session.timeout.read is None:  # the client would wait for ever
                session.timeout = type(session.timeout)(SILENCE, connect=10.0)
            started = time.monotonic()
            try:
                return call()
            except Exception as error:
                self.left -= min(time.monotonic() - started, SILENCE)  # a long transfer that broke off was not waiting
                pause = _pause(error, self.wait)
                if pause is None or not self.again(error) or pause > self.left:
                    raise
                log.warning("%s: %s; trying again in %.0f s", self.where, cause(error), pause)
                time.sleep(pause)
                self.left -= pause
                self.wait = min(2 * self.wait, 8.0)


def _chain(error: BaseException) -> list[BaseException]:
    """The error and its causes; the Hub client hides the real one behind 'not in the cache'."""
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__
    return chain


def status_of(error: BaseException) -> int | None:
    """HTTP status that the Hub answered, if it did."""
    for part in _chain(error):
        status = getattr(getattr(part, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def network_error(error: BaseException) -> BaseException | None:
    """The error of the HTTP library below the Hub client: no connection, a timeout, a broken answer."""
    if status_of(error) is not None:
        return None
    return next((part for part in _chain(error) if type(part).__module__.split(".")[0].startswith("httpx")), None)


def _pause(error: BaseException, wait: float) -> float | None:
    """Seconds until it is worth asking again; None when it is not."""
    from huggingface_hub import errors as hub

    if isinstance(error, GaveUp | hub.LocalEntryNotFoundError):
        return None
    status = status_of(error)
    if status is not None:
        asked = next((part.response.headers.get("Retry-After", "") for part in _chain(error) if hasattr(part, "response")), "")
        return (float(asked) if asked.isdigit() else wait) if status in BUSY else None
    broken = network_error(error)
    if broken is None or type(broken).__name__ in ("LocalProtocolError", "UnsupportedProtocol", "InvalidURL"):
        return None
    unreachable = type(broken).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError")
    return None if unreachable and wait > 1 else wait  # nobody there: once more, and that is it


def away(error: BaseException) -> bool:
    """Whether a cached copy may stand in: the Hub is down or unreachable, and has not said no."""
    status = status_of(error)
    return status in BUSY if status is not None else network_error(error) is not None


def cause(error: BaseException) -> str:
    """What the Hub or the network said, in a few words."""
    status = status_of(error)
    if status is None:
        return _unsecret(first_line(network_error(error) or error))
    asked = next((part.response.headers.get("Retry-After", "") for part in _chain(error) if hasattr(part, "response")), "")
    return f"the Hub answered {status}" + (f" and asks to wait {asked} s" if asked.isdigit() else "")


def explain(error: Exception, where: str, pushing: bool = False) -> ZooError:
    """One line with the mend for each class of Hub error."""
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
        return HubError(f"{where}: {cause(error)}, also when asked again{unchanged}")
    if isinstance(error, hub.RepositoryNotFoundError):
        return HubError(
            f"{where}: not found, or private (and there is no such folder here); check the name, or {login} with an account that may see it"
        )
    if status == 401:
        return HubError(f"{where}: not logged in, or the access token is not valid; {login}")
    if status == 403:
        what = f"no permission to write to '{where.split('/')[0]}'" if pushing else "no access"
        return HubError(
            f"{where}: {what} ({_said(error)}); {login} with a token that has it" + (", or open a pull request" if pushing else "")
        )
    if status == 412:
        return HubError(f"{where}: somebody else pushed meanwhile; look at what is there, and push again")
    if network_error(error) is not None:
        mend = "; push again, it completes what is missing" if pushing else "; check the network, or give a folder"
        return HubError(f"{where}: the Hub cannot be reached ({cause(error)}){mend}")
    if isinstance(error, hub.LocalEntryNotFoundError):
        return HubError(f"{where}: not in the local cache and the Hub cannot be reached; go online once, or give a folder")
    if isinstance(error, ValueError) and "metadata" in str(error):
        return HubError(f"{where}: the Hub refused the metadata of the card: {_said(error)}")
    return HubError(f"{where}: the Hub or the network failed: {_said(error)}")


def trouble(error: BaseException, where: str) -> ZooError | None:
    """The one-line error of what failed below another library (datasets, say), if it was the Hub or the network; None if it was not."""
    from huggingface_hub import errors as hub

    if isinstance(error, ConnectionError) and "OfflineModeIsEnabled" in str(error):  # as datasets says it, without the cause
        return explain(hub.OfflineModeIsEnabled(), where)
    kinds = (hub.HfHubHTTPError, hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError, ConnectionError)
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, kinds) or network_error(at) is not None:
            return explain(at, where)  # type: ignore[arg-type]
        at = at.__cause__ or at.__context__
    return None


def _said(error: Exception) -> str:
    """The server's own words, or all lines of the error in one."""
    words = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return _unsecret(" ".join(str(words).split()))[:300]


def _unsecret(text: str) -> str:
    return re.sub(r"hf_\w+|(?<=Bearer )\S+", "(token)", text)
