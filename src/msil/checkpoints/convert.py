"""Checkpoints of MMDetection and torchvision as files of ours, which say what net they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from torchvision.models import resnet

from msil.checkpoints import layouts
from msil.checkpoints.assemble import check_model, detector_from_config
from msil.checkpoints.description import Description, described, to_text
from msil.checkpoints.layouts import COCO_CATEGORY_IDS, COCO_CLASSES, NORM_EPS, SOURCES, Layout
from msil.detection.backbone import DEPTHS
from msil.detection.weights import differences, from_mmdet, from_torchvision, load_file, state_dict_of
from msil.errors import ConfigError, WeightsError, listed
from msil.runs import check_own, write_bytes

CLASSIFIER = ("head.cls_logits.weight", "head.cls_logits.bias")
TOWERS = ("head.cls_tower.", "head.inter_convs.")  # two towers' first, or TOOD's one
NOT_OF_THE_NET = ("ema_", "data_preprocessor.")  # averaged copies, and the mean and std of images
# Training checkpoints hold log histories, numbers and configurations of these packages. They become placeholders.
HARMLESS = ("mmengine.", "mmcv.", "mmdet.", "numpy.", "addict.", "builtins.getattr")


class Inert:
    """Stands for an object of a class that is not loaded: takes whatever that is made of, and does nothing."""

    def __init__(self, *args: object) -> None:
        pass

    __setstate__ = __init__


def import_checkpoint(
    path: str | Path,
    source: str,
    out: str | Path,
    *,
    style: str | None = None,
    head: str | None = None,
    classes: Sequence[str] | None = None,
) -> list[str]:
    """Write the detector of another project's checkpoint to `out`, a .safetensors file that describes itself.

    path: a checkpoint of a published layout, see msil.checkpoints.layouts. source: "mmdet" or "torchvision".
    style: of MMDetection's ResNet, whose keys do not show it: "pytorch" (stride on the 3x3 convolution, RGB images) or
        "caffe" (on the first 1x1, BGR).
    head: of MMDetection's FCOS: "fcos" (center sampling, centre-ness on the regression tower, distances in strides) or
        "fcos_plain".
    classes: names of its classes in their order, without a background, where the file has none.

    Returns what was done, as lines to print. The file is written atomically. Code is never unpickled.

    Raises ConfigError for an option that is needed or wrong, or another's file at `out`; WeightsError for a
    checkpoint that cannot be read, is of another net, or is incomplete. Nothing is written then.
    """
    path, out = Path(path), Path(out)
    if source not in SOURCES:
        raise ConfigError(f"--from must be {' or '.join(SOURCES)}, not {source!r}.")
    if out.suffix != ".safetensors":
        raise ConfigError(f"the output {out} must be named FILE.safetensors: give such a name to -o.")
    check_own(out)
    content, meta = _read(path)
    prefix = "module." if all(key.startswith("module.") for key in content) else ""  # of DataParallel
    state = {key.removeprefix(prefix): value for key, value in content.items()}
    state = {key: value for key, value in state.items() if not key.startswith(NOT_OF_THE_NET)}
    layout, style = _layout(path, source, state, style, head)
    tensors = from_mmdet(state) if source == "mmdet" else from_torchvision(state)
    weight, bias = (tensors.get(key, torch.zeros(0)) for key in CLASSIFIER)
    if weight.dim() != 4 or bias.shape != weight.shape[:1] or len(bias) % layout.per_cell:
        raise WeightsError(f"{path} lacks the head's classifier, or a part of it: the checkpoint is incomplete.")
    if source == "torchvision":
        _convert_torchvision(tensors, layout, classes)
    found = _class_names(path, classes, meta, len(tensors[CLASSIFIER[1]]) // layout.per_cell)
    description = described(
        {
            "model": layouts.model_settings(layout, style, _resnet(path, tensors), *_shown(layout, tensors)),
            "min_size": layouts.MIN_SIZE,
            "max_size": layouts.MAX_SIZE,
            "classes": found,
            "category_ids": COCO_CATEGORY_IDS if found == COCO_CLASSES else range(1, len(found) + 1),
            "source": f"{SOURCES[source]}'s {layout.name}: {path.name}",
        }
    )
    _check_fit(path, tensors, description)
    copies = {key: value.to(torch.float32, copy=True).contiguous() for key, value in tensors.items()}
    try:
        write_bytes(out, save(copies, {"msil": to_text(description)}))  # save_file's can be read by their owner alone
    except OSError as error:
        raise WeightsError(f"{out} cannot be written ({error.strerror or error}): choose another -o.") from error
    model = description.model
    body = f"style {style}, norm {model.backbone['norm']}, {model.channel_order} images, mean {model.image_mean}"
    return [
        f"{description.source}: {len(tensors)} tensors on {model.backbone['name']} ({body}), {len(found)} classes",
        f"  thresholds: score {model.score_thresh}, NMS {model.nms_thresh}, {model.detections_per_img} detections",
    ]


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """State dict and meta of a checkpoint."""
    try:
        names = set(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # no zip file: of before PyTorch 1.6, of safetensors, or damaged
        names = set()
    if refused := sorted(name for name in names if not name.startswith(HARMLESS)):
        raise WeightsError(
            f"{path} holds {listed(refused, 3)}, which is not loaded as it could run code: a checkpoint has only "
            "tensors and plain values in its state_dict and meta, so get it from its authors again."
        )
    # A class each, since torch finds the placeholder's name by its class.
    with safe_globals([(type("Inert", (Inert,), {}), name) for name in names]):  # pyright: ignore[reportArgumentType]
        content = load_file(path)
    meta = content.get("meta") if isinstance(content, Mapping) else None
    return state_dict_of(content, path), meta if isinstance(meta, Mapping) else {}


def _layout(
    path: Path, source: str, state: Mapping[str, Tensor], style: str | None, head: str | None
) -> tuple[Layout, str]:
    """The published layout with such keys, and the style of its ResNet."""
    found = [layout for layout in layouts.LAYOUTS if any(key.startswith(layout.keys) for key in state)]
    if not found:
        known = ", ".join(dict.fromkeys(layout.name for layout in layouts.LAYOUTS if layout.source == source))
        raise WeightsError(
            f"{path} holds no head of {SOURCES[source]}'s {known}, by its key names: give the checkpoint of such a "
            "detector, whole."
        )
    if (other := found[0].source) != source:
        raise ConfigError(f"{path} is {SOURCES[other]}'s, by its key names: give --from {other}.")
    options = {
        "style": (style, list(found[0].norms), "caffe if its config's name has caffe in it, else pytorch"),
        "head": (
            head,
            [layout.head for layout in found],
            "fcos if that name has normbbox-centeronreg in it, else fcos_plain",
        ),
    }
    needed = [f"--{option} ({hint})" for option, (value, known, hint) in options.items() if not value and known[1:]]
    what = f"{path} is {SOURCES[source]}'s {found[0].name}"
    if needed:
        raise ConfigError(f"{what}, whose keys do not show the whole net: give {' and '.join(needed)}.")
    for option, (value, known, _) in options.items():
        if value not in (None, *known):
            raise ConfigError(f"{what}, for which --{option} can be {' or '.join(known)}, not {value}.")
    return next(layout for layout in found if head in (None, layout.head)), style or next(iter(found[0].norms))


def _shown(layout: Layout, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
    """The channels of the head, and those of its options that its tensors show."""
    tower = [key for key in tensors if key.startswith(TOWERS)]
    shown: dict[str, Any] = {
        "num_convs": len({key.split(".")[2] for key in tower}),
        "norm_groups": 32 if any(".norm." in key for key in tower) else None,
    }
    if layout.head == "fcos":  # before biases came to its towers it was published without
        shown["conv_bias"] = "head.cls_tower.0.conv.bias" in tensors
    return tensors[CLASSIFIER[0]].shape[1], shown


def _resnet(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """The name of the backbone, by its blocks."""
    blocks = [len({key.split(".")[2] for key in tensors if key.startswith(f"backbone.layer{i}.")}) for i in range(1, 5)]
    bottleneck = "backbone.layer1.0.conv3.weight" in tensors
    for name, (block, layers) in DEPTHS.items():
        if layers == blocks and (block is resnet.Bottleneck) == bottleneck:
            return name
    raise WeightsError(
        f"{path} has a backbone with {', '.join(map(str, blocks))} blocks in its four stages: only the ResNets "
        f"{', '.join(DEPTHS)} can be imported, whole."
    )


def _convert_torchvision(tensors: dict[str, Tensor], layout: Layout, classes: Sequence[str] | None) -> None:
    """Leaves out the background and COCO's gaps, and scales the norms to do with NORM_EPS what they did with theirs.

    classes: of --classes; of 91 channels that are not COCO's they name 90.
    """
    count = len(tensors[CLASSIFIER[1]]) // layout.per_cell
    with_gaps = count == 91 and (not classes or len(classes) == len(COCO_CLASSES))
    kept = COCO_CATEGORY_IDS if with_gaps else range(1, count)
    for key in CLASSIFIER:  # a row for each class of each of a cell's anchors
        tensors[key] = tensors[key].unflatten(0, (-1, count))[:, list(kept)].flatten(0, 1)
    for key in [key for key in tensors if key.endswith(".running_var") and layout.norm_eps != NORM_EPS]:
        weight = f"{key.removesuffix('running_var')}weight"
        ratio = (tensors[key] + NORM_EPS) / (tensors[key] + layout.norm_eps)
        tensors[weight] = tensors[weight] * ratio.sqrt()


def _class_names(path: Path, given: Sequence[str] | None, meta: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """given: of --classes; else those in the checkpoint's meta, of 3.x or 2.x; else COCO's or VOC's by their number."""
    dataset = meta.get("dataset_meta")
    own = (dataset if isinstance(dataset, Mapping) else {}).get("classes") or meta.get("CLASSES")
    own = (own,) if isinstance(own, str) else own
    if not isinstance(own, list | tuple) or len(own) != count:
        own = layouts.CLASSES.get(count)
    names = tuple(map(str, given or own or ()))
    if not names:
        raise ConfigError(f"{path} does not name its {count} classes: give them with --classes, in their order.")
    if not len(set(names)) == len(names) == count:
        raise ConfigError(f"{path} has {count} classes: give so many different names with --classes, not {len(names)}.")
    return names


def _check_fit(path: Path, tensors: Mapping[str, Tensor], description: Description) -> None:
    """The tensors must be exactly those of the described detector, and finite."""
    if broken := [key for key, value in tensors.items() if not value.isfinite().all()]:
        raise WeightsError(
            f"{path} holds values that are not finite in {listed(broken, 8)} (in our names): take a checkpoint of "
            "before its training diverged."
        )
    model = description.model
    check_model(model)
    with torch.device("meta"):  # shapes alone
        detector = detector_from_config(model, len(description.classes), layouts.MIN_SIZE, layouts.MAX_SIZE)
    if wrong := differences(detector.state_dict(), tensors, count=8):
        raise WeightsError(
            f"{path} is not a whole {model.head['name']} on {model.backbone['name']}: it {wrong} (in our names), so "
            "nothing is written; take the checkpoint of such a detector, undamaged."
        )
