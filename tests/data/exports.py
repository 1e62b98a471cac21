"""The same data set as each tool exports it, written by hand after the tools' own exports."""

from __future__ import annotations

import json
from collections.abc import Callable
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


def write_images(folder: Path, names: list[str]) -> None:
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


def voc_xml(path: Path, name: str) -> None:
    objects = "".join(
        f"<object><name>{label}</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult><bndbox>"
        f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
        for label, x, y, w, h in BOXES[name]
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    write_text(path, f"<annotation><folder>pets</folder><filename>{name}</filename>{size}{objects}</annotation>")


def yolo_txt(path: Path, name: str) -> None:
    rows = [
        f"{NAMES.index(label)} {(x + w / 2) / WIDTH:.6f} {(y + h / 2) / HEIGHT:.6f} {w / WIDTH:.6f} {h / HEIGHT:.6f}\n"
        for label, x, y, w, h in BOXES[name]
    ]
    write_text(path, "".join(rows))


def stem(name: str) -> str:
    return name.removesuffix(".jpg")


def cvat_coco(root: Path) -> None:
    write_images(root / "images" / "default", list(BOXES))
    coco_json(root / "annotations" / "instances_default.json", list(BOXES))


def cvat_coco_old(root: Path) -> None:
    """Until 2024, images lay in images/ itself."""
    write_images(root / "images", list(BOXES))
    coco_json(root / "annotations" / "instances_default.json", list(BOXES))


def cvat_voc(root: Path) -> None:
    write_images(root / "JPEGImages", list(BOXES))
    for name in BOXES:
        voc_xml(root / "Annotations" / f"{stem(name)}.xml", name)
    write_text(root / "ImageSets" / "Main" / "default.txt", "".join(f"{stem(name)}\n" for name in BOXES))
    for label in NAMES:
        lines = [f"{stem(name)}  {1 if label in [b[0] for b in boxes] else -1}\n" for name, boxes in BOXES.items()]
        write_text(root / "ImageSets" / "Main" / f"{label}_default.txt", "".join(lines))
    write_text(
        root / "labelmap.txt", "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:250,50,83::\ndog:9,9,9::\n"
    )


def label_studio_coco(root: Path) -> None:
    write_images(root / "images", list(BOXES))
    coco_json(root / "result.json", list(BOXES), first=0, prefix="images/")


def plain_coco(root: Path) -> None:
    write_images(root / "photos", list(BOXES))
    coco_json(root / "annotations.json", list(BOXES))
    write_text(root / "detections.json", "[]")


def plain_coco_splits(root: Path) -> None:
    for split, names in (("train", TRAIN), ("valid", VALID)):
        write_images(root / "images" / split, names)
        coco_json(root / "annotations" / f"{split}.json", names)


def label_studio_yolo(root: Path) -> None:
    write_images(root / "images", list(BOXES))
    for name in BOXES:
        yolo_txt(root / "labels" / f"{stem(name)}.txt", name)
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
        for name in names:
            voc_xml(root / split / f"{stem(name)}.xml", name)


def roboflow_yolo(root: Path) -> None:
    for split, names in (("train", TRAIN), ("valid", VALID)):
        write_images(root / split / "images", names)
        for name in names:
            yolo_txt(root / split / "labels" / f"{stem(name)}.txt", name)
    text = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\nnames: ['cat', 'dog']\n"
    write_text(root / "data.yaml", text + "\nroboflow:\n  workspace: me\n  project: pets\n  version: 1\n")


def ultralytics_yolo(root: Path) -> None:
    for split, names in (("train", TRAIN), ("val", VALID)):
        write_images(root / "images" / split, names)
        for name in names:
            if BOXES[name]:  # an image without boxes has no file
                yolo_txt(root / "labels" / split / f"{stem(name)}.txt", name)
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
    write_images(root / "images" / "train", list(BOXES))
    for name in BOXES:
        yolo_txt(root / "labels" / "train" / f"{stem(name)}.txt", name)
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
        for name in names:
            yolo_txt(root / "labels" / split / f"{stem(name)}.txt", name)
        write_text(root / f"{split}.txt", "".join(f"data/images/{split}/{name}\n" for name in names))
    write_text(
        root / "data.yaml",
        "Train: Train.txt\nValidation: Validation.txt\nnames:\n  0: cat\n  1: dog\npath: .\n",
    )


def cvat_yolo_old(root: Path) -> None:
    """CVAT's "YOLO 1.1", Darknet's files."""
    write_images(root / "obj_train_data", list(BOXES))
    for name in BOXES:
        yolo_txt(root / "obj_train_data" / f"{stem(name)}.txt", name)
    write_text(root / "obj.names", "cat\ndog\n")
    write_text(root / "obj.data", "classes = 2\nnames = data/obj.names\nbackup = backup/\ntrain = data/train.txt\n")
    write_text(root / "train.txt", "".join(f"data/obj_train_data/{name}\n" for name in BOXES))


def label_img(root: Path) -> None:
    write_images(root, list(BOXES))
    for name in BOXES:
        voc_xml(root / f"{stem(name)}.xml", name)


def label_img_yolo(root: Path) -> None:
    write_images(root, list(BOXES))
    for name in BOXES:
        yolo_txt(root / f"{stem(name)}.txt", name)
    write_text(root / "classes.txt", "cat\ndog\n")


def kaggle_voc(root: Path) -> None:
    """As many sets of kaggle.com: images/ and annotations/, no lists."""
    write_images(root / "images", list(BOXES))
    for name in BOXES:
        voc_xml(root / "annotations" / f"{stem(name)}.xml", name)


# Writer, and whether there is a split to validate on.
EXPORTS: dict[str, tuple[Callable[[Path], None], bool]] = {
    "cvat_coco": (cvat_coco, False),
    "cvat_coco_old": (cvat_coco_old, False),
    "cvat_coco_splits": (cvat_coco_splits, True),
    "cvat_voc": (cvat_voc, False),
    "cvat_yolo": (cvat_yolo, False),
    "cvat_yolo_splits": (cvat_yolo_splits, True),
    "cvat_yolo_old": (cvat_yolo_old, False),
    "label_studio_coco": (label_studio_coco, False),
    "plain_coco": (plain_coco, False),
    "plain_coco_splits": (plain_coco_splits, True),
    "label_studio_yolo": (label_studio_yolo, False),
    "roboflow_coco": (roboflow_coco, True),
    "roboflow_voc": (roboflow_voc, True),
    "roboflow_yolo": (roboflow_yolo, True),
    "ultralytics_yolo": (ultralytics_yolo, True),
    "darknet_yolo": (darknet_yolo, True),
    "label_img": (label_img, False),
    "label_img_yolo": (label_img_yolo, False),
    "kaggle_voc": (kaggle_voc, False),
}
