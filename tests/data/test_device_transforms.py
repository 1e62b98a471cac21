"""data.device_transforms: the same pixels and boxes reach the net, resized on its device instead of in the loader."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from msil.data.coco import CocoDataset
from msil.data.module import DetectionDataModule
from msil.data.transforms import Untransformed
from msil.detection.structures import Target

from .files import write_jpeg

Seen = list[tuple[int, Tensor, Tensor, Tensor]]  # image id, pixels, boxes, labels
SIZES = [(64, 48), (48, 64), (90, 40), (33, 77), (64, 48), (50, 50), (120, 60), (41, 59), (64, 48)]  # width, height


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    """JPEGs of several sizes with two boxes each."""
    root = tmp_path_factory.mktemp("data")
    images, annotations = [], []
    for number, (width, height) in enumerate(SIZES, start=1):
        write_jpeg(root / "train" / f"{number}.jpg", width, height)
        images.append({"id": number, "file_name": f"{number}.jpg", "width": width, "height": height})
        for box in ([1.5, 2, 20, 25], [width - 12, height - 9.5, 12, 9.5]):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": 1, "bbox": box, "iscrowd": 0,
                 "area": box[2] * box[3]}
            )  # fmt: skip
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (root / "annotations").mkdir()
    (root / "annotations/instances_train.json").write_text(json.dumps(content))
    return CocoDataset(root, "train")


def module(dataset: CocoDataset, **changes: Any) -> DetectionDataModule:
    settings: dict[str, Any] = {
        "batch_size": 2, "eval_batch_size": 2, "seed": 3, "min_size": 40, "max_size": 90, "multiscale": (30, 70)
    }  # fmt: skip
    return DetectionDataModule(dataset, dataset, **{**settings, **changes})


class Recorder(L.LightningModule):
    """Learns nothing and keeps what it is trained and evaluated on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: Seen = []
        self.evaluated: Seen = []

    def training_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> Tensor:
        self.trained += rows(*batch)
        return self.weight * 1.0

    def validation_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> None:
        self.evaluated += rows(*batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def rows(images: list[Tensor], targets: list[Target]) -> Seen:
    pairs = zip(images, targets, strict=True)
    return [(target.image_id, image.clone(), target.boxes, target.labels) for image, target in pairs]


def seen(datamodule: DetectionDataModule, folder: Path) -> Recorder:
    """Two epochs."""
    recorder = Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of loaders without workers and the like
        trainer = L.Trainer(
            max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
            num_sanity_val_steps=0, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(recorder, datamodule=datamodule)
    return recorder


def assert_same(ours: Seen, theirs: Seen) -> None:
    assert [row[0] for row in ours] == [row[0] for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one[1:], other[1:], strict=True)), one[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_net_is_given_the_same_bits(dataset: CocoDataset, tmp_path: Path, workers: int) -> None:
    before = seen(module(dataset, device_transforms=False, workers=workers), tmp_path)
    after = seen(module(dataset, device_transforms=True, workers=workers), tmp_path)
    assert_same(after.trained, before.trained)
    assert_same(after.evaluated, before.evaluated)
    assert len(after.trained) == 20 and all(row[1].dtype == torch.uint8 for row in after.trained)  # 2 x (9 + a filler)
    assert len({tuple(row[1].shape) for row in after.trained}) > 10, "hardly anything was drawn"


def test_the_loader_gives_the_pixels_of_the_files(dataset: CocoDataset) -> None:
    for batch in module(dataset, device_transforms=True).train_dataloader():
        assert isinstance(batch, Untransformed)
        for image, target, augmentation in zip(*batch, strict=True):
            assert torch.equal(image, dataset[target.image_id - 1][0])
            assert target.boxes[:, 2].max() <= augmentation.width and target.boxes[:, 3].max() <= augmentation.height
