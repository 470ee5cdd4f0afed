"""To whose life engines are tied: an actor of each replica, or one of each node, as the configuration says. Knows Ray.

A replica's actor is scheduled into the placement group of its slice, so that Ray ends the one with the other. Neither kind is restarted
by Ray: engines know the process that they belong to, and the head tells them of another one. While what the configuration
asks for is being made, engines stay with what is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.placement_group import get_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from placement.cluster.holder import ReplicaActor, SliceHolder
from placement.cluster.members import Owner, Seat
from placement.cluster.offers import node_resource, resource_of
from placement.schema import ActorsOf

log = logging.getLogger(__name__)

NAMESPACE = "sliceway"
HOLDER, REPLICA = "holder|", "replica|"


@dataclass(slots=True)
class _Asked:
    """An actor that was asked who it is. `owner` is known once it has answered."""

    answer: Any
    owner: Owner | None = None


_Target = tuple[str, str]
"""An actor's name, and what it is for: a slice's key, or a node."""


class Owners:
    """The actors that engines belong to. `each` is whose they are to be."""

    def __init__(self) -> None:
        self.each: ActorsOf = "replica"
        self._asked: dict[_Target, _Asked] = {}
        self._alive: frozenset[str] = frozenset()
        self._told: dict[str, Mapping[str, Owner]] = {}
        # once, because Ray keeps each class that it is given
        self._holders, self._replicas = as_remote(SliceHolder), as_remote(ReplicaActor)

    def look(self, names: Collection[str]) -> None:
        """Take `names` for all actors that there are. An answer outlives who gave it, and does not count any more then."""
        self._alive = frozenset(names)
        self._asked = {
            target: asked for target, asked in self._asked.items() if asked.owner is None or target[0] in self._alive
        }

    async def of(self, seat: Seat, booking: str, journal: str) -> Owner | None:
        """The process that the engine in this seat is to belong to; None as long as it has not answered. An actor is made where
        there is none. `booking` is the slice's placement group, `journal` as for `ReplicaActor`.
        """
        own, shared = _targets(seat)
        make = partial(self._make_own, seat, booking, journal), partial(self._make_shared, seat.node)
        wanted, making, other = (own, make[0], shared) if self.each == "replica" else (shared, make[1], own)
        owner = await self._owner(wanted, making)
        if owner is None and other[0] in self._alive:
            owner = await self._owner(other, partial(_there, other[0]))
        return owner

    def told(self, node: str, owners: Mapping[str, Owner] | None) -> None:
        """The node has taken over that its replicas belong to these; None: nobody knows whether it has, or to whom they belong there."""
        self._told[node] = {} if owners is None else dict(owners)

    def waits_for(self, seat: Seat) -> str:
        """What an engine waits for that belongs to nobody yet."""
        if self.each == "replica":
            return f"its actor to start on node {seat.node}"
        return f"the holder of node {seat.node} to start"

    async def end(self, replica: str) -> None:
        """End the replica's actor, before its slice is given back: one that has not started yet would stay in Ray's list for ever,
        with the name.
        """
        name = REPLICA + replica
        mine = [target for target in self._asked if target[0] == name]
        if mine or name in self._alive:
            await asyncio.to_thread(_end, [name])
        for target in mine:
            del self._asked[target]

    def known(self, seats: Mapping[str, Seat]) -> dict[str, tuple[str, Owner]]:
        """The name of the actor that each replica's engine belongs to, and its process, as far as it has answered."""
        found = {}
        for replica, seat in seats.items():
            for target in _targets(seat) if self.each == "replica" else reversed(_targets(seat)):
                asked = self._asked.get(target)
                if asked is not None and asked.owner is not None:
                    found[replica] = target[0], asked.owner
                    break
        return found

    async def end_needless(self, seats: Mapping[str, Seat]) -> None:
        """End the actors that no engine in one of these seats belongs to or is to belong to: what has no seat has no engine, and an
        engine belongs to another one when its node has taken that over, and not when it was chosen.
        """
        needed = self._needed(seats)
        needless = [n for n in self._alive if n.startswith((HOLDER, REPLICA)) and n not in needed]
        if needless:
            await asyncio.to_thread(_end, needless)

    def _needed(self, seats: Mapping[str, Seat]) -> set[str]:
        needed = {name for name in self._alive if self.each == "node" and name.startswith(HOLDER)}
        for seat in seats.values():
            targets = _targets(seat)
            wanted, other = targets if self.each == "replica" else (targets[1], targets[0])
            asked = self._asked.get(wanted)
            theirs = self._told.get(seat.node, {}).get(seat.replica)
            belongs = asked is not None and asked.owner is not None and asked.owner == theirs
            needed |= {wanted[0]} if belongs else {wanted[0], other[0]}
        return needed

    async def _owner(self, target: _Target, ask: Callable[[], _Asked]) -> Owner | None:
        asked = self._asked.get(target)
        try:
            if asked is None:
                asked = self._asked[target] = await asyncio.to_thread(ask)
            if asked.owner is None:
                done, _ = await asyncio.to_thread(ray.wait, [asked.answer], timeout=0)
                if not done:
                    return None
                asked.owner = _owner_in(await asked.answer, target)
        except (
            RayError,
            ValueError,
        ) as error:  # asked again in the next round; the others are not to wait for this one
            log.info("%s: %s", target[0], error)
            self._asked.pop(target, None)
            return None
        return asked.owner

    def _make_own(self, seat: Seat, booking: str, journal: str) -> _Asked:
        """Raises ValueError where the slice is not in Ray's books any more."""
        options = detached(
            self._replicas,
            REPLICA + seat.replica,
            get_if_exists=True,
            max_restarts=0,
            resources={resource_of(seat.key): 1.0},
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                get_placement_group(booking), placement_group_bundle_index=0
            ),
        )
        return _asked(options.remote(seat.model_dump(), journal))

    def _make_shared(self, node: str) -> _Asked:
        options = detached(
            self._holders, HOLDER + node, get_if_exists=True, max_restarts=0, resources={node_resource(node): 1.0}
        )
        return _asked(options.remote())


