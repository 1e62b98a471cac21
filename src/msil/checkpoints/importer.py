"""Checkpoints of MMDetection and torchvision as files of ours, which say what net they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from torchvision.models import resnet

from msil.checkpoints.assemble import detector_from_config
from msil.checkpoints.coco_names import COCO_CATEGORY_IDS, COCO_CLASSES
from msil.checkpoints.conventions import (
    FORMS,
    NMS,
    Backbone,
    Form,
    Head,
    Images,
    Selection,
    Settings,
    images_of,
    model_config,
    norm_of,
)
from msil.checkpoints.description import Description, to_text
from msil.checkpoints.foreign import ForeignCheckpoint, read_foreign_checkpoint
from msil.checkpoints.import_report import Report, report_lines
from msil.checkpoints.mmdet_config import classes_of, config_of, settings_of
from msil.data.voc import VOC_CLASSES
from msil.detection.backbone import DEPTHS
from msil.detection.preprocess import IMAGENET_MEAN, IMAGENET_STD
from msil.detection.renaming import from_mmdet, from_torchvision, mmdet_names, torchvision_names
from msil.errors import ConfigError, WeightsError
from msil.files import write_bytes

__all__ = ["Report", "import_checkpoint", "report_lines"]

SOURCES = ("mmdet", "torchvision")
NOT_OF_THE_NET = ("ema_", "data_preprocessor.")  # averaged copies, and the mean and std of images
VFNET_ALONE = ("head.bbox_refine.", "head.reg_conv.", "head.reg_star.", "head.cls_star.", "head.scales_refine")
CLASSIFIER = ("head.cls_logits.weight", "head.cls_logits.bias")


@dataclass(frozen=True)
class Reading:
    """A foreign checkpoint in our terms. names: what its keys became. stand_ins, unused: for the report, in words."""

    tensors: dict[str, Tensor]
    names: dict[str, str | None]
    settings: Settings
    origin: str
    classes: tuple[str, ...]
    stand_ins: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def import_checkpoint(
    path: str | Path,
    source: str,
    out: str | Path,
    *,
    style: str | None = None,
    form: str | None = None,
    classes: Sequence[str] | None = None,
) -> Report:
    """Write the detector of another project's checkpoint to `out`, a .safetensors file that describes itself.

    path: a checkpoint of MMDetection's FCOS or VFNet (2.x, 3.x) or of torchvision's fcos_resnet50_fpn.
    source: "mmdet" or "torchvision". The rest is for what the checkpoint does not say, and is asked for:
    style: of its ResNet, "pytorch" (stride on the 3x3 convolution, RGB images) or "caffe" (on the first 1x1, BGR).
    form: of its FCOS head, "improved" (center sampling, centre-ness on the regression tower, distances in strides) or
        "plain".
    classes: names of its classes in their order, without a background.

    The file is written in one step, replacing one of that name. Never unpickles code.

    Raises ConfigError for an option that is needed, wrong or contradicts the checkpoint; WeightsError for a checkpoint
    that cannot be read, is of another net, or is incomplete. Nothing is written then.
    """
    path, out = Path(path), Path(out)
    _check_options(source, out, style, form)
    content = read_foreign_checkpoint(path)
    state = _unwrapped(content.state_dict)
    if source == "torchvision":
        reading = _read_torchvision(path, state, style, form, classes)
    else:
        reading = _read_mmdet(path, state, content, style, form, classes)
    category_ids = COCO_CATEGORY_IDS if reading.classes == COCO_CLASSES else tuple(range(1, len(reading.classes) + 1))
    images = reading.settings.images
    description = Description(
        model_config(reading.settings),
        images.min_size,
        images.max_size,
        reading.classes,
        category_ids,
        f"{reading.origin}: {path.name}",
    )
    _check_fit(path, reading.tensors, description)
    _write(reading.tensors, description, out)
    dropped = [key for key in state if reading.names.get(key) is None]
    return Report(
        matched=[key for key, name in reading.names.items() if key == name],
        renamed=[(key, name) for key, name in reading.names.items() if name is not None and key != name],
        missing=list(reading.stand_ins),
        left_over=[*dropped, *reading.unused, *(f"{key} (beside the state_dict)" for key in content.others)],
        settings=_in_words(reading),
    )


def _check_options(source: str, out: Path, style: str | None, form: str | None) -> None:
    for name, value, known in (
        ("source", source, SOURCES),
        ("style", style, (None, "pytorch", "caffe")),
        ("form", form, (None, *FORMS)),
    ):
        if value not in known:
            raise ConfigError(f"--{'from' if name == 'source' else name} must be {_either(known)}, not {value!r}.")
    if out.suffix != ".safetensors":
        raise ConfigError(f"the output {out} must be named FILE.safetensors: give such a name to -o.")


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that DataParallel puts on every key."""
    prefix = "module." if all(key.startswith("module.") for key in state) else ""
    return {key.removeprefix(prefix): value for key, value in state.items()}


