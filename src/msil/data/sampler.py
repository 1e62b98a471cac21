"""Which image is seen when: a function of (seed, epoch), the same for every number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Sampler


@dataclass(eq=False, repr=False)
class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """Yields this process's share of every batch as (epoch, image index) pairs.

    indices: the images to train on. tall: for each of them, whether it is higher than wide: a batch holds tall images
        or wide ones where it can, so that it pads little (the last one or two mix what is left over).
    batch_size: images a step over all processes; process `rank` of `world_size` takes every world_size-th of each
        batch, in `accumulate` parts of one size. The last batch is filled up from the epoch's first images, so that all
        batches are full; an image comes twice in a batch only if there are fewer images than that.
    """

    indices: Sequence[int]
    tall: Sequence[bool]
    batch_size: int
    seed: int
    rank: int
    world_size: int
    accumulate: int = 1
    epoch: int = 0
    _resumed: tuple[int, int] = (0, 0)

    @property
    def sampler(self) -> TrainingBatches:
        """Itself: Lightning calls set_epoch on a loader's batch_sampler.sampler, never on the batch sampler."""
        return self

    def start_at(self, step: int) -> None:
        """Begin with the batch of training step `step` (from 0): that epoch's batches before it are not given again.
        len(self) stays an epoch's."""
        self._resumed = divmod(step, self.steps)
        self.set_epoch(self._resumed[0])

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this at the start of every epoch, also of the one that a run resumes with."""
        self.epoch = epoch

    @property
    def steps(self) -> int:
        return math.ceil(len(self.indices) / self.batch_size)

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, position = self._resumed
        for batch in self.batches(self.epoch)[position if self.epoch == epoch else 0 :]:
            share = [(self.epoch, index) for index in batch[self.rank :: self.world_size]]
            size = len(share) // self.accumulate
            yield from (share[start : start + size] for start in range(0, len(share), size))

    def batches(self, epoch: int) -> list[list[int]]:
        """All processes' batches of one epoch, each of batch_size image indices."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.indices)).tolist()
        batches: list[list[int]] = []
        waiting: dict[bool, list[int]] = {False: [], True: []}
        for position in order:
            queue = waiting[self.tall[position]]
            queue.append(self.indices[position])
            if len(queue) == self.batch_size:
                batches.append(queue.copy())
                queue.clear()
        left = waiting[False] + waiting[True]
        missing = -len(left) % self.batch_size
        tail = set(left)
        fillers = [i for i in (self.indices[position] for position in order) if i not in tail] or left
        left += (fillers * (missing // len(fillers) + 1))[:missing]
        return batches + [left[i : i + self.batch_size] for i in range(0, len(left), self.batch_size)]


def image_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """The random stream of one image in one epoch: the same in any worker, on any process, after any resume."""
    state = np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))  # a generator takes 63 bits
