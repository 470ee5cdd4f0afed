"""A configuration and a machine as a question to the planner, its answer, and the steps from here to there.

The machine is read, models' metadata is read, and from there on everything is a function of values.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from math import ceil

from gateway.config import Config, TenantConfig
from gateway.layouts import running_controller, seats
from model_registry.catalogue import load_catalogue
from model_registry.sizing.calibration import CalibrationStore
from model_registry.sizing.throughput import THROUGHPUT_FILE, ThroughputStore
from placement.assign import stem_of
from placement.autoscale.repartition import Repartition, Rescale, rescale
from placement.core_shares import share_cores
from placement.cores import format_cores
from placement.errors import InventoryError, TransitionBlocked
from placement.gpu_slices import slices_of
from placement.gpus import GpuState
from placement.host import read_host
from placement.partition import GpuPlan
from placement.partition.select import selected
from placement.planner.online_plan import place_online
from placement.planner.plan import plan
from placement.planner.types import WHOLE_GPU, Constraints, FleetGpu, FleetPlan, ModelDemand, Problem
from placement.registry import ModelRegistry, installed_vllm
from placement.repartitioning import Wish
from placement.reservations import RESERVATIONS_FILE, Reservations
from placement.schema import SimulatedFleet
from placement.slices import Inventory
from placement.state import StatePaths
from placement.table import ReplicaState
from placement.transition import SIMULATED, Forecast, Timings, Transition, forecast, plan_transition
from placement.wake_times import WAKE_TIMES_FILE, WakeTimes
from placement.workload import (
    Card,
    Occupancy,
    Running,
    Tenant,
    Workload,
    cards_of,
    check_pins,
    constraints,
    observed_fleet,
    workload,
)
from placement.workload.measured import Measured
from placement.workload.subjects import read_subjects


@dataclass(frozen=True, slots=True)
class FleetAnswer:
    """What a configuration makes of a fleet.

    `transition` is None where no order of steps keeps every promise (`blocked` says why). `proposal` is what cutting GPUs
    anew would add where the configuration does not let the plan cut them, or where demand asks for more at this moment.
    `stranded` names resting demands (`min: 0`) that a request would not wake: no slice that is left free holds them, and
    the configuration has none cut for them. `assumed_prices` is what is counted for products that have no price, where
    others have one.
    """

    workload: Workload
    problem: Problem
    plan: FleetPlan
    transition: Transition | None
    outlook: Forecast | None
    blocked: TransitionBlocked | None = None
    proposal: Repartition | None = None
    stranded: tuple[str, ...] = ()
    assumed_prices: Mapping[str, float] = field(default_factory=dict)

    @property
    def demands(self) -> Mapping[str, ModelDemand]:
        """The demands by name."""
        return {d.name: d for d in self.problem.demands}

    @property
    def met(self) -> bool:
        """Whether every demand is, and every model could be read."""
        return not self.plan.unmet and not self.workload.unreadable

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape: `fleet` in `sliceway plan --json`."""
        steps = [s.as_public() for s in self.transition.steps] if self.transition else []
        return self.plan.as_public() | {
            "met": self.met,
            "changed": self.plan.changed,
            "models": {
                name: [c.as_public() for c in choices.candidates] for name, choices in self.workload.models.items()
            },
            "resting": [{"model": d.name, "wakes": d.name not in self.stranded} for d in self.workload.resting],
            "unreadable": {name: error.as_dict() for name, error in self.workload.unreadable.items()},
            "transition": {
                "steps": steps,
                "seconds": self.outlook.seconds if self.outlook else 0.0,
                "models": [m.as_public() for m in self.outlook.models] if self.outlook else [],
                "blocked": self.blocked.as_dict() if self.blocked else None,
            },
            "proposal": self.proposal.as_public() if self.proposal else None,
            "assumed_prices": dict(self.assumed_prices),
        }