def _read_mmdet(
    path: Path,
    state: Mapping[str, Tensor],
    content: ForeignCheckpoint,
    style: str | None,
    form: str | None,
    classes: Sequence[str] | None,
) -> Reading:
    if any(key.startswith("backbone.body.") for key in state):
        raise ConfigError(f"{path} is torchvision's, by its key names: give --from torchvision.")
    of_net = {key: value for key, value in state.items() if not key.startswith(NOT_OF_THE_NET)}
    names = mmdet_names(of_net)
    tensors = from_mmdet(of_net)
    if not any(key.startswith("head.") for key in tensors):
        raise WeightsError(
            f"{path} holds no detector, since no key begins with bbox_head.: give the checkpoint of a whole FCOS or "
            "VFNet."
        )
    config = config_of(content.meta)
    version = content.meta.get("mmdet_version")
    origin = "MMDetection" + (f" {version}" if isinstance(version, str) else "")
    if config is None:
        settings = _by_convention(path, tensors, style, form)
        origin += ", without a config"
    else:
        settings = settings_of(config)
        _check_against_config(path, settings, style, form)
    count = _num_classes(path, tensors)
    # 1.x, from which the oldest published checkpoints were converted, counted the background.
    background = isinstance(version, str) and version.startswith(("0.", "1."))
    if settings.head.num_classes not in (None, count + background):
        raise WeightsError(
            f"{path} has a classifier of {count} classes and a config of {settings.head.num_classes}: it is no "
            "checkpoint of that config."
        )
    return Reading(tensors, names, settings, origin, _class_names(path, classes, classes_of(content.meta), count))


def _by_convention(path: Path, tensors: Mapping[str, Tensor], style: str | None, form: str | None) -> Settings:
    """The settings of a checkpoint without a config: what its tensors show, what the options say, and custom."""
    head = "vfnet" if any(key.startswith(VFNET_ALONE) for key in tensors) else "fcos"
    needs = []
    if style is None:
        needs.append("--style caffe where the name of its config has caffe in it, else --style pytorch,")
    if form is None and head == "fcos":
        needs.append("--form improved where that name has center-normbbox-centeronreg-giou in it, else --form plain,")
    if needs:
        raise ConfigError(
            f"{path} does not carry its config, and its weights fit more than one net: give "
            f"{' and '.join(needs).rstrip(',')}."
        )
    assert style is not None
    if head == "vfnet" and form is not None:
        raise ConfigError(f"{path} is a VFNet, which has one form: leave --form out.")
    bias = "head.cls_tower.0.conv.bias" in tensors
    if form == "plain" and bias:
        raise ConfigError(
            f"{path} has biases in the towers' convolutions, which the plain FCOS has not: give --form improved."
        )
    return Settings(
        Backbone(_resnet_name(path, tensors), style, norm_of(style, head), 1),
        # Before biases came to the improved form's towers it was published without.
        _shown_head(tensors, head, None if form is None else replace(FORMS[form], conv_bias=bias)),
        images_of(style, form),
        Selection(nms_thresh=NMS[form or "improved"]),
    )


