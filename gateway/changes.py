"""What becomes of engines that run by earlier settings than the configuration's, on this machine: read, and told before it happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from gateway.config import Config
from gateway.layouts import placement_config, running_controller
from gateway.planning import FleetAnswer, timings
from model_registry.sizing.calibration import CalibrationStore
from placement.assign import stem_of, wanted_replicas
from placement.calibration import CalibratedRegistry
from placement.changeover import Changeover, Circumstances, RunningEngine, changeover
from placement.demand_slices import barred
from placement.errors import TransitionBlocked
from placement.goals import Goals, PlacementConfig, Workshop, plan_goals
from placement.inventory import observe
from placement.orders import Orders, read_orders
from placement.planner.types import WHOLE_GPU, FleetGpu, ModelDemand
from placement.renewals import RENEWALS_FILE, RenewalsFile, Renewed
from placement.replicas.journal import Journal, JournalEntry
from placement.simulate import enter
from placement.slices import Inventory, Slice, SliceKind
from placement.sources import make_registry
from placement.state import StatePaths
from placement.status import ControllerStatus
from placement.table import ReplicaState
from placement.transition import Step
from placement.transition.forecast import StartSource
from placement.wake_times import WAKE_TIMES_FILE, WakeTimes
from placement.withheld import withheld, without

_CHANGES = 2
"""Layout changes that a slice for a while takes: it is made, and taken away."""


def engine_changes(config: Config, answer: FleetAnswer | None = None) -> Changeover:
    """What the controller replaces once it has this configuration, after the steps of `answer` where a fleet is planned.

    Reads the state directory, the machine's slices and models' metadata; changes nothing. Raises SlicewayError where any of them
    cannot be read.
    """
    paths = StatePaths(config.state)
    entries = [e for e in Journal(paths).entries() if e.shim.alive and not e.asleep]
    if not entries:
        return Changeover()
    steps = answer.transition.steps if answer is not None and answer.transition is not None else ()
    orders, renewed, status = (
        read_orders(paths),
        RenewalsFile(paths.root / RENEWALS_FILE).read(),
        running_controller(config),
    )
    goals = _goals(config, {e.replica: e.slice_id for e in entries}, steps, orders, renewed, status)
    running = {e.replica: RunningEngine(e.spec_hash, _serves(e, status)) for e in entries}
    takes, seen = timings(config), WakeTimes(config.state / WAKE_TIMES_FILE)

    def start(model: str, there: Slice) -> tuple[float, StartSource]:
        measured = seen.of(model, there).get("start")
        if measured is not None:
            return measured, "measured"
        profile = WHOLE_GPU if there.kind is SliceKind.GPU else there.profile or ""
        return takes.start(model, there.gpu.product if there.gpu else "", profile)

    about = Circumstances(
        start,
        takes,
        renewed.held(goals, orders),
        barred(goals.config, goals.inventory, paths),
        _cut(config, answer, goals.inventory),
        answer.demands if answer is not None else _counted(goals.config, renewed),
    )
    return changeover(goals, running, about)


def refuse_dip(changes: Changeover) -> None:
    """Raise TransitionBlocked, as for a transition, where a model would fall below what it is guaranteed."""
    parts = [
        f"{m.demand} would serve {m.lowest:.4g} of the {m.guaranteed:.4g} it is guaranteed for about {m.dip_seconds:.0f} s"
        for m in changes.undercut
    ]
    if parts:
        raise TransitionBlocked(
            f"engines by earlier settings would be replaced in their places: {'; '.join(parts)}",
            remedy="Leave room for a new engine beside the old one (`sliceway plan` says for each what is in the way), add a "
            "replica first, or allow the dip: --allow-dip.",
        )


def _goals(
    config: Config,
    current: Mapping[str, str],
    steps: Sequence[Step],
    orders: Orders,
    renewed: Renewed,
    status: ControllerStatus | None,
) -> Goals:
    paths = StatePaths(config.state)
    enter(config.fleet, config.state)
    asked, inventory = placement_config(config), without(observe(config.fleet), withheld(paths))
    if asked.seats is not None:
        asked = asked.model_copy(update={"seats": _seats_after(asked.seats, steps)})
    gone = {s.place.slice_id for s in steps if s.kind == "destroy"}
    inventory = replace(inventory, slices=tuple(s for s in inventory.slices if s.id not in gone))
    return plan_goals(
        asked,
        inventory,
        CalibratedRegistry(make_registry(config.engine, inventory), CalibrationStore(paths.calibration)),
        Workshop(paths),
        current=current,
        orders=orders,
        demanded={name: row.replicas for name, row in status.scaling.items()} if status is not None else {},
        barred=barred(asked, inventory, paths),
        names=renewed.names,
    )


def _seats_after(seats: Mapping[str, str], steps: Sequence[Step]) -> dict[str, str]:
    """Who has which slice when `steps` are done."""
    left = {(s.replica, s.place.slice_id) for s in steps if s.kind == "stop"}
    taken = {s.replica: s.place.slice_id for s in steps if s.kind == "start" and s.replica is not None}
    return {r: s for r, s in seats.items() if (r, s) not in left} | taken


def _serves(entry: JournalEntry, status: ControllerStatus | None) -> bool:
    """Whether it takes requests, or would if nobody held it; as the controller tells, else as it last wrote down."""
    told = next((r.state for r in status.replicas if r.replica == entry.replica), None) if status is not None else None
    return entry.ready_at is not None and told in (None, ReplicaState.READY, ReplicaState.DRAINING)


def _cut(config: Config, answer: FleetAnswer | None, inventory: Inventory) -> tuple[FleetGpu, ...]:
    """The GPUs on which a slice may be made for a while, as they are after the plan."""
    most = config.fleet.max_layout_changes
    if answer is None or config.fleet.partition != "planned" or (most is not None and most < _CHANGES):
        return ()
    mig: Collection[str] = {g.uuid for g in inventory.gpus if g.mig}
    return tuple(g for g in answer.plan.after() if g.id in mig)


def _counted(config: PlacementConfig, renewed: Renewed) -> dict[str, ModelDemand]:
    """What models are guaranteed where nothing is planned: the number of replicas that is asked for."""
    wanted = Counter(stem_of(w.replica) for w in wanted_replicas(config.models, config.pools, renewed.names))
    return {name: ModelDemand(name, name.partition("@")[0], (), replicas=number) for name, number in wanted.items()}
