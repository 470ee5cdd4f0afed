"""What has to be placed: demands and reservations in one form, in an order of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from placement.planner.types import WHOLE_GPU, FleetGpu, ModelDemand, Option, Problem, Reservation

_RESERVED_FIRST = 1 << 30


@dataclass(frozen=True, slots=True)
class Want:
    """So many slices for one purpose: at least `floor`, at most `ceiling`, serving `rate` together where one is set.

    `rate` includes the head-room. A reservation is a want without a demand, and comes before everything else.
    """

    name: str
    options: tuple[Option, ...]
    floor: int
    ceiling: int | None
    rate: float | None = None
    priority: int = 0
    max_per_gpu: int | None = None
    max_per_node: int | None = None
    demand: ModelDemand | None = field(default=None, repr=False)
    reservation: Reservation | None = None

    @property
    def model(self) -> str:
        """Whose limits per GPU and node these are: all wants of one model keep them together."""
        return self.demand.model if self.demand else self.name

    @property
    def best(self) -> float:
        """What the most capable option serves."""
        return max((o.capacity for o in self.options), default=1.0)

    @property
    def most(self) -> float:
        """More than this it need not serve: one replica less would still do."""
        if self.rate is None:
            return float(self.floor) * self.best
        return max(self.rate + self.best * (1 - 1e-6), self.floor * self.best)

    @property
    def fixed(self) -> bool:
        """Whether replicas are counted."""
        return self.rate is None

    def option(self, product: str, profile: str) -> Option | None:
        """Its option for this kind of slice."""
        return next((o for o in self.options if o.key == (product, profile)), None)

    def surplus(self, capacities: Sequence[float]) -> int:
        """Of replicas that serve so much each, the fewest that have to stop for the others to be no more than is wanted."""
        stopped = max(0, len(capacities) - self.ceiling) if self.ceiling is not None else 0
        if self.rate is None:
            return stopped
        served, stopped_for_rate = sum(capacities), 0
        for capacity in sorted(capacities, reverse=True):
            if served <= self.most + 1e-9:
                break
            served, stopped_for_rate = served - capacity, stopped_for_rate + 1
        return max(stopped, stopped_for_rate)

    def missing(self, replicas: int, served: float) -> float:
        """How much is missing when so many replicas serve so much together, in replicas of the best option."""
        short = max(0.0, float(self.floor - replicas))
        return short if self.rate is None else max(short, (self.rate - served) / self.best, 0.0)


def wants_of(problem: Problem) -> tuple[Want, ...]:
    """Every demand and every reservation that is not there yet, sorted by name."""
    headroom = 1.0 + problem.constraints.headroom_ratio
    wants = [want_of(d, headroom) for d in problem.demands]
    wants += [_of_reservation(r, problem.gpus) for r in problem.constraints.reserve]
    return tuple(sorted(wants, key=lambda w: w.name))


def spread_together(wants: Iterable[Want]) -> tuple[tuple[Want, ...], ...]:
    """The wants that have limits per GPU or node, those of one model together: they have the same."""
    found: dict[str, list[Want]] = {}
    for want in wants:
        if want.max_per_gpu is not None or want.max_per_node is not None:
            found.setdefault(want.model, []).append(want)
    return tuple(map(tuple, found.values()))


def held_for(reservation: Reservation, gpus: Iterable[FleetGpu]) -> int:
    """How many instances are reserved under this note already."""
    return sum(
        i.reserved == reservation.note and i.profile == reservation.profile
        for g in gpus
        if reservation.product in (None, g.product)
        for i in g.instances
    )


def bound_to_stop(wants: Iterable[Want], gpus: Iterable[FleetGpu]) -> dict[str, int]:
    """For each want with running replicas, how many of them cannot stay where they are under any plan.

    These are replicas on draining GPUs or on slices that are no option for them, and those beyond what is wanted.
    """
    by_name = {w.name: w for w in wants}
    lost: Counter[str] = Counter()
    staying: dict[str, list[float]] = {}
    for gpu in gpus:
        for instance in gpu.instances:
            if (want := by_name.get(str(instance.demand))) is None:
                continue
            option = want.option(gpu.product, instance.profile)
            if option is None or gpu.draining:
                lost[want.name] += 1
            else:
                staying.setdefault(want.name, []).append(option.capacity)
    return {name: lost[name] + by_name[name].surplus(staying.get(name, ())) for name in {*lost, *staying}}


def want_of(demand: ModelDemand, factor: float) -> Want:
    """One demand as a want, its rate multiplied by `factor`."""
    return Want(
        name=demand.name,
        options=demand.options,
        floor=demand.floor,
        ceiling=demand.ceiling,
        rate=None if demand.rate is None else demand.rate * factor,
        priority=demand.priority,
        max_per_gpu=demand.max_per_gpu,
        max_per_node=demand.max_per_node,
        demand=demand,
    )


def _has(gpu: FleetGpu, profile: str) -> bool:
    """Whether there is such a slice on it, or can be."""
    cut = {p.name for p in gpu.geometry.profiles} if gpu.geometry is not None else set()
    return profile in cut | {i.profile for i in gpu.instances} or (gpu.whole and profile == WHOLE_GPU)


def _of_reservation(reservation: Reservation, gpus: Iterable[FleetGpu]) -> Want:
    gpus = tuple(gpus)
    count = max(0, reservation.count - held_for(reservation, gpus))
    products = {g.product for g in gpus if reservation.product in (None, g.product) and _has(g, reservation.profile)}
    options = tuple(Option(product, reservation.profile) for product in sorted(products))
    # A demand's name cannot hold a bracket, so the two never meet.
    name = f"[{reservation.note}] {reservation.profile}" + (f" {reservation.product}" if reservation.product else "")
    return Want(name, options, count, count, priority=_RESERVED_FIRST, reservation=reservation)
