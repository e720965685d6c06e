"""open_images: rows in a fixed order from folders, lists, parquet and tar files, and data sets."""

import io
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from hub_server import FakeHub
from refusals import refused
from rows import FEATURES, NAMES, N, picture, png, samples, table, tar

from rlpjepa_zoo.data.images import ImageRows, Row
from rlpjepa_zoo.data.sources import open_images
from rlpjepa_zoo.data.sources.base import Options
from rlpjepa_zoo.data.sources.huggingface import image_rows
from rlpjepa_zoo.errors import DataError, HubError, UsageError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i, name in enumerate(NAMES):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(png(i))
    return tmp_path / "photos"


def same(images: ImageRows, order: list[int], start: int = 0) -> list[Row]:
    """The rows of a data set; their pictures must be those with these numbers."""
    rows = list(images.rows(start))
    assert [row.read().tobytes() for row in rows] == [picture(i).tobytes() for i in order[start:]]
    return rows


ORDER = sorted(range(N), key=lambda i: NAMES[i])


@pytest.mark.parametrize("start", [0, 4, N, N + 5])
def test_folder_gives_sorted_relative_paths_and_labels(photos: Path, start: int) -> None:
    images = open_images(photos)
    rows = same(images, ORDER, start)
    assert [row.id for row in rows] == sorted(NAMES)[start:]
    assert [row.columns["label"] for row in rows] == ["ab".index(name[0]) for name in sorted(NAMES)[start:]]
    assert images.length == N and images.columns == {"label": {"names": ["a", "b"], "_type": "ClassLabel"}} and images.seekable


def test_files_lists_and_several_folders_keep_their_order(photos: Path, tmp_path: Path) -> None:
    files = [str(photos / NAMES[i]) for i in (5, 0, 7)]
    assert [row.id for row in same(open_images(files), [5, 0, 7])] == files
    listing = tmp_path / "some.txt"
    listing.write_text("\n".join(files) + "\n\n")
    assert [row.id for row in same(open_images(listing), [5, 0, 7])] == files
    both = open_images([photos / "b", photos / "a"])
    assert [row.id for row in same(both, [i for k in (1, 0) for i in range(k, N, 2)])][0] == str(photos / "b/01.png")


def test_pictures_bytes_and_arrays_may_be_mixed() -> None:
    same(open_images([picture(0), png(1), np.asarray(picture(2))]), [0, 1, 2])
    same(open_images(np.stack([picture(3)])), [3])
    with refused(DataError, match="only PIL images, encoded bytes and integer arrays of pixels, got BytesIO, str"):
        open_images([picture(0), "a.png", io.BytesIO(png(1))])


@pytest.mark.parametrize("start", [0, 1, 3, 4, 9, N])
def test_parquet_files_are_read_from_any_row_on(tmp_path: Path, start: int) -> None:
    pq.write_table(table(range(7)).with_format("arrow")[:], tmp_path / "0.parquet", row_group_size=3)
    table(range(7, N)).to_parquet(str(tmp_path / "1.parquet"))
    images = open_images(tmp_path, columns=["note"])
    rows = same(images, list(range(N)), start)
    assert [(row.id, row.columns) for row in rows] == [(i, {"label": i % 2, "note": f"n{i}"}) for i in range(start, N)]
    assert images.length == N and images.columns["label"]["names"] == ["a", "b"]
    assert [row.id for row in open_images(tmp_path, id_column="key").rows(start)] == [f"k{i}" for i in range(start, N)]


@pytest.mark.parametrize("streamed", [False, True])
def test_data_sets_are_read_from_any_row_on(streamed: bool) -> None:
    data = table().to_iterable_dataset(num_shards=2) if streamed else table()
    images = open_images(data, columns=["note"], id_column="key")
    assert images.length == (None if streamed else N)
    for start in (0, 6, N):
        rows = same(images, list(range(N)), start)
        assert [(row.id, row.columns) for row in rows] == [(f"k{i}", {"label": i % 2, "note": f"n{i}"}) for i in range(start, N)]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_tar_files_are_read_in_order_with_their_columns(tmp_path: Path, suffix: str) -> None:
    tar(tmp_path / f"0{suffix}", samples(range(6)))
    tar(tmp_path / f"1{suffix}", [("readme.txt", b"of no sample"), *samples(range(6, N))])
    images = open_images(tmp_path, columns=["json"])
    rows = same(images, list(range(N)), 4)
    assert [row.id for row in rows][:3] == ["0/x/s04", "0/x/s05", "1/x/s06"]
    assert [row.columns for row in rows] == [{"label": i % 2, "json": f'{{"i": {i}}}'} for i in range(4, N)]
    assert images.length == N
    assert next(open_images(tmp_path / f"0{suffix}").rows(0)).id == "x/s00"


