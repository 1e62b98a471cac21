"""Numbers as people read them. Standard library alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

MISSING = "-"


def is_missing(value: Any) -> bool:
    """None and NaN: a number that a run did not or could not measure."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def percent(fraction: float | None) -> str:
    """0.4205 -> "42.0" (of 100)."""
    return MISSING if fraction is None or is_missing(fraction) else f"{100 * fraction:.1f}"


def signed(fraction: float | None) -> str:
    """0.012 -> "+1.2" (of 100); what rounds to zero is "0.0", without a sign."""
    if fraction is None or is_missing(fraction):
        return MISSING
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def interval(ends: Sequence[float]) -> str:
    """`+1.2 [-0.3, +2.6]` (of 100), of an estimate and the ends of its interval."""
    estimate, low, high, *_ = map(signed, ends)
    return f"{estimate} [{low}, {high}]"


def spread(value: Sequence[float | None] | None) -> str:
    """`42.0 ± 0.3` (of 100), of a mean and its deviation, or `42.0` without one; nothing of an empty value."""
    if not value:
        return MISSING if value is None else ""
    mean, deviation = value
    return percent(mean) if deviation is None else f"{percent(mean)} ± {percent(deviation)}"


def rate(value: float | None) -> str:
    """Images a second: three significant digits."""
    if value is None or is_missing(value):
        return MISSING
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def amount(count: float | None) -> str:
    """4150000 -> "4.15 M": two decimals below 100, one above; k, M, G, T."""
    if count is None or is_missing(count):
        return MISSING
    size, unit = float(count), ""
    for larger in ("k", "M", "G", "T"):
        if size < 999.95:  # what would round to 1000.0 takes the next unit
            break
        size, unit = size / 1000, larger
    if not unit:
        return f"{size:.0f}"
    return f"{size:.2f} {unit}" if size < 99.995 else f"{size:.1f} {unit}"


def duration(seconds: float | None) -> str:
    """200 -> "3m 20s", 45 -> "45s", 3700 -> "1h 02m", 90000 -> "1d 01h"."""
    if seconds is None or is_missing(seconds):
        return MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d {hours % 24:02d}h"


def setting(value: Any) -> str:
    """A setting as users type it: true, false, null, [480,960], {depth: 2}, both."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return "[" + ",".join(setting(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {setting(item)}" for key, item in value.items()) + "}"
    return str(value)
