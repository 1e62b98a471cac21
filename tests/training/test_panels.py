"""What a dashboard gets at the end of a run and of a sweep, read back from the disk; no network, no account."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from msil.config import Config, config_hash, plain
from msil.data.coco import CocoDataset
from msil.metrics.coco import to_coco
from msil.metrics.record import EvaluationRecord, make_record, write_record
from msil.runs import write_json
from msil.training.experiment import run
from msil.training.loggers import tensorboard_logger
from msil.training.panels import show_panels

from .cases import TINY, module_of, rows, tiny_config
from .dashboards import begun, events, offline_runs, summary, table, without_login

CHARTS = {"class AP", "precision and recall", "precision and recall by class", "confusion", "errors", "sizes"}
ROOT = Path(__file__).resolve().parents[2]
PERFECT, BLIND = 0, 2  # images with nothing but hits, and without a detection of 0.3

# In a process of its own: W&B reads its settings once a process.
SCRIPT = """
import json, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from training.cases import module_of, tiny_config
from msil.metrics.record import read_record
from msil.config import LoggerName
from msil.data.coco import CocoDataset
from msil.reporting.tables import sweep_table
from msil.training.loggers import tensorboard_logger, wandb_logger
from msil.training.panels import show_panels
from msil.training.sweep_panels import show_sweep
import wandb

work, shapes = Path(sys.argv[2]), Path(sys.argv[3])
config = tiny_config(work, shapes, "model/head=vfnet", "logger=wandb", "logger.group=a-sweep")
results = [{**json.loads((folder / "result.json").read_text()), "folder": str(folder)}
           for folder in sorted(work.glob("run-*"))]
folder = Path(results[0]["folder"])
loggers = [wandb_logger(config.logger, folder, "a-run", {"seed": 0}, job_type="train"),
           tensorboard_logger(folder, {"seed": 0}, None)]
detector = module_of(config).detector
show_panels(loggers, results[0], read_record(folder), detector, CocoDataset(shapes, "val"), 7)
wandb.finish()

sweep = sweep_table(results, varied=["model.msil.apply"], table="table2")
show_sweep(config.logger, work / "sweep", "table2-12345678", sweep, results, "table2")
config.logger.offline = False  # as if there were a login
print("now online")
show_sweep(config.logger, work / "sweep", "table2-12345678", sweep, results, "table2")
"""


@dataclass(frozen=True)
class Logged:
    work: Path
    stdout: list[str]
    data: CocoDataset
    class_aps: list[list[float]]  # of the two runs, by pycocotools
    aps: list[float]

    @property
    def run(self) -> Path:
        (folder,) = offline_runs(self.work / "run-0")
        return folder

    @property
    def sweep(self) -> Path:
        (folder,) = offline_runs(self.work / "sweep")
        return folder


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Logged:
    """Two runs' evaluations with made-up detections: the panels of the first, and the tables of both as a sweep."""
    work = tmp_path_factory.mktemp("logged")
    data = CocoDataset(shapes, "val")
    evaluated = [judged(data, seed) for seed in range(2)]
    for seed, (apply, (record, _, ap)) in enumerate(zip(("none", "both"), evaluated, strict=True)):
        config = tiny_config(work, shapes, "model/head=vfnet", f"model.msil.apply={apply}")
        write_record(work / f"run-{seed}", record)
        write_json(work / f"run-{seed}" / "result.json", result_of(config, ap))
    (work / "sweep").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(ROOT / "tests"), str(work), str(shapes)],
        env=without_login(work / "home"), cwd=work, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return Logged(work, done.stdout.splitlines(), data, [one[1] for one in evaluated], [one[2] for one in evaluated])


