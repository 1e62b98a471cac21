"""msil report on made-up runs: the numbers in its files, and what the page says where something is missing."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace

import pytest
from torch import nn

from msil.checkpoints import load
from msil.cli import main
from msil.errors import ConfigError
from msil.metrics.matching import match_coco
from msil.metrics.precision import per_class
from msil.metrics.record import write_record
from msil.reporting.evidence import Evidence
from msil.reporting.groups import Result, detectors, settings
from msil.reporting.ranking import answer, class_table, ranked
from msil.reporting.report import setting_tables, write_report, write_tables
from msil.reporting.sections import detector_section, gallery_section, heatmap_section
from msil.runs import read_results

from .made_runs import evaluated, write_run, write_runs
from .test_page import Parsed


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_runs(folder)
    write_report(folder / "runs", folder / "report", say=lambda line: None)
    return folder


def parsed(page: Path) -> Parsed:
    return Parsed(page.read_text(encoding="utf-8"))


# The mean and deviation of pycocotools' own numbers, and their difference.
def test_table_2_has_the_runs_numbers(made: Path) -> None:
    results = [json.loads(path.read_text()) for path in made.glob("runs/*/result.json")]
    plain, both = (
        [run["metrics"]["AP"] for run in results if run["config"]["model"]["msil"]["apply"] == apply]
        for apply in ("none", "both")
    )
    rows = list(csv.DictReader((made / "report" / "table2.csv").open(encoding="utf-8")))
    assert [row["row"] for row in rows] == ["cls ✗, reg ✗", "cls ✓, reg ✗", "cls ✗, reg ✓", "cls ✓, reg ✓"]
    assert float(rows[0]["ours_AP"]) == pytest.approx(fmean(plain), abs=1e-12)
    assert float(rows[3]["ours_AP_std"]) == pytest.approx(stdev(both), abs=1e-12)
    assert float(rows[3]["difference"]) == pytest.approx(fmean(both) - fmean(plain), abs=1e-9)
    low, high = float(rows[3]["difference_low"]), float(rows[3]["difference_high"])
    assert 0 < low < float(rows[3]["difference"]) < high  # 1 px of noise against 3
    assert rows[2]["seeds"] == "missing" and rows[2]["difference"] == ""
    assert "python run.py experiment=table2" in (made / "report" / "table2.md").read_text(encoding="utf-8")


def test_the_page_has_what_the_issue_of_reports_asks_for(made: Path) -> None:
    page = parsed(made / "report" / "report.html")
    shown = [number for number in range(1, 6) if f"Table {number}. " in page.text]
    assert shown == [1, 2, 4, 5]  # of Table 3's detectors on ResNet-101 there is no run
    assert page.text.count("NOT comparable") == 2  # Tables 1, 2 and 4 share a recipe
    for words in ("WITHOUT MSIL", "FGPL", "f_env", "python run.py experiment=table4", "paired bootstrap", "TIDE"):
        assert words in page.text
    starts = (
        "Training loss", "AP by size",
        "Precision over recall at IoU 0.5", "AP50 that each type of error costs", "Confusion of plain",
        "Confusion of MSIL", "The objects of image val/",
    )  # fmt: skip
    for start in starts:
        assert any((image["alt"] or "").startswith(start) for image in page.all("img")), start
    assert "No heat maps" in page.text and "last.ckpt" in page.text  # these runs kept no checkpoint


def test_the_page_opens_with_the_best_run(made: Path) -> None:
    page = parsed(made / "report" / "report.html")
    results = read_results(made / "runs")
    means = {
        apply: fmean([run["metrics"]["AP"] for run in results if run["config"]["model"]["msil"]["apply"] == apply])
        for apply in ("none", "cls", "both")
    }
    assert means["both"] > means["cls"] > means["none"]
    start = (
        f"Best of 3: VFNet ResNet-10 MSIL, AP {100 * means['both']:.1f}, +{100 * (means['both'] - means['cls']):.1f} ["
    )
    assert start in page.text
    # cls has one seed
    luck = "more than the choice of images gives, but another seed may reverse it"
    assert f"on the second, VFNet ResNet-10 MSIL cls: {luck}, not corrected for the choice among 3." in page.text
    few = [{**run, "val_images": 29} for run in results]
    assert answer(*ranked(few), Evidence()).endswith("MSIL cls: 29 images are too few to tell luck.")
    assert page.text.index(start) < page.text.index("5 finished runs, best first") < page.text.index("Table 1. ")


# AP is the mean over the classes, and pycocotools gave that of each run.
def test_the_page_has_ap_by_class(made: Path) -> None:
    lines, metric = ranked(settings(read_results(made / "runs"))[0])
    table = class_table(lines, Evidence())
    assert metric == "AP" and table is not None
    assert [row["class"] for row in table.rows] == ["circle", "square"]
    for column, runs in zip(table.columns[1:], lines.values(), strict=True):
        mean = fmean([row[column.key][0] for row in table.rows])
        assert mean == pytest.approx(fmean([run["metrics"]["AP"] for run in runs]), abs=1e-9)


def test_ap_by_class_goes_by_the_classes_names(tmp_path: Path) -> None:
    """Of runs that have one class in common, which is the first of one and the second of the other."""
    write_run(tmp_path, tmp_path, 1.0, 0, ("circle", "square"), apply="both")
    write_run(tmp_path, tmp_path, 2.0, 0, ("dog", "circle"), apply="none")
    lines, _ = ranked(read_results(tmp_path))
    table = class_table(lines, Evidence())
    assert table is not None
    rows = {row["class"]: [row[column.key] for column in table.columns[1:]] for row in table.rows}
    circle, square = per_class(match_coco(evaluated(1.0, 1000)), "AP")
    dog, other_circle = per_class(match_coco(evaluated(2.0, 2000)), "AP")
    assert rows == {
        "circle": [(circle, None), (other_circle, None)], "square": [(square, None), None], "dog": [None, (dog, None)],
    }  # fmt: skip


def pair(runs: Path) -> tuple[tuple[Result, ...], tuple[Result, ...]]:
    found = detectors(read_results(runs))[0].pair()
    assert found is not None
    return found


def test_a_detector_without_our_towers_costs_the_heat_maps_alone(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(detector="retinanet_resnet50_fpn_v2")
    monkeypatch.setattr(load, "load_detector", lambda path: (nn.Identity(), SimpleNamespace(model=model)))
    section = heatmap_section(*pair(made / "runs"), Evidence())
    assert not section.pictures and len(section.paragraphs) == 1
    assert "last.ckpt holds torchvision's retinanet_resnet50_fpn_v2" in section.paragraphs[0]


def test_the_same_runs_give_the_same_bytes(made: Path, tmp_path: Path) -> None:
    write_report(made / "runs", tmp_path, say=lambda line: None)
    for path in sorted((made / "report").iterdir()):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


# One report of runs that lack one thing each: of MSIL's first seed the detections are another run's, the plain detector
# has no curves, and the images moved away.
def test_what_is_missing_is_said_and_costs_no_more_than_it_must(made: Path, tmp_path: Path) -> None:
    runs = shutil.copytree(made / "runs", tmp_path / "runs")
    for path in runs.glob("*/result.json"):
        path.write_text(path.read_text().replace(str(made / "data"), "elsewhere"))
    for path in runs.glob("*_none_*/metrics.csv"):
        path.unlink()
    write_record(next(runs.glob("*_both_*_s0")), evaluated(5.0, 9))
    with pytest.warns(UserWarning, match=r"evaluation\.npz gives AP 0\.\d+, but result\.json beside it says"):
        write_report(runs, tmp_path / "report", say=lambda line: None)
    page = parsed(tmp_path / "report" / "report.html")
    assert "has no readable evaluation.npz, so no gallery" in page.text
    assert any((image["alt"] or "").startswith("Confusion of plain") for image in page.all("img"))
    rows = list(csv.DictReader((tmp_path / "report" / "table2.csv").open(encoding="utf-8")))
    assert float(rows[3]["ours_AP"]) > 0 and rows[3]["difference"] == "" and rows[1]["difference"] != ""


def test_images_that_moved_away_cost_the_gallery_alone(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, msil = pair(made / "runs")
    for run in (*plain, *msil):
        run["config"]["data"]["root"] = "elsewhere"  # type: ignore[index]
    (words,) = gallery_section(plain, msil, Evidence()).paragraphs
    assert words.startswith("No gallery: the data folder elsewhere is not here: make the report where")
    for run in (*plain, *msil):  # from another folder
        run["config"]["data"]["root"] = "data"  # type: ignore[index]
        run["config"]["runs_dir"] = "runs"  # type: ignore[index]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()  # of another set, where the report is made
    assert gallery_section(plain, msil, Evidence()).pictures


# One bad run of many is named, and the others are reported.
@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("evaluation.npz", b"PK\x03\x04 cut", "evaluation.npz"),
        ("metrics.csv", b"epoch,step,loss,AP\n0,0,abc,\n", "metrics.csv is damaged"),
        ("metrics.csv", b"\xff\xfe\x00", "metrics.csv is damaged"),
        ("result.json", b"{", "result.json is damaged"),
        ("result.json", b'{"model": null}', "result.json is damaged"),
    ],
)
def test_a_damaged_file_costs_its_run_alone(file: str, content: bytes, named: str, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "runs", tmp_path / "runs")
    folder = next((tmp_path / "runs").glob("*_cls_*"))
    if content.startswith(b'{"'):
        result = json.loads((folder / file).read_text())
        result["config"].update(json.loads(content))
        content = json.dumps(result).encode()
    (folder / file).write_bytes(content)
    evidence = Evidence(samples=20)
    with pytest.warns(UserWarning, match=named):
        results = read_results(tmp_path / "runs")
        (setting,) = setting_tables(results, evidence)
        section = detector_section(detectors(setting.runs)[0], evidence)
    assert setting.tables[1].differences[3].estimate > 0 and section.pictures


def test_an_output_that_cannot_be_written_is_one_sentence(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["report", str(made / "runs"), "--out", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err.splitlines()[-1]


def test_rows_that_saw_other_images_are_not_compared(made: Path) -> None:
    evidence, (plain, msil) = Evidence(samples=20), pair(made / "runs")
    other = evaluated(3.0, 0)
    other.truth_boxes[0, 2] += 1  # another box to be found
    evidence._records[plain[0]["folder"]] = other
    assert evidence.difference(msil, plain[1:], "AP") is not None
    assert evidence.difference(msil, plain, "AP") is None


def test_a_table_without_runs_stands_once_in_the_largest_setting(made: Path) -> None:
    results = read_results(made / "runs")
    longer = json.loads(json.dumps(results[0]))
    longer["config"]["schedule"] = {"name": "1x", "epochs": 12}
    found = setting_tables([*results, longer], Evidence(samples=20))
    assert [[one.paper.number for one in setting.tables] for setting in found] == [[1, 2, 3, 4, 5, None], [1, 2, 4, 5]]


def test_a_head_that_ran_plain_and_with_msil_makes_a_table_of_hosts(made: Path, tmp_path: Path) -> None:
    results = read_results(made / "runs")
    tood = json.loads(json.dumps(results[0]))
    tood["config"]["model"]["head"]["name"] = "tood"
    write_tables(tmp_path, setting_tables([*results, tood], Evidence(samples=20)))
    rows = list(csv.DictReader((tmp_path / "hosts.csv").open(encoding="utf-8")))
    assert {row["row"].partition("+")[0] for row in rows} == {"TOOD", "VFNet"}
    write_tables(tmp_path, setting_tables([results[0], tood], Evidence(samples=20)))  # neither has the other form
    assert not list(tmp_path.glob("hosts.*"))


# FCOS with MSIL on one branch, trained longer, is no row of any table: it has charts, and stands among all runs.
def test_runs_of_no_table_are_reported_too(made: Path) -> None:
    results = read_results(made / "runs")
    (one,) = [run for run in results if "_cls_" in run["run_name"]]
    one["config"]["model"]["head"]["name"] = "fcos"
    one["config"]["schedule"] = {"name": "mine", "epochs": 24}
    *_, setting = setting_tables(results, Evidence(samples=20))
    assert "schedule mine" in setting.name and setting.tables == ()
    section = detector_section(detectors(setting.runs)[0], Evidence())
    assert section.title.startswith("FCOS ResNet-10: ") and section.pictures


def test_a_folder_without_finished_runs_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    with pytest.raises(ConfigError):
        read_results(runs)
    assert main(["report", str(runs)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and str(runs) in error
    assert not (runs / "report").exists()
