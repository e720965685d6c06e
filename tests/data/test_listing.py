"""Which files of a folder are images, which are hidden, and what is said of the others."""

import json
import logging
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from batches import refused_with
from images import encoded
from models import settled
from PIL import Image
from rows import png, samples, table, tar

from rlpjepa_zoo.config.sections import Data
from rlpjepa_zoo.data import decode
from rlpjepa_zoo.data.sources import folder_contents, open_images, open_source
from rlpjepa_zoo.embedding.extract import Extraction, extract
from rlpjepa_zoo.errors import DataError
from rlpjepa_zoo.evaluation.datasets import data_section_of

HEIC = b"\0\0\0\x18ftypheic" + bytes(40)


def write(folder: Path, **contents: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


def of(form: str) -> bytes:
    return encoded(Image.new("RGB", (16, 16), "red"), form)


def test_what_can_be_decoded_is_used_whatever_its_ending(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = {
        "a__jfif": of("JPEG"), "b__jpe": of("JPEG"), "c__avif": of("AVIF"), "d__JP2": of("JPEG2000"), "e": of("PNG"), "f__jpg_large": of("JPEG"),
        "g__heic": of("JPEG"), "h__bin": of("WEBP"),
    }  # fmt: skip
    write(tmp_path / "x", **good, i__txt=b"text", j__npy=b"\x93NUMPY", k=b"nothing", l__json=b"{}")
    images = open_images(tmp_path / "x")
    assert images.ids == [name.replace("__", ".") for name in good] and {image.size for image in images} == {(16, 16)}
    assert open_images(tmp_path / "x/c.avif").read(0).size == (16, 16) and caplog.text == ""


def test_images_that_cannot_be_used_are_counted_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = {
        "1__heic": HEIC,
        "2": HEIC,
        "3__svg": b"<svg/>",
        "4__cr3": b"\0\0\0\x18ftypcrx " + bytes(9),
        "5__nef": of("TIFF"),
        "6__jpg__bak": of("JPEG"),
    }
    write(tmp_path / "x", a__png=png(0), **bad)
    (tmp_path / "x/7.png").symlink_to("nowhere.png")
    with caplog.at_level(logging.WARNING):
        assert open_images(tmp_path / "x").ids == ["a.png"]
    (record,) = caplog.records
    for part in (
        "2 x HEIC, which needs `pip install pillow-heif`", "SVG, which is not decoded (3.svg)", "camera raw; export it as JPEG (4.cr3)",
        "TIFF under another ending, as of camera raw files (5.nef)", "a backup copy or unfinished download (6.jpg.bak)",
        "a link to a missing file (7.png)",
    ):  # fmt: skip
        assert part in record.message
    write(tmp_path / "only", photo__heic=HEIC)
    with refused_with("only: no images found", "1 x HEIC", "(photo.heic)"):
        open_images(tmp_path / "only")


def test_heic_under_any_name_is_named_with_its_mend(tmp_path: Path) -> None:
    for name in ("a.heic", "b.jpg"):
        (tmp_path / name).write_bytes(HEIC)
        with refused_with(f"{name}: cannot be read as an image (HEIC, which needs `pip install pillow-heif`)"):
            open_images(tmp_path / name).read(0)


def test_plugin_for_heic_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def register() -> None:
        monkeypatch.setitem(Image.OPEN, "HEIF", Image.OPEN["PNG"])
        monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register))
    for cached in (decode.formats, decode.suffixes):
        monkeypatch.setattr(decode, cached.__name__, cached.__wrapped__)
    assert "HEIF" in decode.formats() and ".heic" in decode.suffixes()


def test_droppings_of_systems_are_left_out_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "cat", a__jpg=png(0), Thumbs__db=b"\xd0\xcf\x11\xe0", desktop__ini=b"[x]", __DS_Store=b"Bud1")
    for name in ("@eaDir", "__MACOSX", ".ipynb_checkpoints", "$RECYCLE.BIN"):
        write(tmp_path / "cat" / name, a__jpg=png(1))
        write(tmp_path / name, b__jpg=png(1))
    write(tmp_path / "dog", a__jpg=png(2))
    source = open_source(Data(source="folder", path=str(tmp_path)))
    assert source.images.ids == ["cat/a.jpg", "dog/a.jpg"] and source.images.classes == ["cat", "dog"] and caplog.text == ""


def test_hidden_folders_are_left_out_for_every_kind_of_file(tmp_path: Path) -> None:
    for hidden in ("", ".ipynb_checkpoints", ".Trash-1000/deep", "__MACOSX"):
        for kind in ("tars", "tables"):
            (tmp_path / kind / hidden).mkdir(parents=True, exist_ok=True)
        tar(tmp_path / "tars" / hidden / "train.tar", samples(range(2)))
        table(range(3)).to_parquet(str(tmp_path / "tables" / hidden / "train.parquet"))
    assert folder_contents(tmp_path / "tars") == ("webdataset", [tmp_path / "tars/train.tar"])
    assert folder_contents(tmp_path / "tables") == ("parquet", [tmp_path / "tables/train.parquet"])
    for source, folder, rows in (("webdataset", "tars", 2), ("parquet", "tables", 3), ("hf", "tables", 3)):
        assert open_source(Data(source=source, path=str(tmp_path / folder))).length == rows