def _check_against_config(path: Path, settings: Settings, style: str | None, form: str | None) -> None:
    own = settings.backbone.style
    if style not in (None, own):
        raise ConfigError(f"{path} says in its config that its ResNet is of style {own}: leave --style out.")
    if form is None:
        return
    if settings.head.form is None:
        raise ConfigError(f"{path} is a VFNet, which has one form: leave --form out.")
    # What the two forms are known by; biases and losses came and went.
    for key in ("center_sampling", "centerness_on_reg", "norm_on_bbox"):
        found = getattr(settings.head.form, key)
        if found != getattr(FORMS[form], key):
            raise ConfigError(f"{path} says {key}={found} in its config, which is not {form}: leave --form out.")


def _read_torchvision(
    path: Path,
    state: Mapping[str, Tensor],
    style: str | None,
    form: str | None,
    classes: Sequence[str] | None,
) -> Reading:
    if any(key.startswith("bbox_head.") for key in state):
        raise ConfigError(f"{path} is MMDetection's, by its key names: give --from mmdet.")
    if style == "caffe" or form == "plain":
        wrong = "--style" if style == "caffe" else "--form"
        raise ConfigError(f"torchvision's FCOS is of style pytorch and of the improved form: leave {wrong} out.")
    names = torchvision_names(state)
    tensors = from_torchvision(state)
    channels = _num_classes(path, tensors)
    coco = channels == 91 and (classes is None or tuple(classes) == COCO_CLASSES)
    kept = COCO_CATEGORY_IDS if coco else tuple(range(1, channels))
    for key in CLASSIFIER:
        tensors[key] = tensors[key][list(kept)]
    unused = ["channel 0 of head.classification_head.cls_logits: the background"]
    gaps = [str(i) for i in range(1, channels) if i not in kept]
    if gaps:
        unused.append(f"its channels {', '.join(gaps)}: category ids that COCO does not use")
    return Reading(
        tensors,
        names,
        Settings(
            Backbone(_resnet_name(path, tensors), "pytorch", "frozen_bn", 1),
            _shown_head(tensors, "fcos", replace(FORMS["improved"], point_offset=0.0)),
            Images("rgb", IMAGENET_MEAN, IMAGENET_STD),
            Selection(nms_thresh=NMS["improved"]),
        ),
        "torchvision",
        COCO_CLASSES if coco else _class_names(path, classes, None, len(kept)),
        ("head.scales: ones, since torchvision's head has no level scales",),
        tuple(unused),
    )


def _shown_head(tensors: Mapping[str, Tensor], name: str, form: Form | None) -> Head:
    """The head with the sizes that its tensors have."""
    num_convs = sum(key.startswith("head.cls_tower.") and key.endswith(".conv.weight") for key in tensors)
    weight = tensors.get("head.cls_tower.0.conv.weight")
    return Head(name, num_convs, 256 if weight is None else weight.shape[0], 32, form)


def _resnet_name(path: Path, tensors: Mapping[str, Tensor]) -> str:
    blocks = [len({key.split(".")[2] for key in tensors if key.startswith(f"backbone.layer{i}.")}) for i in range(1, 5)]
    bottleneck = any(key.startswith("backbone.") and ".conv3." in key for key in tensors)
    for name, (block, layers) in DEPTHS.items():
        if layers == blocks and (block is resnet.Bottleneck) == bottleneck:
            return name
    raise WeightsError(
        f"{path} has a backbone with {', '.join(map(str, blocks))} blocks in its four stages: only the ResNets "
        f"{', '.join(DEPTHS)} can be imported, whole."
    )


def _num_classes(path: Path, tensors: Mapping[str, Tensor]) -> int:
    bias = tensors.get(CLASSIFIER[1])
    if bias is None:
        raise WeightsError(f"{path} lacks the head's classifier: the checkpoint is incomplete.")
    return bias.shape[0]


