"""Which of a controller's replicas run by an earlier configuration, and which of them is to be replaced now (`placement.rolling`)."""

from __future__ import annotations

from collections.abc import Container, Mapping

from placement.goals import Goals
from placement.replicas.replica import Replica
from placement.rolling import Standing, next_turn, stopped_models
from placement.table import ReplicaState


class Turns:
    """Looks at the controller's own `replicas`, and at the names of those that are being ended (`leaving`)."""

    def __init__(self, replicas: Mapping[str, Replica], leaving: Container[str]) -> None:
        self._replicas = replicas
        self._leaving = leaving
        self._in_turn: str | None = None

    def now(self, goals: Goals) -> tuple[str, ...]:
        """The replicas to be ended and started anew at this moment."""
        outdated = self.outdated(goals)
        if goals.config.turns is not None:
            return tuple(name for name in goals.config.turns if name in outdated)
        self._in_turn = next_turn(self._standings(goals), self._in_turn)
        return (self._in_turn,) if self._in_turn in outdated else ()

    def outdated(self, goals: Goals) -> frozenset[str]:
        """Replicas that run by another specification than they would be started with."""
        return frozenset(
            name
            for name, replica in self._here().items()
            if (goal := goals.replicas.get(name)) is not None and goal.spec_hash not in (None, replica.running_hash)
        )

    def notes(self, goals: Goals) -> tuple[str, ...]:
        """What starts beside what it is to replace, and models that stay with an earlier configuration, for people."""
        stopped = sorted(stopped_models(self._standings(goals)))
        beside = {n: g.in_place_of for n, g in goals.replicas.items() if g.in_place_of and g.model not in stopped}
        return (
            *(f"{name} starts beside {other}, to take its place" for name, other in sorted(beside.items())),
            *(f"{m}: a replica of the newest configuration failed; the others go on by the last" for m in stopped),
        )

    def _here(self) -> dict[str, Replica]:
        return {name: replica for name, replica in self._replicas.items() if name not in self._leaving}

    def _standings(self, goals: Goals) -> list[Standing]:
        here, outdated = self._here(), self.outdated(goals)
        return [
            Standing(
                name,
                goal.model,
                outdated=name in outdated,
                serves=name in here and here[name].serves,
                failed=name in here and here[name].view.state is ReplicaState.FAILED,
            )
            for name, goal in goals.replicas.items()
        ]
