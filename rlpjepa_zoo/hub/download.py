"""Resolve source names to folders on this machine, downloading from the Hub where needed.

A request that a busy Hub refuses (429, 5xx, a broken connection) is repeated for about a minute; then the error is one line with its cause
and the fix. With HF_HUB_OFFLINE=1, and for a commit whose files are all in the cache, nothing is requested.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from ..core.files import sha256
from ..core.source import ModelSource, expanded, is_repository
from ..errors import HubError, ModelError, UsageError, did_you_mean, no_folder
from . import zoo
from .folder import find_folder, matches, read_folder
from .format import MARK, PICKLES, listed_files
from .retry import GaveUp, Patience, cause, check_token, explain, network_error, unavailable

__all__ = ["dataset_commit", "fetch", "resolve"]

_COMMIT, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")

log = logging.getLogger("rlpjepa_zoo")


def resolve(source: str | Path, revision: str | None = None, token: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """The folder of a published model; downloads it where needed.

    Args:
        source: a zoo name, ``"hf-hub:owner/repo[@revision]"``, ``"owner/repo"``, ``"local-dir:path"`` or an existing folder
            (published, or of a run).
        revision: branch, tag or commit; overrides a commit pinned by the zoo.
        token: Hub access token; the stored login when None.
        cache_dir: folder of the download cache; that of the Hub client when None.

    Raises:
        UsageError: `source` is none of these.
        ModelError: ``local-dir:`` of a folder that does not exist, or a repository without a published model.
        HubError: the Hub refused or could not be reached.
    """
    text, place = str(source), ModelSource.parse(source)
    folder = _folder(place)
    if folder is not None and revision is not None:
        raise UsageError(f"'{text}' is a folder, which has no revision '{revision}'; leave it out, or write 'hf-hub:owner/repo'")
    if folder is not None:
        return folder
    if place.kind == "folder" and not place.timm:
        raise ModelError(no_folder(place.path))
    if place.revision and revision is not None and place.revision != revision:
        raise UsageError(f"'{text}' and revision '{revision}': the revision is given twice; give one")
    if text in zoo.list_encoders():
        return _resolve_zoo_name(text, revision, token, cache_dir)
    if place.missing_folder and revision is None:
        hub = f"; for the repository on the Hub write 'hf-hub:{text}'" if place.kind == "hub" else ""
        raise UsageError(no_folder(expanded(text)) + hub)
    if place.kind != "hub" or place.timm or not is_repository(place.value):
        names = zoo.list_encoders()
        raise UsageError(
            f"'{text}' is neither a folder, nor a name of the zoo ({', '.join(names) or 'empty'}), nor 'owner/repo'.{did_you_mean(text, names)}"
        )
    try:
        return _encoder(place.value, revision or place.revision, token, cache_dir)
    except HubError as error:
        if place.has_prefix or place.revision or revision:
            raise
        raise type(error)(f"{error}; nor is there a folder '{text}' here") from error


def _folder(place: ModelSource) -> Path | None:
    """The published folder of a source; None if there is no folder."""
    try:
        return None if place.existing_folder is None else find_folder(place.existing_folder)
    except OSError:  # no permission to read the folder
        return None


def _resolve_zoo_name(name: str, revision: str | None, token: str | None, cache_dir: str | Path | None) -> Path:
    """The shipped copy of a zoo encoder, or its repository at the pinned commit; the sha256 of config.json must be the listed one."""
    entry, local = zoo.entry(name), zoo.local_folder(name)
    if revision is not None and not entry.get("repo"):
        raise HubError(f"'{name}' ships with this package and is not on the Hub, so it has no revision '{revision}'; leave revision out")
    if revision is not None:
        return _encoder(entry["repo"], revision, token, cache_dir)
    path = local if local is not None else _encoder(entry["repo"], entry.get("commit"), token, cache_dir)
    if entry.get("sha256") not in (None, sha256(path / "config.json")):
        raise ModelError(
            f"{path}/config.json: not the one that the zoo lists for '{name}'; reinstall rlpjepa_zoo, or load the folder itself"
        )
    return path


def _encoder(repo: str, revision: str | None, token: str | None, cache_dir: str | Path | None) -> Path:
    """The cache folder with every file that the repository's config.json lists."""
    if revision is not None and _COMMIT.fullmatch(revision) and not _incomplete(repo, revision, cache_dir):
        return _cached_folder(repo, revision, cache_dir)
    get = _Download(repo, revision, token, cache_dir)
    if not get.commit:  # offline, or the Hub cannot be reached
        if missing := _incomplete(repo, revision, cache_dir):
            raise get.unavailable(missing)
        return _cached_folder(repo, revision, cache_dir)
    path = get("config.json", _refuse_foreign).parent
    try:
        config = read_folder(path)
    except ModelError:
        get("config.json", force=True)  # the cached file may be damaged
        if MARK not in (path / "config.json").read_bytes():
            _refuse_foreign(get.names(), get.where)
        config = read_folder(path)
    for name, listed in listed_files(config, get.where).items():
        if not matches(get(name), listed):
            get(name, force=True)
    return get.done(path)


