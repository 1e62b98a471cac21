"""The data module: what its loaders give, which images they leave out, what it refuses, and Lightning's part in it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from msil.data.annotations import AnnotatedImages
from msil.data.audit import DataWarning
from msil.data.module import DetectionDataModule, build_datasets, build_split
from msil.data.shapes import write_shapes
from msil.detection import Detections, build_detector
from msil.detection.structures import Target
from msil.errors import ConfigError, DataError

from .files import boxes_of, coco_content, read_coco, voc_object, voc_xml, write_coco, write_jpeg, write_voc

SHAPES: dict[str, Any] = {"num_train": 11, "num_val": 5, "image_size": 32, "seed": 0}
Datasets = tuple[AnnotatedImages, AnnotatedImages]
Seen = list[tuple[int, Tensor, Tensor, Tensor]]  # image id, pixels, boxes, labels
SIZES = [(64, 48), (48, 64), (90, 40), (33, 77), (64, 48), (50, 50), (120, 60), (41, 59), (64, 48)]  # width, height


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Datasets:
    root = write_shapes(tmp_path_factory.mktemp("data") / "shapes", **SHAPES)
    return read_coco(root, "train"), read_coco(root, "val")


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> AnnotatedImages:
    """JPEGs of several sizes."""
    root = tmp_path_factory.mktemp("jpegs")
    return read_coco(bordered(root, "train", {str(i): size for i, size in enumerate(SIZES)}), "train")


SETTINGS: dict[str, Any] = {
    "batch_size": 4, "eval_batch_size": 2, "min_size": 32, "max_size": 48, "multiscale": None, "flip": 0.5,
    "augment": None, "filter_empty": None, "device_transforms": False, "workers": 0,
}  # fmt: skip


def module(datasets: tuple[Any, Any], **changes: Any) -> DetectionDataModule:
    """Of the training and the validation set. changes: of SETTINGS, and other arguments."""
    settings = SimpleNamespace(**{name: changes.pop(name, value) for name, value in SETTINGS.items()})
    return DetectionDataModule(settings, datasets[1], datasets[0], **changes)


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
                "id": number, "image_id": number, "category_id": 1, "bbox": [1.5, 1, 20, 20], "area": 400,
                "iscrowd": crowd,
            })  # fmt: skip
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    write_coco(root, content, split)
    return root


class Recorder(L.LightningModule):
    """Learns nothing and keeps what it is trained and evaluated on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: dict[int, Seen] = {}
        self.evaluated: Seen = []

    def training_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> Tensor:
        self.trained.setdefault(self.current_epoch, []).extend(rows(*batch))
        return self.weight * 1.0

    def validation_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> None:
        self.evaluated += rows(*batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def rows(images: list[Tensor], targets: list[Target]) -> Seen:
    pairs = zip(images, targets, strict=True)
    return [(target.image_id, image.clone(), target.boxes, target.labels) for image, target in pairs]


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


def same(ours: Seen, theirs: Seen) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(a[0] == b[0] and all(map(torch.equal, a[1:], b[1:])) for a, b in pairs)


@pytest.mark.parametrize("augment", [None, "strong"])
def test_the_net_is_given_the_same_bits_whoever_transforms(
    jpegs: AnnotatedImages, tmp_path: Path, augment: str | None
) -> None:
    """By the main process, by workers, and on the device that trains; every epoch has its own order and sizes."""
    settings: dict[str, Any] = {"batch_size": 2, "seed": 3, "min_size": 40, "max_size": 90, "multiscale": (30, 70)}
    settings["augment"] = augment
    ways = [(0, False), (1, False), (0, True), (1, True)]
    first, *others = [
        fit(module((jpegs, jpegs), **settings, workers=workers, device_transforms=on_device), tmp_path, 2)
        for workers, on_device in ways
    ]
    for other in others:
        assert all(same(first.trained[epoch], other.trained[epoch]) for epoch in (0, 1))
        assert same(first.evaluated, other.evaluated)
    shown = first.trained[0] + first.trained[1]
    assert len(shown) == 20 and all(row[1].dtype == torch.uint8 for row in shown)  # 2 x (9 + a filler)
    assert len({tuple(row[1].shape) for row in shown}) > 10, "hardly anything was drawn"
    for image_id, pixels, boxes, _ in first.evaluated:  # as they are, in each of two epochs
        image, truth = jpegs[image_id - 1]
        assert torch.equal(pixels, image) and torch.equal(boxes, truth.boxes)
    assert sorted(row[0] for row in first.evaluated) == sorted([*range(1, 10)] * 2)


# Workers begin to fetch before Lightning names the epoch.
@pytest.mark.parametrize(("workers", "augment"), [(0, None), (1, None), (0, "strong")])
def test_every_epoch_has_its_own_order_and_augmentation_also_after_a_resume(
    shapes: Datasets, tmp_path: Path, workers: int, augment: str | None
) -> None:
    changes: dict[str, Any] = {"multiscale": (32, 96), "max_size": 96, "workers": workers, "augment": augment}
    through = fit(module(shapes, **changes), tmp_path / "through", 4).trained
    assert len({tuple((row[0], row[1].shape) for row in shown) for shown in through.values()}) == 4
    assert len({tuple(row[0] for row in shown) for shown in through.values()}) == 4
    fit(module(shapes, **changes), tmp_path / "stopped", 2)
    resumed = fit(module(shapes, **changes), tmp_path / "resumed", 4, tmp_path / "stopped" / "2.ckpt").trained
    assert sorted(resumed) == [2, 3] and all(same(resumed[epoch], through[epoch]) for epoch in (2, 3))


def test_images_without_a_box_to_train_on_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    sizes = {"a": (64, 48), "empty": (64, 48), "low": (64, 31), "thin": (31, 64), "crowd": (64, 48)}
    root = bordered(bordered(tmp_path, "train", sizes), "val", sizes)
    datamodule = module((read_coco(root, "train"), read_coco(root, "val")), batch_size=2)
    assert datamodule.steps_per_epoch == 2
    assert {id for batch in ids(datamodule.train_dataloader()) for id in batch} == {1, 3, 4}  # a, low, thin
    assert {id for batch in ids(datamodule.val_dataloader()) for id in batch} == {1, 2, 3, 4, 5}  # scored on all
    whole = module((read_coco(root, "train"), read_coco(root, "val")), batch_size=5, filter_empty=False)
    assert {id for batch in ids(whole.train_dataloader()) for id in batch} == {1, 2, 3, 4, 5}
    bordered(tmp_path, "train", {"crowd": (64, 31), "empty": (64, 48)})
    with pytest.raises(DataError, match="no training image has a box"):
        module((read_coco(root, "train"), read_coco(root, "val")))


def test_eval_images_takes_the_first(shapes: Datasets) -> None:
    for eval_images, count in ((None, 5), (3, 3), (99, 5)):
        datamodule = module(shapes, eval_images=eval_images)
        seen = [id for batch in ids(datamodule.val_dataloader()) for id in batch]
        assert seen == [shapes[1].image_id(i) for i in range(count)] and datamodule.num_eval == count


def test_images_padded_to_one_size_go_through_the_net_together(tmp_path: Path) -> None:
    """As COCO's, of two sizes that take turns: 6 forward passes for 24 images, not 12, and the same detections."""
    sizes = {f"{i:02}": [(64, 48), (48, 64)][i % 2] for i in range(24)}
    val = read_coco(bordered(tmp_path, "val", sizes), "val")
    torch.manual_seed(0)
    detector = build_detector("fcos", "resnet10", 1, channels=64, min_size=64, max_size=96)
    with torch.no_grad():
        detector.head.cls_logits.bias.fill_(1.0)  # pyright: ignore
    shapes: list[tuple[int, ...]] = []
    detector.backbone.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape)))
    found: dict[int, Detections] = {}
    for images, targets in module((None, val), eval_batch_size=4, min_size=64, max_size=96).val_dataloader():
        found |= {t.image_id: d for t, d in zip(targets, detector.predict(images), strict=True)}
    assert shapes == [(4, 3, 96, 64)] * 3 + [(4, 3, 64, 96)] * 3
    for index in range(24):
        (alone,) = detector.predict(val[index][0])
        together = found.pop(val.image_id(index))
        assert len(alone.labels) and torch.equal(together.labels, alone.labels)
        torch.testing.assert_close(together.boxes, alone.boxes, rtol=0, atol=1e-3)
        torch.testing.assert_close(together.scores, alone.scores, rtol=0, atol=1e-5)


