"""evaluation.npz: bit by bit, damaged, hostile; and the digest of what was evaluated."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from msil.errors import DataError
from msil.metrics.record import RECORD_FILE, EvaluationRecord, make_record, read_record, write_record

from .cases import make, random_record

NAMES = tuple(field.name for field in dataclasses.fields(EvaluationRecord))


def arrays_of(record: EvaluationRecord) -> dict[str, np.ndarray]:
    return {name: getattr(record, name) for name in NAMES}


def write_arrays(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(folder / RECORD_FILE, **arrays)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "record",
    [
        random_record(0),
        make([(0, 1, [0, 0, 5, 5])], [], images=2),
        make([], [(1, 0, [0, 0, 5, 5], 0.25)], images=2),
        make([], [], images=0, classes=1),
        dataclasses.replace(make([], [], images=2), image_ids=np.array([-7, 2**40])),
        dataclasses.replace(make([], [], images=2), file_names=np.array(["a/ä b.jpg", "深.png"])),
    ],
    ids=["random", "no detections", "no objects", "nothing", "wide ids", "names"],
)
def test_what_was_written_is_read_bit_by_bit(record: EvaluationRecord, tmp_path: Path) -> None:
    write_record(tmp_path, record)
    read = read_record(tmp_path)
    for name, array in arrays_of(record).items():
        again = getattr(read, name)
        assert again.dtype == array.dtype and again.shape == array.shape, name
        assert again.tobytes() == array.tobytes(), name
    assert read.question() == record.question()


def test_make_record_sorts_by_image_id_and_leaves_other_images_out() -> None:
    # Images 9, 7, 5 in the data's order, of which 9 is not evaluated.
    truth = dataclasses.replace(
        make([], [], images=3), image_ids=np.array([9, 7, 5]), sizes=np.array([[10, 9], [8, 7], [6, 5]]),
        file_names=np.array(["nine", "seven", "five"]), truth_images=np.array([1, 2, 1, 0]),
        truth_boxes=np.array([[0, 0, 2, 3], [1, 1, 4, 4], [2, 2, 5, 5], [0, 0, 1, 1]], dtype=float),
        truth_labels=np.array([0, 1, 1, 0]), truth_areas=np.array([3.0, 4, 5, 6]),
        truth_ignored=np.array([True, False, False, False]),
    )  # fmt: skip
    record = make_record(
        truth, np.array([5, 7]), np.array([7, 5, 7]), np.array([[0, 1, 2, 3]] * 3, dtype=np.float32),
        np.array([0.5, 0.25, 0.75], dtype=np.float32), np.array([1, 0, 0]),
    )  # fmt: skip
    assert record.image_ids.tolist() == [5, 7] and record.file_names.tolist() == ["five", "seven"]
    assert record.sizes.tolist() == [[6, 5], [8, 7]]
    assert record.truth_images.tolist() == [0, 1, 1]  # image 7's two stay in their order
    assert record.truth_labels.tolist() == [1, 0, 1] and record.truth_areas.tolist() == [4, 3, 5]
    assert record.truth_boxes.tolist() == [[1, 1, 4, 4], [0, 0, 2, 3], [2, 2, 5, 5]]
    assert record.truth_ignored.tolist() == [False, True, False]
    assert record.found_images.tolist() == [0, 1, 1] and record.found_scores.tolist() == [0.25, 0.5, 0.75]
    assert record.found_labels.tolist() == [0, 1, 0]
    none = np.zeros(0, dtype=int)
    nothing = make_record(truth, none, none, np.zeros((0, 4)), np.zeros(0), none)
    assert len(nothing.image_ids) == len(nothing.truth_images) == len(nothing.sizes) == 0


def test_a_missing_file_is_one_sentence_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{RECORD_FILE} is missing"):
        read_record(tmp_path)


def test_every_truncated_file_is_refused(tmp_path: Path) -> None:
    write_record(tmp_path, random_record(1))
    content = (tmp_path / RECORD_FILE).read_bytes()
    for length in [0, 1, *range(50, len(content), len(content) // 40), len(content) - 1]:
        (tmp_path / RECORD_FILE).write_bytes(content[:length])
        with pytest.raises(DataError, match="cannot be read"):
            read_record(tmp_path)


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


def test_an_object_array_is_never_unpickled(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    trap = np.array([Trap(str(sprung))], dtype=object)
    write_arrays(tmp_path, {**arrays_of(make([], [])), "file_names": trap})
    with np.load(tmp_path / RECORD_FILE, allow_pickle=True) as archive:
        archive["file_names"]
    assert sprung.exists()  # the trap works
    sprung.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        read_record(tmp_path)
    assert not sprung.exists()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("truth_images", lambda a: a[:-1]),
        ("truth_boxes", lambda a: a[:, :3]),
        ("truth_labels", lambda a: np.where(np.arange(len(a)) == 0, 5, a)),  # of 5 classes
        ("found_images", lambda a: a + 12),  # of 12 images
        ("found_images", lambda a: a[::-1]),
        ("image_ids", lambda a: a[::-1]),
        ("found_labels", lambda a: a.astype(float)),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(name: str, change, tmp_path: Path) -> None:
    arrays = arrays_of(random_record(3))
    write_arrays(tmp_path, {**arrays, name: change(arrays[name])})
    with pytest.raises(DataError, match="does not fit together"):
        read_record(tmp_path)


def test_the_question_is_the_truth_and_not_the_answer() -> None:
    record = random_record(4)
    other = random_record(5)
    for name in ("found_images", "found_boxes", "found_scores", "found_labels"):
        assert dataclasses.replace(record, **{name: getattr(other, name)}).question() == record.question(), name
    assert dataclasses.replace(record, file_names=record.file_names[::-1]).question() == record.question()
    changes = {
        "classes": np.array(["class 0", "class 1", "class 2", "class 3", "klass 4"]),
        "category_ids": record.category_ids + 1,
        "image_ids": record.image_ids + 1,
        "sizes": record.sizes + 1,
        "truth_images": np.minimum(record.truth_images + 1, 3),
        "truth_boxes": record.truth_boxes + 1e-9,
        "truth_areas": np.nextafter(record.truth_areas, 0),
        "truth_labels": record.truth_labels[::-1],
        "truth_ignored": ~record.truth_ignored,
    }
    asked = {record.question(), make([], []).question()}
    for name, array in changes.items():
        asked.add(dataclasses.replace(record, **{name: array}).question())
    assert len(asked) == 2 + len(changes)
