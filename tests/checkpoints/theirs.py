"""Made-up checkpoints in MMDetection's names and words, from a small table of our own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor

LEVELS = range(5)
CAFFE_MEAN = "[103.53, 116.28, 123.675]"

ONE_ANCHOR = "octave_base_scale=8, scales_per_octave=1, ratios=[1.0]"
DELTAS = "bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[.0, .0, .0, .0], target_stds={})"
ANCHORS = "anchor_generator=dict(type='AnchorGenerator', {}, strides=[8, 16, 32, 64, 128])"


class Head(NamedTuple):
    """kind, detector: MMDetection's types. switches: of the published config. predictors: channels of each 3x3
    convolution, classes as 0. convs: a tower."""

    kind: str
    detector: str
    switches: str
    predictors: dict[str, int]
    convs: int = 4


HEADS = {
    "plain": Head(
        "FCOSHead", "FCOS", "strides=[8, 16, 32, 64, 128], loss_bbox=dict(type='IoULoss', loss_weight=1.0)",
        {"conv_cls": 0, "conv_reg": 4, "conv_centerness": 1},
    ),
    "improved": Head(
        "FCOSHead", "FCOS", "strides=[8, 16, 32, 64, 128], norm_on_bbox=True, centerness_on_reg=True, "
        "center_sampling=True, conv_bias=True, loss_bbox=dict(type='GIoULoss', loss_weight=1.0)",
        {"conv_cls": 0, "conv_reg": 4, "conv_centerness": 1},
    ),
    "vfnet": Head(
        "VFNetHead", "VFNet", "strides=[8, 16, 32, 64, 128], use_atss=True, use_vfl=True, "
        "loss_bbox=dict(type='GIoULoss', loss_weight=1.5)",
        {"vfnet_cls": 0, "vfnet_reg": 4, "vfnet_reg_refine": 4}, convs=3,
    ),
    "retinanet": Head(
        "RetinaHead", "RetinaNet", DELTAS.format([1.0] * 4) + ", "
        + ANCHORS.format("octave_base_scale=4, scales_per_octave=3, ratios=[0.5, 1.0, 2.0]"),
        {"retina_cls": 0, "retina_reg": 9 * 4},
    ),
    "atss": Head(
        "ATSSHead", "ATSS", DELTAS.format([0.1, 0.1, 0.2, 0.2]) + ", " + ANCHORS.format(ONE_ANCHOR),
        {"atss_cls": 0, "atss_reg": 4, "atss_centerness": 1},
    ),
    "gfl": Head("GFLHead", "GFL", ANCHORS.format(ONE_ANCHOR) + ", reg_max=16", {"gfl_cls": 0, "gfl_reg": 4 * 17}),
    "tood": Head(
        "TOODHead", "TOOD", "anchor_type='anchor_free', " + ANCHORS.format(ONE_ANCHOR), {"tood_cls": 0, "tood_reg": 4},
        convs=6,
    ),
}  # fmt: skip


def shapes(form: str, backbone: str, channels: int, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a whole detector. form: of HEADS."""
    found = body_shapes(form, backbone, channels)
    if form == "tood":
        found |= _tood(channels)
    else:
        for i in range(HEADS[form].convs):
            for branch in ("cls", "reg"):
                name, bias = f"bbox_head.{branch}_convs.{i}", form in ("improved", "retinanet")
                plain = form == "retinanet"
                found |= _conv(f"{name}.conv", channels, channels, 3, bias) if plain else _conv_gn(name, channels, bias)
    if form == "vfnet":
        found |= _conv_gn("bbox_head.vfnet_reg_conv", channels, bias=False)
        for star in ("vfnet_cls_dconv", "vfnet_reg_refine_dconv"):
            found |= _conv(f"bbox_head.{star}", channels, channels, 3, bias=False)
        found |= {f"bbox_head.scales_refine.{i}.scale": () for i in LEVELS}
    if form == "gfl":
        found["bbox_head.integral.project"] = (17,)
    for name, width in HEADS[form].predictors.items():
        width = width or num_classes * (9 if form == "retinanet" else 1)
        found |= _conv(f"bbox_head.{name}", channels, width, 3, bias=True)
    return found if form == "retinanet" else found | {f"bbox_head.scales.{i}.scale": () for i in LEVELS}


