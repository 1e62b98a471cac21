"""Which image is seen when: every one once an epoch, the same for every number of processes."""

from __future__ import annotations

from collections import Counter

import pytest

from msil.data.sampler import TrainingBatches

# Counts that divide by the batch size and that do not; indices with gaps, as after leaving images out.
COUNTS = (8, 9, 15, 16, 61)


def sampler(count: int, *, batch_size: int = 4, seed: int = 0, rank: int = 0, world_size: int = 1) -> TrainingBatches:
    """Every third image is tall."""
    indices, tall = [3 * i + 1 for i in range(count)], [i % 3 == 0 for i in range(count)]
    return TrainingBatches(indices, tall, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_an_epoch_shows_every_image_once_and_fills_the_last_batch(count: int, batch_size: int) -> None:
    for epoch in range(5):
        batches = sampler(count, batch_size=batch_size).batches(epoch)
        assert all(len(batch) == batch_size for batch in batches)
        assert len(batches) == len(sampler(count, batch_size=batch_size)) == -(-count // batch_size)
        counts = Counter(index for batch in batches for index in batch)
        assert set(counts) == {3 * i + 1 for i in range(count)}
        # No image twice but for those that fill the last batch, and none three times.
        assert max(counts.values()) <= 2
        assert sum(counts.values()) - count == -count % batch_size
        assert all(len(set(batch)) == batch_size for batch in batches)


def test_fewer_images_than_a_batch_are_repeated() -> None:
    (batch,) = sampler(3, batch_size=8).batches(0)
    assert sorted(Counter(batch).values()) == [2, 3, 3]


@pytest.mark.parametrize("count", COUNTS)
def test_every_number_of_processes_sees_the_same_batches(count: int) -> None:
    def epoch(rank: int, world_size: int) -> list[list[tuple[int, int]]]:
        one = sampler(count, rank=rank, world_size=world_size)
        one.set_epoch(2)
        return list(one)

    whole = [sorted(batch) for batch in epoch(0, 1)]
    assert {key[0] for batch in whole for key in batch} == {2}
    for world_size in (2, 4):
        ranks = [epoch(rank, world_size) for rank in range(world_size)]
        assert all(len(part) == 4 // world_size for shares in ranks for part in shares)
        assert [sorted(pair for part in parts for pair in part) for parts in zip(*ranks, strict=True)] == whole


def test_a_batch_is_all_tall_or_all_wide_but_for_the_left_over() -> None:
    tall = {3 * i + 1 for i in range(61) if i % 3 == 0}
    for epoch in range(5):
        batches = sampler(61).batches(epoch)
        # 21 tall and 40 wide: 5 + 10 pure batches, and the last with the one that is left.
        assert len(batches) == 16
        assert {i for i, batch in enumerate(batches) if len({index in tall for index in batch}) > 1} <= {15}


def test_resuming_in_an_epoch_continues_as_if_never_stopped() -> None:
    through = sampler(15)
    seen = []
    for epoch in range(4):
        through.set_epoch(epoch)
        seen.append(list(through))
    resumed = sampler(15)
    resumed.start_at(2 * 4 + 3)  # of 4 batches an epoch
    assert list(resumed) == seen[2][3:]
    resumed.set_epoch(3)
    assert list(resumed) == seen[3]
