"""What a run prints before it starts: its net, its data, its schedule and its folder, and what may not be meant."""

from __future__ import annotations

import warnings

import numpy as np

from msil.config import DataName, Decay
from msil.data.annotations import AnnotatedImages, range_warning
from msil.errors import counted
from msil.finished import goes_on, stored_settings
from msil.metrics.coco import MAX_DETS
from msil.reporting.groups import block_label, detector_name
from msil.reporting.tables import amount, setting
from msil.runs import CONFIG, METRICS, data_title
from msil.training.build import Parts
from msil.training.loggers import read_rows
from msil.training.result import count_parameters, title


def start_lines(parts: Parts) -> list[str]:
    """Net and parameters, data and counts, steps and device, folder; mode=test takes no steps. A fifth for a run that
    goes on for more epochs."""
    data, module, config = parts.data, parts.module, parts.config
    row = {"config": parts.values, "head_title": title(module.detector)}
    parameters = amount(count_parameters(module.detector))
    count = parts.trainer.world_size
    place = str(parts.trainer.strategy.root_device) if count == 1 else f"{count} processes"
    if data.train is None:
        images, steps = f"{data.num_eval} images of {config.data.split or config.data.val_split}", []
    else:
        without = len(data.train) - len(data.train_indices)
        left_out = f" ({without} without a box left out)" if without else ""
        held = counted(data.num_eval, "validation image")
        images = f"{counted(len(data.train_indices), 'training image')}{left_out}, {held}"
        warmup, wanted, last = module.warmup_steps, config.schedule.warmup_steps, module.total_steps - 1
        cut = f" (a quarter, not {wanted})" if warmup < wanted else ""
        ended = " (schedule.max_steps)" if last + 1 == config.schedule.max_steps else ""
        peak = module.lr * max(module.lr_factor(step) for step in (0, max(warmup - 1, 0), min(warmup, last)))
        batch = counted(config.data.batch_size, "image")
        steps = [f"steps   {last + 1}{ended} of {batch}, warm-up {warmup}{cut}, peak lr {peak:.2g}"]
    resumed = "" if parts.resume is None else f", continuing after step {parts.resume_step}"
    truth = (data.train or data.val).annotations
    layout = [f"layout  {truth.layout}: {truth.source}"] if config.data.name is DataName.auto else []
    model = config.model
    given = model.detector_weights or model.backbone.get("weights")
    start = "" if model.weights else "pretrained, " if given else "from scratch, "  # of model.weights a line says it
    return [
        f"net     {detector_name(row)}, {block_label(row)}, {parameters} parameters, {start}on {place}",
        f"data    {data_title(parts.values['data'])}, {images}, {counted(len(data.val.classes), 'class')}",
        *layout,
        *steps,
        f"folder  {parts.run_dir}{resumed}",
        *_longer(parts),
        *_shorter(parts),
    ]


def _shorter(parts: Parts) -> list[str]:
    """Of a training from the start: a run that it would continue, were it of that run's name."""
    if parts.resume is not None or parts.data.train is None:
        return []
    for folder in sorted(path.parent for path in parts.run_dir.parent.glob(f"*/{CONFIG}")):
        before = stored_settings(folder)
        if before is not None and goes_on(before, parts.config, folder):
            epochs = counted(before["schedule"]["epochs"], "epoch")
            return [f"hint    {folder.name} has {epochs} of this: run_name={folder.name} continues it"]
    return []


def _longer(parts: Parts) -> list[str]:
    """Of a training that goes on from here for more epochs than were set before: which, and how its lr goes on."""
    before = [one["epochs"] for one in parts.module.describe["continued"] if one["steps"] == parts.resume_step]
    if not before:
        return []
    module, schedule = parts.module, parts.config.schedule
    step = parts.resume_step or 0
    rates = [float(row["lr"]) for row in read_rows(parts.run_dir / METRICS) if "lr" in row]
    was = f", {rates[-1]:.2g} before" if rates else ""
    drops = f"drops at epochs {setting(schedule.milestones)}" if schedule.milestones else "no drop"
    way = "half a cosine" if schedule.decay is Decay.cosine else drops
    left = counted(module.total_steps - step, "step")
    return [
        f"longer  {schedule.epochs} epochs in place of {before[-1]}, {left} to go; "
        f"lr {module.lr * module.lr_factor(step):.2g} from here on{was}: {way} over {schedule.epochs} epochs"
    ]


def warn(parts: Parts) -> None:
    """Of settings under which a number is not what it seems."""
    data, settings = parts.data, parts.config.data
    if data.train is not None:
        trained = data.train.annotations.shared_with(data.val.annotations)
        if settings.train_split == settings.val_split:
            _warn(f"trained and evaluated on the same split, {settings.val_split}: its AP says nothing of other images")
        elif trained:
            _warn(
                f"{len(trained)} of {len(data.val)} validation images are trained on too, such as {trained[0]}: the "
                "AP says little of other images"
            )
        images = len(data.train_indices)
        if settings.batch_size > images:
            _warn(
                f"a step of {settings.batch_size} images takes some of the {counted(images, 'training image')} twice: "
                f"set data.batch_size to {images} or less"
            )
    shown = data.val if data.train is None else data.train
    if said := range_warning(shown):
        _warn(said)
    most = settings.max_dets or MAX_DETS
    images, objects = crowded(data.val, most)
    if images:
        _warn(
            f"{images} validation images hold more than {most} objects of a class, up to {objects}, and AP counts "
            f"{most} detections: set data.max_dets={objects} and model.detections_per_img"
        )


def crowded(data: AnnotatedImages, most: int) -> tuple[int, int]:
    """How many images hold more than `most` objects of one class, and the largest number of them."""
    truth = data.annotations
    pairs = truth.truth_images * len(truth.classes) + truth.truth_labels
    kinds, counts = np.unique(pairs[~truth.truth_ignored], return_counts=True)
    images = np.unique(kinds[counts > most] // len(truth.classes))
    return len(images), int(counts.max(initial=0))


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=2)
