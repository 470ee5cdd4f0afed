"""Finding the highest load that is still good enough, with few probes. Pure.

Doubles or halves until one load holds and one does not, then tries the geometric middle until the two are close. Each probe
is one measurement, so the answer is a bracket, not a point.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt

FACTOR = 2.0


@dataclass(frozen=True, slots=True)
class Bracket:
    """`holds` is the highest load that held (0: none did), `fails` the lowest that did not (None: none was found)."""

    holds: float
    fails: float | None


@dataclass(slots=True)
class Search:
    """A search from `start` on. `tolerance` is how far apart the ends may lie, as a ratio; `lowest` is given up below."""

    start: float
    tolerance: float = 1.1
    most_probes: int = 12
    lowest: float = 1e-3
    _held: list[float] = field(default_factory=list)
    _failed: list[float] = field(default_factory=list)

    @property
    def bracket(self) -> Bracket:
        """What is known so far. A load above one that failed does not count as held: it was luck."""
        fails = min(self._failed, default=None)
        below = [rate for rate in self._held if fails is None or rate < fails]
        return Bracket(max(below, default=0.0), fails)

    def next(self) -> float | None:
        """The load to try next; None when the search is over."""
        if len(self._held) + len(self._failed) >= self.most_probes:
            return None
        found = self.bracket
        if found.fails is None:
            return found.holds * FACTOR or self.start
        if found.holds == 0:
            lower = found.fails / FACTOR
            return lower if lower >= self.lowest else None
        if found.fails / found.holds <= self.tolerance:
            return None
        return sqrt(found.holds * found.fails)

    def tell(self, rate: float, *, held: bool) -> None:
        """What came of a probe."""
        (self._held if held else self._failed).append(rate)
