"""How much of a model's replicas batches may use at this moment: what nobody else wants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Standing:
    """The replicas of one model that a tenant's requests go to: how many requests wait for them, and for each that is ready
    how many sequences it runs at once, and how many it has."""

    waiting: int
    replicas: tuple[tuple[int, int], ...]


class IdleCapacity:
    """Room for batches, from the standing of a model for a tenant. `reserve_ratio` of each replica is left to others."""

    def __init__(self, standing: Callable[[str, str], Standing | None], *, reserve_ratio: float) -> None:
        self._standing = standing
        self._reserve_ratio = reserve_ratio

    def room(self, model: str, tenant: str, own: int) -> int:
        """How many more requests of batches fit into what is idle; 0 while others wait.

        `own` are those of batches that are under way, counted by a replica or on their way to one. Unknown models have room, so that
        a request finds out what is wrong with them.
        """
        if (standing := self._standing(model, tenant)) is None:
            return 1
        if standing.waiting:
            return 0
        usable = [self._usable(seats) for seats, _ in standing.replicas]
        free = sum(max(0, mine - taken) for mine, (_, taken) in zip(usable, standing.replicas, strict=True))
        return min(free, sum(usable) - own)

    def _usable(self, seats: int) -> int:
        return max(1, int(seats * (1 - self._reserve_ratio)))


class Gate:
    """Lets requests of batches through while there is room. `max_concurrent` bounds them all together."""

    def __init__(self, room: Callable[[str, str, int], int], *, max_concurrent: int) -> None:
        self._room = room
        self._max_concurrent = max_concurrent
        self._running: Counter[str] = Counter()

    @property
    def running(self) -> int:
        """Requests inside."""
        return self._running.total()

    def try_enter(self, model: str, tenant: str) -> bool:
        """Take a place if there is one; `leave` gives it back."""
        if self.running >= self._max_concurrent or self._room(model, tenant, self._running[model]) < 1:
            return False
        self._running[model] += 1
        return True

    def leave(self, model: str) -> None:
        """Give a place back."""
        self._running[model] -= 1
        if not self._running[model]:
            del self._running[model]
