"""GPUs as the driver shows them -> slices to put engines on, and what an operator should know about them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from placement.gpus import GpuInstance, GpuState
from placement.slices import Gpu, Slice, SliceKind, SliceUser


def slices_of(gpu: GpuState) -> tuple[Slice, ...]:
    """The GPU itself where MIG is off, else its complete instances.

    An instance is named by profile and start. Where the start may not be read, by its GPU instance id instead
    (`GPU-.../1g.10gb#gi9`): it lasts as long as the instance does, and may mean another place when that is made again.
    """
    card = card_of(gpu)
    if not gpu.mig:
        return (
            Slice(gpu.uuid, SliceKind.GPU, None, gpu.usable_bytes, uuid=gpu.uuid, gpu=card, simulated=gpu.simulated),
        )
    return tuple(
        Slice(
            id=slice_id(gpu, instance),
            kind=SliceKind.MIG,
            profile=instance.profile,
            memory_bytes=instance.compute[0].memory_bytes,
            uuid=instance.compute[0].uuid,
            gpu=card,
            simulated=gpu.simulated,
        )
        for instance in gpu.instances
        if instance.complete
    )


def slice_id(gpu: GpuState, instance: GpuInstance) -> str:
    """The identity of the slice that an instance is: parent, profile and place."""
    return f"{gpu.uuid}/{instance.name}"


def card_of(gpu: GpuState) -> Gpu:
    """The GPU as slices carry it."""
    return Gpu(gpu.uuid, gpu.index, gpu.product, gpu.memory_bytes, gpu.numa_node)


def users_of(gpu: GpuState) -> tuple[SliceUser, ...]:
    """Who runs on its slices."""
    if not gpu.mig:
        return tuple(SliceUser(gpu.uuid, p.pid, p.name, p.memory_bytes) for p in gpu.processes if p.how != "graphics")
    return tuple(
        SliceUser(slice_id(gpu, instance), p.pid, p.name, p.memory_bytes)
        for instance in gpu.instances
        if instance.complete
        for p in instance.processes
    )


def notes_of(gpus: Iterable[GpuState]) -> tuple[str, ...]:
    """What is unusual about these GPUs, in order; what is true of a whole product is told once."""
    notes: dict[str, None] = {}
    for gpu in gpus:
        notes |= dict.fromkeys(_notes(gpu))
    return tuple(notes)


def _notes(gpu: GpuState) -> Iterator[str]:
    yield from (f"GPU {gpu.index}: {note}." for note in gpu.notes)
    yield from (f"{gpu.product}: {difference}; the driver's figure is used." for difference in gpu.differences)
    if gpu.mode is None and gpu.geometry is not None and not gpu.geometry.cut_by(gpu.driver):
        yield (
            f"GPU {gpu.index} is used whole: driver {gpu.driver} is too old to cut a {gpu.product} "
            f"(it takes {gpu.geometry.min_driver} or later)."
        )
    if gpu.mode is not None and gpu.mode.current != gpu.mode.pending:
        yield f"GPU {gpu.index}: MIG is about to be switched {'on' if gpu.mode.pending else 'off'} at the next reset."
    if gpu.mig:
        yield from _mig_notes(gpu)
    if gpu.recovery not in (None, "none"):
        yield f"GPU {gpu.index}: after an error (its XID is in `dmesg`) the driver asks {_recovery(gpu)}"
    if gpu.compute_mode == "prohibited":
        yield f"GPU {gpu.index}: its compute mode is `prohibited`, so nothing can run on it. nvidia-smi -i {gpu.index} -c 0"


def _recovery(gpu: GpuState) -> str:
    """What the driver asks for, and how it is done. Everything but a reboot concerns this GPU alone."""
    reset = f"sudo nvidia-smi --gpu-reset -i {gpu.index}, then `sliceway apply`."
    return {
        "reset": f"for a reset of this GPU: stop its replicas, {reset}",
        "reboot": "for a reboot of the machine.",
        "drain": "to have this GPU drained of peer-to-peer work: stop its replicas and start them again elsewhere.",
        "drain-and-reset": f"to have this GPU drained and reset: stop its replicas, {reset}",
    }.get(gpu.recovery or "", f"for its recovery ({gpu.recovery}); `nvidia-smi -q -i {gpu.index}` says more.")


def _mig_notes(gpu: GpuState) -> Iterator[str]:
    for instance in gpu.instances:
        if instance.complete:
            continue
        yield (
            f"GPU {gpu.index}: {instance.name} is left out, it has {_compute(instance)} instead of one whole compute "
            f"instance. `sliceway apply` completes or removes it."
        )
    if any(i.complete for i in gpu.instances) and not gpu.instances_known:
        yield (
            f"GPU {gpu.index}: where its instances lie may be read by root only, or by who may read "
            f"/dev/nvidia-caps/nvidia-cap2 (mig/monitor); they are named by their GPU instance ids."
        )
    if gpu.mode_needs_reset is False and gpu.persistence is False:
        yield (
            f"GPU {gpu.index}: persistence mode is off, so MIG mode and instances go whenever the driver is unloaded. "
            f"Run nvidia-persistenced."
        )


def unused_notes(gpus: Iterable[GpuState], *, planned: bool) -> Iterator[str]:
    """Of GPUs on which nothing can run, what would change that. `planned`: what no layout names is cut by plans."""
    for gpu in gpus:
        if not gpu.mig or any(i.complete for i in gpu.instances):
            continue
        remedy = "Name its layout in fleet.layouts and run `sliceway apply`, or switch MIG off."
        if planned:
            remedy = "`sliceway plan CONFIG` shows what a plan would make there, if it needs it."
        yield f"GPU {gpu.index} has MIG on and no usable instance, so nothing can run on it. {remedy}"


def _compute(instance: GpuInstance) -> str:
    if not instance.compute:
        return "none"
    return " and ".join(f"{c.g} of {instance.g} compute slices" for c in instance.compute)
