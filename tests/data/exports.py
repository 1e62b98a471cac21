"""The same data set as each tool exports it, written by hand after the tools' own exports."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from msil.data.annotations import AnnotatedImages

WIDTH, HEIGHT = 64, 48
NAMES = ("cat", "dog")
Box = tuple[str, int, int, int, int]  # class, x y width height

# 12 images; a cat in each, a dog besides in every third, and one without boxes.
BOXES: dict[str, list[Box]] = {
    f"img {number:02}.jpg": [("cat", 4 + number, 6, 20, 16), *([("dog", 30, 20, 24, 20)] if number % 3 == 0 else [])]
    for number in range(11)
} | {"img 11.jpg": []}
TRAIN, VALID = list(BOXES)[:9], list(BOXES)[9:]


def auto(root: Path, **more: Any) -> dict[str, Any]:
    return {"name": "auto", "root": str(root), "train_split": "train", "val_split": "val", **more}


def boxes_by_file(dataset: AnnotatedImages) -> dict[str, list[tuple[Any, ...]]]:
    truth = dataset.annotations
    found: dict[str, list[tuple[Any, ...]]] = {Path(name).name: [] for name in truth.file_names}
    for owner, label, box in zip(truth.truth_images, truth.truth_labels, truth.truth_boxes, strict=True):
        found[Path(truth.file_names[owner]).name].append((truth.classes[label], *(round(float(x), 2) for x in box)))
    return found


def write_image(path: Path, boxes: list[Box]) -> None:
    pixels = np.full((HEIGHT, WIDTH, 3), 90, dtype=np.uint8)
    for name, x, y, width, height in boxes:
        pixels[y : y + height, x : x + width] = (220, 40, 40) if name == "cat" else (40, 40, 220)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, format="JPEG", quality=95)


def write_images(folder: Path, names: Iterable[str] = BOXES) -> None:
    for name in names:
        write_image(folder / name, BOXES[name])


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def coco_json(
    path: Path, names: list[str], *, first: int = 1, prefix: str = "", extra: list[dict] | None = None
) -> None:
    """first: the lowest id. prefix: of file names. extra: categories before the two."""
    extra = extra or []
    ids = {name: first + len(extra) + number for number, name in enumerate(NAMES)}
    images = [
        {"id": first + number, "width": WIDTH, "height": HEIGHT, "file_name": prefix + name, "license": 0}
        for number, name in enumerate(names)
    ]
    boxes = [(image["id"], *box) for image, name in zip(images, names, strict=True) for box in BOXES[name]]
    annotations = [
        {"id": first + number, "image_id": image, "category_id": ids[name], "segmentation": [], "area": w * h,
         "bbox": [x, y, w, h], "iscrowd": 0, "attributes": {"occluded": False}}
        for number, (image, name, x, y, w, h) in enumerate(boxes)
    ]  # fmt: skip
    categories = [
        *extra,
        *({"id": ids[name], "name": name, "supercategory": "pets" if extra else ""} for name in NAMES),
    ]
    content = {"info": {"year": 2024}, "licenses": [], "categories": categories}
    write_text(path, json.dumps({**content, "images": images, "annotations": annotations}))


def voc_xmls(folder: Path, names: Iterable[str] = BOXES) -> None:
    for name in names:
        voc_xml(folder / f"{stem(name)}.xml", name)


def voc_xml(path: Path, name: str) -> None:
    objects = "".join(
        f"<object><name>{label}</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult><bndbox>"
        f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
        for label, x, y, w, h in BOXES[name]
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    write_text(path, f"<annotation><folder>pets</folder><filename>{name}</filename>{size}{objects}</annotation>")


def yolo_txts(folder: Path, names: Iterable[str] = BOXES) -> None:
    for name in names:
        rows = [
            f"{NAMES.index(label)} {(x + w / 2) / WIDTH:.6f} {(y + h / 2) / HEIGHT:.6f} "
            f"{w / WIDTH:.6f} {h / HEIGHT:.6f}\n"
            for label, x, y, w, h in BOXES[name]
        ]
        write_text(folder / f"{stem(name)}.txt", "".join(rows))


def stem(name: str) -> str:
    return name.removesuffix(".jpg")


def cvat_coco(root: Path) -> None:
    write_images(root / "images" / "default")
    coco_json(root / "annotations" / "instances_default.json", list(BOXES))


def cvat_coco_old(root: Path) -> None:
    """Until 2024, images lay in images/ itself."""
    write_images(root / "images")
    coco_json(root / "annotations" / "instances_default.json", list(BOXES))


def cvat_voc(root: Path) -> None:
    write_images(root / "JPEGImages")
    voc_xmls(root / "Annotations")
    write_text(root / "ImageSets" / "Main" / "default.txt", "".join(f"{stem(name)}\n" for name in BOXES))
    for label in NAMES:
        lines = [f"{stem(name)}  {1 if label in [b[0] for b in boxes] else -1}\n" for name, boxes in BOXES.items()]
        write_text(root / "ImageSets" / "Main" / f"{label}_default.txt", "".join(lines))
    write_text(
        root / "labelmap.txt", "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:250,50,83::\ndog:9,9,9::\n"
    )


def label_studio_coco(root: Path) -> None:
    write_images(root / "images")
    coco_json(root / "result.json", list(BOXES), first=0, prefix="images/")


def plain_coco(root: Path) -> None:
    write_images(root / "photos")
    coco_json(root / "annotations.json", list(BOXES))
    write_text(root / "detections.json", "[]")


def plain_coco_splits(root: Path) -> None:
    for split, names in (("train", TRAIN), ("valid", VALID)):
        write_images(root / "images" / split, names)
        coco_json(root / "annotations" / f"{split}.json", names)


def label_studio_yolo(root: Path) -> None:
    write_images(root / "images")
    yolo_txts(root / "labels")
    write_text(root / "classes.txt", "cat\ndog\n")
    write_text(root / "notes.json", json.dumps({"categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]}))


def roboflow_coco(root: Path) -> None:
    for split, names in (("train", TRAIN), ("valid", VALID)):
        write_images(root / split, names)
        extra = [{"id": 0, "name": "pets", "supercategory": "none"}]
        coco_json(root / split / "_annotations.coco.json", names, first=0, extra=extra)
    write_text(root / "README.dataset.txt", "# pets > 2024-01-01\n")


def roboflow_voc(root: Path) -> None:
    for split, names in (("train", TRAIN), ("valid", VALID)):
        write_images(root / split, names)
        voc_xmls(root / split, names)


def roboflow_yolo(root: Path) -> None:
    for split, names in (("train", TRAIN), ("valid", VALID)):
        write_images(root / split / "images", names)
        yolo_txts(root / split / "labels", names)
    text = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\nnames: ['cat', 'dog']\n"
    write_text(root / "data.yaml", text + "\nroboflow:\n  workspace: me\n  project: pets\n  version: 1\n")


def ultralytics_yolo(root: Path) -> None:
    for split, names in (("train", TRAIN), ("val", VALID)):
        write_images(root / "images" / split, names)
        yolo_txts(root / "labels" / split, filter(BOXES.get, names))  # an image without boxes has no file
    text = "path: ../datasets/pets # dataset root dir\ntrain: images/train\nval: images/val\ntest: # none\n\n"
    write_text(root / "data.yaml", text + "names:\n  0: cat\n  1: dog\n")


def darknet_yolo(root: Path) -> None:
    """A yaml of the user's own name, and lists of absolute paths of another machine."""
    ultralytics_yolo(root)
    (root / "data.yaml").unlink()
    text = "path: /home/me/pets\ntrain: train.txt\nval: /home/me/pets/val.txt\nnames: [cat, dog]\n"
    write_text(root / "pets.yaml", text)
    write_text(root / "hyp.yaml", "lr0: 0.01\n")
    for split, names, top in (("train", TRAIN, "/home/me/pets/"), ("val", VALID, "C:\\me\\pets\\")):
        write_text(root / f"{split}.txt", "".join(f"{top}images/{split}/{name}\n" for name in names))


