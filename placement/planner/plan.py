"""A plan for a fleet: profile, number and place of every replica, chosen together.

Two programs, because objectives differ in what they depend on. Demand and price do not depend on who runs where: GPUs
of one product are alike but for what is reserved on them, and the program is as small for ten thousand GPUs as for ten.
What it proves holds for every plan. Disturbance and fragmentation do depend on what runs: the second program sees every
different state, and is held at the demand and price of the first.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from placement.errors import PlanError
from placement.planner.adjusted import adjusted, disturbance
from placement.planner.carry import carried, same_shapes
from placement.planner.explain import unmet
from placement.planner.master import MOVE, NOTHING, Answer, Master
from placement.planner.numbers import Cheapest, cheapest
from placement.planner.places import placed, realised
from placement.planner.seats import Seating, seat
from placement.planner.shapes import GpuClass, Shaper
from placement.planner.solver import Limits
from placement.planner.staying import Standing, by_priority, standing
from placement.planner.types import FleetPlan, Level, Objective, Problem
from placement.planner.wants import Want, bound_to_stop, wants_of
from placement.planner.written import decisions, planned_gpus

_SMALL = 64
"""Up to so many GPUs a plan may be made GPU by GPU, where limits per GPU and node ask for it."""

_TINY = 16
"""Up to so many GPUs the least disturbance is always looked for among all plans."""

_MANY = 400
"""On larger fleets that run, only shapes that lose nobody and GPUs that are cut anew are looked at."""

_FIRST_TRY = 0.06
"""On all but tiny fleets of up to `_SMALL` GPUs, so much of the work shows whether placements one by one give an answer."""

_SHAPES = 0.25
"""On all but tiny fleets that run, so much of the work for what matters less goes into each program over shapes."""

_FEW_NODES = 200
"""So much of a search tree is looked through for what matters less."""

_FULL_NODES = 20
"""So much of one is looked through for an answer without any fragmentation: it is there at once, or hard to find."""

_UNDISTURBED = 0.2
"""Where nobody runs, layout changes disturb nobody: on all but tiny fleets so many more than the fewest will do."""

_LARGE = 100
"""From so many GPUs on a hundredth of the price is not worth the time of the proof, if nobody says otherwise."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A complete answer: who sits where, and how good it is."""

    seating: Seating
    levels: tuple[Level, ...]


def plan(problem: Problem, limits: Limits | None = None, *, clock: Callable[[], float] = time.monotonic) -> FleetPlan:
    """The best plan for `problem`, by its objectives in their order.

    What cannot be met is told in `unmet` with the smallest change that would help, and is no error. `limits` bounds each
    search; unset, the optimum is asked for up to 100 GPUs and a proven hundredth beyond. Equal problems have equal plans,
    unless their seconds by `clock` ran out: then the plan is not `reproducible`. Raises PlanError if no answer was found
    with the work allowed.
    """
    limits = (limits or Limits(gap_ratio=0.01 if len(problem.gpus) > _LARGE else 0.0)).watched(clock)
    wants = wants_of(problem)
    found = _search(problem, wants, limits)
    gpus = planned_gpus(problem, wants, found.seating)
    return FleetPlan(
        gpus=gpus,
        decisions=decisions(problem, wants, gpus),
        unmet=unmet(problem, wants, gpus, limits.watch),
        levels=found.levels,
        fingerprint=problem.fingerprint,
        reproducible=limits.watch is None or not limits.watch.expired,
    )


