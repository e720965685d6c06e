"""From the name of an encoder to a folder on this machine; with `publish`, the only module that imports huggingface_hub.

A busy Hub (429, 5xx, a broken connection) is asked again for about `PATIENCE` seconds, then the error is one line with its cause and mend.
With HF_HUB_OFFLINE=1, and for a commit that is cached whole, nothing is requested at all.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

from . import folder, zoo
from .errors import HubError, ModelError, OutputError, UsageError, ZooError, did_you_mean, first_line

__all__ = ["PATIENCE", "Patience", "access", "explain", "fetch", "resolve", "trouble"]

PATIENCE = 60.0
"""Seconds for which a busy Hub is asked again, in all, in one load or push."""
SILENCE = 60.0
"""Seconds without a byte after which a request has failed."""
BUSY = (408, 429, 500, 502, 503, 504)

_COMMIT, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")

log = logging.getLogger("rlpjepa_zoo")
T = TypeVar("T")


# --- loading -------------------------------------------------------------------------------------------------------------------------


def resolve(source: str | Path, revision: str | None = None, token: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """The folder that holds an encoder.

    Args:
        source: a name of the zoo, ``"hf-hub:owner/repo[@revision]"``, ``"owner/repo"``, ``"local-dir:path"`` or an existing folder
            (published, or of a run).
        revision: branch, tag or commit; overrides a commit pinned by the zoo.
        token: Hub access token; the stored login when None.
        cache_dir: where downloads are kept; the Hub client's cache when None.

    Raises:
        UsageError: a name that is none of these.
        ModelError: ``local-dir:`` of a folder that does not exist, or a repository that holds no encoder of ours.
        HubError: the Hub refused or could not be reached.
    """
    text = str(source)
    found = _folder(text.removeprefix("local-dir:"))
    if found is not None and revision is not None:
        raise UsageError(f"'{text}' is a folder, which has no revision '{revision}'; leave it out, or write 'hf-hub:owner/repo'")
    if found is not None:
        return found
    if text.startswith("local-dir:") or isinstance(source, Path):
        raise ModelError(f"{text.removeprefix('local-dir:')}: no such folder")
    repo, _, at = text.removeprefix("hf-hub:").partition("@")
    if at and revision is not None and at != revision:
        raise UsageError(f"'{text}' and revision '{revision}': the revision is given twice; give one")
    if text in zoo.list_encoders():
        return _of_zoo(text, revision, token, cache_dir)
    if not zoo.is_repository(repo):
        known = zoo.list_encoders()
        raise UsageError(
            f"'{text}' is neither a folder, nor a name of the zoo ({', '.join(known) or 'empty'}), nor 'owner/repo'.{did_you_mean(text, known)}"
        )
    return _encoder(repo, revision or at or None, token, cache_dir)


def access(token: str | None) -> str | None:
    """A token as it is sent; None stands for the stored login.

    Raises:
        UsageError: not one word of printable characters. The message does not repeat it.
    """
    token = None if token is None else token.strip()
    if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise UsageError("token: expected one word of printable characters, such as hf_...")
    return token


def _folder(text: str) -> Path | None:
    try:
        path = Path(text).expanduser()
        return folder.find(path) if path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # name too long, no such user after ~, NUL
        return None


def _of_zoo(name: str, revision: str | None, token: str | None, cache_dir: str | Path | None) -> Path:
    """What the zoo lists: the copy that ships, or the repository at its pinned commit; config.json (and so every file) as listed."""
    entry, local = zoo.entry(name), zoo.local_folder(name)
    if revision is not None and not entry.get("repo"):
        raise HubError(f"'{name}' ships with this package and is not on the Hub, so it has no revision '{revision}'; leave revision out")
    if revision is not None:
        return _encoder(entry["repo"], revision, token, cache_dir)
    path = local if local is not None else _encoder(entry["repo"], entry.get("commit"), token, cache_dir)
    if entry.get("sha256") not in (None, folder.sha256(path / "config.json")):
        raise ModelError(
            f"{path}/config.json: not the one that the zoo lists for '{name}'; reinstall rlpjepa_zoo, or load the folder itself"
        )
    return path


def _encoder(repo: str, revision: str | None, token: str | None, cache_dir: str | Path | None) -> Path:
    """Folder in the cache with every file that the repository's config.json lists."""
    if revision is not None and _COMMIT.fullmatch(revision) and not _lacking(repo, revision, cache_dir):
        return _cached(repo, revision, cache_dir)
    get = _Download(repo, revision, token, cache_dir)
    if not get.commit:  # offline, or the Hub cannot be reached
        if lacking := _lacking(repo, revision, cache_dir):
            raise get.absent(lacking)
        return _cached(repo, revision, cache_dir)
    path = get("config.json", _no_encoder).parent
    try:
        config = folder.read_config(path)
    except ModelError:
        get("config.json", force=True)  # if it was damaged on the way, or in the cache
        if folder.BLOCK.encode() not in (path / "config.json").read_bytes():
            _no_encoder(get.names(), get.where)
        config = folder.read_config(path)
    for name, listed in folder.listed_files(config, get.where).items():
        if not folder.matches(get(name), listed):
            get(name, force=True)
    return get.done(path)


