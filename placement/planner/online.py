"""One demand added or changed between two full plans: placed in milliseconds, with nothing else moved.

The rule is that of arXiv 2511.18906: a newcomer goes where the fragmentation of its GPU grows least. Before that come
what costs money, since a GPU in use is paid for: the price of GPUs that have to be opened, then the share of a GPU that
the option takes for what it serves. GPUs that are taken alike are looked at once, however many there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from model_registry.catalogue import Product
from model_registry.geometry import Geometry, Placement
from placement.planner.fragmentation import Fragmentation
from placement.planner.shapes import in_the_way
from placement.planner.types import WHOLE, WHOLE_GPU, FleetGpu, Instance, ModelDemand, Option
from placement.planner.wants import Want, want_of
from placement.planner.written import natural, unused_names


@dataclass(frozen=True, slots=True)
class Added:
    """One replica more: where, whether an idle instance is used, and what has to be destroyed first."""

    replica: str
    gpu: str
    placement: Placement
    option: Option
    reused: bool = False
    destroyed: tuple[Placement, ...] = ()

    @property
    def changes(self) -> int:
        """Instances created and destroyed for it."""
        return int(not self.reused) + len(self.destroyed)


@dataclass(frozen=True, slots=True)
class Adjustment:
    """What changes for one demand. `missing` is what still cannot be served, in replicas of the best option.

    `gpus` is the fleet afterwards, in the order in which it was given.
    """

    demand: str
    added: tuple[Added, ...]
    stopped: tuple[str, ...]
    missing: float
    gpus: tuple[FleetGpu, ...] = field(repr=False)


def adjust(
    gpus: Iterable[FleetGpu],
    demand: ModelDemand,
    *,
    headroom_ratio: float = 0.0,
    add: bool = True,
    siblings: Collection[str] = (),
    newcomers: Collection[str] = (),
    most_changes: int | None = None,
) -> Adjustment:
    """Bring one demand to what it asks for: replicas added where they disturb nobody, or stopped where they free most.

    Running replicas stay where they are; `add` false only stops. `siblings` are the names of the model's other demands: limits
    per GPU and node count their replicas, too. `newcomers` are replicas that do not run yet: of too many these go first. At most `most_changes` instances are created and destroyed, where that is set.
    Raises nothing: what finds no room is told in `missing`.
    """
    desk = _Desk(tuple(gpus), want_of(demand, 1.0 + headroom_ratio), siblings, newcomers, most_changes)
    stopped = tuple(desk.stop_surplus())
    added = tuple(desk.add_missing()) if add else ()
    return Adjustment(demand.name, added, stopped, desk.missing, tuple(desk.gpus.values()))


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One way to place one more replica; the smallest `rank` wins."""

    rank: tuple[float, float, float, int, int, int, str, Placement]
    gpu: str
    placement: Placement
    option: Option


