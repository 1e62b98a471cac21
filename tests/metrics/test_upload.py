"""The upload file: entries worked out by hand, pycocotools as its reader, the zip, refusals, and two processes."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
from datetime import timedelta
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.multiprocessing.spawn import start_processes

from msil.detection.structures import Detections
from msil.errors import ConfigError, DataError
from msil.metrics.coco import STATS, CocoMetric
from msil.metrics.detections import CollectedDetections
from msil.metrics.upload import DetectionCollector, check_upload, upload_entries, write_upload

from .coco_cases import CATEGORY_IDS, jittered, nothing, random_ground_truth

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


def collector(found: dict[int, Detections], ground_truth: dict[str, Any]) -> DetectionCollector:
    metric = DetectionCollector(ground_truth, CATEGORY_IDS)
    metric.update(list(found.values()), list(found))
    return metric


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
    check_upload(entries, [3, 9], CATEGORY_IDS)
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
    check_upload(entries, [4, 5, 6], CATEGORY_IDS)


def theirs(ground_truth: dict[str, Any], results: Path, folder: Path) -> dict[str, float]:
    """What pycocotools says of a results file."""
    (folder / "truth.json").write_text(json.dumps(ground_truth))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(folder / "truth.json")
        evaluation = COCOeval(truth, truth.loadRes(str(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(STATS, evaluation.stats.tolist(), strict=True))


@pytest.mark.parametrize("seed", [1, 2])
def test_pycocotools_reads_it_and_gives_the_ap_of_the_metric(tmp_path: Path, seed: int) -> None:
    ground_truth = random_ground_truth(seed, num_images=40)
    for number, annotation in enumerate(ground_truth["annotations"], start=1):
        annotation["id"] = number  # pycocotools takes annotation 0 for none
    found = jittered(ground_truth, CATEGORY_IDS, seed)
    metric = CocoMetric(ground_truth, CATEGORY_IDS)
    metric.update(list(found.values()), list(found))
    entries = upload_entries(collector(found, ground_truth).gathered(), CATEGORY_IDS)
    assert len(entries) == sum(len(detections.scores) for detections in found.values()) > 200
    check_upload(entries, list(found), CATEGORY_IDS)
    path, _ = write_upload(tmp_path, "val", "x", entries)
    # Corners move by up to 0.005 px, IoUs of boxes of 6 px and more by some 0.002: few pass one of the ten thresholds.
    assert theirs(ground_truth, path, tmp_path) == pytest.approx(metric.compute_final(), abs=2e-3)


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_id": 8}, "has image_id 8, which is not among the split's 2"),
        ({"image_id": 7.0}, "has image_id 7.0"),
        ({"image_id": "7"}, "has image_id '7'"),
        ({"image_id": True}, "has image_id True"),
        ({"category_id": 2}, "has category_id 2, which is not among the split's 3"),
        ({"category_id": True}, "has category_id True"),
        ({"category_id": None}, "has category_id None"),
        ({"category_id": [1]}, r"has category_id \[1\]"),
        ({"bbox": [1, 2, 3]}, "has bbox"),
        ({"bbox": (1, 2, 3, 4)}, "has bbox"),
        ({"bbox": [1, 2, 0, 4]}, "has bbox"),
        ({"bbox": [1, 2, 3, -4.0]}, "has bbox"),
        ({"bbox": [1, 2, 3, True]}, "has bbox"),
        ({"bbox": [1, float("nan"), 3, 4]}, "has bbox"),
        ({"bbox": [1, 2, float("inf"), 4]}, "has bbox"),
        ({"bbox": ["1", 2, 3, 4]}, "has bbox"),
        ({"score": 1.01}, "has score 1.01"),
        ({"score": -0.01}, "has score -0.01"),
        ({"score": float("nan")}, "has score nan"),
        ({"score": 10**400}, "has score 1000"),
        ({"score": True}, "has score True"),
        ({"score": "0.5"}, "has score '0.5'"),
        ({"area": 12}, "must be an object with .* and nothing else"),
    ],
)
def test_the_first_wrong_entry_is_named(changes: dict[str, Any], message: str) -> None:
    entries = [ENTRY, {**ENTRY, "image_id": 1}, {**ENTRY, **changes}, {**ENTRY, "score": 2}]
    with pytest.raises(DataError, match=f"^entry 2 of the upload {message}"):
        check_upload(entries, [1, 7], [1, 18, 90])


def test_what_an_upload_may_be() -> None:
    check_upload([], [], [])
    check_upload([{**ENTRY, "score": score} for score in (0, 1, 0.0, 1.0)], {7}, (18,))
    check_upload([ENTRY] * 100, [7], [18])
    with pytest.raises(DataError, match="entry 100 of the upload is the 101st of image 7, of which 100 count"):
        check_upload([ENTRY] * 101, [7], [18])
    for entry in ({key: ENTRY[key] for key in ("image_id", "category_id", "bbox")}, [7, 18], None):
        with pytest.raises(DataError, match="entry 0 of the upload must be an object with image_id"):
            check_upload([entry], [7], [18])  # pyright: ignore[reportArgumentType]


def test_the_collector_has_no_numbers_and_keeps_images_without_detections() -> None:
    ground_truth = {**random_ground_truth(3), "annotations": []}
    image_ids = [image["id"] for image in ground_truth["images"]]
    metric = collector({image_id: nothing() for image_id in image_ids}, ground_truth)
    assert metric.compute() == {}
    assert metric.gathered().image_ids.tolist() == sorted(image_ids)
    metric.reset()
    assert len(metric.gathered().image_ids) == 0


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    wait = timedelta(seconds=60)  # a gather that hangs fails instead
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timeout=wait, rank=rank, world_size=2)
    ground_truth = random_ground_truth(3)
    shares = list(jittered(ground_truth, CATEGORY_IDS, 3).items())
    mine = collector(dict(shares[rank::2]), ground_truth)
    assert mine.compute() == {}  # as the training loop does before; it must not spoil what follows
    entries = upload_entries(mine.gathered(), CATEGORY_IDS)
    alone = len(mine.collected().image_ids)
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps({"entries": entries, "alone": alone}))
    dist.destroy_process_group()


def test_two_processes_gather_what_one_would(tmp_path: Path) -> None:
    multiprocessing.set_forkserver_preload(["msil.metrics.coco"])  # as test_detections.py: the import takes the time
    start_processes(rank_main, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    ground_truth = random_ground_truth(3)
    expected = upload_entries(collector(jittered(ground_truth, CATEGORY_IDS, 3), ground_truth).gathered(), CATEGORY_IDS)
    assert len(expected) > 50
    for rank in (0, 1):
        result = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert result["entries"] == expected
        assert result["alone"] == 7  # of 14 images: afterwards each process has its own share again
