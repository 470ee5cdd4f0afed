"""GPUs as the driver shows them, with what runs on them, as the planner's fleet. Pure.

What is not ours is never touched: an instance that someone else's process uses, a slice that is reserved, one that a model
is pinned to, and a GPU whose layout the configuration writes down, which keeps exactly that layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from model_registry.catalogue import Product, load_catalogue
from model_registry.errors import ConfigError
from model_registry.geometry import Placement
from model_registry.schema import ModelConfig
from placement.gpus import GpuInstance, GpuState, named
from placement.partition.plan import GpuPlan
from placement.partition.select import GpuSelection, selected
from placement.planner.types import WHOLE, Constraints, FleetGpu, Instance, Reservation
from placement.policy import PlanningConfig


@dataclass(frozen=True, slots=True)
class Running:
    """A replica that runs: which demand it belongs to, and how many requests it has."""

    replica: str
    demand: str
    requests: int = 0


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Who has which slice, by slice id (`<GPU UUID>/<profile>@<start>`, a GPU's UUID for all of it).

    `for_demand` names replicas that no plan has seated: they are left alone like other processes, and told by name.
    """

    running: Mapping[str, Running] = field(default_factory=dict)
    reserved: Mapping[str, str] = field(default_factory=dict)
    pinned: Mapping[str, str] = field(default_factory=dict)
    for_demand: Mapping[str, str] = field(default_factory=dict)


def observed_fleet(
    plans: Sequence[GpuPlan],
    planning: PlanningConfig,
    occupancy: Occupancy | None = None,
    *,
    recut: bool = True,
    node: str = "",
) -> tuple[FleetGpu, ...]:
    """The fleet that a plan starts from: every GPU as it is, or as `fleet.layouts` will have it.

    `plans` are the layout rules against the GPUs (`placement.partition.plan`). A GPU that a rule names is not cut otherwise;
    with `recut` False none is. Raises ConfigError for a cordon that names a GPU that is not there.
    """
    cordoned = _cordoned([p.gpu for p in plans], planning)
    occupancy = occupancy or Occupancy()
    return tuple(
        _fleet_gpu(
            p, planning, occupancy, cordoned=p.gpu.uuid in cordoned, fixed=not recut or p.wanted is not None, node=node
        )
        for p in plans
    )


def constraints(planning: PlanningConfig, gpus: Sequence[GpuState] = ()) -> Constraints:
    """Reservations, head-room and the limit on changes. A reservation for several products is made on the first that is there."""
    reservations = [
        Reservation(profile, count, rule.note, _product_of(rule, profile, gpus))
        for rule in planning.reserve
        for profile, count in sorted(rule.profiles.items())
    ]
    return Constraints(tuple(reservations), planning.head_room, planning.max_layout_changes)


def check_pins(models: Iterable[ModelConfig], fleet: Sequence[FleetGpu]) -> None:
    """Raise ConfigError for a pin that no plan can respect: a slice that is not there, or free on a cordoned GPU."""
    gpus = {g.id: g for g in fleet}
    for model in models:
        for slice_id in model.slices:
            uuid, _, place = slice_id.rpartition("/") if "@" in slice_id.rpartition("/")[2] else (slice_id, "", "")
            gpu = gpus.get(uuid)
            if gpu is None:
                continue  # not a GPU's slice, or one that `assign` will miss with the list of what there is
            there = next((i for i in gpu.instances if (str(i.placement) if place else "") == place), None)
            if place and there is None:
                raise ConfigError(
                    f"{model.name!r} is pinned to {slice_id}, and no layout makes that slice",
                    where=f"models.{model.name}.slices",
                    remedy="Name it under fleet.layouts, or let `profiles` say what the model takes and take the pin out.",
                )
            if gpu.cordoned and (there is None or there.reserved is None or "in use" not in there.reserved):
                raise ConfigError(
                    f"{model.name!r} is pinned to {slice_id}, on a GPU that is cordoned: nothing new comes there",
                    where=f"models.{model.name}.slices",
                    remedy="Take the GPU out of fleet.cordon, or pin the model elsewhere.",
                )


