"""What a node is to be told to run, if it has to be told anything. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from placement.cluster.members import NodeOrder, NodeReport, Owner, Seat


@dataclass(frozen=True, slots=True)
class Orders:
    """Of one round: the seats, the owners of those whose slices are held, whose turn it is to be replaced, and what is for everybody."""

    generation: int
    config: str
    seats: Mapping[str, Seat]
    owners: Mapping[str, Owner]
    turns: Collection[str]
    secret: str = field(repr=False)
    _by_node: dict[str, dict[str, Seat]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        for replica, seat in self.seats.items():
            self._by_node.setdefault(seat.node, {})[replica] = seat

    def to(self, node: str, report: NodeReport, before: NodeOrder | None) -> NodeOrder | None:
        """The order that it has to be given; None where `before`, the last one, says the same but for the generation, or an engine runs
        there in its seat whose holder has only not answered yet: an order without it would end it.
        """
        here = self._by_node.get(node, {})
        if any(r not in self.owners and report.running.get(r) == seat.slice_id for r, seat in here.items()):
            return None
        seats = {replica: seat.slice_id for replica, seat in here.items() if replica in self.owners}
        owners = {replica: self.owners[replica] for replica in seats}
        turns = tuple(replica for replica in self.turns if replica in seats)
        told = (self.config, seats, owners, turns, self.secret)
        if before is not None and told == (before.config, before.seats, before.owners, before.turns, before.secret):
            return None
        return NodeOrder(
            generation=self.generation,
            config=self.config,
            seats=seats,
            owners=owners,
            turns=turns,
            secret=self.secret,
        )
