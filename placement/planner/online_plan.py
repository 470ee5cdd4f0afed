"""A plan between full plans: every demand brought to its number by the online rule, and nobody moved who may stay.

Nothing is searched for and nothing is proven but that demand is met: no GPU is emptied to save its price, and nobody makes
room for somebody else. That takes milliseconds, and a full plan afterwards may be cheaper or meet more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from placement.errors import PlanError
from placement.planner.adjusted import disturbance, siblings_of, standing_after, without_leavers
from placement.planner.explain import unmet
from placement.planner.master import MOVE
from placement.planner.online import adjust
from placement.planner.shapes import Shaper
from placement.planner.staying import Standing
from placement.planner.types import FleetGpu, FleetPlan, Level, Objective, Problem
from placement.planner.wants import Want, bound_to_stop, wants_of
from placement.planner.written import decisions, planned_gpus

_FULL = "Make a full plan: leave --online out."


def place_online(problem: Problem) -> FleetPlan:
    """A plan for `problem` that leaves every replica where it is which may stay there.

    Replicas stop that are too many, that nobody asks for, or that must leave their slice (its GPU is draining, or it is none of
    the demand's options any more; only these can move). Then each demand gets what it lacks, the most important first. What
    finds no room is told in `unmet`. Bounds are those that hold for any plan: price has none. Raises PlanError where only a
    full plan will do: reservations still to be made, and replicas that run closer together than their limits allow.
    """
    wants = wants_of(problem)
    _refuse_reservations(wants)
    stay = standing_after(problem, _adjusted(problem), wants)
    if stay is None:
        raise PlanError(
            "replicas of one model run closer together than its spread allows, and --online moves nobody", remedy=_FULL
        )
    gpus = planned_gpus(problem, wants, stay.seating)
    return FleetPlan(
        gpus=gpus,
        decisions=decisions(problem, wants, gpus),
        unmet=unmet(problem, wants, gpus),
        levels=tuple(_levels(problem, wants, stay)),
        fingerprint=problem.fingerprint,
        online=True,
    )


def _refuse_reservations(wants: Sequence[Want]) -> None:
    for want in wants:
        if want.reservation is not None and want.floor:
            raise PlanError(
                f"slices are still to be made for other work ({want.floor} x {want.reservation.profile} for "
                f"{want.reservation.note!r}), and --online only places models",
                where="fleet.reserve",
                remedy=_FULL,
            )


def _adjusted(problem: Problem) -> Sequence[FleetGpu]:
    """The fleet with each demand at its number, as far as there is room.

    A large replica that comes can make smaller ones superfluous, and their room may be what an earlier demand lacked, so this
    goes on until nothing changes. A demand that is met, with nothing to spare, is not touched again: rounds are fewer than
    demands.
    """
    names = {d.name for d in problem.demands}
    order = sorted(problem.demands, key=lambda d: (-d.priority, d.name))
    headroom, left = problem.constraints.headroom_ratio, problem.constraints.max_layout_changes
    gpus: Sequence[FleetGpu] = [without_leavers(g, names) for g in problem.gpus]
    newcomers: set[str] = set()
    changed = True
    while changed:
        changed = False
        for demand in order:
            done = adjust(gpus, demand, headroom_ratio=headroom, add=False, newcomers=newcomers)
            gpus, changed = done.gpus, changed or bool(done.stopped)
        for demand in order:
            siblings = siblings_of(demand, order)
            done = adjust(gpus, demand, headroom_ratio=headroom, siblings=siblings, most_changes=left)
            gpus, changed = done.gpus, changed or bool(done.added)
            newcomers.update(a.replica for a in done.added)
            left = None if left is None else left - sum(a.changes for a in done.added)
    return gpus


def _levels(problem: Problem, wants: Sequence[Want], stay: Standing) -> Iterator[Level]:
    """What the plan comes to, with bounds that need no search."""
    shaper = Shaper(wants)
    lost, changes = disturbance(problem, wants, stay.seating)
    unavoidable = float(sum(bound_to_stop(wants, problem.gpus).values()))
    for objective in problem.order:
        match objective:
            case Objective.DEMAND:
                yield Level(objective, sum(stay.missing.values()), 0.0)
            case Objective.PRICE:
                yield Level(objective, stay.price_per_hour, 0.0)
            case Objective.DISTURBANCE:
                value = lost + changes / MOVE
                yield Level(objective, value, min(value, unavoidable))
            case Objective.FRAGMENTATION:
                used = stay.seating.used
                yield Level(objective, float(sum(shaper.fragmentation(g, used[g.id]) for g in problem.gpus)), 0.0)
