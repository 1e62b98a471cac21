"""`msil VERB`: what is not a training run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from msil import __version__
from msil.errors import UserError, exit_code_of, install, plain_output
from msil.inference.verbs import add_verbs, names


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 1 where some images could not be read, or 2 for what the user can mend."""
    plain_output()
    words = sys.argv[1:] if arguments is None else arguments
    try:
        return exit_code_of(lambda: _run(words), stopped="stopped")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("msil"):
            raise
        print(f"error: {error.name} is not installed: run {install('train')}.", file=sys.stderr)
        return 2


def _run(words: list[str]) -> int:
    if words[:1] == ["train"]:  # whose words are Hydra's
        return _train(words[1:])
    options = _parser().parse_args(words)
    return options.run(options)


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
    importer.add_argument("--classes", type=names, metavar="A,B,...", help="where the checkpoint does not name them")
    importer.set_defaults(run=_import)

    add_verbs(verbs)
    _add_data(verbs)
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
    show.add_argument("--split", metavar="NAME", help="default: all")
    show.add_argument("--out", type=Path, default=Path("figures/data.png"), metavar="FILE.png")
    show.set_defaults(run=_show)


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
        description="Write report.html, one page that needs no network, and table1 to table5 and, of heads that "
        "ran both plain and with a block, hosts as .md, .csv and .tex from the finished runs in RUNS_DIR.",
    )
    report.add_argument(
        "runs_dir", type=Path, nargs="?", default=Path("runs"), metavar="RUNS_DIR", help="default: runs"
    )
    report.add_argument("--out", type=Path, metavar="DIR", help="default: RUNS_DIR/report")
    report.set_defaults(run=_report)


def _train(words: list[str]) -> int:
    from msil.main import main as run_py

    sys.argv = [sys.argv[0], *words]  # where Hydra reads them
    run_py()
    return 0


def _printed(lines: Iterable[str]) -> int:
    for line in lines:
        print(line, flush=True)
    return 0


def _import(options: argparse.Namespace) -> int:
    from msil.checkpoints.convert import import_checkpoint

    given = {name: getattr(options, name) for name in ("style", "head", "classes")}
    return _printed(import_checkpoint(options.checkpoint, options.source, options.out, **given))


def _get(options: argparse.Namespace) -> int:
    from msil.data.get import get_data

    return _printed(get_data(options.set, options.root))


def _show(options: argparse.Namespace) -> int:
    from msil.data.readers.layouts import splits_of

    splits_of(options.root)  # refuses a folder without a data set before what reads and draws one is imported
    from msil.reporting.figures.dataset_sheet import show_data

    return _printed(show_data(options.root, options.out, options.split))


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
