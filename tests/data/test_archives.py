"""Tar files as other programs write them: links, sparse files, joined and damaged archives, samples of several images, labels out of place."""

import gzip
import io
import logging
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from batches import refused_with
from images import encoded
from PIL import Image
from rows import picture, png, samples, tar

from rlpjepa_zoo.config.sections import Data
from rlpjepa_zoo.data.images import Images
from rlpjepa_zoo.data.sources import open_images, open_source
from rlpjepa_zoo.errors import DataError

HEIC = b"\0\0\0\x18ftypheic" + bytes(40)


def write(path: Path, members: list[tuple[str, bytes | str | None]], mode: Any = "w") -> Path:
    """A tar file: bytes are files, a text ``=NAME`` is a hard link, another text a symbolic link, None a device."""
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
            elif content is None:
                member.type = tarfile.CHRTYPE
            else:
                member.type, member.linkname = (tarfile.LNKTYPE if content[0] == "=" else tarfile.SYMTYPE), content.removeprefix("=")
            archive.addfile(member, io.BytesIO(content if isinstance(content, bytes) else b""))
    return path


def read(source: Any, **options: Any) -> dict[str, bytes | str]:
    """Pixels by id, or why they cannot be read. The number of rows must be that which is said before."""
    images, found = open_images(source, **options), list[tuple[Any, bytes | str]]()
    for row in images.rows():
        try:
            found.append((row.id, row.read().tobytes()))
        except DataError as error:
            found.append((row.id, str(error)))
    assert images.length == len(found) == len(dict(found))
    return dict(found)


def indexed(path: Path, **more: Any) -> Images:
    return open_source(Data(source="webdataset", path=str(path), **more)).images


def pixels(**numbers: int) -> dict[str, bytes]:
    return {key: picture(i).tobytes() for key, i in numbers.items()}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_links_are_read_as_their_target_in_the_archive(tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    members = [
        ("a/late.png", "../b/x.png"), ("b/x.png", png(1)), ("b/hard.png", "=b/x.png"), ("b/twice.png", "hard.png"), ("b/y.png", png(2)),
        ("outside.png", "/etc/passwd"), ("above.png", "../../b/x.png"), ("circle.png", "circle.png"), ("device.png", None),
    ]  # fmt: skip
    path = write(tmp_path / f"x.tar{mode[1:].replace(':', '.')}", members, mode)  # type: ignore[arg-type]
    expected = {"a/late": 1, "b/x": 1, "b/hard": 1, "b/twice": 1, "b/y": 2}
    with caplog.at_level(logging.WARNING):
        assert read(path) == pixels(**expected)
    assert "3 x a link to what is not in the archive (outside.png, ...); 1 x a device or pipe (device.png)" in caplog.text
    if mode == "w":
        images = indexed(path)
        assert {id: images.read(i).tobytes() for i, id in enumerate(images.ids)} == pixels(**expected)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_sparse_members_are_read(tmp_path: Path, format: int) -> None:
    bitmap = encoded(Image.new("RGB", (300, 300), "black"), "BMP")
    start = bitmap[:512]
    member = tarfile.TarInfo("hole.bmp")
    if format == tarfile.GNU_FORMAT:  # a map of one piece in the header, of the type of sparse files
        member.type, member.size = tarfile.GNUTYPE_SPARSE, len(start)
        header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
        header[386:410], header[483:495] = b"%011o\0%011o\0" % (0, len(start)), b"%011o\0" % len(bitmap)
        header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))
        (tmp_path / "x.tar").write_bytes(bytes(header) + start + bytes(1024))
    else:
        content = b"1\n0\n512\n".ljust(512, b"\0") + start
        member.size = len(content)
        member.pax_headers = {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": "hole.bmp",
            "GNU.sparse.realsize": str(len(bitmap)),
        }
        with tarfile.open(tmp_path / "x.tar", "w", format=format) as archive:
            archive.addfile(member, io.BytesIO(content))
    assert read(tmp_path / "x.tar") == {"hole": bytes(300 * 300 * 3)}
    assert indexed(tmp_path / "x.tar").read(0).tobytes() == bytes(300 * 300 * 3)


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_joined_archives_are_read_whole(tmp_path: Path, compress: Any) -> None:
    parts = [
        tar(tmp_path / f"{k}.tar", [(f"{i}.png", png(i)) for i in some]).read_bytes() for k, some in enumerate(([0, 1], [], [2], [3, 4]))
    ]
    path = tmp_path / "joined.tar"
    path.write_bytes(b"".join(map(compress, parts)))
    assert read(path) == pixels(**{str(i): i for i in range(5)})
    if compress is bytes:
        assert [indexed(path).read(i).tobytes() for i in range(5)] == [picture(i).tobytes() for i in range(5)]


