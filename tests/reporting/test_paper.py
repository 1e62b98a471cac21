"""The paper's tables against numbers typed here from its text, and what the tables say about comparing with them."""

from __future__ import annotations

from typing import Any

import pytest

from msil.reporting.groups import departures
from msil.reporting.paper import TABLES, paper_metrics
from msil.reporting.tables import sweep_table

from .cases import as_in_the_paper, result

SHORT = ("AP", "AP50", "AP75")
LONG = (*SHORT, "APs", "APm", "APl")

# (table, head, backbone, align, separate, apply) -> the printed numbers, typed from the paper.
PRINTED = {
    ("table1", "vfnet", "resnet50", False, True, "both"): "41.7 59.6 45.2",
    ("table1", "vfnet", "resnet50", True, False, "both"): "41.9 59.8 45.3",
    ("table1", "vfnet", "resnet50", True, True, "both"): "42.1 59.9 46.0",
    ("table2", "vfnet", "resnet50", True, True, "none"): "41.2 59.1 44.8",
    ("table2", "vfnet", "resnet50", True, True, "cls"): "41.9 59.9 45.6",
    ("table2", "vfnet", "resnet50", True, True, "reg"): "40.9 58.9 44.1",
    ("table2", "vfnet", "resnet50", True, True, "both"): "42.1 59.9 46.0",
    ("table3", "retinanet", "resnet101", True, True, "none"): "39.1 59.1 42.3 21.8 42.7 50.2",
    ("table3", "atss", "resnet101", True, True, "none"): "43.6 62.1 47.4 26.1 47.0 53.6",
    ("table3", "gfl", "resnet101", True, True, "none"): "45.0 63.7 48.9 27.2 48.8 54.5",
    ("table3", "tood", "resnet101", True, True, "none"): "46.7 64.6 50.7 28.9 49.6 57.0",
    ("table3", "fcos", "resnet101", True, True, "none"): "41.5 60.7 45.0 24.4 44.8 51.6",
    ("table3", "fcos", "resnet101", True, True, "both"): "42.5 61.7 46.1 25.7 45.8 53.5",
    ("table3", "vfnet", "resnet101", True, True, "none"): "46.5 64.8 50.5 27.8 50.1 56.9",
    ("table3", "vfnet", "resnet101", True, True, "both"): "47.1 65.4 51.2 28.6 50.7 58.4",
    ("table4", "vfnet", "resnet50", True, True, "both"): "41.2 59.1 44.8",
    ("table4", "vfnet", "resnet101", True, True, "both"): "43.6 61.5 47.5",
    ("table5", "vfnet", "resnet50", True, True, "none"): "65.3",
    ("table5", "vfnet", "resnet50", True, True, "both"): "66.4",
    ("table5", "fcos", "resnet50", True, True, "none"): "71.0",
    ("table5", "fcos", "resnet50", True, True, "both"): "71.8",
}
NAMES = {"table1": SHORT, "table2": SHORT, "table3": LONG, "table4": SHORT, "table5": ("VOC_AP",)}


def model(head: str, backbone: str, align: bool, separate: bool, apply: str) -> dict[str, Any]:
    block = {"align": align, "separate": separate, "apply": apply}
    return {"head": {"name": head}, "backbone": {"name": backbone}, "msil": block}


def test_printed_numbers() -> None:
    for (table, head, backbone, align, separate, apply), numbers in PRINTED.items():
        found = paper_metrics(table, model(head, backbone, align, separate, apply))
        assert found == dict(zip(NAMES[table], map(float, numbers.split()), strict=True))
    printed = [row for table in TABLES.values() for row in table.rows if not row.ours]
    assert len([row for row in printed if row.head is not None]) == len(PRINTED) == 21
    assert len(printed) - 17 == 20  # of Table 3, "20 more rows quoted from other papers", four of them trained here too


def test_rows_of_ours_have_no_number_and_stand_beside_the_printed_row() -> None:
    """The paper has MSIL in FCOS and VFNet alone; torchvision's detectors are other nets than the quoted ones."""
    rows = TABLES["table3"].rows
    ours = [row for row in rows if row.ours]
    assert [(row.head, row.apply) for row in ours if row.detector is None] == [
        (head, "both") for head in ("retinanet", "atss", "gfl", "tood")
    ]
    assert [row.detector for row in ours if row.detector is not None] == [
        "fasterrcnn_resnet50_fpn_v2", "ssd300_vgg16", "retinanet_resnet50_fpn_v2"
    ]  # fmt: skip
    for row, other in TABLES["table3"].compared.items():
        assert (rows[row].head, rows[row].apply, rows[other].apply) == (rows[other].head, "both", "none")
    assert len(TABLES["table3"].compared) == 6
    assert paper_metrics("table3", model("tood", "resnet101", True, True, "both")) == {}


def test_all_numbers_are_plausible() -> None:
    """AP50 is the largest of the three and AP lies between; the area ranges rise: a typing slip breaks one of them."""
    for table in TABLES.values():
        for row in table.rows:
            if len(row.values) >= 3:
                ap, ap50, ap75 = row.values[:3]
                assert ap < ap75 < ap50, row
            if len(row.values) == 6:
                small, medium, large = row.values[3:]
                assert small < row.values[0] < large and small < medium < large, row


@pytest.mark.parametrize(
    ("table", "head", "backbone", "align", "separate", "apply"),
    [
        ("table1", "vfnet", "resnet50", False, False, "both"),  # not printed
        ("table1", "vfnet", "resnet50", True, True, "none"),  # printed in Table 2 alone
        ("table2", "vfnet", "resnet50", False, True, "both"),  # another block than Table 2's
        ("table2", "vfnet", "resnet101", True, True, "both"),
        ("table5", "fcos", "resnet18", True, True, "both"),
        ("table6", "vfnet", "resnet50", True, True, "both"),
    ],
)
def test_other_settings_have_no_printed_row(
    table: str, head: str, backbone: str, align: bool, separate: bool, apply: str
) -> None:
    assert paper_metrics(table, model(head, backbone, align, separate, apply)) == {}


def test_a_run_by_the_recipe_departs_in_nothing() -> None:
    for table in ("table1", "table2", "table4"):
        assert departures(as_in_the_paper(), TABLES[table].recipe) == []
        notes = sweep_table([as_in_the_paper()], varied=[], table=table).notes
        (note,) = [note for note in notes if note.startswith("The paper's numbers")]
        assert "do not differ" in note and "NOT" not in note


def test_voc_by_the_recipe() -> None:
    run = result(
        model={"backbone": "resnet50", "weights": "/w/resnet50.pth"},
        data={"name": "voc", "root": "d", "min_size": 600, "max_size": 1000}, schedule={"name": "2x", "epochs": 24},
        train_images=5_717, val_images=5_823,
    )  # fmt: skip
    run["config"]["model"]["channels"] = 256
    assert departures(run, TABLES["table5"].recipe) == []
    assert departures({**run, "train_images": 5_000}, TABLES["table5"].recipe) == ["5000 training images"]


def test_every_departure_is_named() -> None:
    table = sweep_table([result(), result("two", epochs=3)], varied=[], table="table2")
    (note,) = [note for note in table.notes if "NOT comparable" in note]
    ours = note.partition("NOT comparable with ours: ")[2]
    # The paper's 12 epochs, which the first run has, are no difference; the second run's 3 are.
    assert {
        "shapes data", "400 training images", "100 validation images", "128-pixel images", "no ImageNet weights",
        "3 epochs",
    } <= set(ours.rstrip(".").split(", "))  # fmt: skip
    assert "12 epochs" not in ours
