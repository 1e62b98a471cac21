"""Ways to spoil COCO's json and VOC's xml: each takes the sound content and whole numbers that choose where and how."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

Bytes = Callable[[bytes, int], bytes]

NAMES = ("a.jpg", "sub/b.jpg", "../a.jpg", "/etc/passwd", "sub", ".", "a.jpg/", "C:\\a.jpg", "con", "a\nb.jpg")
TEXTS = ("", " ", "cat", "dog ", "Zebra", "ü", "\u202e", "\x1b[2J", "3", "1_0", "١", "x" * 5000, "nan", "-inf", "1e999")
NUMBERS = (0, -1, 1, 3, 5, 7, 11, 90, 100, 0.5, 3.0, 40.02, -0.01, 1e-300, 1e15, -1e300, 2**63, 10**30, float("nan"),
           float("inf"), -float("inf"))  # fmt: skip
BOXES = ([1, 2, 3, 4], [0, 0, 1e-9, 1e-9], [39.5, 29.5, 10, 10], [-5, -5, 8, 8], [39.99, 0, 5, 5], [1, 2, 3], [[1] * 4])
VALUES = (None, True, False, *NUMBERS, *TEXTS, *NAMES, "\ud800", *BOXES, [], {}, {"id": 3})
NESTED = "@nested@"  # takes the place of lists too deep for json.dumps


# json


def json_text(content: Any, depth: int) -> bytes:
    return json.dumps(content).replace(f'"{NESTED}"', "[" * depth + "]" * depth).encode()


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


def retype(content: Any, where: int, how: int) -> None:
    node, key = _site(content, where)
    value = node[key]
    kinds = (str(value), [value], {"value": value}, bool(value), NESTED, repr(value).encode().hex())
    node[key] = float(value) if isinstance(value, int) and how % 7 == 6 else kinds[how % 6]


def scale(content: Any, where: int, how: int) -> None:
    sites = [(node, key) for node, key in _sites(content) if type(node[key]) in (int, float)]
    if sites:
        node, key = sites[where % len(sites)]
        node[key] *= (-1, 0.1, 10, 1e9, -1e18)[how % 5]


def swap(content: Any, where: int, how: int) -> None:
    """The values of two places, preferably of the same key: ids, names, category_ids."""
    node, key = _site(content, where)
    sites = [site for site in _sites(content) if site[1] == key] if how % 3 else _sites(content)
    other, name = sites[how % len(sites)]
    if how % 5 == 0:
        other, name = node, list(node)[how % len(node)] if isinstance(node, dict) else how % len(node)
    first, second = copy.deepcopy(node[key]), copy.deepcopy(other[name])
    node[key], other[name] = second, first


def _sites(content: Any) -> list[tuple[Any, Any]]:
    """Every (container, key or index) at any depth."""
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    return [site for key in keys for site in ((content, key), *_sites(content[key]))]


def _site(content: Any, where: int) -> tuple[Any, Any]:
    sites = _sites(content)
    return sites[where % len(sites)] if sites else ({0: content}, 0)


JSON_CHANGES = (drop, double, replace, replace, replace, retype, scale, swap, swap)


def key_twice(text: bytes, how: int) -> bytes:
    """Some object's key a second time, with another value."""
    keys = (b'"category_id": ', b'"id": ', b'"name": ', b'"bbox": ', b'"image_id": ', b'"file_name": ')
    key = keys[how % len(keys)]
    values = (b"7", b'"dog"', b"[0, 0, 5, 5]", b"5", b"null")
    at = [i for i in range(len(text)) if text.startswith(key, i)]
    if not at:
        return text
    place = at[(how // 7) % len(at)]
    return text[:place] + key + values[(how // 3) % len(values)] + b", " + text[place:]


# xml


def xml_text(tree: Element) -> bytes:
    return ElementTree.tostring(tree, encoding="unicode").encode("utf-8", "surrogatepass")


def xml_drop(tree: Element, where: int, how: int) -> None:
    parent, child = _place(tree, where)
    if child is not None:
        parent.remove(child)


def xml_double(tree: Element, where: int, how: int) -> None:
    parent, child = _place(tree, where)
    if child is not None:
        new = copy.deepcopy(child)
        if how % 2 and new.text:
            new.text = TEXTS[how % len(TEXTS)]
        parent.insert(how % (len(parent) + 1), new)


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


def xml_retag(tree: Element, where: int, how: int) -> None:
    _, child = _place(tree, where)
    tags = ("object", "name", "bndbox", "xmin", "xmax", "size", "difficult", "{urn:x}name", "Object", "part")
    (tree if child is None else child).tag = tags[how % len(tags)]


def xml_nest(tree: Element, where: int, how: int) -> None:
    """An element inside another that should hold text or its like, perhaps many levels deep."""
    elements = list(tree.iter())
    node = elements[where % len(elements)]
    moved = copy.deepcopy(elements[how % len(elements)])
    for _ in range((0, 0, 1, 10, 30)[how % 5]):  # copy.deepcopy, of several changes, takes no more
        node.append(Element("deep"))
        node = node[-1]
    node.append(moved)


def _place(tree: Element, where: int) -> tuple[Element, Element | None]:
    places = [(parent, child) for parent in tree.iter() for child in parent]
    return places[where % len(places)] if places else (tree, None)


XML_CHANGES = (xml_drop, xml_double, xml_replace, xml_replace, xml_replace, xml_swap, xml_swap, xml_retag, xml_nest)


def deep(text: bytes, how: int) -> bytes:
    """Elements inside one another, up to 50,000 levels, somewhere between two others."""
    at = [match.end() for match in re.finditer(rb"</\w+>", text)] or [0]
    place, levels = at[(how // 4) % len(at)], (10, 300, 2000, 50000)[how % 4]
    return text[:place] + b"<a>" * levels + b"cat" + b"</a>" * levels + text[place:]


# both, as bytes


def truncate(text: bytes, how: int) -> bytes:
    return text[: how % (len(text) + 1)]


def flip(text: bytes, how: int) -> bytes:
    if not text:
        return text
    at = (how // 8) % len(text)
    return text[:at] + bytes([text[at] ^ (1 << how % 8)]) + text[at + 1 :]


def insert(text: bytes, how: int) -> bytes:
    pieces = (b"\x00", b"\xff", b"\xc3", b",", b"}", b"]", b"-", b"9", b"e", b'"', b"\\", b"<", b"&", b"/>")
    at = how % (len(text) + 1)
    return text[:at] + pieces[(how // 11) % len(pieces)] + text[at:]
