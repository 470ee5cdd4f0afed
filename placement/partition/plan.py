"""The rules of a configuration against the GPUs of a machine: for each GPU what it holds, will hold, and how. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from model_registry.catalogue import Catalogue, load_catalogue
from model_registry.errors import SlicewayError
from model_registry.geometry import Placement
from placement.gpus import GpuProcess, GpuState
from placement.partition.actions import Action, SetMode
from placement.partition.diff import Obstacle, after, diff, obstacles
from placement.partition.rules import LayoutRule
from placement.partition.select import selected
from placement.partition.wanted import Wanted, wanted_on

Clients = Callable[[GpuState], Sequence[GpuProcess]]


def nobody(_: GpuState) -> Sequence[GpuProcess]:
    """No clients: where nobody can look."""
    return ()


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """One GPU. `wanted` is None for a GPU that no rule names: it stays as it is. `then` is what it will hold."""

    gpu: GpuState
    wanted: Wanted | None
    actions: tuple[Action, ...] = ()
    obstacles: tuple[Obstacle, ...] = ()

    @property
    def then(self) -> tuple[Placement, ...]:
        """Placements when all steps are done."""
        return after(self.gpu, self.actions)[1]

    @property
    def then_mig(self) -> bool:
        """MIG mode when all steps are done."""
        return after(self.gpu, self.actions)[0]

    @property
    def kept(self) -> tuple[Placement, ...]:
        """What stays."""
        return tuple(p for p in self.gpu.placements if p in self.then)

    @property
    def changes_mode(self) -> bool:
        """Whether MIG is switched on or off."""
        return any(isinstance(a, SetMode) for a in self.actions)

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape of `sliceway plan --json`, one per GPU."""
        mode = self.gpu.mode
        return {
            "gpu": self.gpu.uuid,
            "index": self.gpu.index,
            "product": self.gpu.product,
            "simulated": self.gpu.simulated,
            "rule": self.wanted.where if self.wanted else None,
            "mig": {
                "current": mode.current if mode else None,
                "pending": mode.pending if mode else None,
                "then": self.then_mig,
            },
            "now": [i.name for i in self.gpu.instances],
            "then": [str(p) for p in self.then],
            "actions": [a.as_public() for a in self.actions],
            "obstacles": [o.as_public() for o in self.obstacles],
        }


def plan(
    gpus: Sequence[GpuState],
    rules: Sequence[LayoutRule],
    *,
    allow_mode_change: bool = False,
    clients: Clients = nobody,
) -> tuple[GpuPlan, ...]:
    """One plan per GPU, in their order.

    Raises ConfigError for a rule that names a GPU that is not there, and what `diff` raises, with the rule that asks for it.
    """
    wanted = wanted_by_gpu(gpus, rules)
    return tuple(_plan(gpu, wanted.get(gpu.uuid), allow_mode_change, clients) for gpu in gpus)


def _plan(gpu: GpuState, wanted: Wanted | None, allow_mode_change: bool, clients: Clients) -> GpuPlan:
    if wanted is None:
        return GpuPlan(gpu, None)
    try:
        actions = diff(gpu, wanted)
    except SlicewayError as error:
        error.where = f"{wanted.where} on {error.where or gpu.label}"
        raise
    holders = tuple(clients(gpu)) if any(isinstance(a, SetMode) for a in actions) else ()
    in_the_way = obstacles(gpu, actions, allow_mode_change=allow_mode_change, clients=holders)
    return GpuPlan(gpu, wanted, actions, in_the_way)


def wanted_by_gpu(gpus: Sequence[GpuState], rules: Sequence[LayoutRule]) -> dict[str, Wanted]:
    """What each GPU is to hold, by UUID. The last rule that names a GPU counts; `all` passes over GPUs without MIG.

    Raises ConfigError for a rule that names a GPU that is not there, UnknownProfile for a profile that the GPU has not.
    """
    wanted: dict[str, Wanted] = {}
    catalogue = load_catalogue()
    for number, rule in enumerate(rules):
        where = f"fleet.layouts[{number}]"
        for gpu in _named(gpus, rule, where, catalogue):
            wanted[gpu.uuid] = _wanted(gpu, rule, where)
    return wanted


def _wanted(gpu: GpuState, rule: LayoutRule, where: str) -> Wanted:
    if not rule.mig or gpu.geometry is None:
        return Wanted(mig=rule.mig, where=where)
    try:
        return wanted_on(gpu.geometry, rule.entries, where=where)
    except SlicewayError as error:
        error.where = f"{where} on {gpu.label}"
        raise


def _named(gpus: Sequence[GpuState], rule: LayoutRule, where: str, catalogue: Catalogue) -> list[GpuState]:
    """`all` are those that can be cut; whatever is named is meant, and refused if it cannot."""
    named = selected(gpus, rule, where, catalogue)
    if rule.gpus == "all" and not rule.products:
        return [g for g in named if g.geometry is not None]
    return named
