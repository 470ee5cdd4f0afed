"""The head: keeps the seats of the whole cluster, and tells every gateway where the engines are.

It knows nodes only through `Nodes`, so it runs without Ray as well. What it remembers is a journal of seats and a generation;
everything else it asks the nodes for. It may be killed at any moment: nodes go on with what they were last told, gateways
with the last table, and the next head takes the seats out of the journal and the engines out of the nodes' reports.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from model_registry.schema import ModelConfig
from placement.assign import Pools
from placement.autoscale import Signals
from placement.clock import Clock
from placement.cluster.borne import CapacityOn, nobody_knows
from placement.cluster.bulletin import Bulletin
from placement.cluster.carrying import Round
from placement.cluster.eligible import in_use, problems_of
from placement.cluster.failed_starts import FailedStart, FailedStarts
from placement.cluster.layouts import named_by_nobody
from placement.cluster.leading import Leaders
from placement.cluster.members import Broadcast, News, NodeOrder, NodeReport, Owner, Seat, Versions, slice_key
from placement.cluster.merge import MergeBook, reasons
from placement.cluster.nodes import Nodes, Store
from placement.cluster.numbers import ClusterNumbers
from placement.cluster.ordering import Orders
from placement.cluster.plans import Standing, check_plan, take_survey
from placement.cluster.relays import relays_of
from placement.cluster.renewing import Asked, Renewing, Successor, place_beside, serves
from placement.cluster.retiring import Retiring
from placement.cluster.rollout import Rollout
from placement.cluster.seating import FitOn, Seating, SeatingBook, without_slices
from placement.cluster.survey import Survey
from placement.cluster.transitions import Transitions, TransitionsJournal, Why, digest
from placement.cluster.watching import Heard, Watch
from placement.demanded import model_of
from placement.policy import AutoscalePolicy
from placement.schema import ActorsOf
from placement.status import ClusterScaling, LeaderStatus, ScalingRow
from placement.table import ModelRow, ReplicaState, RoutingTable
from placement.transition.steps import Transition

log = logging.getLogger(__name__)

ORDER_SECONDS = 5.0
LOST_AFTER_SECONDS = 6.0
STEP_SECONDS = 0.5
PAUSE_SECONDS = 0.25
"""Between two rounds, also where nodes tell something new all the time."""


class HeadJournal(BaseModel):
    """What the next head has to know. Not `settled`: by a head without a journal that may not have heard of every node yet."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    version: Literal[1] = 1
    generation: int = 0
    config: str = ""
    seats: Mapping[str, Seat] = {}
    secret: str = ""
    pools: Pools = {}
    numbers: Mapping[str, int] = {}
    names: tuple[str, ...] = ()
    successors: Mapping[str, Successor] = {}
    failed_starts: Mapping[str, FailedStart] = {}
    settled: bool = True
    transitions: TransitionsJournal = TransitionsJournal()


@dataclass(frozen=True, slots=True)
class ClusterGoal:
    """The configuration, read: which models there are, and what each gets where."""

    config: str
    models: Sequence[ModelConfig]
    rows: tuple[ModelRow, ...]
    fit_on: FitOn
    policy: AutoscalePolicy = field(default_factory=AutoscalePolicy)
    pools: Pools = field(default_factory=dict)
    capacity_on: CapacityOn = nobody_knows
    head_room: float = 0.0
    actors: ActorsOf = "replica"
    layouts: bool = False  # whether nodes cut their GPUs when they join


@dataclass(slots=True)
class _Member:
    """A node as the head knows it."""

    report: NodeReport
    demand: Mapping[str, Signals] | None
    problem: str | None = None
    ordered: NodeOrder | None = field(default=None, repr=False)
    frozen: bool = False