def test_equal_keys_on_both_sides_of_a_seam_are_two_images(tmp_path: Path) -> None:
    one = tar(tmp_path / "one.tar", [("0.png", png(0))]).read_bytes()
    (tmp_path / "joined.tar").write_bytes(one + tar(tmp_path / "two.tar", [("0.png", png(1))]).read_bytes())
    rows = list(open_images(tmp_path / "joined.tar").rows())
    assert [(row.id, row.read().tobytes()) for row in rows] == [("0", picture(i).tobytes()) for i in (0, 1)]


def test_what_follows_an_archive_and_is_none_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tar(tmp_path / "x.tar", samples(range(2)))
    path.write_bytes(path.read_bytes() + b"junk" * 300)
    with caplog.at_level(logging.WARNING):
        assert len(read(path)) == 2
    assert "what follows the end of the archive and is no other one (byte 10240)" in caplog.text


def broken(path: Path, how: str) -> Path:
    """An archive of 11 samples that is damaged at the start of the third."""
    data = bytearray(tar(path, samples(range(11))).read_bytes())
    third = data.index(b"x/s02.png")
    if how == "header":
        data[third + 148 : third + 156] = b"\xff" * 8
    elif how == "negative size":
        data[third + 124 : third + 136] = b"\xff" * 10 + b"\xf0\0"
        data[third + 148 : third + 156] = b"%06o\0 " % (256 + sum(data[third : third + 148]) + sum(data[third + 156 : third + 512]))
    else:
        data = data[: third + (300 if how == "cut in a header" else 600)]
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("how", ["header", "negative size", "cut in a header", "cut in an image"])
def test_damaged_archive_is_refused_or_ends_with_a_bad_row(tmp_path: Path, how: str) -> None:
    bad, good = broken(tmp_path / "bad.tar", how), tar(tmp_path / "good.tar", samples(range(2)))
    for refuse in (lambda: open_images([bad, good]), lambda: indexed(bad)):
        with refused_with("bad.tar: cannot be read as a tar file after 'x/s0"):
            refuse()
    rows = read([bad, tmp_path / "gone.tar", good], on_error="skip")
    complete = ["bad/x/s00", "bad/x/s01"][: 2 if how == "cut in an image" else 1]  # the last one may lack members
    assert list(rows) == [*complete, str(bad), str(tmp_path / "gone.tar"), "good/x/s00", "good/x/s01"]
    assert "cannot be read as a tar file" in str(rows[str(bad)]) and "No such file" in str(rows[str(tmp_path / "gone.tar")])


def test_large_extended_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 1 << 40
    (tmp_path / "x.tar.gz").write_bytes(
        gzip.compress(tar(tmp_path / "a.tar", samples(range(1))).read_bytes()[:-9216] + member.tobuf(tarfile.GNU_FORMAT))
    )
    with refused_with("an extended header of 1099511627776 bytes"):
        open_images(tmp_path / "x.tar.gz")


def test_plain_suffix_is_the_image_of_a_sample(tmp_path: Path) -> None:
    members = [(f"{i}.{suffix}", png(i + 5 * (suffix != "png"))) for i in range(2) for suffix in ("mask.png", "png", "seg.PNG")]
    path = tar(tmp_path / "x.tar", members)
    assert read(path) == pixels(**{"0": 0, "1": 1})
    assert indexed(path).read(1).tobytes() == picture(1).tobytes()


def test_one_of_several_images_is_asked_for(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "x.tar", [(f"{i}.{suffix}", png(i + 5 * (suffix[0] == "r"))) for i in range(2) for suffix in ("left.png", "right.png")]
    )
    for refuse in (lambda: open_images(path), lambda: indexed(path)):
        with refused_with("sample '0' has the images '.left.png' and '.right.png'", "--image-column left.png (data.image_column)"):
            refuse()
    assert read(path, image_column="right.png") == read(path, image_column=".RIGHT.PNG") == pixels(**{"0": 5, "1": 6})
    assert indexed(path, image_column="right.png").read(1).tobytes() == picture(6).tobytes()
    for refuse in (lambda: open_images(path, image_column="up.png"), lambda: indexed(path, image_column="up.png")):
        with refused_with("no sample has a member '.up.png'; the first has left.png, right.png"):
            refuse()
    assert open_images(path, image_column="left.png").identity != open_images(path, image_column="right.png").identity


