"""Batches are a function of (seed, step) alone, whatever the number of workers, processes and resumes."""

import numpy as np
import pytest
import torch
from batches import agree, batches, joined, refused_with
from images import SIZE, photos, toy

from rlpjepa_zoo.data.loader import Batches, make_loader


def test_batches_have_the_promised_shapes() -> None:
    results = batches(photos(), toy("views.count=3"), range(2))
    assert len(results) == 2
    for batch in results:
        assert batch.images[0].shape == (3, 8, 3, SIZE, SIZE) and batch.images[0].dtype == torch.float32 and batch.bad == []
        assert batch.labels.tolist() == [row % 3 for row in batch.rows.tolist()]
    assert batches(photos(labels=False), toy(), range(1))[0].labels.tolist() == [-1] * 8


def test_batches_do_not_depend_on_the_number_of_workers() -> None:
    source = photos(broken=(3, 11))
    expected = batches(source, toy(), range(10))
    assert agree(batches(source, toy("train.num_workers=2"), range(10)), expected)


@pytest.mark.parametrize("start", [1, 4, 5, 9])
def test_resumed_range_gives_the_same_batches(start: int) -> None:
    source = photos(broken=(3,))
    assert agree(batches(source, toy(), range(start, 12)), batches(source, toy(), range(12))[start:])


def test_batches_do_not_depend_on_earlier_use_of_the_source() -> None:
    source = photos()
    expected = batches(source, toy(), range(6))
    torch.rand(5)
    list(source.train)
    assert agree(batches(source, toy(), range(6)), expected)


@pytest.mark.parametrize("world", [2, 4])
def test_shares_of_all_ranks_make_the_batch_of_one_process(world: int) -> None:
    source = photos(broken=(5,))
    parts = [batches(source, toy(), range(7), rank, world) for rank in range(world)]
    assert all(batch.images[0].shape[1] == 8 // world for part in parts for batch in part)
    assert agree(joined(parts), batches(source, toy(), range(7)))


def test_seed_and_step_change_the_batch() -> None:
    a, b = batches(photos(), toy(), range(2))
    other = batches(photos(), toy("seed=1"), range(1))[0]
    assert not torch.equal(a.rows, b.rows) and not torch.equal(a.rows, other.rows)


def test_each_epoch_and_seed_has_its_own_permutation() -> None:
    orders = []
    for seed in (0, 1):
        results = batches(photos(), toy(f"seed={seed}"), range(10))
        for epoch in (results[:5], results[5:]):
            orders.append(torch.cat([b.rows for b in epoch]).tolist())
            assert sorted(orders[-1]) == list(range(40))
    assert len({tuple(order) for order in orders}) == 4


def test_incomplete_last_batch_is_dropped_without_repeats() -> None:
    results = batches(photos(43), toy(), range(15))
    left = []
    for epoch in range(3):
        rows = torch.cat([b.rows for b in results[5 * epoch : 5 * epoch + 5]]).tolist()
        assert len(set(rows)) == 40
        left.append(tuple(sorted(set(range(43)) - set(rows))))
    assert len(set(left)) > 1


def test_views_of_an_image_differ_and_change_with_the_epoch() -> None:
    results = batches(photos(8), toy(), range(2))
    by_row = [{int(row): batch.images[0][:, i] for i, row in enumerate(batch.rows)} for batch in results]
    for row in range(8):
        first, second = by_row[0][row], by_row[1][row]
        assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], second[0])


def test_corrupt_image_is_replaced_and_counted_each_time() -> None:
    results = batches(photos(broken=(6,)), toy(), range(15))
    assert all(batch.images[0].shape[1] == 8 and 6 not in batch.rows for batch in results)
    seen = [record for batch in results for record in batch.bad]
    assert [row for row, _ in seen] == [6, 6, 6] and all("photo-6: cannot be read" in reason for _, reason in seen)
    assert [sum(len(b.bad) for b in results[5 * e : 5 * e + 5]) for e in range(3)] == [1, 1, 1]
    for batch in results:  # a negative number says that another image stands in
        assert all(label == row % 3 for label, row in zip(batch.labels.tolist(), batch.rows.tolist(), strict=True) if row >= 0)
        assert [-1 - row for row in batch.rows.tolist() if row < 0] == [row for row, _ in batch.bad]


def test_substitute_image_has_its_own_views() -> None:
    (batch,) = batches(photos(8, broken=(2, 5)), toy(), range(1))
    flat = batch.images[0].flatten(2).unbind(1)
    assert len({tuple(x.flatten().tolist()) for x in flat}) == 8


def test_reason_of_a_corrupt_image_is_constant() -> None:
    reasons = {reason for _ in range(2) for batch in batches(photos(broken=(6,)), toy(), range(5)) for _, reason in batch.bad}
    assert len(reasons) == 1 and "0x" not in reasons.pop()


def test_many_corrupt_images_leave_full_batches() -> None:
    broken = tuple(range(0, 40, 2))
    results = batches(photos(broken=broken), toy(), range(5))
    assert all(batch.images[0].shape[1] == 8 and not set(batch.rows.tolist()) & set(broken) for batch in results)
    first_tries = {row for batch in results for row, _ in batch.bad}
    assert first_tries == set(broken)


@pytest.mark.parametrize("workers", [0, 1])
def test_only_corrupt_images_are_refused_in_one_line(workers: int) -> None:
    loader = make_loader(photos(20, broken=tuple(range(20))), toy(f"train.num_workers={workers}"), range(2))
    with refused_with("images in a row cannot be read", "photo-"), Batches(loader) as results:
        results.next()


def test_fewer_images_than_a_batch_are_refused() -> None:
    with refused_with("7 training images", "train.batch_size = 8"):
        make_loader(photos(7), toy(), range(1))
    assert len(batches(photos(8), toy(), range(1))) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_state_is_untouched(workers: int) -> None:
    torch.manual_seed(5)
    state, others = torch.get_rng_state(), np.random.get_state()[1].copy()
    batches(photos(16, broken=(3,)), toy(f"train.num_workers={workers}"), range(2))
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], others)
