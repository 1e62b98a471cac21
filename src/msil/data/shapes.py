"""The embedded data set `shapes`: circles, squares, triangles and crosses on textured backgrounds, made from a seed.

It is written once to disk as PNG images and COCO json and then read like any other COCO data set:
    root/train/*.png, root/val/*.png, root/annotations/instances_{train,val}.json, root/shapes.json (the parameters).
Objects are vivid and backgrounds greyish, so colour separates objects from the ground, but colour and texture are drawn
independently of the class. Objects overlap; boxes and areas are those of the visible pixels, as in COCO, and no object
is hidden by more than 40 %. At 128 px all three of COCO's area ranges occur (large:
squares and circles only, since no other class can cover 96 * 96 of 128 * 128 pixels).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from msil.errors import DataError

Array = NDArray[Any]

CLASSES = ("circle", "square", "triangle", "cross")
CATEGORY_IDS = (1, 2, 4, 7)  # with gaps, as COCO's own
STAMP = "shapes.json"
FORMAT = 1  # to be raised whenever the same parameters would give other pixels or annotations

SUPERSAMPLING = 3  # sub-pixels a side
MIN_VISIBLE = 0.6  # of an object's pixels; less would leave fragments of no recognisable class
MIN_CONTRAST = 100.0  # distance between the mean colours of an object and of what lies under it, of 0..255 RGB
EMPTY_IMAGES = 0.04  # share of images without any object
PLACEMENTS = 12  # tries for each object before it is given up

# Side of the shape before its rotation, as a share of the image side: (low, high, probability). The large ones reach
# COCO's 96 * 96 px in an image of 128 px.
SIZES = ((0.13, 0.24, 0.32), (0.24, 0.52, 0.52), (0.84, 0.97, 0.16))
MAX_ROTATION = np.deg2rad(15)


@dataclass
class DrawnObject:
    """label: index into CLASSES. mask: (S, S) bool, all its pixels in the image, hidden ones too."""

    label: int
    mask: Array


def write_shapes(root: Path | str, *, num_train: int, num_val: int, image_size: int, seed: int) -> Path:
    """Makes the data set at `root` unless it is there already. Returns `root` as a Path.

    Several processes may call it at once: each writes a temporary folder beside `root` and renames it; the first wins
    and the others use the winner's.

    Raises DataError if `root` holds something else, or shapes made with other
    parameters, or cannot be written.
    """
    root = Path(root)
    stamp = {"format": FORMAT, "num_train": num_train, "num_val": num_val, "image_size": image_size, "seed": seed}
    if _is_made(root, stamp):
        return root
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as scratch:
            made = Path(scratch) / "shapes"
            (made / "annotations").mkdir(parents=True)
            _write_split(made, "train", num_train, image_size, seed)
            _write_split(made, "val", num_val, image_size, seed)
            (made / STAMP).write_text(json.dumps(stamp) + "\n")
            try:
                os.rename(made, root)
            except OSError:
                if not _is_made(root, stamp):
                    raise
    except OSError as error:
        raise DataError(
            f"Cannot write the shapes data set to {root} ({error.strerror or error}); set data.root to a folder that "
            f"can be written."
        ) from error
    return root


def draw_image(split: str, index: int, image_size: int, seed: int) -> tuple[Array, list[DrawnObject]]:
    """One image, (S, S, 3) uint8 RGB, and its objects from the back to the front.

    A function of the arguments alone: the other images and their number do not matter.
    """
    rng = np.random.default_rng((seed, ("train", "val").index(split), index))
    canvas = _texture(rng, image_size, _muted_colour(rng), contrast=20.0)
    objects: list[DrawnObject] = []
    if rng.random() >= EMPTY_IMAGES:
        sides = _draw_sides(rng) * image_size
        for side in sides:
            placed = _place(rng, int(rng.integers(len(CLASSES))), float(side), image_size, objects)
            if placed is not None:
                coverage, drawn = placed
                canvas = _paint(rng, canvas, coverage, drawn.mask)
                objects.append(drawn)
    canvas = canvas + rng.normal(0.0, 3.0, canvas.shape)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8), objects


def visible_masks(objects: list[DrawnObject]) -> list[Array]:
    """(S, S) bool a object: its pixels that no later object covers."""
    masks: list[Array] = []
    covered: Any = np.False_
    for drawn in reversed(objects):
        masks.append(drawn.mask & ~covered)
        covered = covered | drawn.mask
    return masks[::-1]


def box_of_mask(mask: Array) -> list[int]:
    """The tight box x, y, width, height of a (H, W) bool mask with at least one pixel; a pixel is 1 wide."""
    columns = np.flatnonzero(mask.any(axis=0))
    rows = np.flatnonzero(mask.any(axis=1))
    return [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]


# --- files


def _is_made(root: Path, wanted: dict[str, int]) -> bool:
    """False if nothing is there; DataError if that is not the data set with these parameters."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = dict(json.loads((root / STAMP).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{root} exists but is no shapes data set (no readable {STAMP} in it); set data.root to a new folder."
        ) from error
    if found != wanted:
        made, needed = (", ".join(f"{name}={value}" for name, value in one.items()) for one in (found, wanted))
        raise DataError(
            f"{root} holds a shapes data set made with {made}, not {needed}; remove that folder or set data.root to a "
            "new one."
        )
    return True


