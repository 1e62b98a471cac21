"""A made-up report of the real one's kind, to render in tests and to look at: `python -m tests.reporting.sample_page`
writes it to a file. None of its numbers was measured."""

from __future__ import annotations

import dataclasses
import functools
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from msil.reporting.page import (
    Cell,
    Gallery,
    GalleryItem,
    Picture,
    Report,
    ReportColumn,
    ReportRow,
    ReportTable,
    Section,
    render,
)

AP_COLUMN = 3  # of the first table
LABELS = ("Ground truth", "Plain", "MSIL")
RUNS = {"Plain": 35.1, "MSIL both": 37.4, "MSIL classification": 36.2}


@functools.cache
def sample() -> Report:
    return Report(
        "MSIL: the paper's tables and figures, regenerated",
        (
            "A made-up report: 36 runs on shapes, three seeds a row. Intervals are 95 % percentile intervals of a "
            "paired bootstrap over images and seeds.",
        ),
        (
            Section(
                "tables",
                "Tables",
                subsections=(
                    Section("section-1", "Table 1: detectors", ("The block in FCOS and VFNet.",), (detectors(),)),
                    Section("section-3", "Table 3: other detectors", ("Quoted from the paper.",), (quoted(),)),
                ),
            ),
            Section(
                "curves",
                "Training",
                ("One line a seed; the mean is bold.",),
                pictures=(
                    chart("AP over the epochs", "AP by epoch", 540, 330),
                    chart("Loss over the steps", "Loss", 540, 330),
                ),
            ),
            Section(
                "classes", "Classes", pictures=(chart("AP of each class", "Average precision by class", 1100, 420),)
            ),
            Section("images", "Images", ("Those first where plain and MSIL differ most.",), galleries=(gallery(),)),
        ),
        "Made by msil report from runs/ (36 finished, 4 missing).",
    )


def detectors() -> ReportTable:
    """Names 'FCOS', ..., ours interleaved with the paper's, and two rows nobody ran."""
    columns = (
        ReportColumn("Detector"),
        ReportColumn("MSIL"),
        ReportColumn("Paper AP", numeric=True, tooltip="As printed in Table 1"),
        ReportColumn("AP", numeric=True, tooltip="Mean and standard deviation over seeds, percent"),
        ReportColumn("Difference to plain", numeric=True, tooltip="With a 95 % interval"),
        ReportColumn("AP50", numeric=True),
        ReportColumn("AP75", numeric=True),
        ReportColumn("Parameters", numeric=True),
        ReportColumn("GFLOPs", numeric=True),
        ReportColumn("Images/s", numeric=True),
    )
    missing = Cell("not run", note=True)
    rows = (
        detector("FCOS ResNet-50", "none", 38.5, 35.1, None),
        detector("FCOS ResNet-50", "both", 40.2, 37.4, (2.3, 0.4, 4.1)),
        detector("VFNet ResNet-50", "none", 41.6, 39.1, None),
        detector("VFNet ResNet-50", "both", 42.4, 38.9, (-0.2, -1.9, 1.6)),
        ReportRow((Cell("FCOS ResNet-101"), Cell("none"), Cell("40.9", 40.9), *7 * (missing,)), "missing"),
        ReportRow((Cell("FCOS ResNet-101"), Cell("both"), Cell("42.1", 42.1), *7 * (missing,)), "missing"),
    )
    return ReportTable(
        "table1",
        "Table 1, ours on shapes: 600 training and 200 validation images, schedule quick (12 epochs), seeds 0, 1, 2. "
        "AP in percent on the validation images.",
        columns,
        rows,
        (
            "The paper's numbers: COCO train2017 for 12 epochs, ImageNet weights, scored on val2017. NOT comparable.",
            "The paper prints 40.2 in Table 1 and 40.1 in its text for the same row.",
            "GFLOPs: the forward pass of one 800x1333 image, 2 per multiply-add.",
        ),
        (
            "python run.py experiment=table1 data=shapes schedule=quick model.backbone.name=resnet101 seed=0,1,2",
            "msil report runs",
        ),
    )


