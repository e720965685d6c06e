"""open_source: every source of a recipe opens, or is refused in one line."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torchvision
from batches import batches, refused_with
from images import CLASSES, png, table, toy, write_images
from PIL import Image

from rlpjepa_zoo.config.sections import Data
from rlpjepa_zoo.data.images import Images
from rlpjepa_zoo.data.sources import Source, fingerprint, open_source
from rlpjepa_zoo.errors import DataError, HubError


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def test_digits_split_is_fixed_disjoint_and_stratified() -> None:
    first, again = open_source(Data(source="digits")), open_source(Data(source="digits"), seed=9)
    assert first.eval is not None and again.eval is not None
    assert (len(first.train), len(first.eval), first.length, first.classes) == (1437, 360, 1437, 10)
    assert first.train.ids == again.train.ids and first.eval.ids == again.eval.ids
    assert len({*first.train.ids, *first.eval.ids}) == 1797
    share = np.bincount(first.eval.labels) / (np.bincount(first.train.labels) + np.bincount(first.eval.labels))
    assert np.abs(share - 360 / 1797).max() < 0.01


def test_digits_keep_image_and_label_together() -> None:
    from sklearn.datasets import load_digits

    bunch, train = load_digits(), open_source(Data(source="digits")).train
    for i in (0, 700, 1436):
        row = int(train.ids[i].removeprefix("digit-"))
        assert train.labels[i] == bunch.target[row]
        assert np.abs(np.asarray(train.read(i))[..., 0] / 255 * 16 - bunch.images[row]).max() < 0.05


def folder(path: Path, **more: Any) -> Source:
    return open_source(Data(source="folder", path=str(path), **more))


def test_folder_takes_labels_from_its_sub_folders(image_folder: Path) -> None:
    source = folder(image_folder)
    assert (source.length, source.classes, source.eval) == (40, 2, None)
    assert source.train.classes == ["blue", "red"]
    assert all(source.train.classes[label] == name.split("/")[0] for label, name in zip(source.train.labels, source.train.ids, strict=True))
    assert np.asarray(source.train.read(0))[..., 2].mean() > np.asarray(source.train.read(0))[..., 0].mean() + 60


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    write_images(tmp_path / "flat", 5)
    source = folder(tmp_path / "flat")
    assert (source.length, source.classes, source.train.labels) == (5, 0, None)


def test_one_sub_folder_or_images_beside_are_no_classes(tmp_path: Path) -> None:
    write_images(tmp_path / "one" / "only", 3)
    assert folder(tmp_path / "one").train.labels is None
    write_images(tmp_path / "mixed" / "a", 2)
    write_images(tmp_path / "mixed" / "b", 2, 2)
    write_images(tmp_path / "mixed", 1, 4)
    assert folder(tmp_path / "mixed").train.labels is None


def test_train_and_val_folders_share_class_numbers(tmp_path: Path) -> None:
    for name in CLASSES:
        write_images(tmp_path / "train" / name, 4)
    for name in ("cat", "ant", "dog"):
        write_images(tmp_path / "val" / name, 2)
    source = folder(tmp_path)
    assert source.eval is not None and (source.length, len(source.eval), source.classes) == (12, 6, 3)
    assert dict(zip([i.split("/")[0] for i in source.eval.ids], source.eval.labels.tolist(), strict=True)) == {
        "ant": 0,
        "cat": 2,
        "dog": -1,
    }


def test_unknown_evaluation_folders_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("red", "blue", "green"):
        write_images(tmp_path / "train" / name, 2)
        write_images(tmp_path / "val" / (name if name != "green" else "Green"), 2)
    source = folder(tmp_path)
    assert source.eval is not None and sorted(source.eval.labels.tolist()) == [-1, -1, 0, 0, 2, 2]  # type: ignore[union-attr]
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"{tmp_path / 'val'}: Green: no class of the training images (blue, green, red), so their images are not scored; "
        "name the classes of both parts alike"
    ]


def test_named_splits_of_a_folder_are_used(tmp_path: Path) -> None:
    for split in ("a", "b", "val"):
        write_images(tmp_path / split / "x", 2)
        write_images(tmp_path / split / "y", {"a": 1, "b": 2, "val": 3}[split], 2)
    source = folder(tmp_path, split="a", eval_split="b")
    assert source.eval is not None and (source.length, len(source.eval)) == (3, 4)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_held_out_images_are_never_trained_on(tmp_path: Path, name: str) -> None:
    write_images(tmp_path / "ant", 3)
    write_images(tmp_path / "bee", 3, 3)
    write_images(tmp_path / name / "ant", 2, 6)
    write_images(tmp_path / name / "bee", 2, 8)
    try:
        source = folder(tmp_path)
    except DataError as error:
        assert name in str(error)
    else:
        assert not any(i.startswith(f"{name}/") for i in source.train.ids) and name not in (source.train.classes or [])


def test_missing_folders_are_refused_with_the_path(tmp_path: Path) -> None:
    with refused_with(str(tmp_path / "nowhere"), "no such file or folder"):
        folder(tmp_path / "nowhere")
    with refused_with("data.path", "add data.path=DIR"):
        open_source(Data(source="folder"))
    (tmp_path / "empty").mkdir()
    with refused_with(str(tmp_path / "empty"), "no images found"):
        folder(tmp_path / "empty")
    write_images(tmp_path / "full")
    with refused_with("data.eval_split", str(tmp_path / "full" / "holdout")):
        folder(tmp_path / "full", eval_split="holdout")


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parquet")
    table(range(40), broken=(7,)).to_parquet(str(root / "train-00000-of-00002.parquet"))
    table(range(40, 60)).to_parquet(str(root / "train-00001-of-00002.parquet"))
    table(range(60, 75)).to_parquet(str(root / "test-00000-of-00001.parquet"))
    return root


def hf(path: Path, **more: Any) -> Source:
    return open_source(Data(source="hf", path=str(path), **more))


def test_parquet_files_are_split_by_name(parquet: Path) -> None:
    source = hf(parquet, eval_split="test")
    assert source.eval is not None and (source.length, len(source.eval), source.classes) == (60, 15, 3)
    assert source.train.labels.tolist() == [i % 3 for i in range(60)] and source.train.classes == CLASSES
    assert np.array_equal(np.asarray(source.train.read(50)), np.asarray(Image.open(io.BytesIO(png(50)))))
    assert np.array_equal(np.asarray(source.eval.read(3)), np.asarray(Image.open(io.BytesIO(png(63)))))
    with refused_with("7: cannot be read"):
        source.train.read(7)
    batch = batches(source, toy("train.batch_size=60"), range(1))[0]
    assert batch.images[0].shape[1] == 60 and 7 not in batch.rows and [row for row, _ in batch.bad] == [7] * len(batch.bad) != []


@pytest.mark.parametrize("more", [{}, {"streaming": True, "length": 6}], ids=["map", "stream"])
def test_evaluation_labels_follow_training_class_names(tmp_path: Path, caplog: pytest.LogCaptureFixture, more: dict[str, Any]) -> None:
    for split, names in (("train", ["red", "blue"]), ("test", ["green", "blue", "red", "unused"])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        columns = {
            "image": [{"bytes": png(i), "path": None} for i in range(6)],
            "label": [0, 1, None, 1, 0, 1] if split == "train" else [0, 1, 2, 2, None, 1],
        }
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / f"{split}-00000-of-00001.parquet"))
    source = hf(tmp_path, eval_split="test", **more)
    assert source.eval is not None and source.eval.labels.tolist() == [-1, 1, 0, 0, -1, 1]  # type: ignore[union-attr]
    assert source.eval.classes == ["red", "blue"] and source.classes == 2
    messages = [record.getMessage() for record in caplog.records if record.name == "rlpjepa_zoo"]
    assert len(messages) == 1 and "data.eval_split=test: green: no class of the training images (red, blue)" in messages[0]


def test_missing_split_is_refused_with_the_files(parquet: Path) -> None:
    with refused_with("split 'holdout'", str(parquet), "train-00000"):
        hf(parquet, split="holdout")
    with refused_with("split 'holdout'"):
        hf(parquet, eval_split="holdout")


def test_single_file_is_not_training_and_evaluation(tmp_path: Path) -> None:
    table(range(6)).to_parquet(str(tmp_path / "train-00000-of-00001.parquet"))
    assert hf(tmp_path).length == 6
    with refused_with("test"):
        hf(tmp_path, eval_split="test")


@pytest.mark.parametrize("asked", ["image_column", "label_column"])
def test_missing_column_is_refused_with_the_others(parquet: Path, asked: str) -> None:
    with refused_with("no column 'picture'", "image, label, note"):
        hf(parquet, **{asked: "picture"})


def test_labels_can_be_left_out(parquet: Path) -> None:
    source = hf(parquet, label_column="none")
    assert source.train.labels is None and source.classes == 0


def test_missing_or_damaged_local_copy_is_refused(tmp_path: Path) -> None:
    with refused_with("data.path", str(tmp_path / "nowhere")):
        hf(tmp_path / "nowhere")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with refused_with(str(tmp_path)):
        hf(tmp_path)
    (tmp_path / "empty").mkdir()
    with refused_with(str(tmp_path / "empty")):
        hf(tmp_path / "empty")


def test_saved_data_sets_are_read_from_disk(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": table(range(9)), "test": table(range(9, 13))}).save_to_disk(str(tmp_path / "both"))
    source = hf(tmp_path / "both", eval_split="test")
    assert source.eval is not None and (source.length, len(source.eval), source.classes) == (9, 4, 3)
    assert np.array_equal(np.asarray(source.eval.read(0)), np.asarray(Image.open(io.BytesIO(png(9)))))
    with refused_with(str(tmp_path / "both"), "holdout"):
        hf(tmp_path / "both", split="holdout")
    table(range(5)).save_to_disk(str(tmp_path / "one"))
    assert hf(tmp_path / "one").length == 5


def test_saved_set_without_splits_has_no_evaluation_split(tmp_path: Path) -> None:
    table(range(5)).save_to_disk(str(tmp_path / "one"))
    with refused_with("test"):
        hf(tmp_path / "one", eval_split="test")


def test_unknown_hub_name_without_network_is_refused() -> None:
    with refused_with("nobody/nothing-here", "HF_HUB_OFFLINE is set", kind=HubError):
        open_source(Data(source="hf", name="nobody/nothing-here"))


class Toy(torchvision.datasets.VisionDataset):
    classes = CLASSES

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        super().__init__(root)
        self.count, self.targets, self.downloaded = (6, [0, 1, 2] * 2, download) if train else (3, [2, 1, 0], download)
        if not download and not Path(root).is_dir():
            raise RuntimeError("Dataset not found or corrupted.\nYou can use download=True to download it")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.open(io.BytesIO(png(i + (0 if self.count == 6 else 100)))), self.targets[i]


class Splits(Toy):
    def __init__(self, root: str, split: str = "train") -> None:
        if split not in ("train", "val"):
            raise ValueError(f"Unknown value '{split}' for argument split.")
        super().__init__(root, split == "train", True)


@pytest.fixture
def torchvision_toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "Toy", Toy, raising=False)
    monkeypatch.setattr(torchvision.datasets, "Splits", Splits, raising=False)


def vision(name: str, path: Path, **more: Any) -> Source:
    return open_source(Data(source="torchvision", name=name, path=str(path), **more))


def test_torchvision_train_switch_gives_both_parts(torchvision_toys: None, tmp_path: Path) -> None:
    source = vision("Toy", tmp_path, download=False)
    assert source.eval is not None and (source.length, len(source.eval), source.classes) == (6, 3, 3)
    assert source.train.labels.tolist() == [0, 1, 2, 0, 1, 2] and source.eval.labels.tolist() == [2, 1, 0]
    assert np.array_equal(np.asarray(source.train.read(4)), np.asarray(Image.open(io.BytesIO(png(4)))))


def test_torchvision_splits_are_taken_by_name(torchvision_toys: None, tmp_path: Path) -> None:
    assert vision("Splits", tmp_path).eval is None
    source = vision("Splits", tmp_path, eval_split="val")
    assert source.eval is not None and (source.length, len(source.eval)) == (6, 3)
    with refused_with("Splits", "Unknown value 'holdout'"):
        vision("Splits", tmp_path, eval_split="holdout")


def test_missing_torchvision_files_are_refused_in_one_line(torchvision_toys: None, tmp_path: Path) -> None:
    with refused_with("torchvision Toy", str(tmp_path / "nowhere"), "not found or corrupted"):
        vision("Toy", tmp_path / "nowhere", download=False)
    assert vision("Toy", tmp_path / "nowhere").length == 6
    for name in ("CIFAR10", "MNIST", "STL10", "SVHN"):
        with refused_with(f"torchvision {name}", str(tmp_path)):
            vision(name, tmp_path, download=False)


@pytest.mark.parametrize("name", ["CIFAR11", "cifar10", "os", "VisionDataset2", "__name__"])
def test_unknown_torchvision_classes_are_refused(name: str, tmp_path: Path) -> None:
    with refused_with(f"data.name: '{name}'", "class name such as CIFAR10"):
        vision(name, tmp_path)


def test_torchvision_classes_with_other_arguments_are_refused(tmp_path: Path) -> None:
    for name in ("FakeData", "DatasetFolder", "Kinetics"):
        with refused_with(f"torchvision {name}"):
            vision(name, tmp_path, download=False)


def test_limit_takes_random_images_by_seed() -> None:
    everything, some = open_source(Data(source="digits")), open_source(Data(source="digits", limit=50), seed=1)
    assert (some.length, len(some.train), len(set(some.train.ids))) == (50, 50, 50)
    number = {name: i for i, name in enumerate(everything.train.ids)}
    assert some.train.labels.tolist() == [everything.train.labels[number[i]] for i in some.train.ids]
    assert some.train.ids == open_source(Data(source="digits", limit=50), seed=1).train.ids
    assert some.train.ids != open_source(Data(source="digits", limit=50), seed=2).train.ids
    assert max(number[i] for i in some.train.ids) > 1000
    assert some.eval is not None and len(some.eval) == 360


def test_limit_above_the_number_of_images_changes_nothing() -> None:
    assert open_source(Data(source="digits", limit=5000)).length == 1437


def test_fingerprint_depends_on_number_names_and_pixels() -> None:
    def of(n: int = 24, shift: int = 0, name: str = "photo") -> str:
        encoded = [png(i + shift) for i in range(n)]
        return fingerprint(Source(Images(lambda i: encoded[i], [f"{name}-{i}" for i in range(n)]), None, n, 0))

    assert of() == of() and len({of(), of(23), of(shift=1), of(name="picture")}) == 4


def test_fingerprint_of_names_that_are_not_utf8(tmp_path: Path) -> None:
    for name in (b"a/\x80.png", b"b/1.png"):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        path.parent.mkdir()
        Image.new("RGB", (8, 8)).save(path)
    assert len(fingerprint(open_source(Data(source="folder", path=str(tmp_path))))) == 64