def _search(problem: Problem, wants: Sequence[Want], limits: Limits) -> _Found:
    stay = standing(problem, wants)
    first, rest = _split(problem)
    leaving = bound_to_stop(wants, problem.gpus)
    shaper = Shaper(
        wants, surplus=[name for name, count in leaving.items() if count], tidy_first=_tidy_first(problem.order)
    )
    reached = None
    if first:
        small = len(problem.gpus) <= _SMALL and not limits.gap_ratio
        classes = shaper.coarse(problem.gpus, maximal=small)
        coarse = Master(classes, wants, problem.constraints, keep=False, slack=small)
        reached = _settled(coarse, first, limits, fewest=_bare(problem))
        if stay and rest[:1] == (Objective.DISTURBANCE,) and _as_good(stay, reached.answer, wants, limits):
            return _stayed(problem, wants, shaper, stay, reached.answer.levels, bound=0.0)
        large = len(problem.gpus) > _TINY and _runs(problem)
        if large and rest[:1] == (Objective.DISTURBANCE,) and Objective.PRICE in first:
            moving_few = adjusted(problem, wants, _allowed(_price(reached.answer), limits))
            if moving_few and _as_good(moving_few, reached.answer, wants, limits):
                bound = float(sum(leaving.values()))
                return _stayed(problem, wants, shaper, moving_few, reached.answer.levels, bound=bound)
    detail = _Detail(problem, wants, shaper, sum(leaving.values()), limits)
    found = (detail.few(reached, rest) if reached else None) or detail.search(reached, rest)
    true = _told_truly(problem, wants, found)
    if len(problem.gpus) <= (_SMALL if found.seating.unseated else _TINY if true is not found else 0):
        found = detail.search(None, problem.order, by_gpu=True)
        true = _told_truly(problem, wants, found)
    return true


def _told_truly(problem: Problem, wants: Sequence[Want], found: _Found) -> _Found:
    """The same with what it really disturbs, where limits per GPU and node move replicas that the program let stay."""
    lost, changes = disturbance(problem, wants, found.seating)
    true = lost + changes / MOVE
    if all(level.objective is not Objective.DISTURBANCE or true <= level.value + 1e-6 for level in found.levels):
        return found
    levels = (replace(x, value=true) if x.objective is Objective.DISTURBANCE else x for x in found.levels)
    return replace(found, levels=tuple(levels))


@dataclass(frozen=True, slots=True)
class _Reached:
    """What the first program settled, and the program, which holds it. `cheapest` is how a small fleet's price was found."""

    few: Master
    answer: Answer
    cheapest: Cheapest | None = None

    def hold_numbers(self, master: Master) -> None:
        """Use as many GPUs of each class in another program, where it is known how many these are."""
        if self.cheapest and self.cheapest.numbers is not None:
            for group, number in zip(self.few.classes, self.cheapest.numbers, strict=True):
                master.use(group.members, number)


def _settled(master: Master, objectives: Sequence[Objective], limits: Limits, *, fewest: bool) -> _Reached:
    """The `objectives` minimised in a coarse program. `fewest`: the number of replicas matters next."""
    both = tuple(objectives) == (Objective.DEMAND, Objective.PRICE)
    if both and master.slack and (found := cheapest(master, limits, fewest=fewest)):
        return _Reached(master, master.answer(found.levels), found)
    if both and not master.slack and (levels := master.meet_at_least_price(limits)):
        return _Reached(master, master.answer(levels))
    return _Reached(master, master.answer(_minimised(master, objectives, limits)))


def _split(problem: Problem) -> tuple[tuple[Objective, ...], tuple[Objective, ...]]:
    """The objectives that can be settled without looking at what runs, and the others."""
    order = problem.order
    bare = (Objective.DEMAND, Objective.PRICE)
    ahead = next((n for n, objective in enumerate(order) if objective not in bare), len(order))
    if problem.constraints.max_layout_changes is not None:
        ahead = 0
    return order[:ahead], order[ahead:]


def _tidy_first(order: Sequence[Objective]) -> bool:
    """Whether fragmentation counts for more than disturbance."""
    ranks = {objective: rank for rank, objective in enumerate(order)}
    last = len(order)
    return ranks.get(Objective.FRAGMENTATION, last) < ranks.get(Objective.DISTURBANCE, last)


def _minimised(master: Master, objectives: Sequence[Objective], limits: Limits) -> tuple[Level, ...]:
    levels = []
    for objective in objectives:
        level = master.minimise(objective, limits)
        if level is None:
            raise PlanError(
                f"no plan was found within the work allowed while looking for the least {objective.value}",
                remedy="Plan parts of the fleet by themselves.",
            )
        levels.append(level)
    return tuple(levels)


