"""The LightningDataModule: data sets by name, loaders, and who sees which image."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import Dataset

from msil.data.annotations import AnnotatedImages
from msil.data.coco import CocoDataset
from msil.data.sampler import TrainingBatches, evaluation_share, image_generator
from msil.data.shapes import write_shapes
from msil.data.transforms import Augmentation, Untransformed, draw_augmentation, transform_boxes, transform_image
from msil.data.voc import VOCDataset
from msil.data.workers import WatchedLoader, naming_lost_workers, outlive_signals
from msil.detection.structures import Target
from msil.errors import ConfigError, DataError

MIN_TRAINING_SIDE = 32  # pixels; MMDetection trains on nothing smaller
READERS: dict[str, type[AnnotatedImages]] = {"shapes": CocoDataset, "coco": CocoDataset, "voc": VOCDataset}


def build_datasets(
    name: str, root: str | Path, train_split: str, val_split: str, **settings: Any
) -> tuple[AnnotatedImages, AnnotatedImages]:
    """The audited training and validation set, `settings` as in `build_split`.

    Raises DataError for what the audit refuses or a split without annotations, ConfigError for an unknown name.
    """
    train, val = (build_split(name, root, split, **settings) for split in (train_split, val_split))
    if (train.classes, train.category_ids) != (val.classes, val.category_ids):
        raise DataError(
            f"the splits {train_split} and {val_split} of {root} have different categories; name the classes to use"
            " in data.classes."
        )
    for split, dataset in ((train_split, train), (val_split, val)):
        if not dataset.annotated:
            raise DataError(
                f"split {split} of {root} has no annotations, so a training can neither learn from it nor be scored on"
                " it: name another split, or detect in this one with mode=test."
            )
    return train, val


def build_split(
    name: str,
    root: str | Path,
    split: str,
    *,
    classes: list[str] | None = None,
    strict: bool = False,
    **shapes: int | None,
) -> AnnotatedImages:
    """One audited split of "shapes", "coco" or "voc"; no other split needs to be there.

    It may lack annotations (see `AnnotatedImages.annotated`). shapes: num_train, num_val, image_size (pixels) and seed
    of "shapes", which is made at `root` if it is not there; the others ignore them.
    Raises DataError for what the audit refuses, ConfigError for an unknown name.
    """
    if name not in READERS:
        raise ConfigError(f"unknown data set {name!r}; known: {', '.join(READERS)}.")
    if name == "shapes":
        given = {key: value for key, value in shapes.items() if value is not None}
        if given.keys() != {"num_train", "num_val", "image_size", "seed"}:
            raise ConfigError("data=shapes needs data.num_train, data.num_val, data.image_size and data.seed.")
        write_shapes(root, **given)
    return READERS[name](root, split, classes=classes, strict=strict)  # pyright: ignore[reportCallIssue]


def split_of_run(data: Mapping[str, Any], split: str, root: str | Path | None = None) -> AnnotatedImages:
    """One split of the data that a run was trained on.

    data: a run's resolved settings under "data". root: where the data is now, if not where the run had it.
    Errors as in `build_split`, and DataError where the data is not there: shapes are not made anew.
    """
    folder = Path(root or data["root"])
    if not folder.is_dir():
        raise DataError(f"the data of that run is not in {folder}: name its folder with --root.")
    keys = ("classes", "strict", "num_train", "num_val", "image_size", "seed")
    return build_split(data["name"], root or data["root"], split, **{key: data[key] for key in keys})


class EvaluationDataModule(L.LightningDataModule):
    """A loader of one data set to evaluate on; batches are ([images], [Targets]).

    Images come as they are, every one on exactly one process. val may lack annotations: its Targets are then empty.

    eval_batch_size: images a step on one process. workers: loader processes. eval_images: evaluate only the first so
    many; None: all.

    Raises ConfigError if there are fewer images than processes.
    """

    def __init__(
        self, val: AnnotatedImages, *, eval_batch_size: int, workers: int = 0, eval_images: int | None = None
    ) -> None:
        super().__init__()
        self.val = val
        self.eval_batch_size = eval_batch_size
        self.workers = workers
        self._loaders: list[WatchedLoader] = []
        self.num_eval = len(val) if eval_images is None else min(eval_images, len(val))

    def val_dataloader(self) -> WatchedLoader:
        rank, world_size = self._place()
        if self.num_eval < world_size:
            raise ConfigError(f"{self.num_eval} images to evaluate are too few for {world_size} processes.")
        sampler = evaluation_share(self.num_eval, rank, world_size)
        return self._loader(self.val, collate, batch_size=self.eval_batch_size, sampler=sampler)

    def transfer_batch_to_device(
        self, batch: tuple[list[Tensor], list[Target]] | Untransformed, device: torch.device, dataloader_idx: int
    ) -> tuple[list[Tensor], list[Target]] | Untransformed:
        """Images go to the device, without waiting; targets stay on the host, which pads them for a whole batch."""
        images = [image.to(device, non_blocking=True) for image in batch[0]]
        return batch._replace(images=images) if isinstance(batch, Untransformed) else (images, batch[1])

    def naming_lost_workers(self) -> AbstractContextManager[None]:
        """Around what uses the loaders: a worker process that dies ends in a DataError."""
        return naming_lost_workers(self._loaders)

    def _loader(self, dataset: Dataset[Any], collate_fn: Any, **batches: Any) -> WatchedLoader:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        loader = WatchedLoader(
            dataset,
            num_workers=self.workers,
            collate_fn=collate_fn,
            worker_init_fn=outlive_signals,
            persistent_workers=self.workers > 0,
            pin_memory=on_gpu,
            **batches,
        )
        self._loaders.append(loader)
        return loader

    def _place(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size


class DetectionDataModule(EvaluationDataModule):
    """Loaders over two data sets, to train on the one and to evaluate on the other.

    Training images are resized and perhaps mirrored (see draw_augmentation); only those with a usable box and a
    short side of at least 32 px are trained on.

    batch_size: images a training step over all processes; accumulate: loader batches that each process takes its share
    of them in. seed: of order and augmentation.
    min_size, max_size, multiscale, flip: as in draw_augmentation. device_transforms: the loader gives the files' pixels
    (Untransformed), and they are resized and mirrored once they are on the device that trains; the draws, the boxes
    and on a CPU every pixel are the same. The rest: as in EvaluationDataModule.

    Raises DataError if there is nothing to train on, ConfigError if the processes cannot share the images evenly.
    """

    def __init__(
        self,
        train: AnnotatedImages,
        val: AnnotatedImages,
        *,
        batch_size: int,
        accumulate: int = 1,
        eval_batch_size: int,
        seed: int,
        min_size: int,
        max_size: int,
        multiscale: tuple[int, int] | None = None,
        flip: float = 0.5,
        device_transforms: bool = False,
        workers: int = 0,
        eval_images: int | None = None,
    ) -> None:
        super().__init__(val, eval_batch_size=eval_batch_size, workers=workers, eval_images=eval_images)
        self.train = train
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.seed = seed
        self.device_transforms = device_transforms
        self.draw = partial(draw_augmentation, min_size=min_size, max_size=max_size, multiscale=multiscale, flip=flip)
        self.train_indices = [
            i for i in range(len(train)) if train.has_boxes(i) and min(train.image_size(i)) >= MIN_TRAINING_SIDE
        ]
        if not self.train_indices:
            raise DataError("no training image has both a usable box and a short side of at least 32 pixels.")

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch; the same on every process."""
        return -(-len(self.train_indices) // self.batch_size)

    def train_dataloader(self) -> WatchedLoader:
        rank, world_size = self._place()
        if self.batch_size % (world_size * self.accumulate):
            raise ConfigError(
                f"data.batch_size={self.batch_size} images a step cannot be shared evenly by {world_size} processes of"
                f" trainer.accumulate={self.accumulate} batches; make it a multiple of {world_size * self.accumulate}."
            )
        sizes = [self.train.image_size(i) for i in self.train_indices]
        batches = TrainingBatches(
            self.train_indices,
            [height > width for height, width in sizes],
            batch_size=self.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            accumulate=self.accumulate,
        )
        if self.trainer is not None:
            # Workers begin to prefetch before Lightning sets the epoch, so a resumed run must start in the right one.
            batches.start_at(self.trainer.global_step)
        images = AugmentedImages(self.train, self.draw, self.seed, postponed=self.device_transforms)
        gather = partial(collate_untransformed, draw=self.draw, seed=self.seed) if self.device_transforms else collate
        return self._loader(images, gather, batch_sampler=batches)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Lightning's hook: a batch is on its device, and goes to the step next."""
        if not isinstance(batch, Untransformed):
            return batch
        pairs = zip(batch.images, batch.augmentations, strict=True)
        return [transform_image(image, augmentation) for image, augmentation in pairs], batch.targets


class AugmentedImages(Dataset[Any]):
    """A data set seen through its training transform; indexed by (epoch, image index).

    draw: draw_augmentation, but for height, width and generator. postponed: give (image, Target, key) as they are in
    place of (image, Target); `collate_untransformed` does the rest.
    """

    def __init__(
        self, dataset: AnnotatedImages, draw: partial[Augmentation], seed: int, *, postponed: bool = False
    ) -> None:
        self.dataset = dataset
        self.draw = draw
        self.seed = seed
        self.postponed = postponed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, ...]:
        image, target = self.dataset[key[1]]
        if self.postponed:
            return image, target, key
        target, augmentation = augment_target(target, key, self.draw, self.seed)
        return transform_image(image, augmentation), target


def augment_target(
    target: Target, key: tuple[int, int], draw: partial[Augmentation], seed: int
) -> tuple[Target, Augmentation]:
    """What is drawn for the image `key` (epoch, image index), and the target of the image after it."""
    augmentation = draw(*target.size, image_generator(seed, *key))
    return replace(target, boxes=transform_boxes(target.boxes, target.size, augmentation)), augmentation


def collate(samples: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """A list of (image, Target) -> images and targets as two lists; images keep their own sizes."""
    return [image for image, _ in samples], [target for _, target in samples]


def collate_untransformed(
    samples: list[tuple[Tensor, Target, tuple[int, int]]], *, draw: partial[Augmentation], seed: int
) -> Untransformed:
    """A list of (image, Target, key) -> the images as they are, beside the targets of what they will be.

    It draws for a whole batch: between two images that are decoded, each small step costs several times as much.
    """
    pairs = [augment_target(target, key, draw, seed) for _, target, key in samples]
    return Untransformed([image for image, _, _ in samples], [target for target, _ in pairs], [a for _, a in pairs])
