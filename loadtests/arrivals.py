"""When requests are due. Open loops say so beforehand, whatever the answers do; a closed loop waits for each answer.

Pure: a generator of random numbers goes in, times come out. One sequence serves any number of processes: each takes every
n-th arrival of the same sequence, so that a run asks the same at the same times however many processes send it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf, sqrt
from pathlib import Path
from random import Random
from typing import Annotated, Literal

from pydantic import Discriminator, Field

from loadtests.traces import Row
from loadtests.yamlfile import Section

PerSecond = Annotated[float, Field(gt=0, le=100_000)]


class Closed(Section):
    """A fixed number of users, each of whom waits for an answer before asking again."""

    kind: Literal["closed"] = "closed"
    users: int = Field(default=1, ge=1, le=100_000)
    think_seconds: float = Field(
        default=0.0, ge=0, le=3600, description="Pause between an answer and the next request."
    )


class _Open(Section):
    max_in_flight: int = Field(
        default=1000,
        ge=1,
        le=100_000,
        description="Further requests wait in the client, and their latency counts the wait.",
    )


class Open(_Open):
    """Requests arrive at random (Poisson) at a rate that does not depend on how fast they are answered."""

    kind: Literal["open", "poisson"] = "poisson"
    requests_per_second: PerSecond


class Constant(_Open):
    """One request every `1 / requests_per_second`."""

    kind: Literal["constant"] = "constant"
    requests_per_second: PerSecond


class Gamma(_Open):
    """Gamma-distributed gaps, as `vllm bench serve --burstiness`: 1 is Poisson, less is burstier, more is more even."""

    kind: Literal["gamma"] = "gamma"
    requests_per_second: PerSecond
    burstiness: float = Field(gt=0, le=1000)


class Bursts(_Open):
    """`size` requests at the same instant; the instants are a Poisson process, so the mean rate is as given."""

    kind: Literal["bursts"] = "bursts"
    requests_per_second: PerSecond
    size: int = Field(ge=2, le=10_000)


class Ramp(_Open):
    """A Poisson process whose rate goes from one value to another in a straight line, and stays there."""

    kind: Literal["ramp"] = "ramp"
    from_per_second: float = Field(ge=0, le=100_000)
    to_per_second: PerSecond
    over_seconds: float = Field(gt=0, le=86_400)


class Trace(_Open):
    """The arrivals and lengths of a recorded trace (`loadtests.traces`), `speed` times as fast."""

    kind: Literal["trace"] = "trace"
    file: Path
    speed: float = Field(default=1.0, gt=0, le=1000)
    repeat: bool = Field(default=False, description="Begin again at the end; else the load ends with the trace.")


Arrival = Annotated[Closed | Open | Constant | Gamma | Bursts | Ramp | Trace, Discriminator("kind")]
OpenArrival = Open | Constant | Gamma | Bursts | Ramp | Trace

Due = tuple[float, Row | None]
"""Seconds since the run began at which a request is due, and the row of the trace that it replays."""


def due_times(arrival: OpenArrival, random: Random, rows: Sequence[Row] = ()) -> Iterator[Due]:
    """When requests are due, without end unless a trace ends. `rows` is the trace, for an arrival of that kind."""
    if isinstance(arrival, Trace):
        yield from _replayed(arrival, rows)
    elif isinstance(arrival, Ramp):
        yield from ((at, None) for at in _ramped(arrival, random))
    else:
        yield from ((at, None) for at in _steady(arrival, random))


def share_of(sequence: Iterator[Due], index: int, of: int) -> Iterator[tuple[int, Due]]:
    """Every `of`-th arrival from `index` on, with its number in the whole sequence."""
    return ((number, due) for number, due in enumerate(sequence) if number % of == index)


def mean_rate(arrival: OpenArrival, until_seconds: float, rows: Sequence[Row] = ()) -> float:
    """Requests per second that are due on average in the first `until_seconds`."""
    if isinstance(arrival, Ramp):
        return _expected(arrival, until_seconds) / until_seconds
    if isinstance(arrival, Trace):
        span = max(rows[-1].at_seconds / arrival.speed, 1e-9)
        whole = len(rows) / span
        inside = sum(row.at_seconds / arrival.speed < until_seconds for row in rows) / until_seconds
        return whole if arrival.repeat and span < until_seconds else inside
    return arrival.requests_per_second


def _steady(arrival: Open | Constant | Gamma | Bursts, random: Random) -> Iterator[float]:
    rate, due = arrival.requests_per_second, 0.0
    while True:
        if isinstance(arrival, Constant):
            due += 1 / rate
        elif isinstance(arrival, Gamma):
            due += random.gammavariate(arrival.burstiness, 1 / (rate * arrival.burstiness))
        else:
            size = arrival.size if isinstance(arrival, Bursts) else 1
            due += random.expovariate(rate / size)
            yield from [due] * (size - 1)
        yield due


def _ramped(arrival: Ramp, random: Random) -> Iterator[float]:
    """Time rescaling: unit-rate arrivals, mapped through the inverse of the expected count."""
    expected = 0.0
    while True:
        expected += random.expovariate(1.0)
        yield _when(arrival, expected)


def _expected(ramp: Ramp, seconds: float) -> float:
    """Requests expected until `seconds`: the integral of the rate."""
    inside = min(seconds, ramp.over_seconds)
    slope = (ramp.to_per_second - ramp.from_per_second) / ramp.over_seconds
    return ramp.from_per_second * inside + slope * inside**2 / 2 + (seconds - inside) * ramp.to_per_second


def _when(ramp: Ramp, expected: float) -> float:
    """The inverse of `_expected`."""
    on_ramp = _expected(ramp, ramp.over_seconds)
    if expected >= on_ramp:
        return ramp.over_seconds + (expected - on_ramp) / ramp.to_per_second
    slope = (ramp.to_per_second - ramp.from_per_second) / ramp.over_seconds
    # The root of slope/2 t^2 + from t - expected, in the form that is stable for a slope near 0 as well.
    root = ramp.from_per_second + sqrt(ramp.from_per_second**2 + 2 * slope * expected)
    return 2 * expected / root if root else inf


def _replayed(arrival: Trace, rows: Sequence[Row]) -> Iterator[Due]:
    span = rows[-1].at_seconds / arrival.speed
    gap = span / max(1, len(rows) - 1) or 1.0
    began = 0.0
    while True:
        yield from ((began + row.at_seconds / arrival.speed, row) for row in rows)
        if not arrival.repeat:
            return
        began += span + gap