@dataclass(frozen=True, slots=True)
class _Detail:
    """The second program. `unavoidable` replicas have to leave their place under any plan."""

    problem: Problem
    wants: Sequence[Want]
    shaper: Shaper
    unavoidable: int
    limits: Limits

    def search(self, reached: _Reached | None, rest: Sequence[Objective], *, by_gpu: bool = False) -> _Found:
        """The best plan with what is `reached` held and `rest` minimised."""
        narrow = reached is not None and rest[:1] == (Objective.DISTURBANCE,)
        lost = 0 if narrow and any(i.replica for g in self.problem.gpus for i in g.instances) else None
        classes, master, levels = self._first(reached, rest[:1], lost, by_gpu=by_gpu)
        levels = (*levels, *_minimised(master, rest[1:], self._brief))
        if not self.shaper.complete:
            levels = tuple(self._unproven(level) for level in levels)
        levels = (*(reached.answer.levels if reached else ()), *levels)
        return _Found(seat(classes, master.answer(levels), self.wants), levels)

    def few(self, reached: _Reached, rest: Sequence[Objective]) -> _Found | None:
        """The best plan of a small fleet, by programs that are made for it; None where they do not cover it."""
        if tuple(rest) != (Objective.DISTURBANCE, Objective.FRAGMENTATION):
            return None
        if _bare(self.problem):
            return self._new(reached) if reached.few.slack else None
        return self._changed(reached) if _runs(self.problem) and len(self.problem.gpus) <= _MANY else None

    def _new(self, reached: _Reached) -> _Found | None:
        """Where nothing is there: the fewest replicas, since each is an instance to create, then the tidiest layouts."""
        few = reached.few
        known = reached.cheapest.replicas if reached.cheapest else None
        changes = few.count(self.limits) if known is None else few.counted(known)
        economy = few.economise(self.limits)
        if changes is None or economy is None:
            return None
        settled = few.answer(())
        classes = self.shaper.detailed(self.problem.gpus)
        if full := self._full(classes, reached, changes, economy):
            return full

        def program() -> Master:
            master = self._master(classes, reached)
            master.hold_changes(changes.value * MOVE)
            master.hold_economy(economy)
            return master

        tidy, answer = None, settled
        for spread in (0, 1, None):
            master = program()
            if spread is not None:
                master.stay_near(settled.replicas, spread)
            if tidy is not None:
                master.begin(answer.shapes, answer.replicas, answer.missing)
            limits = self.limits if spread is None else replace(self.limits.share(0.1), nodes=_FEW_NODES)
            if (found := master.minimise(Objective.FRAGMENTATION, limits)) is None:
                continue
            tidy, answer = found, master.answer(())
            if not tidy.value:
                break
        if tidy is None or not self.shaper.complete:
            return None
        return _Found(seat(classes, answer, self.wants), (*reached.answer.levels, changes, tidy))

    def _full(self, classes: Sequence[GpuClass], reached: _Reached, changes: Level, economy: float) -> _Found | None:
        """Nothing is better than no fragmentation, and few shapes have none: these are tried by themselves."""
        whole = tuple(replace(c, shapes=tuple(s for s in c.shapes if not s.fragmentation)) for c in classes)
        if not all(group.shapes for group in whole):
            return None  # what is reserved on some GPU breaks it up, whatever is added
        master = self._master(whole, reached)
        master.hold_changes(changes.value * MOVE)
        master.hold_economy(economy)
        answer = master.any_answer(replace(self.limits.share(0.1), nodes=_FULL_NODES))
        if answer is None or not self.shaper.complete:
            return None
        tidy = Level(Objective.FRAGMENTATION, 0.0, 0.0)
        return _Found(seat(whole, answer, self.wants), (*reached.answer.levels, changes, tidy))

    def _changed(self, reached: _Reached) -> _Found | None:
        """Where something runs: placements chosen one by one for the least disturbance, then the tidiest of these."""
        classes = placed(self.shaper, self.problem.gpus)
        master = self._master(classes, reached)
        found = self._least_disturbance(master)
        if found is None or not self.shaper.complete:
            return None
        least, economy = found
        answer = master.answer(())
        names = frozenset(w.name for w in self.wants)
        single = [
            realised(group, answer.places[c], names, self.shaper.fragmentation(group.members[0], answer.places[c]))
            if c in answer.places
            else group
            for c, group in enumerate(classes)
        ]
        shapes = dict(answer.shapes) | dict.fromkeys(((c, 0) for c in answer.places), 1)
        answer = replace(answer, shapes=shapes)
        lost = sum(single[c].shapes[s].fragmentation * n for (c, s), n in shapes.items())
        levels = (*reached.answer.levels, least)
        if lost:
            return self._tidier(reached, single, answer, least, economy)
        return _Found(seat(single, answer, self.wants), (*levels, Level(Objective.FRAGMENTATION, 0.0, 0.0)))

    def _least_disturbance(self, master: Master) -> tuple[Level, float] | None:
        """The least disturbance by placements chosen one by one, and what is economised then."""
        if len(self.problem.gpus) <= _TINY:
            return master.disturb_least(self.limits)
        least = master.minimise(Objective.DISTURBANCE, self._one_by_one)
        economy = None if least is None else master.economise(self._brief)
        return None if least is None or economy is None else (least, economy)

    def _tidier(
        self, reached: _Reached, single: Sequence[GpuClass], answer: Answer, least: Level, economy: float
    ) -> _Found | None:
        """Among plans that disturb as little, one with the least fragmentation: that depends on whole shapes."""
        most = max(0, int(least.value + 1e-6) - self.unavoidable)
        classes = self.shaper.detailed(self.problem.gpus, most_lost=most)
        master = self._master(classes, reached)
        master.hold_disturbance(least.value * MOVE)
        master.hold_economy(economy)
        if (shapes := same_shapes(single, answer, classes)) is not None:
            master.begin(shapes, answer.replicas, answer.missing)
        tidy = master.minimise(Objective.FRAGMENTATION, self.limits)
        if tidy is None:
            return None
        if not self.shaper.complete:
            tidy = self._unproven(tidy)
        return _Found(seat(classes, master.answer(()), self.wants), (*reached.answer.levels, least, tidy))

    @property
    def _one_by_one(self) -> Limits:
        """For placements chosen one by one. Without an answer from them shapes are searched, which must not take much longer."""
        if len(self.problem.gpus) <= _TINY:
            return self.limits
        return self.limits.share(_FIRST_TRY) if len(self.problem.gpus) <= _SMALL else self._brief

    @property
    def _over_shapes(self) -> Limits:
        """For programs over the shapes of GPUs, where what runs is already known to be in need of moves."""
        large = len(self.problem.gpus) > _TINY and _runs(self.problem)
        return self._brief.share(_SHAPES) if large else self._brief

    @property
    def _brief(self) -> Limits:
        """For objectives that matter less, on all but tiny fleets."""
        if len(self.problem.gpus) <= _TINY:
            return self.limits
        gap = self.limits.gap_ratio if _runs(self.problem) else max(self.limits.gap_ratio, _UNDISTURBED)
        return replace(self.limits.share(0.25), nodes=_FEW_NODES, gap_ratio=gap)

    def _first(
        self, reached: _Reached | None, objectives: Sequence[Objective], lost: int | None, *, by_gpu: bool
    ) -> tuple[tuple[GpuClass, ...], Master, tuple[Level, ...]]:
        """The program, and the first objective minimised in it.

        Where that is disturbance, shapes that lose no replica are looked at first. What is found then bounds how many
        any shape of a better plan can lose: those up to the bound are added, and the search is made again.
        """
        brief = self._over_shapes if reached else self.limits
        classes = self.shaper.detailed(self.problem.gpus, most_lost=lost, by_gpu=by_gpu)
        master = self._master(classes, reached)
        levels = _minimised(master, objectives, brief)
        if lost is None or not levels or (most := int(levels[0].value + 1e-6) - self.unavoidable) <= lost:
            return classes, master, levels
        if len(self.problem.gpus) > _MANY:
            return classes, master, tuple(self._unproven(level) for level in levels)
        more = self.shaper.detailed(self.problem.gpus, most_lost=most, by_gpu=by_gpu)
        again = self._master(more, reached)
        better = _minimised(again, objectives, brief)
        if better[0].value <= levels[0].value:
            return more, again, better
        # The time was too short to do better. What was proven about all plans holds all the same.
        return classes, master, (replace(levels[0], lower_bound=better[0].lower_bound),)

    def _master(self, classes: tuple[GpuClass, ...], reached: _Reached | None) -> Master:
        running = Counter(i.demand for g in self.problem.gpus for i in g.instances if i.demand is not None)
        known = {w.name: running[w.name] for w in self.wants if running[w.name]}
        master = Master(classes, self.wants, self.problem.constraints, known)
        if reached is not None:
            self._hold(master, reached.answer)
            reached.hold_numbers(master)
            if reached.few.menus is not None:
                master.restrict(reached.few.menus)
            known_shapes = None if reached.few.slack else carried(reached.few.classes, reached.answer, classes)
            if known_shapes is not None:
                master.begin(known_shapes, reached.answer.replicas, reached.answer.missing)
        return master

    def _hold(self, master: Master, answer: Answer) -> None:
        for level in answer.levels:
            if level.objective is Objective.PRICE:
                master.hold(master.price(), _allowed(level, self.limits))
                continue
            if not answer.missing and level.value <= NOTHING:
                master.miss_nothing()
                continue
            for priority in sorted({w.priority for w in self.wants}):
                missing = sum(answer.missing.get(w.name, 0.0) for w in self.wants if w.priority == priority)
                master.hold(master.shortfall(priority), missing)

    def _unproven(self, level: Level) -> Level:
        """Where not every shape was looked at, only what holds for every plan is a bound."""
        bound = float(self.unavoidable) if level.objective is Objective.DISTURBANCE else 0.0
        return replace(level, lower_bound=min(level.value, bound))


