"""Tables 1 to 5 of the MSIL paper (arXiv 2303.10411), as printed, in percent, and one of ours. Standard library alone.

Where the paper contradicts itself, a note of the table says so; the numbers stay as printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COCO_SHORT = ("AP", "AP50", "AP75")
COCO_LONG = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass(frozen=True)
class PaperRow:
    """One printed row.

    printed: the cells that name the row, letter for letter. values: its numbers, in the order of the table's metrics;
    none in rows of ours, which the paper does not have.
    head, backbone, apply, align, separate: the settings that the row stands for, in the names of our configuration; all
    None in rows that the paper quotes from other papers and nothing here trains. With apply "none" there is no block,
    and align and separate mean nothing. detector: one of torchvision's in the place of head and backbone.
    against: the row that it is measured against, so many lines below it (negative: above); 0: none.
    """

    printed: tuple[str, ...]
    values: tuple[float, ...] = ()
    head: str | None = None
    backbone: str | None = None
    apply: str = "none"
    against: int = 0
    align: bool = True
    separate: bool = True
    detector: str | None = None

    @property
    def ours(self) -> bool:
        """Whether the paper does not have this row."""
        return not self.values

    def fits(self, model: Mapping[str, Any]) -> bool:
        """Whether config.model of a run has the row's head and switches, whatever its backbone."""
        block = model["msil"]
        own = (model["head"].get("name"), model.get("detector"), block["apply"])
        if own != (self.head, self.detector, self.apply):
            return False
        return self.apply == "none" or (block["align"], block["separate"]) == (self.align, self.separate)

    def value(self, place: int) -> float | None:
        """The printed number of a metric's place."""
        return self.values[place] if self.values else None


@dataclass(frozen=True)
class Recipe:
    """How a table's numbers were made. The image counts are the fewest that pass for the whole split; with
    min_size and max_size (pixels) they tell whether a run of ours may stand beside the printed numbers."""

    data: str
    train: str
    val: str
    train_images: int
    val_images: int
    epochs: int
    min_size: int
    max_size: int


@dataclass(frozen=True)
class PaperTable:
    """A printed table; number: None of ours. metrics: the names our results use for its columns. headings: of the
    cells that name a row, where they mean nothing without."""

    number: int | None
    caption: str
    metrics: tuple[str, ...]
    rows: tuple[PaperRow, ...]
    recipe: Recipe
    notes: tuple[str, ...] = ()
    headings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its experiment and its files."""
        return "hosts" if self.number is None else f"table{self.number}"

    def label(self, row: PaperRow) -> str:
        """A row's name, e.g. "VFNet+MSIL, ResNet-101" or "cls ✓, reg ✗"."""
        headings = self.headings or ("",) * len(row.printed)
        return ", ".join(f"{heading} {name}".strip() for heading, name in zip(headings, row.printed, strict=True))


# Section 4.1: "train2017 split (115K images)", 12 epochs. Table 3 is scored on test-dev, which only a server can do.
ABLATION = Recipe("coco", "COCO train2017", "val2017", 115_000, 5_000, 12, 800, 1333)
TEST_DEV = Recipe("coco", "COCO train2017", "test-dev2017", 115_000, 20_000, 24, 800, 1333)
VOC = Recipe("voc", "VOC 2012 train", "VOC 2012 val", 5_700, 5_800, 24, 600, 1000)  # image size: our reading

TABLE1 = PaperTable(
    1,
    "Influence of semantic alignment and semantic separation.",
    COCO_SHORT,
    (
        PaperRow(("w/o semantic alignment",), (41.7, 59.6, 45.2), "vfnet", "resnet50", "both", 2, align=False),
        PaperRow(("w/o semantic separation",), (41.9, 59.8, 45.3), "vfnet", "resnet50", "both", 1, separate=False),
        PaperRow(("baseline",), (42.1, 59.9, 46.0), "vfnet", "resnet50", "both"),
    ),
    ABLATION,
    ("The row called baseline is the full MSIL, with alignment and separation.",),
)

