"""Made-up checkpoints in MMDetection's names and words, from a small table of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

LEVELS = range(5)
CAFFE_MEAN = "[103.53, 116.28, 123.675]"

FORM_SWITCHES = {
    "plain": "loss_bbox=dict(type='IoULoss', loss_weight=1.0)",
    "improved": (
        "norm_on_bbox=True, centerness_on_reg=True, center_sampling=True, conv_bias=True, "
        "loss_bbox=dict(type='GIoULoss', loss_weight=1.0)"
    ),
    "vfnet": "use_atss=True, use_vfl=True, loss_bbox=dict(type='GIoULoss', loss_weight=1.5)",
}


def shapes(form: str, backbone: str, channels: int, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a whole detector. form: plain or improved FCOS, or vfnet."""
    with torch.device("meta"):
        body = torchvision.models.get_model(backbone).state_dict()
    found = {f"backbone.{key}": tuple(value.shape) for key, value in body.items() if not key.startswith("fc.")}
    stages = (128, 256, 512) if backbone == "resnet18" else (512, 1024, 2048)
    for i, width in enumerate(stages):
        found |= _conv(f"neck.lateral_convs.{i}.conv", width, channels, 1, bias=True)
    for i in LEVELS:
        found |= _conv(f"neck.fpn_convs.{i}.conv", channels, channels, 3, bias=True)
    for i in range(3 if form == "vfnet" else 4):
        for branch in ("cls", "reg"):
            found |= _conv_gn(f"bbox_head.{branch}_convs.{i}", channels, bias=form == "improved")
    predictors = {"conv_cls": num_classes, "conv_reg": 4, "conv_centerness": 1}
    if form == "vfnet":
        found |= _conv_gn("bbox_head.vfnet_reg_conv", channels, bias=False)
        for star in ("vfnet_cls_dconv", "vfnet_reg_refine_dconv"):
            found |= _conv(f"bbox_head.{star}", channels, channels, 3, bias=False)
        found |= {f"bbox_head.scales_refine.{i}.scale": () for i in LEVELS}
        predictors = {"vfnet_cls": num_classes, "vfnet_reg": 4, "vfnet_reg_refine": 4}
    for name, width in predictors.items():
        found |= _conv(f"bbox_head.{name}", channels, width, 3, bias=True)
    return found | {f"bbox_head.scales.{i}.scale": () for i in LEVELS}


def _conv(name: str, width_in: int, width: int, size: int, bias: bool) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {f"{name}.weight": (width, width_in, size, size)}
    return found | ({f"{name}.bias": (width,)} if bias else {})


def _conv_gn(name: str, channels: int, bias: bool) -> dict[str, tuple[int, ...]]:
    norm = {f"{name}.gn.weight": (channels,), f"{name}.gn.bias": (channels,)}
    return _conv(f"{name}.conv", channels, channels, 3, bias) | norm


def mmdet_state(golden: Any, form: str, *, seed: int = 3) -> dict[str, Tensor]:
    """The state dict of the detector on ResNet-50 with the weights of `seed`."""
    empty = {key: torch.zeros(shape) for key, shape in shapes(form, "resnet50", 256, 80).items()}
    return golden.fill(empty, seed)


def numbered_state(form: str, *, backbone: str = "resnet18") -> dict[str, Tensor]:
    """A small file: the i-th tensor is i everywhere, and takes the room of one number."""
    found = shapes(form, backbone, 32, 80)
    return {key: torch.tensor(float(i)).expand(shape) for i, (key, shape) in enumerate(found.items())}


def config_3x(
    form: str, *, depth: int = 18, style: str = "pytorch", channels: int = 32, scale: str = "(1333, 800)"
) -> str:
    """As in meta["cfg"] of MMDetection 3.x."""
    caffe = style == "caffe"
    return f"""
default_scope = 'mmdet'
model = dict(
    type='{"VFNet" if form == "vfnet" else "FCOS"}',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean={CAFFE_MEAN if caffe else "[123.675, 116.28, 103.53]"},
        std={"[1.0, 1.0, 1.0]" if caffe else "[58.395, 57.12, 57.375]"},
        bgr_to_rgb={not caffe},
        pad_size_divisor=32),
    backbone=dict(
        type='ResNet', depth={depth}, num_stages=4, out_indices=(0, 1, 2, 3), frozen_stages=1,
        norm_cfg=dict(type='BN', requires_grad={not caffe}), norm_eval=True, style='{style}',
        init_cfg=dict(type='Pretrained', checkpoint='a://file')),
    neck=dict(
        type='FPN', in_channels=[256, 512, 1024, 2048], out_channels={channels}, start_level=1,
        add_extra_convs='on_output', num_outs=5, relu_before_extra_convs=True),
    bbox_head=dict(
        type='{"VFNetHead" if form == "vfnet" else "FCOSHead"}', num_classes=80, in_channels={channels},
        stacked_convs={3 if form == "vfnet" else 4}, feat_channels={channels}, strides=[8, 16, 32, 64, 128],
        {FORM_SWITCHES[form]}),
    train_cfg=None,
    test_cfg=dict(
        nms_pre=1000, min_bbox_size=0, score_thr=0.05,
        nms=dict(type='nms', iou_threshold={0.5 if form == "plain" else 0.6}), max_per_img=100))
backend_args = None
test_cfg = dict(type='TestLoop')
test_dataloader = dict(batch_size=1, dataset=dict(type='CocoDataset', pipeline=[
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='Resize', scale={scale}, keep_ratio=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'scale_factor'))]))
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.01), paramwise_cfg=dict(bias_lr_mult=2.0))
"""