def _as_good(stay: Standing, reached: Answer, wants: Sequence[Want], limits: Limits) -> bool:
    """Whether the fleet as it is misses no more and costs no more than the best plan, within the gap allowed."""
    ours, best = stay.missing_by_priority(wants), by_priority(reached.missing, wants)
    if any(mine > least + 1e-6 for mine, least in zip(ours, best, strict=True)):
        return False
    if not any(level.objective is Objective.PRICE for level in reached.levels):
        return True
    return stay.price_per_hour <= _allowed(_price(reached), limits) + 1e-9


def _price(answer: Answer) -> Level:
    return next(level for level in answer.levels if level.objective is Objective.PRICE)


def _allowed(level: Level, limits: Limits) -> float:
    """What a plan may cost for the gap that is asked for: as much as the best found, or more if the bound admits it."""
    return max(level.value, level.lower_bound / (1 - limits.gap_ratio))


def _bare(problem: Problem) -> bool:
    return all(i.reserved is not None for g in problem.gpus for i in g.instances)


def _runs(problem: Problem) -> bool:
    return any(i.replica is not None for g in problem.gpus for i in g.instances)


def _stayed(
    problem: Problem, wants: Sequence[Want], shaper: Shaper, stay: Standing, levels: tuple[Level, ...], *, bound: float
) -> _Found:
    """A plan that moves nobody, with its objectives added up. `bound` is the least that any plan disturbs."""
    found = []
    for level in levels:
        mine = stay.price_per_hour if level.objective is Objective.PRICE else level.value
        found.append(replace(level, value=mine, lower_bound=min(mine, level.lower_bound)))
    used = stay.seating.used
    lost, changes = disturbance(problem, wants, stay.seating)
    for objective in problem.order[len(levels) :]:
        if objective is Objective.DISTURBANCE:
            value, least = lost + changes / MOVE, bound
        elif objective is Objective.PRICE:
            value = least = stay.price_per_hour
        elif objective is Objective.DEMAND:
            value = least = sum(stay.missing.values())
        else:
            value = float(sum(shaper.fragmentation(gpu, used[gpu.id]) for gpu in problem.gpus))
            least = 0.0 if lost or changes else value
        found.append(Level(objective, value, min(value, least)))
    return _Found(stay.seating, tuple(found))
