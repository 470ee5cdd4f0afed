"""The fewest GPUs of one product that hold given profiles, proven.

Gilmore and Gomory's formulation of cutting stock (1961): one integer variable for every pattern of profiles on a GPU
instead of one for every profile on every GPU. MIG has few legal layouts (78 maximal ones on an H100), so all patterns are
written down, the bound of the linear relaxation is nearly always tight, and the size of the program does not grow with
the demand. GPUs in use are classes of their own: their patterns are what can be added to what they hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, repeat

from model_registry.catalogue import Product
from model_registry.errors import UnknownProfile
from model_registry.geometry import Layout, Placement
from placement.errors import PlanError
from placement.planner.patterns import Pattern, PatternBook
from placement.planner.solver import INFINITY, Limits, Program, Solved

_TIDY = Limits(work=800_000, nodes=2000)
"""For the choice among layouts that need equally few GPUs: worth a little time, and no proof."""


_Run = tuple[tuple[Placement, ...], int]
"""The same placements on so many GPUs."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Which GPU holds what. `occupied` are the GPUs that held something, `created` what is added, per GPU.

    `created` begins with the occupied GPUs, in their order; some of them get nothing. `lower_bound` is proven: no
    packing needs fewer GPUs. `reproducible` is false where the clock ended a search: another run may find more.
    """

    product: Product
    occupied: tuple[Layout, ...]
    created: tuple[tuple[Placement, ...], ...]
    lower_bound: int
    reproducible: bool = True

    @property
    def gpus(self) -> int:
        """GPUs that hold anything."""
        return sum(bool(kept or added) for kept, added in zip(self._kept(), self.created, strict=True))

    @property
    def optimal(self) -> bool:
        """Whether it is proven that no fewer do."""
        return self.gpus == self.lower_bound

    def layouts(self) -> tuple[Layout, ...]:
        """Everything that each GPU holds in the end."""
        return tuple(
            Layout(self.product, (*kept, *added)) for kept, added in zip(self._kept(), self.created, strict=True)
        )

    def _kept(self) -> tuple[tuple[Placement, ...], ...]:
        """What each GPU held before."""
        return (*(o.placements for o in self.occupied), *((),) * (len(self.created) - len(self.occupied)))


@dataclass(frozen=True, slots=True)
class _Class:
    """GPUs that are alike: the numbers of the occupied ones, or none for as many empty ones as are needed."""

    kept: tuple[Placement, ...]
    members: tuple[int, ...] = ()
    patterns: tuple[Pattern, ...] = ()

    @property
    def fresh(self) -> bool:
        return not self.members


@dataclass(slots=True)
class _Columns:
    """The variables of one program: how often a class uses a pattern."""

    program: Program = field(default_factory=Program)
    of: dict[tuple[int, int], int] = field(default_factory=dict)


def pack(
    product: Product, demand: Mapping[str, int], occupied: Sequence[Layout] = (), limits: Limits | None = None
) -> Packing:
    """Put `demand` (profiles by count) on the fewest GPUs of `product`, `occupied` ones first used up.

    What is on occupied GPUs stays where it is, and these GPUs count whether or not something is added; one that holds
    nothing is as good as a fresh one, and counts if something is. Among equally
    few GPUs those layouts are taken that leave the most usable rest. Raises UnknownProfile for a profile that the product
    has not, or of which nobody knows where it can start; PlanError if the time was too short for any packing.
    """
    limits = (limits or Limits()).watched()
    wanted = _wanted(product, demand)
    book = PatternBook(product)
    held = [layout for layout in occupied if layout.placements]
    classes = _classes(book, wanted, held)
    solved, chosen = _fewest(wanted, classes, limits)
    fresh = sum(n for (c, _), n in chosen.items() if classes[c].fresh)
    everything = _with_all_patterns(book, wanted, classes)
    tidy = _tidiest(wanted, everything, fresh, replace(_TIDY, watch=limits.watch))
    created = _created(everything, tidy, wanted, len(held)) if tidy else _created(classes, chosen, wanted, len(held))
    reproducible = limits.watch is None or not limits.watch.expired
    return Packing(
        product,
        tuple(occupied),
        _in_order(occupied, created),
        len(held) + round(solved.lower_bound),
        reproducible,
    )


def _in_order(
    occupied: Sequence[Layout], created: Sequence[tuple[Placement, ...]]
) -> tuple[tuple[Placement, ...], ...]:
    """What is created, by GPU. Those of `occupied` that hold nothing are taken first of the fresh ones."""
    held = sum(bool(layout.placements) for layout in occupied)
    adding, fresh = iter(created[:held]), iter(created[held:])
    begun = [next(adding) if layout.placements else next(fresh, ()) for layout in occupied]
    return (*begun, *fresh)


def _wanted(product: Product, demand: Mapping[str, int]) -> dict[str, int]:
    """The demand in the product's own names, sorted, each profile known to fit an empty GPU."""
    wanted: Counter[str] = Counter()
    for name, count in demand.items():
        if count < 0:
            raise ValueError(f"{count}x {name}")
        wanted[product.profile(name).name] += count
    for name, count in wanted.items():
        if count and not product.profile(name).plannable:
            raise UnknownProfile(
                f"nobody has published where {name} can start on {product.name}",
                remedy="Its layouts can only be planned on the machine, with the driver's answer.",
            )
    return {name: count for name, count in sorted(wanted.items()) if count}


