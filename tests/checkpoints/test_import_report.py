"""The report of an import as lines."""

from __future__ import annotations

from msil.checkpoints.import_report import Report, report_lines

REPORT = Report(
    matched=["backbone.conv1.weight", "backbone.bn1.bias", "backbone.layer1.0.conv1.weight"],
    renamed=[
        (f"neck.fpn_convs.{i}.conv.{end}", f"fpn.fpn_convs.{i}.{end}") for i in range(4) for end in ("weight", "bias")
    ]
    + [(f"bbox_head.scales.{i}.scale", f"head.scales[{i}]") for i in (0, 1)]
    + [("bbox_head.vfnet_cls_dconv.weight", "head.cls_star.weight")],
    missing=["head.scales: ones"],
    left_over=["fc.weight", *(f"bn{i}.num_batches_tracked" for i in range(30))],
    settings=["VFNet on resnet50"],
)  # fmt: skip


def test_report_lines() -> None:
    assert report_lines(REPORT) == [
        "VFNet on resnet50",
        "",
        "kept      3 names",
        "  backbone.conv1.weight ... backbone.layer1.0.conv1.weight",
        "renamed   11 names",
        "  neck.fpn_convs.#.conv.*          -> fpn.fpn_convs.#.*  (8)",
        "  bbox_head.scales.#.scale         -> head.scales[#]  (2)",
        "  bbox_head.vfnet_cls_dconv.weight -> head.cls_star.weight",
        "missing   1 name",
        "  head.scales: ones",
        "left over 31 names",
        "  fc.weight",
        "  30 num_batches_tracked, which nothing reads",
    ]


def test_verbose_report_lines_name_everything() -> None:
    lines = report_lines(REPORT, verbose=True)
    for name in (*REPORT.matched, *REPORT.missing, *REPORT.left_over):
        assert f"  {name}" in lines
    for theirs, ours in REPORT.renamed:
        assert [line for line in lines if line.split() == [theirs, "->", ours]]
