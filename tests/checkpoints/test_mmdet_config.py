"""Reading the configuration text in a checkpoint of MMDetection."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from msil.checkpoints.assemble import head_options
from msil.checkpoints.conventions import FORMS, LAYOUTS, SELECTION, Images, Settings, model_config, published
from msil.checkpoints.mmdet_config import classes_of, config_of, parse_config, settings_of
from msil.errors import WeightsError

from .theirs import config_2x, config_3x


def test_literals_are_read() -> None:
    text = "a = 1\nb = dict(x=-1.5, y=(1, 'two', None), z={'k': [True], 3: inf})\nc = ()\n"
    assert parse_config(text) == {
        "a": 1,
        "b": {"x": -1.5, "y": [1, "two", None], "z": {"k": [True], 3: float("inf")}},
        "c": [],
    }


@pytest.mark.parametrize(
    "value",
    ["a", "f()", "dict(1)", "dict(**a)", "{**a}", "[x for x in a]", "lambda: 1", "'a' + 'b'", "a.b", "-'x'", "b'x'",
     "f'{a}'", "{a: 1}", "1j", "...", "dict(x=__import__('os').system('true'))"],
)  # fmt: skip
def test_what_is_no_literal_is_left_out(value: str) -> None:
    assert parse_config(f"a = 1\nb = {value}\nc = dict(d={value})") == {"a": 1}


def test_nothing_is_executed(tmp_path: Path) -> None:
    trap = tmp_path / "pwned"
    call = f"__import__('pathlib').Path({str(trap)!r}).touch()"
    parse_config(f"a = {call}\n{call}\nimport antigravity\nb = dict(x={call})\nclass C:\n    y = {call}\n")
    assert not trap.exists()
    eval(call)
    assert trap.exists()  # the trap does work


@pytest.mark.parametrize("text", ["model = dict(", "\0", "x y\nmodel = dict()", "(" * 100000, ""])
def test_what_is_no_python_is_no_config(text: str) -> None:
    assert config_of({"config": text}) is None


def test_a_config_that_refers_to_files_is_no_config() -> None:
    assert config_of({"config": "_base_ = ['a.py']\nmodel = dict(bbox_head=dict(norm_on_bbox=True))"}) is None
    assert config_of({"cfg": 3, "epoch": 12}) is None


IMAGENET = Images("rgb", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), 800, 1333)


def body(name: str, style: str, norm: str) -> dict:
    return {"name": name, "style": style, "norm": norm, "frozen_stages": 1}


def head(name: str, convs: int, relu: bool = False, **options: object) -> dict:
    return {
        "name": name, "num_convs": convs, "norm_groups": 32, "extra_convs": "on_output",
        "relu_before_extra_convs": relu, **options,
    }  # fmt: skip


R50 = body("resnet50", "pytorch", "eval_bn")
RETINANET = head("retinanet", 4) | {"norm_groups": None, "extra_convs": "on_input"}


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        (
            config_3x("vfnet", depth=50, channels=256),
            Settings(head("vfnet", 3, True), R50, IMAGENET, SELECTION, 256, 80),
        ),
        (
            config_3x("improved", depth=101, style="caffe", channels=256, scale="(640, 360)"),
            Settings(
                head("fcos", 4, True, **FORMS["improved"]),
                body("resnet101", "caffe", "frozen_bn"),
                Images("bgr", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), 360, 640),
                SELECTION,
                256,
                80,
            ),
        ),
        (
            config_2x(),  # the pipeline's Normalize counts, not the variable that it was made of
            Settings(
                head("fcos", 4, True, **FORMS["plain"]),
                body("resnet50", "caffe", "frozen_bn"),
                Images("bgr", (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0), 600, 1000),
                {"score_thresh": 0.1, "nms_thresh": 0.55, "topk_candidates": 500, "detections_per_img": 50},
                256,
                80,
            ),
        ),
        (
            config_3x("retinanet", depth=50, channels=256),
            Settings(RETINANET, R50, IMAGENET, SELECTION | {"nms_thresh": 0.5}, 256, 80),
        ),
        (config_3x("atss", depth=50), Settings(head("atss", 4), R50, IMAGENET, SELECTION, 32, 80)),
        (config_3x("gfl", depth=50), Settings(head("gfl", 4, reg_max=16), R50, IMAGENET, SELECTION, 32, 80)),
        (config_3x("tood", depth=50), Settings(head("tood", 6), R50, IMAGENET, SELECTION, 32, 80)),
    ],
    ids=["vfnet 3.x", "improved 3.x", "plain 2.x", "retinanet", "atss", "gfl", "tood"],
)
def test_settings_of_published_configs(text: str, settings: Settings) -> None:
    config = config_of({"cfg": text})
    assert config is not None
    assert settings_of(config) == settings
    head_options(model_config(settings).head)  # every option is one of that head's


def settings(old: str, new: str, form: str = "vfnet") -> Settings:
    text = config_3x(form)
    assert text.count(old) >= 1
    return settings_of(parse_config(text.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("form", "old", "new", "found"),
    [
        ("vfnet", "norm_eval=True", "norm_eval=False", lambda s: s.backbone["norm"] == "bn"),
        ("vfnet", "type='BN'", "type='SyncBN'", lambda s: s.backbone["norm"] == "eval_bn"),
        ("vfnet", "frozen_stages=1", "frozen_stages=-1", lambda s: s.backbone["frozen_stages"] == 0),
        ("vfnet", "frozen_stages=1", "frozen_stages=3", lambda s: s.backbone["frozen_stages"] == 3),
        ("vfnet", "'VFNetHead'", "'mmdet.models.dense_heads.VFNetHead'", lambda s: s.head["name"] == "vfnet"),
        ("vfnet", "scale=(1333, 800)", "scale=[(600, 1000), (9, 9)]", lambda s: s.images.max_size == 1000),
        ("vfnet", "stacked_convs=3", "stacked_convs=2", lambda s: s.head["num_convs"] == 2),
        ("vfnet", "strides=", "norm_cfg=dict(type='GN', num_groups=8), strides=", lambda s: s.head["norm_groups"] == 8),
        ("plain", "strides=", "center_sampling=True, center_sample_radius=2, strides=",
         lambda s: (s.head["center_sampling"], s.head["center_sample_radius"]) == (True, 2.0)),
        ("improved", "conv_bias=True", "conv_bias='auto'", lambda s: not s.head["conv_bias"]),
        ("retinanet", "bbox_coder=", "norm_cfg=dict(type='GN', num_groups=32), bbox_coder=",
         lambda s: s.head["norm_groups"] == 32),
        ("retinanet", "'AnchorGenerator'", "'mmdet.models.task_modules.AnchorGenerator'",
         lambda s: s.head["name"] == "retinanet"),
        ("gfl", "reg_max=16", "reg_max=8", lambda s: s.head["reg_max"] == 8),
        ("atss", "'on_output'", "True", lambda s: s.head["extra_convs"] == "on_input"),  # True means the input
        ("atss", "'on_output'", "True, extra_convs_on_inputs=False", lambda s: s.head["extra_convs"] == "on_output"),
        ("atss", "'on_output'", "'on_output', relu_before_extra_convs=True",
         lambda s: s.head["relu_before_extra_convs"]),
        # The defaults of MMDetection where a config is silent.
        ("plain", "style='pytorch',", "", lambda s: s.backbone["style"] == "pytorch"),
        ("plain", ", loss_bbox=dict(type='IoULoss', loss_weight=1.0)", "", lambda s: s.head["loss_bbox"] == "iou"),
        ("plain", "bgr_to_rgb=True,", "", lambda s: s.images.channel_order == "bgr"),
        ("plain", "test_dataloader", "other", lambda s: (s.images.min_size, s.images.max_size) == (800, 1333)),
    ],
)  # fmt: skip
def test_a_changed_setting_is_seen(form: str, old: str, new: str, found) -> None:
    assert found(settings(old, new, form))


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("type='VFNet',", "type='FasterRCNN',", "model.type='FasterRCNN'"),
        ("'VFNetHead'", "'PAAHead'", "model.bbox_head.type='PAAHead'"),
        ("'on_output'", "'on_lateral'", "model.neck.add_extra_convs='on_lateral'"),
        ("'on_output'", "False", "model.neck.add_extra_convs=False"),
        ("type='ResNet',", "type='ResNeXt', groups=32,", "model.backbone.type='ResNeXt'"),
        ("depth=18", "depth=152", "model.backbone.depth=152"),
        ("num_stages=4", "dcn=dict(type='DCNv2')", "model.backbone.dcn={'type': 'DCNv2'}"),
        ("num_stages=4", "plugins=[dict(cfg=1)]", "model.backbone.plugins=[{'cfg': 1}]"),
        ("num_stages=4", "num_stages=3", "model.backbone.num_stages=3"),
        ("num_stages=4", "strides=(1, 2, 2, 1)", "model.backbone.strides=[1, 2, 2, 1]"),
        ("num_stages=4", "deep_stem=True", "model.backbone.deep_stem=True"),
        ("type='BN'", "type='GN'", "model.backbone.norm_cfg={'type': 'GN'"),
        ("style='pytorch'", "style='other'", "model.backbone.style='other'"),
        ("type='FPN'", "type='PAFPN'", "model.neck.type='PAFPN'"),
        ("num_outs=5", "num_outs=5, norm_cfg=dict(type='BN')", "model.neck.norm_cfg={'type': 'BN'}"),
        ("start_level=1", "start_level=0", "model.neck.start_level=0"),
        ("num_outs=5", "num_outs=6", "model.neck.num_outs=6"),
        ("use_atss=True", "use_atss=False", "model.bbox_head.use_atss=False"),
        ("use_atss=True", "bbox_norm_type='stride'", "model.bbox_head.bbox_norm_type='stride'"),
        ("use_atss=True", "dcn_on_last_conv=True", "model.bbox_head.dcn_on_last_conv=True"),
        ("use_atss=True", "anchor_generator=dict(center_offset=0.5)", "bbox_head.anchor_generator.center_offset=0.5"),
        ("[8, 16, 32, 64, 128]", "[4, 8, 16, 32, 64]", "model.bbox_head.strides=[4, 8, 16, 32, 64]"),
        ("strides=[8, 16, 32, 64, 128],", "", "model.bbox_head.strides=[4, 8, 16, 32, 64]"),
        ("type='nms'", "type='soft_nms'", "model.test_cfg.nms.type='soft_nms'"),
        # The upper ends are the reg_denom that VFNet's forward pass multiplies by.
        ("use_atss=True", "regress_ranges=((-1, 32), (32, 64), (64, 128), (128, 256), (256, 1e8))",
         "model.bbox_head.regress_ranges=[[-1, 32]"),
        ("use_vfl=True", "use_vfl=False", "model.bbox_head.use_vfl=False"),
        ("use_atss=True", "norm_cfg=dict(type='GN', eps=1e-3)", "model.bbox_head.norm_cfg.eps=0.001"),
        ("type='BN'", "type='BN', eps=1e-3", "model.backbone.norm_cfg.eps=0.001"),
        ("pad_size_divisor=32", "pad_size_divisor=128", "model.data_preprocessor.pad_size_divisor=128"),
        ("nms_pre=1000", "nms_pre=-1", "model.test_cfg.nms_pre=-1"),
        ("max_per_img=100", "max_per_img=-1", "model.test_cfg.max_per_img=-1"),
        ("min_bbox_size=0", "min_bbox_size=20", "model.test_cfg.min_bbox_size=20"),
        ("type='nms'", "type='nms', class_agnostic=True", "model.test_cfg.nms.class_agnostic=True"),
        ("type='LoadImageFromFile'", "type='LoadImageFromFile', channel_order='rgb'", "channel_order='rgb'"),
        ("keep_ratio=True", "keep_ratio=False", "Resize.keep_ratio=False"),
        ("neck=dict(", "other=dict(", "model.neck=None"),
        ("mean=[123.675, 116.28, 103.53]", "mean=[1.0, 2.0]", "the images' mean=[1.0, 2.0]"),
    ],
)  # fmt: skip
def test_another_net_is_refused_by_name(old: str, new: str, named: str) -> None:
    with pytest.raises(WeightsError) as caught:
        settings(old, new)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("form", "old", "new", "named"),
    [
        ("retinanet", "octave_base_scale=4", "octave_base_scale=3", "anchor_generator.octave_base_scale=3"),
        ("retinanet", "scales_per_octave=3", "scales_per_octave=1", "anchor_generator.scales_per_octave=1"),
        ("retinanet", "[0.5, 1.0, 2.0]", "[1.0]", "anchor_generator.ratios=[1.0]"),
        ("retinanet", "target_stds=[1.0, 1.0, 1.0, 1.0]", "target_stds=[0.1, 0.1, 0.2, 0.2]",  # FreeAnchor's
         "model.bbox_head.bbox_coder.target_stds=[0.1, 0.1, 0.2, 0.2]"),
        # Boxes of 1.x, a pixel wider
        ("retinanet", "'AnchorGenerator'", "'LegacyAnchorGenerator'", "anchor_generator.type='LegacyAnchorGenerator'"),
        ("retinanet", "'DeltaXYWHBBoxCoder'", "'LegacyDeltaXYWHBBoxCoder'", "type='LegacyDeltaXYWHBBoxCoder'"),
        ("retinanet", "anchor_generator=dict", "anchors=dict", "model.bbox_head.anchor_generator.type=None"),
        ("retinanet", "bbox_coder=", "norm_cfg=dict(type='BN'), bbox_coder=", "norm_cfg={'type': 'BN'}"),
        ("atss", "octave_base_scale=8, scales_per_octave=1", "scales=[8]", "anchor_generator.octave_base_scale=None"),
        ("atss", "ratios=[1.0]", "ratios=[1.0], center_offset=0.5", "anchor_generator.center_offset=0.5"),
        ("atss", "target_stds=[0.1, 0.1, 0.2, 0.2]", "other=1", "bbox_coder.target_stds=[1.0, 1.0, 1.0, 1.0]"),
        ("atss", "bbox_coder=", "pred_kernel_size=1, bbox_coder=", "model.bbox_head.pred_kernel_size=1"),
        ("gfl", "reg_max=16", "conv_cfg=dict(type='DCN')", "model.bbox_head.conv_cfg={'type': 'DCN'}"),
        ("tood", "'anchor_free'", "'anchor_based'", "model.bbox_head.anchor_type='anchor_based'"),
        ("tood", "anchor_type=", "num_dcn=2, anchor_type=", "model.bbox_head.num_dcn=2"),
    ],
)  # fmt: skip
def test_another_head_is_refused_by_name(form: str, old: str, new: str, named: str) -> None:
    with pytest.raises(WeightsError) as caught:
        settings(old, new, form)
    assert named in str(caught.value)


@pytest.mark.parametrize("name", ["fcos", "vfnet", "retinanet", "atss", "gfl", "tood"])
def test_mmdetections_own_configs(name: str) -> None:
    """All are taken but those with deformable convolutions, ResNeXt or TOOD's anchors, and as without their config."""
    mmengine = pytest.importorskip("mmengine.config", reason="needs mmdet and mmengine")
    mmdet = pytest.importorskip("mmdet", reason="needs mmdet and mmengine")
    files = sorted((Path(mmdet.__file__).parent / ".mim/configs" / name).glob("*_1x_coco.py"))
    assert files
    for file in files:
        config = config_of({"cfg": mmengine.Config.fromfile(file).pretty_text})
        assert config is not None
        if re.search("dcn|x101|anchor-based", file.name):
            with pytest.raises(WeightsError, match=r"dcn|ResNeXt|anchor_type"):
                settings_of(config)
            continue
        found = settings_of(config)
        depth, caffe = re.findall(r"_r(\d+)(-caffe)?", file.name)[0]
        style = "caffe" if caffe else "pytorch"
        assert (found.head["name"], found.channels, found.num_classes) == (name, 256, 80)
        assert (found.backbone["name"], found.backbone["style"]) == (f"resnet{depth}", style)
        if "head-center_" in file.name:
            continue  # neither of FCOS's two forms
        form = "improved" if "centeronreg" in file.name else "plain" if name == "fcos" else None
        layout = next(row for row in LAYOUTS if (row.source, row.head, row.form) == ("mmdet", name, form))
        bare = published(layout, style, f"resnet{depth}", 256, {})
        assert (found.backbone, found.selection, found.images) == (bare.backbone, bare.selection, bare.images)
        assert head_options(found.head) == head_options(bare.head)


