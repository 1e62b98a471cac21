"""Numbers as people read them, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from msil.reporting.tables import amount, duration, percent, setting

NAN = float("nan")


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(0.4204, "42.0"), (0.4206, "42.1"), (0.0, "0.0"), (1.0, "100.0"), (0.0004, "0.0"), (0.99951, "100.0"),
     (0.718, "71.8"), (None, "-"), (NAN, "-")],
)  # fmt: skip
def test_percent(fraction: float | None, text: str) -> None:
    assert percent(fraction) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (99_990, "99.99 k"), (123_456, "123.5 k"), (999_949, "999.9 k"),
     (999_999, "1.00 M"), (32_100_000_000, "32.10 G"), (2_000_000_000_000_000, "2000.0 T"), (None, "-"), (NAN, "-")],
)  # fmt: skip
def test_amount(count: float | None, text: str) -> None:
    assert amount(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.4, "0s"), (45, "45s"), (59.4, "59s"), (59.6, "1m 00s"), (200, "3m 20s"), (3599.4, "59m 59s"),
     (3599.6, "1h 00m"), (3700, "1h 02m"), (86_340, "23h 59m"), (86_390, "1d 00h"), (90_000, "1d 01h"), (None, "-"),
     (NAN, "-")],
)  # fmt: skip
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "true"), (False, "false"), (None, "null"), ([480, 960], "[480,960]"), ((1, None), "[1,null]"), ([], "[]"),
     ("both", "both"), (0.01, "0.01"), (1, "1"), (1e-05, "1e-05")],
)  # fmt: skip
def test_setting(value: Any, text: str) -> None:
    assert setting(value) == text
