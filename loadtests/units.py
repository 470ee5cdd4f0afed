"""Durations and rates as they are written: with their unit, because `0.5` is half a second to one reader and half a minute to another."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_WRITTEN = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-zµ]*)\s*$")


def parse_duration(value: Any) -> float:
    """Seconds, from `300ms`, `1.5s`, `2min`, `1h`. Raises ValueError where there is no number or no unit."""
    match = _WRITTEN.match(str(value)) if not isinstance(value, bool) else None
    if not match:
        raise ValueError(f"{value!r} is no duration || Write it like 300ms or 1.5s.")
    number, unit = float(match[1]), match[2]
    if not unit:
        raise ValueError(f"{value!r} has no unit || Did you mean {match[1]}s or {match[1]}ms?")
    if unit not in _SECONDS:
        raise ValueError(f"{value!r}: {unit!r} is no unit of time || Known: {', '.join(_SECONDS)}.")
    if number <= 0:
        raise ValueError(f"{value!r} is no time at all || Give more than 0.")
    return number * _SECONDS[unit]


def show_duration(seconds: float) -> str:
    """The shortest exact way to write `seconds`; `parse_duration` reads it back."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        text = f"{seconds / factor:.6g}"
        if seconds >= factor and "e" not in text and abs(float(text) * factor - seconds) <= 1e-12 * seconds:
            return text + unit
    return f"{seconds * 1e6:.3f}us"


Duration = Annotated[float, BeforeValidator(parse_duration), PlainSerializer(show_duration, return_type=str)]
"""Seconds inside, written with a unit."""
