"""The LightningDataModule: data sets by name, loaders, and who sees which image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from msil.data.annotated import AnnotatedImages
from msil.data.coco import CocoDataset
from msil.data.sampler import TrainingBatches, evaluation_share, image_generator
from msil.data.shapes import write_shapes
from msil.data.skipping import SkippedImages
from msil.data.transforms import Augmentation, Untransformed, draw_augmentation, transform_boxes, transform_image
from msil.data.voc import VOCDataset
from msil.data.workers import Reading, WatchedImages, heed_dead_workers, lost_worker, outlive_signals
from msil.detection.structures import Target
from msil.errors import ConfigError, DataError

MIN_TRAINING_SIDE = 32  # pixels; MMDetection trains on nothing smaller


def build_datasets(
    name: str,
    root: str | Path,
    train_split: str,
    val_split: str,
    *,
    classes: list[str] | None = None,
    strict: bool = False,
    num_train: int | None = None,
    num_val: int | None = None,
    image_size: int | None = None,
    seed: int | None = None,
) -> tuple[AnnotatedImages, AnnotatedImages]:
    """The audited training and validation set of "shapes", "coco" or "voc".

    num_train, num_val, image_size (pixels), seed: of shapes, which is made at `root` if it is not there.
    Raises DataError for what the audit refuses or a split without annotations, ConfigError for an unknown name.
    """
    reader = _prepare(name, root, num_train, num_val, image_size, seed)
    train = reader(root, train_split, classes=classes, strict=strict)
    val = reader(root, val_split, classes=classes, strict=strict)
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
    num_train: int | None = None,
    num_val: int | None = None,
    image_size: int | None = None,
    seed: int | None = None,
) -> AnnotatedImages:
    """One audited split of "shapes", "coco" or "voc" to evaluate on; no other split needs to be there.

    It may lack annotations (see `AnnotatedImages.annotated`). Arguments and errors otherwise as in `build_datasets`.
    """
    reader = _prepare(name, root, num_train, num_val, image_size, seed)
    return reader(root, split, classes=classes, strict=strict)


def split_of_run(data: Mapping[str, Any], split: str, root: str | Path | None = None) -> AnnotatedImages:
    """One split of the data that a run was trained on.

    data: a run's resolved settings under "data". root: where the data is now, if not where the run had it.
    Errors as in `build_split`, and DataError where the data is not there: shapes are not made anew.
    """
    folder = Path(root or data["root"])
    if not folder.is_dir():
        raise DataError(f"the data of that run is not in {folder}: name its folder with --root.")
    return build_split(
        data["name"], root or data["root"], split, classes=data["classes"], strict=data["strict"],
        num_train=data["num_train"], num_val=data["num_val"], image_size=data["image_size"], seed=data["seed"],
    )  # fmt: skip


def _prepare(
    name: str, root: str | Path, num_train: int | None, num_val: int | None, image_size: int | None, seed: int | None
) -> type[CocoDataset] | type[VOCDataset]:
    """The reader of a data set's layout; shapes is made if it is not there."""
    match name:
        case "shapes":
            if num_train is None or num_val is None or image_size is None or seed is None:
                raise ConfigError("data=shapes needs data.num_train, data.num_val, data.image_size and data.seed.")
            write_shapes(root, num_train=num_train, num_val=num_val, image_size=image_size, seed=seed)
            return CocoDataset
        case "coco":
            return CocoDataset
        case "voc":
            return VOCDataset
        case _:
            raise ConfigError(f"unknown data set {name!r}; known: shapes, coco, voc.")


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
        self._readings = [Reading(val, workers)]
        self.num_eval = len(val) if eval_images is None else min(eval_images, len(val))

    def setup(self, stage: str) -> None:
        heed_dead_workers()

    def val_dataloader(self) -> DataLoader:
        rank, world_size = self._place()
        if self.num_eval < world_size:
            raise ConfigError(f"{self.num_eval} images to evaluate are too few for {world_size} processes.")
        return DataLoader(
            WatchedImages(self.val, self._readings[0]),
            batch_size=self.eval_batch_size,
            sampler=evaluation_share(self.num_eval, rank, world_size),
            num_workers=self.workers,
            collate_fn=collate,
            worker_init_fn=outlive_signals,
            persistent_workers=self.workers > 0,
            pin_memory=self._pins(),
        )

    def transfer_batch_to_device(
        self, batch: tuple[list[Tensor], list[Target]] | Untransformed, device: torch.device, dataloader_idx: int
    ) -> tuple[list[Tensor], list[Target]] | Untransformed:
        """Images go to the device, without waiting; targets stay on the host, which pads them for a whole batch."""
        images = [image.to(device, non_blocking=True) for image in batch[0]]
        return batch._replace(images=images) if isinstance(batch, Untransformed) else (images, batch[1])

    @contextmanager
    def naming_lost_workers(self) -> Iterator[None]:
        """Around what uses the loaders: a worker process that dies ends in a DataError naming the file it read."""
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:
            try:
                lost = lost_worker(error, self._readings)
            except RuntimeError as death:  # torch's SIGCHLD handler raises it wherever the program is
                lost = lost_worker(death, self._readings)
            if lost is None:
                raise
            raise lost from error

    def _pins(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

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
    and on a CPU every pixel are the same. skip_bad_images: go on with another image in place of one that can no longer
    be read, see SkippedImages. The rest: as in EvaluationDataModule.

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
        skip_bad_images: bool = False,
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
        self.skipped = SkippedImages(train, self.train_indices) if skip_bad_images else None
        self._readings.append(Reading(train, workers))

    @property
    def skipped_images(self) -> list[int]:
        """Indices of the training images that were skipped, by all processes, which must all ask at once."""
        if self.skipped is None:
            return []
        flags = self.skipped.flags
        if self.trainer is not None and self.trainer.world_size > 1:
            device = self.trainer.strategy.root_device
            flags = self.trainer.strategy.all_gather(flags.to(device)).amax(0).cpu()
        return flags.nonzero().flatten().tolist()

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: a run that continues counts on."""
        return {} if self.skipped is None else {"skipped_images": self.skipped.marked()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.skipped is not None:
            self.skipped.mark(state_dict.get("skipped_images", []))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch; the same on every process."""
        return -(-len(self.train_indices) // self.batch_size)

    def train_dataloader(self) -> DataLoader:
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
        gather = partial(collate_untransformed, draw=self.draw, seed=self.seed)
        images = AugmentedImages(
            self.train, self.draw, self.seed,
            postponed=self.device_transforms, reading=self._readings[1], skipped=self.skipped,
        )  # fmt: skip
        return DataLoader(
            images,
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=gather if self.device_transforms else collate,
            worker_init_fn=outlive_signals,
            persistent_workers=self.workers > 0,
            pin_memory=self._pins(),
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Lightning calls this with every batch on its device, before anybody sees it."""
        if not isinstance(batch, Untransformed):
            return batch
        pairs = zip(batch.images, batch.augmentations, strict=True)
        return [transform_image(image, augmentation) for image, augmentation in pairs], batch.targets


class AugmentedImages(Dataset[Any]):
    """A data set seen through its training transform; indexed by (epoch, image index).

    draw: draw_augmentation, but for height, width and generator. postponed: give (image, Target, key) as they are in
    place of (image, Target); `collate_untransformed` does the rest. reading: where reads are noted. skipped: what
    stands in for an image that cannot be read; None: a DataError.
    """

    def __init__(
        self,
        dataset: AnnotatedImages,
        draw: partial[Augmentation],
        seed: int,
        *,
        postponed: bool = False,
        reading: Reading | None = None,
        skipped: SkippedImages | None = None,
    ) -> None:
        self.dataset = dataset
        self.draw = draw
        self.seed = seed
        self.postponed = postponed
        self.reading = reading
        self.skipped = skipped

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, ...]:
        _, index = key
        if self.reading is not None:
            self.reading.begins(index)
        image, target = self.dataset[index] if self.skipped is None else self.skipped.read(index)
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
