"""Every notebook is stored with its outputs, and runs from a clean kernel on shapes; what it shows is what is there."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from msil import MSIL
from msil.config import Config
from msil.data.shapes import write_shapes
from msil.training.experiment import run
from training.cases import tiny_config

NEEDED = "the notebooks' tests need `pip install -e .[notebooks]` (nbformat, nbclient, ipykernel)"
nbformat = pytest.importorskip("nbformat", reason=NEEDED)
nbclient = pytest.importorskip("nbclient", reason=NEEDED)
pytest.importorskip("ipykernel", reason=NEEDED)

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
NAMES = ("heatmaps", "object_centers", "plug_in", "tables")
# Two steps on 16 images; the attention's usual width, so that the runs count as the paper's rows.
SMOKE = ("model/head=vfnet", "model.msil.reduction=16", "schedule=smoke", "schedule.max_steps=2")


def read(name: str) -> Any:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_stored_as_it_ran(name: str) -> None:
    text = (NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")
    raw = json.loads(text)
    nbformat.validate(raw)
    code = [cell for cell in raw["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs and not [one for one in outputs if one["output_type"] == "error" or one.get("name") == "stderr"]
    assert str(Path.home()) + "/" not in text and len(text) < 600_000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder like the repository, as far as the notebooks know it. Kernels find an empty home in place/home."""
    root = tmp_path_factory.mktemp("notebooks")
    for name in ("home", "notebooks", "cache"):
        (root / name).mkdir()
    # The list of fonts takes matplotlib seconds to make anew.
    for fonts in Path(matplotlib.get_cachedir()).glob("fontlist-*.json"):
        shutil.copy(fonts, root / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(root / "home"))
        patch.setenv("MPLCONFIGDIR", str(root / "cache"))
        patch.setenv("IPYTHONDIR", str(root / "cache" / "ipython"))
        for kind in ("CONFIG", "DATA", "RUNTIME"):
            patch.setenv(f"JUPYTER_{kind}_DIR", str(root / "cache" / kind.lower()))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield root
    assert list((root / "home").rglob("*")) == []


@pytest.fixture(scope="module")
def data(place: Path) -> Path:
    return write_shapes(place / "data" / "shapes", num_train=16, num_val=8, image_size=64, seed=0)


@pytest.fixture(scope="module")
def runs(place: Path, data: Path) -> dict[str, dict[str, Any]]:
    """place/runs: the plain detector and MSIL after two steps; what their result.json says, with "folder"."""
    found = {}
    for apply in ("none", "both"):
        config: Config = tiny_config(place / "runs", data, *SMOKE, f"model.msil.apply={apply}")
        found[apply] = {**run(config), "folder": str(place / "runs" / config.run_name)}
    return found


def executed(name: str, folder: Path, parameters: str | None = None) -> dict[str, list[Any]]:
    """The outputs of a notebook's cells by their ids, run in `folder` from a clean kernel."""
    notebook = read(name)
    if parameters is not None:
        (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
        cell.source = parameters
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


def printed(outputs: list[Any]) -> str:
    assert [one.text for one in outputs if one.output_type == "stream" and one.name == "stderr"] == []
    return "".join(one.text for one in outputs if one.output_type == "stream")


def shown(outputs: list[Any], kind: str) -> list[str]:
    return [one.data[kind] for one in outputs if "data" in one and kind in one.data]


def pixels(outputs: list[Any]) -> np.ndarray:
    """(H, W, 3) of the only PNG."""
    (png,) = shown(outputs, "image/png")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))


