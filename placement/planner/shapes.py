"""Shapes: everything that a GPU could be used for, and GPUs that are alike put together.

A shape says exactly which placements are used: those kept from what is there, and a pattern added beside them. Instances
that nobody uses stay as they are unless they are in the way of what is added; taking them down costs layout changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from model_registry.catalogue import Product
from model_registry.errors import IllegalLayout
from model_registry.geometry import Layout, Placement, option_of
from placement.planner.fragmentation import Fragmentation
from placement.planner.patterns import Counts, PatternBook
from placement.planner.types import WHOLE, WHOLE_GPU, FleetGpu, Instance
from placement.planner.wants import Want

Own = tuple[tuple[tuple[str, str], int], ...]
"""How many running replicas stay, by (want, profile)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What one GPU is used for, besides what is reserved on it.

    `used` are all placements in use, `slots` their profiles by count, `own` those on which the replica that runs there
    can stay. `changes` are instances created and destroyed to get there. `on` tells whether the GPU is paid for.
    """

    used: tuple[Placement, ...]
    slots: Counts
    own: Own
    changes: int
    fragmentation: int
    on: bool


@dataclass(frozen=True, slots=True)
class GpuClass:
    """GPUs that are alike in everything that a plan looks at, and the shapes that each of them can take.

    `group` names the pool of slots that they belong to; `closed` says that only the replicas that run there may use it.
    """

    group: str
    product: str
    members: tuple[FleetGpu, ...]
    shapes: tuple[Shape, ...]
    closed: bool = False

    @property
    def price_per_hour(self) -> float:
        """Of each member."""
        return self.members[0].price_per_hour


class Shaper:
    """Makes classes of GPUs, for one list of wants."""

    def __init__(self, wants: Sequence[Want], *, budget: int = 4000) -> None:
        self._names = frozenset(w.name for w in wants)
        self._budget = budget
        self._profiles: dict[str, set[str]] = {}
        for option in (o for w in wants for o in w.options):
            self._profiles.setdefault(option.product, set()).add(option.profile)
        self._books: dict[Product, PatternBook] = {}
        self._measures: dict[Product, Fragmentation] = {}

    def coarse(self, gpus: Iterable[FleetGpu]) -> tuple[GpuClass, ...]:
        """As if nothing ran that can be moved: what demand and price depend on, in very few classes."""
        bare = [(self._bare(g) if g.open else g, g) for g in gpus]
        return self._classes(bare, group=lambda g: g.product if g.open else g.id)

    def detailed(self, gpus: Iterable[FleetGpu], *, by_gpu: bool = False) -> tuple[GpuClass, ...]:
        """With everything that runs. `by_gpu` gives every GPU a pool of slots of its own: what spreading depends on."""
        pairs = [(g, g) for g in gpus]
        return self._classes(pairs, group=lambda g: g.product if g.open and not by_gpu else g.id, by_gpu=by_gpu)

    def fragmentation(self, gpu: FleetGpu, used: Iterable[Placement]) -> int:
        """F of a GPU on which these and the reserved placements are in use."""
        placements = (*used, *(i.placement for i in gpu.instances if i.reserved))
        if gpu.geometry is None or WHOLE in placements:
            return 0
        return self._measure(gpu.geometry).of(placements)

    def _bare(self, gpu: FleetGpu) -> FleetGpu:
        reserved = tuple(i for i in gpu.instances if i.reserved is not None)
        return FleetGpu(
            gpu.id, gpu.product, gpu.geometry, gpu.node, reserved, price_per_hour=gpu.price_per_hour, whole=gpu.whole
        )

    def _classes(
        self, pairs: Sequence[tuple[FleetGpu, FleetGpu]], *, group: Callable[[FleetGpu], str], by_gpu: bool = False
    ) -> tuple[GpuClass, ...]:
        alike: dict[tuple[object, ...], list[tuple[FleetGpu, FleetGpu]]] = {}
        for seen, real in pairs:
            alike.setdefault(self._signature(seen, by_gpu=by_gpu), []).append((seen, real))
        share = max(1, self._budget // max(1, len(alike)))
        return tuple(
            GpuClass(
                group(same[0][1]),
                same[0][0].product,
                tuple(real for _, real in same),
                self._shapes(same[0][0], share),
                closed=not same[0][1].open,
            )
            for same in alike.values()
        )

    def _signature(self, gpu: FleetGpu, *, by_gpu: bool) -> tuple[object, ...]:
        """What makes GPUs alike. Replicas' names and their requests do not matter here, only whose they are."""
        if by_gpu or not gpu.open:
            return (gpu.id,)
        inside = tuple(
            (i.placement, i.demand if i.demand in self._names else None, i.reserved is not None) for i in gpu.instances
        )
        return gpu.product, gpu.geometry, gpu.price_per_hour, gpu.whole, inside

    def _shapes(self, gpu: FleetGpu, budget: int) -> tuple[Shape, ...]:
        """The shapes worth having: for the same slots and the same replicas kept, the one with the fewest changes."""
        best: dict[tuple[Counts, Own], Shape] = {}
        for shape in self._walk(gpu, budget):
            key = shape.slots, shape.own
            rival = best.get(key)
            if rival is None or _rank(shape) < _rank(rival):
                best[key] = shape
        return tuple(best[key] for key in sorted(best))

    def _walk(self, gpu: FleetGpu, budget: int) -> Iterator[Shape]:
        yield self._shape(gpu, (), ())
        if gpu.draining:
            return
        wanted = [i for i in gpu.instances if i.demand in self._names]
        if gpu.cordoned:
            if wanted:
                yield self._shape(gpu, tuple(wanted), ())
            return
        made = 0
        for kept in _keepings(gpu.instances, wanted):
            for added in self._additions(gpu, kept):
                made += 1
                yield self._shape(gpu, kept, added)
            if made > budget:
                break
        # However small the budget: to take everything down and cut the card anew is always possible.
        if made > budget:
            for added in self._additions(gpu, ()):
                yield self._shape(gpu, (), added)

    def _additions(self, gpu: FleetGpu, kept: tuple[Instance, ...]) -> Iterator[tuple[Placement, ...]]:
        """What can be added beside `kept` and the reserved instances."""
        profiles = self._profiles.get(gpu.product, set())
        beside = [*(i.placement for i in gpu.instances if i.reserved is not None), *(i.placement for i in kept)]
        if kept and kept[0].placement == WHOLE:
            yield ()
            return
        if WHOLE_GPU in profiles and gpu.whole and not beside:
            yield (WHOLE,)
        if gpu.geometry is None:
            return
        known = {p.name for p in gpu.geometry.profiles if p.plannable}
        for pattern in self._book(gpu.geometry).patterns(profiles & known, beside):
            yield pattern.placements

    def _shape(self, gpu: FleetGpu, kept: tuple[Instance, ...], added: tuple[Placement, ...]) -> Shape:
        used = tuple(sorted((*(i.placement for i in kept), *added)))
        own = Counter((i.demand, i.profile) for i in kept if i.demand is not None and i.demand in self._names)
        present = {i.placement for i in gpu.instances}
        created = sum(p not in present for p in added)
        gone = len(in_the_way(gpu, used)) if created else 0
        return Shape(
            used,
            tuple(sorted(Counter(p.profile for p in used).items())),
            tuple(sorted(own.items())),
            created + gone,
            self.fragmentation(gpu, used),
            bool(used) or any(i.reserved is not None for i in gpu.instances),
        )

    def _book(self, product: Product) -> PatternBook:
        if product not in self._books:
            self._books[product] = PatternBook(product)
        return self._books[product]

    def _measure(self, product: Product) -> Fragmentation:
        if product not in self._measures:
            self._measures[product] = Fragmentation(product)
        return self._measures[product]


