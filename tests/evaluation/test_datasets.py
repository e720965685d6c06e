"""Labelled data to evaluate on: named sets, folders, and their split."""

import inspect
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision
from images import png
from PIL import Image
from refusals import refused

from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.data.sources import open_source
from rlpjepa_zoo.data.sources.folder import labelled_folder
from rlpjepa_zoo.errors import DataError, RecipeError, UsageError
from rlpjepa_zoo.evaluation.datasets import SETS, data_section_of, open_set, open_test_images
from rlpjepa_zoo.evaluation.probes.base import held_out


def test_named_sets_are_data_sections() -> None:
    for name in SETS:
        assert data_section_of(name).source in ("digits", "hf", "torchvision")
    assert data_section_of("cifar100").eval_split == "test" and data_section_of("pets").split == "trainval"
    assert (
        data_section_of("cifar10", ["data.path=somewhere"]).path == "somewhere" and data_section_of("cifar10-cpu").name == "uoft-cs/cifar10"
    )
    with refused(UsageError, match="Did you mean 'flowers102'"):
        data_section_of("flower102")
    with refused(UsageError, match="Known sets: digits"):
        data_section_of("qqqqqqqqqq")
    with refused(UsageError, match="only data.KEY=VALUE"):
        data_section_of("cifar10", ["train.epochs=3"])
    with refused(RecipeError, match="data.pth: unknown key. Did you mean 'path'"):
        data_section_of("cifar10", ["data.pth=x"])


def test_splits_of_torchvision_sets_exist() -> None:
    for values in SETS.values():
        if values["source"] == "torchvision":
            source = inspect.getsource(getattr(torchvision.datasets, values["name"]))
            for split in (values["split"], values["eval_split"]):
                assert f'"{split}"' in source, values


def test_cifar100_has_its_fine_labels(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "coarse_label": datasets.ClassLabel(names=["a", "b"]),
            "fine_label": datasets.ClassLabel(names=list("wxyz")),
        }
    )
    rows = {"img": [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(4)], "coarse_label": [0, 0, 1, 1], "fine_label": [0, 1, 2, 3]}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"{split}-00000-of-00001.parquet"))
    opened = open_set("cifar100", [f"data.path={tmp_path}"])
    assert opened.train.labels is not None and opened.train.labels.tolist() == [0, 1, 2, 3] and opened.name == "uoft-cs/cifar100"


def test_folder_without_test_images_is_split_with_a_note(image_folder: Path) -> None:
    opened = open_set(str(image_folder))
    assert (len(opened.train), len(opened.test)) == (32, 8) and not set(opened.train.ids) & set(opened.test.ids)
    assert np.bincount(opened.test.labels).tolist() == [4, 4] and "8 of 40 images" in opened.note
    assert opened.test.ids == open_set(str(image_folder)).test.ids
    images = labelled_folder(image_folder)
    assert opened.test.ids == [images.ids[i] for i in np.flatnonzero(held_out(images.labels, 0.2, purpose="test-split"))]


def test_folders_that_cannot_be_split_are_refused(image_folder: Path, tmp_path: Path) -> None:
    shutil.move(image_folder / "blue", tmp_path / "blue")
    with refused(DataError, match="labels"):
        open_set(str(image_folder))
    (image_folder / "blue").mkdir()
    for name in sorted(os.listdir(image_folder / "red"))[1:]:
        (image_folder / "red" / name).unlink()
    Image.new("RGB", (8, 8)).save(image_folder / "blue" / "b.png")
    with refused(DataError, match="no class has two images"):
        open_set(str(image_folder))
    with refused(UsageError, match="only data.KEY=VALUE"):
        open_set(str(image_folder), ["train.epochs=3"])


@pytest.mark.parametrize(("names", "split"), [(("train",), None), (("train", "test"), "test"), (("train", "validation"), "validation")])
def test_parquet_files_have_a_test_part_or_are_split(tmp_path: Path, names: tuple[str, ...], split: str | None) -> None:
    rows = {"photo": [png(i) for i in range(20)], "kind": [i % 2 for i in range(20)]}
    for name in names:
        pq.write_table(pa.table(rows), tmp_path / f"{name}-0.parquet")
    overrides = ["data.image_column=photo", "data.label_column=kind"]
    assert data_section_of(str(tmp_path), overrides).eval_split == split
    images = open_set(str(tmp_path), overrides)
    assert (len(images.train), len(images.test)) == ((16, 4) if split is None else (20, 20))
    assert ("random fifth (4 of 20 images)" in images.note) == (split is None)
    tested = open_test_images(str(tmp_path), overrides)
    assert len(tested.test) == 20 and ("too high" in tested.note) == (split is None)


def test_folder_with_test_images_keeps_its_split(image_folder: Path) -> None:
    (image_folder / "train").mkdir()
    for name in ("red", "blue"):
        shutil.move(image_folder / name, image_folder / "train" / name)
    shutil.copytree(image_folder / "train", image_folder / "val")
    opened = open_set(str(image_folder))
    assert (len(opened.train), len(opened.test), opened.note) == (40, 40, "")


def test_overrides_say_how_a_folder_of_parquet_files_is_read(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(png(0))
    cells = [{"bytes": None, "path": str(tmp_path / "photo.png")}] * 2
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        pq.write_table(pa.table({"picture": cells, "shop": ["b", "a"]}), tmp_path / "set" / f"{split}.parquet")
    opened = open_set(str(tmp_path / "set"), ["data.label_column=shop", "data.allow_paths=true"])
    assert opened.train.classes == ["a", "b"] and opened.test.labels is not None and opened.test.labels.tolist() == [1, 0]
    assert opened.test.read(1).size == opened.train.read(0).size
    with refused(DataError, match="use data.allow_paths=true"):
        open_set(str(tmp_path / "set"), ["data.label_column=shop"]).train.read(0)


def test_cifar100_of_one_label_column_needs_no_column_names(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["w", "x"])})
    rows = {"image": [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(2)], "label": [1, 0]}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"{split}-00000-of-00001.parquet"))
    opened = open_set("cifar100", [f"data.path={tmp_path}"])
    assert opened.train.labels is not None and opened.train.labels.tolist() == [1, 0]
    recipe = Recipe.load("cifar100-resnet18", [f"data.path={tmp_path}"])
    assert open_source(recipe.data).images.classes == ["w", "x"]
