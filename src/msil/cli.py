"""`msil VERB`: what is not a training run."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from msil.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 1 where some images could not be read, or 2 for what the user can mend."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="msil", description="MSIL detectors: weights, predictions, export.")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    weights = verbs.add_parser("weights", help="checkpoints of other projects").add_subparsers(
        required=True, metavar="import"
    )
    importer = weights.add_parser(
        "import",
        help="turn a checkpoint of MMDetection or torchvision into a file for model.weights",
        description="Turn a checkpoint of MMDetection (FCOS, VFNet; 2.x and 3.x) or of torchvision's "
        "fcos_resnet50_fpn into a safetensors file for model.weights, `msil predict` and `msil export`. "
        "No code in the checkpoint is run.",
    )
    importer.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    importer.add_argument("--from", dest="source", required=True, choices=("mmdet", "torchvision"))
    importer.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.safetensors")
    importer.add_argument(
        "--style", choices=("pytorch", "caffe"), help="of the ResNet, where the checkpoint carries no config"
    )
    importer.add_argument(
        "--form", choices=("improved", "plain"), help="of FCOS, where the checkpoint carries no config"
    )
    importer.add_argument("--classes", type=_names, metavar="A,B,...", help="where the checkpoint does not name them")
    importer.add_argument("-v", "--verbose", action="store_true", help="every renamed key on a line of its own")
    importer.set_defaults(run=_import)

    predict = verbs.add_parser("predict", help="draw a detector's boxes on images, and write them as json")
    predict.add_argument("source", type=Path, metavar="IMAGE_OR_DIR")
    predict.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="a run's, or an imported one")
    predict.add_argument("--out", type=Path, default=Path("predictions"), metavar="DIR", help="default: predictions")
    predict.add_argument("--score-thresh", type=float, default=0.3, metavar="P", help="draw and write from here on")
    predict.set_defaults(run=_predict)

    export = verbs.add_parser("export", help="write a detector as one ONNX file, checked in onnxruntime")
    export.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a run's, or an imported one")
    export.add_argument("--onnx", type=Path, required=True, metavar="FILE.onnx")
    export.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of the example image; default: its own")
    export.add_argument("--static", action="store_true", help="for images of that size alone")
    export.set_defaults(run=_export)
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _import(options: argparse.Namespace) -> int:
    from msil.checkpoints.importer import import_checkpoint, report_lines

    report = import_checkpoint(
        options.checkpoint,
        options.source,
        options.output,
        style=options.style,
        form=options.form,
        classes=options.classes,
    )
    print("\n".join(report_lines(report, verbose=options.verbose)))
    return 0


def _predict(options: argparse.Namespace) -> int:
    import torch

    from msil.checkpoints.load import load_detector
    from msil.inference.predict import predict_folder

    detector, description = load_detector(options.checkpoint)
    detector.to("cuda" if torch.cuda.is_available() else "cpu")
    detector.score_thresh = min(detector.score_thresh, options.score_thresh)
    summary = predict_folder(
        detector,
        description.classes,
        options.source,
        options.out,
        checkpoint=str(options.checkpoint),
        score_thresh=options.score_thresh,
    )
    for failure in summary.failures:
        print(f"error: {failure}", file=sys.stderr)
    plural = "" if summary.images == 1 else "s"
    print(f"{summary.detections} detections on {summary.images} image{plural} in {options.out}, {summary.result.name}")
    return 1 if summary.failures else 0


def _export(options: argparse.Namespace) -> int:
    from msil.checkpoints.load import load_detector
    from msil.inference.export import export_lines, export_onnx

    detector, description = load_detector(options.checkpoint)
    short = description.min_size
    size = options.size or (short, min(short * 4 // 3, description.max_size))
    report = export_onnx(
        detector, options.onnx, classes=description.classes, image_size=size, dynamic=not options.static
    )
    print("\n".join(export_lines(report)))
    return 0
