"""Observed against wanted: the ordered steps between them, and what stands in their way. Pure.

Slices that stay are in no step, so their engines go on serving. Steps of one GPU come in the order MIG needs: mode on,
then what goes, then what is completed, then what is made; with explicit placements the order among the last does not
matter (MIG User Guide: left to choose, the driver loses layouts by the order in which they are made).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from model_registry.geometry import Placement
from placement.errors import CannotBeCut, NotPrivileged, PartitionError
from placement.gpus import GpuInstance, GpuProcess, GpuState, named
from placement.partition.actions import Action, Complete, Create, Destroy, SetMode
from placement.partition.wanted import Wanted, resolve

PRIVILEGE_REMEDY = (
    "Run it as root (`sudo sliceway apply CONFIG --layouts-only`), or let this user read /dev/nvidia-caps/nvidia-cap1 "
    "(mig/config, to change instances) and nvidia-cap2 (mig/monitor, to see them)."
)


class Obstacle(NamedTuple):
    """What keeps a step from being taken. `slice` is what would have to go, None for the whole GPU."""

    kind: Literal["process", "display", "mode-change"]
    gpu: GpuState
    slice: str | None
    processes: tuple[GpuProcess, ...]
    message: str
    remedy: str

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape."""
        return {
            "kind": self.kind,
            "gpu": self.gpu.uuid,
            "slice": self.slice,
            "processes": [{"pid": p.pid, "name": p.name, "memory_bytes": p.memory_bytes} for p in self.processes],
            "message": self.message,
            "remedy": self.remedy,
        }


def diff(gpu: GpuState, wanted: Wanted) -> tuple[Action, ...]:
    """The steps that make `gpu` hold `wanted` and nothing else; empty if it does.

    Raises IllegalLayout or UnknownProfile for what this product cannot hold, CannotBeCut where there is no MIG to do it
    with, NotPrivileged where what is there may not be seen and is not what is wanted.
    """
    if not wanted.mig:
        return _without_mig(gpu)
    check_cuttable(gpu)
    if gpu.mig and not gpu.instances_known:
        return _unseen(gpu, wanted)
    then = set(resolve(gpu, wanted).placements)
    mode = () if gpu.mode and gpu.mode.current and gpu.mode.pending else (SetMode(gpu.uuid, on=True),)
    instances = sorted(gpu.instances, key=lambda i: (i.start or 0, i.id))
    there = {i.placement for i in instances}
    return (
        *mode,
        *(Destroy(gpu.uuid, i) for i in instances if i.placement not in then),
        *(Complete(gpu.uuid, i) for i in instances if i.placement in then and not i.complete),
        *(Create(gpu.uuid, p) for p in sorted(then - there)),
    )


def after(gpu: GpuState, actions: Iterable[Action]) -> tuple[bool, tuple[Placement, ...]]:
    """MIG mode and placements that `actions` lead to."""
    mig, held = gpu.mig, set(gpu.placements)
    for action in actions:
        match action:
            case SetMode(on=on):
                mig = on
            case Destroy(instance=instance):
                held.discard(instance.placement or Placement(-1, instance.profile))
            case Create(placement=placement):
                held.add(placement)
            case Complete():
                pass
    return mig, tuple(sorted(held))


def restore(before: GpuState, now: GpuState, made: Iterable[Placement]) -> tuple[Action, ...]:
    """The steps back to `before`: what was `made` since goes, complete instances that are gone or broken come back.

    Whatever else has changed is someone else's and stays.
    """
    made = set(made)
    there = {i.placement: i for i in now.instances}
    old = {i.placement: i for i in before.instances if i.placement is not None}
    mode: tuple[Action, ...] = () if now.mode == before.mode else (SetMode(now.uuid, on=before.mig),)
    changes: tuple[Action, ...] = (
        *(Destroy(now.uuid, i) for p, i in there.items() if p in made and p not in old),
        *(
            Complete(now.uuid, there[p])
            for p, i in sorted(old.items())
            if i.complete and p in there and not there[p].complete
        ),
        *(Create(now.uuid, p) for p, i in sorted(old.items()) if i.complete and p not in there),
    )
    return (*mode, *changes) if before.mig else (*changes, *mode)


def obstacles(
    gpu: GpuState,
    actions: Sequence[Action],
    *,
    allow_mode_change: bool,
    clients: Iterable[GpuProcess] = (),
) -> tuple[Obstacle, ...]:
    """What must be out of the way before the first of `actions`.

    `clients` are processes that hold the GPU's device file without computing. They block nothing by themselves on every
    driver, so they are named only with a change of mode, which they may keep pending.
    """
    found: list[Obstacle] = []
    for action in actions:
        match action:
            case Destroy(instance=instance) if instance.processes:
                found.append(_busy(gpu, instance))
            case Complete(instance=instance) if instance.processes:
                found.append(_busy(gpu, instance))
            case SetMode(on=on):
                found += _mode_obstacles(gpu, on, tuple(clients), allowed=allow_mode_change)
            case _:
                pass
    return tuple(found)


