"""Carries out the difference, GPU by GPU, and tells exactly what there is afterwards.

Before anything is changed, everything that stands in the way on any GPU is found; then nothing is changed at all. Each
GPU is a transaction of its own: a step that fails is looked at again (its answer may have been lost), tried once more
where that can help, and else what was done to this GPU is undone. Either way the driver is asked what the GPU holds, and
that is what is reported; the other GPUs go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from model_registry.geometry import Placement
from placement.errors import (
    GpuLost,
    ModeBlocked,
    ModeChangeNeeded,
    NotPrivileged,
    PartitionError,
    SliceInUse,
)
from placement.gpus import GpuState, named
from placement.partition.actions import Action, Complete, Create, Destroy, SetMode
from placement.partition.diff import Obstacle, diff, refuse, restore
from placement.partition.plan import Clients, GpuPlan, nobody, plan
from placement.partition.rules import LayoutRule
from placement.partition.wanted import exactly

ModeChange = Literal["done", "in-use", "reset-required"]
Result = Literal["unchanged", "changed", "pending", "rolled-back", "failed"]
Drain = Callable[[Sequence[str]], None]
"""Asked with slices that are about to go, by id and by MIG UUID, since whoever runs engines there may see other ids than root
does; a GPU's UUID stands for all of it. Returns when nothing of ours runs there any more."""

_TRIES = 2
_FINAL = (NotPrivileged, SliceInUse, GpuLost, ModeBlocked)
"""What trying again cannot mend."""


class Driver(Protocol):
    """Who cuts GPUs: the NVML adapter, on a driver or on the simulator. Everything but `observe` raises PartitionError."""

    def observe(self) -> tuple[GpuState, ...]:
        """Every GPU that answers, read anew."""

    def create(self, gpu: str, placement: Placement) -> None:
        """Make the instance and its full compute instance; the first may be left alone if the second fails."""

    def complete(self, gpu: str, instance: int) -> None:
        """Give the GPU instance one full compute instance, in place of those it has."""

    def destroy(self, gpu: str, instance: int) -> None:
        """Take away the GPU instance and its compute instances; some of these may go if another cannot."""

    def set_mode(self, gpu: str, on: bool) -> ModeChange:
        """Switch MIG. On anything but `done` the new mode is pending; the mode pending before can be set again."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What applying may call besides the driver. Without `drain` busy slices are refused, without `reset` a needed reset is told."""

    drain: Drain | None = None
    reset: Callable[[GpuState], None] | None = None
    clients: Clients = nobody


@dataclass(frozen=True, slots=True)
class GpuOutcome:
    """What became of one GPU. `now` is what the driver shows afterwards, None where it does not answer any more."""

    plan: GpuPlan
    result: Result
    now: GpuState | None
    error: PartitionError | None = None

    @property
    def ok(self) -> bool:
        """Whether it holds what it should."""
        return self.result in ("unchanged", "changed")

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape of `sliceway apply --json`, one per GPU."""
        return self.plan.as_public() | {
            "result": self.result,
            "before": [i.name for i in self.plan.gpu.instances],
            "now": [i.name for i in self.now.instances] if self.now else None,
            "slices": [i.as_public() for i in self.now.instances] if self.now else None,
            "mig": {
                "current": self.now.mode.current if self.now and self.now.mode else None,
                "pending": self.now.mode.pending if self.now and self.now.mode else None,
                "then": self.plan.then_mig,
            },
            "error": self.error.as_dict() if self.error else None,
        }


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of every GPU, in their order."""

    gpus: tuple[GpuOutcome, ...]

    @property
    def ok(self) -> bool:
        """Whether every GPU holds what it should."""
        return all(g.ok for g in self.gpus)

    @property
    def changed(self) -> bool:
        """Whether any GPU holds something else than before."""
        return any(g.result != "unchanged" for g in self.gpus)


