"""Every way of using a small fleet, judged by its own arithmetic: what the planner's answers are compared with.

Nothing here knows patterns, relaxations or solvers. Which placements may be together is asked of `Layout`, one by one;
which of all ways is the best is found by looking at them all. Objectives add up over GPUs, so of the ways to use one GPU
that give every demand the same slices only the best is combined with those of the others; where layout changes are limited,
the best for each number of them.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from model_registry.catalogue import Product
from model_registry.errors import IllegalLayout
from model_registry.geometry import Layout, Placement, option_of
from placement.planner.fragmentation import Fragmentation
from placement.planner.types import (
    WHOLE,
    WHOLE_GPU,
    FleetGpu,
    FleetPlan,
    ModelDemand,
    Objective,
    Option,
    PlannedGpu,
    Problem,
    Reservation,
)

_MOVE = 1000
"""A replica moved or stopped weighs as much as so many layout changes."""

_SAME = 1e-5

_FIRST = 1 << 40
"""The priority of what is reserved: above that of every demand."""

Slices = tuple[tuple[str, str, str, str], ...]
"""What one GPU gives: (demand, product, profile, GPU) for every replica on it, sorted."""

Given = tuple[Slices, int]
"""What one GPU gives, and the instances created and destroyed for it where they are limited (0 where they are not)."""

Cost = tuple[float, ...]
"""Price and disturbance in the order in which they count, penalties, replicas, fragmentation; they add up over GPUs."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one way of using a fleet comes to. `missing` is by priority, from the highest down."""

    missing: tuple[float, ...]
    price: float
    disturbance: float
    fragmentation: float

    def of(self, objective: Objective) -> float:
        """What one objective comes to."""
        return sum(self.missing) if objective is Objective.DEMAND else float(getattr(self, objective.value))

    def close_to(self, other: Outcome) -> bool:
        """Whether both come to the same."""
        return all(
            _rounded(mine) == _rounded(others)
            for mine, others in (
                (self.missing, other.missing),
                ((self.price, self.disturbance), (other.price, other.disturbance)),
                ((self.fragmentation,), (other.fragmentation,)),
            )
        )


