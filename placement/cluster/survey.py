"""What a plan for a cluster starts from: every node's GPUs as their drivers show them, and who has which slice. Values and pure functions.

Nodes are asked for it where a plan is made or carried out, and not with every report: what a driver shows of eight GPUs is 25 kB.
GPUs are called `NODE/UUID` here, so that a slice has the name that it has everywhere in a cluster (`members.slice_key`), and
simulated machines, which have cards of equal UUIDs, have different ones.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import ceil

from pydantic import BaseModel, ConfigDict, Field

from model_registry.catalogue import load_catalogue
from model_registry.schema import ModelConfig
from placement.assign import stem_of
from placement.cluster.members import Seat, slice_key
from placement.gpus import GpuState
from placement.partition.plan import GpuPlan
from placement.partition.plan import plan as plan_layouts
from placement.partition.rules import LayoutRule
from placement.partition.select import GpuSelection, selected
from placement.planner.types import FleetGpu
from placement.policy import PlanningConfig
from placement.schema import FleetConfig
from placement.slices import Inventory, SliceKind
from placement.workload.fleet import Occupancy, Running, observed_fleet, only


class _Row(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class NodeGpus(_Row):
    """The GPUs of one node that a plan may count on, read anew. `cordoned` are UUIDs."""

    gpus: tuple[GpuState, ...] = ()
    cordoned: tuple[str, ...] = ()


class SurveyedNode(_Row):
    """A node's GPUs; nothing changes on one that is `frozen`, because it runs another version."""

    node: str
    gpus: tuple[GpuState, ...] = ()
    cordoned: tuple[str, ...] = ()
    frozen: bool = False


class ReplicaNow(_Row):
    """A replica that has a seat: where, and what the cluster's table says of it."""

    seat: Seat
    state: str


class Survey(_Row):
    """A cluster as plans see it. `config` is what its head works by; `reserved` are notes by slice, as `NODE/SLICE`.

    `numbers` are how many replicas demand asks for at the moment, by pool; `arrivals` are requests per second, of pools whose number
    follows demand, and `short` how many replicas of these have no slice.
    """

    nodes: tuple[SurveyedNode, ...] = ()
    replicas: Mapping[str, ReplicaNow] = Field(default_factory=dict)
    unplaced: Mapping[str, str] = Field(default_factory=dict)
    reserved: Mapping[str, str] = Field(default_factory=dict)
    numbers: Mapping[str, int] = Field(default_factory=dict)
    arrivals: Mapping[str, float] = Field(default_factory=dict)
    short: Mapping[str, int] = Field(default_factory=dict)
    running: Mapping[str, int] = Field(default_factory=dict, description="Requests at the moment, by pool.")
    config: str = ""

    @property
    def gpus(self) -> tuple[GpuState, ...]:
        """Every GPU under its name in the cluster, node by node."""
        return tuple(replace(gpu, uuid=slice_key(n.node, gpu.uuid)) for n in self.nodes for gpu in n.gpus)

    @property
    def simulated(self) -> bool:
        """Whether every GPU is made up."""
        return bool(self.gpus) and all(gpu.simulated for gpu in self.gpus)

    @property
    def fingerprint(self) -> str:
        """A short digest of what a plan depends on: GPUs, how they are cut, and who is on them. Requests in flight are left out."""
        gpus = [
            (gpu.uuid, gpu.product, gpu.mig, [i.name for i in sorted(gpu.instances, key=lambda i: i.name)])
            for gpu in sorted(self.gpus, key=lambda gpu: gpu.uuid)
        ]
        nodes = [(n.node, n.frozen, sorted(n.cordoned)) for n in sorted(self.nodes, key=lambda n: n.node)]
        seats = sorted((replica, now.seat.key) for replica, now in self.replicas.items())
        state = repr((gpus, nodes, seats, sorted(self.reserved.items())))
        return hashlib.sha256(state.encode()).hexdigest()[:16]

    @property
    def elsewhere(self) -> frozenset[str]:
        """Models that a plan does not decide about, because a replica of theirs is on a slice of no GPU, cores for example, or
        on a node that is frozen.
        """
        gpus = {slice_key(n.node, gpu.uuid) for n in self.nodes if not n.frozen for gpu in n.gpus}
        return frozenset(now.seat.model for now in self.replicas.values() if gpu_of(now.seat.key) not in gpus)


