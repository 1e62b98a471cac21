"""Which image is seen when: every one once an epoch, the same for every number of processes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from msil.data.sampler import TrainingBatches, image_generator

# Counts that divide by the batch size and that do not; indices with gaps, as after leaving images out.
COUNTS = (8, 9, 15, 16, 61)


def sampler(
    count: int,
    tall: list[bool] | None = None,
    *,
    batch_size: int = 4,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> TrainingBatches:
    indices = [3 * i + 1 for i in range(count)]
    shapes = [i % 3 == 0 for i in range(count)] if tall is None else tall
    return TrainingBatches(indices, shapes, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_an_epoch_shows_every_image_once_and_fills_the_last_batch(count: int, batch_size: int) -> None:
    for epoch in range(5):
        batches = sampler(count, batch_size=batch_size).batches(epoch)
        assert all(len(batch) == batch_size for batch in batches)
        assert len(batches) == -(-count // batch_size)
        counts = Counter(index for batch in batches for index in batch)
        assert set(counts) == {3 * i + 1 for i in range(count)}
        # No image twice but for those that fill the last batch, and none three times.
        assert max(counts.values()) <= 2
        assert sum(counts.values()) - count == -count % batch_size


def test_fewer_images_than_a_batch_are_repeated() -> None:
    (batch,) = sampler(3, batch_size=8).batches(0)
    assert len(batch) == 8
    assert sorted(Counter(batch).values()) == [2, 3, 3]


@pytest.mark.parametrize("count", COUNTS)
def test_every_number_of_processes_sees_the_same_batches(count: int) -> None:
    alone = sampler(count)
    alone.set_epoch(2)
    whole = [sorted(batch) for batch in alone]
    for world_size in (2, 4):
        ranks = []
        for rank in range(world_size):
            one = sampler(count, rank=rank, world_size=world_size)
            one.set_epoch(2)
            ranks.append(list(one))
        assert all(len(part) == 4 // world_size for shares in ranks for part in shares)
        together = [sorted(pair for part in parts for pair in part) for parts in zip(*ranks, strict=True)]
        assert together == whole


def test_a_batch_is_all_tall_or_all_wide_but_for_the_left_over() -> None:
    count = 61
    tall_indices = {3 * i + 1 for i in range(count) if i % 3 == 0}
    for epoch in range(5):
        batches = sampler(count).batches(epoch)
        mixed = [i for i, batch in enumerate(batches) if len({index in tall_indices for index in batch}) > 1]
        # 21 tall and 40 wide: 5 + 10 pure batches, and the last with the one that is left.
        assert len(batches) == 16
        assert set(mixed) <= {15}


def test_an_epoch_has_its_own_order_and_a_seed_its_own_epochs() -> None:
    orders = [sampler(61, seed=seed).batches(epoch) for seed in (0, 1) for epoch in range(4)]
    assert all(orders[i] != orders[k] for i in range(8) for k in range(i))
    assert sampler(61).batches(3) == sampler(61).batches(3)
    first = [order[0][0] for order in (sampler(61).batches(epoch) for epoch in range(40))]
    assert len(set(first)) > 15  # a shuffle, not a rotation of the same start


def test_resuming_at_an_epoch_continues_as_if_never_stopped() -> None:
    through = sampler(15)
    seen = []
    for epoch in range(4):
        through.set_epoch(epoch)
        seen.append(list(through))
    resumed = sampler(15)
    resumed.set_epoch(2)
    assert list(resumed) == seen[2]
    resumed.set_epoch(3)
    assert list(resumed) == seen[3]
    resumed.set_epoch(0)
    assert list(resumed) == seen[0]  # the epoch alone counts, not what was drawn before


def test_every_image_has_its_own_stream_in_every_epoch() -> None:
    keys = [(seed, epoch, index) for seed in (0, 1) for epoch in range(5) for index in range(20)]
    draws = [float(torch.rand((), generator=image_generator(*key), dtype=torch.float64)) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws == [float(torch.rand((), generator=image_generator(*key), dtype=torch.float64)) for key in keys]
    # 200 uniform draws: the mean is 0.5 +- 0.02, so 0.1 is five deviations.
    assert abs(sum(draws) / len(draws) - 0.5) < 0.1
