"""Push the files of a model, or of a data set of embeddings, to the Hub in one commit, at once or in the background of a run."""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.files import MAX_JSON, sha256
from ..core.source import is_repository
from ..errors import HubError, UsageError, ZooError, first_line
from .format import CARD, CONFIG, MARK, NAMES, REPLACED, parse
from .retry import BUSY, SILENCE, GaveUp, Patience, check_token, explain, network_error, status_of

__all__ = ["DATASET", "MODEL", "Background", "Kind", "Pushed", "push"]

_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}")

log = logging.getLogger("rlpjepa_zoo")


@dataclass(frozen=True)
class Kind:
    """A kind of published repository.

    Attributes:
        type: repository type on the Hub.
        noun: in commit messages.
        names: pattern of its file names; other files are neither sent nor deleted.
        mark: file whose content identifies a repository of this kind.
        word: bytes in that file.
    """

    type: str
    noun: str
    names: re.Pattern[str]
    mark: str
    word: bytes


MODEL = Kind("model", "sparse encoder", re.compile("|".join(map(re.escape, NAMES))), CONFIG, MARK)
DATASET = Kind(
    "dataset",
    "sparse embeddings",
    re.compile(r"data/part-\d+\.parquet|embeddings\.json|failed\.jsonl|README\.md"),
    "embeddings.json",
    b'"fingerprint"',
)


@dataclass(frozen=True)
class Pushed:
    """The result of a push.

    Attributes:
        repo: ``owner/name``.
        commit: 40 hex digits; the existing commit when nothing changed.
        changed: names of files that were added, replaced or deleted.
        url: page of the commit or pull request.
    """

    repo: str
    commit: str
    changed: tuple[str, ...]
    url: str


def push(
    contents: Mapping[str, bytes | Path],
    repo: str,
    *,
    kind: Kind = MODEL,
    private: bool | None = None,
    new_private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    overwrite: bool = False,
    token: str | None = None,
) -> Pushed:
    """Make the files of a repository equal to `contents`, in one commit of the files that differ.

    An interrupted push leaves the repository unchanged; the same call again completes it. If the answer to a commit is lost, the commit is
    not made twice.

    Args:
        contents: bytes, or the local file that holds them, by file name.
        repo: ``owner/name``; made if missing.
        kind: model or data set.
        private: visibility; an existing repository must have it.
        new_private: visibility of a new repository when `private` is None.
        revision: branch to commit to, made from main if missing, or ``refs/pr/N``; main when None.
        tag: name for the commit.
        create_pr: open a pull request instead of committing; needs no write permission, but the repository must exist.
        message: of the commit.
        overwrite: also push to a repository that holds another model or data set.
        token: with write permission; the stored login when None.

    Raises:
        UsageError: a malformed name, contradictory options, an access token inside a file, or a repository that holds another model or data set.
        HubError: one line with the fix.
    """
    from huggingface_hub import HfApi

    if not is_repository(repo):
        raise UsageError(f"repository: expected 'owner/name', got '{repo}'")
    if create_pr and (tag is not None or revision not in (None, "main")):
        raise UsageError("a pull request goes to main and has no commit to tag yet; leave out the tag and the revision")
    if message is not None and not message.strip():
        raise UsageError("commit message: expected some text, got none")
    for what, name in (("revision", revision), ("tag", tag)):
        if name is not None and (not re.fullmatch(r"[A-Za-z0-9][\w./-]*", name) or ".." in name or re.fullmatch("[0-9a-f]{7,40}", name)):
            raise UsageError(f"{what}: expected a name such as 'main' or 'v1', got '{name}'")
    _check_contents(contents, kind)
    api, where = HfApi(token=check_token(token)), repo + (f"@{revision}" if revision else "")
    patience = Patience(where, again=lambda error: not create_pr or status_of(error) in (429, 503))
    try:
        if not create_pr:
            patience(lambda: _make_repository(api, repo, kind, private, new_private))
        info = patience(lambda: _info(api, repo, kind))
        if private is not None and info.private != private:
            raise UsageError(
                f"{repo}: is {'private' if info.private else 'public'} already; change that on its settings page, or leave the option out"
            )
        tags = (
            {} if tag is None else {r.name: r.target_commit for r in patience(lambda: api.list_repo_refs(repo, repo_type=kind.type)).tags}
        )
        if revision is not None:
            patience(lambda: _make_branch(api, repo, kind, revision))
        if not overwrite:
            patience(lambda: _refuse_others(api, repo, kind, revision))
        changed: list[str] = []  # of the first attempt, whose answer may be lost
        pushed = patience(lambda: _commit(api, contents, repo, kind, revision, create_pr, message, tags.get(tag or ""), changed))
        if tag is not None and tag not in tags:
            patience(lambda: api.create_tag(repo, tag=tag, revision=pushed.commit, repo_type=kind.type, exist_ok=True))
    except ZooError:
        raise
    except Exception as error:
        raise explain(error, where, pushing=True) from error
    return replace(pushed, changed=tuple(changed))


