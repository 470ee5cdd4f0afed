"""What of a configuration means something else on a cluster than on one machine, or nothing: said, with what to do. Pure but for the locks.

Without a plan the head seats replicas on the slices that nodes offer, as many as are configured and as demand asks for. GPUs are cut as
`fleet.layouts` says when their machine joins, as a plan says when nodes join with `partition: planned`, anew for demand where
`autoscale.repartition` allows it, and where `sliceway apply CONFIG --ray` has the head carry a plan out.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from gateway.config import Config
from placement.cluster.here import local_nodes
from placement.errors import PlacementError


def differences(config: Config, path: Path, *, local: bool) -> tuple[str, ...]:
    """What does not count as it would on one machine, each with what to do. `local` is whether this machine is a part of the
    cluster, so that `fleet` is its own.
    """
    return tuple(
        str(PlacementError(message, where=where, remedy=remedy))
        for where, message, remedy in (*_fleet(config, path, local=local), *_autoscale(config))
    )


_Difference = tuple[str, str, str]
_OF_ALL = frozenset(
    {"autoscale", "head_room", "layouts", "prices", "cordon", "reserve", "partition", "max_layout_changes"}
)  # what counts for all nodes, some of it for plans only


def _fleet(config: Config, path: Path, *, local: bool) -> Iterator[_Difference]:
    named = config.fleet.model_fields_set - _OF_ALL
    if not local and named:
        yield (
            "fleet",
            f"what a machine offers is its own on a cluster, so this does not count here: {', '.join(sorted(named))}",
            "Tell `sliceway node join` what its machine offers: --cores, --simulate, or what it finds there.",
        )
    if config.fleet.reserve and config.fleet.partition != "planned":
        yield (
            "fleet.reserve",
            "slices are kept for other work by a plan, and on a cluster none is made by itself for this configuration",
            f"Have one carried out when the nodes have joined: sliceway apply {shlex.quote(str(path))} --ray HOST:PORT; or let "
            "nodes be planned as they join, with `partition: planned`.",
        )


def _autoscale(config: Config) -> Iterator[_Difference]:
    if config.fleet.autoscale.sleep == "sleep-mode":
        yield (
            "fleet.autoscale.sleep",
            "engines of a cluster listen on TCP, where vLLM's sleep mode is not used: they are stopped instead",
            "Set `min: 1` for a model that has to answer at once.",
        )


def led_elsewhere(config: Config) -> PlacementError | None:
    """Why this machine is not planned by itself: a cluster's head seats its replicas. None where it is part of none."""
    for node in local_nodes(config.state):
        if node.pid is not None:
            return PlacementError(
                f"this machine is node {node.name!r} of a cluster, whose head seats the replicas",
                where=f"{node.lock} (pid {node.pid})",
                remedy="`sliceway node list` shows them. Its GPUs are cut with the others': sliceway apply CONFIG --ray HOST:PORT; by "
                f"themselves with a file that has `fleet.layouts` and `state_dir: {node.paths.engines.root}`: sliceway apply FILE --drain",
            )
    return None
