"""Importing MMDetection's and torchvision's checkpoints: what is written, what is refused; no code in them is run."""

from __future__ import annotations

import pickle
import stat
import sys
from collections import deque
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from msil.checkpoints.convert import import_checkpoint
from msil.checkpoints.description import Description
from msil.checkpoints.layouts import COCO_CATEGORY_IDS, COCO_CLASSES
from msil.checkpoints.load import load_detector
from msil.data.readers.voc import VOC_CLASSES
from msil.errors import ConfigError, WeightsError

from .theirs import PREDICTORS, mmdet_state, torchvision_state

HEADS = tuple(PREDICTORS)


def imported(folder: Path, content: Any, source: str = "mmdet", **options: Any) -> tuple[Any, Description]:
    """The detector of a checkpoint that went through a file of theirs and one of ours."""
    torch.save(content, folder / "theirs.pth")
    import_checkpoint(folder / "theirs.pth", source, folder / "ours.safetensors", **options)
    return load_detector(folder / "ours.safetensors")


def options_of(head: str, style: str = "pytorch") -> dict[str, str]:
    return {"style": style} | ({"head": head} if head.startswith("fcos") else {})


def refused(tmp_path: Path, error: type[Exception], message: str, content: Any, **options: Any) -> str:
    with pytest.raises(error, match=message) as caught:
        imported(tmp_path, content, **options)
    assert not (tmp_path / "ours.safetensors").exists() and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("head", "style", "mean", "norm"),
    [  # SEMANTICS, section 5
        ("fcos_plain", "caffe", [102.9801, 115.9465, 122.7717], "frozen_bn"),
        ("fcos", "caffe", [103.53, 116.28, 123.675], "frozen_bn"),
        ("vfnet", "caffe", [103.53, 116.28, 123.675], "eval_bn"),
        ("retinanet", "caffe", [103.53, 116.28, 123.675], "frozen_bn"),
        *((head, "pytorch", [123.675, 116.28, 103.53], "eval_bn") for head in HEADS),
    ],
)
def test_mmdetections_published_detectors(head: str, style: str, mean: list[float], norm: str, tmp_path: Path) -> None:
    theirs = mmdet_state(head, "resnet50" if style == "caffe" else "resnet18")
    detector, description = imported(tmp_path, {"state_dict": theirs, "meta": {}}, **options_of(head, style))
    own, model = detector.state_dict(), description.model
    assert (description.classes, description.category_ids) == (COCO_CLASSES, COCO_CATEGORY_IDS)
    assert (description.min_size, description.max_size) == (800, 1333)
    assert model.backbone == {
        "name": "resnet50" if style == "caffe" else "resnet18", "style": style, "norm": norm, "frozen_stages": 1,
        "weights": None,
    }  # fmt: skip
    assert (model.channel_order, model.image_mean) == ("bgr" if style == "caffe" else "rgb", mean)
    assert model.image_std == ([1.0, 1.0, 1.0] if style == "caffe" else [58.395, 57.12, 57.375])
    assert (model.score_thresh, model.nms_thresh) == (0.05, 0.5 if head in ("fcos_plain", "retinanet") else 0.6)
    assert (model.channels, model.head["num_convs"]) == (32, {"vfnet": 3, "tood": 6}.get(head, 4))
    assert model.head["norm_groups"] == (None if head == "retinanet" else 32)
    assert model.msil.apply == "none"
    if head.startswith("fcos"):
        flags = ("conv_bias", "center_sampling", "centerness_on_reg", "norm_on_bbox")
        assert [model.head[flag] for flag in flags] == [head == "fcos"] * 4  # compared with typed ones
        assert model.head["loss_bbox"] == ("giou" if head == "fcos" else "iou")
    # Each tensor is there once: its number shows which it was.
    assert torch.equal(own["backbone.layer3.0.conv2.weight"], theirs["backbone.layer3.0.conv2.weight"])
    assert torch.equal(own["fpn.fpn_convs.4.bias"], theirs["neck.fpn_convs.4.conv.bias"])
    classifier = next(key for key in theirs if key.endswith("_cls.bias"))
    assert torch.equal(own["head.cls_logits.bias"], theirs[classifier])
    scales = [theirs[key].item() for key in theirs if ".scales." in key]
    assert scales == (own["head.scales"].tolist() if scales else [])
    numbers = sorted({value.flatten()[0].item() for key, value in own.items() if "scales" not in key})
    dropped = ("num_batches_tracked", "integral.project", ".scale")
    counted = {key: value for key, value in own.items() if not key.endswith("num_batches_tracked")}
    assert len(counted) - sum("scales" in key for key in own) == sum(not key.endswith(dropped) for key in theirs)
    assert set(numbers) >= {value.flatten()[0].item() for key, value in theirs.items() if not key.endswith(dropped)}


