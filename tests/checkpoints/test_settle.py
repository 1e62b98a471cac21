"""Which of the settings come from the file in model.weights, and which from the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from msil.checkpoints.description import Description, to_text
from msil.checkpoints.settle import check_typed, settled
from msil.config import config_hash, plain
from msil.errors import ConfigError
from msil.runs import default_run_name

from .cases import composed, described_file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    thresholds = ("model.nms_thresh=0.7", "model.score_thresh=0.01", "model.topk_candidates=70", "model.test_flip=true")
    described_file(tmp_path / "net.safetensors", "model/head=vfnet", "model.msil.apply=cls", *thresholds)
    return tmp_path / "net.safetensors"


def test_without_weights_nothing_changes() -> None:
    config = composed()
    assert settled(config) is config


def test_a_test_has_the_net_of_the_file_and_the_thresholds_of_the_command(file: Path) -> None:
    config = composed("mode=test", f"model.weights={file}", "model/backbone=resnet50", "model.score_thresh=0.2")
    model = settled(config).model
    assert (model.head["name"], model.backbone["name"], model.channels) == ("vfnet", "resnet10", 16)
    assert model.msil.apply == "cls"
    assert (model.score_thresh, model.nms_thresh, model.weights) == (0.2, 0.7, str(file))
    assert model.backbone["weights"] is None
    assert (model.topk_candidates, model.detections_per_img) == (70, None)
    typed = ("model.nms_thresh=0.4", "model.topk_candidates=7", "model.detections_per_img=9")
    chosen = settled(composed("mode=test", f"model.weights={file}", *typed)).model
    assert (chosen.nms_thresh, chosen.topk_candidates, chosen.detections_per_img) == (0.4, 7, 9)
    assert (chosen.score_thresh, chosen.test_flip, chosen.test_scales) == (0.01, True, None)


def test_a_test_takes_the_classes_of_the_file(file: Path) -> None:
    words = ("mode=test", "data=voc", f"model.weights={file}")
    assert settled(composed(*words)).data.classes == ["cat", "dog", "emu"]
    assert settled(composed(*words, "data.classes=[dog]")).data.classes == ["dog"]
    assert settled(composed("data=voc", f"model.weights={file}", "model.msil.apply=cls")).data.classes is None


def test_a_test_renames_as_the_file_s_run_did(tmp_path: Path) -> None:
    run = plain(composed("data=voc", "data.classes={car: vehicle, bus: vehicle, dog: dog}"))
    own = {"config": run, "classes": ["vehicle", "dog"], "category_ids": [1, 2]}
    torch.save({"msil": own}, tmp_path / "last.ckpt")
    words = ("mode=test", "data=coco", f"model.weights={tmp_path / 'last.ckpt'}")
    renamed = {"car": "vehicle", "bus": "vehicle", "dog": "dog", "vehicle": "vehicle"}
    assert settled(composed(*words)).data.classes == renamed
    assert settled(composed(*words, "data.classes=[dog]")).data.classes == ["dog"]


def test_training_takes_msil_and_what_is_frozen_from_the_command(file: Path) -> None:
    config = composed(f"model.weights={file}", "model.msil.apply=reg", "model.backbone.frozen_stages=2")
    model = settled(config).model
    assert (model.head["name"], model.msil.apply, model.backbone["frozen_stages"]) == ("vfnet", "reg", 2)
    assert model.backbone["norm"] == "gn"  # the file's, as the command's is null
    assert settled(composed(f"model.weights={file}", "model.backbone.norm=bn")).model.backbone["norm"] == "bn"


def test_a_bare_state_dict_leaves_the_net_to_the_command(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "bare.pt")
    model = settled(composed(f"model.weights={tmp_path / 'bare.pt'}", "model/backbone=resnet50")).model
    assert (model.head["name"], model.backbone["name"], model.channels) == ("fcos", "resnet50", 64)
    # ImageNet's weights are not fetched to be overwritten; what they would have decided stays
    assert [model.backbone[name] for name in ("weights", "norm", "frozen_stages")] == [None, "frozen_bn", 1]


def test_another_content_is_another_run(file: Path) -> None:
    def now() -> dict:
        return plain(settled(composed("mode=test", f"model.weights={file}")))

    first = now()
    assert now() == first
    described_file(file, "model/head=vfnet", "model.msil.apply=cls", "model.nms_thresh=0.7", seed=1)
    second = now()
    assert config_hash(first) != config_hash(second)
    assert default_run_name(second) == f"test_shapes_val_net_{config_hash(second)}"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("model/head=fcos", "model.head.name=vfnet, not fcos"),
        ("model.channels=256", "model.channels=16, not 256"),
        ("model.msil.apply=both", "model.msil.apply=cls, not both"),
        ("model/msil=no_align", "model.msil="),
    ],
)
def test_what_was_typed_against_the_file_is_refused(file: Path, typed: str, said: str) -> None:
    config = composed("mode=test", f"model.weights={file}", typed)
    with pytest.raises(ConfigError, match=r"leave .* out") as caught:
        check_typed(config, ["mode", "model.weights", typed.partition("=")[0]])
    assert said in str(caught.value) and file.name in str(caught.value)


def test_a_head_typed_beside_a_file_of_torchvisions_detector_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "ssd.safetensors"
    model = composed("model=torchvision", "model.detector=ssd300_vgg16").model
    save_file({"weight": torch.zeros(1)}, file, {"msil": to_text(Description(model, 64, 96, ("a",), (1,), "a test"))})
    with pytest.raises(ConfigError, match=r"model/head was typed, but .*ssd.* holds torchvision's ssd300_vgg16: leave"):
        check_typed(composed("mode=test", f"model.weights={file}", "model/head=fcos"), ["mode", "model/head"])


def test_what_was_typed_and_agrees_is_fine(file: Path) -> None:
    typed = ("model/head=vfnet", "model.head.num_convs=1", "model.channels=16", "model.msil.apply=cls")
    free = ("model.score_thresh=0.5", "model.nms_thresh=0.3")
    config = composed("mode=test", f"model.weights={file}", *typed, *free)
    check_typed(config, [word.partition("=")[0] for word in (*typed, *free)])
    # in training the MSIL switches are free
    check_typed(composed(f"model.weights={file}", "model.msil.apply=reg"), ["model.weights", "model.msil.apply"])
