"""Tar files of images: their members, also of files that hold several archives, what links stand for, and the samples of WebDataset.

Members of one sample follow each other and share their name up to its first dot. Names are ids and never paths: nothing is written to disk,
and links are followed within the archive only.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from ...errors import DataError, first_line
from ..decode import image_format, suffixes, unreadable_format
from .listing import LeftOut, common_folder, is_hidden, is_image_ending, why_unusable

__all__ = ["MAX_MEMBER_BYTES", "TAR_SUFFIXES", "Archives", "content", "is_compressed", "member_at", "open_archive"]

T = TypeVar("T")
Read = Callable[[tarfile.TarFile, tarfile.TarInfo, str], T]
"""What is read of a member, from its archive, header and suffix."""

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
"""File name suffixes of tar files, in lower case."""
MAX_MEMBER_BYTES = 1 << 28
"""Largest member that is read."""


# --- members of an archive ------------------------------------------------------------------------------------------------------------


class _Header(tarfile.TarInfo):
    """A header whose numbers are checked: extended headers are read into memory as a whole."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _EXTENDED and header.size > _LARGEST_EXTENDED:
            raise tarfile.ReadError(f"an extended header of {header.size} bytes")
        return header


_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_LARGEST_EXTENDED = 1 << 20


def open_archive(file: Path) -> tarfile.TarFile:
    """Open a tar file for reading, compressed or not.

    Raises:
        OSError, tarfile.TarError: it cannot be read.
    """
    return tarfile.open(file, encoding="utf-8", tarinfo=_Header)


def _members(archive: tarfile.TarFile, left: LeftOut) -> Iterator[tuple[int, tarfile.TarInfo]]:
    """All members of a file, with the number of their archive: a file may hold several, one after another, as `cat a.tar b.tar` writes.

    Raises:
        tarfile.ReadError: damaged, or cut short.
    """
    number, position = 0, -1
    while True:
        member = archive.next()
        archive.members = []  # type: ignore[attr-defined]  # the archive would keep a record of every member
        if member is None:
            if not _another_follows(archive, left):
                return
            number += 1
            continue
        if archive.offset <= position:  # a negative size, with which tarfile would read in circles
            raise tarfile.ReadError(f"damaged at byte {position}")
        position = archive.offset
        yield number, member


def _another_follows(archive: tarfile.TarFile, left: LeftOut) -> bool:
    """Go to the archive after the end of this one, if there is another.

    Raises:
        tarfile.ReadError: there is no end, which is a block of zeros, but a damaged header, which tarfile takes for an end too.
    """
    file: Any = archive.fileobj
    end = archive.offset
    file.seek(end)
    while (block := file.read(tarfile.BLOCKSIZE)) and not block.strip(b"\0"):
        archive.offset += len(block)
    if not block:
        return False
    if archive.offset == end:
        raise tarfile.ReadError(f"damaged at byte {end}")
    try:
        _Header.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        left.add("what follows the end of the archive and is no other one", f"byte {archive.offset}")
        return False
    file.seek(archive.offset)
    return True


def member_at(archive: tarfile.TarFile, offset: int) -> tarfile.TarInfo | None:
    """The member whose header is at an offset."""
    file: Any = archive.fileobj
    file.seek(offset)
    archive.firstmember, archive.offset = None, offset  # type: ignore[attr-defined]
    member = archive.next()
    archive.members = []  # type: ignore[attr-defined]
    return member


class _Links:
    """Finds the members that links of an archive stand for. Its index is made at the first link."""

    def __init__(self, file: Path) -> None:
        self.file, self.offsets = file, dict[str, int]()
        self.archive: tarfile.TarFile | None = None

    def target(self, member: tarfile.TarInfo) -> tuple[tarfile.TarFile, tarfile.TarInfo] | None:
        """Archive and header of the file that a link stands for; None if it is not in the archive."""
        if self.archive is None:
            self.archive = open_archive(self.file)
            self.offsets = {_normal(other.name): other.offset for _, other in _members(self.archive, LeftOut())}
        for _ in range(40):
            if not (member.islnk() or member.issym()):
                return (self.archive, member) if member.isreg() else None
            folder = posixpath.dirname(member.name) if member.issym() else ""
            offset = self.offsets.get(_normal(posixpath.join(folder, member.linkname)))
            found = None if offset is None else member_at(self.archive, offset)
            if found is None:
                return None
            member = found
        return None

    def close(self) -> None:
        if self.archive is not None:
            self.archive.close()


def _normal(name: str) -> str:
    return posixpath.normpath(name).lstrip("/")


def content(archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str = "") -> bytes | DataError:
    """Bytes of a member, or why they are not read."""
    if member.size > MAX_MEMBER_BYTES:
        return DataError(f"{member.size} bytes, the limit is {MAX_MEMBER_BYTES}")
    opened = archive.extractfile(member)
    return opened.read() if opened is not None else b""


# --- samples --------------------------------------------------------------------------------------------------------------------------


class _Damaged(Exception):
    """An archive that cannot be read on."""


