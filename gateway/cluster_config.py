"""What of a configuration means something else on a cluster than on one machine, or nothing: said, or refused. Pure but for the locks.

On one machine a plan may decide which GPU is cut how and who sits where. On a cluster nothing plans: the head seats replicas on
the slices that nodes offer, as many as are configured and as demand asks for.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from gateway.config import Config
from model_registry.errors import ConfigError
from placement.errors import PlacementError
from placement.locks import holder


def check_for_cluster(config: Config) -> None:
    """Refuse what would do harm if it were left out. Raises ConfigError."""
    if config.fleet.reserve:
        raise ConfigError(
            "slices are not reserved on a cluster, so replicas would be put on them",
            where="fleet.reserve",
            remedy="Take `reserve` out and name the slices that this machine offers in `fleet.slices`; `sliceway slices` lists them.",
        )


def differences(config: Config, path: Path, *, local: bool) -> tuple[str, ...]:
    """What does not count as it would on one machine, each with what to do. `local` is whether this machine is a part of the
    cluster, so that `fleet` is its own.
    """
    return tuple(
        str(PlacementError(message, where=where, remedy=remedy))
        for where, message, remedy in (*_fleet(config, path, local=local), *_autoscale(config))
    )


_Difference = tuple[str, str, str]


def _fleet(config: Config, path: Path, *, local: bool) -> Iterator[_Difference]:
    named = config.fleet.model_fields_set - {"autoscale", "head_room"}
    if not local:
        if named:
            yield (
                "fleet",
                f"it is each machine's own on a cluster, so nothing but `autoscale` and `head_room` counts here (not {', '.join(sorted(named))})",
                "Tell `sliceway node join` what its machine offers: --cores, --simulate, or what it finds there.",
            )
        return
    if config.fleet.layouts:
        yield (
            "fleet.layouts",
            "`--ray` cuts no GPU: replicas are put on the slices that are there",
            f"Before it, on each machine: sliceway apply {shlex.quote(str(path))} --layouts-only",
        )
    if config.fleet.partition == "planned":
        yield (
            "fleet.partition",
            "no plan cuts GPUs on a cluster: they stay as they are",
            "Name what they are to hold in `fleet.layouts`, and apply that on each machine before it joins.",
        )


def _autoscale(config: Config) -> Iterator[_Difference]:
    policy = config.fleet.autoscale
    if policy.repartition == "automatic":
        yield (
            "fleet.autoscale.repartition",
            "GPUs are not cut anew for demand on a cluster: replicas wait for a free slice",
            "Have slices enough for `max`, or add a node.",
        )
    if policy.sleep == "sleep-mode":
        yield (
            "fleet.autoscale.sleep",
            "engines of a cluster listen on TCP, where vLLM's sleep mode is not used: they are stopped instead",
            "Set `min: 1` for a model that has to answer at once.",
        )


def led_elsewhere(config: Config) -> PlacementError | None:
    """Why this machine is not planned by itself: a cluster's head seats its replicas. None where it is part of none."""
    for lock in sorted(config.state.glob("nodes/*/member.lock")):
        if (pid := holder(lock)) is not None:
            node = lock.parent
            return PlacementError(
                f"this machine is node {node.name!r} of a cluster, whose head seats the replicas",
                where=f"{lock} (pid {pid})",
                remedy="`sliceway node list` shows them. To cut this node's GPUs anew: a file with `fleet.layouts` and "
                f"`state_dir: {node / 'engines'}`, applied with: sliceway apply FILE --drain",
            )
    return None
