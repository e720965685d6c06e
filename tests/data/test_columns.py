"""Columns of tables of images: which are taken, which files their cells may name, and how messages call the options."""

import os
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from batches import refused_with
from images import png, table

from rlpjepa_zoo.config.sections import Data
from rlpjepa_zoo.data.decode import decode
from rlpjepa_zoo.data.images import Row
from rlpjepa_zoo.data.sources import open_images, open_source
from rlpjepa_zoo.errors import UsageError

IMAGES = [{"bytes": png(0), "path": None}, {"bytes": png(1), "path": None}]
UUIDS = [b"0123456789abcdef", b"fedcba9876543210"]


def written(folder: Path, **columns: Any) -> Path:
    file = folder / "train.parquet"
    with open(os.fsencode(file), "wb") as opened:
        pq.write_table(pa.table(columns), opened)
    return file


def read(file: Path, **options: Any) -> list[Row]:
    """The rows, whose images must be those of `IMAGES`."""
    rows = list(open_images(file, **options).rows())
    assert [row.read().tobytes() for row in rows] == [decode(png(i)).tobytes() for i in range(2)]
    return rows


# --- which column ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
@pytest.mark.parametrize("name", ["image", "img", "JPG"])
def test_column_of_bytes_with_a_usual_name_holds_the_images(tmp_path: Path, name: str, kind: Any) -> None:
    read(written(tmp_path, **{name: pa.array([png(0), png(1)], kind), "n": [1, 2]}))


def test_struct_of_large_types_holds_images(tmp_path: Path) -> None:
    read(written(tmp_path, image=pa.array(IMAGES, pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())]))))


def test_image_column_among_several_is_told_by_its_name(tmp_path: Path) -> None:
    read(written(tmp_path, mask=[{"bytes": b"", "path": None}] * 2, image=IMAGES))
    file = written(tmp_path, left=IMAGES, right=IMAGES)
    with refused_with("several columns may hold images: left, right; choose one with image_column"):
        open_images(file)
    read(file, image_column="left")
    with refused_with("several columns may hold images: image, img"):
        open_images(written(tmp_path, image=IMAGES, img=IMAGES))


def test_text_in_an_image_column_is_taken_only_when_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0)), (tmp_path / "1.png").write_bytes(png(1))
    file = written(tmp_path, image=["0.png", "1.png"], n=[1, 2])
    with refused_with("no image column among image, n; 'image' is text: if it holds paths of images, name it with --image-column"):
        open_images(file, prefix="--")
    read(file, image_column="image")


@pytest.mark.parametrize(("label", "kind"), [([0.5, 0.7], "float64"), ([date(2020, 1, 1)] * 2, "date32"), ([[1], [2]], "List")])
def test_label_column_that_is_not_copied_is_named(tmp_path: Path, label: list[Any], kind: str, caplog: pytest.LogCaptureFixture) -> None:
    file = written(tmp_path, image=IMAGES, label=label)
    assert not read(file)[0].columns
    assert [r.getMessage() for r in caplog.records] == [f"'label' ({kind}): not copied as a class label; name it with columns to copy it"]
    caplog.clear()
    read(file, columns=["label"])
    assert not caplog.records


def test_messages_name_the_option_of_the_caller(tmp_path: Path) -> None:
    file = written(tmp_path, blob=[png(0), png(1)], a=[0, 1])
    for prefix, name in (("", "image_column"), ("--", "--image-column")):
        with refused_with(f"no image column among blob, a; name it with {name}"):
            open_images(file, prefix=prefix)
    for source in ("parquet", "hf"):
        with refused_with("no image column among blob, a; name it with data.image_column"):
            open_source(Data(source=source, path=str(file)))
    read(file, image_column="blob")


@pytest.mark.parametrize("source", ["parquet", "hf"])
def test_label_column_is_told_by_its_name(tmp_path: Path, source: str) -> None:
    def labels(**columns: Any) -> list[int] | None:
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        (tmp_path / "set").mkdir()
        written(tmp_path / "set", image=IMAGES, **columns)
        found = open_source(Data(source=source, path=str(tmp_path / "set"))).images.labels
        return None if found is None else found.tolist()

    for name in ("label", "fine_label", "Class", "target"):
        assert labels(**{name: [1, 0], "n": [5, 5]}) == [1, 0]
    for text in (pa.string(), pa.large_string(), pa.string_view()):
        assert labels(label=pa.array(["b", "a"], text)) == [1, 0]
    assert labels(target=[0.5, 0.7], n=[1, 0]) is None
    with refused_with("several columns may hold class labels: label, class; choose one with data.label_column, or set it to none"):
        labels(label=[1, 0], **{"class": ["a", "b"]})


def test_embedding_copies_no_ambiguous_label_unasked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = written(tmp_path, image=IMAGES, label=[1, 0], **{"class": ["a", "b"]})
    assert [row.columns for row in read(file, columns=["label", "class"])] == [{"label": 1, "class": "a"}, {"label": 0, "class": "b"}]
    assert caplog.text == ""
    assert [row.columns for row in read(file, prefix="--")] == [{}, {}]
    assert "label, class; none is copied unless it is named with --columns" in caplog.text


# --- types that datasets does not know ------------------------------------------------------------------------------------------------

PAIRS = pa.map_(pa.string(), pa.int64())


