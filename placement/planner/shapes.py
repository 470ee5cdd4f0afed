"""Shapes: everything that a GPU could be used for, and GPUs that are alike put together.

A shape says exactly which placements are used: those kept from what is there, and a pattern added beside them. Instances
that nobody uses stay as they are unless they are in the way of what is added; taking them down costs layout changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from model_registry.catalogue import Product
from model_registry.errors import IllegalLayout
from model_registry.geometry import Layout, Placement
from placement.planner.fragmentation import Fragmentation
from placement.planner.patterns import Counts, PatternBook, counted, maximal
from placement.planner.types import WHOLE, WHOLE_GPU, FleetGpu, Instance
from placement.planner.wants import Want

Own = tuple[tuple[tuple[str, str], int], ...]
"""How many running replicas stay, by (want, profile)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What one GPU is used for, besides what is reserved on it.

    `used` are all placements in use, `slots` their profiles by count, `own` those on which the replica that runs there
    can stay. `changes` are instances created and destroyed to get there. `on` tells whether the GPU is paid for. A
    `vacated` GPU loses everything and joins the empty ones of its pool.
    """

    used: tuple[Placement, ...]
    slots: Counts
    own: Own
    changes: int
    fragmentation: int
    on: bool
    vacated: bool = False


@dataclass(frozen=True, slots=True)
class GpuClass:
    """GPUs that are alike in everything that a plan looks at, and the shapes that each of them can take.

    `group` names the pool of slots that they belong to; `closed` says that only the replicas that run there may use it.
    A class without members stands for the vacated GPUs of the classes numbered in `vacated_by`; one without shapes is a
    single GPU whose placements are chosen one by one (see `placement.planner.places`).
    """

    group: str
    product: str
    price_per_hour: float
    members: tuple[FleetGpu, ...]
    shapes: tuple[Shape, ...]
    closed: bool = False
    vacated_by: tuple[int, ...] = ()


class Shaper:
    """Makes classes of GPUs, for one list of wants.

    Between shapes that serve alike the one with the fewest changes is taken, with `tidy_first` the least fragmented one.
    Of wants in `surplus` more replicas run than are wanted, so that losing one of theirs may cost nothing. `budget` is
    about how many shapes there may be in all; `complete` tells whether it was enough for those that were asked for.
    """

    def __init__(
        self, wants: Sequence[Want], *, surplus: Collection[str] = (), tidy_first: bool = False, budget: int = 20_000
    ) -> None:
        self._names = frozenset(w.name for w in wants)
        self._surplus = frozenset(surplus)
        self._tidy_first = tidy_first
        self._budget = budget
        self._profiles: dict[str, set[str]] = {}
        for option in (o for w in wants for o in w.options):
            self._profiles.setdefault(option.product, set()).add(option.profile)
        self._books: dict[Product, PatternBook] = {}
        self._measures: dict[Product, Fragmentation] = {}
        self.complete = True

    def coarse(self, gpus: Iterable[FleetGpu], *, maximal: bool = False) -> tuple[GpuClass, ...]:
        """As if nothing ran that can be moved: what demand and price depend on, in very few classes.

        With `maximal` only shapes that no other contains: enough where slots may stay empty.
        """
        bare = [(self._bare(g) if g.open else g, g) for g in gpus]
        classes = self._classes(bare, group=lambda g: g.product if g.open else g.id)
        return tuple(replace(c, shapes=_maximal(c.shapes)) for c in classes) if maximal else classes

    def detailed(
        self, gpus: Iterable[FleetGpu], *, most_lost: int | None = None, by_gpu: bool = False
    ) -> tuple[GpuClass, ...]:
        """With everything that runs.

        With `most_lost`, no shape loses more than so many replicas that are not in surplus, except by cutting the whole
        GPU anew. `by_gpu` gives every GPU a pool of slots of its own: what spreading depends on.
        """
        pairs = [(g, g) for g in gpus]
        self.complete = True
        classes = self._classes(
            pairs, group=lambda g: g.product if g.open and not by_gpu else g.id, by_gpu=by_gpu, most_lost=most_lost
        )
        return (*classes, *self._vacated(classes))

    def profiles(self, product: str) -> Collection[str]:
        """The profiles that anybody wants on a product."""
        return self._profiles.get(product, set())

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
        self,
        pairs: Sequence[tuple[FleetGpu, FleetGpu]],
        *,
        group: Callable[[FleetGpu], str],
        by_gpu: bool = False,
        most_lost: int | None = None,
    ) -> tuple[GpuClass, ...]:
        alike: dict[tuple[object, ...], list[tuple[FleetGpu, FleetGpu]]] = {}
        for seen, real in pairs:
            alike.setdefault(self._signature(seen, by_gpu=by_gpu), []).append((seen, real))
        share = max(1, self._budget // max(1, len(alike)))
        return tuple(
            GpuClass(
                group(same[0][1]),
                same[0][0].product,
                same[0][0].price_per_hour,
                tuple(real for _, real in same),
                self._shapes(same[0][0], share, most_lost),
                closed=not same[0][1].open,
            )
            for same in alike.values()
        )

    def _vacated(self, classes: Sequence[GpuClass]) -> Iterator[GpuClass]:
        """For GPUs that can be vacated, the shapes of an empty one: once for all that are alike then."""
        alike: dict[tuple[object, ...], list[int]] = {}
        for number, group in enumerate(classes):
            if any(shape.vacated for shape in group.shapes):
                empty = self._bare(group.members[0])
                alike.setdefault((group.group, *self._signature(empty, by_gpu=False)), []).append(number)
        for numbers in alike.values():
            like = classes[numbers[0]]
            shapes = self._shapes(self._bare(like.members[0]), 1, None)
            yield GpuClass(like.group, like.product, like.price_per_hour, (), shapes, vacated_by=tuple(numbers))

    def _signature(self, gpu: FleetGpu, *, by_gpu: bool) -> tuple[object, ...]:
        """What makes GPUs alike. Replicas' names and their requests do not matter here, only whose they are."""
        if by_gpu or not gpu.open:
            return (gpu.id,)
        inside = tuple(
            (i.placement, i.demand if i.demand in self._names else None, i.reserved is not None) for i in gpu.instances
        )
        return gpu.product, gpu.geometry, gpu.price_per_hour, gpu.whole, inside

    def _shapes(self, gpu: FleetGpu, budget: int, most_lost: int | None) -> tuple[Shape, ...]:
        """The shapes worth having: one for the same slots and the same replicas kept."""
        best: dict[tuple[Counts, Own, bool], tuple[tuple[object, ...], Shape]] = {}
        for shape in self._walk(gpu, budget, most_lost):
            key = shape.slots, shape.own, shape.vacated
            drained = sum(i.requests for i in gpu.instances if i.placement not in shape.used)
            rank = (*self._rank(shape.changes, shape.fragmentation, drained), shape.used)
            if key not in best or rank < best[key][0]:
                best[key] = rank, shape
        return tuple(best[key][1] for key in sorted(best))

    def _walk(self, gpu: FleetGpu, budget: int, most_lost: int | None) -> Iterator[Shape]:
        yield self._shape(gpu, (), ())
        if gpu.draining:
            return
        wanted = [i for i in gpu.instances if i.demand in self._names]
        if gpu.cordoned:
            for n in range(len(wanted), 0, -1):
                yield from (self._shape(gpu, kept, ()) for kept in combinations(wanted, n))
            return
        hard = [i for i in wanted if i.demand not in self._surplus]
        limit = len(hard) if most_lost is None else min(most_lost, len(hard))
        made = 0
        for kept in _keepings(gpu.instances, hard, limit):
            if made > budget:
                self.complete = False
                break
            for added in self._additions(gpu, kept):
                made += 1
                yield self._shape(gpu, kept, added)
        if limit < len(hard) or made > budget:
            yield from self._cut_anew(gpu)

    def _cut_anew(self, gpu: FleetGpu) -> Iterator[Shape]:
        """However small the budget: to take everything down and cut the card anew is always possible."""
        if any(i.reserved is not None for i in gpu.instances):
            for added in self._additions(gpu, ()):
                yield self._shape(gpu, (), added)
        else:
            yield Shape((), (), (), len(gpu.instances), 0, on=False, vacated=True)

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
        known = profiles & {p.name for p in gpu.geometry.profiles if p.plannable}
        others = [p for i in gpu.instances if (p := i.placement) not in beside and p != WHOLE]
        if not others:
            yield from (pattern.placements for pattern in self._book(gpu.geometry).patterns(known, beside))
        else:
            yield from self._sparing(gpu.geometry, known, beside, others)

    def _sparing(
        self, product: Product, profiles: set[str], beside: Sequence[Placement], others: Sequence[Placement]
    ) -> Iterator[tuple[Placement, ...]]:
        """For each choice of profiles the starts that spare `others`, which nobody uses, or leave the most usable rest."""
        masks = {p: self._measure(product).masks[p] for p in others}
        best: dict[Counts, tuple[tuple[int, ...], tuple[Placement, ...]]] = {}
        for pattern in self._book(product).placed(profiles, beside):
            created = sum(p not in masks for p in pattern.placements)
            gone = sum(1 for p, mask in masks.items() if mask & pattern.mask and p not in pattern.placements)
            rank = self._rank(created + gone, pattern.fragmentation, 0)
            if pattern.counts not in best or rank < best[pattern.counts][0]:
                best[pattern.counts] = rank, pattern.placements
        return (placements for _, placements in best.values())

    def _rank(self, changes: int, fragmentation: int, drained: int) -> tuple[int, ...]:
        """Between what serves alike, the smallest: layout changes, requests drained, fragmentation; or the last one first."""
        return (fragmentation, changes, drained) if self._tidy_first else (changes, drained, fragmentation)

    def _shape(self, gpu: FleetGpu, kept: tuple[Instance, ...], added: tuple[Placement, ...]) -> Shape:
        used = tuple(sorted((*(i.placement for i in kept), *added)))
        own = Counter((i.demand, i.profile) for i in kept if i.demand is not None and i.demand in self._names)
        present = {i.placement for i in gpu.instances}
        created = sum(p not in present for p in added)
        gone = len(in_the_way(gpu, used)) if created else 0
        return Shape(
            used,
            counted(used),
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


def _maximal(shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """Shapes whose slots no other contains, and those that use nothing."""
    largest = maximal([s.slots for s in shapes])
    return tuple(s for s in shapes if not s.used or s.slots in largest)


def in_the_way(gpu: FleetGpu, used: Iterable[Placement]) -> tuple[Placement, ...]:
    """Instances that have to go before all of `used` are there, because the two cannot be on the GPU together.

    Instances that nobody will use go only for that; changing a card between whole and cut takes them all.
    """
    if not gpu.instances:
        return ()
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
    """Whether `another` can be beside `held`. Overlap decides nearly always, and cheaply."""
    start, stop = another.start, another.start + (product.profile(another.profile).memory_slices or 0)
    if any(p.start < stop and start < p.start + (product.profile(p.profile).memory_slices or 0) for p in held):
        return False
    try:
        Layout(product, (*held, another))
    except IllegalLayout:
        return False
    return True


def _keepings(
    instances: Sequence[Instance], hard: Sequence[Instance], most_lost: int
) -> Iterator[tuple[Instance, ...]]:
    """Every choice of instances to go on using that loses at most so many of `hard`, those first that lose fewest."""
    soft = [i for i in instances if i.reserved is None and i not in hard]
    for lost in range(most_lost + 1):
        for running in combinations(hard, len(hard) - lost):
            for dropped in range(len(soft) + 1):
                for others in combinations(soft, len(soft) - dropped):
                    yield (*running, *others)