@dataclass(frozen=True, slots=True)
class ReservedSlice:
    """A slice that was made for other work, with what that work needs to use it."""

    slice_id: str
    note: str
    uuid: str | None
    cores: str

    def __str__(self) -> str:
        cores = f", cores {self.cores}" if self.cores else ""
        return f"{self.note}: {self.slice_id}, {self.uuid}{cores}"

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape."""
        return {"slice": self.slice_id, "note": self.note, "uuid": self.uuid, "cores": self.cores}


def reserved_slices(config: Config, gpus: Sequence[GpuState]) -> tuple[ReservedSlice, ...]:
    """The reservations whose slices are there: UUID for CUDA_VISIBLE_DEVICES, and their share of the host's cores."""
    notes = reservations(config).read()
    if not notes:
        return ()
    slices = Inventory(tuple(s for gpu in gpus for s in slices_of(gpu)), gpus=tuple(gpus))
    with contextlib.suppress(InventoryError):  # a host that does not tell its cores
        slices = share_cores(slices, read_host())
    return tuple(
        ReservedSlice(there.id, notes[there.id], there.uuid, format_cores(there.cores))
        for there in slices.slices
        if there.id in notes
    )


def answer(
    config: Config,
    gpus: Sequence[GpuPlan],
    *,
    desired: Mapping[str, int] | None = None,
    allow_dip: bool = False,
    online: bool = False,
) -> FleetAnswer:
    """Plan `config` on the GPUs that `gpus` are the layout plans of. Reads models' metadata and the state directory.

    `desired` are numbers of replicas that autoscaling has decided on, by demand. `online`: with nobody moved, and without a
    proposal. Raises ConfigError for contradictions
    (a pin on a cordoned GPU), and what the planner raises.
    """
    states = [p.gpu for p in _not_shared(config, gpus)]
    work = demanded(config, cards_of(states), desired=desired)
    recut = config.fleet.partition == "planned"
    fleet = observed(config, gpus, recut=recut)
    check_pins(config.models, fleet)
    anew = None if recut or online else observed(config, gpus, recut=True)
    limits = constraints(config.fleet, states)
    found = answered(config, work, fleet, limits, anew=anew, allow_dip=allow_dip, online=online)
    whole, running = {p.gpu.uuid for p in gpus if not p.then_mig}, set(map(stem_of, unseated(config)))
    found = replace(found, stranded=stranded(config, found, whole, running))
    wish = unmet_wish(config) if desired is None and found.proposal is None and not online else None
    if wish is None:
        return found
    return replace(found, proposal=for_demand(config, gpus, wish, unseated(config)).proposal)


def stranded(config: Config, found: FleetAnswer, whole: Collection[str], running: Collection[str]) -> tuple[str, ...]:
    """The resting demands that a request would not wake. `whole` are ids of GPUs with MIG off: one of them that nobody uses is
    a slice by itself. `running` are demands of which a replica runs.
    """
    if config.fleet.autoscale.repartition == "automatic" or not found.workload.resting:
        return ()
    free = {
        (there.gpu.product, s.placement.profile)
        for there in found.plan.gpus
        if not there.gpu.cordoned
        for s in there.slices
        if s.change == "idle"
    }
    bare = (p.gpu for p in found.plan.gpus if p.gpu.id in whole and not p.slices and not p.gpu.cordoned)
    free |= {(gpu.product, WHOLE_GPU) for gpu in bare}
    resting = (d for d in found.workload.resting if d.name not in running)
    return tuple(d.name for d in resting if free.isdisjoint(_held_by(found.workload, d)))


def _held_by(work: Workload, demand: ModelDemand) -> Iterator[tuple[str, str]]:
    """Product and profile of what holds it, also of whole cards that no plan would spend on it: demand takes what is free."""
    yield from (o.key for o in demand.options)
    yield from ((c.place.product, WHOLE_GPU) for c in work.models[demand.model].candidates if c.breaks == "mode")


def unmet_wish(config: Config) -> Wish | None:
    """What demand asks for at this moment, as the controller tells, where it finds no slices; None where it does."""
    status = running_controller(config)
    if status is None or not any(row.short for row in status.scaling.values()):
        return None
    rows = status.scaling
    return Wish(
        {name: row.replicas for name, row in rows.items()},
        {name: row.arrivals_per_second for name, row in rows.items()},
        {name: row.running for name, row in rows.items()},
    )


