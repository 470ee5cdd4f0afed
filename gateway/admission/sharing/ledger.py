"""How a limit is shared between processes: shares that never add up to more than the limit. Pure.

Every process may use a *share* of a limit and keeps its own sliding window below it. As long as the shares add up to at most the limit at
every moment, so does the use in every window. A process gives back only what its window does not hold, and uses more only
after it was granted. A process that says nothing for the length of its lease is taken for dead: what it last reported goes on
counting until it leaves the window, and the rest of its share, which it may have used just before it died, for a whole window more;
where somebody knows how much it took without a word (`gateway.admission.sharing.taken`), only that.

The state of one limit is plain data, so that every store can keep it as JSON:
`{"h": {process: [share, unmet, [[until, units], ...]]}, "g": [[until, units, process], ...], "b": since}` with times in seconds of the store's clock: what
each process holds and last reported as used, what the dead have used, and since when the limit is known.
`gateway.admission.sharing.redis_store` has the same rules in Lua; a test holds them against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

State = dict[str, Any]
Untold = Callable[[str, str], int | None]
"""Process and limit -> the most that the process took of it since its last report; None where nobody knows."""


class Report(NamedTuple):
    """What a process says of one limit: how much it wants to hold, what it lacks, and what its window holds.

    `used` are pairs (seconds for which it still counts, units). `leaving` gives everything back that is not used.
    """

    name: str
    limit: int
    seconds: float
    want: int
    unmet: int
    used: tuple[tuple[float, int], ...]
    leaving: bool = False


class Grant(NamedTuple):
    """What a process may use of a limit, what the others lack beyond what nobody holds, and what they or the store have left over."""

    share: int
    wanted_by_others: int
    spare: int


def settle(
    state: State | None,
    report: Report,
    process: str,
    leases: Mapping[str, float],
    now: float,
    lease_seconds: float,
    peers: int,
    untold: Untold = lambda process, name: None,
) -> tuple[State, Grant]:
    """The state of a limit after `report` of `process`, and what it is granted.

    `leases` says until when each process is taken to live. A limit that is new to the store may have been known before it lost its memory: for the
    length of a lease a process of `peers` gets no more than its part, so that the others can report first. What it holds already it gives back only
    by wanting less.
    """
    held: dict[str, list[Any]] = dict(state["h"]) if state else {}
    ghosts: list[list[Any]] = [g for g in state["g"] if g[0] > now and g[2] != process] if state else []
    born: float = state["b"] if state else now
    before = held.pop(process, [0])[0]  # it may have used all of this since it wrote the report
    for other in sorted(held):
        until = leases.get(other, 0.0)
        if until <= now:
            ghosts += _left_by(other, held.pop(other), min(until, now), report.seconds, now, untold(other, report.name))
    used = [[now + seconds, units] for seconds, units in report.used]
    floor = sum(units for _, units in used)
    free = max(0, report.limit - sum(h[0] for h in held.values()) - sum(g[1] for g in ghosts))
    ceiling = report.limit // max(1, peers) if now < born + lease_seconds and peers > 1 else report.limit
    share = max(min(report.want, free, max(ceiling, before)), floor)
    if report.leaving:
        ghosts += [[until, units, ""] for until, units in used]
    else:
        held[process] = [share, min(report.unmet, max(0, report.want - share)), used]
    others = [h for name, h in held.items() if name != process]
    left = max(0, free - share)
    lacking = max(0, sum(h[1] for h in others) - left)  # of what is left they take by themselves
    spare = left + sum(max(0, h[0] - sum(u for t, u in h[2] if t > now)) for h in others)
    return {"h": held, "g": ghosts, "b": born}, Grant(share, lacking, spare)


def _left_by(
    process: str, held: list[Any], until: float, seconds: float, now: float, untold: int | None
) -> list[list[Any]]:
    """What the death of `process` leaves behind: what it reported, and what it may have used since, up to its share."""
    share, _, used = held
    ghosts = [[t, units, process] for t, units in used if t > now]
    unknown = share - sum(units for t, units in used if t > until)
    if untold is not None:
        unknown = min(unknown, untold)
    if unknown > 0 and until + seconds > now:
        ghosts.append([until + seconds, unknown, process])
    return ghosts
