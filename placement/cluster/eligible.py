"""Which nodes may take part in a cluster, and why others may not. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from placement.cluster.errors import NodeMismatch, SliceHeld
from placement.cluster.members import NodeReport, Seat, Versions
from placement.demanded import model_of


def problems_of(reports: Mapping[str, NodeReport], versions: Versions) -> dict[str, str]:
    """By node, what keeps it from taking part: other versions than the head's, or a slice that one before it offers already."""
    offered: dict[str, str] = {}
    found: dict[str, str] = {}
    for node in sorted(reports):
        report = reports[node]
        problem = _other_versions(report, versions) or _offered_already(report, offered)
        if problem is not None:
            found[node] = str(problem)
            continue
        offered.update(dict.fromkeys(_own(report), node))
    return found


def in_use(report: NodeReport, seats: Mapping[str, Seat], models: Collection[str]) -> NodeReport:
    """`report` with the slices alone that have a seat, or run an engine of `models` that has none and is taken over, where the others
    may go for `fleet.layouts` at any moment.
    """
    if report.laid_out:
        return report
    busy = {seat.slice_id for seat in seats.values() if seat.node == report.node}
    busy |= {one for replica, one in report.running.items() if replica not in seats and model_of(replica) in models}
    return report.model_copy(update={"slices": tuple(s for s in report.slices if s.id in busy)})


def _other_versions(report: NodeReport, versions: Versions) -> NodeMismatch | None:
    differences = versions.differences(report.versions)
    if not differences:
        return None
    return NodeMismatch(
        f"node {report.node!r} runs other versions than the head: {'; '.join(differences)}",
        remedy="It goes on with what it runs and gets nothing new. Install the same versions on every node and join again.",
    )


def _offered_already(report: NodeReport, offered: Mapping[str, str]) -> SliceHeld | None:
    for uuid in sorted(_own(report)):
        if uuid in offered:
            return SliceHeld(
                f"node {report.node!r} offers slice {uuid}, which node {offered[uuid]!r} offers already",
                remedy="Two agents run on one machine: stop one of them (Ctrl-C on its `sliceway node join`).",
            )
    return None


def _own(report: NodeReport) -> set[str]:
    """Core sets of two machines have equal names and are different slices; a GPU's UUID is its own everywhere."""
    return {s.uuid for s in report.slices if s.uuid and not s.simulated}