def _class_names(path: Path, given: Sequence[str] | None, own: tuple[str, ...] | None, count: int) -> tuple[str, ...]:
    if own is not None and len(own) != count:
        if given is None:
            raise ConfigError(
                f"{path} names {len(own)} classes while its classifier has {count}: give their names with --classes."
            )
        own = None
    if given is None:
        known = own or {len(COCO_CLASSES): COCO_CLASSES, len(VOC_CLASSES): VOC_CLASSES}.get(count)
        if known is None:
            raise ConfigError(f"{path} does not name its {count} classes: give them with --classes, in their order.")
        return known
    if len(given) != count or len(set(given)) != count:
        raise ConfigError(f"{path} has {count} classes: give so many different names with --classes, not {len(given)}.")
    if own is not None and tuple(given) != own:
        mine, theirs = next((a, b) for a, b in zip(given, own, strict=True) if a != b)
        raise ConfigError(f"{path} names its own classes, with {theirs!r} for {mine!r}: leave --classes out.")
    return tuple(given)


def _check_fit(path: Path, tensors: Mapping[str, Tensor], description: Description) -> None:
    """The tensors must be exactly those of the described detector, and numbers."""
    broken = [key for key, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise WeightsError(
            f"{path} holds values that are no finite numbers in {_listed(broken)} (in our names): take a checkpoint of "
            "before its training diverged."
        )
    try:
        with torch.device("meta"):  # shapes alone
            detector = detector_from_config(
                description.model, len(description.classes), description.min_size, description.max_size
            )
    except ValueError as error:
        raise WeightsError(f"{path} describes a detector that cannot be built: {error}") from error
    own = {key: value for key, value in detector.state_dict().items() if not key.endswith("num_batches_tracked")}
    found = {
        "lacks": [key for key in own if key not in tensors],
        "has, beyond that net,": [key for key in tensors if key not in own],
        "has other shapes of": [key for key in own if key in tensors and own[key].shape != tensors[key].shape],
    }
    wrong = ", and ".join(f"{what} {_listed(keys)}" for what, keys in found.items() if keys)
    if wrong:
        backbone, head = description.model.backbone["name"], description.model.head["name"]
        raise WeightsError(
            f"{path} is not a whole {head} on {backbone}: it {wrong} (in our names), so nothing is written; take the "
            "checkpoint of such a detector, undamaged."
        )


def _write(tensors: Mapping[str, Tensor], description: Description, out: Path) -> None:
    copies = {key: value.to(torch.float32, copy=True).contiguous() for key, value in tensors.items()}
    try:
        # Not save_file, whose files only their owner may read.
        write_bytes(out, save(copies, metadata={"msil": to_text(description)}))
    except OSError as error:
        raise WeightsError(f"{out} cannot be written ({error.strerror or error}): choose another -o.") from error


def _in_words(reading: Reading) -> list[str]:
    settings = reading.settings
    backbone, head, images = settings.backbone, settings.head, settings.images
    name = "FCOS" if head.name == "fcos" else "VFNet"
    names = {COCO_CLASSES: " of COCO", VOC_CLASSES: " of VOC"}.get(reading.classes, "")
    order = images.channel_order.upper()
    lines = [
        f"{name} on {backbone.name}, {len(reading.classes)} classes{names} (from {reading.origin})",
        f"  backbone   style {backbone.style}, norm {backbone.norm}, frozen_stages {backbone.frozen_stages}",
        f"  images     {order}, mean {_numbers(images.mean)}, std {_numbers(images.std)}, "
        f"short side {images.min_size}, long side <= {images.max_size}",
    ]
    if head.form is not None:
        lines.append("  head       " + ", ".join(f"{key} {_word(value)}" for key, value in asdict(head.form).items()))
    lines.append("  selection  " + ", ".join(f"{key} {value:g}" for key, value in asdict(settings.selection).items()))
    return lines


def _word(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.7g}" for value in values)


def _listed(names: Sequence[str], count: int = 8) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _either(values: Sequence[str | None]) -> str:
    return " or ".join(value for value in values if value is not None)