def judged(data: CocoDataset, seed: int) -> tuple[EvaluationRecord, list[float], float]:
    """Detections near the truth, some of them of a wrong class; their AP by class and over all, by pycocotools."""
    random = np.random.default_rng(seed)
    truth = to_coco(data.annotations)
    ids = [data.image_id(i) for i in range(len(data))]
    found = []
    for annotation in truth["annotations"]:
        place = ids.index(annotation["image_id"])
        x, y, width, height = annotation["bbox"]
        exact = place == PERFECT
        dx, dy = (0.0, 0.0) if exact else random.normal(scale=1, size=2)
        wrong = not exact and random.random() < 0.2
        category = data.category_ids[int(random.integers(4))] if wrong else annotation["category_id"]
        score = 0.1 if place == BLIND else 0.9 if exact else float(np.float32(random.uniform(0.3, 1)))
        found.append({"image_id": annotation["image_id"], "category_id": category, "score": score,
                      "bbox": [float(x + dx), float(y + dy), float(width), float(height)]})  # fmt: skip
    boxes = np.array([one["bbox"] for one in found])
    boxes[:, 2:] += boxes[:, :2]
    record = make_record(
        data.annotations,
        np.array(ids),
        np.array([one["image_id"] for one in found]),
        boxes.astype(np.float32),
        np.array([one["score"] for one in found], dtype=np.float32),
        np.array([data.category_ids.index(one["category_id"]) for one in found]),
    )
    by_class = [average_precision(truth, found, [category]) for category in data.category_ids]
    return record, by_class, average_precision(truth, found, list(data.category_ids))


def average_precision(truth: dict[str, Any], found: list[dict[str, Any]], categories: list[int]) -> float:
    ours: Any = COCO()
    ours.dataset = copy.deepcopy(truth)
    ours.createIndex()
    judge = COCOeval(ours, ours.loadRes(copy.deepcopy(found)), "bbox")
    judge.params.catIds = categories
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return float(judge.stats[0])


def result_of(config: Config, ap: float) -> dict[str, Any]:
    values = plain(config)
    return {
        "run_name": config.run_name, "status": "finished", "config_hash": config_hash(values), "seed": 0,
        "command": "python run.py", "metrics": {"AP": ap, "AP50": 0.5, "AP75": math.nan}, "parameters": 1234,
        "trainable_parameters": 1200, "flops": 5678, "flops_image_size": [64, 64], "images_per_second": 9.5,
        "train_seconds": 1.0, "total_seconds": 2.0, "epochs": 1, "steps": 2, "train_images": 16, "val_images": 8,
        "classes": ["circle"], "versions": {}, "machine": {}, "config": values,
    }  # fmt: skip


# The end of a run, in W&B


def test_the_table_of_classes_has_pycocotools_numbers(logged: Logged) -> None:
    found = table(logged.run, "classes")
    assert [row["class"] for row in found] == list(logged.data.classes)
    assert [row["AP"] for row in found] == pytest.approx(logged.class_aps[0], abs=1e-9)
    labels = logged.data.annotations.truth_labels.tolist()
    assert [row["objects"] for row in found] == [labels.count(label) for label in range(4)]
    assert min(logged.class_aps[0]) > 0.1 and max(logged.class_aps[0]) < 0.95  # or they would show little


def test_the_gallery_has_every_image_with_objects(logged: Logged) -> None:
    found = {row["image"]: row for row in table(logged.run, "gallery")}
    with_boxes = [i for i in range(len(logged.data)) if logged.data.has_boxes(i)]
    assert list(found) == [f"val/{logged.data.path(i).name}" for i in with_boxes]
    assert {PERFECT, BLIND} <= set(with_boxes)
    assert found[f"val/{logged.data.path(PERFECT).name}"]["F1"] == 1
    assert found[f"val/{logged.data.path(BLIND).name}"]["F1"] == 0
    assert found[f"val/{logged.data.path(PERFECT).name}"]["objects"] == len(logged.data[PERFECT][1].boxes)


def test_the_run_folder_alone_holds_all_pictures(logged: Logged) -> None:
    media = logged.run / "files" / "media" / "images"
    assert {path.name.split("_")[0] for path in (media / "charts").iterdir()} == CHARTS
    names = sorted(path.name for path in (media / "gallery").iterdir())
    with_boxes = [logged.data.path(i).name for i in range(len(logged.data)) if logged.data.has_boxes(i)]
    assert [name.partition("_")[0] for name in names] == [f"{i:02} {name}" for i, name in enumerate(with_boxes, 1)]
    (heatmaps,) = media.glob("heatmaps_*.png")
    for path in (heatmaps, *(media / "charts").iterdir(), *(media / "gallery").iterdir()):
        assert np.asarray(Image.open(path).convert("RGB"))[::5, ::5].std() > 5, path  # something is drawn


def test_the_curve_has_coco_recalls(logged: Logged) -> None:
    found = table(logged.run, "precision_recall_table")
    assert [row["recall"] for row in found] == pytest.approx([i / 100 for i in range(101)])
    precisions = [row["precision"] for row in found]
    assert all(later <= earlier for earlier, later in itertools.pairwise(precisions))


