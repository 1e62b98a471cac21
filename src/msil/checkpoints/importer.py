"""Checkpoints of MMDetection and torchvision as files of ours, which say what net they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torchvision.models import resnet

from msil.checkpoints.assemble import detector_from_config
from msil.checkpoints.coco_names import COCO_CATEGORY_IDS, COCO_CLASSES
from msil.checkpoints.conventions import FORMS, LAYOUTS, NORM_EPS, SOURCES, Layout, Settings, model_config, published
from msil.checkpoints.description import Description, to_text
from msil.checkpoints.foreign import read_foreign_checkpoint
from msil.checkpoints.import_report import Report, report_lines
from msil.checkpoints.mmdet_config import classes_of, config_of, settings_of
from msil.data.voc import VOC_CLASSES
from msil.detection.backbone import DEPTHS
from msil.detection.heads import head_class
from msil.detection.renaming import from_mmdet, from_torchvision, mmdet_names, torchvision_names
from msil.errors import ConfigError, WeightsError
from msil.runs import write_bytes

__all__ = ["Report", "import_checkpoint", "report_lines"]

NOT_OF_THE_NET = ("ema_", "data_preprocessor.")  # averaged copies, and the mean and std of images
CLASSIFIER = ("head.cls_logits.weight", "head.cls_logits.bias")
TOWERS = ("head.cls_tower.", "head.inter_convs.")  # two towers' first, or TOOD's one


@dataclass(frozen=True)
class Reading:
    """A foreign checkpoint in our terms. names: what its keys became. stand_ins, unused: for the report, in words."""

    tensors: dict[str, Tensor]
    names: dict[str, str | None]
    settings: Settings
    origin: str
    classes: tuple[str, ...]
    stand_ins: list[str]
    unused: list[str]


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

    path: a checkpoint of MMDetection's FCOS, VFNet, RetinaNet, ATSS, GFL or TOOD (2.x, 3.x), or of torchvision's
        fcos_resnet50_fpn, retinanet_resnet50_fpn or retinanet_resnet50_fpn_v2.
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
    prefix = "module." if all(key.startswith("module.") for key in content.state_dict) else ""  # of DataParallel
    state = {key.removeprefix(prefix): value for key, value in content.state_dict.items()}
    reading = _read(path, source, state, content.meta, style, form, classes)
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
        missing=reading.stand_ins,
        left_over=[*dropped, *reading.unused, *(f"{key} (beside the state_dict)" for key in content.others)],
        settings=_in_words(reading),
    )


def _check_options(source: str, out: Path, style: str | None, form: str | None) -> None:
    for name, value, known in (
        ("from", source, SOURCES),
        ("style", style, (None, "pytorch", "caffe")),
        ("form", form, (None, *FORMS)),
    ):
        if value not in known:
            raise ConfigError(f"--{name} must be {' or '.join(filter(None, known))}, not {value!r}.")
    if out.suffix != ".safetensors":
        raise ConfigError(f"the output {out} must be named FILE.safetensors: give such a name to -o.")


def _read(
    path: Path,
    source: str,
    state: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    style: str | None,
    form: str | None,
    classes: Sequence[str] | None,
) -> Reading:
    layouts = _layouts(path, source, state)
    of_net = {key: value for key, value in state.items() if not key.startswith(NOT_OF_THE_NET)}
    names_of, renamed = (mmdet_names, from_mmdet) if source == "mmdet" else (torchvision_names, from_torchvision)
    names, tensors = names_of(of_net), renamed(of_net)
    if not layouts:
        known = ", ".join(dict.fromkeys(layout.name for layout in LAYOUTS if layout.source == source))
        raise WeightsError(
            f"{path} holds no head of {SOURCES[source]}'s {known}, by its key names: give the checkpoint of such a "
            "detector, whole."
        )
    if form is not None and form not in [layout.form for layout in layouts]:
        raise ConfigError(f"{path} is {_name(layouts[0])}, which has one form: leave --form out.")
    config = config_of(meta)
    version = str(meta.get("mmdet_version") or "")
    origin = f"{SOURCES[source]} {version}".rstrip()
    if config is not None:
        settings = settings_of(config)
        _check_against_config(path, settings, style, form)
    else:
        settings = _by_convention(path, layouts, tensors, style, form)
        eps = layouts[0].norm_eps
        origin += ", without a config" if source == "mmdet" else "" if eps == NORM_EPS else f", norms of eps {eps:g}"
    count = _num_classes(path, layouts[0], tensors)
    # 1.x, from which the oldest published checkpoints were converted, counted the background.
    if settings.num_classes not in (None, count + version.startswith(("0.", "1."))):
        raise WeightsError(
            f"{path} has a classifier of {count} classes and a config of {settings.num_classes}: it is no checkpoint "
            "of that config."
        )
    own, stand_ins, unused = classes_of(meta), [], []
    if source == "torchvision":
        coco = count == 91 and (classes is None or tuple(classes) == COCO_CLASSES)
        own = COCO_CLASSES if coco else None
        kept = COCO_CATEGORY_IDS if coco else tuple(range(1, count))
        unused.append("class 0 of head.classification_head.cls_logits: the background")
        if gaps := [str(i) for i in range(1, count) if i not in kept]:
            unused.append(f"its classes {', '.join(gaps)}: category ids that COCO does not use")
        if "head.scales" in tensors:
            stand_ins.append("head.scales: ones, since torchvision's head has no level scales")
        for key in CLASSIFIER:
            if key in tensors and not len(tensors[key]) % count:  # a row for each class of each of a cell's anchors
                tensors[key] = tensors[key].unflatten(0, (-1, count))[:, list(kept)].flatten(0, 1)
        count = len(kept)
        _set_eps(tensors, layouts[0].norm_eps)
    return Reading(tensors, names, settings, origin, _class_names(path, classes, own, count), stand_ins, unused)


def _layouts(path: Path, source: str, state: Mapping[str, Tensor]) -> list[Layout]:
    """The published layouts that have such keys: one, or both forms of FCOS; none where no head is known."""
    found = [layout for layout in LAYOUTS if any(key.startswith(layout.keys) for key in state)]
    own = [layout for layout in found if layout.source == source]
    if found and not own:
        other = found[0].source
        raise ConfigError(f"{path} is {SOURCES[other]}'s, by its key names: give --from {other}.")
    return own


def _name(layout: Layout) -> str:
    return f"{SOURCES[layout.source]}'s {layout.name}"


def _by_convention(
    path: Path, layouts: list[Layout], tensors: Mapping[str, Tensor], style: str | None, form: str | None
) -> Settings:
    """The settings of a checkpoint without a config: the layout's, what its tensors show, and what the options say."""
    styles = list(layouts[0].norms)
    needs = []
    if style is None and len(styles) > 1:
        needs.append("--style caffe where the name of its config has caffe in it, else --style pytorch,")
    if form is None and len(layouts) > 1:
        needs.append("--form improved where that name has center-normbbox-centeronreg-giou in it, else --form plain,")
    if needs:
        raise ConfigError(
            f"{path} does not carry its config, and its weights fit more than one net: give "
            f"{' and '.join(needs).rstrip(',')}."
        )
    if style not in (None, *styles):
        raise ConfigError(f"{path} is {_name(layouts[0])}, which is of style {styles[0]}: leave --style out.")
    layout = next(layout for layout in layouts if form in (None, layout.form))
    shown: dict[str, object] = {
        "num_convs": len({key.split(".")[2] for key in tensors if key.startswith(TOWERS)}),
        "norm_groups": 32 if any(key.startswith(TOWERS) and ".norm." in key for key in tensors) else None,
    }
    if "conv_bias" in layout.options:
        # Before biases came to the improved form's towers it was published without.
        shown["conv_bias"] = "head.cls_tower.0.conv.bias" in tensors
        if form == "plain" and shown["conv_bias"]:
            raise ConfigError(
                f"{path} has biases in the towers' convolutions, which the plain FCOS has not: give --form improved."
            )
    channels = next((len(tensors[key]) for tower in TOWERS if (key := f"{tower}0.conv.weight") in tensors), 256)
    return published(layout, style or styles[0], _resnet_name(path, tensors), channels, shown)


