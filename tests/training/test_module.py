"""The LightningModule: every parameter learns, and every evaluation stands alone."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from msil.data.coco import CocoDataset
from msil.data.module import DetectionDataModule
from msil.metrics.coco import STATS, CocoMetric, to_coco
from msil.training.module import DetectionModule

from .cases import module_of, tiny_config


@pytest.fixture
def data(shapes: Path) -> DetectionDataModule:
    return DetectionDataModule(
        CocoDataset(shapes, "train"), CocoDataset(shapes, "val"), batch_size=8, eval_batch_size=3, seed=0, min_size=64,
        max_size=64,
    )  # fmt: skip


@pytest.fixture
def module(data: DetectionDataModule) -> DetectionModule:
    metric = CocoMetric(data.val.annotations)
    return module_of(tiny_config("runs", "data"), metrics=[metric])


def trainer(tmp_path: Path, *callbacks: Callback, **settings: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", devices=1, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, log_every_n_steps=1,
        num_sanity_val_steps=0, default_root_dir=str(tmp_path), **settings,
    )  # fmt: skip


class Watch(Callback):
    """What is logged of each evaluation."""

    def __init__(self) -> None:
        self.evaluations: list[dict[str, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.evaluations.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_the_final_numbers_are_pycocotools_own_and_evaluations_do_not_add_up(
    tmp_path: Path, module: DetectionModule, data: DetectionDataModule
) -> None:
    watch = Watch()
    fit = trainer(tmp_path, watch, max_epochs=2)
    fit.fit(module, datamodule=data)
    assert len(watch.evaluations) == 2
    # The trained net again, and then another one: were the metric not emptied, numbers would mix or it would refuse.
    for _ in range(2):
        fit.validate(module, datamodule=data, verbose=False)
        assert watch.evaluations[-1]["AP"] == watch.evaluations[1]["AP"]
    module.final_evaluation = True
    fit.validate(module, datamodule=data, verbose=False)

    dataset = data.val
    results = []
    for i in range(len(dataset)):
        found = module.detector.predict([dataset[i][0]])[0]
        for box, score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True):
            xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            entry = {"image_id": dataset.image_id(i), "category_id": dataset.category_ids[label]}
            results.append({**entry, "bbox": xywh, "score": score})
    assert len(results) > 100
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth: Any = COCO()
        ground_truth.dataset = to_coco(dataset.annotations)
        ground_truth.createIndex()
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    expected = {
        name: float("nan") if value == -1 else value for name, value in zip(STATS, evaluation.stats, strict=True)
    }
    assert module.final_metrics == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_a_step_trains_every_parameter(tmp_path: Path, module: DetectionModule, data: DetectionDataModule) -> None:
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(module, datamodule=data)
    assert [name for name, parameter in module.named_parameters() if torch.equal(parameter, before[name])] == []
