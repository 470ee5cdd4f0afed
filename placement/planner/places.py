"""One running GPU in an integer program: a variable for every placement instead of one for every shape.

A GPU that holds five replicas has hundreds of shapes, and only some twenty placements. What makes a layout legal is on most
products that no memory slice is taken twice: rows over intervals, whose relaxation is as tight as that over shapes (their
matrix has consecutive ones). Where compute slices, numbers or media engines decide as well (`overlap_decides` tells), shapes
are used.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from model_registry.catalogue import Product
from model_registry.geometry import Geometry, Placement, option_of
from placement.planner.shapes import GpuClass, Shape, Shaper, in_the_way
from placement.planner.solver import Program
from placement.planner.types import WHOLE, WHOLE_GPU, FleetGpu, Instance


@dataclass(frozen=True, slots=True)
class Places:
    """The variables of one GPU: `used` by placement, `gone` for instances that are destroyed, `on` where it is paid for."""

    gpu: FleetGpu
    used: Mapping[Placement, int]
    gone: Mapping[Placement, int]
    on: int

    def own(self, names: Collection[str]) -> dict[tuple[str, str], list[int]]:
        """For each (want, profile) the variables of placements on which a replica of it runs."""
        found: dict[tuple[str, str], list[int]] = defaultdict(list)
        for i in self.gpu.instances:
            if i.demand in names and i.placement in self.used:
                found[str(i.demand), i.profile].append(self.used[i.placement])
        return found

    def changes(self) -> dict[int, float]:
        """Instances created and destroyed."""
        there = {i.placement for i in self.gpu.instances}
        return {v: 1.0 for p, v in self.used.items() if p not in there} | dict.fromkeys(self.gone.values(), 1.0)

    def taken(self, values: Iterable[int]) -> tuple[Placement, ...]:
        """The placements whose variables are among `values`."""
        chosen = frozenset(values)
        return tuple(sorted(p for p, v in self.used.items() if v in chosen))


def overlap_decides(product: Product, profiles: Iterable[str]) -> bool:
    """Whether placements of these profiles that do not overlap are always legal together."""
    infos = [product.profile(name) for name in profiles]
    if any(info.media_extensions or not info.plannable for info in infos):
        return False
    size = product.memory_slices or 0
    spans = [(start, start + (info.memory_slices or 0), info) for info in infos for start in info.placements]

    def most(weights: Mapping[str, int]) -> int:
        """The largest sum of weights on disjoint intervals."""
        best = [0] * (size + 1)
        for stop in range(1, size + 1):
            ending = (best[start] + weights.get(info.name, 0) for start, end, info in spans if end == stop)
            best[stop] = max(best[stop - 1], *ending, 0)
        return best[size]

    return most({i.name: i.g for i in infos}) <= product.compute_slices and all(
        most({i.name: 1}) <= i.max_instances for i in infos
    )


def can_be_placed(gpu: FleetGpu, profiles: Collection[str]) -> bool:
    """Whether `add_places` covers this GPU: open, with something on it, and legal wherever nothing overlaps."""
    if not gpu.open or not any(i.reserved is None for i in gpu.instances):
        return False
    if gpu.geometry is None:
        return True
    here = {i.profile for i in gpu.instances} | set(_known(gpu, profiles))
    return overlap_decides(gpu.geometry, sorted(here - {WHOLE_GPU}))


def placed(shaper: Shaper, gpus: Iterable[FleetGpu]) -> tuple[GpuClass, ...]:
    """Classes of GPUs with everything that runs: without shapes where `can_be_placed`, with them elsewhere."""
    gpus = tuple(gpus)
    alone = {g.id for g in gpus if can_be_placed(g, shaper.profiles(g.product))}
    single = (GpuClass(g.product, g.product, g.price_per_hour, (g,), ()) for g in gpus if g.id in alone)
    return (*single, *shaper.detailed(g for g in gpus if g.id not in alone))


def add_places(program: Program, gpu: FleetGpu, profiles: Collection[str], names: Collection[str]) -> Places:
    """The variables and rows of one GPU that `can_be_placed`. `profiles` are those that anybody wants on its product."""
    masks = {p: _mask(gpu, p) for p in (*_candidates(gpu, profiles, names), *(i.placement for i in gpu.instances))}
    used = {p: program.variable(1) for p in _candidates(gpu, profiles, names)}
    on = program.variable(1)
    reserved = any(i.reserved is not None for i in gpu.instances)
    program.row({on: 1.0}, 1.0 if reserved else 0.0)
    covering: dict[int, dict[int, float]] = defaultdict(dict)
    for placement, variable in used.items():
        for bit in _bits(masks[placement]):
            covering[bit][variable] = 1.0
    for terms in covering.values():
        program.row(terms | {on: -1.0}, upper=0.0)
    gone: dict[Placement, int] = {}
    for i in gpu.instances:
        rivals = [p for p in used if p != i.placement and masks[p] & masks[i.placement]]
        if i.reserved is not None or not rivals:
            continue
        gone[i.placement] = destroyed = program.variable(1)
        for bit in _bits(masks[i.placement]):
            over = {used[p]: 1.0 for p in rivals if masks[p] >> bit & 1}
            if over:
                program.row(over | {destroyed: -1.0}, upper=0.0)
    return Places(gpu, used, gone, on)


def realised(group: GpuClass, taken: tuple[Placement, ...], names: Collection[str], fragmentation: int) -> GpuClass:
    """The GPU's class with the one shape that was chosen for it."""
    (gpu,) = group.members
    there = {i.placement: i for i in gpu.instances}
    kept: list[Instance] = [there[p] for p in taken if p in there and there[p].demand in names]
    created = sum(p not in there for p in taken)
    shape = Shape(
        taken,
        tuple(sorted(Counter(p.profile for p in taken).items())),
        tuple(sorted(Counter((str(i.demand), i.profile) for i in kept).items())),
        created + len(in_the_way(gpu, taken)) if created else 0,
        fragmentation,
        bool(taken) or any(i.reserved is not None for i in gpu.instances),
    )
    return GpuClass(group.group, group.product, group.price_per_hour, group.members, (shape,))


def _candidates(gpu: FleetGpu, profiles: Collection[str], names: Collection[str]) -> tuple[Placement, ...]:
    """Every placement that may be used: what is wanted and free beside the reserved, and what is kept."""
    reserved = [i.placement for i in gpu.instances if i.reserved is not None]
    found = {i.placement for i in gpu.instances if i.demand in names}
    if WHOLE_GPU in profiles and gpu.whole and not reserved:
        found.add(WHOLE)
    if gpu.geometry is not None:
        starts = Geometry(gpu.geometry, tuple(_known(gpu, profiles))).free_starts(reserved)
        found |= {Placement(start, name) for name, free in starts.items() for start in free}
    return tuple(sorted(found))


def _known(gpu: FleetGpu, profiles: Collection[str]) -> list[str]:
    assert gpu.geometry is not None
    return [p.name for p in gpu.geometry.profiles if p.name in profiles and p.plannable]


def _mask(gpu: FleetGpu, placement: Placement) -> int:
    if placement == WHOLE:
        return (1 << ((gpu.geometry.memory_slices if gpu.geometry else None) or 1)) - 1
    assert gpu.geometry is not None
    return option_of(gpu.geometry, placement).mask


def _bits(mask: int) -> list[int]:
    return [bit for bit in range(mask.bit_length()) if mask >> bit & 1]
