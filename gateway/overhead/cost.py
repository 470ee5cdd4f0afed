"""CPU time per request and per relayed event, of several gateways in turns.

Contestants are measured one at a time while the others idle, in another order every round, and compared within each round:
on a shared machine a microsecond of one minute is not that of the next. Only the CPU time of a gateway's own processes counts, so that
engine and client do not matter.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.bench import BenchError
from gateway.overhead.gateways import OURS, Running
from gateway.overhead.pairs import quantile
from gateway.overhead.tools import Tools, request

CONNECTIONS = 64
STREAMS = 400
STREAM_TOKENS = 100
PLAIN_TOKENS = 16
LONGER = {"litellm": 4.0}  # so many times as long as others, since it answers that much less
FEWER = {"litellm": 8}  # connections that it can carry


@dataclass
class Samples:
    """Seconds of CPU per request and per event, one of each per round."""

    name: str
    request_seconds: list[float] = field(default_factory=list)
    event_seconds: list[float] = field(default_factory=list)
    errors: int = 0


def take_turns(
    tools: Tools,
    contestants: Sequence[Running],
    *,
    rounds: int,
    seconds: float,
    told: Callable[[str], None] = lambda line: None,
) -> list[Samples]:
    """Measure all of them, `rounds` times; the round before the first only warms up. Who answers nothing in a round is left out."""
    generator = random.Random(1)
    samples = {running.name: Samples(running.name) for running in contestants}
    for number in range(rounds + 1):
        racing = [running for running in contestants if running.name in samples]
        for one in generator.sample(racing, len(racing)):
            span = seconds * LONGER.get(one.name, 1.0)
            plain, event = (_cost(tools, one, stream=stream, seconds=span) for stream in (False, True))
            if plain is None or event is None:
                told(f"{one.name} is left out, it answered no request in {span:g} s")
                del samples[one.name]
            elif number:
                mine = samples[one.name]
                mine.request_seconds.append(plain[0])
                mine.event_seconds.append(event[0])
                mine.errors += plain[1] + event[1]
                told(
                    f"round {number} of {rounds}: {one.name:14} {plain[0] * 1e6:9.1f} us/request {event[0] * 1e6:8.2f} us/event"
                )
    if OURS not in samples:
        raise BenchError("this gateway answered no request", remedy="See what its log says.")
    return list(samples.values())


def _cost(tools: Tools, one: Running, *, stream: bool, seconds: float) -> tuple[float, int] | None:
    """CPU seconds per request, or per event of a stream; and how many requests failed. None where there was no answer."""
    tokens = STREAM_TOKENS if stream else PLAIN_TOKENS
    asked = request(one.port, stream=stream, tokens=tokens, key=one.key)
    connections = FEWER.get(one.name, STREAMS if stream else CONNECTIONS)
    before = one.cpu_seconds()
    done = tools.closed(one.port, asked, connections=connections, seconds=seconds)
    spent = one.cpu_seconds() - before
    count = done.events if stream else done.requests
    return (spent / count, done.errors) if count else None


def compared(samples: Sequence[Samples]) -> list[dict[str, Any]]:
    """For each its medians, and how much it takes relative to this gateway: the median of the rounds' own ratios, and their range."""
    ours = next(one for one in samples if one.name == OURS)
    return [
        {
            "name": one.name,
            "errors": one.errors,
            **dict(_row("request", one.request_seconds, ours.request_seconds)),
            **dict(_row("event", one.event_seconds, ours.event_seconds)),
        }
        for one in samples
    ]


def _row(what: str, theirs: Sequence[float], ours: Sequence[float]) -> Iterator[tuple[str, float]]:
    ratios = sorted(their / our for their, our in zip(theirs, ours, strict=True))
    yield f"{what}_us", round(statistics.median(theirs) * 1e6, 2)
    yield f"{what}_ratio", round(statistics.median(ratios), 3)
    yield f"{what}_ratio_low", round(quantile(ratios, 0.1), 3)
    yield f"{what}_ratio_high", round(quantile(ratios, 0.9), 3)
