"""From whatever holds images to RGB PIL images, with ids: folders, lists of files, PIL images, arrays, Hugging Face datasets.

One decoding rule serves training and embedding, so a file is the same picture in both: EXIF rotation applied, alpha laid over white,
16-bit and float greyscale scaled (not clipped), first frame of an animation, RGB.
"""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import DataError, first_line

__all__ = ["SUFFIXES", "Images", "decode", "from_dataset", "image_column", "label_column", "list_images", "open_images"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 64_000_000


def decode(source: str | Path | bytes | Image.Image, name: str = "image") -> Image.Image:
    """An RGB image from a file, encoded bytes or any PIL image.

    Args:
        source: path, bytes of an image file, or a PIL image of any mode.
        name: what to call it in errors.

    Raises:
        DataError: not an image of a known format, damaged, or over 64 megapixels (checked before decoding).
    """
    try:
        if isinstance(source, Image.Image):
            source.load()
            return _to_rgb(ImageOps.exif_transpose(source))
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{name}: {image.width} x {image.height} pixels, the limit is {MAX_PIXELS // 10**6} megapixels")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, DecompressionBombError, ...
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise DataError(f"{name}: cannot be read as an image ({reason})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        pixels = np.asarray(image, dtype=np.float64)
        # integers: 16 bit (PIL opens 16-bit PNG as I or I;16); floats: 0..1 unless larger values occur
        top = 65535.0 if image.mode != "F" else 1.0 if pixels.max(initial=0) <= 1 else 255.0
        return Image.fromarray(np.clip(np.nan_to_num(pixels) / top * 255 + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def list_images(folder: str | Path) -> list[Path]:
    """All image files below a folder, sorted by path; hidden files and folders are left out, a linked folder is entered once.

    Raises:
        DataError: no such folder, or no image in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder of images")
    found, seen = [], set()
    for here, folders, files in os.walk(root, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:  # a link back up
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(here, f) for f in files if f.lower().endswith(SUFFIXES) and not f.startswith(".") and os.path.isfile(Path(here, f))]
    if not found:
        raise DataError(f"{root}: no images found (looked for {' '.join(SUFFIXES)}, in all subfolders)")
    return sorted(found)


def ignore_signals(number: int) -> None:
    """Start a loader's process: one thread, and deaf to the signals that end or checkpoint a run; they reach whole process groups, and only
    the main process answers them."""
    import torch

    torch.set_num_threads(1)
    for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)


@contextmanager
def running(loader: Any) -> Iterator[Iterator[Any]]:
    """Iterate over a loader; on leaving, its processes are gone, whatever happened (deaf ones would keep the program from ending)."""
    iterator = iter(loader)
    try:
        yield iterator
    finally:
        if hasattr(iterator, "_shutdown_workers"):
            try:
                iterator._shutdown_workers()  # torch may raise in it, from its handler of SIGCHLD
            finally:
                for worker in iterator._workers:
                    if worker.is_alive():
                        worker.kill()


class Images:
    """n images behind an index: `read(i)` decodes one, `ids[i]` names it, `labels[i]` is its class or -1.

    Args:
        read: function of an index that returns what `decode` takes.
        ids: n strings or n integers.
        labels: (n,) integers, -1 where unknown; None when there are none.
        classes: names of the classes, where known.
    """

    def __init__(
        self,
        read: Callable[[int], Any],
        ids: Sequence[str] | Sequence[int],
        labels: Sequence[int] | np.ndarray[Any, Any] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self._read, self.ids, self.classes = read, ids, list(classes) if classes else None
        try:
            self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        except (TypeError, ValueError) as error:
            raise DataError(f"labels: expected integers, or a ClassLabel column ({error})") from error

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int) -> Image.Image:
        """Image i in RGB; DataError naming it if it cannot be read."""
        name = str(self.ids[i])
        try:
            source = self._read(i)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        return decode(source, name=name)

    def __iter__(self) -> Iterator[Image.Image]:
        return (self.read(i) for i in range(len(self)))

    def take(self, rows: Sequence[int] | np.ndarray[Any, Any]) -> Images:
        """The images of these row numbers, in this order."""
        rows = np.asarray(rows)
        ids: Any = [self.ids[int(i)] for i in rows]
        return Images(_Rows(self._read, rows), ids, None if self.labels is None else self.labels[rows], self.classes)


class _Rows:
    """Index into another index; a class because workers that are not forked get it pickled."""

    def __init__(self, read: Callable[[int], Any], rows: Any) -> None:
        self.read, self.rows = read, rows

    def __call__(self, i: int) -> Any:
        return self.read(int(self.rows[i]))


class _Cells:
    """Image cells of a Hugging Face dataset."""

    def __init__(self, dataset: Any, column: str) -> None:
        self.dataset, self.column = dataset, column

    def __call__(self, i: int) -> Any:
        return cell(self.dataset[i][self.column])


def _from_files(files: Sequence[Path], ids: Sequence[str]) -> Images:
    return Images(files.__getitem__, ids)


def _from_folder(folder: Path) -> Images:
    files = list_images(folder)
    return _from_files(files, [file.relative_to(folder).as_posix() for file in files])


def _from_parquet(path: Path) -> Images:
    import datasets

    try:
        return from_dataset(datasets.Dataset.from_parquet(str(path)))
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path}: cannot be read as parquet ({first_line(error)})") from error


def image_column(features: Any, asked: str | None = None) -> str:
    """The column of a Hugging Face dataset that holds images: the asked one, else the first of type Image or {bytes, path}."""
    names = [n for n, f in features.items() if type(f).__name__ == "Image" or (isinstance(f, dict) and "bytes" in f)]
    if asked is not None and asked not in features:
        raise DataError(f"no column '{asked}'; the data set has {', '.join(features)}")
    if asked is None and not names:
        raise DataError(f"no image column among {', '.join(features)}; name it with data.image_column")
    return asked or names[0]


def label_column(features: Any, asked: str | None = None) -> str | None:
    """The column of class labels: the asked one, else the first ClassLabel, else None. ``"none"`` means there is none."""
    if asked is None:
        return next((n for n, f in features.items() if type(f).__name__ == "ClassLabel"), None)
    if asked == "none":
        return None
    if asked not in features:
        raise DataError(f"no column '{asked}'; the data set has {', '.join(features)}")
    return asked


def undecoded(dataset: Any, column: str) -> Any:
    """The data set with images as {bytes, path}, so that one bad image does not take its batch with it."""
    import datasets

    return dataset.cast_column(column, datasets.Image(decode=False)) if type(dataset.features[column]).__name__ == "Image" else dataset


def cell(value: Any) -> Any:
    """What `decode` takes, from a cell of an image column."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise DataError("no image in this row")
    return value


def from_dataset(dataset: Any, image: str | None = None, label: str | None = None) -> Images:
    """Images of a Hugging Face `Dataset` (map style); ids are row numbers."""
    column, label = image_column(dataset.features, image), label_column(dataset.features, label)
    raw = undecoded(dataset.select_columns([column]), column)
    labels = None if label is None else [-1 if value is None else value for value in dataset[label][:]]
    return Images(_Cells(raw, column), range(len(dataset)), labels, getattr(dataset.features[label], "names", None) if label else None)


def open_images(source: Any) -> Images:
    """Images from a folder, a file, a parquet file, a sequence of files or PIL images, a Hugging Face dataset, or `Images` (returned as it is).

    Ids are paths (relative to a folder, else as given) or row numbers.

    Raises:
        DataError: nothing there, or a file is missing.

    Example:
        >>> open_images([Image.new("L", (8, 8))]).read(0).mode
        'RGB'
    """
    if isinstance(source, Images):
        return source
    if isinstance(source, str | Path):
        path = Path(source)
        if path.suffix == ".parquet" and path.is_file():
            return _from_parquet(path)
        return _from_folder(path) if path.is_dir() else open_images([path])
    if isinstance(source, Image.Image):
        return open_images([source])
    if type(source).__module__.split(".")[0] == "datasets" and hasattr(source, "features"):
        if not hasattr(source, "__len__"):
            raise DataError("a streaming data set has no length; take(n) and list it first, or load it without streaming")
        return from_dataset(source)
    if isinstance(source, dict):
        raise DataError(f"expected one data set, got a {type(source).__name__} with the splits {', '.join(map(str, source))}; choose one")
    items = list(source) if isinstance(source, Sequence) or hasattr(source, "__iter__") else None
    if items is None:
        raise DataError(f"expected a folder, files, PIL images, a float tensor (B, 3, H, W) or a dataset, got {type(source).__name__}")
    if all(isinstance(item, str | Path) for item in items):
        missing = [str(item) for item in items if not Path(item).is_file()]
        if missing:
            raise DataError(f"{missing[0]}: no such file" + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""))
        return _from_files([Path(item) for item in items], [str(item) for item in items])
    if all(isinstance(item, Image.Image) for item in items):
        return Images(items.__getitem__, range(len(items)))
    raise DataError(f"expected only paths or only PIL images, got {sorted({type(item).__name__ for item in items})}")