class Head:
    """One head. `step` is one round; `run` does rounds until cancelled."""

    def __init__(self, nodes: Nodes, store: Store, clock: Clock, versions: Versions, *, secret: str) -> None:
        self._nodes = nodes
        self._store = store
        self._clock = clock
        self._versions = versions
        self._journal = HeadJournal(secret=secret, settled=False)
        self._goal: ClusterGoal | None = None
        self._members: dict[str, _Member] = {}
        self._unplaced: Mapping[str, str] = {}
        self._staying: Mapping[str, str] = {}
        self._began_at: float | None = None  # its first round, which may be long after the process started
        self._table = RoutingTable(generation=0)
        self._bulletin = Bulletin()
        self._watch = Watch(nodes.report, clock)
        self._merged = MergeBook()
        self._rollout = Rollout()
        self._renewing = Renewing()
        self._failed_starts = FailedStarts()
        self._seating = SeatingBook()
        self._seating_of_all = SeatingBook()
        self._numbers = ClusterNumbers()
        self._joined: Collection[str] = ()
        self._retiring = Retiring()
        self._transitions = Transitions(lambda node, order: self._nodes.cut(node, order))
        self._leaders = Leaders()
        self._in_round = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._unsure = False

    # ---- what it is told

    async def restore(self) -> HeadJournal:
        """Take over from the head before. Returns what it has left, whose `config` is empty if there was none."""
        kept = await self._store.load()
        if kept is not None:
            try:
                self._journal = HeadJournal.model_validate_json(kept)
            except ValidationError as error:
                log.error("the head's journal makes no sense and is not used: %s", error)
        self._table = RoutingTable(generation=self._journal.generation)
        if self._journal.settled:
            self._numbers.restore(self._journal.numbers)
        self._renewing.restore(self._journal.names, self._journal.successors)
        self._failed_starts.restore(self._journal.failed_starts, self._journal.config)
        self._transitions.restore(self._journal.transitions, self._journal.config)
        return self._journal

    def aim(self, goal: ClusterGoal) -> None:
        """Work towards this configuration from the next round on."""
        self._goal = goal
        self._numbers.aim(goal.models, goal.pools, goal.policy, goal.capacity_on, goal.head_room)

    async def take_over(self, goal: ClusterGoal) -> None:
        """`aim`, when it is written down: whoever hears that it was taken over does not say it again to the next head."""
        async with self._writing:
            await self._write({"config": goal.config, "pools": dict(goal.pools)})
            self.aim(goal)

    async def share(self, files: Mapping[str, str]) -> None:
        """Have every gateway hold these files; with the first table, if there is none yet."""
        if self._bulletin.latest.sequence:
            await self._tell(self._table, files=files)
        else:
            self._bulletin.share(files)

    # ---- rounds

    async def run(self) -> None:
        """Rounds without end, the next one as soon as a node has something new. One that fails is tried again: nothing that serves
        depends on it.
        """
        try:
            while True:
                try:
                    await self.step()
                except Exception:
                    log.exception("this round failed; the next one follows")
                await self._clock.sleep(PAUSE_SECONDS)
                await self._watch.stirred(STEP_SECONDS - PAUSE_SECONDS)
        finally:
            self.stop()

    def stop(self) -> None:
        """Ask nobody any more."""
        self._watch.stop()

    async def step(self) -> None:
        """Look at every node, decide the seats, have the slices held, tell the nodes, publish the table."""
        async with self._in_round:
            await self._round()

    async def _round(self) -> None:
        if self._goal is None:
            return
        if self._began_at is None:
            self._began_at = self._clock.monotonic()
        await self._look()
        if self._awaits_nodes():
            return
        reports = self._reports()
        held = await self._nodes.held()
        seats = self._carried(reports, held)
        if seats is None:
            seats = self._choose(reports, self._current(reports, held), held)
        await self._remember(seats)
        owners, waiting = await self._hold(seats, held)
        await self._order(seats, owners)
        await self._publish(reports, seats, waiting)

    def _carried(self, reports: Mapping[str, NodeReport], held: Mapping[str, Seat]) -> Mapping[str, Seat] | None:
        """The seats while a plan is carried out: nothing else changes them meanwhile. None where none is."""
        assert self._goal is not None
        was = self._transitions.under_way
        seen = Round(
            {node: self._members[node].report for node in self._obedient(reports)},  # also slices that are for nobody
            frozenset(reports),
            held,
            digest(self._goal.config),
            self._clock.monotonic(),
        )
        seats = self._transitions.look(self._journal.seats, seen)
        if was and seats is None:  # what replicas are called from here on
            self._renewing.find(self._goal.models, self._goal.pools, self._current(reports, held), reports)
        return seats

    def _choose(
        self, reports: Mapping[str, NodeReport], current: Mapping[str, Seat], held: Mapping[str, Seat]
    ) -> Mapping[str, Seat]:
        """Who sits where from here on: as many as demand asks for, who is to take another one's place beside it, and for a
        moment those who are to go.
        """
        assert self._goal is not None
        goal, now, obedient = self._goal, self._clock.monotonic(), self._obedient(reports)
        if not self._journal.settled and not self._journal.seats:
            self._renewing.find(goal.models, goal.pools, current, reports)
        self._renewing.look(goal.models, goal.pools, current, obedient)
        current = self._without_failed(current, obedient)
        demand = [member.demand for member in self._members.values()]
        counted = self._renewing.counted(current)
        self._numbers.plan(self._transitions.counts(goal.config))
        self._numbers.look(reports, demand, counted, now, complete=self._settled)
        self._renewing.give_way(Asked(goal.models, goal.pools, self._numbers.replicas), current)
        seating = self._seat(reports, current)
        self._unplaced, self._staying = reasons(seating.unplaced), reasons(seating.staying)
        beside = self._renewing.give_up(seating.seats, current)
        staying = {**seating.seats, **beside}
        known = {m.name for m in goal.models}
        leaving = self._retiring.keep(staying, self._journal.seats, known, obedient, now)
        self._rollout.stay(frozenset(self._renewing.under_way.values()))
        taken = {**held, **leaving}
        self._rollout.look(
            obedient,
            staying,
            now_seconds=now,
            pause=bool(self._renewing.left) or self._failed_starts.still_there(held.keys() - staying.keys()),
            serving_on=self._serving_on(obedient, staying, taken),
        )
        return {**staying, **self._begin_beside(obedient, staying, taken), **leaving}

    def _without_failed(self, current: Mapping[str, Seat], reports: Mapping[str, NodeReport]) -> Mapping[str, Seat]:
        """The seats but for those of replicas that were to take another one's place, and have failed."""
        assert self._goal is not None
        behind = {replica for report in reports.values() for replica in report.outdated}
        self._failed_starts.look(self._goal.config, {model_of(replica) for replica in behind})
        self._failed_starts.started(model_of(replica) for replica in self._renewing.left)
        failed = self._renewing.drop_failed(current, reports)
        for replica, (of, reason) in failed.items():
            self._failed_starts.note(current[replica], of, reason, self._clock.now())
        return {replica: seat for replica, seat in current.items() if replica not in failed}

    def _serving_on(
        self, reports: Mapping[str, NodeReport], staying: Mapping[str, Seat], taken: Mapping[str, Seat]
    ) -> Collection[str]:
        """Replicas that are not replaced yet, since the last one that was to take a place of their model's did not start."""
        assert self._goal is not None
        models, fit_on = {m.name: m for m in self._goal.models}, self._goal.fit_on
        begun = self._renewing.under_way.values()
        return self._failed_starts.serving_on(
            {r: seat for r, seat in staying.items() if r not in begun and serves(seat, reports)},
            self._clock.now(),
            lambda r: place_beside(models[staying[r].model], r, reports, fit_on, staying, taken) is not None,
        )

    def _seat(self, reports: Mapping[str, NodeReport], current: Mapping[str, Seat]) -> Seating:
        """Seats for all but those that start beside another one, who keep theirs unless somebody waits for it."""
        assert self._goal is not None
        counted = self._renewing.counted(current)
        kept = {current[replica].key for replica in self._renewing.under_way}
        seatings = []
        for book, offers in ((self._seating, without_slices(reports, kept)), (self._seating_of_all, reports)):
            seatings.append(
                book.seat(
                    self._goal.models,
                    offers,
                    self._goal.fit_on,
                    counted,
                    pools=self._goal.pools,
                    numbers=self._numbers.replicas,
                    names=self._renewing.names,
                )
            )
            if not kept or not seatings[0].unplaced:
                break
        return min(seatings, key=lambda one: len(one.unplaced))

    def _begin_beside(
        self, reports: Mapping[str, NodeReport], staying: Mapping[str, Seat], taken: Mapping[str, Seat]
    ) -> Mapping[str, Seat]:
        """Another one for the replica whose turn it is, where a slice is free for that."""
        assert self._goal is not None
        begun = None
        if (old := self._rollout.begins) is not None:
            begun = self._renewing.begin(
                old, self._goal.models, reports, self._goal.fit_on, staying, taken, avoid=self._failed_starts.slices
            )
        self._rollout.stay(frozenset(self._renewing.under_way.values()))
        return {begun.replica: begun} if begun is not None else {}

    def _obedient(self, reports: Mapping[str, NodeReport]) -> Mapping[str, NodeReport]:
        """Of the nodes that take orders."""
        return {node: report for node, report in reports.items() if not self._members[node].frozen}

    async def _publish(
        self, reports: Mapping[str, NodeReport], seats: Mapping[str, Seat], waiting: Mapping[str, str]
    ) -> None:
        """Tell every gateway, where something is another than before."""
        assert self._goal is not None
        # Gateways take no table that is older than theirs; a journal that was lost may have been of any generation.
        newest = max((report.generation for report in reports.values()), default=0)
        if newest > self._table.generation:
            self._table = self._table.model_copy(update={"generation": newest})
        table = self._merged.merge(
            self._goal.rows,
            reports,
            seats,
            waiting,
            self._table,
            secret=self._journal.secret,
            leaving=self._rollout.leaving | self._retiring.leaving | self._transitions.leaving,
            unplaced=self._unplaced,
        )
        self._rollout.told(table.generation)
        self._retiring.told(table.generation)
        self._transitions.told(table)
        scaling = self._scaling(seats)
        if table != self._table:
            await self._remember(seats, generation=table.generation)
        if table != self._table or scaling != self._bulletin.latest.scaling:
            await self._tell(table, scaling=scaling)

    def _scaling(self, seats: Mapping[str, Seat]) -> ClusterScaling:
        """What gateways show of it: nothing that is another one at each look."""
        rows = self._scaling_rows(seats)
        blank = {"reason": "", "arrivals_per_second": 0.0, "running": 0, "capacity_reason": "", "ignored": ()}
        return ClusterScaling(
            unplaced=tuple(sorted(self._unplaced)),
            scaling={pool: row.model_copy(update=blank) for pool, row in rows.items()},
            repartition=self._leaders.repartition(running=self._transitions.for_demand),
        )

    def _scaling_rows(self, seats: Mapping[str, Seat]) -> dict[str, ScalingRow]:
        """By pool; who starts beside another one, or is about to go, counts for nothing."""
        return self._numbers.rows(self._renewing.counted(seats).keys() - self._retiring.leaving)

    async def _look(self) -> None:
        self._joined = names = await self._nodes.names()
        heard, now = await self._watch.look(names), self._clock.monotonic()
        for node, last in heard.items():
            if now - last.at_seconds <= LOST_AFTER_SECONDS:
                self._take_in(node, last)
            elif self._members.pop(node, None) is not None:
                log.warning("node %s does not answer; its replicas are seated elsewhere where there is room", node)
        for node in [node for node in self._members if node not in heard]:
            log.warning("node %s is gone; its replicas are seated elsewhere where there is room", node)
            del self._members[node]
        self._bulletin.forget_all_but({member.report.boot for member in self._members.values()})
        self._judge()

    def _take_in(self, node: str, last: Heard) -> None:
        """What it was heard to be, and which table its agent has asked for the next one of."""
        report, before = last.report, self._members.get(node)
        if (newer := max(last.generation, self._bulletin.generation_at(report.boot))) > report.generation:
            report = report.model_copy(update={"generation": newer})
        known = before and (before.report.boot, before.report.versions) == (report.boot, report.versions)
        ordered = before.ordered if before and known else None
        self._members[node] = _Member(report, last.demand, ordered=ordered)

    def _awaits_nodes(self) -> bool:
        """Whether a head that has just begun may take nodes for lost that it has only not heard of yet."""
        known = {seat.node for seat in self._journal.seats.values()} | self._transitions.nodes
        known |= set(() if self._journal.settled else self._joined)
        return self._young and not known <= self._members.keys()

    @property
    def _settled(self) -> bool:
        """Whether it knows of every node that it should, from the head before or by now."""
        return self._journal.settled or not self._young

    @property
    def _young(self) -> bool:
        return self._began_at is None or self._clock.monotonic() - self._began_at <= LOST_AFTER_SECONDS

    def _judge(self) -> None:
        """Which members cannot take part. One of other versions goes on with what it runs."""
        problems = problems_of({node: member.report for node, member in self._members.items()}, self._versions)
        for node, member in self._members.items():
            member.problem = problems.get(node)
            member.frozen = bool(self._versions.differences(member.report.versions))

    def _reports(self) -> dict[str, NodeReport]:
        """Of everybody who takes part. A node of another version goes on with what it has, and gets nothing new."""
        seated: dict[str, set[str]] = {}
        for seat in self._journal.seats.values():
            seated.setdefault(seat.node, set()).add(seat.slice_id)
        free = {node: member.report for node, member in self._members.items() if member.problem is None}
        if self._goal is not None and self._goal.layouts:
            models = {model.name for model in self._goal.models}
            free = {node: in_use(report, self._journal.seats, models) for node, report in free.items()}
        being_cut = {slice_key(node, one) for node, report in free.items() for one in report.cutting}
        reports = dict(without_slices(free, self._transitions.reserved.keys() | self._transitions.going | being_cut))
        for node, member in self._members.items():
            if member.frozen and node in seated:
                kept = tuple(s for s in member.report.slices if s.id in seated[node])
                reports[node] = member.report.model_copy(update={"slices": kept})
        return reports

    def _current(self, reports: Mapping[str, NodeReport], held: Mapping[str, Seat]) -> dict[str, Seat]:
        """Where replicas are: as the journal has it, else as they are held or found running by a head that has lost it."""
        current = {replica: seat for replica, seat in self._journal.seats.items() if seat.node in reports}
        for replica, seat in held.items():
            if seat.node in reports:
                current.setdefault(replica, seat)
        models = {m.name for m in self._goal.models} if self._goal else set()
        for node, report in sorted(reports.items()):
            for replica, slice_id in report.running.items():
                if replica not in current and (model := model_of(replica)) in models:
                    current[replica] = Seat(replica=replica, model=model, node=node, slice_id=slice_id)
        return current

    async def _hold(
        self, seats: Mapping[str, Seat], held: Mapping[str, Seat]
    ) -> tuple[Mapping[str, Owner], Mapping[str, str]]:
        """Give up what is no seat any more, ask for what is. Gives the owners, and what the others wait for."""
        for replica, seat in held.items():
            if seats.get(replica) != seat and self._is_free(replica, seat):
                await self._nodes.let_go(replica)
        owners: dict[str, Owner] = {}
        waiting: dict[str, str] = {}
        for replica, seat in seats.items():
            if replica in held and held[replica] != seat:
                waiting[replica] = f"its engine on {held[replica].key} to finish its requests"
                continue
            hold = await self._nodes.hold(seat)
            if hold.owner is None:
                waiting[replica] = hold.waits_for
            else:
                owners[replica] = hold.owner
        return owners, waiting

    def _is_free(self, replica: str, seat: Seat) -> bool:
        """Whether no engine of it runs there any more, as far as anybody can tell."""
        member = self._members.get(seat.node)
        return member is None or member.report.running.get(replica) != seat.slice_id

    async def _order(self, seats: Mapping[str, Seat], owners: Mapping[str, Owner]) -> None:
        """Every member gets the seats whose slices are held for it; a member that runs something else ends that. One that is frozen is only
        told to whom the engines in its seats belong, which may be others since Ray began anew there.
        """
        assert self._goal is not None
        orders = Orders(
            generation=self._journal.generation,
            config=self._goal.config,
            seats=seats,
            owners=owners,
            turns=self._rollout.turns,
            secret=self._journal.secret,
        )
        due = {
            node: order
            for node, member in self._members.items()
            if (not member.problem or member.frozen)
            and (order := orders.to(node, member.report, member.ordered)) is not None
        }
        await asyncio.gather(*(self._give(node, self._members[node], order) for node, order in due.items()))

    async def _give(self, node: str, member: _Member, order: NodeOrder) -> None:
        try:
            async with asyncio.timeout(ORDER_SECONDS):  # those that hang keep news from the others no longer than one
                await (self._nodes.belong if member.frozen else self._nodes.order)(node, order)
            member.ordered = order
        except Exception as error:  # noqa: BLE001 - it is told again in the next round, or found lost
            member.ordered = None  # only the answer may have been lost
            log.info("node %s could not be told: %s", node, error)

    # ---- what it tells

    async def next_broadcast(self, head: str, after: int, *, timeout_seconds: float) -> Broadcast | None:
        """The newest broadcast, as soon as there is one that is not the one numbered `after` of `head`; None if there is none in time.

        A head that has published nothing yet has nothing to say: the last head's table is better than an empty one.
        """
        return await self._bulletin.after(head, after, timeout_seconds=timeout_seconds)

    async def next_news(self, head: str, after: int, *, timeout_seconds: float, boot: str = "") -> News | None:
        """As `next_broadcast`, as what is another since the one numbered `after` where this head has told that one. The agent of the
        start `boot` has taken that one over.
        """
        return await self._bulletin.news(head, after, timeout_seconds=timeout_seconds, boot=boot)

    def status(self) -> dict[str, object]:
        """For people: nodes, seats, and everything that waits, with its reason."""
        states = {row.replica: row for row in self._table.replicas}
        return {
            "generation": self._table.generation,
            "nodes": [
                {
                    "node": node,
                    "address": member.report.address,
                    "slices": len(member.report.slices),
                    "simulated": member.report.simulated,
                    "problem": member.problem,
                    "notes": list(member.report.notes),
                    "laid_out": member.report.laid_out,
                    "layouts": list(member.report.layouts),
                }
                for node, member in sorted(self._members.items())
            ],
            "layouts": list(
                named_by_nobody(m.report.layouts_missing for m in self._members.values() if m.ordered and not m.frozen)
            ),
            "replicas": [
                {
                    "replica": replica,
                    "slice": seat.key,
                    "state": states[replica].state.value if replica in states else ReplicaState.PENDING.value,
                    "reason": (states[replica].reason if replica in states else None) or self._staying.get(replica),
                    "in_place_of": self._renewing.under_way.get(replica),
                }
                for replica, seat in sorted(self._journal.seats.items())
            ],
            "unplaced": dict(self._unplaced),
            "failed_starts": {model: one.as_public() for model, one in self._failed_starts.failed.items()},
            "planned": {model: planned.as_public() for model, planned in self._numbers.planned.items()},
            "transition": self._transitions.in_short(),
            "leader": self._leaders.as_public(self._clock.monotonic()),
            "scaling": {
                pool: row.model_dump() | {"short": row.short}
                for pool, row in self._scaling_rows(self._journal.seats).items()
            },
        }

    async def survey(self) -> Survey:
        """The cluster as plans see it; every node is asked for its GPUs. Raises NotSurveyed where one cannot tell them."""
        return await take_survey(self._nodes, self._standing)

    def _standing(self) -> Standing:
        states = {row.replica: row.state.value for row in self._table.replicas}
        return Standing(
            nodes={
                node: member.frozen
                for node, member in sorted(self._members.items())
                if member.problem is None or member.frozen  # who offers what another one has takes no part
            },
            seats=self._journal.seats,
            states=states,
            unplaced=self._unplaced,
            reserved=self._transitions.reserved,
            numbers=self._numbers.replicas,
            scaling=self._scaling_rows(self._journal.seats),
            running=self._numbers.running,
            config=self._journal.config,
            aimed=self._goal.config if self._goal is not None else None,
            changing=self._rollout.leaving | self._retiring.leaving | self._renewing.successors.keys(),
        )

    def tell(self, told: LeaderStatus) -> None:
        """What the process that leads plans, for people and gateways."""
        self._leaders = Leaders(told, self._clock.monotonic())

    def transition(self) -> dict[str, object] | None:
        """The steps that are being taken, or were taken last: as `sliceway apply` tells, with `under_way` and `begun`."""
        return self._transitions.as_public()

    async def carry_out(self, transition: Transition, *, allow_mode_change: bool = False, why: Why = "apply") -> None:
        """Have a plan carried out, from the next round on; `transition` tells how far it is.

        Raises StalePlan where anything that it was made from is another by now, or anything else is being changed, NotSurveyed.
        """
        found = await self.survey()
        async with self._in_round:
            check_plan(transition, found, self._standing())
            config, before = self._journal.config, self._transitions.journal
            self._transitions.begin(
                transition,
                self._clock.now(),
                config,
                found.reserved,
                allow_mode_change=allow_mode_change,
                why=why,
                following=self._numbers.following,
            )
            try:
                await self._remember(self._journal.seats)
            except BaseException:  # whoever asked is told that it is not begun, and so it is not
                self._transitions.restore(before, config)
                raise

    async def _tell(
        self,
        table: RoutingTable,
        *,
        files: Mapping[str, str] | None = None,
        scaling: ClusterScaling | None = None,
    ) -> None:
        self._table = table
        relays = relays_of(node for node, member in self._members.items() if not member.frozen)
        await self._bulletin.tell(
            table, self._goal.config if self._goal else "", files=files, scaling=scaling, relays=relays
        )

    async def _remember(self, seats: Mapping[str, Seat], *, generation: int | None = None) -> None:
        """Write the journal before acting on it."""
        async with self._writing:
            assert self._goal is not None
            await self._write(
                {
                    "generation": self._journal.generation if generation is None else generation,
                    "config": self._goal.config,
                    "seats": dict(seats),
                    "pools": dict(self._goal.pools),
                    "numbers": dict(self._numbers.replicas),
                    "names": self._renewing.names,
                    "transitions": self._transitions.journal,
                    "successors": dict(self._renewing.successors),
                    "failed_starts": dict(self._failed_starts.failed),
                    "settled": self._settled,
                }
            )

    async def _write(self, update: Mapping[str, object]) -> None:
        """Have the journal with this in it, where it has something else. One at a time: `_writing`."""
        journal = self._journal.model_copy(update=update)
        if journal != self._journal or self._unsure:
            self._unsure = True  # a write that fails may have been one, and is to be undone
            await self._store.save(journal.model_dump_json().encode())
            self._journal, self._unsure = journal, False