def test_processes_evaluate_every_image_once(shapes: Datasets) -> None:
    for world_size in (2, 3):
        shares = [ids(on_process(module(shapes), rank, world_size).val_dataloader()) for rank in range(world_size)]
        seen = [id for share in shares for batch in share for id in batch]
        assert sorted(seen) == sorted(shapes[1].image_id(i) for i in range(5))


def test_what_the_processes_cannot_share_is_refused(shapes: Datasets) -> None:
    with pytest.raises(ConfigError, match=r"data\.batch_size=4.*3 processes"):
        on_process(module(shapes, batch_size=4), 0, 3).train_dataloader()
    for images, world_size in ((None, 6), (2, 3)):
        with pytest.raises(ConfigError, match=f"{images or 5} images.*{world_size} processes"):
            on_process(module(shapes, eval_images=images), 0, world_size).val_dataloader()


def coco(root: Path, **others: Any) -> dict[str, Any]:
    return {"name": "coco", "root": root, **others}


def test_shapes_are_made_and_an_unknown_set_is_refused(tmp_path: Path) -> None:
    data = {"name": "shapes", "root": tmp_path / "s", **SHAPES}
    train, val = build_datasets(data, "train", "val")
    assert (len(train), len(val)) == (11, 5)
    with pytest.raises(ConfigError, match=r"'cocoo'.*shapes, coco, voc"):
        build_split({"name": "cocoo", "root": tmp_path}, "val")