def gpu_of(key: str) -> str:
    """`NODE/UUID` of the slice `NODE/UUID/PROFILE@START`, or of the whole card."""
    return "/".join(key.split("/")[:2])


def gpus_to_plan(fleet: FleetConfig, inventory: Inventory) -> NodeGpus:
    """Of what a node sees, the GPUs that a plan may count on: none where its slices are listed or are cores, and none
    that several engines use at once. Raises ConfigError for a rule of `fleet` that names a GPU which is not there.
    """
    cores = bool(inventory.slices) and all(s.kind is SliceKind.CPU for s in inventory.slices)
    if fleet.slices or cores:
        return NodeGpus()
    catalogue, gpus = load_catalogue(), inventory.gpus
    shared = {
        gpu.uuid
        for number, rule in enumerate(fleet.sharing)
        for gpu in selected(gpus, rule, f"fleet.sharing[{number}]", catalogue)
    }
    cordoned: list[GpuState] = []
    if fleet.cordon:
        cordoned = selected(gpus, GpuSelection(gpus=fleet.cordon), "fleet.cordon", catalogue)
    return NodeGpus(gpus=tuple(g for g in gpus if g.uuid not in shared), cordoned=tuple(g.uuid for g in cordoned))


def layouts_of(survey: Survey, rules: Sequence[LayoutRule]) -> tuple[GpuPlan, ...]:
    """`fleet.layouts` against the GPUs of all nodes: an index is that of every node's, a UUID that of one. Those of nodes that are frozen,
    which are told nothing, stay as they are, as if no rule named them.

    Raises as `placement.partition.plan`.
    """
    frozen = {slice_key(n.node, gpu.uuid) for n in survey.nodes if n.frozen for gpu in n.gpus}
    return tuple(GpuPlan(p.gpu, None) if p.gpu.uuid in frozen else p for p in plan_layouts(survey.gpus, rules))


def fleet_of(
    survey: Survey, plans: Sequence[GpuPlan], planning: PlanningConfig, models: Iterable[ModelConfig], *, recut: bool
) -> tuple[FleetGpu, ...]:
    """The cluster's GPUs as the planner's, each with its node. `plans` are `layouts_of` it.

    What a node has cordoned itself counts as well as `planning.cordon`. On a node that is frozen nothing new comes, no GPU is cut, and
    who runs stays, as do replicas of models that the plan does not decide about (`Survey.elsewhere`). Raises ConfigError for a cordon that names a GPU which no node has.
    """
    frozen = {n.node for n in survey.nodes if n.frozen}
    closed = {slice_key(n.node, uuid) for n in survey.nodes for uuid in n.cordoned}
    occupancy = _occupancy(survey, models)
    found: list[FleetGpu] = []
    for gpu in observed_fleet(plans, planning, occupancy, recut=recut):
        node = gpu.id.partition("/")[0]
        cordoned = gpu.cordoned or node in frozen or gpu.id in closed
        geometry = gpu.geometry
        if node in frozen and geometry is not None:
            geometry = only(geometry, (i.placement for i in gpu.instances))
        found.append(replace(gpu, node=node, cordoned=cordoned, geometry=geometry))
    return tuple(found)


def _occupancy(survey: Survey, models: Iterable[ModelConfig]) -> Occupancy:
    apart = survey.elsewhere
    mine = {replica: now.seat.key for replica, now in survey.replicas.items() if now.seat.model not in apart}
    replicas = Counter(map(stem_of, mine))
    there = {
        key: Running(replica, pool := stem_of(replica), ceil(survey.running.get(pool, 0) / replicas[pool]))
        for replica, key in mine.items()
    }
    left = {now.seat.key: f"{replica}, not planned" for replica, now in survey.replicas.items() if replica not in mine}
    pinned = {slice_id: model.name for model in models for slice_id in model.slices}
    return Occupancy(there, {**left, **survey.reserved}, pinned)