def cvat_yolo(root: Path) -> None:
    """CVAT's "Ultralytics YOLO Detection": lists of images."""
    write_images(root / "images" / "train")
    yolo_txts(root / "labels" / "train")
    write_text(root / "train.txt", "".join(f"data/images/train/{name}\n" for name in BOXES))
    write_text(root / "data.yaml", "names:\n  0: cat\n  1: dog\npath: .\ntrain: train.txt\n")


def cvat_coco_splits(root: Path) -> None:
    """CVAT's own names of subsets."""
    for split, names in (("Train", TRAIN), ("Validation", VALID)):
        write_images(root / "images" / split, names)
        coco_json(root / "annotations" / f"instances_{split}.json", names)


def cvat_yolo_splits(root: Path) -> None:
    for split, names in (("Train", TRAIN), ("Validation", VALID)):
        write_images(root / "images" / split, names)
        yolo_txts(root / "labels" / split, names)
        write_text(root / f"{split}.txt", "".join(f"data/images/{split}/{name}\n" for name in names))
    write_text(
        root / "data.yaml",
        "Train: Train.txt\nValidation: Validation.txt\nnames:\n  0: cat\n  1: dog\npath: .\n",
    )


def cvat_yolo_old(root: Path) -> None:
    """CVAT's "YOLO 1.1", Darknet's files."""
    write_images(root / "obj_train_data")
    yolo_txts(root / "obj_train_data")
    write_text(root / "obj.names", "cat\ndog\n")
    write_text(root / "obj.data", "classes = 2\nnames = data/obj.names\nbackup = backup/\ntrain = data/train.txt\n")
    write_text(root / "train.txt", "".join(f"data/obj_train_data/{name}\n" for name in BOXES))


def label_img(root: Path) -> None:
    write_images(root)
    voc_xmls(root)


def label_img_yolo(root: Path) -> None:
    write_images(root)
    yolo_txts(root)
    write_text(root / "classes.txt", "cat\ndog\n")


def kaggle_voc(root: Path) -> None:
    """As many sets of kaggle.com: images/ and annotations/, no lists."""
    write_images(root / "images")
    voc_xmls(root / "annotations")


WITH_VAL = (  # a split to validate on
    cvat_coco_splits, cvat_yolo_splits, plain_coco_splits, roboflow_coco, roboflow_voc, roboflow_yolo,
    ultralytics_yolo, darknet_yolo,
)  # fmt: skip
WITHOUT = (
    cvat_coco, cvat_coco_old, cvat_voc, cvat_yolo, cvat_yolo_old, label_studio_coco, plain_coco,
    label_studio_yolo, label_img, label_img_yolo, kaggle_voc,
)  # fmt: skip
# Writer, and whether there is a split to validate on.
EXPORTS = {write.__name__: (write, write in WITH_VAL) for write in (*WITH_VAL, *WITHOUT)}
