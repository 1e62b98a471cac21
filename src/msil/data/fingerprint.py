"""Which data a number belongs to: digests of a split's files, cheap enough to compare before anything is read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from msil.data.readers.layouts import located

Fingerprint = dict[str, str]


def fingerprint(data: Mapping[str, Any], splits: Iterable[str]) -> dict[str, Fingerprint]:
    """Of each split SHA-256 digests of "annotations", the content of its annotation files, and of "images", the names
    and sizes in bytes of the files that they list.

    data: a run's settings under "data". Raises DataError where a split's folders or files are missing.
    """
    found = {}
    for split in splits:
        annotations, images = located(data, split).files()
        content, names = hashlib.sha256(), hashlib.sha256()
        for path in annotations:
            content.update(hashlib.sha256(path.read_bytes()).digest())
        for path in images:
            names.update(f"{path.name}\0{path.stat().st_size if path.is_file() else None}\n".encode(errors="replace"))
        found[split] = {"annotations": content.hexdigest(), "images": names.hexdigest()}
    return found


def differing(before: Mapping[str, Fingerprint], now: Mapping[str, Fingerprint]) -> str:
    """`the annotations of val2017, the images of train2017`: what differs in the splits that both name; '' if nothing
    does."""
    return ", ".join(
        f"the {kind} of {split}"
        for split in before.keys() & now.keys()
        for kind, digest in before[split].items()
        if now[split].get(kind) != digest
    )
