"""What one GPU is to hold, and where: a layout by counts or starts becomes placements that disturb as little as can be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations

from model_registry.catalogue import Product
from model_registry.errors import IllegalLayout, SlicewayError
from model_registry.geometry import Geometry, Layout, Placement, option_of, picture
from placement.gpus import GpuInstance, GpuState


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one GPU is to hold: these placements, and besides so many of each profile wherever they fit. All of it.

    `where` is the place in the configuration that asks for it.
    """

    mig: bool = True
    exact: tuple[Placement, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    where: str = "fleet.layouts"

    @property
    def profiles(self) -> tuple[str, ...]:
        """Every profile that it names, once."""
        return tuple(dict.fromkeys((*(p.profile for p in self.exact), *self.counts)))

    @property
    def all_counts(self) -> Counter[str]:
        """How many of each profile, wherever they lie."""
        return Counter(p.profile for p in self.exact) + Counter(self.counts)


def exactly(placements: Iterable[Placement], *, mig: bool = True, where: str = "fleet.layouts") -> Wanted:
    """These placements and nothing else."""
    return Wanted(mig=mig, exact=tuple(sorted(placements)), where=where)


def wanted_on(product: Product, entries: Iterable[tuple[str, int]], *, where: str) -> Wanted:
    """Entries `1g.10gb` or `3g.40gb@4` with their number, in the product's own names.

    Raises UnknownProfile with the nearest names, or for a start that the profile does not have.
    """
    exact: list[Placement] = []
    counts: Counter[str] = Counter()
    for entry, count in entries:
        name, at, _ = entry.partition("@")
        profile = product.profile(name.strip())
        if not at:
            counts[profile.name] += count
            continue
        placement = Placement(Placement.parse(entry).start, profile.name)
        if profile.plannable:
            option_of(product, placement)
        exact += [placement] * count
    return Wanted(exact=tuple(sorted(exact)), counts=dict(counts), where=where)


def check_possible(product: Product, wanted: Wanted) -> None:
    """Raise IllegalLayout, with a picture of the memory slices that collide, for what no such GPU can hold."""
    Layout(product, wanted.exact)
    if geometry_for(product, wanted).place(wanted.counts, wanted.exact) is None:
        raise _impossible(product, wanted)


def resolve(gpu: GpuState, wanted: Wanted) -> Layout:
    """Where everything goes on `gpu`, beside what is there.

    First as few busy instances are lost as possible, then as few idle ones, then what stays free is as useful as can be
    (the rule of `Geometry.place`, which takes starts at the edge first: a lone 3g goes to 4).
    Raises IllegalLayout if no such GPU can hold it, UnknownProfile if the starts are not known.
    """
    product = gpu.geometry
    if product is None:
        raise ValueError(f"{gpu.label} has no profiles")
    check_possible(product, wanted)
    geometry = geometry_for(product, wanted)
    best: tuple[tuple[int, ...], Layout] | None = None
    best_cost: tuple[int, int] | None = None
    for cost, kept in _keepings(gpu, wanted):
        if best_cost is not None and cost > best_cost:
            break
        occupied = (*wanted.exact, *kept)
        layout = geometry.place(wanted.all_counts - Counter(p.profile for p in occupied), occupied)
        if layout is None:
            continue
        rank = geometry.usefulness(layout)
        if best is None or rank > best[0]:
            best, best_cost = (rank, layout), cost
    if best is None:  # impossible: keeping nothing is among the ways, and was checked above
        raise _impossible(product, wanted)
    return best[1]


def geometry_for(product: Product, wanted: Wanted) -> Geometry:
    """The geometry of the plain profiles and of the variants that are wanted."""
    names = dict.fromkeys((*(p.name for p in product.base_profiles), *wanted.profiles))
    return Geometry(product, tuple(names))


def _keepings(gpu: GpuState, wanted: Wanted) -> Iterator[tuple[tuple[int, int], tuple[Placement, ...]]]:
    """What of the instances there could stay, with how many busy and how many others are lost; cheapest first."""
    candidates = [i for i in _distinct(gpu) if _could_stay(gpu, i, wanted)]
    lost_anyway = [i for i in gpu.instances if i not in candidates and i.placement not in wanted.exact]
    ways: list[tuple[tuple[int, int], tuple[Placement, ...]]] = []
    for number in range(len(candidates), -1, -1):
        for kept in combinations(candidates, number):
            placements = tuple(p for i in kept if (p := i.placement) is not None)
            if Counter(p.profile for p in placements) - Counter(wanted.counts):
                continue
            lost = [*lost_anyway, *(i for i in candidates if i not in kept)]
            busy = sum(bool(i.processes) for i in lost)
            ways.append(((busy, len(lost) - busy), placements))
    return iter(sorted(ways))


def _distinct(gpu: GpuState) -> Iterator[GpuInstance]:
    return (i for i in gpu.instances if i.placement is not None)


def _could_stay(gpu: GpuState, instance: GpuInstance, wanted: Wanted) -> bool:
    """Whether it is of a profile that is wanted by count, and in the way of no exact placement."""
    if instance.placement is None or gpu.geometry is None or not wanted.counts.get(instance.profile):
        return False
    try:
        Layout(gpu.geometry, (*wanted.exact, instance.placement))
    except SlicewayError:
        return False
    return instance.placement not in wanted.exact


def _impossible(product: Product, wanted: Wanted) -> IllegalLayout:
    """Why counts cannot be placed: the widest go first, and the first that finds no room is drawn where it collides least."""
    geometry = geometry_for(product, wanted)
    names = sorted(Counter(wanted.counts).elements(), key=lambda n: -(product.profile(n).memory_slices or 0))
    listed = ", ".join(f"{count}x {name}" for name, count in wanted.all_counts.items())
    placed = wanted.exact
    fitting: Counter[str] = Counter()
    for name in names:
        fitting[name] += 1
        layout = geometry.place(fitting, wanted.exact)
        if layout is not None:
            placed = layout.placements
            continue
        starts = product.profile(name).placements
        nearest = min(starts, key=lambda s: (_collisions(product, Placement(s, name), placed), s))
        drawn = (*placed, Placement(nearest, name))
        reason = _reason(product, drawn)
        return IllegalLayout(
            f"{listed} cannot be on one {product.name}: the last {name} finds no room: {reason}\n{picture(product, drawn)}",
            remedy=f"sliceway profiles --gpu {product.short_names[0] if product.short_names else product.name} shows what can.",
        )
    return IllegalLayout(f"{listed} cannot be on one {product.name}")


def _reason(product: Product, placements: tuple[Placement, ...]) -> str:
    try:
        Layout(product, placements)
    except IllegalLayout as error:
        return error.message.splitlines()[0].rpartition(f"one {product.name}: ")[2]
    return "no placement of all is left"


def _collisions(product: Product, placement: Placement, others: Iterable[Placement]) -> int:
    mask = option_of(product, placement).mask
    return sum((mask & option_of(product, other).mask).bit_count() for other in others)
