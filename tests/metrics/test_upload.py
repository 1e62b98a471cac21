"""The upload file: entries worked out by hand, pycocotools as its reader, the zip, refusals, and two processes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest

from msil.errors import ConfigError
from msil.metrics.coco import pycocotools_stats
from msil.metrics.detections import CollectedDetections
from msil.metrics.upload import DetectionCollector, upload_entries, write_upload

from .cases import by_pycocotools, make, nothing, random_record, updated

CATEGORY_IDS = (1, 3, 4, 18, 90)
ENTRY: dict[str, Any] = {"image_id": 7, "category_id": 18, "bbox": [1.5, 2, 3.25, 4], "score": 0.5}


def collected(*rows: tuple[int, list[float], float, int]) -> CollectedDetections:
    """(image id, corners, score, label) of each detection, by image id."""
    owners = np.array([row[0] for row in rows], dtype=np.int64)
    return CollectedDetections(
        np.unique(owners),
        owners,
        np.array([row[1] for row in rows], dtype=np.float64).reshape(-1, 4),
        np.array([row[2] for row in rows], dtype=np.float64),
        np.array([row[3] for row in rows], dtype=np.int64),
    )


def test_entries_by_hand() -> None:
    found = collected(
        (3, [10.004, 20.006, 30.018, 60.0], 0.123456789, 0),
        # sides 0.001 and 0, and a right side at the image's end that rounding must not carry past it
        (3, [5.001, 6.0, 5.002, 6.0], 1.0, 4),
        (9, [0.1, 0.0, 0.3, 640.0], 0.25, 1),
        (9, [639.996, 0.0, 640.0, 1.0], 0.75, 1),
    )
    entries = upload_entries(found, CATEGORY_IDS)
    assert entries == [
        # corners 10 20.01 30.02 60: sides 20.02 and 39.99
        {"image_id": 3, "category_id": 1, "bbox": [10.0, 20.01, 20.02, 39.99], "score": 0.12345679},
        {"image_id": 3, "category_id": 90, "bbox": [5.0, 6.0, 0.01, 0.01], "score": 1.0},
        {"image_id": 9, "category_id": 3, "bbox": [0.1, 0.0, 0.2, 640.0], "score": 0.25},
        {"image_id": 9, "category_id": 3, "bbox": [640.0, 0.0, 0.01, 1.0], "score": 0.75},
    ]
    assert json.dumps(entries[2]["bbox"]) == "[0.1, 0.0, 0.2, 640.0]"  # no 0.19999999999999998
    for entry in entries:
        kinds = [type(entry[key]) for key in ("image_id", "category_id", "score", "bbox")]
        assert kinds == [int, int, float, list] and {type(value) for value in entry["bbox"]} == {float}
    assert upload_entries(collected(), CATEGORY_IDS) == []


def test_at_most_100_an_image_the_surest_in_the_detectors_order() -> None:
    box = [0.0, 0.0, 9.0, 9.0]
    # 250 of image 4 by rising score, 3 of image 5, and 101 of image 6 that all tie
    rows = [(4, box, i / 1000, 0) for i in range(250)] + [(5, box, 0.001 * i, 1) for i in range(3)]
    rows += [(6, [float(i), 0, i + 9.0, 9], 0.5, 2) for i in range(101)]
    entries = upload_entries(collected(*rows), CATEGORY_IDS)
    assert [entry["score"] for entry in entries if entry["image_id"] == 4] == [i / 1000 for i in range(150, 250)]
    assert [entry["score"] for entry in entries if entry["image_id"] == 5] == [0, 0.001, 0.002]
    assert [entry["bbox"][0] for entry in entries if entry["image_id"] == 6] == list(range(100))


def test_pycocotools_reads_it_and_gives_the_ap_of_the_metric(tmp_path: Path) -> None:
    record = random_record(1, images=40)
    found = updated(DetectionCollector(record), record).gathered()
    path, _ = write_upload(tmp_path, "val", "x", upload_entries(found, record.category_ids.tolist()))
    # As COCO's server evaluates it: loadRes on the file. Corners move by up to 0.005 px, IoUs of boxes of 6 px and more
    # by some 0.002: few pass one of the ten thresholds. Of the first image's 130 detections 100 are kept.
    theirs = by_pycocotools(record, results=str(path)).stats.tolist()
    assert theirs == pytest.approx(list(pycocotools_stats(record).values()), abs=4e-3)


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
        assert archive.infolist()[0].date_time == (1980, 1, 1, 0, 0, 0)  # not the clock's: equal files, equal bytes
    assert sorted(path.name for path in plain.parent.iterdir()) == [plain.name, packed.name]


def test_the_same_detections_give_the_same_bytes(tmp_path: Path) -> None:
    first = write_upload(tmp_path / "one", "val", "x", [ENTRY])
    os.utime(first[0], (1e9, 1e9))
    second = write_upload(tmp_path / "two", "val", "x", [dict(ENTRY)])
    again = write_upload(tmp_path / "one", "val", "x", [ENTRY])
    for one, two, three in zip(first, second, again, strict=True):
        assert one.read_bytes() == two.read_bytes() == three.read_bytes()


def test_nothing_found_is_an_empty_list(tmp_path: Path) -> None:
    plain, _ = write_upload(tmp_path, "val", "x", [])
    assert json.loads(plain.read_text()) == []


def test_an_error_leaves_the_old_files(tmp_path: Path) -> None:
    paths = write_upload(tmp_path, "val", "x", [ENTRY])
    before = [path.read_bytes() for path in paths]
    with pytest.raises(ValueError, match="JSON"):
        write_upload(tmp_path, "val", "x", [{**ENTRY, "score": float("nan")}])
    assert [path.read_bytes() for path in paths] == before
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("split", "name"), [("val", "a b"), ("val", ""), ("val", "../x"), ("val", "ü"), ("a/b", "x"), ("val", "x\n")]
)
def test_names_that_are_no_file_names(tmp_path: Path, split: str, name: str) -> None:
    with pytest.raises(ConfigError, match=r"must be of letters, digits, '-', '_' and '\.'"):
        write_upload(tmp_path, split, name, [ENTRY])
    assert list(tmp_path.iterdir()) == []


def test_the_collector_has_no_numbers_and_keeps_images_without_detections() -> None:
    record = make([], [], images=14)
    metric = DetectionCollector(record)
    metric.update([nothing()] * 14, record.image_ids.tolist())
    assert metric.compute() == {}
    assert metric.gathered().image_ids.tolist() == record.image_ids.tolist()
    metric.reset()
    assert len(metric.gathered().image_ids) == 0