def _refuse_foreign(names: Sequence[str], where: str) -> NoReturn:
    """Refuse a repository without a published model; the message depends on the files that it holds."""
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if "model.safetensors" not in names and pickles:
        raise ModelError(
            f"{where}: holds only {pickles[0]}, a pickle, which can run code when it is read and is refused; ask its author for safetensors"
        )
    if "config.json" in names and "model.safetensors" in names:
        raise ModelError(
            f"{where}: no '{MARK.decode()}' block in config.json, so this is not a sparse encoder; for a plain timm model use "
            f"create_encoder('hf-hub:{where}', pretrained=True), which puts a fresh projector on its backbone"
        )
    raise ModelError(
        f"{where}: not a sparse encoder (no {'model.safetensors' if 'config.json' in names else 'config.json'} in the repository)"
    )


def _cached_folder(repo: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import try_to_load_from_cache

    return Path(str(try_to_load_from_cache(repo, "config.json", cache_dir=cache_dir, revision=revision))).parent


def _incomplete(repo: str, revision: str | None, cache_dir: str | Path | None) -> list[str]:
    """Files of the model that are missing or damaged in the cache."""
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(repo, "config.json", cache_dir=cache_dir, revision=revision), str):
        return ["config.json missing"]
    path = _cached_folder(repo, revision, cache_dir)
    try:
        files = listed_files(read_folder(path), repo)
    except ModelError:
        return ["config.json damaged"]
    return [
        f"{name} {'damaged' if (path / name).is_file() else 'missing'}"
        for name, listed in files.items()
        if not matches(path / name, listed)
    ]