@pytest.mark.parametrize(
    ("head", "options", "needed"),
    [
        ("fcos", {}, ["--style", "--head"]),
        ("fcos_plain", {"style": "pytorch"}, ["--head"]),
        ("gfl", {}, ["--style"]),
    ],
)
def test_what_keys_do_not_show_is_asked_for(head: str, options: dict, needed: list[str], tmp_path: Path) -> None:
    message = refused(tmp_path, ConfigError, "whose keys do not show the whole net", mmdet_state(head), **options)
    assert [option for option in ("--style", "--head") if option in message] == needed


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        ("gfl", {"style": "pytorch", "head": "fcos"}, "is MMDetection's GFL, for which --head can be gfl, not fcos"),
        ("gfl", {"style": "pytorch", "classes": ["cat"] * 80}, "has 80 classes: give so many different names"),
        ("gfl", {"source": "torchvision"}, "is MMDetection's, by its key names: give --from mmdet"),
    ],
)
def test_options_that_do_not_fit_are_refused(head: str, options: dict, message: str, tmp_path: Path) -> None:
    refused(tmp_path, ConfigError, message, mmdet_state(head), **options)


def test_class_names(tmp_path: Path) -> None:
    def classes(count: int, meta: Any = None, **options: Any) -> tuple[str, ...]:
        content = {"state_dict": mmdet_state("gfl", classes=count), "meta": meta or {}}
        return imported(tmp_path, content, style="pytorch", **options)[1].classes

    three = ("a", "b", "c")
    assert classes(20) == VOC_CLASSES
    assert classes(3, {"CLASSES": three}) == classes(3, {"dataset_meta": {"classes": list(three)}}) == three
    assert classes(3, classes=three) == three
    assert classes(1, {"CLASSES": "cat"}) == ("cat",)
    assert classes(3, {"CLASSES": three}, classes=("x", "y", "z")) == ("x", "y", "z")
    with pytest.raises(ConfigError, match="does not name its 3 classes: give them with --classes"):
        classes(3, {"CLASSES": ["a"]})


def without(state: dict[str, Tensor], *parts: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not any(part in key for part in parts)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (without(mmdet_state("vfnet"), "layer2.1.bn1.weight", "dconv"),
         r"not a whole vfnet on resnet18: it lacks backbone\.layer2\.1\.bn1\.weight, head\.reg_star.*head\.cls_star"),
        (without(mmdet_state("vfnet"), "vfnet_cls.bias"), "lacks the head's classifier, or a part of it"),
        (without(mmdet_state("vfnet"), "bbox_head"), r"holds no head of MMDetection's FCOS, VFNet, .*TOOD, by its key"),
        (without(mmdet_state("vfnet"), "backbone.layer3.1"), "has a backbone with 2, 2, 1, 2 blocks"),
        (mmdet_state("vfnet") | {"bbox_head.vfnet_cls.bias": torch.full((80,), torch.nan)},
         r"not finite in head\.cls_logits\.bias"),
        ({"state_dict": {"a": torch.zeros(1)}, "meta": {"hooks": deque([1])}}, r"collections\.deque"),
    ],
)  # fmt: skip
def test_what_is_no_whole_detector_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    refused(tmp_path, WeightsError, message, content, style="pytorch")


def test_files_of_other_kinds(tmp_path: Path) -> None:
    state, out = mmdet_state("fcos_plain"), tmp_path / "deep" / "ours.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "a.safetensors")
    early = {key.replace("bbox_head.conv_", "bbox_head.fcos_"): value for key, value in state.items()}  # of 1.x
    torch.save(early, tmp_path / "a.pth", _use_new_zipfile_serialization=False)  # of before PyTorch 1.6
    copies = {"module.ema_backbone_conv1_weight": torch.zeros(1), "module.data_preprocessor.mean": torch.zeros(3)}
    torch.save({f"module.{key}": value for key, value in state.items()} | copies, tmp_path / "b.pth")
    found = []
    for name in ("a.safetensors", "a.pth", "b.pth"):
        import_checkpoint(tmp_path / name, "mmdet", out, style="pytorch", head="fcos_plain")
        found.append(load_detector(out)[0].state_dict())
    assert all(torch.equal(value, other[key]) for other in found[1:] for key, value in found[0].items())
    (tmp_path / "touched").touch()
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE((tmp_path / "touched").stat().st_mode)
    assert [file.name for file in out.parent.iterdir()] == ["ours.safetensors"]
    for wrong, error in ((tmp_path / "o.pth", ConfigError), (tmp_path / "touched" / "o.safetensors", WeightsError)):
        with pytest.raises(error, match=r"must be named FILE\.safetensors|cannot be written"):
            import_checkpoint(tmp_path / "b.pth", "mmdet", wrong, style="pytorch", head="fcos_plain")


