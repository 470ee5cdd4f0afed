"""Carrying a fleet plan out on this machine: what is under way is finished first, then what is planned now."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from gateway.admin.overlay import OverlayStore
from gateway.changes import engine_changes, refuse_dip
from gateway.config import Config
from gateway.generations import Announcements, digest_of, served_digest
from gateway.layouts import Machine, running_controller, seats
from gateway.planning import FleetAnswer, answer, observed, reservations
from gateway.reviewed import ReviewedPlan
from model_registry.errors import SlicewayError
from placement.changeover import Changeover
from placement.clock import SystemClock
from placement.errors import StalePlan
from placement.gpus import GpuState
from placement.partition import plan as plan_layouts
from placement.planner.types import FleetGpu
from placement.state import StatePaths
from placement.transition import Executor, Outcome, TransitionJournal, without_engines
from placement.transition.execute import Watch, unwatched
from placement.transition.journal import JOURNAL_FILE
from placement.transition.local import LocalFleet, NoEngines, engines_of

log = logging.getLogger(__name__)

_TAKEN_OVER_SECONDS = 5.0
_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class AppliedPlan:
    """What became of a plan. `answer` None: a transition that was under way could not be finished, so nothing was planned.

    `gateways` is how many gateways took the configuration over for it. `changes` is what the controller does afterwards, where
    engines run by earlier settings; None where that could not be told. `labels` are what GPUs are called, by their ids, also of
    those that have vanished meanwhile.
    """

    outcome: Outcome
    answer: FleetAnswer | None = None
    gateways: int = 0
    changes: Changeover | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every step is done and every demand met."""
        return self.outcome.ok and self.answer is not None and self.answer.met

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape: `fleet` in `sliceway apply --json`."""
        unmet = [u.as_public() for u in self.answer.plan.unmet] if self.answer else []
        unreadable = {n: e.as_dict() for n, e in self.answer.workload.unreadable.items()} if self.answer else {}
        return self.outcome.as_public() | {
            "ok": self.ok,
            "unmet": unmet,
            "unreadable": unreadable,
            "gateways_told": self.gateways,
        }


def apply_plan(
    config: Config,
    machine: Machine,
    *,
    allow_dip: bool = False,
    allow_mode_change: bool = False,
    online: bool = False,
    reviewed: ReviewedPlan | None = None,
    watch: Watch = unwatched,
) -> AppliedPlan:
    """Make the fleet what the plan says, one step after the other, the controller's engines with it. `online`: nobody is moved.

    The caller holds `one_at_a_time`. Raises TransitionBlocked where no order of steps keeps every promise, or engines
    by earlier settings could only be replaced in their places and a model would have less than it is guaranteed; StalePlan
    where something else changes the fleet meanwhile, and what planning raises. A step that fails is told in the outcome.
    With `reviewed` that plan is carried out or none: StalePlan is raised for any other, and where a transition is under way.
    """
    return asyncio.run(_apply(config, machine, allow_dip, allow_mode_change, online, reviewed, watch))


def tell_gateways(
    config: Config, *, monotonic: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
) -> int:
    """Have every gateway of this state directory that goes by another configuration read it again, and wait a moment until
    they have. How many there were; 0 where none runs, or all of them go by this one.
    """
    paths = StatePaths(config.state)
    announced, wanted = Announcements(paths.gateways), served_digest(config)
    behind = [one for one in announced.read() if one.digest != wanted]
    if not behind:
        return 0
    with OverlayStore(paths.root).changing() as draft:
        draft[0] = msgspec.structs.replace(draft[0], reloads=draft[0].reloads + 1)
        asked = draft[0].reloads
    deadline = monotonic() + _TAKEN_OVER_SECONDS
    while any(one.reloads < asked for one in announced.read()) and monotonic() < deadline:
        sleep(_POLL_SECONDS)
    return len(behind)


async def _apply(
    config: Config,
    machine: Machine,
    allow_dip: bool,
    allow_mode_change: bool,
    online: bool,
    reviewed: ReviewedPlan | None,
    watch: Watch,
) -> AppliedPlan:
    works = Works.of(
        config, machine, recut=config.fleet.partition == "planned", allow_mode_change=allow_mode_change, watch=watch
    )
    wanted = digest_of(config)
    resumed = await works.finished(wanted) if reviewed is None else None
    if resumed is not None and not resumed.ok:
        return AppliedPlan(resumed)
    plans = plan_layouts(await works.gpus(), config.fleet.layouts)
    found = await asyncio.to_thread(answer, config, plans, allow_dip=allow_dip, online=online)
    if reviewed is not None:
        reviewed.check(None, found)
    if found.transition is None:
        assert found.blocked is not None
        raise found.blocked
    changes = await asyncio.to_thread(_changes, config, found)
    if changes is not None and not allow_dip:
        refuse_dip(changes)
    # Before the first step, so that nobody is admitted to what goes, and before the last, so that what comes is known.
    told = await asyncio.to_thread(tell_gateways, config)
    steps = found.transition if works.engines_run else without_engines(found.transition)
    return AppliedPlan(await works.executor.begin(replace(steps, wanted=wanted)), found, told, changes)


def _changes(config: Config, found: FleetAnswer) -> Changeover | None:
    try:
        return engine_changes(config, found)
    except SlicewayError as error:
        log.warning("which engines are replaced cannot be told: %s", error)
        return None


@dataclass(frozen=True, slots=True)
class Works:
    """Everything that a transition of this machine is carried out with: the fleet, the journal, and who takes the steps.

    `engines_run` is False where there is no controller: then there are only instances to make, and seats to write down.
    """

    config: Config
    machine: Machine
    fleet: LocalFleet
    journal: TransitionJournal
    executor: Executor
    engines_run: bool

    @classmethod
    def of(
        cls,
        config: Config,
        machine: Machine,
        *,
        recut: bool,
        allow_mode_change: bool = False,
        watch: Watch = unwatched,
    ) -> Works:
        """`recut` is whether GPUs may be cut that no layout names. Who runs what is written down as seats, if nobody has yet."""
        paths, clock = StatePaths(config.state), SystemClock()

        def planned(gpus: Sequence[GpuState]) -> Sequence[FleetGpu]:
            return observed(config, plan_layouts(gpus, config.fleet.layouts), recut=recut)

        status = running_controller(config)
        seats(config).begin({r.replica: r.slice.id for r in status.replicas} if status is not None else {})
        engines = engines_of(paths, config.engine, clock)
        fleet = LocalFleet(
            machine.driver,
            planned,
            engines,
            seats(config),
            reservations(config),
            allow_mode_change=allow_mode_change,
        )
        journal = TransitionJournal(config.state / JOURNAL_FILE)
        executor = Executor(fleet, journal, clock, watch=watch)
        return cls(config, machine, fleet, journal, executor, engines_run=not isinstance(engines, NoEngines))

    async def gpus(self) -> Sequence[GpuState]:
        """The GPUs as they are; reservations of slices that are gone are forgotten."""
        gpus = await asyncio.to_thread(self.machine.driver.observe)
        reservations(self.config).keep({f"{g.uuid}/{i.name}" for g in gpus for i in g.instances})
        return gpus

    async def finished(self, wanted: str = "") -> Outcome | None:
        """Go on with a transition that was killed. One to another configuration than `wanted`, one that has failed, or whose
        GPUs are gone, is given up: what is planned next starts from what there is.
        """
        record = self.journal.read()
        if record is None:
            return None
        if record.failed is None and record.transition.wanted in ("", wanted) and self.engines_run:
            with contextlib.suppress(StalePlan):
                return await self.executor.resume()
        await self.fleet.abandon(record.left)
        self.journal.clear()
        return None
