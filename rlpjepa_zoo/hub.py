"""From the name of an encoder to a folder on this machine, and back; the only module that imports huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import zoo
from .errors import HubError, ModelError, UsageError, did_you_mean, first_line
from .folder import NAMES

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(source: str | Path, revision: str | None = None, token: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """The folder that holds an encoder.

    Args:
        source: a name of the zoo, ``"hf-hub:owner/repo[@revision]"``, ``"owner/repo"``, ``"local-dir:path"`` or an existing folder.
        revision: branch, tag or commit; overrides an ``@revision`` and a commit pinned by the zoo.
        token: Hub access token; the stored login when None.
        cache_dir: where downloads are kept; the Hub client's cache when None.

    Raises:
        UsageError: a name that is none of these.
        ModelError: ``local-dir:`` of a folder that does not exist.
        HubError: the Hub refused or could not be reached.
    """
    text = str(source)
    folder = _folder(text.removeprefix("local-dir:"))
    if folder is not None and revision is not None:
        raise UsageError(f"'{text}' is a folder, which has no revision '{revision}'; leave it out, or write 'hf-hub:owner/repo'")
    if folder is not None:
        return folder
    if text.startswith("local-dir:") or isinstance(source, Path):
        raise ModelError(f"{text.removeprefix('local-dir:')}: no such folder")
    repo, _, at = text.removeprefix("hf-hub:").partition("@")
    if text in zoo.list_encoders():
        local = zoo.local_folder(text)
        if local is not None and revision is None:
            return local
        entry = zoo.entry(text)
        if not entry.get("repo"):
            raise HubError(
                f"'{text}' ships with this package and is not on the Hub, so it has no revision '{revision}'; leave revision out"
            )
        repo, at = entry["repo"], entry.get("commit", "")
    elif not _REPO.fullmatch(repo):
        known = zoo.list_encoders()
        raise UsageError(
            f"'{text}' is neither a folder, nor a name of the zoo ({', '.join(known) or 'empty'}), nor 'owner/repo'.{did_you_mean(text, known)}"
        )
    return _download(repo, revision or at or None, token, cache_dir)


def _folder(text: str) -> Path | None:
    try:
        path = Path(text).expanduser()
        return path if path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # name too long, no such user after ~, NUL
        return None


def _download(repo: str, revision: str | None, token: str | None, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, token=token, cache_dir=cache_dir, allow_patterns=list(NAMES)))
    except Exception as error:
        raise _explain(error, repo, revision) from error


def push(
    folder: Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
) -> str:
    """Upload a published folder (only the files of the format) in one commit; returns its address."""
    from huggingface_hub import HfApi

    if not _REPO.fullmatch(repo):
        raise UsageError(f"repository: expected 'owner/name', got '{repo}'")
    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit: Any = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            allow_patterns=list(NAMES),
            commit_message=message or "Upload sparse encoder",
        )
    except Exception as error:
        raise _explain(error, repo, revision) from error
    return str(getattr(commit, "commit_url", commit))


def _explain(error: Exception, repo: str, revision: str | None) -> HubError:
    """One line with the mend for each class of Hub error."""
    from huggingface_hub import errors as hub

    where = repo + (f"@{revision}" if revision else "")
    if isinstance(error, hub.GatedRepoError):
        return HubError(f"{where}: access is gated; accept the terms on its Hub page and log in with `hf auth login`")
    if isinstance(error, hub.RevisionNotFoundError):
        return HubError(f"{where}: no such branch, tag or commit")
    if isinstance(error, hub.RepositoryNotFoundError):
        return HubError(f"{where}: not found, or private; check the name, or pass token= / run `hf auth login`")
    if isinstance(error, hub.LocalEntryNotFoundError | hub.OfflineModeIsEnabled):
        cause = first_line(error.__cause__ or OSError("offline"))
        return HubError(f"{where}: not in the local cache and the Hub cannot be reached ({cause}); go online once, or give a folder")
    reason = first_line(error)
    return HubError(f"{where}: the Hub or the network failed: {reason}")
