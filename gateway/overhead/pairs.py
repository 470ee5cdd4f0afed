"""The plan of a measurement and what follows from it. Pure: randomness and times are arguments.

Requests arrive at random moments whatever became of those before (open loop), so that a slow answer delays nobody and is not
hidden. Every two neighbours in the plan make a pair: one goes to the engine, one through the gateway, in an order drawn
for each pair, so that whatever else the machine does falls on both alike. Intervals are percentile bootstraps over pairs.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

RESAMPLES = 400
LEAST_RESAMPLES = 60
_RESAMPLED = 4_000_000  # samples in all: more of them per pair means fewer resamples
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Timing:
    """One answered request, in seconds. `first` is from its due moment to the first content, `gaps` are between contents."""

    first: float
    whole: float
    gaps: tuple[float, ...] = ()
    gateway_says: float | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """The same request to the engine and through the gateway."""

    direct: Timing
    through: Timing


@dataclass(frozen=True, slots=True)
class Arrival:
    """When a request is due, in seconds from the start, and which way it goes."""

    at: float
    pair: int
    through: bool


@dataclass
class Run:
    """What came of a plan. `lag_seconds` is how late requests were sent: by it one sees whether the client kept up."""

    pairs: list[Pair] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    lag_seconds: list[float] = field(default_factory=list)


def arrivals(pairs: int, rate_per_second: float, generator: random.Random) -> list[Arrival]:
    """A plan for so many pairs: Poisson arrivals of `rate_per_second` requests, both ways together."""
    plan, now = [], 0.0
    for pair in range(pairs):
        first_through = generator.random() < 0.5
        for through in (first_through, not first_through):
            now += generator.expovariate(rate_per_second)
            plan.append(Arrival(now, pair, through))
    return plan


def quantile(ordered: Sequence[float], share: float) -> float:
    """By nearest rank; `ordered` is sorted and not empty."""
    return ordered[max(0, ceil(share * len(ordered)) - 1)]


def _interval(values: list[float]) -> tuple[float, float]:
    values.sort()
    return quantile(values, (1 - CONFIDENCE) / 2), quantile(values, (1 + CONFIDENCE) / 2)


def _figures(values: Sequence[Sequence[float]]) -> dict[str, float]:
    ordered = sorted(value for of_request in values for value in of_request)
    return {"p50": quantile(ordered, 0.5), "p99": quantile(ordered, 0.99)}


def compare(
    pairs: Sequence[Pair], samples: Callable[[Timing], Sequence[float]], generator: random.Random
) -> dict[str, Any]:
    """One latency both ways, in milliseconds: its quantiles, how far apart they are, and the interval of that.

    `added_p50` and `added_p99` are differences of quantiles; `paired_median` is the median of the pairs' own differences (of
    means, where a request has several samples).
    """
    direct = [samples(pair.direct) for pair in pairs]
    through = [samples(pair.through) for pair in pairs]
    differences = sorted(sum(t) / len(t) - sum(d) / len(d) for d, t in zip(direct, through, strict=True) if d and t)
    resampled: dict[str, list[float]] = {"p50": [], "p99": [], "median": []}
    for _ in range(_resamples(sum(map(len, through)))):
        drawn = generator.choices(range(len(pairs)), k=len(pairs))
        ours, theirs = _figures([through[i] for i in drawn]), _figures([direct[i] for i in drawn])
        for name in ("p50", "p99"):
            resampled[name].append(ours[name] - theirs[name])
        resampled["median"].append(quantile(sorted(generator.choices(differences, k=len(differences))), 0.5))
    ours, theirs = _figures(through), _figures(direct)
    added = {
        "added_p50": (ours["p50"] - theirs["p50"], resampled["p50"]),
        "added_p99": (ours["p99"] - theirs["p99"], resampled["p99"]),
        "paired_median": (quantile(differences, 0.5), resampled["median"]),
    }
    return {
        "direct_ms": {name: _ms(value) for name, value in theirs.items()},
        "gateway_ms": {name: _ms(value) for name, value in ours.items()},
    } | {
        f"{name}_ms": {"value": _ms(value), "low": _ms(low), "high": _ms(high)}
        for name, (value, (low, high)) in ((n, (v, _interval(r))) for n, (v, r) in added.items())
    }


def _resamples(samples: int) -> int:
    return max(LEAST_RESAMPLES, min(RESAMPLES, _RESAMPLED // max(1, samples)))


def summarize(pairs: Sequence[Pair], *, stream: bool, generator: random.Random) -> dict[str, Any]:
    """The comparison of everything that pairs of one kind show. `pairs` is not empty."""
    table = {"ttft" if stream else "e2e": compare(pairs, lambda timing: (timing.first,), generator)}
    if stream and all(pair.direct.gaps and pair.through.gaps for pair in pairs):
        table["itl"] = compare(pairs, lambda timing: timing.gaps, generator)
    said = sorted(pair.through.gateway_says for pair in pairs if pair.through.gateway_says is not None)
    own = {"p50": _ms(quantile(said, 0.5)), "p99": _ms(quantile(said, 0.99))} if said else None
    return table | {"pairs": len(pairs), "gateway_says_ms": own}


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 4)