def _no_encoder(names: Sequence[str], where: str) -> NoReturn:
    """Say what a repository holds that is not one of ours."""
    pickles = sorted(name for name in names if name.endswith(folder.PICKLES))
    if "model.safetensors" not in names and pickles:
        raise ModelError(
            f"{where}: holds only {pickles[0]}, a pickle, which can run code when it is read and is refused; ask its author for safetensors"
        )
    if "config.json" in names and "model.safetensors" in names:
        raise ModelError(
            f"{where}: no '{folder.BLOCK}' block in config.json, so this is not a sparse encoder; for a plain timm model use "
            f"create_encoder('hf-hub:{where}', pretrained=True), which puts a fresh projector on its backbone"
        )
    raise ModelError(
        f"{where}: not a sparse encoder (no {'model.safetensors' if 'config.json' in names else 'config.json'} in the repository)"
    )


def _cached(repo: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import try_to_load_from_cache

    return Path(str(try_to_load_from_cache(repo, "config.json", cache_dir=cache_dir, revision=revision))).parent


def _lacking(repo: str, revision: str | None, cache_dir: str | Path | None) -> list[str]:
    """Files of the encoder that the cache does not hold, or holds damaged."""
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(repo, "config.json", cache_dir=cache_dir, revision=revision), str):
        return ["config.json missing"]
    path = _cached(repo, revision, cache_dir)
    try:
        files = folder.listed_files(folder.read_config(path), repo)
    except ModelError:
        return ["config.json damaged"]
    return [
        f"{name} {'damaged' if (path / name).is_file() else 'missing'}"
        for name, listed in files.items()
        if not folder.matches(path / name, listed)
    ]


