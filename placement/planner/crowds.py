"""Replicas that a plan ends because too many of their model would run on one GPU or node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from placement.planner.types import FleetGpu, PlannedGpu
from placement.planner.wants import Want

_CLOSE = 1e-6


class Crowds:
    """Where the planned replicas of each model run, and what is missing of each want."""

    def __init__(self, gpus: Sequence[PlannedGpu], wants: Iterable[Want]) -> None:
        self._gpus = gpus
        self._wants = {w.name: w for w in wants}
        self._staying: set[str] = set()
        self._on_gpu: Counter[tuple[str, str]] = Counter()
        self._on_node: Counter[tuple[str, str]] = Counter()
        served: dict[str, list[float]] = {name: [] for name in self._wants}
        for planned in gpus:
            for there in planned.slices:
                if there.replica is None or (want := self._wants.get(str(there.demand))) is None:
                    continue
                self._staying.add(there.replica)
                self._on_gpu[want.model, planned.gpu.id] += 1
                self._on_node[want.model, planned.gpu.node] += 1
                option = want.option(planned.gpu.product, there.placement.profile)
                served[want.name].append(option.capacity if option else 0.0)
        missing = {name: want.missing(len(served[name]), sum(served[name])) for name, want in self._wants.items()}
        self.short = frozenset(name for name, much in missing.items() if much > _CLOSE)

    def crowded_out(self) -> dict[str, str]:
        """The replicas that end while something is missing of their demand, each with the place where it would be one too many.

        Counted is what will run: beside that a replica has no place on its own slice, whoever gets the slice. One that has to
        go anyway, from a draining GPU or from a slice that does not hold it any more, is not among them.
        """
        found: dict[str, str] = {}
        for gpu in (planned.gpu for planned in self._gpus if not planned.gpu.draining):
            for instance in gpu.instances:
                want = self._wants.get(str(instance.demand))
                if want is None or instance.replica is None or instance.replica in self._staying:
                    continue
                if want.name in self.short and want.option(gpu.product, instance.profile):
                    found[instance.replica] = self._full(want, gpu)
        return {replica: where for replica, where in found.items() if where}

    def _full(self, want: Want, gpu: FleetGpu) -> str:
        """The GPU or the node that has all replicas of the model that it may have; nothing if there could be one more."""
        if want.max_per_gpu is not None and self._on_gpu[want.model, gpu.id] >= want.max_per_gpu:
            return f"GPU {gpu.id}"
        if want.max_per_node is not None and self._on_node[want.model, gpu.node] >= want.max_per_node:
            return f"the node of GPU {gpu.id}"
        return ""
