"""Whose turn it is to be replaced by a newer version of itself: a pure rule, for one machine's controller and a cluster's head.

A new configuration, or a new engine, changes how replicas are started. Those that serve go on with what they were started
with, and are replaced one slice at a time: the next one only when the one before serves again. Where a replacement fails, the model's
other replicas stay as they are, so that a configuration that does not start takes one replica and not the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Standing:
    """One replica as far as this matters.

    `outdated` is whether it runs by an earlier configuration, `serves` whether it takes requests (or would, where an operator holds
    it), `failed` whether it was given up.
    """

    replica: str
    model: str
    outdated: bool
    serves: bool
    failed: bool = False

    @property
    def under_way(self) -> bool:
        """Whether it is being started, by the newest configuration."""
        return not (self.outdated or self.serves or self.failed)


def next_turn(standings: Iterable[Standing], in_turn: str | None = None) -> str | None:
    """The replica that may be replaced at the moment; None if none is to be, or none may.

    `in_turn` is the one that this said last: it keeps its turn until it serves, has failed, or is gone. An outdated replica that
    does not serve goes first, since replacing it costs nothing. Equal standings give equal turns, in whatever order they come.
    """
    known = {one.replica: one for one in standings}
    last = known.get(in_turn or "")
    if last is not None and (last.outdated or last.under_way) and last.model not in stopped_models(known.values()):
        return last.replica
    busy = {one.model for one in known.values() if one.under_way} | stopped_models(known.values())
    waiting = [one for one in known.values() if one.outdated and one.model not in busy]
    return (
        min(waiting, key=lambda one: (one.serves, one.model, _ordinal(one.replica), one.replica)).replica
        if waiting
        else None
    )


def stopped_models(standings: Iterable[Standing]) -> frozenset[str]:
    """Models of which a replica of the newest configuration has failed while others run by an earlier one: they stay with that."""
    rows = tuple(standings)
    outdated = {one.model for one in rows if one.outdated}
    return frozenset(one.model for one in rows if one.failed and not one.outdated) & outdated


def _ordinal(replica: str) -> int:
    number = replica.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0
