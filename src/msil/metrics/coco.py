"""COCO average precision: faster-coco-eval during training, pycocotools for the number that is reported."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from msil.metrics.detections import CollectedDetections, DetectionMetric, covered_ground_truth
from msil.metrics.fast import fast_stats

# In the order of pycocotools' `stats`; AP and AR without a number are averaged over the IoUs 0.50:0.95:0.05.
STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


class CocoMetric(DetectionMetric):
    """COCO AP over the images given to `update`, at most 100 detections an image and class.

    ground_truth: COCO format dict; annotations need bbox (x y w h), area, iscrowd, image_id and category_id. Boxes of
        categories outside `category_ids` are left out.
    category_ids: label i of the detections is category_ids[i].

    Scores that tie are ranked by ascending image id, then by the detector's order, as pycocotools does.
    """

    def compute(self) -> dict[str, float]:
        """AP, AP50, AP75, APs, APm, APl over all processes, in [0, 1]; nan where no ground truth box is counted.

        Without any detection they are 0. With several processes, all of them must call this. Raises as `collected`.
        """
        stats = self.statistics(final=False)
        return {name: stats[name] for name in STATS[:6]}

    def compute_final(self) -> dict[str, float]:
        """All 12 numbers of pycocotools itself (`STATS`), in [0, 1]; nan where it says -1.

        With several processes, all of them must call this. Raises as `collected`.
        """
        with self.sync_context():
            return self.statistics(final=True)

    def statistics(self, final: bool) -> dict[str, float]:
        """The 12 numbers over what is collected here, by pycocotools if `final`, else by faster-coco-eval."""
        found = self.collected()
        if len(found.image_ids) == 0:
            return dict.fromkeys(STATS, float("nan"))
        if final:
            ground_truth = covered_ground_truth(self.ground_truth, found.image_ids, self.category_ids)
            stats = pycocotools_stats(ground_truth, coco_results(found, ground_truth, self.category_ids))
        else:
            stats = fast_stats(self.ground_truth, found, self.category_ids)
        return {name: float("nan") if value == -1 else value for name, value in zip(STATS, stats, strict=True)}


def pycocotools_stats(ground_truth: dict[str, Any], results: dict[str, Any]) -> list[float]:
    """The 12 numbers of pycocotools; -1 where no ground truth box is counted. Writes flags into both dicts."""
    # pycocotools reports every step by print and has no switch for it.
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(indexed(ground_truth), indexed(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def indexed(dataset: dict[str, Any]) -> COCO:
    """A COCO format dict as pycocotools takes it."""
    api: Any = COCO()  # its constructor reads files only, and its type hints know no plain dict
    api.dataset = dataset
    api.createIndex()
    return api


def coco_results(
    found: CollectedDetections, ground_truth: dict[str, Any], category_ids: Sequence[int]
) -> dict[str, Any]:
    """Detections as a COCO format dict: what loadRes of either package would build, which pycocotools' cannot do for an
    empty list. Images and categories are the ground truth's."""
    rows = zip(
        found.owners.tolist(), found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True
    )  # Python numbers: float32 scores and coordinates become doubles without rounding
    annotations = []
    for number, (image_id, (x1, y1, x2, y2), score, label) in enumerate(rows, start=1):
        width, height = x2 - x1, y2 - y1
        annotations.append(
            {
                "id": number,
                "image_id": image_id,
                "category_id": category_ids[label],
                "bbox": [x1, y1, width, height],
                "area": width * height,
                "score": score,
                "iscrowd": 0,
            }
        )
    return {"images": ground_truth["images"], "categories": ground_truth["categories"], "annotations": annotations}