def _check_against_config(path: Path, settings: Settings, style: str | None, form: str | None) -> None:
    own = settings.backbone["style"]
    if style not in (None, own):
        raise ConfigError(f"{path} says in its config that its ResNet is of style {own}: leave --style out.")
    for key in ("center_sampling", "centerness_on_reg", "norm_on_bbox"):  # biases and losses came and went
        found = settings.head.get(key)
        if form is not None and found != FORMS[form][key]:
            raise ConfigError(f"{path} says {key}={found} in its config, which is not {form}: leave --form out.")


def _set_eps(tensors: dict[str, Tensor], eps: float) -> None:
    """Scales the norms' weights, so that with NORM_EPS they do what they did with `eps`."""
    for key in list(tensors):
        weight = f"{key.removesuffix('running_var')}weight"
        if eps != NORM_EPS and key.endswith(".running_var") and weight in tensors:
            tensors[weight] = tensors[weight] * ((tensors[key] + NORM_EPS) / (tensors[key] + eps)).sqrt()


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


def _num_classes(path: Path, layout: Layout, tensors: Mapping[str, Tensor]) -> int:
    bias = tensors.get(CLASSIFIER[1])
    if bias is None or len(bias) % layout.per_cell:
        raise WeightsError(f"{path} lacks the head's classifier, or a part of it: the checkpoint is incomplete.")
    return len(bias) // layout.per_cell


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
    names = {COCO_CLASSES: " of COCO", VOC_CLASSES: " of VOC"}.get(reading.classes, "")
    title, count = head_class(head["name"]).title, len(reading.classes)
    return [
        f"{title} on {backbone['name']}, {count} classes{names} (from {reading.origin})",
        f"  backbone   {_words(backbone)}",
        f"  images     {images.channel_order.upper()}, mean {_numbers(images.mean)}, std {_numbers(images.std)}, "
        f"short side {images.min_size}, long side <= {images.max_size}",
        f"  head       {_words(head)}",
        f"  selection  {_words(settings.selection)}",
    ]


def _words(values: Mapping[str, object]) -> str:
    words = {True: "on", False: "off", None: "none"}
    return ", ".join(
        f"{key} {words[value] if value is None or isinstance(value, bool) else value}"
        for key, value in values.items()
        if key != "name"
    )


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.7g}" for value in values)


def _listed(names: Sequence[str], count: int = 8) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
