"""The host's cores, shared out among the slices of its GPUs. A function of what is where.

GPUs next to the same cores (one NUMA node) divide them evenly, and each GPU's part is divided along its compute slices: a
slice gets the cores of its own place on the GPU, 3 of 7 parts at `3g.40gb@4` of an H100. So what a slice gets depends on
nothing but its place, and cutting a GPU anew moves no cores of the slices that stay. Hardware threads of one physical core
stay together where there are enough cores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from placement.cores import format_cores
from placement.gpus import GpuInstance, GpuState
from placement.host import Host
from placement.slices import Inventory, Slice, SliceKind

Span = tuple[Fraction, Fraction]
"""From where to where on a GPU, 0 to 1."""
Threads = tuple[int, ...]

_WHOLE: Span = (Fraction(0), Fraction(1))


@dataclass(frozen=True, slots=True)
class _Node:
    """GPUs that are next to the same hardware threads, in order of their indices."""

    threads: frozenset[int]
    gpus: tuple[GpuState, ...]


def share_cores(inventory: Inventory, host: Host) -> Inventory:
    """`inventory` with cores for every GPU slice that has none yet.

    Sets are disjoint and hold at least one hardware thread each. Where a node has fewer threads than slices, each slice
    may use all of them and says so (`shared_cores`). Only threads that this process may use are given out.
    """
    allowed = frozenset(host.threads)
    taken = frozenset(core for one in inventory.slices for core in one.cores)
    wanting = [s for s in inventory.slices if s.kind is not SliceKind.CPU and s.gpu is not None and not s.cores]
    if not wanting or not allowed - taken:
        return inventory
    spans = spans_of(wanting, inventory.gpus)
    shares: dict[str, Threads] = {}
    shared: set[str] = set()
    notes = list(_far_notes(inventory.gpus, allowed))
    for node in _nodes(inventory.gpus, allowed - taken):
        mine = [s for s in wanting if s.gpu is not None and s.gpu.uuid in {g.uuid for g in node.gpus}]
        given = _divide(node, mine, spans, host)
        if given is None:
            given = {s.id: tuple(sorted(node.threads)) for s in mine}
            shared |= set(given)
            notes.append(_shared_note(node, len(mine)))
        shares |= given
    slices = tuple(
        replace(s, cores=shares[s.id], shared_cores=s.id in shared) if s.id in shares else s for s in inventory.slices
    )
    return replace(inventory, slices=slices, notes=(*inventory.notes, *notes))


def spans_of(slices: Sequence[Slice], gpus: Sequence[GpuState]) -> Mapping[str, Span]:
    """Where each slice lies on its GPU, by slice id, measured in compute slices. Spans on one GPU are disjoint.

    Instances whose start may not be read are laid side by side in the order of their ids.
    """
    by_instance = {uuid: span for gpu in gpus for uuid, span in _instance_spans(gpu)}
    sharers: dict[str | None, list[str]] = {}
    for one in slices:
        sharers.setdefault(one.uuid, []).append(one.id)
    spans: dict[str, Span] = {}
    for one in slices:
        begin, end = by_instance.get(str(one.uuid), _WHOLE)
        side_by_side = sharers[one.uuid]
        position, part = side_by_side.index(one.id), (end - begin) / len(side_by_side)
        spans[one.id] = (begin + position * part, begin + (position + 1) * part)
    return spans


def _instance_spans(gpu: GpuState) -> Iterator[tuple[str, Span]]:
    unknown = 0
    for instance in sorted(gpu.instances, key=lambda i: i.id):
        if instance.start is not None:
            span = _placed_span(gpu, instance)
        else:
            parts = gpu.geometry.compute_slices if gpu.geometry else sum(i.g for i in gpu.instances)
            span = (_part(unknown, parts), _part(unknown + instance.g, parts))
            unknown += instance.g
        yield from ((compute.uuid, span) for compute in instance.compute)


def _placed_span(gpu: GpuState, instance: GpuInstance) -> Span:
    """Memory slices stand for compute slices: the one that most products have more of computes nothing by itself."""
    start, parts, width = instance.start or 0, instance.g, instance.g
    if gpu.geometry is not None:
        parts = gpu.geometry.compute_slices
        of_profile = (p.memory_slices for p in gpu.geometry.profiles if p.name == instance.profile)
        width = next(of_profile, None) or instance.g
    return _part(start, parts), _part(start + width, parts)


def _part(place: int, parts: int) -> Fraction:
    return Fraction(min(place, parts), parts)


def _nodes(gpus: Sequence[GpuState], free: frozenset[int]) -> list[_Node]:
    """GPUs by the cores next to them. Sets that overlap are one node; a GPU without usable cores nearby takes any."""
    nodes: list[_Node] = []
    for gpu in sorted(gpus, key=lambda g: g.index):
        near = frozenset(gpu.cpus) & free or free
        touching = [n for n in nodes if n.threads & near]
        members = tuple(g for n in touching for g in n.gpus)
        merged = _Node(near.union(*(n.threads for n in touching)), (*members, gpu))
        nodes = [*(n for n in nodes if n not in touching), merged]
    return nodes


def _divide(node: _Node, slices: Sequence[Slice], spans: Mapping[str, Span], host: Host) -> dict[str, Threads] | None:
    """Threads by slice id; None if there are fewer threads than slices."""
    groups = [tuple(t for t in core if t in node.threads) for core in host.cores]
    physical = [core for core in groups if core]
    threads = [(t,) for core in physical for t in core]
    for units in (physical, threads):
        shares = _by_place(node, units, slices, spans)
        if all(shares.values()):
            return shares
    return _one_by_one(threads, slices, spans) if len(slices) <= len(threads) else None


def _by_place(
    node: _Node, units: Sequence[Threads], slices: Sequence[Slice], spans: Mapping[str, Span]
) -> dict[str, Threads]:
    """Each GPU gets as many units as the next, each slice those of its place. A slice may end with none."""
    order, count = {gpu.uuid: i for i, gpu in enumerate(node.gpus)}, len(node.gpus)
    shares: dict[str, Threads] = {}
    for one in slices:
        number = order[one.gpu.uuid] if one.gpu else 0
        first, last = len(units) * number // count, len(units) * (number + 1) // count
        begin, end = (first + int((last - first) * edge) for edge in spans[one.id])
        shares[one.id] = tuple(sorted(t for unit in units[begin:end] for t in unit))
    return shares


def _one_by_one(threads: Sequence[Threads], slices: Sequence[Slice], spans: Mapping[str, Span]) -> dict[str, Threads]:
    """One thread for each slice, and what is left by the slices' sizes: for nodes with hardly more threads than slices."""
    weights = {s.id: spans[s.id][1] - spans[s.id][0] for s in slices}
    total = sum(weights.values()) or Fraction(1)
    spare = len(threads) - len(slices)
    exact = {id: spare * weight / total for id, weight in weights.items()}
    counts = {id: 1 + int(more) for id, more in exact.items()}
    by_remainder = sorted(exact, key=lambda id: (int(exact[id]) - exact[id], list(exact).index(id)))
    for id in by_remainder[: len(threads) - sum(counts.values())]:
        counts[id] += 1
    shares, begin = {}, 0
    for one in slices:
        taken = threads[begin : begin + counts[one.id]]
        shares[one.id] = tuple(sorted(t for unit in taken for t in unit))
        begin += counts[one.id]
    return shares


def _far_notes(gpus: Sequence[GpuState], allowed: frozenset[int]) -> Iterator[str]:
    for gpu in gpus:
        if gpu.cpus and not allowed & frozenset(gpu.cpus):
            yield (
                f"GPU {gpu.index}: none of the cores next to it ({format_cores(gpu.cpus)}) may be used here, so its "
                f"engines run on cores of another NUMA node."
            )


def _shared_note(node: _Node, slices: int) -> str:
    indices = format_cores(g.index for g in node.gpus)
    return (
        f"GPU {indices}: {slices} slices share cores {format_cores(node.threads)}, fewer than there are slices: their "
        f"engines are not kept apart on the host."
    )
