"""The LightningDataModule: data sets by name, loaders, and who sees which image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import Dataset

from msil.data.annotations import AnnotatedImages
from msil.data.audit import warn
from msil.data.readers.files import MissingSplit
from msil.data.readers.holdout import hold_out
from msil.data.readers.layouts import located
from msil.data.sampler import TrainingBatches, image_generator
from msil.data.shapes import write_shapes
from msil.data.transforms import Augmentation, Untransformed, draw_augmentation, transform_target
from msil.data.workers import WatchedLoader, naming_lost_workers, outlive_signals, packed
from msil.detection.preprocess import common_size, resized_size
from msil.detection.structures import Target
from msil.errors import ConfigError, DataError, counted, listed, typed

Batch = tuple[list[Tensor], list[Target]]


def build_split(
    data: Mapping[str, Any], split: str, *, complete: bool = True, by_name: Sequence[str] | None = None
) -> AnnotatedImages:
    """One audited split of "shapes", "coco", "voc", "yolo" or "auto" (whichever it is); no other needs to be there.

    complete: as in Annotations.of_classes. by_name: the labels of another split, which this one gets by name.

    It may lack annotations (see `AnnotatedImages.annotated`).
    data: a run's settings under "data": name, root, and perhaps classes, strict, annotations, and val_fraction with
    train_split and val_split; of "shapes", which is made at root if it is not there, also num_train, num_val,
    image_size and seed.
    Raises DataError for what the audit refuses, ConfigError for an unknown name.
    """
    if data["name"] == "shapes":
        write_shapes(data["root"], **{key: data[key] for key in ("num_train", "num_val", "image_size", "seed")})
    classes, fraction = data.get("classes"), data.get("val_fraction")
    try:
        annotations = located(data, split).read()
    except MissingSplit as error:
        raise DataError(f"{error}{_in_place(data, split, error.there, training=by_name is not None)}") from None
    if fraction is not None and split in (data["train_split"], data["val_split"]):
        annotations = hold_out(annotations, fraction, held=split == data["val_split"])
    if classes is not None:
        annotations = annotations.of_classes(classes, complete=complete)
    if by_name is not None and annotations.classes != tuple(by_name):
        there = set(annotations.truth_labels.tolist())
        others = [name for label, name in enumerate(annotations.classes) if label in there and name not in by_name]
        if others:
            spelled = {name.strip().casefold(): name for name in by_name}
            renamed = {own: spelled[word] for own in others if (word := own.strip().casefold()) in spelled}
            renaming = typed("data.classes", {name: name for name in by_name} | renamed)
            raise DataError(
                f"{annotations.source} has boxes of {listed(others, 5)}, which the training split does not list: list "
                + (f"them there too, or rename them by {renaming}" if len(renamed) == len(others) else
                   f"them there too, or leave them out by {typed('data.classes', list(by_name))}")
            )  # fmt: skip
        annotations = annotations.of_classes(by_name, complete=False)
    return AnnotatedImages(annotations, data.get("strict", False), data.get("bits") or 16)


def build_datasets(
    data: Mapping[str, Any], train_split: str, val_split: str
) -> tuple[AnnotatedImages, AnnotatedImages]:
    """The audited training and validation set, as `build_split`; also DataError for a split without annotations."""
    train = build_split(data, train_split)
    val = build_split(data, val_split, complete=False, by_name=train.classes)
    if data.get("val_fraction") is not None and (count := _own_images({**data, "val_fraction": None}, val_split)):
        own = f"a split {val_split} of {counted(count, 'image')} of its own"
        warn(data["root"], f"{own} is not used: leave out data.val_fraction to use it")
    for split, dataset in ((train_split, train), (val_split, val)):
        if not dataset.annotated:
            raise DataError(
                f"split {split} of {data['root']} has no annotations, so a training can neither learn from it nor be"
                " scored on it: name another split, or detect in this one with mode=test."
            )
    return train, val


def _in_place(data: Mapping[str, Any], split: str, there: Sequence[str], *, training: bool) -> str:
    """What to set where a split is missing: that of a training to learn from or to validate on, or of mode=test."""
    if training:
        return "; where none is to validate on, hold out training images by data.val_fraction=0.2"
    if "train_split" not in data or not there:
        return ""
    if split == data["train_split"]:
        return f"; to train on another one: {typed('data.train_split', there[0])}"
    return f"; mode=test scores another one by {typed('data.split', there[0])}"


def _own_images(data: Mapping[str, Any], val_split: str) -> int:
    """How many images a validation split has that is not the training split under another name."""
    try:
        own, train = (located(data, split).files() for split in (val_split, data["train_split"]))
    except (DataError, OSError):  # there is none
        return 0
    return len(own[1]) if own != train else 0


def split_of_run(data: Mapping[str, Any], split: str, root: str | Path | None = None) -> AnnotatedImages:
    """One split of the data that a run was trained on.

    data: a run's resolved settings under "data". root: where the data is now, if not where the run had it.
    Errors as in `build_split`, and DataError where the data is not there: shapes are not made anew.
    """
    folder = Path(root or data["root"])
    if not folder.is_dir():
        raise DataError(f"the data of that run is not in {folder}: name its folder with --root.")
    return build_split({**data, "root": folder}, split)


class DetectionDataModule(L.LightningDataModule):
    """Loaders to train on `train`, if there is such a set, and to evaluate on `val`; batches are ([images], [Targets]).

    Images to evaluate come as they are, those of one padded size together, every one on exactly one process. val may
    lack annotations: its Targets are then empty. Training images are resized and augmented (see `draw_augmentation`);
    those without a usable box are left out unless filter_empty is False.

    settings: a run's section `data`. batch_size is that of a training step over all processes, eval_batch_size that of
        one process. device_transforms: images are transformed once they are on the device that trains; the draws, the
        boxes and on a CPU every pixel are the same.
    seed: of order and augmentation. accumulate: loader batches that each process takes its share of a step in.
    eval_images: evaluate only the first so many; None: all.

    Raises DataError if there is nothing to train on; the loaders raise ConfigError if the processes cannot share the
    images.
    """

    def __init__(
        self,
        settings: Any,
        val: AnnotatedImages,
        train: AnnotatedImages | None = None,
        *,
        seed: int = 0,
        accumulate: int = 1,
        eval_images: int | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.val = val
        self.train = train
        self.seed = seed
        self.accumulate = accumulate
        self.num_eval = len(val) if eval_images is None else min(eval_images, len(val))
        self.train_indices: list[int] = []
        self._loaders: list[WatchedLoader] = []
        if train is not None:
            self.train_indices = [i for i in range(len(train)) if settings.filter_empty is False or train.has_boxes(i)]
            if not any(map(train.has_boxes, self.train_indices)):
                raise DataError("no training image has a box to train on: boxes have at least 1 pixel a side.")

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch; the same on every process."""
        return -(-len(self.train_indices) // self.settings.batch_size)

    def train_dataloader(self) -> WatchedLoader:
        assert self.train is not None
        rank, world_size = self._place()
        settings, processes = self.settings, world_size * self.accumulate
        if settings.batch_size % processes:
            raise ConfigError(
                f"data.batch_size={settings.batch_size} images a step cannot be shared evenly by {world_size} processes"
                f" of trainer.accumulate={self.accumulate} batches; make it a multiple of {processes}."
            )
        sizes = [self.train.image_size(i) for i in self.train_indices]
        batches = TrainingBatches(
            self.train_indices,
            [height > width for height, width in sizes],
            batch_size=settings.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            accumulate=self.accumulate,
        )
        if self.trainer is not None:
            # Workers begin to prefetch before Lightning sets the epoch, so a resumed run must start in the right one.
            batches.start_at(self.trainer.global_step)
        draw = partial(
            draw_augmentation,
            min_size=settings.min_size,
            max_size=settings.max_size,
            multiscale=settings.multiscale,
            flip=settings.flip,
            augment=settings.augment,
        )
        gather = partial(collate_training, draw=draw, seed=self.seed, postponed=settings.device_transforms)
        return self._loader(KeyedImages(self.train), gather, batch_sampler=batches)

    def val_dataloader(self) -> WatchedLoader:
        rank, world_size = self._place()
        if self.num_eval < world_size:
            raise ConfigError(f"{self.num_eval} images to evaluate are too few for {world_size} processes.")
        share = range(self.num_eval)[rank::world_size]  # every image on exactly one process, none twice
        # Detector.predict takes together what is padded to one size. Want of memory shows in the first batch.
        limits = self.settings.min_size, self.settings.max_size
        sizes = {index: common_size([resized_size(*self.val.image_size(index), *limits)]) for index in share}
        share = sorted(share, key=lambda index: (math.prod(sizes[index]), sizes[index]), reverse=True)
        return self._loader(self.val, collate, batch_size=self.settings.eval_batch_size, sampler=share)

    def transfer_batch_to_device(
        self, batch: Batch | Untransformed, device: torch.device, dataloader_idx: int
    ) -> Batch | Untransformed:
        """Images go to the device, without waiting; targets stay on the host, which pads them for a whole batch."""
        images = [image.to(device, non_blocking=True) for image in batch[0]]
        return batch._replace(images=images) if isinstance(batch, Untransformed) else (images, batch[1])

    def on_after_batch_transfer(self, batch: Batch | Untransformed, dataloader_idx: int) -> Batch:
        """Lightning's hook: a batch is on its device, and goes to the step next."""
        return batch.transformed() if isinstance(batch, Untransformed) else batch

    def naming_lost_workers(self) -> AbstractContextManager[None]:
        """Around what uses the loaders: a worker process that dies ends in a DataError."""
        return naming_lost_workers(self._loaders)

    def _loader(self, dataset: Dataset[Any], collate_fn: Any, **batches: Any) -> WatchedLoader:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        loader = WatchedLoader(
            dataset,
            num_workers=self.settings.workers,
            collate_fn=partial(packed, collate_fn),
            worker_init_fn=outlive_signals,
            persistent_workers=self.settings.workers > 0,
            pin_memory=on_gpu,
            **batches,
        )
        self._loaders.append(loader)
        return loader

    def _place(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)


class KeyedImages(Dataset[tuple[Tensor, Target, tuple[int, int]]]):
    """A data set indexed by (epoch, image index), which it gives beside each image for `collate_training`."""

    def __init__(self, dataset: AnnotatedImages) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Target, tuple[int, int]]:
        return (*self.dataset[key[1]], key)


def collate(samples: list[tuple[Tensor, Target]]) -> Batch:
    """A list of (image, Target) -> images and targets as two lists; images keep their own sizes."""
    return [image for image, _ in samples], [target for _, target in samples]


def collate_training(
    samples: list[tuple[Tensor, Target, tuple[int, int]]], *, draw: partial[Augmentation], seed: int, postponed: bool
) -> Batch | Untransformed:
    """A list of (image, Target, (epoch, image index)) -> a training batch.

    draw: `draw_augmentation`, but for target and generator. postponed: leave the pixels to the device.

    It draws for a whole batch: between two images that are decoded, each small step costs several times as much.
    """
    drawn = [draw(target, image_generator(seed, *key)) for _, target, key in samples]
    pairs = zip(samples, drawn, strict=True)
    targets = [transform_target(target, augmentation) for (_, target, _), augmentation in pairs]
    batch = Untransformed([image for image, _, _ in samples], targets, drawn)
    return batch if postponed else batch.transformed()