class BruteForce:
    """All ways of using the fleet of one problem. For a GPU or two, and a handful of replicas.

    Raises ValueError for a problem that it does not cover: orders in which demand is not the first objective and
    fragmentation the last.
    """

    def __init__(self, problem: Problem) -> None:
        order = problem.order
        if len(order) != len(Objective) or order[0] is not Objective.DEMAND or order[-1] is not Objective.FRAGMENTATION:
            raise ValueError(f"the order {', '.join(order)} is not tried out")
        self._problem = problem
        self._limit = problem.constraints.max_layout_changes
        self._reserved = {_subject(r): r for r in problem.constraints.reserve}
        wanted = (*problem.demands, *(_to_make(r, problem.gpus) for r in problem.constraints.reserve))
        self._demands = {d.name: d for d in wanted}
        self._limits = {d.model: (d.max_per_gpu, d.max_per_node) for d in problem.demands}
        self._nodes = {g.id: g.node for g in problem.gpus}
        self._factor = 1.0 + problem.constraints.headroom_ratio
        self._measures = {g.geometry: Fragmentation(g.geometry) for g in problem.gpus if g.geometry is not None}

    def best(self) -> Outcome:
        """The best that any way comes to."""
        return min(self._outcomes(), key=lambda found: found[0])[1]

    def of(self, plan: FleetPlan) -> Outcome:
        """What a plan comes to. Raises ValueError if it is no legal way of using the fleet."""
        given: list[tuple[str, str, str, str]] = []
        costs = []
        changes = 0
        for planned in plan.gpus:
            used = self._used(planned)
            if not (_open_to(planned.gpu, used) and _together(planned.gpu, used)):
                raise ValueError(f"{planned.gpu.id} cannot be used like that")
            given += _slices(planned.gpu, used)
            costs.append(self._cost(planned.gpu, used))
            changes += planned.changes
        if self._limit is not None and changes > self._limit:
            raise ValueError(f"{changes} layout changes, and {self._limit} are allowed")
        missing = self._missing(given)
        if missing is None:
            raise ValueError("a limit of a demand is broken")
        return self._outcome(missing, _sum(costs))

    def differs(self, plan: FleetPlan) -> str | None:
        """How a plan differs from the best there is, in what it does or in what it says of itself; None if it does not."""
        best, mine = self.best(), self.of(plan)
        if not mine.close_to(best):
            return f"the plan comes to {mine}, and {best} is possible"
        for level in plan.levels:
            if not level.optimal or abs(level.value - best.of(level.objective)) > _SAME:
                return f"the plan says {level}, and the best is {best}"
        return None

    def _used(self, planned: PlannedGpu) -> dict[Placement, str]:
        """Who uses which placement of a planned GPU, besides what was reserved there before."""
        used = {s.placement: str(s.demand) for s in planned.slices if s.replica is not None}
        for made in (s for s in planned.slices if s.reserved is not None and s.change != "keep"):
            used[made.placement] = next(
                name
                for name, r in self._reserved.items()
                if (r.note, r.profile) == (made.reserved, made.placement.profile)
                and r.product in (None, planned.gpu.product)
            )
        return used

    def _outcomes(self) -> Iterator[tuple[tuple[object, ...], Outcome]]:
        """Every combination of what the GPUs can give, each with its rank."""
        ways = [self._on(gpu) for gpu in self._problem.gpus]
        judged: dict[Slices, tuple[float, ...] | None] = {}
        for choice in itertools.product(*(way.items() for way in ways)):
            if self._limit is not None and sum(changes for (_, changes), _ in choice) > self._limit:
                continue
            given = tuple(sorted(itertools.chain.from_iterable(slices for (slices, _), _ in choice)))
            if given not in judged:
                judged[given] = self._missing(given)
            missing = judged[given]
            if missing is not None:
                cost = _sum([cost for _, cost in choice])
                yield (*_rounded(missing), *_rounded(cost)), self._outcome(missing, cost)

    def _outcome(self, missing: tuple[float, ...], cost: Cost) -> Outcome:
        price_first = self._problem.order.index(Objective.PRICE) < self._problem.order.index(Objective.DISTURBANCE)
        price, disturbance = cost[:2] if price_first else (cost[1], cost[0])
        return Outcome(missing, price, disturbance, cost[-1])

    def _on(self, gpu: FleetGpu) -> Mapping[Given, Cost]:
        """What one GPU can give, each at its least cost."""
        best: dict[Given, Cost] = {}
        for used in self._usages(gpu):
            changes = 0 if self._limit is None else _changes(gpu, set(used), _reserved_on(gpu))
            given, cost = (_slices(gpu, used), changes), self._cost(gpu, used)
            if given not in best or _rounded(cost) < _rounded(best[given]):
                best[given] = cost
        return best

    def _usages(self, gpu: FleetGpu) -> Iterator[dict[Placement, str]]:
        """Every choice of placements with who gets each, as far as one GPU can tell whether it is legal."""
        takers: dict[Placement, list[str]] = {}
        for demand in self._demands.values():
            for placement in _placements(gpu, demand):
                takers.setdefault(placement, []).append(demand.name)
        most = sum(map(self._most, self._demands.values()))
        for chosen in _choices(gpu, sorted(takers), most):
            for names in itertools.product(*(takers[p] for p in chosen)):
                used = dict(zip(chosen, names, strict=True))
                if self._within(Counter(names)) and _open_to(gpu, used):
                    yield used

    def _within(self, on_gpu: Counter[str]) -> bool:
        for name, count in on_gpu.items():
            if count > self._most(self._demands[name]):
                return False
        of_models: Counter[str] = Counter()
        for name, count in on_gpu.items():
            of_models[self._demands[name].model] += count
        return not any(_over(count, self._limits.get(model, ())) for model, count in of_models.items())

    def _most(self, demand: ModelDemand) -> int:
        """The most replicas there can be of a demand: as many as are allowed, or as any that is needed leaves room for."""
        if demand.rate is None:
            return demand.floor
        least = min((o.capacity for o in demand.options), default=1.0)
        enough = math.floor(self._enough(demand) / least + 1e-9)
        return enough if demand.ceiling is None else min(enough, demand.ceiling)

    def _enough(self, demand: ModelDemand) -> float:
        """What a demand with a rate may be served at most: with more than that, one replica serves what nobody needs."""
        best = max((o.capacity for o in demand.options), default=1.0)
        return max((demand.rate or 0.0) * self._factor + best * (1 - 1e-6), demand.floor * best)

    def _missing(self, given: Iterable[tuple[str, str, str, str]]) -> tuple[float, ...] | None:
        """What is missing by priority, in replicas of each demand's best option; None where a limit is broken."""
        given = tuple(given)
        if self._crowded(given):
            return None
        mine: dict[str, list[tuple[str, str, str]]] = {name: [] for name in self._demands}
        for name, product, profile, gpu in given:
            mine[name].append((product, profile, gpu))
        sums: dict[int, float] = dict.fromkeys((d.priority for d in self._demands.values()), 0.0)
        for name, places in mine.items():
            demand = self._demands[name]
            short = self._short(demand, places)
            if short is None:
                return None
            sums[demand.priority] += short
        return tuple(sums[priority] for priority in sorted(sums, reverse=True))

    def _crowded(self, given: Iterable[tuple[str, str, str, str]]) -> bool:
        """Whether some GPU or node has more replicas of a model than it may have, whoever they serve."""
        models = [(self._demands[name].model, gpu) for name, _, _, gpu in given]
        on_gpu, on_node = Counter(models), Counter((model, self._nodes[gpu]) for model, gpu in models)
        return any(_over(count, self._limits.get(model, ())[:1]) for (model, _), count in on_gpu.items()) or any(
            _over(count, self._limits.get(model, ())[1:]) for (model, _), count in on_node.items()
        )

    def _short(self, demand: ModelDemand, places: Sequence[tuple[str, str, str]]) -> float | None:
        if demand.ceiling is not None and len(places) > demand.ceiling:
            return None
        best = max((o.capacity for o in demand.options), default=1.0)
        short = float(max(0, demand.floor - len(places)))
        if demand.rate is None:
            return short
        served, rate = (
            demand.served_by((product, profile) for product, profile, _ in places),
            demand.rate * self._factor,
        )
        if served > self._enough(demand) + 1e-9:
            return None
        return max(short, (rate - served) / best, 0.0)

    def _cost(self, gpu: FleetGpu, used: Mapping[Placement, str]) -> Cost:
        reserved = _reserved_on(gpu)
        price = gpu.price_per_hour if used or reserved else 0.0
        moved = sum(i.demand in self._demands and used.get(i.placement) != i.demand for i in gpu.instances)
        disturbance = moved + _changes(gpu, set(used), reserved) / _MOVE
        penalty = sum(self._penalty(gpu, name, placement) for placement, name in used.items())
        lost = 0.0
        if WHOLE not in used and gpu.geometry is not None:
            lost = float(self._measures[gpu.geometry].of({*used, *reserved}))
        price_first = self._problem.order.index(Objective.PRICE) < self._problem.order.index(Objective.DISTURBANCE)
        first = (price, disturbance) if price_first else (disturbance, price)
        # A replica that nobody needs is not started, though it would make a slice nobody uses count as used.
        for_rates = sum(self._demands[name].rate is not None for name in used.values())
        return (*first, penalty, float(for_rates), lost)

    def _penalty(self, gpu: FleetGpu, name: str, placement: Placement) -> float:
        options = self._demands[name].options
        return next(o.penalty for o in options if o.key == (gpu.product, placement.profile))


