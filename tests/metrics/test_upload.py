"""The upload file: entries worked out by hand, pycocotools as its reader, and the zip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from msil.metrics.coco import pycocotools_curves, summary
from msil.metrics.detections import DetectionMetric
from msil.metrics.upload import upload_entries, write_upload

from .cases import Found, by_pycocotools, make, random_record, updated

ENTRY: dict[str, Any] = {"image_id": 7, "category_id": 18, "bbox": [1.5, 2, 3.25, 4], "score": 0.5}


def test_entries_by_hand() -> None:
    found: list[Found] = [
        (0, 0, [10.004, 20.006, 30.018, 60.0], 0.123456789),
        # sides 0.001 and 0, and a right side at the image's end that rounding must not carry past it
        (0, 4, [5.001, 6.0, 5.002, 6.0], 1.0),
        (1, 1, [0.1, 0.0, 0.3, 640.0], 0.25),
        (1, 1, [639.996, 0.0, 640.0, 1.0], 0.75),
    ]
    entries = upload_entries(make([], found, images=2, classes=5))
    assert entries == [
        # corners 10 20.01 30.02 60: sides 20.02 and 39.99
        {"image_id": 10, "category_id": 1, "bbox": [10.0, 20.01, 20.02, 39.99], "score": 0.12345679},
        {"image_id": 10, "category_id": 13, "bbox": [5.0, 6.0, 0.01, 0.01], "score": 1.0},
        {"image_id": 20, "category_id": 4, "bbox": [0.1, 0.0, 0.2, 640.0], "score": 0.25},
        {"image_id": 20, "category_id": 4, "bbox": [640.0, 0.0, 0.01, 1.0], "score": 0.75},
    ]
    assert json.dumps(entries[2]["bbox"]) == "[0.1, 0.0, 0.2, 640.0]"  # no 0.19999999999999998
    for entry in entries:
        kinds = [type(entry[key]) for key in ("image_id", "category_id", "score", "bbox")]
        assert kinds == [int, int, float, list] and {type(value) for value in entry["bbox"]} == {float}
    assert upload_entries(make([], [])) == []


def test_at_most_100_an_image_the_surest_in_the_detectors_order() -> None:
    # 250 of image 10 by rising score, 3 of image 20, and 101 of image 30 that all tie
    found: list[Found] = [(0, 0, [0.0, 0, 9, 9], i / 1024) for i in range(250)]
    found += [(1, 1, [0.0, 0, 9, 9], i / 1024) for i in range(3)]
    found += [(2, 1, [float(i), 0, i + 9.0, 9], 0.5) for i in range(101)]
    record = make([], found, images=3)
    assert len(upload_entries(record)) == 354
    entries = upload_entries(record, 100)
    scores = [[round(1024 * entry["score"]) for entry in entries if entry["image_id"] == i] for i in (10, 20)]
    assert scores == [list(range(150, 250)), [0, 1, 2]]
    assert [entry["bbox"][0] for entry in entries if entry["image_id"] == 30] == list(range(100))


def test_pycocotools_reads_it_and_gives_the_ap_of_the_metric(tmp_path: Path) -> None:
    record = random_record(1, images=40)
    found = updated(DetectionMetric(record), record).gathered()
    path, _ = write_upload(tmp_path, "val", "x", upload_entries(found, 100))
    # As COCO's server evaluates it: loadRes on the file. Corners move by up to 0.005 px, IoUs of boxes of 6 px and more
    # by some 0.002: few pass one of the ten thresholds. Of the first image's 130 detections 100 are kept.
    theirs = by_pycocotools(record, results=str(path)).stats.tolist()
    assert theirs == pytest.approx(list(summary(*pycocotools_curves(record)).values()), abs=4e-3)


def test_the_files(tmp_path: Path) -> None:
    entries = [ENTRY, {**ENTRY, "image_id": 9}]
    plain, packed = write_upload(tmp_path / "new", "test-dev2017", "vfnet", entries)
    assert plain == tmp_path / "new" / "detections_test-dev2017_vfnet_results.json"
    assert packed == tmp_path / "new" / "detections_test-dev2017_vfnet_results.zip"
    assert json.loads(plain.read_text()) == entries
    with ZipFile(packed) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["detections_test-dev2017_vfnet_results.json"]
        assert archive.read(plain.name) == plain.read_bytes()
    assert sorted(path.name for path in plain.parent.iterdir()) == [plain.name, packed.name]
    plain, _ = write_upload(tmp_path, "val", "x", [])
    assert json.loads(plain.read_text()) == []


def test_an_error_leaves_the_old_files(tmp_path: Path) -> None:
    paths = write_upload(tmp_path, "val", "x", [ENTRY])
    before = [path.read_bytes() for path in paths]
    with pytest.raises(ValueError, match="JSON"):
        write_upload(tmp_path, "val", "x", [{**ENTRY, "score": float("nan")}])
    assert [path.read_bytes() for path in paths] == before
    assert len(list(tmp_path.iterdir())) == 2
