"""`fleet.layouts` on a cluster that is at work, as steps that its head takes: what `sliceway apply --ray` does before it carries a plan out.

As on one machine slices that stay are not touched, and one that has a replica goes only where engines may be drained. The steps are cuts,
and no seats: whoever had to leave is seated again by the head, on what is there then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from model_registry.geometry import Placement
from placement.assign import stem_of
from placement.cluster.survey import Survey, layouts_of
from placement.errors import ModeBlocked, ModeChangeNeeded, SliceInUse
from placement.partition import Action, Complete, Create, Destroy, GpuOutcome, GpuPlan, LayoutRule, Obstacle, SetMode
from placement.partition.diff import refuse
from placement.planner.types import WHOLE
from placement.transition.steps import Kind, Place, Step, Transition

_DRAIN = "Plan so that it may stay, or have its replica end first: --drain."


def layout_transition(
    survey: Survey, plans: Sequence[GpuPlan], *, drain: bool = False, allow_mode_change: bool = False
) -> Transition:
    """The steps that make GPUs hold what `plans` (`survey.layouts_of`) say; none where they do. The GPUs take no notice of each other.

    Raises SliceInUse where a replica or another process is on what would go, and `drain` does not let replicas end; ModeChangeNeeded and
    ModeBlocked for a change of MIG mode that is not allowed or not possible.
    """
    seated = {now.seat.key: replica for replica, now in survey.replicas.items()}
    found = [o for plan in plans for o in plan.obstacles if not _is_ours(o, seated, allow_mode_change)]
    _refuse(found)
    if not drain and (busy := {key: seated[key] for plan in plans for key in _going(plan) if key in seated}):
        told = ", ".join(f"{replica} on {key}" for key, replica in sorted(busy.items()))
        raise SliceInUse(f"would have to end for fleet.layouts: {told}. Nothing was changed", remedy=_DRAIN)
    made = _Steps()
    for plan in plans:
        _steps_of(plan, seated, made)
    seats = {replica: now.seat.key for replica, now in survey.replicas.items()}
    return Transition(tuple(made.steps), survey.fingerprint, "", seats=seats)


def outcomes(plans: Sequence[GpuPlan], now: Survey, rules: Sequence[LayoutRule]) -> tuple[GpuOutcome, ...]:
    """What became of each GPU that the rules name, as `sliceway apply` tells of one machine's. `now` was taken afterwards."""
    there = {p.gpu.uuid: p for p in layouts_of(now, rules)}
    return tuple(_outcome(plan, there.get(plan.gpu.uuid)) for plan in plans if plan.wanted is not None)


def _outcome(plan: GpuPlan, now: GpuPlan | None) -> GpuOutcome:
    if now is None:
        return GpuOutcome(plan, "failed", None)
    if not plan.actions:
        return GpuOutcome(plan, "unchanged", now.gpu)
    return GpuOutcome(plan, "failed" if now.actions else "changed", now.gpu)


def _is_ours(obstacle: Obstacle, seated: Mapping[str, str], allow_mode_change: bool) -> bool:
    """Whether it is out of the way by itself: an engine that is drained or told by name, a change of mode that is allowed."""
    return (
        obstacle.slice in seated if obstacle.kind == "process" else obstacle.kind == "mode-change" and allow_mode_change
    )


def _refuse(found: Sequence[Obstacle]) -> None:
    kinds = {o.kind for o in found}
    if "mode-change" in kinds:
        raise refuse(found, ModeChangeNeeded)
    if found:
        raise refuse(found, SliceInUse if kinds == {"process"} else ModeBlocked)


def _going(plan: GpuPlan) -> Iterator[str]:
    """The slices that go, by their names in the cluster."""
    for action in plan.actions:
        match action:
            case Destroy(instance=instance) | Complete(instance=instance):
                yield f"{plan.gpu.uuid}/{instance.name}"
            case SetMode(on=True):
                yield plan.gpu.uuid
            case _:
                pass


@dataclass(slots=True)
class _Steps:
    steps: list[Step] = field(default_factory=list)

    def add(self, kind: Kind, place: Place, after: Sequence[int] = (), replica: str | None = None) -> int:
        """Its number."""
        demand = stem_of(replica) if replica is not None else None
        self.steps.append(Step(len(self.steps), kind, place, replica, demand, after=tuple(after)))
        return len(self.steps) - 1


def _steps_of(plan: GpuPlan, seated: Mapping[str, str], made: _Steps) -> None:
    """Who leaves, what goes after that, and what comes when all of it has gone."""
    before: list[int] = []
    for key in _going(plan):
        place = Place.parse(key)
        ended: list[int] = []
        if (replica := seated.get(key)) is not None:
            drained = made.add("drain", place, (), replica)
            ended = [made.add("stop", place, (drained,), replica)]
        if _goes_by_itself(plan, place):
            before.append(made.add("destroy", place, ended))
        else:
            before += ended
    for placement in _coming(plan.actions):
        made.add("create", Place(plan.gpu.uuid, placement), tuple(before))


def _goes_by_itself(plan: GpuPlan, place: Place) -> bool:
    """Not an instance that only lacks its compute instance, which is made complete where it is."""
    completed = (a.instance.placement for a in plan.actions if isinstance(a, Complete))
    return place.placement not in set(completed)


def _coming(actions: Sequence[Action]) -> Iterator[Placement]:
    for action in actions:
        match action:
            case Create(placement=placement):
                yield placement
            case Complete(instance=instance) if instance.placement is not None:
                yield instance.placement
            case SetMode(on=False):
                yield WHOLE
            case _:
                pass