def test_tar_members_are_never_written_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("../../evil.png", "/etc/evil.png", "good.png"):
            member = tarfile.TarInfo(name)
            member.size = len(png(0))
            archive.addfile(member, io.BytesIO(png(0)))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    rows = list(open_images(path).rows(0))
    assert [row.id for row in rows] == ["../../evil", "/etc/evil", "good"]
    assert [row.read().size for row in rows] == [picture(0).size] * 3
    assert list((tmp_path / "inside").iterdir()) == [] and not (tmp_path.parent / "evil.png").exists()


def test_too_large_tar_member_is_refused_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlpjepa_zoo.data.files.archives.MAX_MEMBER_BYTES", len(png(1)) + 10)
    rows = list(open_images(tar(tmp_path / "x.tar", [("a.png", png(1)), ("b.png", png(1) + bytes(100)), ("c.png", png(1))])).rows(0))
    with refused(DataError, match=r"b: .*bytes, the limit is"):
        rows[1].read()
    assert rows[0].read().size == rows[2].read().size


def test_ambiguous_or_missing_tar_members_are_refused(tmp_path: Path) -> None:
    twice = tar(tmp_path / "a.tar", [(f"Screen 10.20.0{i}.png", png(i)) for i in range(3)])
    with refused(DataError, match=r"'Screen 10' has the images '\.20\.00\.png' and '\.20\.01\.png'; choose one with --image-column"):
        open_images(twice)
    plain = tar(tmp_path / "b.tar", samples(range(3)))
    with refused(DataError, match=r"no sample has a member '\.nope'; the first has png, cls, json"):
        open_images(plain, columns=["nope"])
    with refused(UsageError, match="'id' is a name of the embeddings themselves"):
        open_images(plain, columns=["id"])
    assert next(open_images(plain, columns=[".JSON"]).rows(0)).columns["json"] == '{"i": 0}'
    for name in ("x", "y"):
        (tmp_path / "both" / name).mkdir(parents=True)
        tar(tmp_path / "both" / name / "0.tar", [("a.png", png(0)), ("a.cls", b"cat")])
    rows = list(open_images(tmp_path / "both").rows(0))
    assert [(row.id, row.columns) for row in rows] == [("x/0/a", {"label": "cat"}), ("y/0/a", {"label": "cat"})]
    torn = tar(tmp_path / "c.tar", [*samples(range(1)), ("x/s9.png", png(1)), ("x/t9.png", png(1)), ("x/t9.cls", b"dog")])
    assert [row.columns["label"] for row in open_images(torn).rows(0)] == ["0", None, "dog"]


def test_differing_or_unusable_columns_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa

    table(range(2)).to_parquet(str(tmp_path / "a.parquet"))
    other = datasets.Features(FEATURES | {"label": datasets.ClassLabel(names=["b", "a"])})
    datasets.Dataset.from_list(table(range(2)).to_list(), features=other).to_parquet(str(tmp_path / "b.parquet"))
    with refused(DataError, match="b.parquet: column 'label' is ClassLabel"):
        open_images([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    raw = table(range(2)).cast_column("image", datasets.Image(decode=False))["image"][:]
    two = table(range(2)).add_column("back", raw, feature=datasets.Image())
    with refused(UsageError, match="'back' holds images"):
        open_images(two, columns=["back"])
    rows = pa.table({"image": [{"bytes": png(0), "path": None}], "text": ["ok"]})
    rows = rows.append_column("m", pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())))
    pq.write_table(rows, tmp_path / "m.parquet")
    assert same(open_images(tmp_path / "m.parquet", columns=["text"]), [0])[0].columns == {"text": "ok"}