def _classes(book: PatternBook, wanted: Mapping[str, int], occupied: Sequence[Layout]) -> list[_Class]:
    members: dict[tuple[Placement, ...], list[int]] = {}
    for number, layout in enumerate(occupied):
        members.setdefault(layout.placements, []).append(number)
    states = [_Class((), (), book.maximal(wanted))]
    return states + [_Class(kept, tuple(m), book.maximal(wanted, kept)) for kept, m in sorted(members.items())]


def _with_all_patterns(book: PatternBook, wanted: Mapping[str, int], classes: Iterable[_Class]) -> list[_Class]:
    return [_Class(c.kept, c.members, book.patterns(wanted, c.kept)) for c in classes]


def _columns(classes: Sequence[_Class]) -> _Columns:
    columns = _Columns()
    for c, group in enumerate(classes):
        for p, pattern in enumerate(group.patterns):
            if pattern.counts or not group.fresh:
                columns.of[c, p] = columns.program.variable(INFINITY if group.fresh else len(group.members))
        if not group.fresh:
            mine = {columns.of[c, p]: 1.0 for p in range(len(group.patterns))}
            columns.program.row(mine, len(group.members), len(group.members))
    return columns


def _supply(classes: Sequence[_Class], columns: _Columns, profile: str) -> dict[int, float]:
    return {v: float(n) for (c, p), v in columns.of.items() if (n := classes[c].patterns[p].count(profile))}


def _fewest(
    wanted: Mapping[str, int], classes: Sequence[_Class], limits: Limits
) -> tuple[Solved, dict[tuple[int, int], int]]:
    columns = _columns(classes)
    for profile, count in wanted.items():
        columns.program.row(_supply(classes, columns, profile), count)
    objective = {v: 1.0 for (c, _), v in columns.of.items() if classes[c].fresh}
    solved = columns.program.minimise(objective, limits)
    if solved is None:
        raise PlanError("no packing was found within the work allowed", remedy="Allow more time.")
    return solved, {key: n for key, v in columns.of.items() if (n := solved.count(v))}


def _tidiest(
    wanted: Mapping[str, int], classes: Sequence[_Class], fresh: int, limits: Limits
) -> dict[tuple[int, int], int] | None:
    """Exactly the demand on as many GPUs, with the least fragmentation; None where that is not found in time."""
    columns = _columns(classes)
    for profile, count in wanted.items():
        columns.program.row(_supply(classes, columns, profile), count, count)
    columns.program.row({v: 1.0 for (c, _), v in columns.of.items() if classes[c].fresh}, fresh, fresh)
    cost = {v: float(classes[c].patterns[p].fragmentation) for (c, p), v in columns.of.items()}
    solved = columns.program.minimise(cost, limits)
    return {key: n for key, v in columns.of.items() if (n := solved.count(v))} if solved else None


def _created(
    classes: Sequence[_Class], chosen: Mapping[tuple[int, int], int], wanted: Mapping[str, int], occupied: int
) -> tuple[tuple[Placement, ...], ...]:
    """Patterns handed to GPUs, occupied ones first; what is more than the demand is left out."""
    left = Counter(wanted)
    used: list[tuple[Placement, ...]] = [()] * occupied
    fresh: list[_Run] = []
    for c, group in sorted(enumerate(classes), key=lambda item: item[1].fresh):
        runs = [
            run for p, pattern in enumerate(group.patterns) for run in _handed_out(pattern, chosen.get((c, p), 0), left)
        ]
        if group.fresh:
            fresh = sorted(runs, key=lambda run: (-len(run[0]), run[0]))
        for member, placements in zip(group.members, _expanded(runs), strict=False):
            used[member] = placements
    return (*used, *_expanded(fresh))


def _handed_out(pattern: Pattern, times: int, left: Counter[str]) -> Iterator[_Run]:
    """What so many GPUs get of a pattern: all of it as long as all is wanted. Takes it off `left`."""
    whole = min(times, *(left[name] // n for name, n in pattern.counts)) if pattern.counts else times
    left.subtract({name: n * whole for name, n in pattern.counts})
    yield pattern.placements, whole
    for _ in range(times - whole):
        yield _needed(pattern, left), 1


def _expanded(runs: Iterable[_Run]) -> Iterator[tuple[Placement, ...]]:
    return chain.from_iterable(repeat(placements, times) for placements, times in runs)


def _needed(pattern: Pattern, left: Counter[str]) -> tuple[Placement, ...]:
    """The pattern's placements as far as they are still wanted; takes them off `left`."""
    added = []
    for placement in pattern.placements:
        if left[placement.profile] > 0:
            left[placement.profile] -= 1
            added.append(placement)
    return tuple(added)
