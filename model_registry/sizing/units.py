"""How sizes are written and divided."""

from __future__ import annotations

GIB = 2**30
MIB = 2**20


def ceil_div(a: int, b: int) -> int:
    """The smallest integer not below a / b."""
    return -(-a // b)


def round_up(value: int, step: int) -> int:
    """The smallest multiple of `step` not below `value`."""
    return ceil_div(value, step) * step


def gib(size_bytes: float) -> str:
    """`1.25 GiB`, `38 MiB` below a tenth of a GiB."""
    return f"{size_bytes / GIB:.2f} GiB" if abs(size_bytes) >= GIB / 10 else f"{size_bytes / MIB:.0f} MiB"