def for_demand(
    config: Config,
    gpus: Sequence[GpuPlan],
    wish: Wish,
    extras: Mapping[str, str] | None = None,
) -> Rescale:
    """What `wish` would take: slices that are there, or else cutting GPUs anew, weighed. Reads models' metadata.

    GPUs that `fleet.layouts` names stay as they are. `extras` are slice ids of replicas that run for demand and that no
    plan has seated. Raises as `answer`.
    """
    mine = _not_shared(config, gpus)
    states = [p.gpu for p in mine]
    work = demanded(config, cards_of(states), desired=wish.replicas)
    loads = {name: running for name, running in wish.running.items() if running}
    fixed, anew = (observed(config, gpus, recut=recut, extras=extras, running=loads) for recut in (False, True))
    check_pins(config.models, anew)
    problem = Problem(fixed, work.demands, constraints(config.fleet, states))
    rates = wish.arrivals_per_second
    return rescale(problem, replace(problem, gpus=anew), config.fleet.autoscale, timings(config), rates=rates)


def what_if(config: Config, products: Mapping[str, int]) -> FleetAnswer:
    """Plan `config` on so many bare cards of these products, as the catalogue has them. Looks at no machine."""
    catalogue = load_catalogue()
    kinds = {catalogue.product(name): number for name, number in products.items()}
    work = demanded(config, [Card.of(p) for p in kinds])
    fleet = tuple(
        FleetGpu(f"{p.name}#{n}", p.name, p, f"{p.name}#{n}", price_per_hour=config.fleet.price_per_hour(p.name))
        for p, number in kinds.items()
        for n in range(number)
    )
    return answered(config, work, fleet, constraints(config.fleet))


def answered(
    config: Config,
    work: Workload,
    fleet: tuple[FleetGpu, ...],
    limits: Constraints,
    *,
    anew: tuple[FleetGpu, ...] | None = None,
    allow_dip: bool = False,
    online: bool = False,
) -> FleetAnswer:
    """Plan `work` on `fleet`, `online` without moving anybody. `anew` is the same fleet if its GPUs may be cut, where the plan must not cut them itself."""
    problem = Problem(fleet, work.demands, limits)
    found, proposal = place_online(problem) if online else plan(problem), None
    if found.unmet and anew is not None:
        proposal = rescale(problem, replace(problem, gpus=anew), config.fleet.autoscale, timings(config)).proposal
    transition, blocked = _transition(found, problem.demands, allow_dip=allow_dip)
    took = timings(config)
    told = forecast(transition, found, {d.name: d for d in problem.demands}, took) if transition else None
    assumed = config.fleet.assumed_prices(g.product for g in fleet)
    return FleetAnswer(work, problem, found, transition, told, blocked, proposal, assumed_prices=assumed)


def demanded(config: Config, cards: Sequence[Card], *, desired: Mapping[str, int] | None = None) -> Workload:
    """What `config` demands of cards of these kinds. Reads models' metadata, and what engines measured."""
    registry = ModelRegistry(config.engine, vllm_version=installed_vllm(config.engine, "cuda"))
    subjects = read_subjects(config.models, registry)
    return workload(
        subjects.models,
        cards,
        tenants=[tenant_of(t) for t in config.tenants],
        desired=desired,
        measured=measured(config),
        unreadable=subjects.unreadable,
    )


def measured(config: Config) -> Measured:
    """What engines and load tests measured, from the state directory; what was measured on simulated GPUs counts for such only."""
    simulated = isinstance(config.fleet.discover, SimulatedFleet)
    throughput = ThroughputStore(config.state / THROUGHPUT_FILE).all()
    return Measured(
        memory={r.key: r for r in CalibrationStore(StatePaths(config.state).calibration).all()},
        throughput=tuple(t for t in throughput if t.simulated == simulated),
        engine_version=None if simulated or config.engine.command else installed_vllm(config.engine, "cuda"),
        now=datetime.now(UTC),
    )