@pytest.mark.filterwarnings("ignore:.*are left out")
def test_splits_get_their_labels_by_name(tmp_path: Path) -> None:
    write_coco(tmp_path, coco_content(), "train")
    other = coco_content()
    names = {3: "zebra", 7: "dog", 90: "cat"}  # cat and zebra exchanged
    other["categories"] = [{"id": number, "name": name} for number, name in names.items()]
    write_coco(tmp_path, other, "swapped")
    train, val = build_datasets(coco(tmp_path), "train", "swapped")
    assert train.classes == val.classes == ("cat", "dog", "zebra") and val.category_ids == (90, 7, 3)
    assert [name for _, name, *_ in boxes_of(train)] == ["cat", "zebra", "dog", "cat"]
    assert [name for _, name, *_ in boxes_of(val)] == ["zebra", "cat", "dog", "zebra"]

    other["categories"].pop(0)
    other["annotations"] = [one for one in other["annotations"] if one["category_id"] != 3]
    write_coco(tmp_path, other, "fewer")
    for classes in (None, ["zebra", "cat"]):
        train, val = build_datasets(coco(tmp_path, classes=classes), "train", "fewer")
        assert train.classes == val.classes and len(set(val.category_ids)) == len(val.classes)
        assert "cat" in [name for _, name, *_ in boxes_of(val)]

    other["categories"][1]["name"] = "sea lion"
    write_coco(tmp_path, other, "more")
    leave_out = re.escape("by 'data.classes=[cat,dog,zebra]'")
    with pytest.raises(DataError, match=f"more.json has boxes of sea lion, which the training split .* {leave_out}"):
        build_datasets(coco(tmp_path), "train", "more")
    assert build_datasets(coco(tmp_path, classes=["dog"]), "train", "more")[1].classes == ("dog",)

    other["categories"][1]["name"] = "Zebra "  # which the val split alone has, and the advice renames
    write_coco(tmp_path, other, "spelled")
    rename = re.escape("rename them by 'data.classes={cat:cat,dog:dog,zebra:zebra,Zebra\\ :zebra}'")
    with pytest.raises(DataError, match=rf"spelled.json has boxes of Zebra , .* {rename}"):
        build_datasets(coco(tmp_path), "train", "spelled")
    spelled = {"cat": "cat", "dog": "dog", "zebra": "zebra", "Zebra ": "zebra"}
    train, val = build_datasets(coco(tmp_path, classes=spelled), "train", "spelled")
    assert train.classes == val.classes == ("cat", "dog", "zebra")
    assert "zebra" in [name for _, name, *_ in boxes_of(val)]


@pytest.mark.parametrize("layout", ["coco", "voc"])
def test_classes_are_chosen_and_renamed(tmp_path: Path, layout: str) -> None:
    if layout == "coco":
        content = coco_content()
        content["annotations"][2]["iscrowd"] = 0
        write_coco(tmp_path, content)
    else:
        boxes = [voc_object(name, 1, 1, 20, 20) for name in ("zebra", "cat", "dog", "cat")]
        write_voc(tmp_path, {"a": voc_xml(*boxes)})
    data = {"name": layout, "root": tmp_path, "classes": {"cat": "pet", "dog": "pet"}}
    with pytest.warns(DataWarning, match="boxes of classes other than pet are left out: zebra 1"):
        assert sorted(name for _, name, *_ in boxes_of(build_split(data, "train"))) == ["pet"] * 3
    with pytest.raises(DataError, match=r"none of the classes bird; it has .*, as in 'data.classes=\{\w+:bird\}'"):
        build_split({**data, "classes": ["bird"]}, "train", complete=False)


def test_a_split_without_annotations_is_evaluated_but_not_trained_on(tmp_path: Path) -> None:
    source = write_coco(tmp_path, coco_content(), "test")
    source.rename(source.with_name("image_info_test.json"))
    write_coco(tmp_path, coco_content(), "train")
    for train, val in (("test", "train"), ("train", "test")):
        with pytest.raises(DataError, match=r"split test of .* has no annotations.*mode=test"):
            build_datasets(coco(tmp_path), train, val)
    batches = list(module((None, build_split(coco(tmp_path), "test"))).val_dataloader())
    assert ids(batches) == [[11, 5], [8]]
    assert [len(target.boxes) for _, targets in batches for target in targets] == [0, 0, 0]