class Evil:
    """Creates a marker file when unpickled by Python's own unpickler."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (exec, (f"open({str(self.path)!r}, 'w')",))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["meta", "message_hub", "state_dict"])
def test_code_is_never_run(place: str, zipped: bool, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    content: dict[str, Any] = {"state_dict": dict(mmdet_state("vfnet")), "meta": {}}
    content.setdefault(place, {})["evil"] = Evil(marker)
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"evil\.pth .*(builtins\.exec|objects other than tensors)"):
        import_checkpoint(path, "mmdet", tmp_path / "o.safetensors", style="pytorch")
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the trap does work
    assert marker.exists()


class Named:
    """Pickled as a call of a global of any name, without importing it."""

    def __init__(self, name: str) -> None:
        self.name = name


class NamingPickler(pickle._Pickler):  # pyright: ignore[reportAttributeAccessIssue]
    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Named):
            module, _, name = obj.name.rpartition(".")
            self.write(f"c{module}\n{name}\n)R".encode())
        else:
            super().save(obj, save_persistent_id)


@pytest.mark.parametrize("name", ["os.system", "mmenginex.a", "torch.load"])
def test_objects_of_others_are_refused_by_name(name: str, tmp_path: Path) -> None:
    class Module(ModuleType):
        Pickler, Unpickler, dumps = NamingPickler, pickle.Unpickler, pickle.dumps

    content = {"state_dict": {"a": torch.zeros(1)}, "meta": Named(name)}
    torch.save(content, tmp_path / "a.pth", pickle_module=Module("m"))
    with pytest.raises(WeightsError, match=name.replace(".", r"\.")):
        import_checkpoint(tmp_path / "a.pth", "mmdet", tmp_path / "o.safetensors")


def test_training_checkpoints_of_mmengine_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its log histories, which hold methods and numpy arrays, though mmengine is not there to load them."""

    class HistoryBuffer:
        def __init__(self) -> None:
            self.history = np.arange(3.0)
            self.methods = {"min": HistoryBuffer.min}

        def min(self) -> float:
            return self.history.min()

    name = "mmengine.logging.history_buffer"
    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = name, "HistoryBuffer"
    HistoryBuffer.min.__module__, HistoryBuffer.min.__qualname__ = name, "HistoryBuffer.min"
    module = ModuleType(name)
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    hub = {"log_scalars": {"train/loss": HistoryBuffer()}, "iter": np.int64(3), "state": np.random.get_state()}
    content = {"state_dict": mmdet_state("vfnet"), "meta": {}, "message_hub": hub}
    with monkeypatch.context() as patch:
        for part in ("mmengine", "mmengine.logging"):
            patch.setitem(sys.modules, part, ModuleType(part))
        patch.setitem(sys.modules, name, module)
        torch.save(content, tmp_path / "epoch_12.pth")
    before = torch.serialization.get_safe_globals()
    import_checkpoint(tmp_path / "epoch_12.pth", "mmdet", tmp_path / "o.safetensors", style="pytorch")
    assert torch.serialization.get_safe_globals() == before


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
    _, description = imported(tmp_path, torchvision_state(name, 91), "torchvision")
    model = description.model
    assert (description.classes, description.category_ids) == (COCO_CLASSES, COCO_CATEGORY_IDS)
    assert (description.min_size, description.max_size, model.channel_order) == (800, 1333, "rgb")
    assert (model.backbone["name"], model.backbone["style"], model.backbone["norm"]) == ("resnet50", "pytorch", norm)
    assert model.head.items() >= head.items()
    assert (model.score_thresh, model.topk_candidates) == (0.05, 1000)
    assert (model.nms_thresh, model.detections_per_img) == selection


@pytest.mark.parametrize(("name", "anchors"), [("fcos_resnet50_fpn", 1), ("retinanet_resnet50_fpn", 9)])
def test_torchvisions_channels_of_other_data(name: str, anchors: int, tmp_path: Path) -> None:
    state = torchvision_state(name, 4)
    # Anchor by anchor: the background and three classes.
    state["head.classification_head.cls_logits.bias"] = torch.arange(4.0).repeat(anchors)
    refused(tmp_path, ConfigError, "does not name its 3 classes", state, source="torchvision")
    detector, description = imported(tmp_path, state, "torchvision", classes=["a", "b", "c"])
    assert (description.classes, description.category_ids) == (("a", "b", "c"), (1, 2, 3))
    assert detector.state_dict()["head.cls_logits.bias"].tolist() == [1.0, 2.0, 3.0] * anchors


def test_torchvisions_91_channels_are_90_classes_where_90_are_named(tmp_path: Path) -> None:
    state = torchvision_state("fcos_resnet50_fpn", 91)
    state["head.classification_head.cls_logits.bias"] = torch.arange(91.0)
    for names, kept in (([f"part {i}" for i in range(90)], range(1, 91)), (COCO_CLASSES, COCO_CATEGORY_IDS)):
        detector, description = imported(tmp_path, state, "torchvision", classes=names)
        assert description.classes == tuple(names)
        assert detector.state_dict()["head.cls_logits.bias"].tolist() == list(kept)
