"""Core lists as Linux writes them (cpuset(7), "List format"): `0-3,8`."""

from __future__ import annotations

from collections.abc import Iterable


def parse_cores(text: str) -> tuple[int, ...]:
    """Ascending cores of `0-3,8`; empty for an empty text.

    Raises ValueError for anything else, and for a range that runs backwards.
    """
    cores: set[int] = set()
    for part in text.strip().split(","):
        if not part:
            continue
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if high < low:
            raise ValueError(f"{part!r} runs backwards")
        cores.update(range(low, high + 1))
    return tuple(sorted(cores))


def format_cores(cores: Iterable[int]) -> str:
    """The shortest list of ranges for `cores`, the inverse of `parse_cores`."""
    ranges: list[tuple[int, int]] = []
    for core in sorted(set(cores)):
        if ranges and core == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], core)
        else:
            ranges.append((core, core))
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
