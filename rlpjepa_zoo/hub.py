"""From the name of an encoder to a folder on this machine, and back; the only module that imports huggingface_hub.

A busy Hub (429, 5xx, a broken connection) is asked again for `PATIENCE` seconds in all, then the error is one line with its cause and mend.
With HF_HUB_OFFLINE=1, and for a commit that is cached whole, nothing is requested at all.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from . import folder, zoo
from .errors import HubError, ModelError, OutputError, UsageError, ZooError, did_you_mean, first_line
from .folder import Content

__all__ = ["PATIENCE", "Background", "Pushed", "fetch", "push", "resolve", "trouble"]

PATIENCE = 60.0
"""Seconds for which a busy Hub is asked again, in all, in one load or push."""

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COMMIT, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}")
_BUSY = (408, 429, 500, 502, 503, 504)

log = logging.getLogger("rlpjepa_zoo")
T = TypeVar("T")


# --- loading -------------------------------------------------------------------------------------------------------------------------


def resolve(source: str | Path, revision: str | None = None, token: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """The folder that holds an encoder.

    Args:
        source: a name of the zoo, ``"hf-hub:owner/repo[@revision]"``, ``"owner/repo"``, ``"local-dir:path"`` or an existing folder
            (published, or of a run).
        revision: branch, tag or commit; overrides an ``@revision`` and a commit pinned by the zoo.
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
    if text in zoo.list_encoders():
        return _of_zoo(text, revision, token, cache_dir)
    if not _REPO.fullmatch(repo):
        known = zoo.list_encoders()
        raise UsageError(
            f"'{text}' is neither a folder, nor a name of the zoo ({', '.join(known) or 'empty'}), nor 'owner/repo'.{did_you_mean(text, known)}"
        )
    return _encoder(repo, revision or at or None, token, cache_dir)


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
    return path


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

        self.repo, self.revision, self.token, self.cache_dir, self.first = repo, revision, token, cache_dir, first
        self.where = repo + (f"@{revision}" if revision else "")
        self.commit, self.trouble = "", "HF_HUB_OFFLINE is set"
        self.patience = _Patience(self.where)
        if constants.is_offline_mode():
            return
        url = hf_hub_url(repo, first, revision=revision)
        try:
            found = self.patience(lambda: get_hf_file_metadata(url, token=token))
            self.commit = found.commit_hash or ""
            if not _COMMIT.fullmatch(self.commit):
                raise HubError(f"{self.where}: the server does not speak the Hub's protocol (no commit in its answer); check HF_ENDPOINT")
        except hub.RemoteEntryNotFoundError as error:
            self.commit = error.response.headers.get("X-Repo-Commit", "") or revision or "main"
        except Exception as error:
            if not _away(error):
                raise _explain(error, self.where) from error
            self.trouble = f"the Hub cannot be reached ({_cause(error)})"
            log.warning("%s: %s; looking in the local cache", self.where, self.trouble)

    def __call__(self, name: str, explain: Callable[[Sequence[str], str], None] | None = None, force: bool = False) -> Path:
        """Path of a file; `explain` is asked about the repository's names when it does not hold the file."""
        from huggingface_hub import errors as hub
        from huggingface_hub import hf_hub_download

        # The first file goes by the branch, so that the cache learns where the branch points; the others follow its commit.
        at = self.revision if name == self.first and not force else self.commit
        try:
            path = self.patience(
                lambda: hf_hub_download(self.repo, name, revision=at, token=self.token, cache_dir=self.cache_dir, force_download=force)
            )
        except hub.RemoteEntryNotFoundError as error:
            if explain is not None:
                explain(self.names(), self.where)
            raise ModelError(f"{self.where}: config.json lists {name}, which the repository does not hold; push it again") from error
        except Exception as error:
            raise _explain(error, self.where) from error
        self.commit = Path(path).parent.name
        return Path(path)

    def absent(self, lacking: Sequence[str]) -> HubError:
        """Why neither the cache nor the Hub can help."""
        return HubError(f"{self.where}: not in the local cache ({', '.join(lacking)}) and {self.trouble}; go online once, or give a folder")

    def names(self) -> list[str]:
        from huggingface_hub import HfApi

        try:
            return self.patience(lambda: HfApi(token=self.token).list_repo_files(self.repo, revision=self.revision))
        except Exception as error:
            raise _explain(error, self.where) from error


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
    return paths[0].parent


