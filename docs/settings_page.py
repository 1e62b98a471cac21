"""Writes docs/settings.md from msil.config: python docs/settings_page.py"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

from msil.config import every_setting

HEAD = """# Settings

Every setting with its default before a choice of a group changes it (`conf/`), the limits of a single number, and its
meaning. Written by `python docs/settings_page.py`. Change one by its full name, as in `schedule.lr=0.002`; `--cfg job`
after any command prints them all. A head's and a backbone's own settings stand in `conf/model/head/` and
`conf/model/backbone/`.

"""


def page() -> str:
    rows = ["| setting | default | limits | meaning |", "|---|---|---|---|"]
    for path, hint, own in every_setting():
        if own.metadata:
            default = own.default_factory() if callable(own.default_factory) else own.default
            rows.append(
                f"| `{path}` | `{_text(default)}` | {_limits(hint, own.metadata)} | {own.metadata['meaning']} |"
            )
    return HEAD + "\n".join(rows) + "\n"


def _text(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case Enum():
            return str(value.value)
        case _:
            return str(value)


def _limits(hint: Any, limits: Any) -> str:
    if limits["choices"]:
        return ", ".join(f"`{choice}`" for choice in limits["choices"])
    if isinstance(hint, type) and issubclass(hint, Enum):
        return ", ".join(f"`{member.value}`" for member in hint)
    if limits["above"] is not None:
        return f"> {limits['above']}" + ("" if limits["below"] is None else f", < {limits['below']}")
    if limits["low"] is None:
        return ""
    return f"≥ {limits['low']}" if limits["high"] is None else f"{limits['low']} to {limits['high']}"


if __name__ == "__main__":
    (Path(__file__).parent / "settings.md").write_text(page(), encoding="utf-8")