def detector(name: str, msil: str, paper: float, ap: float, gain: tuple[float, float, float] | None) -> ReportRow:
    difference = Cell("-", note=True)
    if gain:
        text = [f"{value:+.1f}".replace("-", "\u2212") for value in gain]
        difference = Cell(text[0], gain[0], detail=f"{text[1]} to {text[2]}")
    return ReportRow(
        (
            Cell(name),
            Cell(msil),
            Cell(f"{paper:.1f}", paper),
            Cell(f"{ap:.1f}", ap, detail="± 0.4"),
            difference,
            Cell(f"{ap + 18:.1f}", ap + 18),
            Cell(f"{ap + 2:.1f}", ap + 2),
            Cell("32.1 M", 32.1e6, title="32 113 205"),
            Cell("200.6", 200.6e9),
            Cell("11.3", 11.3),
        )
    )


def quoted() -> ReportTable:
    columns = (ReportColumn("Detector"), ReportColumn("Backbone"), ReportColumn("AP", numeric=True))
    rows = [
        ReportRow((Cell(name), Cell("ResNet-101"), Cell(f"{ap:.1f}", ap)), "quoted")
        for name, ap in (("RetinaNet", 39.1), ("FCOS", 41.5), ("ATSS", 43.6), ("GFL", 45.0))
    ]
    rows.append(ReportRow((Cell("MSIL-VFNet, as printed"), Cell("ResNet-101"), Cell("46.9", 46.9)), "paper"))
    return ReportTable("table3", "Table 3: single model, test-dev2017.", columns, tuple(rows))


def chart(title: str, caption: str, width: int, height: int) -> Picture:
    """A real SVG of matplotlib's: it has a <style> and style attributes of its own."""
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(RUNS):
        axes.plot(np.arange(12), 35 + 2 * i - 30 * np.exp(-np.arange(12) / (3 + i)), label=name)
    axes.set(title=title, xlabel="epoch", ylabel="AP (%)")
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    return Picture(f"{title}, a line for each of {', '.join(RUNS)}", file.getvalue(), "svg", width, height, caption)


def gallery() -> Gallery:
    items = []
    for i in range(6):
        pictures = tuple((label, scene(i, j, f"Image {i}, {label}")) for j, label in enumerate(LABELS))
        note = f"AP50 of the image: plain {50 + i}, MSIL {60 + 3 * i}"
        items.append(GalleryItem(f"val/{i:06}.png", pictures, note, sort=float(i)))
    return Gallery("differences", "Six validation images of 200", tuple(items))


def scene(seed: int, boxes: int, alt: str) -> Picture:
    generator = np.random.default_rng(seed)
    image = Image.new("RGB", (320, 240), tuple(int(value) for value in generator.integers(60, 200, 3)))
    draw = ImageDraw.Draw(image)
    for k in range(4):
        x, y = (int(value) for value in generator.integers(0, 180, 2))
        draw.ellipse((x, y, x + 60 + 10 * k, y + 50), fill=tuple(int(value) for value in generator.integers(0, 255, 3)))
        if k <= boxes + 1:
            draw.rectangle((x - 2, y - 2, x + 62 + 10 * k, y + 52), outline="white", width=2)
    file = io.BytesIO()
    kind = "jpeg" if seed % 2 else "png"
    image.save(file, format=kind)
    return Picture(alt, file.getvalue(), kind, 320, 240)


HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "<img src=x onerror='window.hacked=1'><svg onload=\"window.hacked=1\">",
    '"><script>window.hacked=1</script>',
    "' onmouseover='window.hacked=1' x='",
    "</style></script></title></textarea><script>window.hacked=1</script>",
    "javascript:window.hacked=1",
    "{{7*7}}{% raw %}${7*7}<%= 7*7 %>",
    "two\nlines\tand a tab",
    "&lt;b&gt; &amp; &#60; &",
    "\u202eright to left\u202c \u05e9\u05dc\u05d5\u05dd",
    "\U0001f981 \U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301",
    "null \0 escape \x1b lone \udcff return \r bell \x07",
    "<!-- --> ]]> <![CDATA[ <?php",
    "long" * 80,
)


def with_texts(part: Any, text: Callable[[], str]) -> Any:
    """The same report with every text in it replaced by the next of `text`; ids and kinds stay."""
    if isinstance(part, str):
        return text()
    if isinstance(part, tuple):
        return tuple(with_texts(one, text) for one in part)
    if not dataclasses.is_dataclass(part) or isinstance(part, type):
        return part
    names = [field.name for field in dataclasses.fields(part) if field.name not in ("id", "kind")]
    return dataclasses.replace(part, **{name: with_texts(getattr(part, name), text) for name in names})


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(sample()), encoding="utf-8")