def test_a_dashboard_finds_the_run_in_its_sweep_by_its_result(logged: Logged) -> None:
    start = begun(logged.run)
    assert (start.run_group, start.job_type, start.display_name) == ("a-sweep", "train", "a-run")
    found = summary(logged.run)
    assert found["AP"] == pytest.approx(logged.aps[0])
    assert (found["parameters"], found["flops"], found["images_per_second"]) == (1234, 5678, 9.5)


# The end of a sweep


def test_the_tables_are_a_run_of_the_sweeps_group(logged: Logged) -> None:
    start = begun(logged.sweep)
    assert (start.run_group, start.job_type, start.display_name) == ("a-sweep", "tables", "table2-12345678 tables")


def test_the_sweep_table_has_a_row_a_run(logged: Logged) -> None:
    found = table(logged.sweep, "sweep")
    assert [(row["model.msil.apply"], row["parameters"], row["state"]) for row in found] == [
        ("none", 1234, "ok"), ("both", 1234, "ok"),
    ]  # fmt: skip
    assert [row["AP"] for row in found] == pytest.approx(logged.aps)
    assert [row["AP75"] for row in found] == [None, None]  # NaN in the results


def test_the_papers_table_has_both_numbers_and_the_difference(logged: Logged) -> None:
    plain_row, _, _, msil = table(logged.sweep, "table2")  # of none, cls, reg, both
    assert (plain_row["paper_AP"], msil["paper_AP"]) == (0.412, 0.421)  # arXiv 2303.10411, Table 2
    assert [plain_row["ours_AP"], msil["ours_AP"]] == pytest.approx(logged.aps)
    assert msil["difference"] == pytest.approx(logged.aps[1] - logged.aps[0], abs=1e-9)
    assert msil["difference_low"] <= msil["difference"] <= msil["difference_high"]
    assert plain_row["difference"] is None


def test_offline_is_said_once_and_a_failure_in_one_line(logged: Logged) -> None:
    run_line, sweep_line, online, failure = logged.stdout
    assert run_line.startswith("W&B: no login was found, so this run is logged offline; later: wandb sync ")
    assert sweep_line == (
        "W&B: no login was found, so the sweep's table is logged offline; later: wandb sync "
        f"{logged.work}/sweep/wandb/offline-run-*"
    )
    assert online == "now online"
    assert failure.startswith("W&B: the sweep's tables were not logged (")


STANDIN = ROOT / "tests" / "standin_run.py"


