"""What nodes and the head tell each other. Values only; they travel as JSON, so that either side may be the newer one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pydantic import BaseModel, ConfigDict, Field

from model_registry.sizing.throughput import Throughput
from placement.autoscale import Signals
from placement.slices import Slice
from placement.status import ClusterScaling
from placement.table import ModelRow, ReplicaRow, RoutingTable, SliceRow


class _Row(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Versions(_Row):
    """What has to be the same on every node: actors are pickled between them. Python counts without its patch level."""

    sliceway: str
    python: str
    ray: str

    def differences(self, other: Versions) -> tuple[str, ...]:
        """What differs, as `name: mine, theirs`."""
        if self == other:
            return ()
        mine, theirs = self.model_dump(), other.model_dump()
        return tuple(f"{name} {mine[name]} here, {theirs[name]} there" for name in mine if mine[name] != theirs[name])


class Seat(_Row):
    """One replica's place: a slice of a node."""

    replica: str
    model: str
    node: str
    slice_id: str

    @property
    def key(self) -> str:
        """The slice's name in the cluster."""
        return slice_key(self.node, self.slice_id)


class NodeReport(_Row):
    """A node as it is at the moment.

    `table` is what its own controller publishes, `running` the slice of every engine that runs there, also of those that nobody
    asked for. `boot` is another one after each start of the agent.
    """

    node: str
    address: str
    versions: Versions
    boot: str
    slices: tuple[Slice, ...] = ()
    table: RoutingTable = RoutingTable(generation=0)
    running: Mapping[str, str] = Field(default_factory=dict)
    waiting: Mapping[str, str] = Field(default_factory=dict, description="Why replicas that it was given do not run.")
    outdated: tuple[str, ...] = Field(default=(), description="Replicas that run by an earlier configuration.")
    notes: tuple[str, ...] = ()
    simulated: bool = False
    generation: int = Field(default=0, description="Of the newest table that its gateways have seen.")
    demand: Mapping[str, Signals] | None = Field(
        default=None, description="What its gateways see of models that follow demand; None where none tells anything."
    )
    cordoned: tuple[str, ...] = Field(default=(), description="Slices that demand gets nothing of.")
    engines: Mapping[str, str] = Field(
        default_factory=dict, description="Which vLLM replicas start, where that is known."
    )
    measured: tuple[Throughput, ...] = Field(default=(), description="What `sliceway bench capacity` has kept there.")
    laid_out: bool = Field(
        default=True,
        description="Whether `fleet.layouts` was tried since the machine joined; until then nothing new comes there.",
    )
    layouts: tuple[str, ...] = Field(default=(), description="What of `fleet.layouts` is not so on its GPUs, and why.")
    layouts_missing: tuple[str, ...] = Field(
        default=(), description="GPUs that it names one by one and that are not here."
    )
    directory: str = Field(default="", description="Where the node keeps what it knows, as `NodePaths` takes it.")
    cutting: tuple[str, ...] = Field(
        default=(),
        description="Slices that it is making or destroying, or is to, by orders that it has: for nobody meanwhile.",
    )
    digest: str = Field(
        default="",
        description="Of what the head waits for; `generation` and how great demand is are not. Empty: of nothing.",
    )


class Word(_Row):
    """A node's answer to who knows a report of it: another one, or None where that is still right, with what changes all the time."""

    report: NodeReport | None = None
    demand: Mapping[str, Signals] | None = Field(default=None, description="As in the report, where there is none.")
    generation: int = Field(default=0, description="Likewise.")


class NodeOrder(_Row):
    """What a node is to run: the configuration, and which of its slices has which replica.

    `owners` are the processes that hold the slices in Ray's books; an engine outlives its owner by `orphan_seconds` at most.
    """

    generation: int
    config: str = Field(description="The whole configuration as JSON.")
    seats: Mapping[str, str] = Field(default_factory=dict, description="Slice ids by replica.")
    owners: Mapping[str, Owner] = Field(default_factory=dict, description="By replica.")
    turns: tuple[str, ...] = Field(default=(), description="Outdated replicas that are to be replaced now.")
    secret: str = Field(default="", repr=False, description="What gateways show engines without a secret of their own.")
    orphan_seconds: float = 600.0


class Owner(_Row):
    """A process on the node; known by its start as well, because pids are given again."""

    pid: int
    start_ticks: int
    boot_id: str


class Broadcast(_Row):
    """What every gateway of the cluster follows: the table of all nodes, the configuration, and the tenants' keys."""

    head: str = Field(description="Which head says so; another one after each start of a head.")
    table: RoutingTable
    files: Mapping[str, str] = Field(
        default_factory=dict,
        repr=False,
        description="Files of the gateways' state directory by name, in base64: tenants' keys.",
    )
    config: str = ""
    sequence: int = 0
    scaling: ClusterScaling = ClusterScaling()
    relays: tuple[str, ...] = Field(default=(), description="Nodes that pass it on; see `relays.relay_for`.")


class TableChange(_Row):
    """What makes the cluster's table of the one before it. Rows come with the name of the row that they follow, `""` for the first."""

    generation: int
    models: tuple[ModelRow, ...] | None = Field(default=None, description="All of them; None: as before.")
    replicas: tuple[tuple[str, ReplicaRow], ...] = ()
    replicas_gone: tuple[str, ...] = ()
    idle: tuple[tuple[str, SliceRow], ...] = ()
    idle_gone: tuple[str, ...] = ()
    digest: str = Field(description="Of the table that this has to make; see `change.digest_of`.")


class BroadcastChange(_Row):
    """A broadcast for who has number `after` of the same head. What is None is as it was there."""

    head: str
    sequence: int
    after: int
    table: TableChange
    files: Mapping[str, str] | None = Field(default=None, repr=False)
    config: str | None = None
    relays: tuple[str, ...] | None = None
    scaling: ClusterScaling | None = None


class News(_Row):
    """A broadcast, as a whole or as what is another: one of the two."""

    whole: Broadcast | None = None
    change: BroadcastChange | None = None


def slice_key(node: str, slice_id: str) -> str:
    """A slice's name in the cluster: `node-a/cpu-0`."""
    return f"{node}/{slice_id}"


def in_cluster(node: str, one: Slice) -> Slice:
    """The slice under its name in the cluster."""
    return replace(one, id=slice_key(node, one.id))


NodeOrder.model_rebuild()
