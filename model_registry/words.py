"""Counts in sentences: `1 slice is`, `2 slices are`."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str = "") -> str:
    """`1 tenant`, `0 tenants`, `12,000 tenants`; `plural` where an s does not make it: `counted(2, "entry", "entries")`."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def are(count: int) -> str:
    """The verb of so many: `is` for one, else `are`."""
    return "is" if count == 1 else "are"