@pytest.mark.parametrize(
    "other",
    [
        pa.array(UUIDS, pa.uuid()),
        pa.array([[("a", 1)]] * 2, PAIRS),
        pa.array([[[("a", 1)]]] * 2, pa.list_(PAIRS)),
        pa.array([{"m": [("a", 1)]}] * 2, pa.struct([("m", PAIRS)])),
        pa.array([1, 2], pa.decimal128(5, 2)).cast(pa.decimal32(5, 2)),
    ],
    ids=lambda column: str(column.type),
)
def test_column_of_an_unknown_type_is_left_alone(tmp_path: Path, other: Any) -> None:
    file = written(tmp_path, image=IMAGES, other=other, label=[1, 0])
    assert [row.columns for row in read(file)] == [{"label": 1}, {"label": 0}]
    for source, stream in (("parquet", False), ("hf", False), ("hf", True)):
        data = Data(source=source, path=str(file), streaming=stream, length=2 if stream else None)
        assert [row.read().tobytes() for row in open_source(data).train.rows()] == [decode(png(i)).tobytes() for i in range(2)]
    for options in ({"columns": ["other"]}, {"image_column": "other"}):
        with refused_with("column 'other' is of the type", "convert it to text or numbers"):
            open_images(file, **options)


def test_uuids_are_ids(tmp_path: Path) -> None:
    rows = read(written(tmp_path, image=IMAGES, key=pa.array(UUIDS, pa.uuid())), id_column="key")
    assert rows[0].id == "30313233-3435-3637-3839-616263646566"


# --- paths ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run:1", "a[b]*", "caf\udce9", "x#y z"], ids=ascii)
@pytest.mark.parametrize("source", ["parquet", "hf"])
def test_every_name_of_a_folder_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkdir(os.fsencode(name))
    file = written(Path(name), image=IMAGES)
    read(file)
    assert open_source(Data(source=source, path=name)).images.read(1).tobytes() == decode(png(1)).tobytes()
    if name != "caf\udce9":
        table(range(2)).save_to_disk(str(tmp_path / name / "saved"))
        read(Path(name) / "saved")


@pytest.fixture
def cell(tmp_path: Path) -> Any:
    """A function that writes a table with one cell, beside which lies `im/0.png`, and below `1.png`, and reads it with each source."""
    folder = tmp_path / "set"
    (folder / "im").mkdir(parents=True)
    (folder / "im/0.png").write_bytes(png(0))
    (tmp_path / "1.png").write_bytes(png(1))
    os.symlink(tmp_path / "1.png", folder / "link.png")
    for pipe in (folder / "pipe", tmp_path / "pipe"):
        os.mkfifo(pipe)

    def read(path: str, content: bytes | None = None, allow: bool = False) -> list[bytes]:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        file = written(folder, image=pa.array([{"bytes": content, "path": path}], kind))
        rows = [*open_images(file, allow_paths=allow, prefix="--").rows()]
        data = Data(source="parquet", path=str(file), allow_paths=allow)
        return [rows[0].read().tobytes(), open_source(data).images.read(0).tobytes()]

    return read


def test_cell_may_name_files_in_the_folder_of_its_table(cell: Any, tmp_path: Path) -> None:
    for path in ("im/0.png", str(tmp_path / "set/im/0.png"), "im/../im/0.png"):
        assert cell(path) == [decode(png(0)).tobytes()] * 2


def test_cell_that_names_a_file_elsewhere_needs_permission(cell: Any, tmp_path: Path) -> None:
    for path in (str(tmp_path / "1.png"), "../1.png", "link.png"):
        with refused_with(f"names the file '{path}', which is not in the folder of the table", "use --allow-paths"):
            cell(path)
        assert cell(path, allow=True) == [decode(png(1)).tobytes()] * 2
    for path in (f"zip://a.png::{tmp_path}/a.zip", f"file://{tmp_path}/1.png", "https://127.0.0.1:9/a.png", "/etc/passwd"):
        with refused_with("which is not in the folder of the table"):
            cell(path)


def test_cell_never_opens_a_pipe_or_a_device(cell: Any, tmp_path: Path) -> None:
    for path in ("pipe", str(tmp_path / "pipe"), "/dev/zero", "im", ""):
        with refused_with("not a regular file"):
            cell(path, allow=True)
    with refused_with("no such file"):
        cell(f"zip://a.png::{tmp_path}/pipe", allow=True)
    with refused_with("is no path"):
        cell("a\0b", allow=True)


def test_empty_bytes_are_no_reason_to_open_a_path(cell: Any) -> None:
    with refused_with("row 0: cannot be read as an image"):
        cell("im/0.png", content=b"")


def test_saved_data_set_names_no_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png(1))
    path = {"bytes": None, "path": str(tmp_path / "1.png")}
    table(range(1)).remove_columns("image").add_column("image", [path]).save_to_disk(str(tmp_path / "saved"))
    with refused_with("not in the folder of the table", "data.allow_paths=true"):
        open_source(Data(source="hf", path=str(tmp_path / "saved"))).images.read(0)
    with refused_with("not in the folder of the table", "allow_paths=True"):
        next(open_images(tmp_path / "saved").rows()).read()
    assert (
        open_source(Data(source="hf", path=str(tmp_path / "saved"), allow_paths=True)).images.read(0).tobytes() == decode(png(1)).tobytes()
    )


def test_columns_of_images_are_not_passed_along(tmp_path: Path) -> None:
    with refused_with("--columns: 'id' is a name of the embeddings themselves", kind=UsageError):
        open_images(written(tmp_path, image=IMAGES, id=[1, 2]), columns=["id"], prefix="--")
