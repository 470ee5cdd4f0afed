"""What one tenant can do to another inside the gateway alone: TTFT and ITL of a victim, alone and beside an aggressor, in turns.

The engine costs next to nothing and is never full, so that only the gateway is measured. A ratio is that of two neighbouring turns,
so that what else a machine does falls on both alike; the median over the rounds is told, and the range.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.bench import BenchError
from gateway.overhead.aggressor import AGGRESSORS
from gateway.overhead.gateways import Running
from gateway.overhead.pairs import Timing, arrivals, quantile
from gateway.overhead.tools import Tools, request, running

RATE_PER_SECOND = 200.0
TOKENS = 20
SETTLE_SECONDS = 1.5


@dataclass(frozen=True, slots=True)
class Keys:
    """Of the victim, of a tenant with a limit (`LIMIT_PER_MINUTE`), and of one without."""

    victim: str
    limited: str
    free: str


def beside_each(
    tools: Tools,
    gateway: Running,
    keys: Keys,
    *,
    rounds: int,
    seconds: float,
    only: Sequence[str] = (),
    told: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """For every kind of aggressor the p99s in milliseconds, alone and beside, and their ratios."""
    generator = random.Random(1)

    def turn(span: float) -> tuple[float, float]:
        return _p99s(_streams(tools, gateway.port, keys.victim, span, generator))

    turn(1.0)
    rows = []
    for kind in only or AGGRESSORS:
        turns = []
        for _ in range(rounds):
            alone = turn(seconds)
            with _aggressor(tools.directory, kind, gateway.port, keys.limited if "limit" in kind else keys.free):
                beside = turn(seconds)
            turns.append((alone, beside))
        rows.append(_row(kind, turns))
        told(f"{kind}: TTFT p99 x {rows[-1]['ttft_ratio']:.2f}, ITL p99 x {rows[-1]['itl_ratio']:.2f}")
    return rows


def _streams(tools: Tools, port: int, key: str, seconds: float, generator: random.Random) -> list[Timing]:
    """The victim's streams for a while, in an open loop. Raises BenchError where one failed."""
    plan = arrivals(max(1, int(seconds * RATE_PER_SECOND / 2)), RATE_PER_SECOND, generator)
    asked = request(port, stream=True, tokens=TOKENS, key=key)
    run = tools.opened((port, port), (asked, asked), plan)
    if run.errors:
        raise BenchError(f"the victim got wrong answers: {dict(run.errors)}")
    return [timing for pair in run.pairs for timing in (pair.direct, pair.through)]


def _p99s(timings: Sequence[Timing]) -> tuple[float, float]:
    """Of TTFT and of ITL, in seconds."""
    gaps = sorted(gap for timing in timings for gap in timing.gaps)
    return quantile(sorted(timing.first for timing in timings), 0.99), quantile(gaps, 0.99)


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


def _row(kind: str, turns: Sequence[tuple[tuple[float, float], tuple[float, float]]]) -> dict[str, Any]:
    row: dict[str, Any] = {"aggressor": kind, "rounds": len(turns)}
    for index, name in enumerate(("ttft", "itl")):
        ratios = sorted(beside[index] / alone[index] for alone, beside in turns)
        row[f"{name}_alone_ms"] = round(statistics.median(alone[index] for alone, _ in turns) * 1000, 3)
        row[f"{name}_beside_ms"] = round(statistics.median(beside[index] for _, beside in turns) * 1000, 3)
        row[f"{name}_ratio"] = round(statistics.median(ratios), 3)
        row[f"{name}_ratio_range"] = [round(ratios[0], 3), round(ratios[-1], 3)]
    return row