def timings(config: Config) -> Timings:
    """How long steps take: starts as the controller has seen them, the rest as real or simulated engines usually take."""
    usual = SIMULATED if isinstance(config.fleet.discover, SimulatedFleet) else Timings()
    deadline = config.engine.drain_timeout_seconds
    drain = min(usual.drain_seconds, deadline) if usual is SIMULATED else deadline
    return replace(usual, drain_seconds=drain, starts=WakeTimes(config.state / WAKE_TIMES_FILE).starts())


def tenant_of(tenant: TenantConfig) -> Tenant:
    """A tenant as planning sees it."""
    models = None if tenant.models == "all" else tenant.models
    return Tenant(tenant.name, models, tenant.isolation == "dedicated", tenant.demand)


def reservations(config: Config) -> Reservations:
    """The slices that were made for other work."""
    return Reservations(config.state / RESERVATIONS_FILE)


def _not_shared(config: Config, gpus: Sequence[GpuPlan]) -> list[GpuPlan]:
    """Without GPUs that several engines use at once (`fleet.sharing`): those are no slices that a plan could count on."""
    states = [p.gpu for p in gpus]
    shared = {
        g.uuid
        for n, rule in enumerate(config.fleet.sharing)
        for g in selected(states, rule, f"fleet.sharing[{n}]", load_catalogue())
    }
    return [p for p in gpus if p.gpu.uuid not in shared]


def observed(
    config: Config,
    gpus: Sequence[GpuPlan],
    *,
    recut: bool,
    extras: Mapping[str, str] | None = None,
    running: Mapping[str, int] | None = None,
) -> tuple[FleetGpu, ...]:
    """The fleet as plans are made from it: what the driver shows, and who has which slice. `running` are requests by demand."""
    mine = _not_shared(config, gpus)
    occupancy = _occupancy(config, [p.gpu for p in mine], extras or {}, running or {})
    return observed_fleet(mine, config.fleet, occupancy, recut=recut)


def unseated(config: Config) -> dict[str, str]:
    """Slice ids of replicas that run for demand, without a seat that a plan has given them. Sleeping ones give way."""
    status, seated = running_controller(config), seats(config).read()
    if status is None or seated is None:
        return {}
    return {
        r.replica: r.slice.id
        for r in status.replicas
        if r.state is not ReplicaState.ASLEEP
        and r.replica not in seated
        and r.slice.id not in seated.values()
        and stem_of(r.replica) in status.scaling
    }


def _occupancy(
    config: Config, gpus: Sequence[GpuState], extras: Mapping[str, str], running: Mapping[str, int]
) -> Occupancy:
    """Seats count as soon as there are any: they are what the controller is to run. Before, what it happens to run.

    The requests of a demand are divided equally among its replicas.
    """
    planned, status = seats(config).read(), running_controller(config)
    if planned is None:
        planned = {r.replica: r.slice.id for r in status.replicas} if status is not None else {}
    planned |= extras
    replicas = Counter(map(stem_of, planned))
    there = {
        slice_id: Running(r, stem_of(r), ceil(running.get(stem_of(r), 0) / replicas[stem_of(r)]))
        for r, slice_id in planned.items()
    }
    pinned = {slice_id: m.name for m in config.models for slice_id in m.slices}
    instances = {f"{g.uuid}/{i.name}" for g in gpus for i in g.instances}
    reserved = {s: note for s, note in reservations(config).read().items() if s in instances}
    for_demand = (
        {r.slice.id: r.replica for r in status.replicas if stem_of(r.replica) in status.scaling} if status else {}
    )
    return Occupancy(there, reserved, pinned, for_demand)


def _transition(
    found: FleetPlan, demands: Sequence[ModelDemand], *, allow_dip: bool
) -> tuple[Transition | None, TransitionBlocked | None]:
    try:
        return plan_transition(found, demands, allow_dip=allow_dip), None
    except TransitionBlocked as blocked:
        return None, blocked
