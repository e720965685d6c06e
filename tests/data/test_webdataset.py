"""Tar files as a source of training and evaluation: random access, splits, class labels, and what is refused."""

import logging
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import agree, batches, refused_with
from images import toy
from rows import N, picture, png, samples, tar

from rlpjepa_zoo.config.sections import Data
from rlpjepa_zoo.data.memory import decode_to_memory
from rlpjepa_zoo.data.sources import Source, fingerprint, folder_contents, open_images, open_source


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    tar(tmp_path / "train-0.tar", samples(range(5)))
    tar(tmp_path / "train-1.tar", [("readme.txt", b"of no sample"), *samples(range(5, N))])
    tar(tmp_path / "test-0.tar", samples(range(20, 24)))
    return tmp_path


def opened(path: Path, **more: Any) -> Source:
    return open_source(Data(source="webdataset", path=str(path), **more))


def labelled(path: Path, labels: list[bytes | None]) -> Path:
    """A tar file with one image for each label; None leaves the label out."""
    members = [[(f"s{i}.png", png(i)), *([(f"s{i}.cls", label)] if label is not None else [])] for i, label in enumerate(labels)]
    return tar(path, [member for sample in members for member in sample])


def test_images_are_read_in_any_order_with_ids_of_embedding(tars: Path) -> None:
    source = opened(tars, eval_split="test")
    assert source.eval is not None and (source.length, len(source.eval), source.classes) == (N, 4, 2)
    order = [7, 0, 10, 4, 5]
    assert [source.images.read(i).tobytes() for i in order] == [picture(i).tobytes() for i in order]
    assert source.eval.read(2).tobytes() == picture(22).tobytes()
    assert source.images.labels is not None and source.images.labels.tolist() == [i % 2 for i in range(N)]
    both = open_images([tars / "train-0.tar", tars / "train-1.tar"])
    assert [row.id for row in both.rows()] == source.images.ids and source.eval.ids[0] == "x/s20"


def test_batches_equal_those_of_the_same_images_in_memory(tars: Path) -> None:
    source, recipe = opened(tars), toy("train.batch_size=4")
    images = source._replace(train=decode_to_memory(source.images, 1e9))
    assert agree(batches(images, recipe, range(5)), batches(source, recipe, range(5)))
    assert agree(batches(source, toy("train.batch_size=4", "train.num_workers=2"), range(5)), batches(source, recipe, range(5)))


def test_images_can_be_pickled_for_spawned_workers(tars: Path) -> None:
    images = opened(tars).images
    copy = ForkingPickler.loads(ForkingPickler.dumps(images.take([8, 1])))
    assert copy.read(0).tobytes() == picture(8).tobytes()


def test_splits_are_chosen_by_sub_folder(tmp_path: Path) -> None:
    for split, rows in (("train", range(6)), ("val", range(6, 8))):
        (tmp_path / split).mkdir()
        tar(tmp_path / split / "00000.tar", samples(rows))
    source = opened(tmp_path, eval_split="val")
    assert source.eval is not None and (source.length, len(source.eval)) == (6, 2)
    assert opened(tmp_path / "train" / "00000.tar").length == 6


def test_class_names_are_numbered_in_sorted_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labelled(tmp_path / "train.tar", [b"dog", b"cat\n", None, b"dog"])
    labelled(tmp_path / "test.tar", [b"dog", b"emu", b"cat"])
    with caplog.at_level(logging.WARNING):
        source = opened(tmp_path, eval_split="test")
    assert source.images.classes == ["cat", "dog"] and source.images.labels is not None and source.images.labels.tolist() == [1, 0, -1, 1]
    assert source.eval is not None and source.eval.labels is not None and source.eval.labels.tolist() == [1, -1, 0]
    assert source.classes == 2 and "emu: no class of the training images (cat, dog)" in caplog.text


def test_tar_without_labels_has_no_classes(tmp_path: Path) -> None:
    source = opened(labelled(tmp_path / "train.tar", [None, None]))
    assert source.images.labels is None and source.classes == 0


def test_mixed_numbers_and_names_are_refused(tmp_path: Path) -> None:
    with refused_with("s0.cls is a class number and s1.cls is a class name"):
        opened(labelled(tmp_path / "mixed.tar", [b"3", b"cat"]))
    labelled(tmp_path / "train.tar", [b"0", b"1"])
    labelled(tmp_path / "test.tar", [b"cat", b"dog"])
    with refused_with("labels are numbers in 'train' and names in 'test'"):
        opened(tmp_path, eval_split="test")


def test_unreadable_member_is_replaced_and_counted(tmp_path: Path) -> None:
    members = [(f"s{i}.png", b"junk" if i == 3 else png(i)) for i in range(8)]
    (batch,) = batches(opened(tar(tmp_path / "train.tar", members)), toy(), range(1))
    assert [row for row, _ in batch.bad][0] == 3 and "s3: cannot be read as an image" in batch.bad[0][1]
    assert batch.images[0].shape[1] == 8 and int((batch.rows < 0).sum()) == 1


def test_too_large_member_is_refused_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlpjepa_zoo.data.sources.webdataset.MAX_MEMBER_BYTES", len(png(1)) + 10)
    images = opened(tar(tmp_path / "x.tar", [("a.png", png(1)), ("b.png", png(1) + bytes(100))])).images
    with refused_with("b: ", "bytes, the limit is"):
        images.read(1)
    assert images.read(0).tobytes() == picture(1).tobytes()


def test_unusable_tar_files_are_refused_in_one_line(tars: Path, tmp_path: Path) -> None:
    (tmp_path / "gz").mkdir()
    tar(tmp_path / "gz" / "train.tar.gz", samples(range(2)))
    with refused_with("train.tar.gz is compressed", "gunzip"):
        opened(tmp_path / "gz")
    with refused_with("no tar file of the split 'holdout'", "test-0.tar"):
        opened(tars, split="holdout")
    with refused_with("data.path", "nowhere", "no such file or folder"):
        opened(tmp_path / "nowhere")
    with refused_with("add data.path=DIR"):
        open_source(Data(source="webdataset"))
    (tmp_path / "empty").mkdir()
    with refused_with("no tar files in it"):
        opened(tmp_path / "empty")
    with refused_with("no images in it"):
        opened(tar(tmp_path / "text.tar", [("a.txt", b"text")]))
    with refused_with("t.tar: cannot be read as a tar file"):
        (tmp_path / "t.tar").write_bytes((tars / "train-1.tar").read_bytes()[:1700])
        opened(tmp_path / "t.tar")


def test_fingerprint_depends_on_the_images(tars: Path) -> None:
    first = fingerprint(opened(tars))
    assert first == fingerprint(opened(tars)) != fingerprint(opened(tars, split="test"))
    tar(tars / "train-1.tar", samples(range(6, N + 1)))
    assert fingerprint(opened(tars)) != first


def test_limit_takes_a_subset(tars: Path) -> None:
    source = opened(tars, limit=4)
    assert source.length == len(source.images) == 4 and torch.is_tensor(batches(source, toy("train.batch_size=4"), range(1))[0].rows)


def test_folder_of_tars_is_recognised(tars: Path) -> None:
    kind, files = folder_contents(tars)
    assert kind == "webdataset" and [file.name for file in files] == ["test-0.tar", "train-0.tar", "train-1.tar"]
