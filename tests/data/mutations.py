"""Ways to spoil COCO's json and VOC's xml: each takes the sound content and whole numbers that choose where and how."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from xml.etree.ElementTree import Element

Bytes = Callable[[bytes, int], bytes]

TEXTS = ("", " ", "cat", "dog ", "Zebra", "ü", "\u202e", "\x1b[2J", "3", "1_0", "١", "x" * 5000, "nan", "-inf", "1e999")
NAMES = ("a.jpg", "sub/b.jpg", "../a.jpg", "/etc/passwd", "sub", ".", "a.jpg/", "C:\\a.jpg", "con", "a\nb.jpg")
NUMBERS = (0, -1, 1, 3, 5, 7, 11, 90, 100, 0.5, 3.0, 40.02, -0.01, 1e-300, 1e15, -1e300, 2**63, 10**30, float("nan"),
           float("inf"), -float("inf"))  # fmt: skip
BOXES = ([1, 2, 3, 4], [0, 0, 1e-9, 1e-9], [39.5, 29.5, 10, 10], [-5, -5, 8, 8], [39.99, 0, 5, 5], [1, 2, 3], [[1] * 4])
VALUES = (None, True, False, *NUMBERS, *TEXTS, *NAMES, "\ud800", *BOXES, [], {}, {"id": 3})


# json


def drop(content: Any, where: int, how: int) -> None:
    node, key = _site(content, where)
    del node[key]


def double(content: Any, where: int, how: int) -> None:
    """A list's entry twice; of an object, a value copied to another key, known or not."""
    node, key = _site(content, where)
    value = copy.deepcopy(node[key])
    if isinstance(node, list):
        node.insert(how % (len(node) + 1), value)
    else:
        keys = [*node, "extra"]
        node[keys[how % len(keys)]] = value


def replace(content: Any, where: int, how: int) -> None:
    node, key = _site(content, where)
    node[key] = copy.deepcopy(VALUES[how % len(VALUES)])


def swap(content: Any, where: int, how: int) -> None:
    """The values of two places, preferably of the same key: ids, names, category_ids."""
    node, key = _site(content, where)
    sites = [site for site in _sites(content) if site[1] == key] if how % 3 else _sites(content)
    other, name = sites[how % len(sites)]
    node[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(node[key])


def _sites(content: Any) -> list[tuple[Any, Any]]:
    """Every (container, key or index) at any depth."""
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    return [site for key in keys for site in ((content, key), *_sites(content[key]))]


def _site(content: Any, where: int) -> tuple[Any, Any]:
    sites = _sites(content)
    return sites[where % len(sites)] if sites else ({0: content}, 0)


JSON_CHANGES = (drop, double, replace, replace, replace, swap, swap)


# xml


def xml_drop(tree: Element, where: int, how: int) -> None:
    parent, child = _place(tree, where)
    if child is not None:
        parent.remove(child)


def xml_move(tree: Element, where: int, how: int) -> None:
    """An element a second time, beside itself or inside another that should hold text."""
    parent, child = _place(tree, where)
    if child is not None:
        elements = [parent, *tree.iter()]
        elements[how % len(elements)].append(copy.deepcopy(child))


def xml_replace(tree: Element, where: int, how: int) -> None:
    leaves = [element for element in tree.iter() if not len(element)]
    values = (*TEXTS, *map(str, NUMBERS), "zebra", "\ud800", "\x00", "1,5", "0x10", " 7 ", "+3", "7.", ".5")
    leaves[where % len(leaves)].text = values[how % len(values)]


def xml_swap(tree: Element, where: int, how: int) -> None:
    leaves = [element for element in tree.iter() if not len(element)]
    first = leaves[where % len(leaves)]
    same = [element for element in leaves if element.tag == first.tag] if how % 2 else leaves
    second = same[how % len(same)]
    first.text, second.text = second.text, first.text


def _place(tree: Element, where: int) -> tuple[Element, Element | None]:
    places = [(parent, child) for parent in tree.iter() for child in parent]
    return places[where % len(places)] if places else (tree, None)


XML_CHANGES = (xml_drop, xml_move, xml_replace, xml_replace, xml_replace, xml_swap, xml_swap)


# both, as bytes


def truncate(text: bytes, how: int) -> bytes:
    return text[: how % (len(text) + 1)]


def flip(text: bytes, how: int) -> bytes:
    at = (how // 8) % len(text)
    return text[:at] + bytes([text[at] ^ (1 << how % 8)]) + text[at + 1 :]


def nest(text: bytes, how: int) -> bytes:
    """Lists or elements inside one another, up to 50,000 levels, in the place of some byte."""
    at, levels = (how // 4) % len(text), (10, 300, 2000, 50000)[how % 4]
    opened, closed = (b"<a>", b"</a>") if text.startswith(b"<") else (b"[", b"]")
    return text[:at] + opened * levels + closed * levels + text[at + 1 :]


def key_twice(text: bytes, how: int) -> bytes:
    """Of json, some object's key a second time, with another value."""
    key = (b'"category_id": ', b'"id": ', b'"name": ', b'"bbox": ', b'"image_id": ', b'"file_name": ')[how % 6]
    parts = text.split(key)
    if len(parts) > 1:
        parts[how % (len(parts) - 1)] += key + (b"7", b'"dog"', b"[0, 0, 5, 5]", b"null")[how // 6 % 4] + b", "
    return key.join(parts)