def _no_file(name: str, found: Sequence[str], where: str) -> NoReturn:
    pickles = sorted(other for other in found if other.endswith(folder.PICKLES))
    if pickles and name.endswith(".safetensors"):
        raise ModelError(f"{where}: holds {pickles[0]}, a pickle, and no {name}; pickles can run code when they are read and are refused")
    raise ModelError(f"{where}: holds no {name}")


# --- publishing ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        repo: ``owner/name``.
        commit: 40 hex digits; the one that was there already when nothing had changed.
        changed: files that were added, replaced or deleted.
        url: page of the commit or pull request.
    """

    repo: str
    commit: str
    changed: tuple[str, ...]
    url: str


def push(
    contents: Mapping[str, Content],
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Bring a repository to what `folder.seal` gave, in one commit that holds only the files that differ.

    An interrupted push leaves the repository as it was; the same call again completes it. A lost answer is recognised: the commit is not
    made twice.

    Args:
        contents: file name -> bytes or file.
        repo: ``owner/name``; made if missing.
        private: of a new repository; an existing one must agree.
        revision: branch to commit to, made from main if missing; main when None.
        tag: name for the commit.
        create_pr: open a pull request instead of committing; needs no write permission.
        message: of the commit.
        token: with write permission; the stored login when None.

    Raises:
        UsageError: a malformed name, contradictory options, or an access token inside a file.
        HubError: one line with the mend.
    """
    from huggingface_hub import HfApi

    if not _REPO.fullmatch(repo):
        raise UsageError(f"repository: expected 'owner/name', got '{repo}'")
    if create_pr and (tag is not None or revision not in (None, "main")):
        raise UsageError("a pull request goes to main and has no commit to tag yet; leave out the tag and the revision")
    if message is not None and not message.strip():
        raise UsageError("commit message: expected some text, got none")
    for name, content in contents.items():
        if name not in folder.NAMES:
            raise UsageError(f"{name}: not a file of the published format, so it is not pushed")
        text = not name.endswith((".safetensors", ".png"))
        if text and _TOKEN.search(content if isinstance(content, bytes) else content.read_bytes()):
            raise UsageError(f"{name}: holds an access token (hf_...); remove it from the recipe before publishing")
    api, where = HfApi(token=token), repo + (f"@{revision}" if revision else "")
    patience = _Patience(where, again=lambda error: not create_pr or _status(error) is not None)
    try:
        info = patience(lambda: _ready(api, repo, private, revision))
        if private is not None and info.private != private:
            raise UsageError(
                f"{repo}: is {'private' if info.private else 'public'} already; change that on its settings page, or leave the option out"
            )
        pushed = patience(lambda: _commit(api, contents, repo, revision, create_pr, message))
        if tag is not None:
            patience(lambda: _tag(api, repo, tag, pushed.commit))
    except ZooError:
        raise
    except Exception as error:
        raise _explain(error, where, pushing=True) from error
    return pushed


def _ready(api: Any, repo: str, private: bool | None, revision: str | None) -> Any:
    """The repository's record, after making repository and branch if they are missing."""
    from huggingface_hub import errors as hub

    try:
        return api.model_info(repo, revision=revision)
    except hub.RevisionNotFoundError:
        api.create_branch(repo, branch=revision, exist_ok=True)
    except hub.GatedRepoError:
        raise
    except hub.RepositoryNotFoundError:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision not in (None, "main"):
            api.create_branch(repo, branch=revision, exist_ok=True)
    return api.model_info(repo, revision=revision)