def test_images_beside_other_files_are_taken_with_a_warning(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    table().to_parquet(str(photos / "meta.parquet"))
    assert open_images(photos).length == N and "its 11 image files are taken, and 1 parquet files beside them are not" in caplog.text


def test_stream_may_be_longer_than_its_card_says(tmp_path: Path) -> None:
    images = image_rows(table().to_iterable_dataset(), Options(), {"dataset": "x"}, expected=4)
    assert images.length is None and images.expected == 4 and len(list(images.rows())) == N


def test_truncated_tar_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", samples(range(N)))
    path.write_bytes(path.read_bytes()[:9000])
    with refused(DataError, match=r"x\.tar: cannot be read as a tar file after"):
        open_images(path)
    path.write_bytes(b"no archive at all")
    with refused(DataError, match="x.tar: cannot be read as a tar file"):
        open_images(path)


def test_hub_data_set_is_streamed_at_a_fixed_commit(hub_server: FakeHub, tmp_path: Path) -> None:
    table().to_parquet(str(tmp_path / "t.parquet"))
    first = hub_server.put("you/pictures", {"data/train-00000-of-00001.parquet": (tmp_path / "t.parquet").read_bytes()}, type="dataset")
    images = open_images("you/pictures", columns=["note"])
    rows = same(images, list(range(N)), 3)
    assert [row.columns["note"] for row in rows] == [f"n{i}" for i in range(3, N)]
    assert images.identity["revision"] == first and images.identity["dataset"] == "you/pictures"
    hub_server.put("you/pictures", {"data/train-00000-of-00001.parquet": b"replaced"}, type="dataset")
    same(open_images("you/pictures", revision=first), list(range(N)))
    with refused(HubError, DataError, match="you/absent"):
        open_images("you/absent")


@pytest.mark.parametrize("broken", [b"", b"no image", png(0)[:60]])
def test_unreadable_image_is_named_when_it_is_read(tmp_path: Path, broken: bytes) -> None:
    rows = table().to_list()
    rows[4]["image"] = {"bytes": broken, "path": None}
    pq.write_table(datasets.Dataset.from_list(rows, features=FEATURES).with_format("arrow")[:], tmp_path / "t.parquet")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/4.png").write_bytes(broken)
    for source in (tmp_path / "t.parquet", tar(tmp_path / "t.tar", [*samples(range(4)), ("x/row 4.png", broken), *samples(range(5, N))])):
        rows = list(open_images(source).rows(0))
        assert len(rows) == N
        with refused(DataError, match="row 4"):
            rows[4].read()
        assert rows[5].read().tobytes() == picture(5).tobytes()


def test_row_without_an_image_is_named_by_its_number(tmp_path: Path) -> None:
    rows = table().to_list()
    rows[2]["image"] = None
    datasets.Dataset.from_list(rows, features=FEATURES).to_parquet(str(tmp_path / "t.parquet"))
    with refused(DataError, match="row 2: no image"):
        list(open_images(tmp_path / "t.parquet").rows(0))[2].read()


def test_unusable_sources_are_refused_in_one_line(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.txt").write_text("\n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    table().to_parquet(str(tmp_path / "t.parquet"))
    table().remove_columns("image").to_parquet(str(tmp_path / "u.parquet"))
    tar(tmp_path / "x.tar", samples(range(2)))
    for source, options, kind, words in (
        (tmp_path / "nowhere", {}, DataError, "no such file or folder"),
        ([photos, tmp_path / "a", tmp_path / "b"], {}, DataError, "and 1 more"),
        (tmp_path / "empty", {}, DataError, "no images found"),
        (tmp_path / "none.txt", {}, DataError, "lists no files"),
        (tmp_path / "bad.parquet", {}, DataError, "cannot be read as parquet"),
        (tmp_path / "u.parquet", {}, DataError, "no image column"),
        (tmp_path / "t.parquet", {"columns": ["nope"]}, DataError, "no column 'nope'"),
        (tmp_path / "t.parquet", {"id_column": "absent"}, DataError, "no column 'absent'"),
        ([tmp_path / "t.parquet", tmp_path / "u.parquet"], {}, DataError, "no column 'image', which"),
        ([tmp_path / "t.parquet", tmp_path / "x.tar"], {}, DataError, "not embedded together"),
        (photos, {"columns": ["note"]}, UsageError, "have none"),
        (photos, {"revision": "main"}, UsageError, "has no revision"),
        (tmp_path / "x.tar", {"id_column": "key"}, UsageError, "no id column"),
    ):
        with refused(kind, match=words):
            open_images(source, **options)


def test_identity_changes_with_the_images_not_their_place(photos: Path, tmp_path: Path) -> None:
    first = open_images(photos).identity
    photos.rename(tmp_path / "moved")
    again = open_images(tmp_path / "moved").identity
    assert {k: v for k, v in first.items() if k != "folder"} == {k: v for k, v in again.items() if k != "folder"}
    (tmp_path / "moved" / NAMES[0]).write_bytes(png(0) + b"more")
    assert open_images(tmp_path / "moved").identity != again
