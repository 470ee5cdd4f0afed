"""An answer of the first program as one of the second: a place to begin from.

The first program knows how many GPUs hold which slots, the second also what runs on each. Which GPU takes which slots is
chosen greedily, those first that keep the most replicas. The search starts from there instead of from nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from placement.planner.master import Answer
from placement.planner.patterns import Counts
from placement.planner.shapes import GpuClass, Shape


def carried(
    coarse: Sequence[GpuClass], answer: Answer, classes: Sequence[GpuClass]
) -> dict[tuple[int, int], int] | None:
    """How often each class takes each shape, so that every pool has the slots of `answer`; None if that fails."""
    home = {gpu.id: c for c, group in enumerate(coarse) for gpu in group.members}
    parts: dict[int, list[int]] = defaultdict(list)
    for d, group in enumerate(classes):
        if group.members:
            parts[home[group.members[0].id]].append(d)
    pools = {v: d for d, group in enumerate(classes) for v in group.vacated_by}
    chosen: Counter[tuple[int, int]] = Counter()
    for c, group in enumerate(coarse):
        wanted = Counter({s: n for (k, s), n in answer.shapes.items() if k == c})
        if not _match([group.shapes[s] for s in wanted], list(wanted.values()), parts[c], classes, pools, chosen):
            return None
    return dict(chosen)


def same_shapes(
    single: Sequence[GpuClass], answer: Answer, classes: Sequence[GpuClass]
) -> dict[tuple[int, int], int] | None:
    """The shapes of `answer` by the numbers of other classes of the same GPUs; None if one of them is not there."""
    home = {gpu.id: d for d, group in enumerate(classes) for gpu in group.members}
    chosen: Counter[tuple[int, int]] = Counter()
    for (c, s), count in answer.shapes.items():
        if not single[c].members:
            return None
        shape, d = single[c].shapes[s], home[single[c].members[0].id]
        like = next((t for t, o in enumerate(classes[d].shapes) if (o.slots, o.own) == (shape.slots, shape.own)), None)
        if like is None:
            return None
        chosen[d, like] += count
    return dict(chosen)


def _match(
    targets: Sequence[Shape],
    wanted: list[int],
    parts: Sequence[int],
    classes: Sequence[GpuClass],
    pools: Mapping[int, int],
    chosen: Counter[tuple[int, int]],
) -> bool:
    """Hand the shapes of one coarse class to the classes that it consists of."""
    ways = []
    for d in parts:
        by_slots = _best_by_slots(classes[d].shapes)
        for t, target in enumerate(targets):
            if (keys := _keys(d, target.slots, by_slots, classes, pools)) is not None:
                shape = classes[d].shapes[keys[0][1]]
                ways.append((-sum(n for _, n in shape.own), shape.changes, d, t, keys))
    left = {d: len(classes[d].members) for d in parts}
    for _, _, d, t, keys in sorted(ways):
        if count := min(left[d], wanted[t]):
            left[d] -= count
            wanted[t] -= count
            chosen.update(dict.fromkeys(keys, count))
    return not any(left.values()) and not any(wanted)


def _best_by_slots(shapes: Sequence[Shape]) -> dict[Counts, int]:
    """For each choice of slots the shape that keeps the most replicas."""
    best: dict[Counts, int] = {}
    ranks: dict[Counts, tuple[int, int]] = {}
    for s, shape in enumerate(shapes):
        rank = (-sum(n for _, n in shape.own), shape.changes)
        if not shape.vacated and (shape.slots not in best or rank < ranks[shape.slots]):
            best[shape.slots], ranks[shape.slots] = s, rank
    return best


def _keys(
    d: int, slots: Counts, by_slots: Mapping[Counts, int], classes: Sequence[GpuClass], pools: Mapping[int, int]
) -> tuple[tuple[int, int], ...] | None:
    """The variables that stand for one GPU of class `d` with these slots: one, or two where it is vacated first."""
    if slots in by_slots:
        return ((d, by_slots[slots]),)
    vacated = next((s for s, shape in enumerate(classes[d].shapes) if shape.vacated), None)
    if vacated is None or d not in pools:
        return None
    anew = next((s for s, shape in enumerate(classes[pools[d]].shapes) if shape.slots == slots), None)
    return None if anew is None else ((d, vacated), (pools[d], anew))