class _Download:
    """Files of one repository at one commit, through the cache.

    Attributes:
        commit: 40 hex digits; empty when the Hub cannot be reached.
        trouble: the reason why the Hub cannot be reached.
    """

    def __init__(
        self,
        repo: str,
        revision: str | None,
        token: str | None,
        cache_dir: str | Path | None,
        first: str = "config.json",
        type: str | None = None,
    ) -> None:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
        from huggingface_hub import errors as hub

        self.repo, self.revision, self.token, self.cache_dir, self.first = repo, revision, check_token(token), cache_dir, first
        self.type = type
        self.where = repo + (f"@{revision}" if revision else "")
        self.commit, self.trouble = "", "HF_HUB_OFFLINE is set"
        self.patience = Patience(self.where)
        if constants.is_offline_mode():
            return
        url = hf_hub_url(repo, first, revision=revision, repo_type=type)
        try:
            metadata = self.patience(lambda: get_hf_file_metadata(url, token=self.token))
            self.commit = metadata.commit_hash or ""
            if not _COMMIT.fullmatch(self.commit):
                raise HubError(f"{self.where}: the server does not speak the Hub's protocol (no commit in its answer); check HF_ENDPOINT")
        except hub.RemoteEntryNotFoundError as error:
            self.commit = error.response.headers.get("X-Repo-Commit", "") or revision or "main"
        except Exception as error:
            if not unavailable(error):
                raise explain(error, self.where) from error
            self.trouble = f"the Hub cannot be reached ({cause(error)})"
            log.warning("%s: %s; looking in the local cache", self.where, self.trouble)

    def __call__(
        self, name: str, refuse: Callable[[Sequence[str], str], None] | None = None, force: bool = False, revision: str | None = None
    ) -> Path:
        """Path of a file in the cache; `refuse` is called with the repository's file names when it does not hold the file."""
        from huggingface_hub import errors as hub
        from huggingface_hub import hf_hub_download

        def download() -> str:
            started = time.monotonic()
            try:
                return hf_hub_download(
                    self.repo, name, revision=revision or self.commit, token=self.token, cache_dir=self.cache_dir, force_download=force,
                    repo_type=self.type,
                )  # fmt: skip
            except Exception as error:
                if network_error(error) is not None and time.monotonic() - started > 5:
                    raise GaveUp from error
                raise

        try:
            path = self.patience(download)
        except hub.RemoteEntryNotFoundError as error:
            if refuse is not None:
                refuse(self.names(), self.where)
            raise ModelError(f"{self.where}: config.json lists {name}, which the repository does not hold; push it again") from error
        except Exception as error:
            raise explain(error, self.where) from error
        return Path(path)

    def done(self, path: Path) -> Path:
        """Record in the cache which commit the branch points to, now that every file is in the cache; returns `path`."""
        if self.revision is None or not _COMMIT.fullmatch(self.revision):
            self(self.first, revision=self.revision or "main")
        return path

    def unavailable(self, missing: Sequence[str]) -> HubError:
        """The error when files are neither in the cache nor on the Hub."""
        return HubError(f"{self.where}: not in the local cache ({', '.join(missing)}) and {self.trouble}; go online once, or give a folder")

    def names(self) -> list[str]:
        """File names of the repository."""
        from huggingface_hub import HfApi

        try:
            return self.patience(lambda: HfApi(token=self.token).list_repo_files(self.repo, revision=self.revision, repo_type=self.type))
        except Exception as error:
            raise explain(error, self.where) from error


def fetch(
    repo: str,
    names: Sequence[str],
    revision: str | None = None,
    *,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    type: str | None = None,
) -> Path:
    """The cache folder with the named files of any repository, such as a plain timm model or, with the type "dataset", embeddings.

    Raises:
        ModelError: the repository does not hold one of them; the message names a pickle in its place.
        HubError: the Hub refused or could not be reached.
    """
    from huggingface_hub import try_to_load_from_cache

    get = _Download(repo, revision, token, cache_dir, names[0], type)
    if not get.commit:
        cached = [try_to_load_from_cache(repo, name, cache_dir=cache_dir, revision=revision, repo_type=type) for name in names]
        if missing := [f"{name} missing" for name, path in zip(names, cached, strict=True) if not isinstance(path, str)]:
            raise get.unavailable(missing)
        return Path(str(cached[0])).parent
    paths = [get(name, partial(_refuse_missing, name)) for name in names]
    for name, path in zip(names, paths, strict=True):
        blob = path.resolve().name  # the cache names a large file by the sha256 that the Hub lists
        if _SHA256.fullmatch(blob) and sha256(path) != blob and sha256(get(name, force=True)) != blob:
            raise ModelError(f"{path}: differs from the sha256 that the Hub lists for it; try again later")
    return get.done(paths[0].parent)


def dataset_commit(repo: str, revision: str | None = None, token: str | None = None) -> str:
    """The commit that a revision of a data set points to now (main when None).

    Raises:
        HubError: the Hub refused or could not be reached.
    """
    from huggingface_hub import HfApi

    where = f"data: {repo}" + (f"@{revision}" if revision else "")
    try:
        return str(Patience(where)(lambda: HfApi(token=check_token(token)).dataset_info(repo, revision=revision).sha))
    except Exception as error:
        raise explain(error, where) from error


def _refuse_missing(name: str, names: Sequence[str], where: str) -> NoReturn:
    """Refuse a repository without the named file."""
    pickles = sorted(other for other in names if other.endswith(PICKLES))
    if pickles and name.endswith(".safetensors"):
        raise ModelError(f"{where}: holds {pickles[0]}, a pickle, and no {name}; pickles can run code when they are read and are refused")
    raise ModelError(f"{where}: holds no {name}")
