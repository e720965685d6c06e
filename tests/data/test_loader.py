"""Training data: every source opens or is refused in one line, and a batch is a function of (seed, step) alone."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torchvision
from images import CLASSES, SIZE, photos, png, toy
from PIL import Image

from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.config.sections import Data
from rlpjepa_zoo.data.batch import Batch
from rlpjepa_zoo.data.images import Images
from rlpjepa_zoo.data.loader import Batches, make_loader
from rlpjepa_zoo.data.memory import Decoded, decode_to_memory
from rlpjepa_zoo.data.sources import Source, fingerprint, open_source
from rlpjepa_zoo.data.streaming import shard_groups
from rlpjepa_zoo.data.views import Augment
from rlpjepa_zoo.errors import DataError, HubError, ZooError


@contextmanager
def refused(*fragments: str, kind: type[ZooError] = DataError) -> Iterator[None]:
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) is kind and len(message.splitlines()) == 1, message
    for fragment in fragments:
        assert fragment in message


def batches(source: Source, recipe: Recipe, steps: range, rank: int = 0, world: int = 1) -> list[Batch]:
    with Batches(make_loader(source, recipe, steps, rank, world)) as found:
        made = [found.next() for _ in steps]
        with pytest.raises(StopIteration):
            found.next()
    return made


def same(a: Batch, b: Batch) -> bool:
    equal = torch.equal(a.images[0], b.images[0]) and torch.equal(a.labels, b.labels) and torch.equal(a.rows, b.rows)
    return equal and [row for row, _ in a.bad] == [row for row, _ in b.bad]


def agree(found: list[Batch], expected: list[Batch]) -> bool:
    return len(found) == len(expected) and all(same(a, b) for a, b in zip(found, expected, strict=True))


def joined(parts: list[list[Batch]]) -> list[Batch]:
    return [
        Batch(
            [torch.cat([p.images[0] for p in step], 1)],
            torch.cat([p.labels for p in step]),
            torch.cat([p.rows for p in step]),
            step[0].epoch,
            [r for p in step for r in p.bad],
        )
        for step in zip(*parts, strict=True)
    ]


def write_images(folder: Path, n: int = 3, first: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        (folder / f"{first + i:02d}.png").write_bytes(png(first + i))


# --- digits -------------------------------------------------------------------------------------------------------------------------


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


# --- folders ------------------------------------------------------------------------------------------------------------------------


def folder(path: Path, **more: Any) -> Source:
    return open_source(Data(source="folder", path=str(path), **more))


def test_folder_takes_labels_from_its_sub_folders(image_folder: Path) -> None:
    found = folder(image_folder)
    assert (found.length, found.classes, found.eval) == (40, 2, None)
    assert found.train.classes == ["blue", "red"]
    assert all(found.train.classes[label] == name.split("/")[0] for label, name in zip(found.train.labels, found.train.ids, strict=True))
    assert np.asarray(found.train.read(0))[..., 2].mean() > np.asarray(found.train.read(0))[..., 0].mean() + 60


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    write_images(tmp_path / "flat", 5)
    found = folder(tmp_path / "flat")
    assert (found.length, found.classes, found.train.labels) == (5, 0, None)


def test_a_single_sub_folder_or_images_beside_sub_folders_are_no_classes(tmp_path: Path) -> None:
    write_images(tmp_path / "one" / "only", 3)
    assert folder(tmp_path / "one").train.labels is None
    write_images(tmp_path / "mixed" / "a", 2)
    write_images(tmp_path / "mixed" / "b", 2, 2)
    write_images(tmp_path / "mixed", 1, 4)
    assert folder(tmp_path / "mixed").train.labels is None


def test_train_and_val_folders_are_split_and_numbered_alike(tmp_path: Path) -> None:
    for name in CLASSES:
        write_images(tmp_path / "train" / name, 4)
    for name in ("cat", "ant", "dog"):
        write_images(tmp_path / "val" / name, 2)
    found = folder(tmp_path)
    assert found.eval is not None and (found.length, len(found.eval), found.classes) == (12, 6, 3)
    assert dict(zip([i.split("/")[0] for i in found.eval.ids], found.eval.labels.tolist(), strict=True)) == {"ant": 0, "cat": 2, "dog": -1}


def test_folders_that_are_no_class_of_the_training_images_are_named_in_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("red", "blue", "green"):
        write_images(tmp_path / "train" / name, 2)
        write_images(tmp_path / "val" / (name if name != "green" else "Green"), 2)
    found = folder(tmp_path)
    assert found.eval is not None and sorted(found.eval.labels.tolist()) == [-1, -1, 0, 0, 2, 2]  # type: ignore[union-attr]
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"{tmp_path / 'val'}: Green: no class of the training images (blue, green, red), so their images are not scored; "
        "name the classes of both parts alike"
    ]


def test_named_splits_of_a_folder_are_used(tmp_path: Path) -> None:
    for split in ("a", "b", "val"):
        write_images(tmp_path / split / "x", 2)
        write_images(tmp_path / split / "y", {"a": 1, "b": 2, "val": 3}[split], 2)
    found = folder(tmp_path, split="a", eval_split="b")
    assert found.eval is not None and (found.length, len(found.eval)) == (3, 4)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_held_out_images_are_never_trained_on(tmp_path: Path, name: str) -> None:
    write_images(tmp_path / "ant", 3)
    write_images(tmp_path / "bee", 3, 3)
    write_images(tmp_path / name / "ant", 2, 6)
    write_images(tmp_path / name / "bee", 2, 8)
    try:
        found = folder(tmp_path)
    except DataError as error:
        assert name in str(error)
    else:
        assert not any(i.startswith(f"{name}/") for i in found.train.ids) and name not in (found.train.classes or [])


def test_missing_folders_are_refused_with_the_path(tmp_path: Path) -> None:
    with refused(str(tmp_path / "nowhere"), "no such folder"):
        folder(tmp_path / "nowhere")
    with refused("data.path", "add data.path=DIR"):
        open_source(Data(source="folder"))
    (tmp_path / "empty").mkdir()
    with refused(str(tmp_path / "empty"), "no images found"):
        folder(tmp_path / "empty")
    write_images(tmp_path / "full")
    with refused("data.eval_split", str(tmp_path / "full" / "holdout")):
        folder(tmp_path / "full", eval_split="holdout")


# --- Hugging Face -------------------------------------------------------------------------------------------------------------------

FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES), "note": datasets.Value("string")})


def table(rows: range, broken: tuple[int, ...] = ()) -> datasets.Dataset:
    columns = {
        "image": [{"bytes": b"junk" if i in broken else png(i), "path": None} for i in rows],
        "label": [i % 3 for i in rows],
        "note": [f"row {i}" for i in rows],
    }
    return datasets.Dataset.from_dict(columns, features=FEATURES)


@pytest.fixture(scope="module", autouse=True)
def quiet_and_quick() -> Iterator[None]:
    pause, datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN, 0
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = pause


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parquet")
    table(range(40), broken=(7,)).to_parquet(str(root / "train-00000-of-00002.parquet"))
    table(range(40, 60)).to_parquet(str(root / "train-00001-of-00002.parquet"))
    table(range(60, 75)).to_parquet(str(root / "test-00000-of-00001.parquet"))
    return root


def hf(path: Path, **more: Any) -> Source:
    return open_source(Data(source="hf", path=str(path), **more))


def test_parquet_files_are_split_by_name_with_a_broken_row_among_them(parquet: Path) -> None:
    found = hf(parquet, eval_split="test")
    assert found.eval is not None and (found.length, len(found.eval), found.classes) == (60, 15, 3)
    assert found.train.labels.tolist() == [i % 3 for i in range(60)] and found.train.classes == CLASSES
    assert np.array_equal(np.asarray(found.train.read(50)), np.asarray(Image.open(io.BytesIO(png(50)))))
    assert np.array_equal(np.asarray(found.eval.read(3)), np.asarray(Image.open(io.BytesIO(png(63)))))
    with refused("7: cannot be read"):
        found.train.read(7)
    batch = batches(found, toy("train.batch_size=60"), range(1))[0]
    assert batch.images[0].shape[1] == 60 and 7 not in batch.rows and [row for row, _ in batch.bad] == [7] * len(batch.bad) != []


@pytest.mark.parametrize("more", [{}, {"streaming": True, "length": 6}], ids=["map", "stream"])
def test_evaluation_labels_are_numbered_by_the_names_of_the_training_part(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, more: dict[str, Any]
) -> None:
    for split, names in (("train", ["red", "blue"]), ("test", ["green", "blue", "red", "unused"])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        columns = {
            "image": [{"bytes": png(i), "path": None} for i in range(6)],
            "label": [0, 1, None, 1, 0, 1] if split == "train" else [0, 1, 2, 2, None, 1],
        }
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / f"{split}-00000-of-00001.parquet"))
    found = hf(tmp_path, eval_split="test", **more)
    assert found.eval is not None and found.eval.labels.tolist() == [-1, 1, 0, 0, -1, 1]  # type: ignore[union-attr]
    assert found.eval.classes == ["red", "blue"] and found.classes == 2
    said = [record.getMessage() for record in caplog.records if record.name == "rlpjepa_zoo"]
    assert len(said) == 1 and "data.eval_split=test: green: no class of the training images (red, blue)" in said[0]


def test_a_missing_split_is_refused_with_what_there_is(parquet: Path) -> None:
    with refused("split 'holdout'", str(parquet), "train-00000"):
        hf(parquet, split="holdout")
    with refused("split 'holdout'"):
        hf(parquet, eval_split="holdout")


def test_a_single_file_is_not_both_training_and_evaluation(tmp_path: Path) -> None:
    table(range(6)).to_parquet(str(tmp_path / "train-00000-of-00001.parquet"))
    assert hf(tmp_path).length == 6
    with refused("test"):
        hf(tmp_path, eval_split="test")


@pytest.mark.parametrize("asked", ["image_column", "label_column"])
def test_a_missing_column_is_refused_with_those_there_are(parquet: Path, asked: str) -> None:
    with refused("no column 'picture'", "image, label, note"):
        hf(parquet, **{asked: "picture"})


def test_labels_can_be_left_out(parquet: Path) -> None:
    found = hf(parquet, label_column="none")
    assert found.train.labels is None and found.classes == 0


def test_a_missing_or_damaged_local_copy_is_refused(tmp_path: Path) -> None:
    with refused("data.path", str(tmp_path / "nowhere")):
        hf(tmp_path / "nowhere")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with refused(str(tmp_path)):
        hf(tmp_path)
    (tmp_path / "empty").mkdir()
    with refused(str(tmp_path / "empty")):
        hf(tmp_path / "empty")


def test_saved_data_sets_are_read_from_disk(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": table(range(9)), "test": table(range(9, 13))}).save_to_disk(str(tmp_path / "both"))
    found = hf(tmp_path / "both", eval_split="test")
    assert found.eval is not None and (found.length, len(found.eval), found.classes) == (9, 4, 3)
    assert np.array_equal(np.asarray(found.eval.read(0)), np.asarray(Image.open(io.BytesIO(png(9)))))
    with refused(str(tmp_path / "both"), "holdout"):
        hf(tmp_path / "both", split="holdout")
    table(range(5)).save_to_disk(str(tmp_path / "one"))
    assert hf(tmp_path / "one").length == 5


def test_a_data_set_saved_without_splits_is_not_both_training_and_evaluation(tmp_path: Path) -> None:
    table(range(5)).save_to_disk(str(tmp_path / "one"))
    with refused("test"):
        hf(tmp_path / "one", eval_split="test")


def test_an_unknown_hub_name_without_network_is_refused() -> None:
    with refused("nobody/nothing-here", "HF_HUB_OFFLINE is set", kind=HubError):
        open_source(Data(source="hf", name="nobody/nothing-here"))


# --- torchvision --------------------------------------------------------------------------------------------------------------------


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


def test_torchvision_classes_with_a_train_switch_give_both_parts(torchvision_toys: None, tmp_path: Path) -> None:
    found = vision("Toy", tmp_path, download=False)
    assert found.eval is not None and (found.length, len(found.eval), found.classes) == (6, 3, 3)
    assert found.train.labels.tolist() == [0, 1, 2, 0, 1, 2] and found.eval.labels.tolist() == [2, 1, 0]
    assert np.array_equal(np.asarray(found.train.read(4)), np.asarray(Image.open(io.BytesIO(png(4)))))


def test_torchvision_classes_with_splits_take_them_by_name(torchvision_toys: None, tmp_path: Path) -> None:
    assert vision("Splits", tmp_path).eval is None
    found = vision("Splits", tmp_path, eval_split="val")
    assert found.eval is not None and (found.length, len(found.eval)) == (6, 3)
    with refused("Splits", "Unknown value 'holdout'"):
        vision("Splits", tmp_path, eval_split="holdout")


def test_missing_torchvision_files_are_refused_in_one_line(torchvision_toys: None, tmp_path: Path) -> None:
    with refused("torchvision Toy", str(tmp_path / "nowhere"), "not found or corrupted"):
        vision("Toy", tmp_path / "nowhere", download=False)
    assert vision("Toy", tmp_path / "nowhere").length == 6
    for name in ("CIFAR10", "MNIST", "STL10", "SVHN"):
        with refused(f"torchvision {name}", str(tmp_path)):
            vision(name, tmp_path, download=False)


@pytest.mark.parametrize("name", ["CIFAR11", "cifar10", "os", "VisionDataset2", "__name__"])
def test_unknown_torchvision_classes_are_refused(name: str, tmp_path: Path) -> None:
    with refused(f"data.name: '{name}'", "class name such as CIFAR10"):
        vision(name, tmp_path)


def test_torchvision_classes_that_want_other_arguments_are_refused(tmp_path: Path) -> None:
    for name in ("FakeData", "DatasetFolder", "Kinetics"):
        with refused(f"torchvision {name}"):
            vision(name, tmp_path, download=False)


# --- limit --------------------------------------------------------------------------------------------------------------------------


def test_limit_takes_the_same_random_images_for_the_same_seed() -> None:
    whole, some = open_source(Data(source="digits")), open_source(Data(source="digits", limit=50), seed=1)
    assert (some.length, len(some.train), len(set(some.train.ids))) == (50, 50, 50)
    number = {name: i for i, name in enumerate(whole.train.ids)}
    assert some.train.labels.tolist() == [whole.train.labels[number[i]] for i in some.train.ids]
    assert some.train.ids == open_source(Data(source="digits", limit=50), seed=1).train.ids
    assert some.train.ids != open_source(Data(source="digits", limit=50), seed=2).train.ids
    assert max(number[i] for i in some.train.ids) > 1000
    assert some.eval is not None and len(some.eval) == 360


def test_limit_above_the_number_of_images_changes_nothing() -> None:
    assert open_source(Data(source="digits", limit=5000)).length == 1437


# --- batches ------------------------------------------------------------------------------------------------------------------------


def test_batches_have_the_promised_shapes() -> None:
    found = batches(photos(), toy("views.count=3"), range(2))
    assert len(found) == 2
    for batch in found:
        assert batch.images[0].shape == (3, 8, 3, SIZE, SIZE) and batch.images[0].dtype == torch.float32 and batch.bad == []
        assert batch.labels.tolist() == [row % 3 for row in batch.rows.tolist()]
    assert batches(photos(labels=False), toy(), range(1))[0].labels.tolist() == [-1] * 8


def test_batches_do_not_depend_on_the_number_of_workers() -> None:
    source = photos(broken=(3, 11))
    expected = batches(source, toy(), range(10))
    assert agree(batches(source, toy("train.num_workers=2"), range(10)), expected)


@pytest.mark.parametrize("start", [1, 4, 5, 9])
def test_a_resumed_range_gives_the_batches_of_the_unbroken_one(start: int) -> None:
    source = photos(broken=(3,))
    assert agree(batches(source, toy(), range(start, 12)), batches(source, toy(), range(12))[start:])


def test_batches_do_not_depend_on_how_the_source_was_used_before() -> None:
    source = photos()
    expected = batches(source, toy(), range(6))
    torch.rand(5)
    list(source.train)
    assert agree(batches(source, toy(), range(6)), expected)


@pytest.mark.parametrize("world", [2, 4])
def test_the_shares_of_all_ranks_make_the_batch_of_one_process(world: int) -> None:
    source = photos(broken=(5,))
    parts = [batches(source, toy(), range(7), rank, world) for rank in range(world)]
    assert all(batch.images[0].shape[1] == 8 // world for part in parts for batch in part)
    assert agree(joined(parts), batches(source, toy(), range(7)))


def test_seed_and_step_change_the_batch() -> None:
    a, b = batches(photos(), toy(), range(2))
    other = batches(photos(), toy("seed=1"), range(1))[0]
    assert not torch.equal(a.rows, b.rows) and not torch.equal(a.rows, other.rows)


def test_an_epoch_is_a_permutation_and_epochs_and_seeds_differ() -> None:
    orders = []
    for seed in (0, 1):
        found = batches(photos(), toy(f"seed={seed}"), range(10))
        for epoch in (found[:5], found[5:]):
            orders.append(torch.cat([b.rows for b in epoch]).tolist())
            assert sorted(orders[-1]) == list(range(40))
    assert len({tuple(order) for order in orders}) == 4


def test_the_incomplete_last_batch_is_dropped_without_repeats() -> None:
    found = batches(photos(43), toy(), range(15))
    left = []
    for epoch in range(3):
        rows = torch.cat([b.rows for b in found[5 * epoch : 5 * epoch + 5]]).tolist()
        assert len(set(rows)) == 40
        left.append(tuple(sorted(set(range(43)) - set(rows))))
    assert len(set(left)) > 1


def test_views_of_an_image_differ_and_change_with_the_epoch() -> None:
    found = batches(photos(8), toy(), range(2))
    by_row = [{int(row): batch.images[0][:, i] for i, row in enumerate(batch.rows)} for batch in found]
    for row in range(8):
        first, second = by_row[0][row], by_row[1][row]
        assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], second[0])


def test_a_corrupt_image_is_substituted_and_counted_at_each_occurrence() -> None:
    found = batches(photos(broken=(6,)), toy(), range(15))
    assert all(batch.images[0].shape[1] == 8 and 6 not in batch.rows for batch in found)
    seen = [record for batch in found for record in batch.bad]
    assert [row for row, _ in seen] == [6, 6, 6] and all("photo-6: cannot be read" in reason for _, reason in seen)
    assert [sum(len(b.bad) for b in found[5 * e : 5 * e + 5]) for e in range(3)] == [1, 1, 1]
    for batch in found:  # a negative number says that another image stands in
        assert all(label == row % 3 for label, row in zip(batch.labels.tolist(), batch.rows.tolist(), strict=True) if row >= 0)
        assert [-1 - row for row in batch.rows.tolist() if row < 0] == [row for row, _ in batch.bad]


def test_an_image_that_stands_in_for_another_has_views_of_its_own() -> None:
    (batch,) = batches(photos(8, broken=(2, 5)), toy(), range(1))
    flat = batch.images[0].flatten(2).unbind(1)
    assert len({tuple(x.flatten().tolist()) for x in flat}) == 8


def test_the_reason_of_a_corrupt_image_is_the_same_whenever_it_is_read() -> None:
    reasons = {reason for _ in range(2) for batch in batches(photos(broken=(6,)), toy(), range(5)) for _, reason in batch.bad}
    assert len(reasons) == 1 and "0x" not in reasons.pop()


def test_many_corrupt_images_leave_full_batches() -> None:
    broken = tuple(range(0, 40, 2))
    found = batches(photos(broken=broken), toy(), range(5))
    assert all(batch.images[0].shape[1] == 8 and not set(batch.rows.tolist()) & set(broken) for batch in found)
    first_tries = {row for batch in found for row, _ in batch.bad}
    assert first_tries == set(broken)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_corrupt_images_is_refused_in_one_line(workers: int) -> None:
    loader = make_loader(photos(20, broken=tuple(range(20))), toy(f"train.num_workers={workers}"), range(2))
    with refused("images in a row cannot be read", "photo-"), Batches(loader) as found:
        found.next()


def test_fewer_images_than_a_batch_are_refused() -> None:
    with refused("7 training images", "train.batch_size = 8"):
        make_loader(photos(7), toy(), range(1))
    assert len(batches(photos(8), toy(), range(1))) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_random_state_is_untouched(workers: int) -> None:
    torch.manual_seed(5)
    state, others = torch.get_rng_state(), np.random.get_state()[1].copy()
    batches(photos(16, broken=(3,)), toy(f"train.num_workers={workers}"), range(2))
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], others)


# --- streams ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stream_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stream")
    for shard in range(2):
        table(range(shard * 20, shard * 20 + 20)).to_parquet(str(root / f"train-{shard:05d}-of-00002.parquet"))
    return root


def streamed(path: Path, *more: str) -> tuple[Source, Recipe]:
    stream = ["data.source=hf", f"data.path={path}", "data.streaming=true", "data.length=40", "data.shuffle_buffer=25"]
    recipe = toy(*stream, *more)
    return open_source(recipe.data, recipe.seed), recipe


def stream_batches(path: Path, steps: range, rank: int = 0, world: int = 1, workers: int = 0) -> list[Batch]:
    source, recipe = streamed(path, f"train.num_workers={workers}")
    return batches(source, recipe, steps, rank, world)


def test_a_stream_gives_each_image_once_an_epoch_in_an_order_of_its_own(stream_files: Path) -> None:
    found = stream_batches(stream_files, range(10))
    source, _ = streamed(stream_files)
    assert (source.length, source.classes) == (40, 3)
    codes = [batch.labels.tolist() for batch in found]
    assert all(len(c) == 8 and batch.images[0].shape == (2, 8, 3, SIZE, SIZE) for c, batch in zip(codes, found, strict=True))
    for epoch in (codes[:5], codes[5:]):
        assert np.bincount(np.concatenate(epoch)).tolist() == [14, 13, 13]
    assert codes[:5] != codes[5:]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stream_does_not_depend_on_the_number_of_workers(stream_files: Path, workers: int) -> None:
    assert agree(stream_batches(stream_files, range(10), workers=workers), stream_batches(stream_files, range(10)))


def test_a_stream_of_one_file_does_not_depend_on_the_number_of_workers(stream_files: Path) -> None:
    one = stream_files / "train-00000-of-00002.parquet"
    source, recipe = streamed(one, "data.length=20")
    workers = recipe.model_copy(update={"train": recipe.train.model_copy(update={"num_workers": 2})})
    assert agree(batches(source, workers, range(4)), batches(source, recipe, range(4)))


def test_the_shares_of_a_stream_make_the_batch_of_one_process(stream_files: Path) -> None:
    parts = [stream_batches(stream_files, range(7), rank, 2) for rank in range(2)]
    assert agree(joined(parts), stream_batches(stream_files, range(7)))


@pytest.mark.parametrize("start", [2, 5, 7])
def test_a_resumed_stream_gives_the_batches_of_the_unbroken_one(stream_files: Path, start: int) -> None:
    assert agree(stream_batches(stream_files, range(start, 10)), stream_batches(stream_files, range(10))[start:])


def test_a_stream_that_ends_too_soon_is_refused(stream_files: Path) -> None:
    source, recipe = streamed(stream_files, "data.length=56")
    with Batches(make_loader(source, recipe, range(7))) as found:
        for _ in range(5):
            found.next()
        with refused("data.length", "shard group 0 of 2", "ended after 20 images", "28 were promised"):
            found.next()


def test_a_stream_replaces_and_counts_an_unreadable_image(tmp_path: Path) -> None:
    table(range(24), broken=(4,)).to_parquet(str(tmp_path / "train.parquet"))
    source, recipe = streamed(tmp_path, "data.length=24")
    found = batches(source, recipe, range(3))
    assert all(batch.images[0].shape[1] == 8 for batch in found)
    seen = [record for batch in found for record in batch.bad]
    assert len(seen) == 1 and "cannot be read" in seen[0][1] and seen[0][0] not in torch.cat([b.rows for b in found])


def test_a_stream_of_unreadable_images_is_refused(tmp_path: Path) -> None:
    table(range(16), broken=tuple(range(16))).to_parquet(str(tmp_path / "train.parquet"))
    source, recipe = streamed(tmp_path, "data.length=16")
    with refused("readable", "cannot be read"), Batches(make_loader(source, recipe, range(2))) as found:
        found.next()


@pytest.mark.parametrize(
    ("batch", "shards", "expected"), [(256, 1024, 64), (256, 1, 1), (256, 294, 32), (256, 7, 1), (6, 6, 6), (8, 2, 2), (30, 300, 30)]
)
def test_a_stream_runs_in_lanes_of_about_equal_length(batch: int, shards: int, expected: int) -> None:
    assert shard_groups(batch, shards) == expected


@pytest.fixture(scope="module")
def many_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("groups")
    for shard in range(4):
        table(range(shard * 10, shard * 10 + 10), broken=(13,)).to_parquet(str(root / f"train-{shard:05d}-of-00004.parquet"))
    return root


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (2, 2), (4, 1), (1, 2), (8, 0)])
def test_lanes_give_the_same_batches_to_any_number_of_ranks_and_workers(many_files: Path, world: int, workers: int) -> None:
    whole = stream_batches(many_files, range(3, 10))
    parts = [stream_batches(many_files, range(3, 10), rank, world, workers) for rank in range(world)]
    for found, expected in zip(joined(parts), whole, strict=True):
        assert torch.equal(found.images[0], expected.images[0]) and torch.equal(found.labels, expected.labels)
        assert torch.equal(found.rows, expected.rows) and {row for row, _ in found.bad} == {row for row, _ in expected.bad}


def test_lanes_share_one_shuffle_buffer(many_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    right = datasets.IterableDataset.shuffle
    monkeypatch.setattr(datasets.IterableDataset, "shuffle", lambda self, **o: (asked.append(o["buffer_size"]), right(self, **o))[1])
    stream_batches(many_files, range(2))
    assert asked == [25 // 4] * 4


def test_a_stream_whose_file_is_cut_short_is_one_line(tmp_path: Path) -> None:
    table(range(400)).to_parquet(str(tmp_path / "train.parquet"), batch_size=20)
    source, recipe = streamed(tmp_path, "data.length=400", "data.shuffle_buffer=1")
    whole = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(whole[: len(whole) // 2])
    with refused("stream, shard group 0 of 1"):
        batches(source, recipe, range(50))


def test_a_rank_reads_its_own_files_only(many_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, recipe = streamed(many_files)
    opened = []
    for rank in range(4):
        stream: Any = make_loader(source, recipe, range(5), rank, 4).dataset
        opened.append([group for piece in stream.mine for group in piece])
        assert stream.groups == 4 and stream.dataset.shard(4, rank).num_shards == 1
    assert opened == [[0], [1], [2], [3]]


def test_each_batch_takes_as_many_images_from_every_lane(many_files: Path) -> None:
    rows = torch.cat([batch.rows for batch in stream_batches(many_files, range(5))])
    good = rows[rows >= 0]
    assert len(set(good.tolist())) == len(good) == 39 and np.bincount(good % 4).tolist().count(10) == 3


def test_a_short_lane_begins_again(tmp_path: Path) -> None:
    for shard, n in enumerate((9, 10, 10, 11)):
        table(range(shard * 20, shard * 20 + n)).to_parquet(str(tmp_path / f"train-{shard:05d}-of-00004.parquet"))
    assert len(stream_batches(tmp_path, range(5))) == 5
    table(range(3)).to_parquet(str(tmp_path / "train-00000-of-00004.parquet"))
    with refused("data.length", "shard group 0 of 4", "ended after 3 images, 10 were promised"):
        stream_batches(tmp_path, range(5))


# --- decoded images -----------------------------------------------------------------------------------------------------------------


def mixed_sizes(n: int = 24, broken: tuple[int, ...] = ()) -> Source:
    encoded = [b"junk" if i in broken else png(i, size=10 + i % 4) for i in range(n)]
    return Source(Images(lambda i: encoded[i], [f"photo-{i}" for i in range(n)], [i % 3 for i in range(n)]), None, n, 3)


@pytest.mark.parametrize("make", [photos, mixed_sizes])
def test_decoded_images_are_the_same_pictures_and_make_the_same_batches(make: Any) -> None:
    source = make(24, broken=(5, 9))
    kept = source._replace(train=decode_to_memory(source.train, 1e9))
    assert isinstance(kept.train, Decoded) and sorted(kept.train.reasons) == [5, 9]
    for i in (0, 7, 23):
        assert np.array_equal(np.asarray(kept.train.read(i)), np.asarray(source.train.read(i)))
        assert np.array_equal(np.asarray(kept.train.take([i]).read(0)), np.asarray(source.train.read(i)))
    for images in (source.train, kept.train, kept.train.take([5])):
        with refused("photo-5: cannot be read"):
            images.read(0 if len(images) == 1 else 5)
    for a, b in zip(batches(kept, toy(), range(6)), batches(source, toy(), range(6)), strict=True):
        assert torch.equal(a.rows, b.rows) and torch.equal(a.labels, b.labels) and a.bad == b.bad
        assert (kept.train.stack is not None) == (make is photos) and (make is photos or torch.equal(a.images[0], b.images[0]))


def test_decoded_images_of_one_size_are_cropped_together_to_within_a_grey_level() -> None:
    source = photos(24, broken=(3, 8))
    kept = source._replace(train=decode_to_memory(source.train, 1e9))
    assert kept.train.stack.shape == (22, SIZE, SIZE, 3)
    recipe = toy("views.jitter=0", "views.grayscale=0", "views.noise=0", "data.mean=[0,0,0]", "data.std=[1,1,1]")
    for a, b in zip(batches(kept, recipe, range(3)), batches(source, recipe, range(3)), strict=True):
        assert torch.equal(a.rows, b.rows) and torch.equal(a.labels, b.labels)
        assert float((a.images[0] - b.images[0]).abs().max()) <= 1.01 / 255


def test_images_that_would_need_too_much_memory_stay_where_they_are() -> None:
    source = photos(24)
    assert decode_to_memory(source.train, 24 * 3 * SIZE * SIZE - 1) is source.train
    assert isinstance(decode_to_memory(source.train, 24 * 3 * SIZE * SIZE), Decoded)
    assert decode_to_memory(photos(3, broken=(0, 1, 2)).train, 1e9).read is not None


@pytest.mark.parametrize("make", [photos, mixed_sizes])
@pytest.mark.parametrize("keep", [False, True])
def test_views_finished_on_the_device_are_those_of_the_workers(make: Any, keep: bool) -> None:
    source, recipe = make(24), toy("views.count=3", "views.blur=0.5")
    if keep:
        source = source._replace(train=decode_to_memory(source.train, 1e9))
    augment = Augment(recipe.views, recipe.data, recipe.seed)
    with Batches(make_loader(source, recipe, range(3), finish=False)) as found:
        for expected in batches(source, recipe, range(3)):
            batch = found.next()
            assert batch.images[0].dtype == torch.uint8
            assert torch.equal(augment(batch.images, batch.epoch, batch.rows)[0], expected.images[0])


def test_a_fingerprint_tells_names_number_and_pixels_apart() -> None:
    def of(n: int = 24, shift: int = 0, name: str = "photo") -> str:
        encoded = [png(i + shift) for i in range(n)]
        return fingerprint(Source(Images(lambda i: encoded[i], [f"{name}-{i}" for i in range(n)]), None, n, 0))

    assert of() == of() and len({of(), of(23), of(shift=1), of(name="picture")}) == 4
