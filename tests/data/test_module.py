"""The data module: what its loaders give, which images they leave out, what it refuses, and Lightning's part in it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from msil.data.coco import CocoDataset
from msil.data.module import DetectionDataModule, EvaluationDataModule, build_datasets, build_split
from msil.data.shapes import write_shapes
from msil.data.voc import VOCDataset
from msil.detection.structures import Target
from msil.errors import ConfigError, DataError

from .files import coco_content, voc_object, voc_xml, write_coco, write_jpeg, write_voc

SHAPES: dict[str, Any] = {"num_train": 11, "num_val": 5, "image_size": 32, "seed": 0}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> tuple[CocoDataset, CocoDataset]:
    root = write_shapes(tmp_path_factory.mktemp("data") / "shapes", **SHAPES)
    return CocoDataset(root, "train"), CocoDataset(root, "val")


def module(datasets: tuple[Any, Any], **changes: Any) -> DetectionDataModule:
    settings: dict[str, Any] = {"batch_size": 4, "eval_batch_size": 2, "seed": 0, "min_size": 32, "max_size": 48}
    return DetectionDataModule(*datasets, **{**settings, **changes})


def on_process(datamodule: DetectionDataModule, rank: int, world_size: int) -> DetectionDataModule:
    datamodule.trainer = SimpleNamespace(  # pyright: ignore
        global_rank=rank,
        world_size=world_size,
        global_step=0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return datamodule


def ids(batches: Any) -> list[list[int]]:
    return [[target.image_id for target in targets] for _, targets in batches]


def bordered(root: Path, split: str, sizes: dict[str, tuple[int, int]]) -> Path:
    """A COCO split of images (width, height) with a box each but for those named empty*, crowd*."""
    images, annotations = [], []
    for number, (name, (width, height)) in enumerate(sizes.items(), start=1):
        write_jpeg(root / split / f"{name}.jpg", width, height)
        images.append({"id": number, "file_name": f"{name}.jpg", "width": width, "height": height})
        if not name.startswith("empty"):
            crowd = int(name.startswith("crowd"))
            annotations.append({
                "id": number, "image_id": number, "category_id": 1, "bbox": [1, 1, 20, 20], "area": 400,
                "iscrowd": crowd,
            })  # fmt: skip
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    source = root / "annotations" / f"instances_{split}.json"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(json.dumps(content))
    return root


def test_training_batches(shapes: tuple[CocoDataset, CocoDataset]) -> None:
    datamodule = module(shapes, min_size=40)
    batches = list(datamodule.train_dataloader())
    trained = sum(shapes[0].has_boxes(i) for i in range(11))
    assert len(batches) == datamodule.steps_per_epoch == -(-trained // 4)
    for images, targets in batches:
        assert isinstance(images, list) and isinstance(targets, list)
        assert len(images) == len(targets) == 4
        for image, target in zip(images, targets, strict=True):
            assert isinstance(target, Target)
            assert image.dtype == torch.uint8 and tuple(image.shape) == (3, 40, 40)  # resized
            assert target.boxes.dtype == torch.float32 and target.labels.dtype == torch.int64
            assert target.boxes.shape == (len(target.labels), 4) and len(target.labels) > 0
            assert bool((target.boxes >= 0).all()) and bool((target.boxes <= 40).all())
            assert bool((target.boxes[:, 2:] > target.boxes[:, :2]).all())
            assert target.size == (32, 32)


def test_augmentation_does_not_depend_on_the_workers(shapes: tuple[CocoDataset, CocoDataset]) -> None:
    def epochs(workers: int) -> list[tuple[list[Tensor], list[Target]]]:
        loader = module(shapes, workers=workers, multiscale=(32, 48)).train_dataloader()
        seen = []
        for epoch in range(2):
            torch.manual_seed(workers)  # the global stream must not matter
            loader.batch_sampler.set_epoch(epoch)  # pyright: ignore
            seen += [(images, targets) for images, targets in loader]
        return seen

    alone, workers = epochs(0), epochs(2)
    assert len(alone) == len(workers) > 4
    for (images, targets), (other_images, other_targets) in zip(alone, workers, strict=True):
        assert [target.image_id for target in targets] == [target.image_id for target in other_targets]
        assert all(torch.equal(one, other) for one, other in zip(images, other_images, strict=True))
        assert all(torch.equal(one.boxes, other.boxes) for one, other in zip(targets, other_targets, strict=True))
    assert len({image.shape for images, _ in alone for image in images}) > 3


class Recorder(L.LightningModule):
    """Learns nothing and remembers which images, in which sizes, came in each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[int, list[tuple[int, int]]] = {}

    def training_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> Tensor:
        images, targets = batch
        shown = self.seen.setdefault(self.current_epoch, [])
        shown += [(target.image_id, image.shape[-1]) for image, target in zip(images, targets, strict=True)]
        return self.weight * 1.0

    def validation_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> None:
        assert len(batch[0]) == len(batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(datamodule: DetectionDataModule, folder: Path, epochs: int, resume: Path | None = None) -> Recorder:
    recorder = Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of loaders without workers and the like
        trainer = L.Trainer(
            max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
            num_sanity_val_steps=0, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(recorder, datamodule=datamodule, ckpt_path=resume)
        trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return recorder


@pytest.mark.parametrize("workers", [0, 1])  # workers begin to fetch before Lightning names the epoch
def test_lightning_gives_every_epoch_its_own_order_and_augmentation_also_after_a_resume(
    shapes: tuple[CocoDataset, CocoDataset], tmp_path: Path, workers: int
) -> None:
    changes: dict[str, Any] = {"multiscale": (32, 96), "max_size": 96, "workers": workers}
    through = fit(module(shapes, **changes), tmp_path / "through", 4).seen
    assert sorted(through) == [0, 1, 2, 3]
    assert len({tuple(shown) for shown in through.values()}) == 4  # other sizes, in another order
    assert len({tuple(image_id for image_id, _ in shown) for shown in through.values()}) == 4
    stopped = fit(module(shapes, **changes), tmp_path / "stopped", 2).seen
    resumed = fit(module(shapes, **changes), tmp_path / "resumed", 4, tmp_path / "stopped" / "2.ckpt").seen
    assert stopped | resumed == through
    assert sorted(resumed) == [2, 3]


def test_images_without_a_box_to_train_on_or_too_small_are_left_out(tmp_path: Path) -> None:
    sizes = {"a": (64, 48), "empty": (64, 48), "low": (64, 31), "thin": (31, 64), "just": (32, 32), "crowd": (64, 48)}
    root = bordered(bordered(tmp_path, "train", sizes), "val", sizes)
    datasets = CocoDataset(root, "train"), CocoDataset(root, "val")
    datamodule = module(datasets, batch_size=2)
    assert datamodule.steps_per_epoch == 1
    assert sorted(id for batch in ids(datamodule.train_dataloader()) for id in batch) == [1, 5]  # a, just
    assert [id for batch in ids(datamodule.val_dataloader()) for id in batch] == [1, 2, 3, 4, 5, 6]  # scored on all


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_every_training_batch(shapes: tuple[CocoDataset, CocoDataset], world_size: int) -> None:
    whole = [sorted(batch) for batch in ids(module(shapes).train_dataloader())]
    ranks = [ids(on_process(module(shapes), rank, world_size).train_dataloader()) for rank in range(world_size)]
    assert [sorted(id for part in parts for id in part) for parts in zip(*ranks, strict=True)] == whole
    assert {len(part) for shares in ranks for part in shares} == {4 // world_size}


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_evaluate_every_image_once(shapes: tuple[CocoDataset, CocoDataset], world_size: int) -> None:
    shares = [ids(on_process(module(shapes), rank, world_size).val_dataloader()) for rank in range(world_size)]
    seen = [id for share in shares for batch in share for id in batch]
    assert sorted(seen) == sorted(shapes[1].image_id(i) for i in range(5))


def test_a_batch_that_the_processes_cannot_share_is_refused(shapes: tuple[CocoDataset, CocoDataset]) -> None:
    datamodule = on_process(module(shapes, batch_size=4), 0, 3)
    with pytest.raises(ConfigError, match=r"data\.batch_size=4.*3 processes"):
        datamodule.train_dataloader()


def test_fewer_evaluation_images_than_processes_are_refused(shapes: tuple[CocoDataset, CocoDataset]) -> None:
    for images, world_size in ((None, 6), (2, 3)):
        with pytest.raises(ConfigError, match=f"{images or 5} images.*{world_size} processes"):
            on_process(module(shapes, eval_images=images), 0, world_size).val_dataloader()


@pytest.mark.parametrize(("eval_images", "count"), [(None, 5), (1, 1), (3, 3), (5, 5), (99, 5)])
def test_eval_images_takes_the_first(
    shapes: tuple[CocoDataset, CocoDataset], eval_images: int | None, count: int
) -> None:
    datamodule = module(shapes, eval_images=eval_images)
    assert datamodule.num_eval == count
    seen = [id for batch in ids(datamodule.val_dataloader()) for id in batch]
    assert seen == [shapes[1].image_id(i) for i in range(count)]


def test_build_datasets_reads_coco_and_voc(tmp_path: Path) -> None:
    write_coco(tmp_path / "coco", coco_content(), "one")
    write_coco(tmp_path / "coco", coco_content(), "two")
    train, val = build_datasets("coco", tmp_path / "coco", "one", "two", classes=["zebra", "cat"])
    assert isinstance(train, CocoDataset) and isinstance(val, CocoDataset)
    assert (train.classes, train.category_ids) == (val.classes, val.category_ids) == (("zebra", "cat"), (90, 3))
    for split in ("one", "two"):
        write_voc(tmp_path / "voc", {"x": voc_xml(voc_object("dog", 1, 1, 20, 20))}, split)
    train, _ = build_datasets("voc", tmp_path / "voc", "one", "two")
    assert isinstance(train, VOCDataset) and len(train.classes) == 20


def test_splits_of_different_classes_are_refused(tmp_path: Path) -> None:
    write_coco(tmp_path, coco_content(), "train")
    other = coco_content()
    other["categories"][2]["name"] = "wolf"
    write_coco(tmp_path, other, "val")
    with pytest.raises(DataError, match=r"train and val .*data\.classes"):
        build_datasets("coco", tmp_path, "train", "val")
    assert build_datasets("coco", tmp_path, "train", "val", classes=["cat"])[1].classes == ("cat",)


def test_build_split_needs_no_other_split(tmp_path: Path) -> None:
    write_coco(tmp_path / "coco", coco_content(), "val")
    dataset = build_split("coco", tmp_path / "coco", "val", classes=["zebra", "cat"])
    assert isinstance(dataset, CocoDataset) and dataset.category_ids == (90, 3)
    write_voc(tmp_path / "voc", {"x": voc_xml(voc_object("dog", 1, 1, 20, 20))}, "test")
    dataset = build_split("voc", tmp_path / "voc", "test")
    assert isinstance(dataset, VOCDataset) and dataset.annotated
    dataset = build_split("shapes", tmp_path / "s", "val", **SHAPES)
    assert len(dataset) == SHAPES["num_val"]
    with pytest.raises(ConfigError, match=r"'cocoo'.*shapes, coco, voc"):
        build_split("cocoo", tmp_path, "val")
    with pytest.raises(DataError, match=r"instances_test\.json is missing \(the splits there are val\)"):
        build_split("coco", tmp_path / "coco", "test")
    outside = coco_content()
    outside["annotations"][1]["bbox"] = [30, 5, 60, 7]
    write_coco(tmp_path / "coco", outside, "val")
    with pytest.raises(DataError, match="101"):
        build_split("coco", tmp_path / "coco", "val", strict=True)


def without_annotations(root: Path, split: str) -> Path:
    """A split as write_coco writes it, its annotation file turned into one of images alone."""
    source = write_coco(root, coco_content(), split)
    source.rename(source.with_name(f"image_info_{split}.json"))
    return root


def test_a_split_without_annotations_is_evaluated_but_not_trained_on(tmp_path: Path) -> None:
    without_annotations(tmp_path, "test")
    write_coco(tmp_path, coco_content(), "train")
    for train, val in (("test", "train"), ("train", "test")):
        with pytest.raises(DataError, match=r"split test of .* has no annotations.*mode=test"):
            build_datasets("coco", tmp_path, train, val)
    test = build_split("coco", tmp_path, "test")
    with pytest.raises(DataError, match="no training image has"):
        module((test, test))
    batches = list(EvaluationDataModule(test, eval_batch_size=2).val_dataloader())
    assert [[target.image_id for target in targets] for _, targets in batches] == [[11, 5], [8]]
    assert [len(target.boxes) for _, targets in batches for target in targets] == [0, 0, 0]