def check_cuttable(gpu: GpuState) -> None:
    """Raise CannotBeCut, with the reason, for a GPU on which MIG cannot be used at all."""
    product = gpu.geometry
    if gpu.mode is None:
        raise CannotBeCut(_why_no_mig(gpu), where=gpu.label, remedy=_no_mig_remedy(gpu))
    if product is None or not any(p.plannable for p in product.profiles):
        raise CannotBeCut(
            "nobody has published where its profiles can start, and the driver tells it to root only",
            where=gpu.label,
            remedy=PRIVILEGE_REMEDY,
        )


def _why_no_mig(gpu: GpuState) -> str:
    product = gpu.geometry
    if product is None:
        return "this GPU has no MIG"
    if not product.cut_by(gpu.driver):
        return f"driver {gpu.driver} is too old to cut a {product.name}"
    return f"driver {gpu.driver} offers no MIG on this {product.name}"


def _no_mig_remedy(gpu: GpuState) -> str:
    product = gpu.geometry
    if product is None:
        return "Name only GPUs that have MIG under `gpus`; `sliceway profiles` lists the products."
    if not product.cut_by(gpu.driver):
        return f"Install driver {product.min_driver} or later."
    return (
        "A virtual GPU cannot be cut by its guest; some RTX PRO cards need newer firmware and "
        "`displaymodeselector --gpumode=compute` first."
    )


def _without_mig(gpu: GpuState) -> tuple[Action, ...]:
    if gpu.mode is None or not (gpu.mode.current or gpu.mode.pending):
        return ()
    if not gpu.instances_known:
        raise NotPrivileged(
            "its instances may be seen by root only, and have to go", where=gpu.label, remedy=PRIVILEGE_REMEDY
        )
    return (*(Destroy(gpu.uuid, i) for i in gpu.instances), SetMode(gpu.uuid, on=False))


def _unseen(gpu: GpuState, wanted: Wanted) -> tuple[Action, ...]:
    """By counts alone one can tell whether all is there, but neither where it lies nor where there is room."""
    counts = Counter(i.profile for i in gpu.instances)
    whole = all(i.complete for i in gpu.instances) and gpu.mode is not None and gpu.mode.pending
    if whole and not wanted.exact and counts == wanted.all_counts:
        return ()
    there = ", ".join(f"{n}x {p}" for p, n in sorted(counts.items())) or "no usable instance"
    raise NotPrivileged(
        f"where its instances lie may be read by root only; it shows {there}",
        where=gpu.label,
        remedy=PRIVILEGE_REMEDY,
    )


def _busy(gpu: GpuState, instance: GpuInstance) -> Obstacle:
    listed = ", ".join(named(instance.processes))
    return Obstacle(
        "process",
        gpu,
        f"{gpu.uuid}/{instance.name}",
        instance.processes,
        f"{gpu.label}: {instance.name} would have to go, and is in use by {listed}",
        "Stop it first, or let the controller drain its engines: --drain.",
    )


def _mode_obstacles(gpu: GpuState, on: bool, clients: tuple[GpuProcess, ...], *, allowed: bool) -> list[Obstacle]:
    turn = f"MIG would have to be switched {'on' if on else 'off'}"
    found: list[Obstacle] = []
    if not allowed:
        pending = gpu.mode is not None and gpu.mode.pending == on and gpu.mode.current != on
        state = "; the switch is pending already and takes a reset of the GPU" if pending else ""
        reset = ", which takes a reset of the GPU" if gpu.mode_needs_reset and not pending else ""
        holders = f". It may be kept from it by {', '.join(named(clients))}" if clients else ""
        message = f"{gpu.label}: {turn}{reset}{state}{holders}"
        found.append(Obstacle("mode-change", gpu, None, clients, message, "Allow it with --allow-mode-change."))
    running = tuple(p for p in gpu.processes if p.how != "open")
    if running:
        message = f"{gpu.label}: {turn}, and it is in use by {', '.join(named(running))}"
        found.append(Obstacle("process", gpu, gpu.uuid, running, message, "Stop it first, or use --drain."))
    if gpu.display:
        message = f"{gpu.label}: {turn}, and a display is active on it"
        remedy = "Stop the display server (systemctl isolate multi-user.target), or move it to another GPU."
        found.append(Obstacle("display", gpu, None, (), message, remedy))
    return found


def refuse(found: Sequence[Obstacle], kind: type[PartitionError]) -> PartitionError:
    """All of `found` as one error."""
    return kind(
        "; ".join(o.message for o in found) + ". Nothing was changed",
        remedy=" ".join(dict.fromkeys(o.remedy for o in found)),
    )