class _Download:
    """Files of one repository at one commit, through the cache. `commit` is empty when the Hub cannot be asked; `trouble` says why."""

    def __init__(
        self, repo: str, revision: str | None, token: str | None, cache_dir: str | Path | None, first: str = "config.json"
    ) -> None:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
        from huggingface_hub import errors as hub

        self.repo, self.revision, self.token, self.cache_dir, self.first = repo, revision, access(token), cache_dir, first
        self.where = repo + (f"@{revision}" if revision else "")
        self.commit, self.trouble = "", "HF_HUB_OFFLINE is set"
        self.patience = Patience(self.where)
        if constants.is_offline_mode():
            return
        url = hf_hub_url(repo, first, revision=revision)
        try:
            found = self.patience(lambda: get_hf_file_metadata(url, token=self.token))
            self.commit = found.commit_hash or ""
            if not _COMMIT.fullmatch(self.commit):
                raise HubError(f"{self.where}: the server does not speak the Hub's protocol (no commit in its answer); check HF_ENDPOINT")
        except hub.RemoteEntryNotFoundError as error:
            self.commit = error.response.headers.get("X-Repo-Commit", "") or revision or "main"
        except Exception as error:
            if not _away(error):
                raise explain(error, self.where) from error
            self.trouble = f"the Hub cannot be reached ({_cause(error)})"
            log.warning("%s: %s; looking in the local cache", self.where, self.trouble)

    def __call__(
        self, name: str, why: Callable[[Sequence[str], str], None] | None = None, force: bool = False, revision: str | None = None
    ) -> Path:
        """Path of a file; `why` is asked about the repository's names when it does not hold the file."""
        from huggingface_hub import errors as hub
        from huggingface_hub import hf_hub_download

        def download() -> str:
            started = time.monotonic()
            try:
                return hf_hub_download(
                    self.repo, name, revision=revision or self.commit, token=self.token, cache_dir=self.cache_dir, force_download=force
                )
            except Exception as error:
                if network_error(error) is not None and time.monotonic() - started > 5:
                    raise GaveUp from error
                raise

        try:
            path = self.patience(download)
        except hub.RemoteEntryNotFoundError as error:
            if why is not None:
                why(self.names(), self.where)
            raise ModelError(f"{self.where}: config.json lists {name}, which the repository does not hold; push it again") from error
        except Exception as error:
            raise explain(error, self.where) from error
        return Path(path)

    def done(self, path: Path) -> Path:
        """Let the cache know, now that all is there, where the branch points; `path` again."""
        if self.revision is None or not _COMMIT.fullmatch(self.revision):
            self(self.first, revision=self.revision or "main")
        return path

    def absent(self, lacking: Sequence[str]) -> HubError:
        """Why neither the cache nor the Hub can help."""
        return HubError(f"{self.where}: not in the local cache ({', '.join(lacking)}) and {self.trouble}; go online once, or give a folder")

    def names(self) -> list[str]:
        from huggingface_hub import HfApi

        try:
            return self.patience(lambda: HfApi(token=self.token).list_repo_files(self.repo, revision=self.revision))
        except Exception as error:
            raise explain(error, self.where) from error


def fetch(repo: str, names: Sequence[str], revision: str | None = None) -> Path:
    """Folder in the cache that holds the named files of any repository; the files of a plain timm model, say.

    Raises:
        ModelError: the repository does not hold one of them; a pickle in its place is named as such.
        HubError: the Hub refused or could not be reached.
    """
    from huggingface_hub import try_to_load_from_cache

    get = _Download(repo, revision, None, None, names[0])
    if not get.commit:
        found = [try_to_load_from_cache(repo, name, revision=revision) for name in names]
        if lacking := [f"{name} missing" for name, path in zip(names, found, strict=True) if not isinstance(path, str)]:
            raise get.absent(lacking)
        return Path(str(found[0])).parent
    paths = [get(name, partial(_no_file, name)) for name in names]
    for path in paths:
        blob = path.resolve().name  # the cache calls a large file by the sha256 that the Hub gave
        if _SHA256.fullmatch(blob) and folder.sha256(path) != blob and folder.sha256(get(path.name, force=True)) != blob:
            raise ModelError(f"{path}: differs from the sha256 that the Hub lists for it; try again later")
    return get.done(paths[0].parent)


def _no_file(name: str, found: Sequence[str], where: str) -> NoReturn:
    pickles = sorted(other for other in found if other.endswith(folder.PICKLES))
    if pickles and name.endswith(".safetensors"):
        raise ModelError(f"{where}: holds {pickles[0]}, a pickle, and no {name}; pickles can run code when they are read and are refused")
    raise ModelError(f"{where}: holds no {name}")


# --- trouble -------------------------------------------------------------------------------------------------------------------------


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
                log.warning("%s: %s; trying again in %.0f s", self.where, _cause(error), pause)
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


def _away(error: BaseException) -> bool:
    """Whether a cached copy may stand in: the Hub is down or unreachable, and has not said no."""
    status = status_of(error)
    return status in BUSY if status is not None else network_error(error) is not None


def _cause(error: BaseException) -> str:
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
        return HubError(f"{where}: {_cause(error)}, also when asked again{unchanged}")
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
        return HubError(f"{where}: the Hub cannot be reached ({_cause(error)}){mend}")
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
