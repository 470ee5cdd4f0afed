"""From how many to which: shapes handed to GPUs, replicas seated on slices, as many as can be where they run.

Everything is done in an order of names, so that equal answers of the integer program give equal seats. Replicas of one
model go to the nodes and GPUs that have the fewest of them, then to the GPU with the most room: with a limit of one per
GPU that is the greedy rule under which every degree sequence that can be met is met (Gale and Ryser 1957).
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from model_registry.geometry import Placement
from placement.planner.master import Answer
from placement.planner.shapes import GpuClass, Shape
from placement.planner.types import FleetGpu, Instance
from placement.planner.wants import Want

Seat = tuple[str, Placement]
"""A slice by its GPU's id and its place."""


@dataclass(slots=True)
class Seating:
    """Who sits where. `unseated` are replicas (by want) that no slice was left for within their limits."""

    gpus: Mapping[str, FleetGpu]
    used: dict[str, tuple[Placement, ...]]
    seats: dict[Seat, str] = field(default_factory=dict)
    kept: set[Seat] = field(default_factory=set)
    unseated: Counter[str] = field(default_factory=Counter)


def seat(classes: Sequence[GpuClass], answer: Answer, wants: Sequence[Want]) -> Seating:
    """Carry an answer down to single GPUs and slices."""
    table = _Table(_shapes_by_gpu(classes, answer), classes, wants)
    left = Counter({key: n for key, n in answer.replicas.items() if n})
    table.keep_running(left)
    # Who is limited most chooses first.
    for (group, name, profile), count in sorted(left.items(), key=lambda item: (table.freedom(item[0][1]), item[0])):
        table.fill(group, name, profile, count)
    return table.seating


def _shapes_by_gpu(classes: Sequence[GpuClass], answer: Answer) -> dict[str, Shape]:
    """One shape for every GPU: among GPUs that are alike, those with the fewest requests lose their replicas."""
    chosen: dict[str, Shape] = {}
    vacated: dict[int, list[FleetGpu]] = {}
    for c, group in enumerate(classes):
        members = list(group.members) or sorted((g for v in group.vacated_by for g in vacated[v]), key=lambda g: g.id)
        shapes = [group.shapes[s] for s in range(len(group.shapes)) for _ in range(answer.shapes.get((c, s), 0))]
        shapes.sort(key=lambda shape: (-sum(n for _, n in shape.own), -len(shape.used)))
        busiest = sorted(members, key=lambda g: (-sum(i.requests for i in g.instances), g.id))
        taken = list(zip(busiest, shapes, strict=True))
        vacated[c] = [gpu for gpu, shape in taken if shape.vacated]
        chosen |= {gpu.id: shape for gpu, shape in taken}
    return chosen


class _Table:
    """Slices in use and who sits on them, while they are being seated."""

    def __init__(self, shapes: Mapping[str, Shape], classes: Sequence[GpuClass], wants: Sequence[Want]) -> None:
        self._wants = {w.name: w for w in wants}
        self._group = {g.id: c.group for c in classes for g in c.members}
        self._closed = {g.id for c in classes if c.closed for g in c.members}
        gpus = {g.id: g for c in classes for g in c.members}
        self.seating = Seating(dict(sorted(gpus.items())), {i: shapes[i].used for i in sorted(gpus)})
        self._free: dict[tuple[str, str], dict[str, list[Placement]]] = defaultdict(lambda: defaultdict(list))
        for gpu, used in self.seating.used.items():
            for placement in used:
                self._free[self._group[gpu], placement.profile][gpu].append(placement)
        self._room = Counter({gpu: len(used) for gpu, used in self.seating.used.items()})
        self._on_gpu: Counter[tuple[str, str]] = Counter()
        self._on_node: Counter[tuple[str, str]] = Counter()

    def freedom(self, name: str) -> tuple[int, int]:
        """How much choice a want has; less comes first."""
        want = self._wants[name]
        return want.max_per_gpu or 1 << 30, want.max_per_node or 1 << 30

    def keep_running(self, left: Counter[tuple[str, str, str]]) -> None:
        """Leave replicas where they run, the busiest first, as far as so many are wanted there."""
        running = [
            (instance, gpu)
            for gpu in self.seating.gpus.values()
            for instance in gpu.instances
            if instance.demand in self._wants and instance.placement in self.seating.used[gpu.id]
        ]
        for instance, gpu in sorted(running, key=_busiest):
            name = str(instance.demand)
            key = self._group[gpu.id], name, instance.profile
            if left[key] > 0 and self._may(name, gpu.id):
                left[key] -= 1
                self._sit(name, gpu.id, instance.placement)
                self.seating.kept.add((gpu.id, instance.placement))

    def fill(self, group: str, name: str, profile: str, count: int) -> None:
        """Seat `count` more replicas on free slices of one kind."""
        free = self._free[group, profile]
        heap = [(self._crowd(name, gpu), gpu) for gpu, slices in free.items() if slices and gpu not in self._closed]
        heapq.heapify(heap)
        while count and heap:
            crowd, gpu = heapq.heappop(heap)
            if not free[gpu] or not self._may(name, gpu):
                continue
            if crowd != (now := self._crowd(name, gpu)):
                heapq.heappush(heap, (now, gpu))
                continue
            self._sit(name, gpu, free[gpu][0])
            count -= 1
            heapq.heappush(heap, (self._crowd(name, gpu), gpu))
        if count:
            self.seating.unseated[name] += count

    def _crowd(self, name: str, gpu: str) -> tuple[int, int, int]:
        model, node = self._wants[name].model, self.seating.gpus[gpu].node
        return self._on_node[model, node], self._on_gpu[model, gpu], -self._room[gpu]

    def _may(self, name: str, gpu: str) -> bool:
        want, node = self._wants[name], self.seating.gpus[gpu].node
        return (want.max_per_gpu is None or self._on_gpu[want.model, gpu] < want.max_per_gpu) and (
            want.max_per_node is None or self._on_node[want.model, node] < want.max_per_node
        )

    def _sit(self, name: str, gpu: str, placement: Placement) -> None:
        self._free[self._group[gpu], placement.profile][gpu].remove(placement)
        self._room[gpu] -= 1
        model = self._wants[name].model
        self._on_gpu[model, gpu] += 1
        self._on_node[model, self.seating.gpus[gpu].node] += 1
        self.seating.seats[gpu, placement] = name


def _busiest(item: tuple[Instance, FleetGpu]) -> tuple[int, str, Placement]:
    instance, gpu = item
    return -instance.requests, gpu.id, instance.placement