class _Desk:
    """The fleet while one demand is being brought to its number."""

    def __init__(
        self,
        gpus: Sequence[FleetGpu],
        want: Want,
        siblings: Collection[str],
        newcomers: Collection[str],
        most_changes: int | None,
    ) -> None:
        self.gpus = {g.id: g for g in gpus}
        self._newcomers = newcomers
        self._most_changes = most_changes
        self._want = want
        self._options: dict[str, list[Option]] = {}
        for option in want.options:
            self._options.setdefault(option.product, []).append(option)
        self._measures: dict[Product, Fragmentation] = {}
        self._running = {str(i.replica): (g.id, i) for g in gpus for i in g.instances if i.demand == want.name}
        self._near = Counter(g.id for g in gpus for i in g.instances if i.demand in siblings)
        self._served = sum(self._capacity(name) for name in self._running)

    @property
    def missing(self) -> float:
        """What is not served yet, in replicas of the best option."""
        return self._want.missing(len(self._running), self._served)

    def stop_surplus(self) -> Iterator[str]:
        """Stop replicas whose slice is no option any more, and those that are not needed.

        Of these go first those whose GPU is empty then, then those with the fewest requests, then those that leave the
        least fragmentation.
        """
        for name in sorted((n for n in self._running if not self._suits(n)), key=natural):
            yield self._stop(name)
        while candidates := [name for name in self._running if self._spare(name)]:
            name = min(candidates, key=self._stop_rank)
            yield self._stop(name)

    def add_missing(self) -> Iterator[Added]:
        """Add one replica after the other until the demand is met or nothing is left for it."""
        names = unused_names(
            self._want.name, (str(i.replica) for g in self.gpus.values() for i in g.instances if i.replica)
        )
        while self.missing > 1e-9 and not self._full():
            best = min(self._candidates(), key=lambda c: c.rank, default=None)
            if best is None:
                return
            added = self._add(next(names), best)
            if self._most_changes is not None:
                self._most_changes -= added.changes
            yield added

    def _suits(self, name: str) -> bool:
        gpu, instance = self._running[name]
        return self._want.option(self.gpus[gpu].product, instance.profile) is not None

    def _stop(self, name: str) -> str:
        self._served -= self._capacity(name)
        gpu, instance = self._running.pop(name)
        self._update(gpu, instance, Instance(instance.placement))
        return name

    def _full(self) -> bool:
        return self._want.ceiling is not None and len(self._running) >= self._want.ceiling

    def _capacity(self, name: str) -> float:
        gpu, instance = self._running[name]
        option = self._want.option(self.gpus[gpu].product, instance.profile)
        return option.capacity if option is not None else 0.0

    def _spare(self, name: str) -> bool:
        if self._want.ceiling is not None and len(self._running) > self._want.ceiling:
            return True
        rest = self._served - self._capacity(name)
        return self._want.missing(len(self._running) - 1, rest) <= 1e-9

    def _stop_rank(self, name: str) -> tuple[bool, float, int, float, tuple[tuple[int, int | str], ...]]:
        gpu_id, instance = self._running[name]
        gpu = self.gpus[gpu_id]
        busy = [i.placement for i in gpu.instances if not i.idle]
        saved = gpu.price_per_hour if len(busy) == 1 else 0.0
        rest = [p for p in busy if p != instance.placement]
        growth = self._measure_of(gpu, rest) - self._measure_of(gpu, busy)
        return name not in self._newcomers, -saved, instance.requests, growth, natural(name)

    def _measure_of(self, gpu: FleetGpu, busy: Sequence[Placement]) -> float:
        if gpu.geometry is None or WHOLE in busy:
            return 0.0
        return float(self._measure(gpu.geometry).of(busy))

    def _add(self, name: str, chosen: _Candidate) -> Added:
        gpu = self.gpus[chosen.gpu]
        there = next((i for i in gpu.instances if i.placement == chosen.placement), None)
        busy = [i.placement for i in gpu.instances if not i.idle]
        gone = in_the_way(gpu, (*busy, chosen.placement))
        instance = Instance(chosen.placement, name, self._want.name)
        kept = tuple(i for i in gpu.instances if i is not there and i.placement not in gone)
        self.gpus[gpu.id] = replace(gpu, instances=(*kept, instance))
        self._running[name] = gpu.id, instance
        self._served += chosen.option.capacity
        return Added(name, gpu.id, chosen.placement, chosen.option, there is not None, gone)

    def _update(self, gpu_id: str, old: Instance, new: Instance) -> None:
        gpu = self.gpus[gpu_id]
        self.gpus[gpu_id] = replace(gpu, instances=tuple(new if i is old else i for i in gpu.instances))

    def _candidates(self) -> Iterator[_Candidate]:
        """The best of every kind of GPU there is: by product, price, what is busy on it, and who of ours is near."""
        on_gpu = self._near + Counter(gpu for gpu, _ in self._running.values())
        on_node: Counter[str] = Counter()
        for gpu_id, count in on_gpu.items():
            on_node[self.gpus[gpu_id].node] += count
        seen: dict[tuple[object, ...], FleetGpu] = {}
        for gpu in self.gpus.values():
            crowd = on_gpu[gpu.id], on_node[gpu.node]
            if gpu.product not in self._options or not gpu.open or not self._may(*crowd):
                continue
            kind = (gpu.product, gpu.price_per_hour, gpu.whole, crowd, *((i.placement, i.idle) for i in gpu.instances))
            if kind not in seen or gpu.id < seen[kind].id:
                seen[kind] = gpu
        for gpu in seen.values():
            yield from self._on(gpu, on_node[gpu.node], on_gpu[gpu.id])

    def _may(self, on_gpu: int, on_node: int) -> bool:
        want = self._want
        return on_gpu < (want.max_per_gpu or on_gpu + 1) and on_node < (want.max_per_node or on_node + 1)

    def _on(self, gpu: FleetGpu, on_node: int, on_gpu: int) -> Iterator[_Candidate]:
        busy = tuple(i.placement for i in gpu.instances if not i.idle)
        opened = 0.0 if busy else gpu.price_per_hour
        idle = {i.placement for i in gpu.instances if i.idle}
        left = self._left()
        for option in self._options[gpu.product]:
            useful = min(option.capacity, left) if left else option.capacity
            for placement, growth, share in self._places(gpu, busy, option.profile):
                if not self._affordable(gpu, busy, placement):
                    continue
                rank = (
                    opened / useful + option.penalty,
                    gpu.price_per_hour * share / useful,
                    float(growth),
                    int(placement not in idle),
                    on_node,
                    on_gpu,
                    gpu.id,
                    placement,
                )
                yield _Candidate(rank, gpu.id, placement, option)

    def _affordable(self, gpu: FleetGpu, busy: tuple[Placement, ...], placement: Placement) -> bool:
        """Whether so many layout changes are still allowed."""
        if self._most_changes is None or any(i.placement == placement for i in gpu.instances):
            return True
        return 1 + len(in_the_way(gpu, (*busy, placement))) <= self._most_changes

    def _left(self) -> float:
        return max(0.0, (self._want.rate or 0.0) - self._served) if self._want.rate is not None else 0.0

    def _places(
        self, gpu: FleetGpu, busy: tuple[Placement, ...], profile: str
    ) -> Iterator[tuple[Placement, int, float]]:
        """Where `profile` can still start, how much F grows there, and what share of the card it takes."""
        if profile == WHOLE_GPU:
            if not busy and gpu.whole:
                yield WHOLE, 0, 1.0
            return
        if gpu.geometry is None or WHOLE in busy:
            return
        measure = self._measure(gpu.geometry)
        taken = measure.taken(busy)
        before = measure.of_mask(taken)
        for start in Geometry(gpu.geometry, (profile,)).free_starts(busy).get(profile, ()):
            placement = Placement(start, profile)
            mask = measure.masks[placement]
            share = mask.bit_count() / (gpu.geometry.memory_slices or 1)
            yield placement, measure.of_mask(taken | mask) - before, share

    def _measure(self, product: Product) -> Fragmentation:
        if product not in self._measures:
            self._measures[product] = Fragmentation(product)
        return self._measures[product]