def apply(
    driver: Driver, rules: Sequence[LayoutRule], *, allow_mode_change: bool = False, tools: Tools | None = None
) -> Applied:
    """Make every GPU hold what `rules` say.

    Raises SliceInUse, ModeBlocked or ModeChangeNeeded, with everything that is in the way, before anything is changed;
    NotPrivileged where nothing could be changed for that; and what `plan` raises. Other failures are told per GPU in
    what is returned.
    """
    tools = tools or Tools()

    def planned() -> tuple[GpuPlan, ...]:
        return plan(driver.observe(), rules, allow_mode_change=allow_mode_change, clients=tools.clients)

    plans = planned()
    if tools.drain and not _undrainable(plans) and (going := _going(plans)):
        tools.drain(going)
        plans = planned()
    _refuse(tuple(o for p in plans for o in p.obstacles))
    applied = Applied(tuple(_apply(driver, p, tools) for p in plans))
    errors = [g.error for g in applied.gpus if not g.ok]
    if errors and isinstance(errors[0], NotPrivileged) and all(isinstance(e, NotPrivileged) for e in errors):
        raise errors[0]
    return applied


def _going(plans: Sequence[GpuPlan]) -> list[str]:
    """What must go, idle or not: an engine that starts at the moment shows nowhere yet."""
    going: list[str] = []
    for planned in plans:
        for action in planned.actions:
            match action:
                case SetMode():
                    going.append(planned.gpu.uuid)
                case Destroy(instance=instance) | Complete(instance=instance):
                    going += [f"{planned.gpu.uuid}/{instance.name}", *(c.uuid for c in instance.compute)]
                case _:
                    pass
    return going


def _undrainable(plans: Sequence[GpuPlan]) -> bool:
    return any(o.kind != "process" for p in plans for o in p.obstacles)


def _refuse(found: tuple[Obstacle, ...]) -> None:
    if not found:
        return
    kinds = {o.kind for o in found}
    if kinds == {"process"}:
        raise refuse(found, SliceInUse)
    raise refuse(found, ModeChangeNeeded if "mode-change" in kinds else ModeBlocked)


def _apply(driver: Driver, planned: GpuPlan, tools: Tools) -> GpuOutcome:
    if not planned.actions:
        return GpuOutcome(planned, "unchanged", planned.gpu)
    actions, error = planned.actions, None
    for attempt in range(_TRIES):
        error = _perform(driver, planned.gpu, actions, tools)
        now = _look(driver, planned.gpu.uuid)
        if now is None:
            return _gone(planned)
        if _is_pending(now, planned):
            return GpuOutcome(planned, "pending", now, error)
        rest = _rest(planned, now)
        if rest == ():
            return GpuOutcome(planned, "changed", now)
        if rest is None or isinstance(error, _FINAL) or attempt + 1 == _TRIES:
            break
        actions = rest
    return _roll_back(driver, planned, tools, error or _meddled(planned))


def _perform(driver: Driver, gpu: GpuState, actions: Sequence[Action], tools: Tools) -> PartitionError | None:
    """Take the steps up to the first that fails, and say why it did."""
    for action in actions:
        try:
            _step(driver, gpu, action, tools)
        except PartitionError as error:
            error.where = error.where or gpu.label
            return error
    return None


def _step(driver: Driver, gpu: GpuState, action: Action, tools: Tools) -> None:
    match action:
        case SetMode(on=on):
            _set_mode(driver, gpu, on, tools)
        case Destroy(instance=instance):
            driver.destroy(gpu.uuid, instance.id)
        case Complete(instance=instance):
            driver.complete(gpu.uuid, instance.id)
        case Create(placement=placement):
            driver.create(gpu.uuid, placement)


