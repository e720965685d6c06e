"""Shared by the image sources: their registry, and what may be asked of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from ...config.sections import Data
from ...core.registry import Registry
from ...errors import UsageError
from ..images import ImageRows, Images


class Options(NamedTuple):
    """What to read: columns of a table, split and revision of a data set."""

    columns: tuple[str, ...] = ()
    """Columns passed along beside the class label."""
    id: str | None = None
    """Column of the ids; row numbers if None."""
    image: str | None = None
    """Column of the images; found by type and name if None."""
    label: str | None = None
    """Column of the class labels; found by type and name if None, ``"none"`` if there is none."""
    split: str | None = None
    revision: str | None = None
    allow_paths: bool = False
    """Whether cells of a table may name files outside of its folder."""
    prefix: str = ""
    """What the user writes before these options: ``"data."`` in a recipe, ``"--"`` for a command, nothing in Python."""

    skip_bad: bool = False
    """Whether files that are missing or damaged are rows that cannot be read, instead of errors when the source is opened."""

    @classmethod
    def of(cls, data: Data) -> Options:
        """The options in a recipe's data section."""
        return cls(image=data.image_column, label=data.label_column, allow_paths=data.allow_paths, prefix="data.")

    @property
    def from_recipe(self) -> bool:
        """Whether the images are for training or evaluation, not for embedding."""
        return self.prefix == "data."

    def name(self, key: str) -> str:
        """An option as the user writes it where it was asked for, for messages.

        Example:
            >>> [Options(prefix=prefix).name("image_column") for prefix in ("data.", "--", "")]
            ['data.image_column', '--image-column', 'image_column']
        """
        return self.prefix + (key.replace("_", "-") if self.prefix == "--" else key)

    def refuse_columns(self, noun: str) -> None:
        """Raise UsageError if columns were asked for of images that have none."""
        if self.columns or self.id or self.image:
            raise UsageError(f"columns: {noun} have none; leave the options for columns out")

    def refuse_split(self, name: str) -> None:
        """Raise UsageError if a revision or split was asked for of images that have none."""
        for option, value in (("revision", self.revision), ("split", self.split)):
            if value is not None:
                raise UsageError(f"'{name}' is not a data set on the Hub, so it has no {option}; leave it out")


class ImageSource(ABC):
    """One kind of image source. A new kind is one file in this folder with one registered subclass,
    and a row of `SOURCE_KEYS` in `rlpjepa_zoo.config.sections` with the recipe keys it uses.

    Example:
        >>> from rlpjepa_zoo.config.sections import Data
        >>> train, evaluation = SOURCES["digits"]().open(Data(source="digits"))
        >>> len(train.ids), len(evaluation.ids)
        (1437, 360)
    """

    suffixes: ClassVar[tuple[str, ...]] = ()
    """File name suffixes, in lower case, by which files of this kind are recognised."""

    def holds_images(self, file: Path, options: Options) -> bool:
        """Whether a file with one of the suffixes holds images, rather than only text about images beside it."""
        return True

    @abstractmethod
    def open(self, data: Data) -> tuple[ImageRows, Images | None]:
        """Training and evaluation images of a recipe's data section.

        Raises:
            DataError: not there, empty, or without the asked columns or splits.
        """

    def open_files(self, files: Sequence[Path], folder: Path | None, options: Options) -> ImageRows:
        """Images of files of this kind, for embedding.

        Args:
            files: files in order, which exist unless ``options.skip_bad``; for a saved data set its folder.
            folder: the folder that holds them all, if one folder was given; None for a list of files.
            options: columns, split and revision.

        Raises:
            DataError: files that cannot be read, or without the asked columns.
            UsageError: options that have no meaning for this kind.
        """
        raise NotImplementedError

    def open_object(self, source: Any, options: Options) -> ImageRows | None:
        """Images of a Python object or of a remote name, for embedding; None if this kind does not know it."""
        return None


SOURCES: Registry[type[ImageSource]] = Registry("data source", "rlpjepa_zoo.data.sources")
"""Kinds of image sources by the value of `data.source` in a recipe."""