def _write_split(root: Path, split: str, count: int, image_size: int, seed: int) -> None:
    (root / split).mkdir()
    images, annotations = [], []
    for index in tqdm(range(count), f"making {split} of shapes", unit=" images", ncols=80, leave=False, disable=None):
        pixels, objects = draw_image(split, index, image_size, seed)
        image_id = 2 * index + (1 if split == "train" else 2)  # unique over both splits
        file_name = f"{image_id:06d}.png"
        Image.fromarray(pixels).save(root / split / file_name, compress_level=3)
        images.append({"id": image_id, "file_name": file_name, "width": image_size, "height": image_size})
        for drawn, mask in zip(objects, visible_masks(objects), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": CATEGORY_IDS[drawn.label],
                    "bbox": box_of_mask(mask),
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": name} for number, name in zip(CATEGORY_IDS, CLASSES, strict=True)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


# --- geometry


def _draw_sides(rng: np.random.Generator) -> Array:
    """1 to 4 sides as shares of the image side, roughly from large to small: at most one of the largest range, since a
    second would hide everything. Roughly: so that a smaller object is sometimes behind a larger one."""
    count = int(rng.integers(1, 5))
    ranges = rng.choice(len(SIZES), size=count, p=[share for _, _, share in SIZES])
    largest = len(SIZES) - 1
    ranges[1:][ranges[1:] == largest] = 1
    low, high = np.array([SIZES[i][:2] for i in ranges]).T
    sides = np.exp(rng.uniform(np.log(low), np.log(high)))
    return sides[np.argsort(-sides * np.exp(rng.normal(0.0, 0.35, count)))]


def _place(
    rng: np.random.Generator, label: int, side: float, image_size: int, objects: list[DrawnObject]
) -> tuple[Array, DrawnObject] | None:
    """Tries places until the object lies mostly inside the image and hides none of the others too much.

    Returns (S, S) coverage in 0..1 and the object, or None if no place was found.
    """
    for _ in range(PLACEMENTS):
        margin = 0.4 * side  # so much of the side stays inside on every edge
        low, high = min(margin, image_size / 2), max(image_size - margin, image_size / 2)
        centre = rng.uniform(low, high, 2)
        angle = rng.uniform(-MAX_ROTATION, MAX_ROTATION)
        coverage, outside = _coverage(label, centre, side, angle, image_size)
        drawn = DrawnObject(label, coverage >= 0.5)
        if outside > 0.3 or not drawn.mask.any():
            continue
        masks = visible_masks([*objects, drawn])
        if all(mask.sum() >= MIN_VISIBLE * o.mask.sum() for mask, o in zip(masks, objects, strict=False)):
            return coverage, drawn
    return None


def _coverage(label: int, centre: Array, side: float, angle: float, image_size: int) -> tuple[Array, float]:
    """(S, S) share of each pixel that the shape covers, and the share of the shape that lies outside the image."""
    reach = int(np.ceil(0.75 * side)) + 1  # half the diagonal of the square, 0.71 of its side
    x0, y0 = (np.floor(centre) - reach).astype(int)
    pixels = 2 * reach + 1
    sub = (np.arange(pixels * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    dx, dy = sub[None, :] + x0 - centre[0], sub[:, None] + y0 - centre[1]
    cos, sin = np.cos(angle), np.sin(angle)
    u, v = (cos * dx + sin * dy) / (side / 2), (cos * dy - sin * dx) / (side / 2)
    inside = INSIDE[CLASSES[label]](u, v)
    patch = inside.reshape(pixels, SUPERSAMPLING, pixels, SUPERSAMPLING).mean(axis=(1, 3))
    coverage = np.zeros((image_size, image_size))
    left, top = max(x0, 0), max(y0, 0)
    right, bottom = min(x0 + pixels, image_size), min(y0 + pixels, image_size)
    coverage[top:bottom, left:right] = patch[top - y0 : bottom - y0, left - x0 : right - x0]
    return coverage, 1.0 - float(coverage.sum() / patch.sum())


# Is a point inside the shape? u to the right, v down, both in half sides from its centre.
INSIDE: dict[str, Callable[[Array, Array], Array]] = {
    "circle": lambda u, v: u * u + v * v <= 1.0,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) <= 0.94,
    "triangle": lambda u, v: (v <= 0.9) & (2 * np.abs(u) <= v + 1.1),  # apex up, base 2 wide
    "cross": lambda u, v: (np.maximum(np.abs(u), np.abs(v)) <= 1.0) & (np.minimum(np.abs(u), np.abs(v)) <= 0.34),
}


# --- colour


def _colour(rng: np.random.Generator) -> Array:
    """A vivid colour of any hue, (3,) RGB."""
    hue, low = rng.uniform(0.0, 6.0), rng.uniform(0.0, 0.35)
    strength = np.clip(np.abs((hue + np.array([0.0, 4.0, 2.0])) % 6.0 - 3.0) - 1.0, 0.0, 1.0)
    return rng.uniform(150.0, 255.0) * (low + (1 - low) * strength)


def _muted_colour(rng: np.random.Generator) -> Array:
    """A greyish colour, (3,) RGB."""
    return rng.uniform(50.0, 170.0) + rng.uniform(-20.0, 20.0, 3)


def _paint(rng: np.random.Generator, canvas: Array, coverage: Array, mask: Array) -> Array:
    """`canvas` (S, S, 3) with a textured object on it whose mean colour stands out from what it covers."""
    under = canvas[mask].mean(axis=0)
    colour = _colour(rng)
    while np.linalg.norm(colour - under) < MIN_CONTRAST:
        colour = _colour(rng)
    texture = _texture(rng, canvas.shape[0], colour, contrast=20.0)
    alpha = coverage[..., None]
    return alpha * texture + (1 - alpha) * canvas


def _texture(rng: np.random.Generator, size: int, colour: Array, *, contrast: float) -> Array:
    """(S, S, 3) around `colour`: smooth noise, a gradient, stripes or a chequerboard, +-`contrast` at most."""
    y, x = np.mgrid[0:size, 0:size].astype(float)
    angle = rng.uniform(0, np.pi)
    along = np.cos(angle) * x + np.sin(angle) * y
    period = rng.uniform(0.06, 0.2) * size
    kind = rng.integers(4)
    if kind == 0:
        pattern = _smooth_noise(rng, size, int(rng.integers(3, 9)))
    elif kind == 1:
        pattern = (along - along.mean()) / (np.abs(along - along.mean()).max())
    elif kind == 2:
        pattern = np.sin(2 * np.pi * along / period)
    else:
        across = np.cos(angle) * y - np.sin(angle) * x
        pattern = np.tanh(6 * np.sin(np.pi * along / period) * np.sin(np.pi * across / period))
    direction = rng.choice([-1.0, 1.0]) * rng.uniform(0.6, 1.0, 3)
    fine = 0.3 * _smooth_noise(rng, size, max(size // 5, 2))
    pattern = rng.uniform(0.3, 1.0) * pattern + fine
    return np.clip(colour + contrast * direction * pattern[..., None], 0, 255)


def _smooth_noise(rng: np.random.Generator, size: int, cells: int) -> Array:
    """(S, S) in -1..1: random values on a grid of `cells` + 1 points a side, cosine-interpolated."""
    grid = rng.uniform(-1.0, 1.0, (cells + 1, cells + 1))
    position = (np.arange(size) + 0.5) * cells / size
    cell = position.astype(int)
    weight = (1 - np.cos(np.pi * (position - cell))) / 2
    rows = grid[cell] * (1 - weight)[:, None] + grid[cell + 1] * weight[:, None]
    return rows[:, cell] * (1 - weight) + rows[:, cell + 1] * weight