def _set_mode(driver: Driver, gpu: GpuState, on: bool, tools: Tools) -> None:
    """Switch, and where the switch stays pending either finish it or say what keeps it.

    A switch that something in use keeps pending is taken back: it would happen at some later time that nobody chose.
    """
    change = driver.set_mode(gpu.uuid, on)
    if change == "done":
        return
    if change == "in-use":
        if gpu.mode is not None and gpu.mode.pending != on:
            driver.set_mode(gpu.uuid, gpu.mode.pending)
        raise ModeBlocked(_what_holds(gpu, on, tools), where=gpu.label, remedy=_HOLDERS)
    if tools.reset is None:
        raise ModeChangeNeeded(
            f"MIG {'on' if on else 'off'} is pending until the GPU is reset",
            where=gpu.label,
            remedy=f"Reset it with nothing running on it (nvidia-smi --gpu-reset -i {gpu.index}), or reboot; then apply again.",
        )
    tools.reset(gpu)


_HOLDERS = (
    "Stop whatever holds the driver and apply again: DCGM (systemctl stop nvidia-dcgm dcgm-exporter), NVSM (nvsm), "
    "monitoring agents, containers with GPUs, the display server; last of all nvidia-persistenced."
)


def _what_holds(gpu: GpuState, on: bool, tools: Tools) -> str:
    turned = f"MIG could not be switched {'on' if on else 'off'}, the GPU is in use"
    holders = (*gpu.all_processes, *tools.clients(gpu))
    if holders:
        return f"{turned} by {', '.join(named(tuple(holders)))}"
    return f"{turned} by a client that no list shows"


def _look(driver: Driver, uuid: str) -> GpuState | None:
    return next((g for g in driver.observe() if g.uuid == uuid), None)


def _is_pending(now: GpuState, planned: GpuPlan) -> bool:
    mode = now.mode
    return planned.changes_mode and mode is not None and mode.current != mode.pending == planned.then_mig


def _rest(planned: GpuPlan, now: GpuState) -> tuple[Action, ...] | None:
    """What is still to be done; None if it would touch what was not there when the plan was made: someone else's."""
    try:
        rest = diff(now, exactly(planned.then, mig=planned.then_mig))
    except PartitionError:
        return None
    ours = {a.instance.id for a in planned.actions if isinstance(a, (Destroy, Complete))}
    ours |= {i.id for i in now.instances if i.placement in _made(planned)}
    touched = {a.instance.id for a in rest if isinstance(a, (Destroy, Complete))}
    return rest if touched <= ours else None


def _made(planned: GpuPlan) -> tuple[Placement, ...]:
    return tuple(a.placement for a in planned.actions if isinstance(a, Create))


def _meddled(planned: GpuPlan) -> PartitionError:
    return PartitionError(
        "something else changed its instances at the same time",
        where=planned.gpu.label,
        remedy="Let one program at a time cut GPUs (stop nvidia-mig-manager), and apply again.",
    )


def _gone(planned: GpuPlan) -> GpuOutcome:
    error = GpuLost(
        "it does not answer any more, so what it holds is not known",
        where=planned.gpu.label,
        remedy="See `dmesg` for its XID; usually the GPU must be reset or the machine rebooted.",
    )
    return GpuOutcome(planned, "failed", None, error)


def _roll_back(driver: Driver, planned: GpuPlan, tools: Tools, error: PartitionError) -> GpuOutcome:
    """Undo what was done to this GPU; the driver has the last word on whether that worked."""
    for _ in range(_TRIES):
        now = _look(driver, planned.gpu.uuid)
        if now is None:
            return _gone(planned)
        back = restore(planned.gpu, now, _made(planned))
        if not back:
            return GpuOutcome(planned, "rolled-back", now, error)
        _perform(driver, now, back, tools)
    now = _look(driver, planned.gpu.uuid)
    if now is None:
        return _gone(planned)
    back = restore(planned.gpu, now, _made(planned))
    if not back:
        return GpuOutcome(planned, "rolled-back", now, error)
    failed = type(error)(
        f"{error.message}; undoing that failed too, still to be done: {', '.join(map(str, back))}",
        where=error.where,
        remedy=f"{error.remedy or ''} Then apply again: it goes on from what is there.".strip(),
    )
    return GpuOutcome(planned, "failed", now, failed)
