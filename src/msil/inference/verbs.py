"""The verbs of `msil` that use a trained detector: predict, export, figure."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from msil.data.annotations import AnnotatedImages


def add_verbs(verbs: argparse._SubParsersAction) -> None:
    predict = verbs.add_parser("predict", help="draw a detector's boxes on images and videos, and write them as json")
    predict.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="an image, a video, a folder of them, or a pattern: 'in/**/*.jpg'"
    )
    predict.add_argument(
        "--checkpoint",
        type=a_path,
        required=True,
        metavar="FILE",
        help="a run's folder or checkpoint, an imported file",
    )
    predict.add_argument("--out", type=a_path, default=Path("predictions"), metavar="DIR", help="default: predictions")
    predict.add_argument("--threshold", type=float, default=0.3, metavar="P", help="lowest score to draw and write "
                         "(0.3)")  # fmt: skip
    predict.add_argument("--batch-size", type=int, default=1, metavar="N", help="images at a time (1)")
    predict.add_argument("--format", choices=("coco", "yolo"), help="write COCO's results json or YOLO's txt as well")
    predict.set_defaults(run=_predict)

    export = verbs.add_parser("export", help="write a detector as one ONNX file, checked in onnxruntime")
    export.add_argument(
        "checkpoint", type=a_path, metavar="CHECKPOINT", help="a run's folder or checkpoint, or an imported file"
    )
    export.add_argument("--onnx", type=a_path, required=True, metavar="FILE.onnx")
    export.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of the example image; default: its own")
    export.add_argument("--static", action="store_true", help="for images of that size alone")
    export.add_argument("--batch", type=int, metavar="N", help="for N images of one size at a time; default: one image")
    export.set_defaults(run=_export)
    _add_figure(verbs)


def _add_figure(verbs: argparse._SubParsersAction) -> None:
    figures = verbs.add_parser("figure", help="the paper's figures 4 to 6").add_subparsers(
        required=True, metavar="FIGURE"
    )
    sets = ("coco", "voc", "yolo", "auto", "shapes")
    heatmap = figures.add_parser(
        "heatmap",
        help="where the towers' features are strong (figures 4 and 6), and their share of energy on the objects",
        description="Draw the classification and the regression tower's features behind MSIL as heat maps on images. "
        "With --split, also measure over that whole split which share of the maps' energy lies inside the boxes and "
        "on their borders.",
    )
    heatmap.add_argument(
        "--checkpoint", type=Path, action="append", required=True, metavar="FILE",
        help="repeat to compare: the others with the first",
    )  # fmt: skip
    heatmap.add_argument(
        "--image", type=Path, action="append", default=[], metavar="FILE", help="repeat; default: four of --split"
    )
    heatmap.add_argument("--level", default="merged", metavar="L", help="P3, P4, ... or merged, which is the default")
    heatmap.add_argument("--split", metavar="NAME", help="of the data that the first checkpoint's run used, or --data")
    heatmap.add_argument("--data", choices=sets, help="layout of other data, at --root")
    heatmap.add_argument("--root", type=Path, metavar="DIR", help="of the data, where it is not the run's own")
    heatmap.add_argument("--classes", type=names, metavar="A,B,...", help="of --data voc, if not VOC's own")
    heatmap.add_argument("--out", type=Path, default=Path("figures/heatmap.png"), metavar="FILE.png")
    heatmap.set_defaults(run=_heatmap)

    centers = figures.add_parser("centers", help="in which quarter of the images objects lie, by class (figure 5)")
    centers.add_argument("--data", choices=sets, required=True)
    centers.add_argument("--root", type=Path, required=True, metavar="DIR")
    centers.add_argument("--split", required=True, metavar="NAME")
    centers.add_argument(
        "--classes", type=names, metavar="A,B,...", help="default: the paper's nine of COCO, else the nine largest"
    )
    centers.add_argument("--out", type=Path, default=Path("figures/centers.png"), metavar="FILE.png")
    centers.set_defaults(run=_centers)


def a_path(text: str) -> Path:
    return Path(text).expanduser()


def names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _predict(options: argparse.Namespace) -> int:
    print(f"loading {options.checkpoint}", flush=True)  # it takes seconds, most of them PyTorch's
    import torch

    from msil.checkpoints.load import load_detector
    from msil.detection.folding import keep_folded
    from msil.errors import counted
    from msil.inference.formats import written
    from msil.inference.predict import predict_files

    detector, description = load_detector(options.checkpoint)
    detector.to("cuda" if torch.cuda.is_available() else "cpu")
    detector.lay_out(channels_last=True)
    keep_folded(detector)
    detector.score_thresh = min(detector.score_thresh, options.threshold)
    content = predict_files(
        detector,
        description.classes,
        options.sources,
        options.out,
        checkpoint=str(options.checkpoint),
        threshold=options.threshold,
        batch_size=options.batch_size,
        form=options.format,
        category_ids=description.category_ids,
        bits=description.bits,
    )
    for failure in content["failed"]:
        print(f"error: {failure['error']}", file=sys.stderr)
    images = content["images"]
    count = sum(len(image["detections"]) for image in images)
    names = ", ".join(("detections.json", *written(options.format)))
    print(f"{counted(count, 'detection')} on {counted(len(images), 'image')} in {options.out}, {names}")
    if images and not count:
        highest = content["highest_score"]
        print(
            f"hint: no score reaches {options.threshold:g}; the highest found is {highest:.2g}: try --threshold "
            f"{highest / 2:.1g}."
            if highest
            else f"hint: no score exceeds even {detector.score_thresh:g}: try --threshold 0.001, train for longer, or "
            "look whether these images are like those of the training."
        )
    return 1 if content["failed"] else 0


def _export(options: argparse.Namespace) -> int:
    print(f"loading {options.checkpoint}", flush=True)
    from msil.checkpoints.load import load_dense_detector
    from msil.inference.export import export_onnx

    detector, description = load_dense_detector(options.checkpoint)
    short = description.min_size
    size = options.size or (short, min(short * 4 // 3, description.max_size))
    lines = export_onnx(
        detector,
        options.onnx,
        classes=description.classes,
        image_size=size,
        dynamic=not options.static,
        batch=options.batch,
        progress=partial(print, flush=True),
    )
    print("\n".join(lines))
    return 0


def _heatmap(options: argparse.Namespace) -> int:
    import torch

    from msil.checkpoints.load import load_dense_detector
    from msil.inference.heatmaps import heatmap_figure, short_names

    dataset = _figure_data(options) if options.split or options.data else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = [load_dense_detector(path) for path in options.checkpoint]
    names = short_names([description.source.removeprefix("run ") for _, description in loaded])
    lines = heatmap_figure(
        {name: detector.to(device) for name, (detector, _) in zip(names, loaded, strict=True)},
        loaded[0][1].classes,
        options.image,
        options.out,
        level=options.level,
        bits=loaded[0][1].bits,
        dataset=dataset,
        about={"checkpoints": dict(zip(names, map(str, options.checkpoint), strict=True)), "split": options.split},
    )
    print("\n".join(lines))
    return 0


def _figure_data(options: argparse.Namespace) -> AnnotatedImages:
    """The split that --data and --root name, else that of the first checkpoint's own data."""
    from msil.checkpoints.description import run_settings
    from msil.data.module import build_split, split_of_run
    from msil.data.readers.voc import VOC_CLASSES
    from msil.errors import ConfigError

    if options.data:
        if not (options.root and options.split):
            raise ConfigError("--data needs --root and --split: give all three, or --split alone for a run's own data.")
        # VOC's layout has no list of its classes; the other two have.
        named = options.data == "voc" and not set(options.classes or ()) <= set(VOC_CLASSES)
        classes = list(options.classes) if named else None
        layout = "coco" if options.data == "shapes" else options.data
        return build_split({"name": layout, "root": options.root, "classes": classes}, options.split)
    settings = run_settings(options.checkpoint[0])
    if settings is None:
        raise ConfigError(f"{options.checkpoint[0]} holds no data settings: give --data and --root.")
    return split_of_run(settings["data"], options.split, options.root)


def _centers(options: argparse.Namespace) -> int:
    from msil.reporting.figures.centers import write_centers

    print("\n".join(write_centers(_figure_data(options).annotations, options.out, options.classes)))
    return 0