def body_shapes(form: str, backbone: str, channels: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of its backbone and neck."""
    with torch.device("meta"):
        body = torchvision.models.get_model(backbone).state_dict()
    found = {f"backbone.{key}": tuple(value.shape) for key, value in body.items() if not key.startswith("fc.")}
    stages = (128, 256, 512) if backbone == "resnet18" else (512, 1024, 2048)
    for i, width in enumerate(stages):
        found |= _conv(f"neck.lateral_convs.{i}.conv", width, channels, 1, bias=True)
    for i in LEVELS:
        width = stages[-1] if i == 3 and form == "retinanet" else channels  # P6 from C5
        found |= _conv(f"neck.fpn_convs.{i}.conv", width, channels, 3, bias=True)
    return found


def _tood(channels: int) -> dict[str, tuple[int, ...]]:
    convs = HEADS["tood"].convs
    found: dict[str, tuple[int, ...]] = {}
    for i in range(convs):
        found |= _conv_gn(f"bbox_head.inter_convs.{i}", channels, bias=False)
    for task in ("cls", "reg"):
        name = f"bbox_head.{task}_decomp"
        found |= _conv(f"{name}.layer_attention.0", convs * channels, channels // 8, 1, bias=True)
        found |= _conv(f"{name}.layer_attention.2", channels // 8, convs, 1, bias=True)
        found |= {f"{name}.reduction_conv.conv.weight": (channels, convs * channels, 1, 1)}
        found |= {f"{name}.reduction_conv.gn.{end}": (channels,) for end in ("weight", "bias")}
    for name, width in (("cls_prob_module", 1), ("reg_offset_module", 8)):
        found |= _conv(f"bbox_head.{name}.0", convs * channels, channels // 4, 1, bias=True)
        found |= _conv(f"bbox_head.{name}.2", channels // 4, width, 3, bias=True)
    return found


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
    form: str,
    *,
    depth: int = 18,
    style: str = "pytorch",
    channels: int = 32,
    scale: str = "(1333, 800)",
    convs: int | None = None,
    classes: int = 80,
    norm: str = "",
) -> str:
    """As in meta["cfg"] of MMDetection 3.x. norm: the head's norm_cfg, where it is not its default."""
    caffe, head = style == "caffe", HEADS[form]
    stages = [64, 128, 256, 512] if depth == 18 else [256, 512, 1024, 2048]
    extra = {"retinanet": "add_extra_convs='on_input'"}.get(form, "add_extra_convs='on_output'")
    if form in ("plain", "improved", "vfnet"):
        extra += ", relu_before_extra_convs=True"
    return f"""
default_scope = 'mmdet'
model = dict(
    type='{head.detector}',
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
        type='FPN', in_channels={stages}, out_channels={channels}, start_level=1,
        num_outs=5, {extra}),
    bbox_head=dict(
        type='{head.kind}', num_classes={classes}, in_channels={channels},
        stacked_convs={head.convs if convs is None else convs}, feat_channels={channels}, {norm}
        {head.switches}),
    train_cfg=None,
    test_cfg=dict(
        nms_pre=1000, min_bbox_size=0, score_thr=0.05,
        nms=dict(type='nms', iou_threshold={0.5 if form in ("plain", "retinanet") else 0.6}), max_per_img=100))
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


def save(path: Path, state: Mapping[str, Tensor], config: str | None = None, **entries: Any) -> Path:
    """A checkpoint of MMDetection 3.x; entries: beside its state_dict and meta."""
    meta = {"epoch": 12} | ({} if config is None else {"cfg": config, "mmdet_version": "3.3.0"})
    torch.save({"meta": meta, "state_dict": state, **entries}, path)
    return path
