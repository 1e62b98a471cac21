"""Importing MMDetection's and torchvision's checkpoints: what is written, what is refused, and what is said."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import detection
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights

from msil.checkpoints.coco_names import COCO_CATEGORY_IDS, COCO_CLASSES
from msil.checkpoints.description import read_description
from msil.checkpoints.importer import import_checkpoint, report_lines
from msil.checkpoints.load import load_detector
from msil.data.voc import VOC_CLASSES
from msil.errors import ConfigError, WeightsError

from .theirs import HEADS, config_1x, config_3x, numbered_state, save

FORMS = tuple(HEADS)


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, Tensor]]:
    return {form: numbered_state(form) for form in FORMS}


def with_classes(state: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    return state | {key: state[key][:count] for key in ("bbox_head.conv_cls.weight", "bbox_head.conv_cls.bias")}


def test_coco_is_as_torchvision_knows_it() -> None:
    names = FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    assert [i for i, name in enumerate(names) if name not in ("__background__", "N/A")] == list(COCO_CATEGORY_IDS)
    assert tuple(names[i] for i in COCO_CATEGORY_IDS) == COCO_CLASSES


@pytest.mark.parametrize("form", FORMS)
def test_an_imported_detector_loads(form: str, states: dict, tmp_path: Path) -> None:
    path = save(tmp_path / "theirs.pth", states[form], config_3x(form, scale="(160, 96)"))
    out = tmp_path / "deep" / "ours.safetensors"
    report = import_checkpoint(path, "mmdet", out)
    detector, description = load_detector(out)
    assert (description.min_size, description.max_size) == (96, 160)
    assert (description.classes, description.category_ids) == (COCO_CLASSES, COCO_CATEGORY_IDS)
    assert description.source == "MMDetection 3.3.0: theirs.pth"
    assert (detector.score_thresh, detector.nms_thresh) == (0.05, 0.5 if form in ("plain", "retinanet") else 0.6)
    theirs = states[form]
    own = detector.state_dict()
    assert torch.equal(own["backbone.layer3.0.conv2.weight"], theirs["backbone.layer3.0.conv2.weight"])
    assert torch.equal(own["fpn.fpn_convs.4.bias"], theirs["neck.fpn_convs.4.conv.bias"])
    classifier = next(key for key in theirs if key.endswith("_cls.bias"))
    assert torch.equal(own["head.cls_logits.bias"], theirs[classifier])
    if form != "retinanet":
        assert own["head.scales"].tolist() == [theirs[f"bbox_head.scales.{i}.scale"].item() for i in range(5)]
    # Every name is accounted for once.
    assert len(report.matched) + len(report.renamed) + len(report.left_over) == len(theirs)
    assert report.missing == []
    assert all(key.endswith(("num_batches_tracked", "integral.project")) for key in report.left_over)
    assert all(key.startswith("backbone.") for key in report.matched)


def test_the_file_is_plain_and_readable_by_others(states: dict, tmp_path: Path) -> None:
    path = save(tmp_path / "theirs.pth", states["plain"], config_3x("plain"))
    out = tmp_path / "ours.safetensors"
    out.write_text("an older file")
    import_checkpoint(path, "mmdet", out)
    with safe_open(out, framework="pt") as file:
        assert file.metadata().keys() == {"msil"}
        assert file.get_tensor("head.cls_logits.bias").dtype == torch.float32
    touched = tmp_path / "touched"
    touched.touch()
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE(touched.stat().st_mode)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ours.safetensors", "theirs.pth", "touched"]


def test_the_form_comes_from_the_config(states: dict, tmp_path: Path) -> None:
    out = tmp_path / "ours.safetensors"
    for form, on in (("plain", False), ("improved", True)):
        import_checkpoint(save(tmp_path / "a.pth", states[form], config_3x(form)), "mmdet", out)
        description = read_description(out)
        assert description is not None
        head = description.model.head
        flags = ("conv_bias", "center_sampling", "centerness_on_reg", "norm_on_bbox")
        assert [head[flag] for flag in flags] == [on] * 4
        assert head["loss_bbox"] == ("giou" if on else "iou")


@pytest.mark.parametrize(
    ("form", "options", "needed"),
    [
        ("plain", {}, ["--style caffe", "--form improved"]),
        ("plain", {"style": "pytorch"}, ["--form improved"]),
        ("plain", {"form": "plain"}, ["--style caffe"]),
        *((form, {}, ["--style caffe"]) for form in ("vfnet", "retinanet", "atss", "gfl", "tood")),
    ],
)
def test_what_a_bare_checkpoint_does_not_say_is_asked_for(
    form: str, options: dict, needed: list[str], states: dict, tmp_path: Path
) -> None:
    path, out = save(tmp_path / "bare.pth", states[form]), tmp_path / "ours.safetensors"
    with pytest.raises(ConfigError) as caught:
        import_checkpoint(path, "mmdet", out, **options)
    asked = {option for option in ("--style caffe", "--form improved") if option in str(caught.value)}
    assert asked == set(needed)
    assert not out.exists()


@pytest.fixture(scope="module")
def bottlenecks() -> dict[str, dict[str, Tensor]]:
    return {form: numbered_state(form, backbone="resnet50") for form in FORMS}


@pytest.mark.parametrize(
    ("form", "style", "mean", "norm"),
    [  # SEMANTICS, section 5
        ("plain", "caffe", [102.9801, 115.9465, 122.7717], "frozen_bn"),
        ("improved", "caffe", [103.53, 116.28, 123.675], "frozen_bn"),
        ("vfnet", "caffe", [103.53, 116.28, 123.675], "eval_bn"),
        ("retinanet", "caffe", [103.53, 116.28, 123.675], "frozen_bn"),
        *((form, "pytorch", [123.675, 116.28, 103.53], "eval_bn") for form in FORMS if form != "improved"),
    ],
)
def test_what_the_options_imply(
    form: str, style: str, mean: list[float], norm: str, states: dict, bottlenecks: dict, tmp_path: Path
) -> None:
    path, out = tmp_path / "bare.pth", tmp_path / "ours.safetensors"
    torch.save((bottlenecks if style == "caffe" else states)[form], path)  # without any wrapping
    import_checkpoint(path, "mmdet", out, style=style, form=form if form in ("plain", "improved") else None)
    description = read_description(out)
    assert description is not None
    model = description.model
    assert model.backbone == {
        "name": "resnet50" if style == "caffe" else "resnet18", "style": style, "norm": norm, "frozen_stages": 1,
        "weights": None,
    }  # fmt: skip
    assert (model.channel_order, model.image_mean) == ("bgr" if style == "caffe" else "rgb", mean)
    assert model.image_std == ([1.0, 1.0, 1.0] if style == "caffe" else [58.395, 57.12, 57.375])
    assert model.nms_thresh == (0.5 if form in ("plain", "retinanet") else 0.6)
    assert (description.min_size, description.max_size) == (800, 1333)
    assert (model.channels, model.head["num_convs"]) == (32, {"vfnet": 3, "tood": 6}.get(form, 4))
    assert model.head["norm_groups"] == (None if form == "retinanet" else 32)
    assert model.msil.apply == "none"


@pytest.mark.parametrize(
    ("form", "config", "options", "message"),
    [
        ("vfnet", True, {"style": "caffe"}, "says in its config that its ResNet is of style pytorch"),
        ("vfnet", True, {"form": "improved"}, "is MMDetection's VFNet, which has one form"),
        ("gfl", False, {"style": "pytorch", "form": "plain"}, "is MMDetection's GFL, which has one form"),
        ("plain", True, {"form": "improved"}, "says center_sampling=False in its config"),
        ("improved", True, {"form": "plain"}, "says center_sampling=True in its config"),
        ("improved", False, {"style": "pytorch", "form": "plain"}, "has biases in the towers"),
        ("plain", True, {"classes": ["cat", "dog"]}, "has 80 classes: give so many different names"),
        ("plain", True, {"classes": ["cat"] * 80}, "has 80 classes: give so many different names"),
        ("plain", True, {"style": "tensorflow"}, "--style must be pytorch or caffe, not 'tensorflow'"),
        ("plain", True, {"form": "giou"}, "--form must be plain or improved, not 'giou'"),
    ],
)
def test_options_that_contradict_are_refused(
    form: str, config: bool, options: dict, message: str, states: dict, tmp_path: Path
) -> None:
    path, out = save(tmp_path / "a.pth", states[form], config_3x(form) if config else None), tmp_path / "o.safetensors"
    with pytest.raises(ConfigError, match=message):
        import_checkpoint(path, "mmdet", out, **options)
    assert not out.exists()


def test_options_that_agree_are_taken(states: dict, tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", states["improved"], config_3x("improved"))
    import_checkpoint(path, "mmdet", tmp_path / "o.safetensors", style="pytorch", form="improved")


def test_other_sources_and_names_are_refused(states: dict, tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", states["plain"], config_3x("plain"))
    with pytest.raises(ConfigError, match="--from must be mmdet or torchvision, not 'keras'"):
        import_checkpoint(path, "keras", tmp_path / "o.safetensors")
    with pytest.raises(ConfigError, match=r"o\.pth must be named FILE\.safetensors"):
        import_checkpoint(path, "mmdet", tmp_path / "o.pth")
    with pytest.raises(ConfigError, match="is MMDetection's, by its key names: give --from mmdet"):
        import_checkpoint(path, "torchvision", tmp_path / "o.safetensors")
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="cannot be written"):
        import_checkpoint(path, "mmdet", tmp_path / "file" / "o.safetensors")


def describe(tmp_path: Path, state: dict[str, Tensor], meta: dict, **options: Any) -> tuple:
    path, out = tmp_path / "a.pth", tmp_path / "o.safetensors"
    torch.save({"state_dict": state, "meta": meta}, path)
    import_checkpoint(path, "mmdet", out, style="pytorch", form="plain", **options)
    description = read_description(out)
    assert description is not None
    return description.classes, description.category_ids


def test_class_names(states: dict, tmp_path: Path) -> None:
    state = states["plain"]
    three = ("a", "b", "c")
    assert describe(tmp_path, state, {}) == (COCO_CLASSES, COCO_CATEGORY_IDS)
    assert describe(tmp_path, with_classes(state, 20), {}) == (VOC_CLASSES, tuple(range(1, 21)))
    assert describe(tmp_path, with_classes(state, 3), {"CLASSES": three}) == (three, (1, 2, 3))
    assert describe(tmp_path, with_classes(state, 3), {}, classes=list(three)) == (three, (1, 2, 3))
    names = tuple(f"class {i}" for i in range(80))
    assert describe(tmp_path, state, {"dataset_meta": {"classes": names}}) == (names, tuple(range(1, 81)))
    with pytest.raises(ConfigError, match="does not name its 3 classes: give them with --classes"):
        describe(tmp_path, with_classes(state, 3), {})
    with pytest.raises(ConfigError, match="names its own classes, with 'b' for 'x'"):
        describe(tmp_path, with_classes(state, 3), {"CLASSES": three}, classes=["a", "x", "c"])
    with pytest.raises(ConfigError, match="names 3 classes while its classifier has 80: give their names"):
        describe(tmp_path, state, {"CLASSES": three})


def test_a_classifier_of_another_size_than_the_configs_is_refused(states: dict, tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", with_classes(states["plain"], 20), config_3x("plain"))
    with pytest.raises(WeightsError, match="a classifier of 20 classes and a config of 80"):
        import_checkpoint(path, "mmdet", tmp_path / "o.safetensors")


def test_an_incomplete_checkpoint_is_not_written(states: dict, tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    absent = ("backbone.layer2.1.bn1.weight", "neck.lateral_convs.1.conv.bias", "bbox_head.vfnet_cls_dconv.weight")
    state = {key: value for key, value in states["vfnet"].items() if key not in absent}
    with pytest.raises(WeightsError) as caught:
        import_checkpoint(save(tmp_path / "a.pth", state, config_3x("vfnet")), "mmdet", out)
    for name in ("backbone.layer2.1.bn1.weight", "fpn.lateral_convs.1.bias", "head.cls_star.weight"):
        assert name in str(caught.value)
    state = dict(states["vfnet"])
    del state["bbox_head.vfnet_cls.bias"]
    with pytest.raises(WeightsError, match="lacks the head's classifier"):
        import_checkpoint(save(tmp_path / "a.pth", state, config_3x("vfnet")), "mmdet", out)
    state = {key: value for key, value in states["vfnet"].items() if key.startswith("backbone.")}
    with pytest.raises(WeightsError, match=r"holds no head of MMDetection's FCOS, VFNet, .*TOOD, by its key names"):
        import_checkpoint(save(tmp_path / "a.pth", state, config_3x("vfnet")), "mmdet", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("form", "config", "message"),
    [
        ("vfnet", config_3x("vfnet", depth=50), "has other shapes of|lacks"),
        ("vfnet", config_3x("vfnet", channels=64), "is not a whole vfnet on resnet18: it has other shapes of fpn"),
        ("vfnet", config_3x("plain"), "is not a whole fcos on resnet18: it lacks head"),
        ("improved", config_3x("improved").replace("conv_bias=True, ", ""), r"has, beyond that net, head\.cls_tower"),
        ("vfnet", config_3x("vfnet").replace("stacked_convs=3", "stacked_convs=4"), r"lacks head\.cls_tower\.3"),
        ("retinanet", config_3x("retinanet").replace("on_input", "on_output"), r"other shapes of fpn\.fpn_convs\.3"),
        ("gfl", config_3x("gfl").replace("reg_max=16", "reg_max=8"), r"other shapes of head\.bbox_reg"),
    ],
)
def test_weights_of_another_net_than_the_configs_are_refused(
    form: str, config: str, message: str, states: dict, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=message):
        import_checkpoint(save(tmp_path / "a.pth", states[form], config), "mmdet", tmp_path / "o.safetensors")


def test_unknown_keys_are_refused_by_name(states: dict, tmp_path: Path) -> None:
    state = states["plain"] | {"backbone.layer3.0.conv2.conv_offset.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"the key backbone\.layer3\.0\.conv2\.conv_offset\.weight is none of"):
        import_checkpoint(save(tmp_path / "a.pth", state, config_3x("plain")), "mmdet", tmp_path / "o.safetensors")
    odd = {key: value for key, value in states["plain"].items() if not key.startswith("backbone.layer3.1")}
    with pytest.raises(WeightsError, match="has a backbone with 2, 2, 1, 2 blocks"):
        import_checkpoint(
            save(tmp_path / "a.pth", odd), "mmdet", tmp_path / "o.safetensors", style="pytorch", form="plain"
        )


def test_prefixes_and_copies(states: dict, tmp_path: Path) -> None:
    plain = states["plain"]
    state = {f"module.{key}": value for key, value in plain.items()}
    state |= {"module.ema_backbone_conv1_weight": torch.zeros(1), "module.data_preprocessor.mean": torch.zeros(3)}
    path = save(tmp_path / "a.pth", state, config_3x("plain"), optimizer={"lr": 1.0}, ema_state_dict={})
    report = import_checkpoint(path, "mmdet", tmp_path / "o.safetensors")
    assert {key for key in report.left_over if not key.endswith("num_batches_tracked")} == {
        "ema_backbone_conv1_weight", "data_preprocessor.mean", "optimizer (beside the state_dict)",
        "ema_state_dict (beside the state_dict)",
    }  # fmt: skip
    detector, _ = load_detector(tmp_path / "o.safetensors")
    assert torch.equal(detector.state_dict()["backbone.conv1.weight"], plain["backbone.conv1.weight"])


def test_safetensors_and_the_format_before_pytorch_1_6(states: dict, tmp_path: Path) -> None:
    save_file({key: value.contiguous() for key, value in states["vfnet"].items()}, tmp_path / "a.safetensors")
    torch.save(
        {"state_dict": states["vfnet"], "meta": {"config": config_3x("vfnet"), "loss": np.float64(1.5)}},
        tmp_path / "a.pth", _use_new_zipfile_serialization=False,
    )  # fmt: skip
    import_checkpoint(tmp_path / "a.safetensors", "mmdet", tmp_path / "o.safetensors", style="pytorch")
    import_checkpoint(tmp_path / "a.pth", "mmdet", tmp_path / "p.safetensors")
    (first, _), (second, _) = (load_detector(tmp_path / name) for name in ("o.safetensors", "p.safetensors"))
    other = second.state_dict()
    assert all(torch.equal(value, other[key]) for key, value in first.state_dict().items())


def test_a_checkpoint_of_mmdetection_1(bottlenecks: dict, tmp_path: Path) -> None:
    """Other names for the predictors, a count of classes with the background, and the config as its file was."""
    state = {
        key.replace("bbox_head.conv_", "bbox_head.fcos_"): value
        for key, value in bottlenecks["plain"].items()
        if not key.endswith("num_batches_tracked")
    }
    path, out = tmp_path / "a.pth", tmp_path / "o.safetensors"
    for version in ("1.0rc1+a1b2c3d", "2.3.0"):
        meta = {"mmdet_version": version, "config": config_1x(), "CLASSES": COCO_CLASSES}
        torch.save({"meta": meta, "state_dict": state}, path)
        if version == "2.3.0":
            with pytest.raises(WeightsError, match="a classifier of 80 classes and a config of 81"):
                import_checkpoint(path, "mmdet", tmp_path / "p.safetensors")
        else:
            import_checkpoint(path, "mmdet", out)
    detector, description = load_detector(out)
    assert (detector.channel_order, detector.nms_thresh) == ("bgr", 0.5)
    assert detector.image_mean.tolist() == pytest.approx([102.9801, 115.9465, 122.7717])
    assert (description.model.backbone["style"], description.max_size) == ("caffe", 1333)
    own = detector.state_dict()
    assert own["head.bbox_ctrness.bias"].item() == state["bbox_head.fcos_centerness.bias"].item()


def test_weights_that_are_no_numbers_are_refused(states: dict, tmp_path: Path) -> None:
    broken = {**states["vfnet"], "bbox_head.vfnet_cls.bias": torch.full((80,), torch.nan)}
    path = save(tmp_path / "theirs.pth", broken, config_3x("vfnet"))
    with pytest.raises(WeightsError, match=r"no finite numbers in head\.cls_logits\.bias"):
        import_checkpoint(path, "mmdet", tmp_path / "ours.safetensors")
    assert not (tmp_path / "ours.safetensors").exists()


def torchvision_state(name: str, classes: int) -> dict[str, Tensor]:
    """The keys of torchvision's detector, in the room of one number each."""
    with torch.device("meta"):
        model = detection.__dict__[name](weights=None, weights_backbone=None, num_classes=classes)
    return {key: torch.zeros(()).expand(value.shape) for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", ["fcos_resnet50_fpn", "retinanet_resnet50_fpn"])
def test_torchvisions_channels_of_other_data(name: str, tmp_path: Path) -> None:
    state = torchvision_state(name, 4)
    anchors = 1 if name.startswith("fcos") else 9
    # Anchor by anchor: the background and three classes.
    state["head.classification_head.cls_logits.bias"] = torch.arange(4.0).repeat(anchors)
    path, out = tmp_path / "tv.pth", tmp_path / "o.safetensors"
    torch.save(state, path)
    with pytest.raises(ConfigError, match="does not name its 3 classes"):
        import_checkpoint(path, "torchvision", out)
    for wrong in ({"style": "caffe"}, {"form": "plain"}):
        with pytest.raises(ConfigError, match=f"is torchvision's {name}, which .*: leave --{next(iter(wrong))} out"):
            import_checkpoint(path, "torchvision", out, **wrong)
    with pytest.raises(ConfigError, match="is torchvision's, by its key names: give --from torchvision"):
        import_checkpoint(path, "mmdet", out, style="pytorch", form="improved")
    report = import_checkpoint(path, "torchvision", out, classes=["a", "b", "c"])
    detector, description = load_detector(out)
    assert (description.classes, description.category_ids) == (("a", "b", "c"), (1, 2, 3))
    assert detector.state_dict()["head.cls_logits.bias"].tolist() == [1.0, 2.0, 3.0] * anchors
    assert bool(report.missing) == (anchors == 1)
    assert all(line.startswith("head.scales: ones") for line in report.missing)
    assert "class 0 of head.classification_head.cls_logits: the background" in report.left_over


@pytest.mark.parametrize(
    ("name", "norm", "head", "selection"),
    [
        ("fcos_resnet50_fpn", "frozen_bn", {"norm_groups": 32, "conv_bias": True, "point_offset": 0.0}, (0.6, 100)),
        ("retinanet_resnet50_fpn", "frozen_bn",
         {"norm_groups": None, "extra_convs": "on_output", "relu_before_extra_convs": True, "whole_anchors": True},
         (0.5, 300)),
        ("retinanet_resnet50_fpn_v2", "bn",
         {"norm_groups": 32, "extra_convs": "on_input", "relu_before_extra_convs": True, "whole_anchors": True},
         (0.5, 300)),
    ],
)  # fmt: skip
def test_torchvisions_published_detectors(
    name: str, norm: str, head: dict, selection: tuple[float, int], tmp_path: Path
) -> None:
    path, out = tmp_path / "tv.pth", tmp_path / "o.safetensors"
    torch.save(torchvision_state(name, 91), path)
    import_checkpoint(path, "torchvision", out)
    description = read_description(out)
    assert description is not None
    model = description.model
    assert (description.classes, description.category_ids) == (COCO_CLASSES, COCO_CATEGORY_IDS)
    assert (description.min_size, description.max_size, model.channel_order) == (800, 1333, "rgb")
    assert (model.backbone["name"], model.backbone["style"], model.backbone["norm"]) == ("resnet50", "pytorch", norm)
    assert model.head.items() >= head.items()
    assert (model.score_thresh, model.topk_candidates) == (0.05, 1000)
    assert (model.nms_thresh, model.detections_per_img) == selection


@pytest.mark.parametrize("form", ["improved", "tood"])  # of the most names each
def test_the_report_of_a_whole_detector_is_short(form: str, bottlenecks: dict, tmp_path: Path) -> None:
    config = config_3x(form, depth=50, style="caffe")
    report = import_checkpoint(save(tmp_path / "a.pth", bottlenecks[form], config), "mmdet", tmp_path / "o.safetensors")
    lines = report_lines(report)
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
    text = "\n".join(report.settings)
    assert "style caffe" in text and "BGR" in text