def in_the_way(gpu: FleetGpu, used: Iterable[Placement]) -> tuple[Placement, ...]:
    """Instances that have to go before all of `used` are there, because the two cannot be on the GPU together.

    Instances that nobody will use go only for that; changing a card between whole and cut takes them all.
    """
    used = tuple(used)
    present = [i.placement for i in gpu.instances]
    new = [p for p in used if p not in present]
    if not new:
        return ()
    if WHOLE in (*new, *present):
        return tuple(present)
    assert gpu.geometry is not None, "only a card that can be cut gets instances"
    held = [*used, *(i.placement for i in gpu.instances if i.reserved is not None)]
    gone = []
    for placement in present:
        if placement in held:
            continue
        if _fits(gpu.geometry, held, placement):
            held.append(placement)
        else:
            gone.append(placement)
    return tuple(gone)


def _fits(product: Product, held: Sequence[Placement], another: Placement) -> bool:
    """Whether `another` can be beside `held`. The masks decide nearly always, and cheaply."""
    mask = option_of(product, another).mask
    if any(option_of(product, p).mask & mask for p in held):
        return False
    try:
        Layout(product, (*held, another))
    except IllegalLayout:
        return False
    return True


def _rank(shape: Shape) -> tuple[object, ...]:
    return shape.changes, shape.fragmentation, shape.used


def _keepings(instances: Sequence[Instance], wanted: Sequence[Instance]) -> Iterator[tuple[Instance, ...]]:
    """Every choice of instances to go on using, those first that keep the most running replicas."""
    free = [i for i in instances if i.reserved is None and i not in wanted]
    for lost in range(len(wanted) + 1):
        for running in combinations(wanted, len(wanted) - lost):
            for taken in range(len(free) + 1):
                for idle in combinations(free, taken):
                    yield (*running, *idle)