def test_linked_folders_hold_files_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "data").mkdir()
    tar(tmp_path / "real/0.tar", samples(range(2)))
    (tmp_path / "data/link").symlink_to(tmp_path / "real")
    (tmp_path / "real/up").symlink_to(tmp_path / "data")
    assert open_images(tmp_path / "data").length == 2


def test_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import os

    write(tmp_path / "x/locked", b__png=png(1))
    write(tmp_path / "x", a__png=png(0))
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with caplog.at_level(logging.WARNING):
        assert open_images(tmp_path / "x").ids == ["a.png"]
    assert "a folder that cannot be read (Permission denied)" in caplog.text and "locked" in caplog.text


def metadata(path: Path) -> None:
    pq.write_table(pa.table({"url": ["http://x"], "caption": ["a cat"]}), path)


def test_folders_of_img2dataset_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for shard in ("00000", "00001"):
        for kind in ("webdataset", "files"):
            write(tmp_path / kind, **{f"{shard}_stats__json": b"{}"})
            metadata(tmp_path / kind / f"{shard}.parquet")
        tar(
            tmp_path / "webdataset" / f"{shard}.tar",
            [(f"{shard}0.{suffix}", c) for suffix, c in (("jpg", png(0)), ("txt", b"c"), ("json", b"{}"))],
        )
        write(tmp_path / "files" / shard, **{f"{shard}0__jpg": png(0), f"{shard}0__txt": b"c", f"{shard}0__json": b"{}"})
    assert folder_contents(tmp_path / "webdataset")[0] == "webdataset" and open_images(tmp_path / "webdataset").length == 2
    images = open_images(tmp_path / "files")
    assert images.ids == ["00000/000000.jpg", "00001/000010.jpg"] and images.classes is None and caplog.text == ""
    (tmp_path / "table").mkdir()
    metadata(tmp_path / "table/0.parquet")
    with refused_with("no image column among url, caption"):
        open_images(tmp_path / "table")


def test_warning_tells_what_else_a_folder_holds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table(range(3)).to_parquet(str(tmp_path / "train.parquet"))
    tar(tmp_path / "x.tar", samples(range(2)))
    with caplog.at_level(logging.WARNING):
        assert folder_contents(tmp_path) == ("parquet", [tmp_path / "train.parquet"])
    assert "its 1 parquet files are taken, and 1 tar files beside them are not; name those to use them" in caplog.text


def test_bad_files_of_a_list_can_be_skipped(tmp_path: Path) -> None:
    write(tmp_path / "x", a__png=png(0), b__png=b"junk", c__png=png(2))
    (tmp_path / "x/link.png").symlink_to("nowhere.png")
    names = [str(tmp_path / "x" / name) for name in ("a.png", "b.png", "gone.png", "link.png", "c.png")]
    listing = tmp_path / "list.txt"
    listing.write_text("\ufeff" + "\r\n".join([*names, str(tmp_path / "x"), "a\0b"]) + "\r\n")
    with refused_with("gone.png: no such file or folder (and 3 more)"):
        open_images(listing)
    with refused_with("gone.png: no such file or folder (and 1 more)"):
        open_images(names)
    totals = extract(settled(), open_images(listing, on_error="skip"), tmp_path / "out", Extraction(skip_bad=True))
    assert (totals["rows"], totals["skipped"]) == (2, 5)
    failed = [json.loads(line) for line in (tmp_path / "out/failed.jsonl").read_text().splitlines()]
    assert [line["id"] for line in failed][:4] == [*names[1:4], str(tmp_path / "x")]
    assert [line["reason"].removeprefix(f"{line['id']}: ") for line in failed][1:4] == [
        "no such file", "no such file", "a folder or no regular file; expected an image file",
    ]  # fmt: skip
    assert [row.id for row in open_images(names, on_error="skip").rows()] == names


def test_one_missing_source_is_refused_also_when_bad_images_are_skipped(tmp_path: Path) -> None:
    with refused_with("gone: no such file or folder"):
        open_images(tmp_path / "gone", on_error="skip")


def test_missing_images_are_named_alike_by_all_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "photos", a__png=png(0))
    for path, mend in (("data/photo", "Did you mean 'photos'?"), ("data/xyz", f"check the path, which starts in {tmp_path}"),
                       ("nothing/at/all", "there is no folder nothing/at either")):  # fmt: skip
        for missing in (
            lambda path=path: open_images(path),
            lambda path=path: open_source(Data(source="folder", path=path)),
            lambda path=path: open_source(Data(source="webdataset", path=path)),
            lambda path=path: data_section_of(path),
        ):
            with refused_with(f"{path}: no such file or folder", mend, kind=DataError):
                missing()


@pytest.mark.parametrize("name", ["~no-such-user/a.png", "a\0b.png", "x" * 5000])
def test_strange_paths_are_missing_files(name: str) -> None:
    with refused_with("no such file or folder"):
        open_images(name)
