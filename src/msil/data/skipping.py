"""data.on_bad_image=skip: training goes on without images that cannot be read any more, up to 1 % of them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from msil.data.annotated import AnnotatedImages
from msil.detection.structures import Target
from msil.errors import DataError

LIMIT = 0.01  # of the training images; one is always allowed


class SkippedImages:
    """Which training images could not be read: one flag an image, in memory that loader workers share.

    In place of such an image comes the next of `indices`, in their order, that can be read: it depends on nothing but
    the files, not on what was skipped before, on workers, or on a resume.
    indices: the images that are trained on. With several processes, each counts the images that it has met itself.
    """

    def __init__(self, dataset: AnnotatedImages, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = list(indices)
        self.limit = max(1, int(LIMIT * len(self.indices)))
        self.flags = torch.zeros(len(dataset), dtype=torch.uint8).share_memory_()

    def read(self, index: int) -> tuple[Tensor, Target]:
        """dataset[index], or its substitute. Raises DataError once more than `limit` images have failed."""
        for candidate in self._from(index):
            try:
                return self.dataset[candidate]
            except DataError as error:
                self._skip(candidate, error)
        raise DataError("no training image can be read any more.")

    def mark(self, indices: Iterable[int]) -> None:
        """Counts these too, as a run that continues does with those of its checkpoint."""
        for index in indices:
            if 0 <= index < len(self.flags):
                self.flags[index] = 1

    def marked(self) -> list[int]:
        return self.flags.nonzero().flatten().tolist()

    def _from(self, index: int) -> Iterator[int]:
        yield index
        at = self.indices.index(index)
        yield from self.indices[at + 1 :]
        yield from self.indices[:at]

    def _skip(self, index: int, error: DataError) -> None:
        new = not bool(self.flags[index])
        self.flags[index] = 1
        count = int(self.flags.sum())
        if count > self.limit:
            raise DataError(
                f"{count} of {len(self.indices)} training images cannot be read, more than the {self.limit} that"
                f" data.on_bad_image=skip allows, the last of them {self.dataset.path(index)}: replace them with intact"
                " copies; the same command continues after the last checkpoint."
            ) from error
        if new:
            print(f"warning: {error}; until then another image stands in for it", file=sys.stderr, flush=True)
