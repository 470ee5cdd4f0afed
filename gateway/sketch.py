"""The sketch that latencies are kept in: how many samples fell into each bin, the bins growing by a constant factor.

It is DDSketch (Masson, Rim, Lee: "DDSketch: A Fast and Fully-Mergeable Quantile Sketch with Relative-Error Guarantees", VLDB 2019,
section 2.1): bin i holds (gamma**(i-1), gamma**i], gamma = (1 + a) / (1 - a), and answers with a value that is within a of everything in it. Two
sketches are merged by adding their bins.

A gateway keeps thousands of these for hours. Nothing in one is known to the garbage collector, which would otherwise go through all of
them while every tenant waits.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from math import ceil, log

from msgspec import Struct, field

RELATIVE_ERROR = 0.01

_GAMMA = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_PER_LOG = 1 / log(_GAMMA)
_MIDDLE = 2 / (1 + _GAMMA)
_LEAST_BIN = ceil(log(1e-9) * _PER_LOG)  # a clock that did not move between two samples


def bins_of(seconds: Iterable[float]) -> list[int]:
    """The bin of each sample. What is not above zero counts as a nanosecond."""
    return [ceil(log(v) * _PER_LOG) if v > 0 else _LEAST_BIN for v in seconds]


def _no_bins() -> array[int]:
    return array("I")


class Sketch(Struct, gc=False):
    """See the module. `count` is how many samples are in it, in each bin at most 2**32 - 1."""

    count: int = 0
    _low: int = 0  # the bin of the first entry
    _counts: array[int] = field(default_factory=_no_bins)

    def add(self, counts: Mapping[int, int]) -> None:
        """Take in so many samples of each bin."""
        if not counts:
            return
        self._reach(min(counts), max(counts))
        mine, low = self._counts, self._low
        for number, count in counts.items():
            mine[number - low] += count
            self.count += count

    def merge(self, other: Sketch) -> None:
        """Take in the samples of `other`, which stays as it is."""
        theirs = other._counts
        if not theirs:
            return
        if not self._counts:
            self.count, self._low, self._counts = other.count, other._low, theirs[:]
            return
        self._reach(other._low, other._low + len(theirs) - 1)
        mine = self._counts
        for at, count in enumerate(theirs, other._low - self._low):
            if count:
                mine[at] += count
        self.count += other.count

    def nearest_rank(self, share: float) -> float | None:
        """The smallest sample that at least the share (of 0 to 1) of all samples does not exceed, within RELATIVE_ERROR; None without samples.

        The p99 of two samples is the larger one.
        """
        missing = max(1, ceil(share * self.count))
        for number, count in enumerate(self._counts, self._low):
            missing -= count
            if missing <= 0:
                return float(_GAMMA**number * _MIDDLE)
        return None

    def _reach(self, low: int, high: int) -> None:
        """Have entries for all bins from `low` to `high`."""
        counts = self._counts
        if not counts:
            self._low, self._counts = low, array("I", [0]) * (high - low + 1)
            return
        if low < self._low:
            self._counts = counts = array("I", [0]) * (self._low - low) + counts
            self._low = low
        if (more := high - self._low - len(counts) + 1) > 0:
            counts.extend(array("I", [0]) * more)


def merged(sketches: Iterable[Sketch]) -> Sketch:
    """One sketch of all samples; nothing is lost by merging."""
    whole = Sketch()
    for sketch in sketches:
        whole.merge(sketch)
    return whole
