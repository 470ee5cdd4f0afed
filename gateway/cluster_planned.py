"""`fleet.partition: planned` on a cluster: its leader plans when nodes have joined, and has the head carry out what takes nothing away.

On one machine `up` plans before anything runs. A cluster's nodes come one after the other, and most of them when replicas serve: so of a
plan only those steps are taken that lead to replicas which do not run yet, or to slices that are kept for other work, and need nobody to
leave and no GPU's MIG mode to change. The rest is said, and is for `sliceway apply CONFIG --ray`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gateway.cluster_following import follow
from gateway.cluster_leader import Seen, Work
from gateway.cluster_planning import ClusterPlan, layouts_differ, plan_cluster, same_configuration
from gateway.cluster_repartitioning import tellings
from gateway.config import Config
from model_registry.words import counted
from placement.assign import stem_of
from placement.autoscale.attempts import Result
from placement.clock import Clock
from placement.cluster.errors import ClusterError, NotSurveyed
from placement.cluster.survey import Survey
from placement.errors import StalePlan
from placement.planner.types import WHOLE
from placement.repartitioning import Repartitioned
from placement.status import LeaderStatus
from placement.transition.steps import Step, Transition

SETTLE_SECONDS = 3.0
"""So long no node comes or goes before it is planned: those that join at about the same time are planned together."""
AGAIN_SECONDS = 5.0, 60.0
"""Until it is tried again where something else was in the way: at first, and at most, for it is twice as long each time."""
FAILED_SECONDS = 60.0, 1800.0
"""The same for what has failed, which may have been mended by then."""
_DOUBLINGS = 20
_BY_HAND = "sliceway apply CONFIG --ray HOST:PORT"


class ForConfiguration:
    """The leader's `Reason`: nodes that no plan has counted on yet."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._planned: frozenset[str] = frozenset()
        self._seen: frozenset[str] = frozenset()
        self._not_before = 0.0
        self._in_vain = 0
        self._last: Result = "unchanged"
        self._config: Config | None = None
        self._changed = False
        self._counts: frozenset[str] = frozenset()
        self._told: tuple[str, ...] = ()

    def look(self, seen: Seen) -> bool:
        """When nodes that are new have been there for a moment, with their GPUs cut as `fleet.layouts` says."""
        if seen.config.fleet.partition != "planned":
            self._planned, self._told = frozenset(), ()
            return False
        there = _ready_nodes(seen.status)
        now = self._clock.monotonic()
        if there != self._seen or seen.config is not self._config:
            self._seen, self._config, self._changed = there, seen.config, True
            self._not_before, self._in_vain = now + SETTLE_SECONDS, 0
        self._planned &= there  # one that was lost is new when it comes back
        return bool(there - self._planned) and now >= self._not_before and not _under_way(seen.status)

    def begin(self, seen: Seen) -> None:
        """It is attempted from here on, with the nodes of this moment."""
        self._counts, self._changed = _ready_nodes(seen.status), False

    def attempt(self, work: Work) -> Repartitioned:
        """Plan, and have the head carry out what takes nothing away. Raises ClusterError, and what planning raises."""
        config = work.seen.config
        try:
            survey = work.head.survey()
        except NotSurveyed as error:
            return Repartitioned("busy", str(error))
        if not same_configuration(config, survey):
            return Repartitioned("busy", "the head does not work by this configuration yet")
        if not survey.gpus:
            return Repartitioned("unchanged", "")
        if (differs := layouts_differ(config, survey)) is not None:
            return Repartitioned("failed", f"{differs} is not cut as fleet.layouts says; then: {_BY_HAND}")
        return _carried_out(work, plan_cluster(config, survey))

    def show(self, step: str) -> None:
        """What is done at the moment."""
        self._told = (f"planned: {step}",)

    def end(self, seen: Seen, found: Repartitioned) -> None:
        """The attempt is over; one that came to nothing is tried again, later each time for as long as nodes, configuration and outcome
        are the same.
        """
        if found.result != self._last:
            self._last, self._in_vain = found.result, 0
        if found.result not in ("busy", "failed"):
            self._planned |= self._counts
        elif not self._changed:  # meanwhile, and then it is tried as soon as that has settled
            first, most = AGAIN_SECONDS if found.result == "busy" else FAILED_SECONDS
            wait = min(first * 2.0 ** min(self._in_vain, _DOUBLINGS), most)
            self._not_before, self._in_vain = self._clock.monotonic() + wait, self._in_vain + 1
        self._told = (f"fleet.partition: {found.reason}",) if found.reason else ()

    def told(self, seen: Seen, so_far: LeaderStatus) -> LeaderStatus:
        """With what came of it."""
        return so_far.model_copy(update={"planned": self._told})


