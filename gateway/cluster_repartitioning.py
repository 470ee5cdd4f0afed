"""Cutting GPUs anew for demand on a cluster, as its leader has it done: weighed and tried by the rules of one machine, carried out by the head.

Nothing is kept here that would be missed: what is under way is in the head's journal, with what it is for, so another leader goes on
from there. Replicas that demand has brought stay where they are and go when demand does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gateway.cluster_following import LOOK_SECONDS, follow
from gateway.cluster_leader import LedHead, Seen, Work
from gateway.cluster_planning import layouts_differ, repartition_for, same_configuration, wish_of
from placement.autoscale.attempts import Result
from placement.clock import Clock
from placement.cluster.errors import ClusterError, NotSurveyed
from placement.errors import StalePlan
from placement.repartitioning import Repartitioned, Tries, Wish
from placement.status import LeaderStatus
from placement.transition import Outcome, Step

NOTHING = Wish({}, {}, {})


class ForDemand:
    """The leader's `Reason`: replicas that demand asks for stay without a slice."""

    def __init__(self, clock: Clock) -> None:
        self._tries = Tries(clock)

    def look(self, seen: Seen) -> bool:
        """Once they have been short of slices for long enough; and where another leader's transition for demand is under way."""
        policy = seen.config.fleet.autoscale
        due = self._tries.look(policy, _short(seen.status), begun=_for_demand(seen.status), proposes=True)
        return due is not None

    def begin(self, seen: Seen) -> None:
        """It is attempted from here on."""
        scaling = seen.status.get("scaling", {})
        asked = {pool: int(row["replicas"]) for pool, row in scaling.items()}
        self._tries.begin(NOTHING if _for_demand(seen.status) else Wish(asked, {}, {}))

    def attempt(self, work: Work) -> Repartitioned:
        """Weigh it, and have the head carry it out where that is worth it and allowed. Raises ClusterError, and what planning raises."""
        if _for_demand(work.seen.status):
            return _ended(work, "what a leader before this one had begun is finished")
        transition = work.seen.status.get("transition")
        if transition and transition["under_way"]:
            return Repartitioned("busy", "another plan is being carried out: sliceway node list shows how far it is")
        return _weighed(work)

    def show(self, step: str) -> None:
        """What is done at the moment."""
        self._tries.show(step)

    def end(self, seen: Seen, found: Repartitioned) -> None:
        """The attempt is over."""
        self._tries.end(seen.config.fleet.autoscale, found)

    def told(self, seen: Seen, so_far: LeaderStatus) -> LeaderStatus:
        """With what was tried, and how that ended."""
        return so_far.model_copy(update={"repartition": self._tries.status(seen.config.fleet.autoscale)})


def _weighed(work: Work) -> Repartitioned:
    config = work.seen.config
    try:
        survey = work.head.survey()
    except NotSurveyed as error:  # a node that was lost a moment ago, or one that is busy
        return Repartitioned("busy", str(error))
    if not same_configuration(config, survey):
        return Repartitioned("busy", "the head does not work by this configuration yet")
    if wish_of(config, survey) is None:
        return Repartitioned(
            "unchanged", "free slices do, or what finds none has a replica on slices that are not planned"
        )
    if (differs := layouts_differ(config, survey)) is not None:
        return Repartitioned("busy", f"{differs} is not cut as fleet.layouts says yet")
    proposal = repartition_for(config, survey)
    if proposal is None:
        return Repartitioned("unchanged", "free slices do, or no way of cutting GPUs would serve more")
    if not proposal.worthwhile:
        return Repartitioned("unchanged", f"not worth what it disturbs: {proposal.reason}")
    if not proposal.automatic:
        return Repartitioned("proposed", proposal.reason)
    try:
        work.head.carry_out(survey, proposal.transition, "demand")
    except StalePlan as error:  # something has moved while it was planned; no step was taken
        return Repartitioned("busy", error.message)
    return _ended(work, proposal.reason)


def _ended(work: Work, reason: str) -> Repartitioned:
    """What came of the transition that the head carries out."""

    def watch(step: Step, what: str) -> None:
        if what == "begun":
            work.say(str(step))

    return _told(follow(tellings(work), watch), reason)


def _told(outcome: Outcome, reason: str) -> Repartitioned:
    done = tuple(str(step) for step in outcome.done)
    if outcome.ok:
        return Repartitioned("done", reason, done)
    left = f"{len(outcome.not_done)} of {len(outcome.done) + len(outcome.not_done)} steps are not done"
    result: Result = "busy" if isinstance(outcome.error, StalePlan | ClusterError) else "failed"
    return Repartitioned(result, f"{outcome.failed}: {outcome.error}; {left}", done)


def tellings(work: Work) -> Iterator[Mapping[str, Any] | None]:
    """What the head tells of its transition, again and again until this process is to end; None where there is no head at the moment."""
    while not work.pause(LOOK_SECONDS):
        yield _telling(work.head)


def _telling(head: LedHead) -> Mapping[str, Any] | None:
    try:
        return head.transition()
    except ClusterError:
        return None


def _short(status: Mapping[str, Any]) -> bool:
    """Whether replicas that demand asks for have no slice."""
    return any(row["short"] for row in status.get("scaling", {}).values())


def _for_demand(status: Mapping[str, Any]) -> bool:
    """Whether the head cuts GPUs anew for demand."""
    transition = status.get("transition")
    return bool(transition and transition["under_way"] and transition.get("why") == "demand")
