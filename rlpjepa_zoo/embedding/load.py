"""Load embeddings from the Hub or from this machine."""

from __future__ import annotations

from pathlib import Path

from ..core.source import ModelSource
from ..errors import UsageError
from ..hub.download import fetch
from ..sparse.embeddings import SparseEmbeddings
from ..sparse.folder import MANIFEST, listed_names, read_manifest
from ..sparse.io import SUFFIXES

__all__ = ["load_embeddings"]


def load_embeddings(
    source: str | Path, revision: str | None = None, token: str | None = None, cache_dir: str | Path | None = None, dim: int | None = None
) -> SparseEmbeddings:
    """Load embeddings that `rlpjepa push` published, or those of a local file or folder.

    Every file is compared with the sha256 that the manifest in the repository lists.

    Args:
        source: ``"hf-hub:owner/name[@revision]"`` or ``"owner/name"`` (a data set on the Hub), or a local file or folder, which comes first.
        revision: branch, tag or commit on the Hub.
        token: Hub token for private repositories.
        cache_dir: folder of the download cache; that of the Hub client when None.
        dim: width D, for files that do not tell it, see `SparseEmbeddings.load`.

    Raises:
        UsageError: `source` is none of these.
        DataError: a damaged file, or embeddings that are not finished.
        ModelError: the repository holds no embeddings.
        HubError: the Hub refused or could not be reached.

    Example:
        >>> import tempfile
        >>> file = SparseEmbeddings.from_dense([[0.0, 2.0]]).save(tempfile.mkdtemp() + "/e.npz")
        >>> load_embeddings(file).shape
        (1, 2)
    """
    text = str(source)
    place = ModelSource.parse(source)
    if place.kind != "hub" or (not place.has_prefix and (Path(text).exists() or text.lower().endswith(SUFFIXES))):
        if revision is not None:
            raise UsageError(f"'{text}' is not on the Hub, so it has no revision '{revision}'; leave it out, or write 'hf-hub:owner/name'")
        return SparseEmbeddings.load(text.removeprefix("local-dir:") if place.has_prefix else source, dim)
    revision = revision or place.revision

    def get(names: list[str]) -> Path:
        return fetch(place.value, names, revision, token=token, cache_dir=cache_dir, type="dataset")

    folder = get([MANIFEST])
    manifest = read_manifest(folder)
    if manifest is None:
        raise UsageError(f"{text}: holds no {MANIFEST}; expected a data set that `rlpjepa push` made")
    get([MANIFEST, *listed_names(manifest, text)])
    return SparseEmbeddings.load(folder, dim)