def _targets(seat: Seat) -> tuple[_Target, _Target]:
    """The replica's own actor, and its node's."""
    return (REPLICA + seat.replica, seat.key), (HOLDER + seat.node, seat.node)


def _asked(actor: ActorHandle[Any]) -> _Asked:
    return _Asked(actor.owner.remote())


def _there(name: str) -> _Asked:
    """Raises ValueError where it is not."""
    return _asked(ray.get_actor(name, namespace=NAMESPACE))


def _owner_in(answer: str, target: _Target) -> Owner:
    """Raises ValueError where the answer is of an actor for another slice, which has the replica's name until it has ended."""
    seat = json.loads(answer).get("seat")
    if seat is not None and Seat.model_validate(seat).key != target[1]:
        raise ValueError(f"still the one of {Seat.model_validate(seat).key}, not of {target[1]}")
    return Owner.model_validate_json(answer)


def _end(names: Iterable[str]) -> None:
    for name in names:
        with contextlib.suppress(ValueError, RayError):  # it has ended already
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))


async def names_of_actors() -> list[str]:
    """Of all of ours, also of those that are still being made."""
    everyone = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
    return [actor["name"] for actor in everyone if actor["namespace"] == NAMESPACE]


def detached(made: Any, name: str, **options: Any) -> Any:
    """What makes a named actor of the class that `as_remote` has made, which outlives whoever makes it and takes nothing but the
    resources it names.
    """
    return made.options(name=name, namespace=NAMESPACE, lifetime="detached", num_cpus=0, num_gpus=0, **options)


def as_remote(cls: type) -> Any:
    """The class as Ray makes actors of it."""
    remote: Any = ray.remote
    return remote(cls)