TABLE2 = PaperTable(
    2,
    "Feature enhancement of different branches compared with baseline.",
    COCO_SHORT,
    (
        PaperRow(("✗", "✗"), (41.2, 59.1, 44.8), "vfnet", "resnet50"),
        PaperRow(("✓", "✗"), (41.9, 59.9, 45.6), "vfnet", "resnet50", "cls", -1),
        PaperRow(("✗", "✓"), (40.9, 58.9, 44.1), "vfnet", "resnet50", "reg", -2),
        PaperRow(("✓", "✓"), (42.1, 59.9, 46.0), "vfnet", "resnet50", "both", -3),
    ),
    ABLATION,
    headings=("cls", "reg"),
)

TABLE3 = PaperTable(
    3,
    "FCOS+MSIL and VFNet+MSIL vs. other state-of-the-art detectors on coco test-dev.",
    COCO_LONG,
    (
        PaperRow(("Faster R-CNN w/ FPN [27]", "ResNet-101-FPN"), (36.2, 59.1, 39.0, 18.2, 39.0, 48.2)),
        PaperRow(("Faster R-CNN v2 (torchvision's stand-in)", "ResNet-50-FPN"), detector="fasterrcnn_resnet50_fpn_v2"),
        PaperRow(("Faster R-CNN by G-RMI [17]", "Inception-ResNet-v2 [39]"), (34.7, 55.5, 36.7, 13.5, 38.1, 52.0)),
        PaperRow(("Faster R-CNN w/ TDM [37]", "Inception-ResNet-v2-TDM"), (36.8, 57.7, 39.2, 16.2, 39.8, 52.1)),
        PaperRow(("SSD513 [30]", "ResNet-101-SSD"), (31.2, 50.4, 33.3, 10.2, 34.5, 49.8)),
        PaperRow(("SSD300 (torchvision's stand-in)", "VGG-16"), detector="ssd300_vgg16"),
        PaperRow(("DSSD513 [8]", "ResNet-101-DSSD"), (33.2, 53.3, 35.2, 13.0, 35.4, 51.1)),
        PaperRow(("RefineDet [49]", "ResNet-101"), (36.4, 57.5, 39.5, 16.6, 39.9, 51.4)),
        PaperRow(("RetinaNet [28]", "ResNet-101"), (39.1, 59.1, 42.3, 21.8, 42.7, 50.2), "retinanet", "resnet101"),
        PaperRow(("RetinaNet+MSIL (ours, not in the paper)", "ResNet-101"), (), "retinanet", "resnet101", "both", -1),
        PaperRow(("RetinaNet v2 (torchvision's stand-in)", "ResNet-50-FPN"), detector="retinanet_resnet50_fpn_v2"),
        PaperRow(("CornerNet [22]", "Hourglass-104"), (40.5, 56.5, 43.1, 19.4, 42.7, 53.9)),
        PaperRow(("FreeAnchor [50]", "ResNet-101"), (43.1, 62.2, 46.4, 24.5, 46.1, 54.8)),
        PaperRow(("SNIP [38]", "ResNet-101"), (43.4, 65.5, 48.4, 27.2, 46.5, 54.9)),
        PaperRow(("SAPD [53]", "ResNet-101"), (43.5, 63.6, 46.5, 24.9, 46.8, 54.6)),
        PaperRow(("ATSS [48]", "ResNet-101"), (43.6, 62.1, 47.4, 26.1, 47.0, 53.6), "atss", "resnet101"),
        PaperRow(("ATSS+MSIL (ours, not in the paper)", "ResNet-101"), (), "atss", "resnet101", "both", -1),
        PaperRow(("MAL [18]", "ResNet-101"), (43.6, 62.8, 47.1, 25.0, 46.9, 55.8)),
        PaperRow(("PAA [20]", "ResNet-101"), (44.8, 63.3, 48.7, 26.5, 48.8, 56.3)),
        PaperRow(("GFL [26]", "ResNet-101"), (45.0, 63.7, 48.9, 27.2, 48.8, 54.5), "gfl", "resnet101"),
        PaperRow(("GFL+MSIL (ours, not in the paper)", "ResNet-101"), (), "gfl", "resnet101", "both", -1),
        PaperRow(("OTA [9]", "ResNet-101"), (45.3, 63.5, 49.3, 26.9, 48.8, 56.1)),
        PaperRow(("BorderDet [33]", "ResNet-101"), (45.4, 64.1, 48.8, 26.7, 48.3, 56.5)),
        PaperRow(("GFLV2 [25]", "ResNet-101"), (46.2, 64.3, 50.5, 27.8, 49.9, 57.0)),
        PaperRow(("DW [24]", "ResNet-101"), (46.2, 64.8, 50.0, 27.1, 49.4, 58.5)),
        PaperRow(("TOOD [6]", "ResNet-101"), (46.7, 64.6, 50.7, 28.9, 49.6, 57.0), "tood", "resnet101"),
        PaperRow(("TOOD+MSIL (ours, not in the paper)", "ResNet-101"), (), "tood", "resnet101", "both", -1),
        PaperRow(("FCOS", "ResNet-101"), (41.5, 60.7, 45.0, 24.4, 44.8, 51.6), "fcos", "resnet101"),
        PaperRow(("FCOS+MSIL", "ResNet-101"), (42.5, 61.7, 46.1, 25.7, 45.8, 53.5), "fcos", "resnet101", "both", -1),
        PaperRow(("VFNet", "ResNet-101"), (46.5, 64.8, 50.5, 27.8, 50.1, 56.9), "vfnet", "resnet101"),
        PaperRow(("VFNet+MSIL", "ResNet-101"), (47.1, 65.4, 51.2, 28.6, 50.7, 58.4), "vfnet", "resnet101", "both", -1),
    ),
    TEST_DEV,
)