def _commit(api: Any, contents: Mapping[str, Content], repo: str, revision: str | None, create_pr: bool, message: str | None) -> Pushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    info = api.model_info(repo, revision=revision, files_metadata=True)
    there = {file.rfilename: file for file in info.siblings}
    changed = [name for name, content in contents.items() if name not in there or not _same(content, there[name])]
    stale = [name for name in folder.OPTIONAL if name in there and name not in contents]
    if not changed and not stale:
        return Pushed(repo, info.sha, (), f"{api.endpoint}/{repo}/tree/{info.sha}")
    operations = [CommitOperationAdd(name, content if isinstance(content := contents[name], bytes) else str(content)) for name in changed]
    try:
        api.preupload_lfs_files(repo, operations, revision=revision, create_pr=create_pr, free_memory=False)
    except Exception as error:
        if _status(error) in _BUSY or _network(error) is not None:
            raise _GaveUp from error
        raise
    done = api.create_commit(
        repo,
        [*operations, *(CommitOperationDelete(name) for name in stale)],
        commit_message=message or ("Update sparse encoder" if "config.json" in there else "Upload sparse encoder"),
        revision=revision,
        parent_commit=info.sha,
        create_pr=create_pr,
    )
    return Pushed(repo, done.oid, (*changed, *stale), done.pr_url or done.commit_url)


def _same(content: Content, there: Any) -> bool:
    """Whether the Hub holds these bytes: by sha256 in large file storage, by git's blob id elsewhere."""
    if there.size != folder.size(content):
        return False
    if there.lfs is not None:
        return bool(there.lfs.sha256 == folder.sha256(content))
    data = content if isinstance(content, bytes) else content.read_bytes()
    return bool(there.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest())


def _tag(api: Any, repo: str, tag: str, commit: str) -> None:
    known = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo).tags}
    if known.get(tag, commit) != commit:
        raise HubError(f"{repo}: pushed, but tag '{tag}' exists already on commit {known[tag][:8]}; choose another tag")
    if tag not in known:
        api.create_tag(repo, tag=tag, revision=commit)


class Background:
    """Pushes in a thread, the newest only, and never raises: a Hub that is down costs a line in the log and nothing else."""

    def __init__(self, send: Callable[[Mapping[str, Content], str], Pushed]) -> None:
        self.send = send
        self.error: Exception | None = None
        self._next: tuple[Mapping[str, Content], str] | None = None
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, contents: Mapping[str, Content], message: str) -> None:
        """Push `contents` soon; what is still waiting is replaced."""
        with self._change:
            self._next = contents, message
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="hub-push", daemon=True)
                self._thread.start()

    def finish(self, seconds: float) -> bool:
        """Wait for what was submitted; whether the last of it is on the Hub."""
        with self._change:
            self._change.wait_for(lambda: self._thread is None, seconds)
            return self._thread is None and self.error is None

    def _work(self) -> None:
        while True:
            with self._change:
                task, self._next = self._next, None
                if task is None:
                    self._thread = None
                    self._change.notify_all()
                    return
            try:
                pushed = self.send(*task)
                self.error = None
                log.info("pushed to %s", pushed.url)
            except Exception as error:
                self.error = error
                log.warning("not pushed: %s", first_line(error))


# --- trouble -------------------------------------------------------------------------------------------------------------------------


class _GaveUp(Exception):
    """The Hub client itself has asked six times, so we do not ask again; the cause says why."""


class _Patience:
    """Calls that are repeated while the Hub is busy, until `PATIENCE` seconds are spent on failed calls and pauses."""

    def __init__(self, where: str, again: Callable[[BaseException], bool] = lambda error: True) -> None:
        self.where, self.again, self.left, self.wait = where, again, PATIENCE, 1.0

    def __call__(self, call: Callable[[], T]) -> T:
        while True:
            started = time.monotonic()
            try:
                return call()
            except Exception as error:
                self.left -= min(time.monotonic() - started, 10.0)  # a long transfer that broke off was not waiting
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