def _over(count: int, limits: Iterable[int | None]) -> bool:
    return any(limit is not None and count > limit for limit in limits)


def _to_make(reservation: Reservation, gpus: Iterable[FleetGpu]) -> ModelDemand:
    """What is still to be reserved, as a demand before all others: what carries the note already counts."""
    mine = [g for g in gpus if reservation.product in (None, g.product)]
    held = Counter((i.reserved, i.profile) for g in mine for i in g.instances)
    left = max(0, reservation.count - held[reservation.note, reservation.profile])
    options = tuple(
        Option(product, reservation.profile) for product in {g.product for g in mine if _can_hold(g, reservation)}
    )
    return ModelDemand(_subject(reservation), "", options, left, priority=_FIRST)


def _subject(reservation: Reservation) -> str:
    """A name that no demand has."""
    return f"[{reservation.note}, {reservation.profile}, {reservation.product}]"


def _can_hold(gpu: FleetGpu, reservation: Reservation) -> bool:
    if reservation.profile == WHOLE_GPU:
        return gpu.whole
    return gpu.geometry is not None and reservation.profile in {p.name for p in gpu.geometry.profiles}


def _reserved_on(gpu: FleetGpu) -> set[Placement]:
    return {i.placement for i in gpu.instances if i.reserved is not None}


