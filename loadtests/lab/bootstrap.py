"""Confidence intervals of percentiles and of their ratios, by resampling what depends on each other together.

Two stages, as the data came about: rounds are drawn with replacement, the same ones for both settings of a ratio because
they ran side by side; within a round, stretches of consecutive requests are drawn (moving blocks, Kuensch 1989), because a
slow request is seldom alone. A request's gaps between tokens always stay together. Intervals are the 2.5th to the 97.5th
percentile of the replicates (Efron and Tibshirani 1993, ch. 13). With fewer than five rounds they are on the narrow side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loadtests.samples import PERCENTILES, Sample

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Counts = NDArray[np.int64]

REPLICATES = 1000
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Pool:
    """One metric of one setting: values in ascending order, the request that each belongs to, and requests per round.

    `owners` are request numbers, counted through all rounds in the order in which requests were due.
    """

    values: Floats
    owners: Counts
    round_sizes: tuple[int, ...]


def pool_of(rounds: Sequence[Sequence[Sample]], metric: str) -> Pool:
    """The answered requests of each round, as far as they have `metric`."""
    import numpy as np  # here, because importing it sets an environment variable

    values: list[float] = []
    owners: list[int] = []
    sizes = []
    number = 0
    for samples in rounds:
        kept = [s for s in sorted(samples, key=lambda s: s.due_seconds) if s.failure is None and _values(s, metric)]
        for sample in kept:
            found = _values(sample, metric)
            values += found
            owners += [number] * len(found)
            number += 1
        sizes.append(len(kept))
    order = np.argsort(np.asarray(values, dtype=np.float64), kind="stable")
    return Pool(np.asarray(values, dtype=np.float64)[order], np.asarray(owners, dtype=np.int64)[order], tuple(sizes))


@dataclass(frozen=True, slots=True)
class Confidence:
    """95% intervals by percentile name; a percentile that cannot be resampled is not in it."""

    alone: Mapping[str, Interval]
    beside: Mapping[str, Interval]
    ratio: Mapping[str, Interval]
    p99_over_p50: Interval | None


def compare(alone: Pool, beside: Pool, *, seed: int, replicates: int = REPLICATES) -> Confidence:
    """Intervals of both settings' percentiles, of their ratios, and of p99 / p50 beside."""
    import numpy as np

    if not len(alone.values) or not len(beside.values):
        return Confidence({}, {}, {}, None)
    random = np.random.default_rng(seed)
    shares = np.asarray(list(PERCENTILES.values()))
    found = np.empty((2, replicates, len(shares)))
    rounds = max(len(alone.round_sizes), len(beside.round_sizes))
    for replicate in range(replicates):
        drawn = random.integers(0, rounds, rounds)
        found[0, replicate] = _percentiles(alone, _weights(alone, drawn, random), shares)
        found[1, replicate] = _percentiles(beside, _weights(beside, drawn, random), shares)
    first, second = found
    names = list(PERCENTILES)
    p99 = names.index("p99")
    # Gaps of 0 are real: two tokens that came in one read. What is divided by them tells nothing and is left out.
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios, spread = second / first, second[:, p99 : p99 + 1] / second[:, :1]
    return Confidence(
        alone=_intervals(names, first),
        beside=_intervals(names, second),
        ratio=_intervals(names, ratios),
        p99_over_p50=_intervals(["p99"], spread).get("p99"),
    )


def _values(sample: Sample, metric: str) -> list[float]:
    value = getattr(sample, metric)
    if isinstance(value, tuple):
        return list(value)
    return [] if value is None else [value]


def _weights(pool: Pool, rounds: Counts, random: np.random.Generator) -> Counts:
    """How often each request was drawn."""
    import numpy as np

    counts = np.zeros(sum(pool.round_sizes), dtype=np.int64)
    starts = np.concatenate(([0], np.cumsum(pool.round_sizes)))
    for number in rounds:
        size = pool.round_sizes[number] if number < len(pool.round_sizes) else 0
        if not size:
            continue
        length = max(1, round(size ** (1 / 3)))
        first = random.integers(0, size, -(-size // length))
        drawn = ((first[:, None] + np.arange(length)) % size).ravel()[:size]
        counts += np.bincount(drawn + starts[number], minlength=len(counts))
    return counts


def _percentiles(pool: Pool, weights: Counts, shares: Floats) -> Floats:
    """Nearest-rank percentiles of the weighted values, as `samples.percentile` defines them; nan where nothing was drawn."""
    import numpy as np

    cumulative = np.cumsum(weights[pool.owners])
    total = cumulative[-1]
    if not total:
        return np.full(len(shares), np.nan)
    ranks = np.ceil(shares * total - 1e-9)
    found: Floats = pool.values[np.searchsorted(cumulative, ranks)]
    return found


def _intervals(names: Sequence[str], replicates: Floats) -> dict[str, Interval]:
    import numpy as np

    found = {}
    for index, name in enumerate(names):
        column = replicates[:, index]
        column = column[np.isfinite(column)]
        if len(column):
            low, high = np.percentile(column, [2.5, 97.5])
            found[name] = (float(low), float(high))
    return found