def _ready_nodes(status: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(n["node"] for n in status.get("nodes", ()) if n["problem"] is None and n.get("laid_out", True))


def _under_way(status: Mapping[str, Any]) -> bool:
    transition = status.get("transition")
    return bool(transition and transition["under_way"])


def _carried_out(work: Work, plan: ClusterPlan) -> Repartitioned:
    transition = plan.answer.transition
    if transition is None:
        return Repartitioned("failed", f"the plan is not carried out: {plan.answer.blocked}")
    additions = without_taking_away(transition, plan.survey)
    left = _what_is_left(transition, additions, plan)
    if not additions:
        return Repartitioned("unchanged", "; ".join(left))
    try:
        work.head.carry_out(plan.survey, additions, "configuration")
    except StalePlan as error:
        return Repartitioned("busy", error.message)
    outcome = follow(tellings(work), lambda step, what: work.say(str(step)))
    done = tuple(str(step) for step in outcome.done)
    if isinstance(outcome.error, StalePlan | ClusterError):
        return Repartitioned("busy", f"the plan was stopped at {outcome.failed}: {outcome.error}", done)
    if not outcome.ok:
        return Repartitioned("failed", f"the plan stopped at {outcome.failed}: {outcome.error}", done)
    return Repartitioned("done", "; ".join((f"{counted(len(done), 'step')} of the plan done", *left)), done)


def _what_is_left(whole: Transition, taken: Transition, plan: ClusterPlan) -> list[str]:
    """What the plan says and is not done, and what it cannot do either."""
    left = len(whole.steps) - len(taken.steps)
    more = [f"{counted(left, 'step')} more would move or end who serves, or switch MIG: {_BY_HAND}"] if left else []
    return more + [f"not met: {unmet.demand}: {unmet.reason}" for unmet in plan.answer.plan.unmet]


def without_taking_away(transition: Transition, survey: Survey) -> Transition:
    """What of `transition` leads to replicas that have no seat yet and to reserved slices, as far as nobody has to leave for it and
    no GPU's MIG mode changes; numbered anew. Replicas that have a seat stay where they are.

    Nothing comes of models of which somebody leaves: who is new there takes another one's place, and beside all who stay would be one
    too many, or one where `spread` allows none.
    """
    steps = {step.number: step for step in transition.steps}
    off = {gpu.uuid for gpu in survey.gpus if not gpu.mig}
    changing = {_model_of(step) for step in transition.steps if step.kind in ("drain", "stop")}

    def adds(step: Step) -> bool:
        if step.kind in ("create", "destroy"):  # of one that is off, the first instance turns MIG on
            return step.place.placement != WHOLE and step.place.gpu not in off
        return (
            step.kind in ("start", "check") and step.replica not in survey.replicas and _model_of(step) not in changing
        )

    wanted = [
        s
        for s in transition.steps
        if _is_wanted(s) and all(adds(one) for one in (s, *(steps[n] for n in _before(s, steps))))
    ]
    kept = sorted({number for step in wanted for number in (step.number, *_before(step, steps))})
    numbers = {number: anew for anew, number in enumerate(kept)}
    taken = tuple(
        replace(steps[n], number=numbers[n], after=tuple(numbers[before] for before in steps[n].after)) for n in kept
    )
    seats = {replica: now.seat.key for replica, now in survey.replicas.items()}
    seats |= {str(step.replica): step.place.slice_id for step in taken if step.kind == "start"}
    return replace(transition, steps=taken, seats=seats)


def _is_wanted(step: Step) -> bool:
    """Whether it is what a plan is for, and not only what has to be done before."""
    return step.kind in ("start", "check") or (step.kind == "create" and step.reserved is not None)


def _model_of(step: Step) -> str:
    return stem_of(str(step.replica)).partition("@")[0]


def _before(step: Step, steps: Mapping[int, Step]) -> set[int]:
    """The numbers of all steps that have to be done before it."""
    found: set[int] = set()
    left: Sequence[int] = step.after
    while left:
        new = [number for number in left if number not in found]
        found.update(new)
        left = [before for number in new for before in steps[number].after]
    return found
