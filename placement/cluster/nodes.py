"""What a head of a cluster works with: its nodes, the books in which their slices are given to replicas, and the store of its journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from placement.cluster.cutting import CutOrder
from placement.cluster.members import NodeOrder, Owner, Seat, Word
from placement.cluster.survey import NodeGpus


@dataclass(frozen=True, slots=True)
class Hold:
    """What came of asking for a slice: `owner` once it is this replica's, else what it waits for."""

    seat: Seat
    owner: Owner | None = None
    waits_for: str = "Ray to give it the slice"


class Nodes(Protocol):
    """The nodes of the cluster, and the books in which their slices are given to replicas."""

    async def names(self) -> Sequence[str]:
        """Every node that has joined and is not known to be gone."""

    async def report(self, node: str, known: str, wait_seconds: float) -> Word:
        """What it is, as soon as that is another than the report with the digest `known`; in `wait_seconds` at the latest, or before
        that, what has not changed. Raises NodeLost.
        """

    async def order(self, node: str, order: NodeOrder) -> None:
        """Tell it what to run; the same order twice is one order. Raises NodeLost."""

    async def belong(self, node: str, order: NodeOrder) -> None:
        """Tell it to which `owners` the engines in these seats belong, and nothing else of the order; a node of an earlier version may
        know nothing of it. Raises NodeLost.
        """

    async def gpus(self, node: str) -> NodeGpus:
        """The GPUs that a plan may count on, read anew. Raises NodeLost."""

    async def cut(self, node: str, order: CutOrder) -> None:
        """Have it cut a GPU; the same order twice is one. Returns when it is done. Raises PartitionError, NodeLost."""

    async def hold(self, seat: Seat) -> Hold:
        """Ask for the slice, or how far that is. Returns without waiting for it."""

    async def let_go(self, replica: str) -> None:
        """Give up the replica's slice, or what was asked for."""

    async def held(self) -> Mapping[str, Seat]:
        """Every slice that is held or asked for, by replica, also from before this head."""


class Store(Protocol):
    """A place for the journal that outlives the head."""

    async def load(self) -> bytes | None:
        """The last journal; None if there is none."""

    async def save(self, journal: bytes) -> None:
        """Replace it, as a whole."""