TABLE4 = PaperTable(
    4,
    "AP with different backbones of VFNet+MSIL.",
    COCO_SHORT,
    (
        PaperRow(("RestNet-50",), (41.2, 59.1, 44.8), "vfnet", "resnet50", "both"),
        PaperRow(("RestNet-101",), (43.6, 61.5, 47.5), "vfnet", "resnet101", "both", -1),
    ),
    ABLATION,
    (
        "The paper's Table 4 prints 41.2 / 59.1 / 44.8 for VFNet+MSIL with ResNet-50: that is Table 2's row "
        "WITHOUT MSIL; with MSIL Table 2 has 42.1 / 59.9 / 46.0.",
        "The paper's Table 4 row for ResNet-101 then belongs to the plain VFNet or to another run.",
    ),
)

TABLE5 = PaperTable(
    5,
    "FCOS+MSIL and VFNet+MSIL vs FCOS and VFNet on the VOC dataset.",
    ("VOC_AP",),
    (
        PaperRow(("VFNet", "RestNet-50"), (65.3,), "vfnet", "resnet50"),
        PaperRow(("VFNet+MSIL", "RestNet-50"), (66.4,), "vfnet", "resnet50", "both", -1),
        PaperRow(("FCOS", "RestNet-50"), (71.0,), "fcos", "resnet50"),
        PaperRow(("FCOS+MSIL", "RestNet-50"), (71.8,), "fcos", "resnet50", "both", -1),
    ),
    VOC,
    (
        'Table 5 prints "AP" without saying which; our reading is VOC AP at IoU 0.5 (all-point area, difficult boxes '
        "ignored).",
        "The paper's FCOS beats its VFNet on VOC by 5.7, against every other table, and the heading of its section 4.3 "
        "names another method (FGPL).",
    ),
)

# The heads' titles, for results without "head_title".
TITLES = {row.head: row.printed[0].partition(" [")[0] for row in TABLE3.rows if row.head and row.apply == "none"}

TABLES = {table.name: table for table in (TABLE1, TABLE2, TABLE3, TABLE4, TABLE5)}

HOSTS = PaperTable(
    None,
    "MSIL in each head, and what its price buys elsewhere. The paper does not have this table.",
    ("AP", "VOC_AP"),
    tuple(
        row
        for head, title in sorted(TITLES.items(), key=lambda item: item[1])
        for row in (
            PaperRow((title,), (), head, "resnet50"),
            PaperRow((f"{title}+MSIL",), (), head, "resnet50", "both", -1),
        )
    ),
    ABLATION,
)

TEXT_NOTES = (
    "Eq. 3's text writes f_env for f_enc.",
    'Eq. 7 calls N_pos "the number of predictions", where the field divides by the number of positives.',
)