def _check_contents(contents: Mapping[str, bytes | Path], kind: Kind) -> None:
    for name, content in contents.items():
        if not kind.names.fullmatch(name):
            raise UsageError(f"{name}: not a file of the published format, so it is not pushed")
        text = not name.endswith((".safetensors", ".png", ".parquet"))
        if text and _TOKEN.search(content if isinstance(content, bytes) else content.read_bytes()):
            raise UsageError(f"{name}: holds an access token (hf_...); remove it before publishing")


def _info(api: Any, repo: str, kind: Kind, **options: Any) -> Any:
    return api.repo_info(repo, repo_type=kind.type, timeout=SILENCE, **options)


def _make_repository(api: Any, repo: str, kind: Kind, private: bool | None, new_private: bool | None) -> None:
    from huggingface_hub import errors as hub

    try:
        _info(api, repo, kind)
    except hub.GatedRepoError:
        raise
    except hub.RepositoryNotFoundError:
        api.create_repo(repo, repo_type=kind.type, private=new_private if private is None else private, exist_ok=True)


def _make_branch(api: Any, repo: str, kind: Kind, revision: str) -> None:
    from huggingface_hub import errors as hub

    try:
        _info(api, repo, kind, revision=revision)
    except hub.RevisionNotFoundError:
        if revision.startswith("refs/"):
            raise
        api.create_branch(repo, branch=revision, repo_type=kind.type, exist_ok=True)


def _refuse_others(api: Any, repo: str, kind: Kind, revision: str | None) -> None:
    """Refuse a repository without the mark of its kind, unless it is a data set without files."""
    from huggingface_hub import errors as hub

    try:
        with open(api.hf_hub_download(repo, kind.mark, revision=revision, repo_type=kind.type), "rb") as file:
            ours = kind.word in file.read(MAX_JSON)
    except hub.RemoteEntryNotFoundError:
        names = {file.rfilename for file in _info(api, repo, kind, revision=revision).siblings}
        ours = kind is MODEL or names <= {".gitattributes", CARD}
    if not ours:
        raise UsageError(
            f"{repo}: holds another {kind.type} ({kind.mark} is not of {kind.noun}s); choose another name, or overwrite it (--overwrite)"
        )


def _commit(
    api: Any,
    contents: Mapping[str, bytes | Path],
    repo: str,
    kind: Kind,
    revision: str | None,
    create_pr: bool,
    message: str | None,
    tagged: str | None,
    changes: list[str],
) -> Pushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    info = _info(api, repo, kind, revision=revision, files_metadata=True)
    remote = {file.rfilename: file for file in info.siblings}
    changed = [name for name, content in contents.items() if name not in remote or not _same(content, remote[name])]
    own = REPLACED if kind is MODEL else [name for name in remote if kind.names.fullmatch(name)]
    stale = [name for name in own if name in remote and name not in contents]
    if tagged is not None and (tagged != info.sha or changed or stale):
        raise HubError(f"{repo}: the tag exists already, on commit {tagged[:8]}; choose another tag")
    if not changed and not stale:
        return Pushed(repo, info.sha, (), f"{api.endpoint}/{'datasets/' if kind is DATASET else ''}{repo}/tree/{info.sha}")
    changes[:] = changes or [*changed, *stale]
    operations = [CommitOperationAdd(name, contents[name]) for name in changed]
    try:
        api.preupload_lfs_files(repo, operations, repo_type=kind.type, revision=revision, create_pr=create_pr, free_memory=False)
    except Exception as error:
        if status_of(error) in BUSY or network_error(error) is not None:
            raise GaveUp from error
        raise
    done = api.create_commit(
        repo,
        [*operations, *(CommitOperationDelete(name) for name in stale)],
        repo_type=kind.type,
        commit_message=message or f"{'Update' if kind.mark in remote else 'Upload'} {_noun(kind, contents)}",
        revision=revision,
        parent_commit=info.sha,
        create_pr=create_pr,
    )
    return Pushed(repo, done.oid, (), done.pr_url or done.commit_url)


def _noun(kind: Kind, contents: Mapping[str, bytes | Path]) -> str:
    config = contents.get(CONFIG)
    of_classifier = isinstance(config, bytes) and parse(config, CONFIG).classifier is not None
    return "image classifier" if of_classifier else kind.noun


def _same(content: bytes | Path, remote: Any) -> bool:
    """Whether a file on the Hub has these bytes, by sha256 in large file storage and by git's blob id elsewhere."""
    if remote.size != (len(content) if isinstance(content, bytes) else content.stat().st_size):
        return False
    if remote.lfs is not None:
        return bool(remote.lfs.sha256 == sha256(content))
    content = content if isinstance(content, bytes) else content.read_bytes()
    return bool(remote.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest())


class Background:
    """Pushes in a thread, only the newest contents, and never raises: a failed push is one line in the log.

    Args:
        send: function of contents and commit message that pushes.
    """

    def __init__(self, send: Callable[[Mapping[str, bytes], str], Pushed]) -> None:
        self.send = send
        self.error: Exception | None = None
        self._next: tuple[Mapping[str, bytes], str] | None = None
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, contents: Mapping[str, bytes], message: str) -> None:
        """Push `contents` soon; contents that still wait are dropped."""
        with self._change:
            self._next = contents, message
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="hub-push", daemon=True)
                self._thread.start()

    def finish(self, seconds: float) -> bool:
        """Wait for submitted contents; whether the newest is on the Hub."""
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