def test_other_box_losses_of_fcos_are_refused_by_name() -> None:
    with pytest.raises(WeightsError, match=r"model\.bbox_head\.loss_bbox\.type='DIoULoss'"):
        settings("type='IoULoss'", "type='DIoULoss'", "plain")


@pytest.mark.parametrize("variant", ["linear=True", "mode='square'"])
def test_other_variants_of_the_iou_loss_are_refused_by_name(variant: str) -> None:
    with pytest.raises(WeightsError, match=r"model\.bbox_head\.loss_bbox\.(linear|mode)="):
        settings("type='IoULoss'", f"type='IoULoss', {variant}", "plain")


def test_a_config_without_normalisation_is_refused() -> None:
    with pytest.raises(WeightsError, match="nowhere how images are normalised"):
        settings("data_preprocessor=", "other=")


def test_values_of_a_wrong_type_are_one_sentence() -> None:
    with pytest.raises(WeightsError, match="is not as MMDetection writes it"):
        settings("stacked_convs=3", "stacked_convs=[3]")


@pytest.mark.parametrize(
    ("meta", "classes"),
    [
        ({"CLASSES": ("a", "b")}, ("a", "b")),
        ({"CLASSES": ["a", "b"]}, ("a", "b")),
        ({"dataset_meta": {"classes": ("a", "b"), "palette": [(1, 2, 3)]}}, ("a", "b")),
        ({"dataset_meta": {"CLASSES": ("a",)}}, ("a",)),
        ({"CLASSES": "a"}, ("a",)),
        ({"CLASSES": None}, None),
        ({"CLASSES": (1, 2), "dataset_meta": 3}, None),
        ({}, None),
    ],
)
def test_classes(meta: dict, classes: tuple[str, ...] | None) -> None:
    assert classes_of(meta) == classes