def _samples(file: Path, read: Read[T], asked: str | None, left: LeftOut) -> Iterator[tuple[str, str | None, dict[str, T]]]:
    """Key, suffix of the image (None without one), and what `read` returns of each member by suffix, of every sample.

    Args:
        asked: suffix of the image; if None, the one without further dots.
        left: gets the images that cannot be used.

    Raises:
        _Damaged: not a tar file, damaged or cut short.
        DataError: a sample of several images, none of which is the plain one.
    """
    key, images, members = (0, ""), list[str](), dict[str, T]()
    links = _Links(file)
    try:
        with open_archive(file) as archive:
            for number, member in _members(archive, left):
                stem, suffix = _split(member.name)
                if not stem or member.isdir():
                    continue
                if (number, stem) != key or suffix in members:
                    if members:
                        yield key[1], _image_of(file, key[1], images, members, asked), members
                    key, images, members = (number, stem), [], {}
                found = links.target(member) if member.islnk() or member.issym() else (archive, member) if member.isreg() else None
                is_image = (
                    suffix == asked or is_image_ending(_ending(suffix)) or (not suffix and found is not None and _is_nameless_image(*found))
                )
                reason = _why_left_out(found, member, suffix) if is_image and suffix != asked or found is None else None
                if found is None or reason is not None:
                    if is_image:
                        left.add(str(reason), member.name)
                    continue
                members[suffix] = read(*found, suffix)
                if is_image:
                    images.append(suffix)
    except DataError:
        raise
    except Exception as error:  # tarfile and decompressors raise TarError, OSError, EOFError, zlib.error, ValueError, RecursionError, ...
        raise _Damaged(f"{file}: cannot be read as a tar file after '{key[1]}' ({first_line(error)})") from error
    finally:
        links.close()
    if members:
        yield key[1], _image_of(file, key[1], images, members, asked), members


def _split(name: str) -> tuple[str, str]:
    """Key and suffix, in lower case, of a member; both empty if it belongs to no sample, an empty suffix if its name has none."""
    folder, _, name_below = name.rpartition("/")
    stem, _, suffix = name_below.partition(".")
    if not stem or is_hidden(name):
        return "", ""
    return f"{folder}/{stem}" if folder else stem, suffix.lower()


def _ending(suffix: str) -> str:
    return f".{suffix.rpartition('.')[2]}"


def _is_nameless_image(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bool:
    """Whether a member whose name has no suffix is an image, by its content."""
    encoded = content(archive, member)
    return isinstance(encoded, bytes) and (image_format(encoded) is not None or unreadable_format(encoded) is not None)


def _why_left_out(found: tuple[tarfile.TarFile, tarfile.TarInfo] | None, member: tarfile.TarInfo, suffix: str) -> str | None:
    """Why an image cannot be used; None if it can. An ending of images that can be decoded is believed."""
    if found is None:
        return "a device or pipe" if not (member.islnk() or member.issym()) else "a link to what is not in the archive"
    if _ending(suffix) in suffixes():
        return None
    encoded = content(*found)
    return str(encoded) if isinstance(encoded, DataError) else why_unusable(member.name, encoded)


def _image_of(file: Path, key: str, images: list[str], members: dict[str, Any], asked: str | None) -> str | None:
    """Suffix of the image of a sample; None if it has no images.

    Raises:
        DataError: it has several, and none is the plain one.
    """
    if asked is not None:
        return asked if asked in members or images else None
    plain = [suffix for suffix in images if "." not in suffix]
    choice = plain or images
    if len(choice) > 1:
        names = " and ".join(f"'.{suffix}'" for suffix in choice[:2])
        raise DataError(
            f"{file}: the sample '{key}' has the images {names}; choose one with --image-column {choice[0]} (data.image_column). "
            "If they are of two samples, rename them: WebDataset cuts names at their first dot"
        )
    return choice[0] if choice else None


class Archives:
    """Several tar files, read one after another.

    Args:
        files: the tar files.
        image: suffix of the images; None takes the image whose suffix has no further dot.
        skip_bad: whether damaged files are skipped.
    """

    def __init__(self, files: Sequence[Path], image: str | None, skip_bad: bool = False) -> None:
        self.files, self.root, self.skip_bad = files, common_folder(files), skip_bad
        self.image = image.lower().removeprefix(".") if image else None

    def samples(self, read: Read[T], left: LeftOut) -> Iterator[tuple[int, str, T | DataError, dict[str, T]]]:
        """Number of the file, id, image, and all members by suffix, of every sample with an image. If damaged files are skipped, one ends with a
        sample whose image is the error, in place of the sample at the damage.

        Raises:
            DataError: a damaged file; a sample of several images; or, after the last sample, that none has the asked image.
        """
        first, seen = "", False
        for number, file in enumerate(self.files):
            try:
                for key, image, members in _samples(file, read, self.image, left):
                    if image is not None:
                        has = ", ".join(members)
                        first, seen = first or has, seen or image in members
                        found = members.get(image, DataError(f"no member '.{image}' in this sample; it has {has}"))
                        yield number, self._id(file, key), found, members
                    elif "cls" in members:
                        left.add("a class label without an image before or after it; write members sorted by name", f"{key}.cls")
            except _Damaged as error:
                if not self.skip_bad:
                    raise DataError(str(error)) from error
                yield number, str(file), DataError(str(error)), {}
        if first and not seen:
            raise DataError(f"{self.files[0]}: no sample has a member '.{self.image}'; the first has {first}")

    def _id(self, file: Path, key: str) -> str:
        """Id of a sample: its key, preceded by the archive's path without suffix if there are several archives."""
        if len(self.files) == 1:
            return key
        path = Path(os.path.relpath(file, self.root)).as_posix()
        return f"{next((path[: -len(s)] for s in TAR_SUFFIXES if path.lower().endswith(s)), path)}/{key}"


def is_compressed(file: Path) -> bool:
    """Whether a tar file is compressed, by its first bytes.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open(file, "rb") as opened:
            return opened.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