def test_sample_without_the_asked_image_is_one_bad_image(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", [("0.left.png", png(0)), ("1.left.png", png(1)), ("1.bin", png(2))])
    assert read(path, image_column="bin") == {"0": "0: no member '.bin' in this sample; it has left.png", **pixels(**{"1": 2})}
    images = indexed(path, image_column="bin")
    with refused_with("0: no member '.bin'"):
        images.read(0)
    assert images.read(1).tobytes() == picture(2).tobytes()


def test_labels_of_later_samples_decide_with_the_first(tmp_path: Path) -> None:
    def labels(name: str, *texts: bytes | None) -> list[Any]:
        members = [[(f"{i}.png", png(i))] + ([(f"{i}.cls", text)] if text is not None else []) for i, text in enumerate(texts)]
        return [row.columns.get("label") for row in open_images(tar(tmp_path / f"{name}.tar", sum(members, []))).rows()]

    assert labels("numbers", None, b"3", b"") == [None, 3, None]
    assert labels("names", b"3", None, b"cat") == ["3", None, "cat"]
    assert labels("huge", b"3", b"9" * 30) == ["3", "9" * 30]
    late = tar(tmp_path / "json.tar", [("0.png", png(0)), ("1.png", png(1)), ("1.json", b"{}")])
    assert [row.columns for row in open_images(late, columns=["json"]).rows()] == [{"json": None}, {"json": "{}"}]


def test_labels_apart_from_their_image_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tar(tmp_path / "x.tar", [("a.png", png(0)), ("b.png", png(1)), ("a.cls", b"0"), ("b.cls", b"1")])
    with caplog.at_level(logging.WARNING):
        assert len(read(path)) == 2
    assert "2 x a class label without an image before or after it; write members sorted by name (a.cls, ...)" in caplog.text


def test_droppings_of_systems_are_left_out_and_names_are_only_ids(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    strange = os.fsdecode(b"caf\xe9")
    members = [
        ("./a.JPG", png(0)), ("./._a.JPG", b"junk"), ("__MACOSX/._a.jpg", b"junk"), ("d/.ipynb_checkpoints/b.png", png(1)),
        (f"{strange}.png", png(2)), ("../../up.png", png(3)), ("/root.png", png(4)), ("d.png/e.Jpeg", png(5)),
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        assert read(tar(tmp_path / "x.tar", members)) == pixels(**{"./a": 0, strange: 2, "../../up": 3, "root": 4, "d.png/e": 5})
    assert caplog.text == ""


def test_images_of_a_tar_file_are_told_by_content_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tar(
        tmp_path / "x.tar",
        [
            ("a.jfif", png(0)),
            ("b.heic", png(1)),
            ("c.heic", HEIC),
            ("d.svg", b"<svg/>"),
            ("e.png", png(2)),
            ("f.npy", b"x"),
            ("LICENSE", b"x"),
            ("g/h", png(3)),
        ],
    )
    with caplog.at_level(logging.WARNING):
        assert read(path) == pixels(**{"a": 0, "b": 1, "e": 2, "g/h": 3})
    assert "1 x HEIC, which needs `pip install pillow-heif` (c.heic); 1 x SVG, which is not decoded (d.svg)" in caplog.text


def test_archives_are_told_by_content_where_the_name_does_not(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", samples(range(2)))
    shutil.copy(path, tmp_path / "blob")
    assert list(read(tmp_path / "blob")) == ["x/s00", "x/s01"]
    (tmp_path / "packed.tar").write_bytes(gzip.compress(path.read_bytes()))
    assert len(read(tmp_path / "packed.tar")) == 2
    with refused_with("packed.tar is compressed"):
        indexed(tmp_path / "packed.tar")


def test_tar_files_with_and_without_the_whole_path_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        tar(tmp_path / f"{name}.tar", [("0.png", png(0))])
    monkeypatch.chdir(tmp_path)
    assert list(read([tmp_path / "a.tar", "b.tar"])) == ["a/0", "b/0"]
