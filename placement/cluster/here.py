"""Which node of a cluster a state directory is of, and what of it runs. Knows no Ray: it is asked where none may be installed, too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from placement.cluster.members import Owner
from placement.cluster.node import NodePaths
from placement.cluster.seats import owner_lives
from placement.locks import holder

MEMBER_LOCK = "member.lock"
"""In a node's directory; the process that keeps the node in its cluster has it."""


@dataclass(frozen=True, slots=True)
class LocalNode:
    """A node whose files are in a state directory. `pid` is the `sliceway up` or `sliceway node join` that keeps it in its cluster."""

    name: str
    paths: NodePaths
    pid: int | None

    @property
    def lock(self) -> Path:
        """What `pid` holds."""
        return self.paths.root / MEMBER_LOCK

    @property
    def at_work(self) -> bool:
        """Whether anything of it runs: a controller and a gateway go on where what started them was killed."""
        return self.pid is not None or any(self.process(name) for name in ("controller", "gateway", "raylet"))

    def process(self, name: str) -> Owner | None:
        """The node's `controller`, `gateway` or `raylet` (Ray itself), if it runs."""
        try:
            owner = Owner.model_validate_json(self.record(name).read_bytes())
        except (OSError, ValueError):
            return None
        return owner if owner_lives(owner) else None

    def record(self, name: str) -> Path:
        """Where that process is written down."""
        return self.paths.root / ("raylet.json" if name == "raylet" else f"{name}.pid.json")


def local_nodes(state: Path) -> Iterator[LocalNode]:
    """Every node that the state directory was ever of, by name."""
    for lock in sorted(state.glob(f"nodes/*/{MEMBER_LOCK}")):
        yield LocalNode(lock.parent.name, NodePaths(lock.parent), holder(lock))


def node_at_work(state: Path) -> LocalNode | None:
    """The node that runs from this state directory; of several one that is in a cluster. None where it is of none."""
    found = sorted((node for node in local_nodes(state) if node.at_work), key=lambda node: node.pid is None)
    return found[0] if found else None


def node_of_gateway(state: Path) -> str | None:
    """The name of the node whose gateway works in this directory; None for a gateway that is of no cluster."""
    node = state.parent
    return node.name if NodePaths(node).gateway.root == state and (node / MEMBER_LOCK).exists() else None