def _cordoned(gpus: Sequence[GpuState], planning: PlanningConfig) -> frozenset[str]:
    if not planning.cordon:
        return frozenset()
    rule = GpuSelection(gpus=planning.cordon)
    try:
        return frozenset(g.uuid for g in selected(gpus, rule, "fleet.cordon", load_catalogue()))
    except ConfigError as error:
        error.where = "fleet.cordon"  # a list by itself, where other rules hold theirs under `gpus`
        raise


def _product_of(rule: GpuSelection, profile: str, gpus: Sequence[GpuState]) -> str | None:
    if not rule.products and rule.gpus == "all":
        return None
    chosen = selected(gpus, rule, "fleet.reserve", load_catalogue()) if gpus else []
    having = [g for g in chosen if g.geometry and profile in {p.name for p in g.geometry.profiles}]
    if having:
        return having[0].product
    names = [load_catalogue().product(p).name for p in rule.products if not p.startswith("0x")]
    return names[0] if names else None


def _fleet_gpu(
    plan: GpuPlan, planning: PlanningConfig, occupancy: Occupancy, *, cordoned: bool, fixed: bool, node: str
) -> FleetGpu:
    gpu = plan.gpu
    product = gpu.product
    cuttable = gpu.geometry is not None and (gpu.mode is not None) and gpu.instances_known
    geometry = gpu.geometry if cuttable and plan.then_mig | (not fixed) else None
    then = plan.then
    if fixed and geometry is not None:
        geometry = only(geometry, then)
    return FleetGpu(
        id=gpu.uuid,
        product=product,
        geometry=geometry,
        node=node,
        instances=_instances(gpu, then, occupancy) if geometry is not None or not gpu.mig else (),
        cordoned=cordoned or (gpu.mig and not gpu.instances_known),
        price_per_hour=planning.price_per_hour(product),
        whole=not plan.then_mig if fixed else not gpu.display,
    )


def only(product: Product, placements: Iterable[Placement]) -> Product:
    """`product` with no other places than these: whatever is planned on it, nothing else is cut."""
    starts: dict[str, list[int]] = {}
    for placement in placements:
        starts.setdefault(placement.profile, []).append(placement.start)
    profiles = tuple(replace(p, placements=tuple(sorted(starts[p.name]))) for p in product.profiles if p.name in starts)
    return replace(product, profiles=profiles)


def _instances(gpu: GpuState, then: Sequence[Placement], occupancy: Occupancy) -> tuple[Instance, ...]:
    if not gpu.mig and not then:
        whole = _instance(gpu.uuid, WHOLE, None, occupancy, gpu)
        return () if whole.idle else (whole,)
    there = {i.placement: i for i in gpu.instances if i.placement is not None}
    return tuple(_instance(f"{gpu.uuid}/{p}", p, there.get(p), occupancy, gpu) for p in sorted(then))


def _instance(
    slice_id: str, placement: Placement, there: GpuInstance | None, occupancy: Occupancy, gpu: GpuState
) -> Instance:
    if slice_id in occupancy.reserved:
        return Instance(placement, reserved=occupancy.reserved[slice_id])
    running = occupancy.running.get(slice_id)
    if slice_id in occupancy.pinned:
        state = "in use" if running else "free"
        return Instance(placement, reserved=f"pinned to {occupancy.pinned[slice_id]} ({state})")
    if running is not None:
        return Instance(placement, running.replica, running.demand, requests=running.requests)
    processes = there.processes if there is not None else gpu.processes if placement == WHOLE else ()
    foreign = tuple(p for p in processes if p.how != "open")
    if not foreign:
        return Instance(placement)
    replica = occupancy.for_demand.get(slice_id)
    return Instance(
        placement, reserved=f"{replica}, there for demand" if replica else f"in use by {', '.join(named(foreign))}"
    )