def sweep_of(program: Path, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(program), "-m", "logger=wandb", f"runs_dir={tmp_path / 'runs'}", *arguments],
        env=without_login(tmp_path / "home"), cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_that_must_be_online_stops_before_it_trains(tmp_path: Path, shapes: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "logger=wandb", "logger.offline=false", f"runs_dir={tmp_path / 'runs'}",
         f"data.root={shapes}", *TINY],
        env=without_login(tmp_path / "home"), cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: W&B cannot begin a run (")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("runs/*/checkpoints"))


@pytest.mark.slow
def test_a_sweep_does_not_fail_for_wandb(tmp_path: Path) -> None:
    """Its jobs end well without a word to W&B; the launcher asks for a server, which nobody may use without a login."""
    done = sweep_of(STANDIN, tmp_path, "seed=0,9", "logger.offline=false")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (line,) = [line for line in done.stdout.splitlines() if "W&B" in line or "wandb" in line.casefold()]
    assert line.startswith("W&B: the sweep's tables were not logged (")
    assert "2 ok, 0 failed of 2." in done.stdout


@pytest.mark.slow
def test_a_sweep_from_end_to_end(tmp_path: Path, shapes: Path) -> None:
    tiny = [word for word in TINY if not word.startswith("trainer.progress_bar")]
    done = sweep_of(ROOT / "run.py", tmp_path, "model.msil.apply=none,both", f"data.root={shapes}", *tiny)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (sweep,) = (tmp_path / "runs" / "sweeps").iterdir()
    (tables,) = offline_runs(sweep)
    results = [json.loads(path.read_text()) for path in sorted((tmp_path / "runs").glob("*/result.json"))]
    runs = [offline_runs(tmp_path / "runs" / result["run_name"])[0] for result in results]
    assert {begun(run).run_group for run in (*runs, tables)} == {sweep.name}
    assert [begun(run).job_type for run in (*runs, tables)] == ["train", "train", "tables"]
    found = {row["run_name"]: row["AP"] for row in table(tables, "sweep")}
    assert found == {result["run_name"]: result["metrics"]["AP"] for result in results}
    for folder, result in zip(runs, results, strict=True):
        assert summary(folder)["AP"] == result["metrics"]["AP"]
        assert [row["class"] for row in table(folder, "classes")] == result["classes"]
    (line,) = [line for line in done.stdout.splitlines() if "W&B" in line]
    assert "so the sweep's table is logged offline" in line


# TensorBoard


def test_tensorboard_gets_the_same_pictures(logged: Logged) -> None:
    reader = events(logged.work / "run-0" / "tensorboard")
    tags = set(reader.Tags()["images"])
    assert {f"charts/{name}" for name in CHARTS} | {"heatmaps"} <= tags
    with_boxes = [logged.data.path(i).name for i in range(len(logged.data)) if logged.data.has_boxes(i)]
    gallery = sorted(tag for tag in tags if tag.startswith("gallery/"))
    assert gallery == [f"gallery/{i:02} {name}" for i, name in enumerate(with_boxes, 1)]
    assert {event.step for tag in tags for event in reader.Images(tag)} == {7}
    # The same pixels as in W&B.
    (file,) = (logged.run / "files" / "media" / "images").glob("heatmaps_*.png")
    ours = Image.open(io.BytesIO(reader.Images("heatmaps")[0].encoded_image_string))
    assert np.array_equal(np.asarray(ours), np.asarray(Image.open(file)))


@pytest.fixture(scope="module")
def tensorboard_run(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> tuple[Path, dict[str, Any]]:
    config = tiny_config(tmp_path_factory.mktemp("runs"), shapes, "logger=tensorboard")
    return Path(config.runs_dir) / config.run_name, run(config)


def test_tensorboard_has_the_scalars_of_metrics_csv(tensorboard_run: tuple[Path, dict[str, Any]]) -> None:
    run_dir, _ = tensorboard_run
    reader = events(run_dir / "tensorboard")
    logged_rows = rows(run_dir)
    names = {name for row in logged_rows for name in row} - {"step"}
    assert set(reader.Tags()["scalars"]) == names >= {"loss", "lr", "AP", "epoch"}
    for name in names:
        theirs = [(event.step, event.value) for event in reader.Scalars(name)]
        ours = [(int(row["step"]), float(row[name])) for row in logged_rows if name in row]
        assert [step for step, _ in theirs] == [step for step, _ in ours]
        # TensorBoard keeps 32 bits.
        assert np.array([value for _, value in theirs]) == pytest.approx(
            np.array([value for _, value in ours], dtype=np.float32), nan_ok=True
        )


def test_tensorboard_has_predictions_of_every_evaluation_and_the_result(
    tensorboard_run: tuple[Path, dict[str, Any]],
) -> None:
    run_dir, result = tensorboard_run
    reader = events(run_dir / "tensorboard")
    # Two epochs of two steps, and the final evaluation after the last.
    assert sorted({event.step for event in reader.Images("predictions")}) == [1, 3]
    assert "heatmaps" in reader.Tags()["images"]
    text = reader.Tensors("result/text_summary")[0].tensor_proto.string_val[0].decode()
    assert f"parameters: {result['parameters']}" in text
    assert f"AP: {result['metrics']['AP']}" in text


def test_a_picture_that_cannot_be_made_costs_the_panels_alone(
    tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shapes, tmp_path / "shapes")
    data = CocoDataset(tmp_path / "shapes", "val")
    record, _, ap = judged(data, 0)
    data.path(PERFECT).unlink()
    config = tiny_config(tmp_path, shapes)
    capsys.readouterr()
    logger = tensorboard_logger(tmp_path, {}, None)
    show_panels([logger], result_of(config, ap), record, module_of(config).detector, data, 3)
    logger.finalize("success")
    assert capsys.readouterr().out.startswith(
        "the run is complete, but not all of its panels could be logged (DataError: "
    )
    tags = events(tmp_path / "tensorboard").Tags()
    assert "result/text_summary" in tags["tensors"] and not tags["images"]


def test_the_logger_does_not_change_which_run_it_is(tensorboard_run: tuple[Path, dict[str, Any]], shapes: Path) -> None:
    run_dir, result = tensorboard_run
    again = run(tiny_config(run_dir.parent, shapes, "logger=csv"))
    assert again["skipped"] and again["config_hash"] == result["config_hash"]
