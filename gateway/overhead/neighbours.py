"""What one tenant can do to another inside the gateway alone: TTFT and ITL of a victim, alone and beside an aggressor, in turns.

The engine costs next to nothing and is never full, so that only the gateway is measured. Beside every turn through the gateway stands
a control: the victim asks its engine directly, alone and beside the same storm against an engine of the storm's own. As many processes
share the machine as before, but no server: what is slower there is what the machine's cores do, and only what is beyond it is the
gateway's. A ratio is that of two neighbouring turns, so that what else a machine does falls on both alike.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any, NamedTuple

from gateway.bench import BenchError
from gateway.overhead.aggressor import AGGRESSORS
from gateway.overhead.pairs import CONFIDENCE, Timing, arrivals, quantile
from gateway.overhead.tools import Tools, request, running

RATE_PER_SECOND = 200.0
TOKENS = 20
SETTLE_SECONDS = 1.5

_LINE = (
    "{aggressor}: TTFT p99 x {ttft_ratio:.2f} (control {ttft_direct_ratio:.2f}), "
    "ITL p99 x {itl_ratio:.2f} (control {itl_direct_ratio:.2f})"
)


@dataclass(frozen=True, slots=True)
class Keys:
    """Of the victim, of a tenant with a limit (`LIMIT_PER_MINUTE`), and of one without."""

    victim: str
    limited: str
    free: str


@dataclass(frozen=True, slots=True)
class Ports:
    """Where everybody sends: to the gateway, to the victim's engine behind it, and to another engine that the storms of the control have."""

    gateway: int
    engine: int
    other_engine: int


class P99s(NamedTuple):
    """Of one turn, in seconds."""

    ttft: float
    itl: float


class Round(NamedTuple):
    """One round: alone and beside the aggressor, through the gateway and in the control."""

    alone: P99s
    beside: P99s
    direct_alone: P99s
    direct_beside: P99s


def beside_each(
    tools: Tools,
    ports: Ports,
    keys: Keys,
    *,
    rounds: int,
    seconds: float,
    only: Sequence[str] = (),
    told: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """A `row` for every kind of aggressor. `seconds` is how long a turn lasts, of which a round has four."""
    generator = random.Random(1)

    def pair(kind: str, victim: int, target: int) -> tuple[P99s, P99s]:
        alone = _p99s(_streams(tools, victim, keys.victim, seconds, generator))
        with _aggressor(tools.directory, kind, target, keys.limited if "limit" in kind else keys.free):
            return alone, _p99s(_streams(tools, victim, keys.victim, seconds, generator))

    for port in (ports.gateway, ports.engine):
        _streams(tools, port, keys.victim, 1.0, generator)
    rows = []
    for kind in only or AGGRESSORS:
        taken = []
        for _ in range(rounds):
            ways = {"gateway": (ports.gateway, ports.gateway), "direct": (ports.engine, ports.other_engine)}
            pairs = {name: pair(kind, *ways[name]) for name in generator.sample(list(ways), 2)}
            taken.append(Round(*pairs["gateway"], *pairs["direct"]))
        rows.append(row(kind, taken))
        told(_LINE.format(**rows[-1]))
    return rows


def _streams(tools: Tools, port: int, key: str, seconds: float, generator: random.Random) -> list[Timing]:
    """The victim's streams for a while, in an open loop. Raises BenchError where one failed."""
    plan = arrivals(max(1, int(seconds * RATE_PER_SECOND / 2)), RATE_PER_SECOND, generator)
    asked = request(port, stream=True, tokens=TOKENS, key=key)
    run = tools.opened((port, port), (asked, asked), plan)
    if run.errors:
        raise BenchError(f"the victim got wrong answers: {dict(run.errors)}")
    return [timing for pair in run.pairs for timing in (pair.direct, pair.through)]


def _p99s(timings: Sequence[Timing]) -> P99s:
    gaps = sorted(gap for timing in timings for gap in timing.gaps)
    return P99s(quantile(sorted(timing.first for timing in timings), 0.99), quantile(gaps, 0.99))


@contextlib.contextmanager
def _aggressor(directory: Path, kind: str, port: int, key: str) -> Iterator[None]:
    command = (sys.executable, "-m", "gateway.overhead.aggressor", kind, str(port), key)
    with running(command, directory / "aggressor.log") as process:
        time.sleep(SETTLE_SECONDS)
        if process.poll() is not None:
            raise BenchError(
                f"the aggressor ended: {(directory / 'aggressor.log').read_text(encoding='utf-8', errors='replace')[-300:]}"
            )
        yield


def row(kind: str, rounds: Sequence[Round]) -> dict[str, Any]:
    """What `rounds` beside an aggressor come to: for `ttft` and `itl` the p99s in milliseconds, and ratios of them.

    `_ratio` is beside over alone through the gateway, `_direct_ratio` the same in the control, and `_over_direct` the first divided by the
    second, round by round: what the gateway adds to what the machine does. Each is the median over the rounds, with its range and, as
    `_low` and `_high`, the interval of `median_interval`, which are None where the rounds are too few for it.
    """
    figures: dict[str, Any] = {"aggressor": kind, "rounds": len(rounds), "confidence": CONFIDENCE}
    for index, name in enumerate(P99s._fields):
        for turn in Round._fields:
            milliseconds = statistics.median(getattr(taken, turn)[index] for taken in rounds) * 1000
            figures[f"{name}_{turn}_ms"] = round(milliseconds, 3)
        ratios = [taken.beside[index] / taken.alone[index] for taken in rounds]
        direct = [taken.direct_beside[index] / taken.direct_alone[index] for taken in rounds]
        over = [through / control for through, control in zip(ratios, direct, strict=True)]
        for what, values in (("ratio", ratios), ("direct_ratio", direct), ("over_direct", over)):
            figures |= {f"{name}_{what}{of}": value for of, value in _spread(values).items()}
    return figures


def _spread(values: Sequence[float]) -> dict[str, Any]:
    low, high = median_interval(values) or (None, None)
    return {
        "": round(statistics.median(values), 3),
        "_range": [round(min(values), 3), round(max(values), 3)],
        "_low": None if low is None else round(low, 3),
        "_high": None if high is None else round(high, 3),
    }


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """An interval that holds the median of what `values` are drawn from with a probability of at least CONFIDENCE; None for fewer than six.

    It goes from the k-th smallest value to the k-th largest and assumes nothing of the distribution: the true median is outside only if
    fewer than k of n values fall to one side of it, and each does so with a probability of one half (the sign test's interval).
    """
    ordered, count = sorted(values), len(values)
    outside, best = 0.0, None
    for k in range(1, count // 2 + 1):
        outside += 2 * comb(count, k - 1) / 2**count
        if outside > 1 - CONFIDENCE:
            break
        best = ordered[k - 1], ordered[count - k]
    return best
