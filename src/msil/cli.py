"""`msil VERB`: what is not a training run."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from msil import __version__
from msil.errors import UserError, print_anything

if TYPE_CHECKING:
    from msil.data.annotations import AnnotatedImages


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 1 where some images could not be read, or 2 for what the user can mend."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    print_anything()
    words = sys.argv[1:] if arguments is None else arguments
    try:
        if words[:1] == ["train"]:
            return _train(words[1:])
        options = _parser().parse_args(words)
        return options.run(options)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("msil"):
            raise
        print(f'error: {error.name} is not installed: run pip install "msil[train]".', file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="msil",
        description="MSIL detectors: weights, predictions, export, figures and report.",
        epilog="docs/ has a page on each; docs/extending.md: a block, a head, a backbone or a data set of your own.",
    )
    parser.add_argument("--version", action="version", version=f"msil {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    verbs.add_parser(
        "train", help="train, evaluate and sweep, as python run.py does; msil train --help", add_help=False
    )

    weights = verbs.add_parser("weights", help="checkpoints of other projects").add_subparsers(
        required=True, metavar="import"
    )
    importer = weights.add_parser(
        "import",
        help="turn a checkpoint of MMDetection or torchvision into a file for model.weights",
        description="Turn a checkpoint of MMDetection (FCOS, VFNet, RetinaNet, ATSS, GFL, TOOD; 2.x and 3.x) or of "
        "torchvision's fcos_resnet50_fpn, retinanet_resnet50_fpn or retinanet_resnet50_fpn_v2 into a safetensors file "
        "for model.weights, `msil predict` and `msil export`. No code in the checkpoint is run.",
    )
    importer.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    importer.add_argument("--from", dest="source", required=True, choices=("mmdet", "torchvision"))
    importer.add_argument("-o", "--out", type=Path, required=True, metavar="FILE.safetensors")
    importer.add_argument("--style", choices=("pytorch", "caffe"), help="of MMDetection's ResNet")
    importer.add_argument("--head", metavar="NAME", help="of model/head, for MMDetection's FCOS, which has two forms")
    importer.add_argument("--classes", type=_names, metavar="A,B,...", help="where the checkpoint does not name them")
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

    _add_data(verbs)
    _add_figure(verbs)
    _add_runs(verbs)
    _add_report(verbs)
    return parser


def _add_data(verbs: argparse._SubParsersAction) -> None:
    data = verbs.add_parser("data", help="fetch VOC or COCO, or show what is in a data set").add_subparsers(
        required=True, metavar="get|show"
    )
    get = data.add_parser(
        "get",
        help="fetch, check and unpack a public set",
        description="Fetch a public set from those who publish it, check and unpack it: 0.9 GB of voc2007, 2 GB of "
        "voc2012, 20 GB of coco2017, and as much again for its files. What is there is not fetched again; the same "
        "command goes on where one ended. An archive that lies in DIR under its own name is taken from there.",
    )
    get.add_argument("set", choices=("voc2007", "voc2012", "coco2017"))
    get.add_argument("--root", type=Path, required=True, metavar="DIR", help="the folder to put it in")
    get.set_defaults(run=_get)

    show = data.add_parser(
        "show",
        help="count a data set's images, boxes and classes, check it, and draw some of it",
        description="Print a data set's counts of images, boxes and classes, the sizes of its boxes and what the audit "
        "before a training would find, and draw up to 12 of its images with their boxes.",
    )
    show.add_argument("root", type=Path, metavar="DIR")
    show.add_argument("--data", choices=("coco", "voc"), help="its layout; default: by what is in DIR")
    show.add_argument("--split", metavar="NAME", help="default: all")
    show.add_argument("--out", type=Path, default=Path("figures/data.png"), metavar="FILE.png")
    show.set_defaults(run=_show)


def _add_figure(verbs: argparse._SubParsersAction) -> None:
    figures = verbs.add_parser("figure", help="the paper's figures 4 to 6").add_subparsers(
        required=True, metavar="FIGURE"
    )
    sets = ("coco", "voc", "shapes")
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
    heatmap.add_argument("--classes", type=_names, metavar="A,B,...", help="of --data voc, if not VOC's own")
    heatmap.add_argument("--out", type=Path, default=Path("figures/heatmap.png"), metavar="FILE.png")
    heatmap.set_defaults(run=_heatmap)

    centers = figures.add_parser("centers", help="in which quarter of the images objects lie, by class (figure 5)")
    centers.add_argument("--data", choices=sets, required=True)
    centers.add_argument("--root", type=Path, required=True, metavar="DIR")
    centers.add_argument("--split", required=True, metavar="NAME")
    centers.add_argument(
        "--classes", type=_names, metavar="A,B,...", help="default: the paper's nine of COCO, else the nine largest"
    )
    centers.add_argument("--out", type=Path, default=Path("figures/centers.png"), metavar="FILE.png")
    centers.set_defaults(run=_centers)


def _add_runs(verbs: argparse._SubParsersAction) -> None:
    runs = verbs.add_parser("runs", help="all runs of a folder, the best first, and those that have not finished")
    runs.add_argument("runs_dir", type=Path, nargs="?", default=Path("runs"), metavar="DIR", help="default: runs")
    runs.set_defaults(run=_runs)
    compare = verbs.add_parser("compare", help="two runs: settings that differ, difference of AP, AP by class")
    for name in ("A", "B"):
        compare.add_argument(name, metavar=name, help="a run's folder, or its name below runs/")
    compare.set_defaults(run=_compare)


def _add_report(verbs: argparse._SubParsersAction) -> None:
    report = verbs.add_parser(
        "report",
        help="the paper's tables and figures from finished runs, as one page and as files",
        description="Write report.html, one page that needs no network, and table1 to table5 as .md, .csv and .tex "
        "from the finished runs in RUNS_DIR.",
    )
    report.add_argument(
        "runs_dir", type=Path, nargs="?", default=Path("runs"), metavar="RUNS_DIR", help="default: runs"
    )
    report.add_argument("--out", type=Path, metavar="DIR", help="default: RUNS_DIR/report")
    report.set_defaults(run=_report)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _train(words: list[str]) -> int:
    from msil.main import main as run_py

    sys.argv = [sys.argv[0], *words]  # where Hydra reads them
    run_py()
    return 0


def _import(options: argparse.Namespace) -> int:
    from msil.checkpoints.convert import import_checkpoint

    lines = import_checkpoint(
        options.checkpoint,
        options.source,
        options.out,
        style=options.style,
        head=options.head,
        classes=options.classes,
    )
    print("\n".join(lines))
    return 0


def _predict(options: argparse.Namespace) -> int:
    import torch

    from msil.checkpoints.load import load_detector
    from msil.inference.predict import predict_folder

    detector, description = load_detector(options.checkpoint)
    detector.to("cuda" if torch.cuda.is_available() else "cpu")
    detector.score_thresh = min(detector.score_thresh, options.score_thresh)
    content = predict_folder(
        detector,
        description.classes,
        options.source,
        options.out,
        checkpoint=str(options.checkpoint),
        score_thresh=options.score_thresh,
    )
    for failure in content["failed"]:
        print(f"error: {failure['error']}", file=sys.stderr)
    images = content["images"]
    count = sum(len(image["detections"]) for image in images)
    plural = "" if len(images) == 1 else "s"
    print(f"{count} detections on {len(images)} image{plural} in {options.out}, detections.json")
    return 1 if content["failed"] else 0


def _export(options: argparse.Namespace) -> int:
    from msil.checkpoints.load import load_dense_detector
    from msil.inference.export import export_onnx

    detector, description = load_dense_detector(options.checkpoint)
    short = description.min_size
    size = options.size or (short, min(short * 4 // 3, description.max_size))
    lines = export_onnx(
        detector, options.onnx, classes=description.classes, image_size=size, dynamic=not options.static
    )
    print("\n".join(lines))
    return 0


def _get(options: argparse.Namespace) -> int:
    from msil.data.get import get_data

    for line in get_data(options.set, options.root):
        print(line, flush=True)
    return 0


def _show(options: argparse.Namespace) -> int:
    from msil.reporting.dataset_sheet import show_data

    for line in show_data(options.root, options.out, options.data, options.split):
        print(line, flush=True)
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
        dataset=dataset,
        about={"checkpoints": dict(zip(names, map(str, options.checkpoint), strict=True)), "split": options.split},
    )
    print("\n".join(lines))
    return 0


def _figure_data(options: argparse.Namespace) -> AnnotatedImages:
    """The split that --data and --root name, else that of the first checkpoint's own data."""
    from msil.checkpoints.description import run_settings
    from msil.data.module import build_split, split_of_run
    from msil.data.voc import VOC_CLASSES
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
    from msil.reporting.centers import write_centers

    print("\n".join(write_centers(_figure_data(options).annotations, options.out, options.classes)))
    return 0


def _runs(options: argparse.Namespace) -> int:
    from msil.reporting.own_runs import runs_tables
    from msil.reporting.tables import to_text

    print("\n".join(to_text(table) for table in runs_tables(options.runs_dir)), end="")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from msil.reporting.compare import compared
    from msil.runs import read_run

    print(compared(read_run(options.A), read_run(options.B)), end="")
    return 0


def _report(options: argparse.Namespace) -> int:
    from msil.reporting.report import write_report

    out = options.out or options.runs_dir / "report"
    try:
        page, *_ = write_report(options.runs_dir, out)
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {out} ({error}): choose another folder with --out."
        ) from error
    print(f"the page: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
