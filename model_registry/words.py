"""Words in sentences: counts (`1 slice is`, `2 slices are`), and sentences that follow one another."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str = "") -> str:
    """`1 tenant`, `0 tenants`, `12,000 tenants`; `plural` where an s does not make it: `counted(2, "entry", "entries")`."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def sentences(*parts: str | None) -> str:
    """Those that say something, one after another on a line; a full stop between two that need one."""
    said = [" ".join(part.split()) for part in parts if part and not part.isspace()]
    return " ".join([one if one[-1] in ".!?:;" else f"{one}." for one in said[:-1]] + said[-1:])


def are(count: int) -> str:
    """The verb of so many: `is` for one, else `are`."""
    return "is" if count == 1 else "are"