def possible(product: Product, placements: Iterable[Placement]) -> bool:
    """Whether these can be on one GPU together. Overlap decides nearly always; an error with its picture costs more."""
    placements, taken = tuple(placements), 0
    for placement in placements:
        mask = option_of(product, placement).mask
        if taken & mask:
            return False
        taken |= mask
    try:
        Layout(product, placements)
    except IllegalLayout:
        return False
    return True


def beside(
    product: Product, held: Sequence[Placement], candidates: Sequence[Placement], most: int | None = None
) -> Iterator[tuple[Placement, ...]]:
    """Every set of up to so many `candidates` that can be on one GPU with all of `held`, none at all among them.

    Sets grow by one: what can be together can be so without one of them.
    """
    found: list[tuple[int, tuple[Placement, ...]]] = [(0, ())]
    while found:
        first, chosen = found.pop()
        yield chosen
        for n in range(first, len(candidates) if most is None or len(chosen) < most else first):
            if possible(product, (*held, *chosen, candidates[n])):
                found.append((n + 1, (*chosen, candidates[n])))


def _placements(gpu: FleetGpu, demand: ModelDemand) -> Iterator[Placement]:
    for option in demand.options:
        if option.product != gpu.product:
            continue
        if option.profile == WHOLE_GPU:
            yield WHOLE
        elif gpu.geometry is not None:
            yield from (Placement(start, option.profile) for start in gpu.geometry.profile(option.profile).placements)


def _choices(gpu: FleetGpu, candidates: Sequence[Placement], most: int) -> Iterator[tuple[Placement, ...]]:
    """Every set of up to so many of these that can be on the GPU beside what is reserved."""
    reserved = [i.placement for i in gpu.instances if i.reserved is not None]
    if most and WHOLE in candidates and _together(gpu, (WHOLE,)):
        yield (WHOLE,)
    if gpu.geometry is None:
        yield ()
    else:
        yield from beside(gpu.geometry, reserved, [p for p in candidates if p != WHOLE], most)


def _together(gpu: FleetGpu, used: Collection[Placement]) -> bool:
    """Whether these can be on the GPU beside what is reserved."""
    reserved = [i.placement for i in gpu.instances if i.reserved is not None]
    if WHOLE in used:
        return gpu.whole and len(used) == 1 and not reserved
    return not used or (gpu.geometry is not None and possible(gpu.geometry, (*used, *reserved)))


def _open_to(gpu: FleetGpu, used: Mapping[Placement, str]) -> bool:
    """Whether the GPU takes whom it is to have: one that is drained takes nobody, one that is cordoned nobody new."""
    there = {i.placement: i.demand for i in gpu.instances}
    return not (gpu.draining and used) and not (
        gpu.cordoned and any(there.get(placement) != name for placement, name in used.items())
    )


def _slices(gpu: FleetGpu, used: Mapping[Placement, str]) -> Slices:
    return tuple(sorted((name, gpu.product, placement.profile, gpu.id) for placement, name in used.items()))


def _changes(gpu: FleetGpu, used: set[Placement], reserved: set[Placement]) -> int:
    """The fewest instances created and destroyed: of those that nobody uses as many stay as can."""
    there = {i.placement for i in gpu.instances}
    new = used - there
    if not new:
        return 0
    if WHOLE in new or WHOLE in there:
        return len(new) + len(there)
    unused = sorted(there - used - reserved)
    assert gpu.geometry is not None, "only a card that can be cut gets instances"
    for count in range(len(unused) + 1):
        for gone in itertools.combinations(unused, count):
            if possible(gpu.geometry, used | reserved | (set(unused) - set(gone))):
                return len(new) + count
    raise AssertionError("with everything gone that nobody uses, what is used is legal")


def _sum(costs: Sequence[Cost]) -> Cost:
    return tuple(map(sum, zip(*costs, strict=True))) if costs else (0.0,) * 5


def _rounded(numbers: Iterable[float]) -> tuple[float, ...]:
    return tuple(round(n, 6) for n in numbers)