def test_plug_in_trains_and_detects_with_a_head_of_the_readers_own(place: Path) -> None:
    sources = "\n".join(cell.source for cell in read("plug_in").cells if cell.cell_type == "code")
    assert re.findall(r".*\bmsil\b.*import.*|import msil.*", sources) == ["from msil import MSIL"]
    outputs = executed("plug_in", place / "notebooks")
    plain, ours = (
        int(number.replace(",", "")) for number in re.findall(r"([\d,]+) param", printed(outputs["detector"]))
    )
    assert ours - plain == sum(parameter.numel() for parameter in MSIL(256).parameters())
    assert printed(outputs["check"]) == "as torchvision's head: True\n"
    total, *parts = (float(number) for number in re.findall(r"\d+\.\d+", printed(outputs["training"])))
    assert len(parts) == 3
    assert 0 < total < 100  # at the start, far from diverged
    assert total == pytest.approx(sum(parts), abs=0.002)
    # Two images; as many boxes as scores and labels.
    counts = re.findall(
        r"\{'boxes': \((\d+), 4\), 'scores': \((\d+),\), 'labels': \((\d+),\)\}", printed(outputs["inference"])
    )
    assert len(counts) == 2
    assert all(len(set(one)) == 1 and int(one[0]) > 0 for one in counts)
    assert printed(outputs["weights"]) == "all missing weights are MSIL's: True\nweights without a place: []\n"


@pytest.mark.slow
def test_heatmaps_shows_the_picture_and_its_energy(place: Path, runs: dict[str, dict[str, Any]]) -> None:
    out = place / "figure" / "maps.png"
    plain, ours = (Path(runs[apply]["folder"]) / "checkpoints" / "last.ckpt" for apply in ("none", "both"))
    parameters = f"PLAIN, OURS, SPLIT, LEVEL, OUT = {str(plain)!r}, {str(ours)!r}, 'val', 'merged', {str(out)!r}"
    outputs = executed("heatmaps", place / "notebooks", parameters)
    picture = pixels(outputs["maps"])
    assert np.array_equal(picture, np.asarray(Image.open(out).convert("RGB").reduce(2)))
    # Blue to red beside an image in its own colours: far more than a blank page.
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 1000
    assert printed(outputs["detectors"]) == "8 images of circle, square, triangle, cross\n"
    assert re.search(r"uniform +plain .*MSIL .*MSIL - plain", printed(outputs["energy"]))
    assert (
        len([row for row in json.loads(out.with_suffix(".json").read_text())["rows"] if row["level"] == "merged"]) == 4
    )


@pytest.mark.slow
def test_object_centers_draws_the_classes_and_counts_their_objects(place: Path, data: Path) -> None:
    parameters = f"DATA, ROOT, SPLIT, CLASSES = 'coco', {str(data)!r}, 'train', None"
    outputs = executed("object_centers", place / "notebooks", parameters)
    assert len(np.unique(pixels(outputs["picture"]).reshape(-1, 3), axis=0)) > 100
    truth = json.loads((data / "annotations" / "instances_train.json").read_text())
    lines = printed(outputs["shares"]).split("\n")
    for category in truth["categories"]:
        objects = sum(one["category_id"] == category["id"] for one in truth["annotations"])
        (line,) = [line for line in lines if line.startswith(f"{category['name']},")]
        _, count, *shares = line.split(",")
        assert int(count) == objects
        assert sum(map(float, shares)) == pytest.approx(1, abs=3e-4)


@pytest.mark.slow
def test_tables_stand_with_the_numbers_of_the_runs(place: Path, runs: dict[str, dict[str, Any]]) -> None:
    # The notebook's own parameters, started in notebooks/: place has no results/, so it reads place/runs.
    outputs = executed("tables", place / "notebooks")
    assert printed(outputs["results"]).startswith("2 runs: shapes, ")
    texts = shown(outputs["tables"], "text/markdown")
    assert [text[:8] for text in texts] == ["Table 1.", "Table 2.", "Table 4.", "Table 5.", "Hosts. M"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in texts[1].splitlines() if line[:1] == "|"]
    table = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    for label, apply in (("cls ✗, reg ✗", "none"), ("cls ✓, reg ✓", "both")):
        result = json.loads((Path(runs[apply]["folder"]) / "result.json").read_text())
        assert table[label]["seeds"] == "1"
        for metric in ("AP", "AP50", "AP75"):
            assert table[label][f"{metric} ours"] == f"{100 * result['metrics'][metric]:.1f}"
        assert table[label]["parameters"] == f"{result['parameters'] / 1e6:.2f} M"
    assert table["cls ✓, reg ✗"]["seeds"] == "missing"
    assert shown(outputs["charts"], "image/svg+xml")