def _status(error: BaseException) -> int | None:
    """HTTP status that the Hub answered, if it did."""
    for part in _chain(error):
        status = getattr(getattr(part, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _network(error: BaseException) -> BaseException | None:
    """The error of the HTTP library below the Hub client: no connection, a timeout, a broken answer."""
    if _status(error) is not None:
        return None
    return next((part for part in _chain(error) if type(part).__module__.split(".")[0].startswith("httpx")), None)


def _pause(error: BaseException, wait: float) -> float | None:
    """Seconds until it is worth asking again; None when it is not."""
    from huggingface_hub import errors as hub

    if isinstance(error, _GaveUp | hub.LocalEntryNotFoundError):
        return None
    status = _status(error)
    if status is not None:
        asked = next((part.response.headers.get("Retry-After", "") for part in _chain(error) if hasattr(part, "response")), "")
        return (float(asked) if asked.isdigit() else wait) if status in _BUSY else None
    broken = _network(error)
    if broken is None:
        return None
    unreachable = type(broken).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError")
    return None if unreachable and wait > 1 else wait  # nobody there: once more, and that is it


def _away(error: BaseException) -> bool:
    """Whether a cached copy may stand in: the Hub is down or unreachable, and has not said no."""
    status = _status(error)
    return status in _BUSY if status is not None else _network(error) is not None


def _cause(error: BaseException) -> str:
    """What the Hub or the network said, in a few words."""
    status = _status(error)
    if status is None:
        return first_line(_network(error) or error)
    asked = next((part.response.headers.get("Retry-After", "") for part in _chain(error) if hasattr(part, "response")), "")
    return f"the Hub answered {status}" + (f" and asks to wait {asked} s" if asked.isdigit() else "")


def _explain(error: Exception, where: str, pushing: bool = False) -> ZooError:
    """One line with the mend for each class of Hub error."""
    from huggingface_hub import errors as hub

    status, login = _status(error), "run `hf auth login`, or set HF_TOKEN"
    unchanged = "; the repository was not changed, push again later" if pushing else "; try again later"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return OutputError(f"{error.filename or 'the cache'}: cannot be written: {error.strerror}; give another cache_dir, or set HF_HOME")
    if isinstance(error, hub.GatedRepoError):
        return HubError(f"{where}: access is gated; accept the terms on its Hub page and {login}")
    if isinstance(error, hub.RevisionNotFoundError):
        return HubError(f"{where}: no such branch, tag or commit; see the repository's list of versions")
    if isinstance(error, hub.OfflineModeIsEnabled):
        return HubError(
            f"{where}: HF_HUB_OFFLINE is set{'' if pushing else ' and it is not in the local cache'}; unset it to reach the Hub"
        )
    if status in _BUSY:
        return HubError(f"{where}: {_cause(error)}, and was asked again for up to {PATIENCE:.0f} s{unchanged}")
    if isinstance(error, hub.RepositoryNotFoundError):
        return HubError(f"{where}: not found, or private; check the name, or {login} with an account that may see it")
    if status == 401:
        return HubError(f"{where}: the access token is not valid; {login}")
    if status == 403:
        what = f"no permission to write to '{where.split('/')[0]}'" if pushing else "no access"
        return HubError(
            f"{where}: {what} ({_said(error)}); {login} with a token that has it" + (", or open a pull request" if pushing else "")
        )
    if status == 412:
        return HubError(f"{where}: somebody else pushed meanwhile; look at what is there, and push again")
    if _network(error) is not None:
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
        return _explain(hub.OfflineModeIsEnabled(), where)
    kinds = (hub.HfHubHTTPError, hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError, ConnectionError)
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, kinds) or _network(at) is not None:
            return _explain(at, where)  # type: ignore[arg-type]
        at = at.__cause__ or at.__context__
    return None


def _said(error: Exception) -> str:
    """The server's own words, or all lines of the error in one."""
    words = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return " ".join(str(words).split())[:300]
