"""Batches of a stream are a function of (seed, step) alone."""

import gc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from batches import agree, batches, joined, refused_with
from images import SIZE, table, toy

from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.data.batch import Batch
from rlpjepa_zoo.data.loader import Batches, make_loader
from rlpjepa_zoo.data.sources import Source, open_source
from rlpjepa_zoo.data.streaming import shard_groups


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


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


def test_stream_gives_each_image_once_an_epoch(stream_files: Path) -> None:
    results = stream_batches(stream_files, range(10))
    source, _ = streamed(stream_files)
    assert (source.length, source.classes) == (40, 3)
    codes = [batch.labels.tolist() for batch in results]
    assert all(len(c) == 8 and batch.images[0].shape == (2, 8, 3, SIZE, SIZE) for c, batch in zip(codes, results, strict=True))
    for epoch in (codes[:5], codes[5:]):
        assert np.bincount(np.concatenate(epoch)).tolist() == [14, 13, 13]
    assert codes[:5] != codes[5:]


@pytest.mark.parametrize("workers", [1, 2])
def test_stream_does_not_depend_on_the_number_of_workers(stream_files: Path, workers: int) -> None:
    assert agree(stream_batches(stream_files, range(10), workers=workers), stream_batches(stream_files, range(10)))


def test_stream_of_one_file_does_not_depend_on_workers(stream_files: Path) -> None:
    one = stream_files / "train-00000-of-00002.parquet"
    source, recipe = streamed(one, "data.length=20")
    workers = recipe.model_copy(update={"train": recipe.train.model_copy(update={"num_workers": 2})})
    assert agree(batches(source, workers, range(4)), batches(source, recipe, range(4)))


def test_shares_of_a_stream_make_the_batch_of_one_process(stream_files: Path) -> None:
    parts = [stream_batches(stream_files, range(7), rank, 2) for rank in range(2)]
    assert agree(joined(parts), stream_batches(stream_files, range(7)))


@pytest.mark.parametrize("start", [2, 5, 7])
def test_resumed_stream_gives_the_same_batches(stream_files: Path, start: int) -> None:
    assert agree(stream_batches(stream_files, range(start, 10)), stream_batches(stream_files, range(10))[start:])


def test_readers_that_end_are_waited_for_once(stream_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` sleeps five seconds whenever a reader ends: with 64 shard groups, five minutes an epoch."""
    pauses: list[float] = []
    for module in ("datasets.iterable_dataset", "rlpjepa_zoo.data.streaming"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(sleep=pauses.append))
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 5)
    stream_batches(stream_files, range(10))
    assert pauses == [0, 0, 0, 0, 5]  # two groups, two epochs
    pauses.clear()
    source, recipe = streamed(stream_files)
    batches_of_a_stopped_run = iter(make_loader(source, recipe, range(10)))
    next(batches_of_a_stopped_run)
    del batches_of_a_stopped_run
    gc.collect()
    assert pauses == [0, 0, 5]
    assert datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN == 5


def test_stream_that_ends_too_soon_is_refused(stream_files: Path) -> None:
    source, recipe = streamed(stream_files, "data.length=56")
    with Batches(make_loader(source, recipe, range(7))) as results:
        for _ in range(5):
            results.next()
        with refused_with("data.length", "shard group 0 of 2", "ended after 20 images", "28 were promised"):
            results.next()


def test_stream_replaces_and_counts_unreadable_images(tmp_path: Path) -> None:
    table(range(24), broken=(4,)).to_parquet(str(tmp_path / "train.parquet"))
    source, recipe = streamed(tmp_path, "data.length=24")
    results = batches(source, recipe, range(3))
    assert all(batch.images[0].shape[1] == 8 for batch in results)
    seen = [record for batch in results for record in batch.bad]
    assert len(seen) == 1 and "cannot be read" in seen[0][1] and seen[0][0] not in torch.cat([b.rows for b in results])


def test_stream_of_unreadable_images_is_refused(tmp_path: Path) -> None:
    table(range(16), broken=tuple(range(16))).to_parquet(str(tmp_path / "train.parquet"))
    source, recipe = streamed(tmp_path, "data.length=16")
    with refused_with("readable", "cannot be read"), Batches(make_loader(source, recipe, range(2))) as results:
        results.next()


@pytest.mark.parametrize(
    ("batch", "shards", "expected"), [(256, 1024, 64), (256, 1, 1), (256, 294, 32), (256, 7, 1), (6, 6, 6), (8, 2, 2), (30, 300, 30)]
)
def test_shard_groups_divide_the_batch_and_are_about_equal(batch: int, shards: int, expected: int) -> None:
    assert shard_groups(batch, shards) == expected


@pytest.fixture(scope="module")
def many_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("groups")
    for shard in range(4):
        table(range(shard * 10, shard * 10 + 10), broken=(13,)).to_parquet(str(root / f"train-{shard:05d}-of-00004.parquet"))
    return root


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (2, 2), (4, 1), (1, 2), (8, 0)])
def test_stream_does_not_depend_on_ranks_and_workers(many_files: Path, world: int, workers: int) -> None:
    single = stream_batches(many_files, range(3, 10))
    parts = [stream_batches(many_files, range(3, 10), rank, world, workers) for rank in range(world)]
    for results, expected in zip(joined(parts), single, strict=True):
        assert torch.equal(results.images[0], expected.images[0]) and torch.equal(results.labels, expected.labels)
        assert torch.equal(results.rows, expected.rows) and {row for row, _ in results.bad} == {row for row, _ in expected.bad}


def test_shard_groups_share_one_shuffle_buffer(many_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    right = datasets.IterableDataset.shuffle
    monkeypatch.setattr(datasets.IterableDataset, "shuffle", lambda self, **o: (asked.append(o["buffer_size"]), right(self, **o))[1])
    stream_batches(many_files, range(2))
    assert asked == [25 // 4] * 4


def test_truncated_file_of_a_stream_is_refused_in_one_line(tmp_path: Path) -> None:
    table(range(400)).to_parquet(str(tmp_path / "train.parquet"), batch_size=20)
    source, recipe = streamed(tmp_path, "data.length=400", "data.shuffle_buffer=1")
    content = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(content[: len(content) // 2])
    with refused_with("stream, shard group 0 of 1"):
        batches(source, recipe, range(50))


def test_each_rank_reads_only_its_own_files(many_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, recipe = streamed(many_files)
    opened = []
    for rank in range(4):
        stream: Any = make_loader(source, recipe, range(5), rank, 4).dataset
        opened.append([group for piece in stream.mine for group in piece])
        assert stream.groups == 4 and stream.dataset.shard(4, rank).num_shards == 1
    assert opened == [[0], [1], [2], [3]]


def test_each_batch_takes_equally_from_every_shard_group(many_files: Path) -> None:
    rows = torch.cat([batch.rows for batch in stream_batches(many_files, range(5))])
    good = rows[rows >= 0]
    assert len(set(good.tolist())) == len(good) == 39 and np.bincount(good % 4).tolist().count(10) == 3


def test_short_shard_group_starts_again(tmp_path: Path) -> None:
    for shard, n in enumerate((9, 10, 10, 11)):
        table(range(shard * 20, shard * 20 + n)).to_parquet(str(tmp_path / f"train-{shard:05d}-of-00004.parquet"))
    assert len(stream_batches(tmp_path, range(5))) == 5
    table(range(3)).to_parquet(str(tmp_path / "train-00000-of-00004.parquet"))
    with refused_with("data.length", "shard group 0 of 4", "ended after 3 images, 10 were promised"):
        stream_batches(tmp_path, range(5))