def config_2x() -> str:
    """As in meta["config"] of MMDetection 2.x: the plain FCOS on the caffe-style ResNet-50."""
    pipeline = """[
    dict(type='LoadImageFromFile'),
    dict(type='MultiScaleFlipAug', img_scale=(1000, 600), flip=False, transforms=[
        dict(type='Resize', keep_ratio=True),
        dict(type='Normalize', mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], to_rgb=False),
        dict(type='Pad', size_divisor=32)])]"""
    return f"""
checkpoint_config = dict(interval=1)
model = dict(
    type='FCOS',
    pretrained='open-mmlab://detectron/resnet50_caffe',
    backbone=dict(
        type='ResNet', depth=50, num_stages=4, out_indices=(0, 1, 2, 3), frozen_stages=1,
        norm_cfg=dict(type='BN', requires_grad=False), norm_eval=True, style='caffe'),
    neck=dict(
        type='FPN', in_channels=[256, 512, 1024, 2048], out_channels=256, start_level=1, add_extra_convs=True,
        extra_convs_on_inputs=False, num_outs=5, relu_before_extra_convs=True),
    bbox_head=dict(
        type='FCOSHead', num_classes=80, in_channels=256, stacked_convs=4, feat_channels=256,
        strides=[8, 16, 32, 64, 128], loss_bbox=dict(type='IoULoss', loss_weight=1.0)))
train_cfg = dict(assigner=dict(type='MaxIoUAssigner', ignore_iof_thr=-1), debug=False)
test_cfg = dict(nms_pre=500, score_thr=0.1, nms=dict(type='nms', iou_thr=0.55), max_per_img=50)
img_norm_cfg = dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], to_rgb=True)
test_pipeline = {pipeline}
data = dict(samples_per_gpu=2, train=dict(type='CocoDataset'), test=dict(type='CocoDataset', pipeline={pipeline}))
"""


def config_1x() -> str:
    """As in meta["config"] of MMDetection 1.x: the file as it was, its name first, with variables in the pipelines."""
    return """/home/someone/configs/fcos/fcos_r50_caffe_fpn_gn_1x_4gpu.py
# model settings
model = dict(
    type='FCOS',
    pretrained='open-mmlab://resnet50_caffe',
    backbone=dict(
        type='ResNet', depth=50, num_stages=4, out_indices=(0, 1, 2, 3), frozen_stages=1,
        norm_cfg=dict(type='BN', requires_grad=False), style='caffe'),
    neck=dict(
        type='FPN', in_channels=[256, 512, 1024, 2048], out_channels=32, start_level=1, add_extra_convs=True,
        extra_convs_on_inputs=False, num_outs=5, relu_before_extra_convs=True),
    bbox_head=dict(
        type='FCOSHead', num_classes=81, in_channels=32, stacked_convs=4, feat_channels=32,
        strides=[8, 16, 32, 64, 128], loss_bbox=dict(type='IoULoss', loss_weight=1.0)))
test_cfg = dict(nms_pre=1000, min_bbox_size=0, score_thr=0.05, nms=dict(type='nms', iou_thr=0.5), max_per_img=100)
data_root = 'data/coco/'
img_norm_cfg = dict(mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], to_rgb=False)
test_pipeline = [dict(type='MultiScaleFlipAug', img_scale=(1333, 800), transforms=[
    dict(type='Resize', keep_ratio=True), dict(type='Normalize', **img_norm_cfg)])]
data = dict(test=dict(ann_file=data_root + 'a.json', pipeline=test_pipeline))
lr_config = dict(warmup_ratio=1.0 / 3)
"""


def save(path: Path, state: dict[str, Tensor], config: str | None = None, **entries: Any) -> Path:
    """A checkpoint of MMDetection 3.x; entries: beside its state_dict and meta."""
    meta = {"epoch": 12} | ({} if config is None else {"cfg": config, "mmdet_version": "3.3.0"})
    torch.save({"meta": meta, "state_dict": state, **entries}, path)
    return path
