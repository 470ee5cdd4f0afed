"""Plans as a head takes part in them: what they start from, and which of them it carries out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from placement.cluster.errors import NotSurveyed
from placement.cluster.members import Seat, slice_key
from placement.cluster.nodes import Nodes
from placement.cluster.survey import ReplicaNow, Survey, SurveyedNode
from placement.cluster.transitions import digest, kept
from placement.errors import StalePlan
from placement.gpu_slices import slices_of
from placement.status import ScalingRow
from placement.table import ReplicaState
from placement.transition.steps import Transition

SURVEY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Standing:
    """What the head itself knows when it is asked about a plan.

    `nodes` are those that a plan counts on, and whether nothing may change there; `states` are of replicas that gateways know, `config` is
    what is worked by, and `aimed` what will be from the next round on. `changing` are replicas being replaced or ended.
    """

    nodes: Mapping[str, bool]
    seats: Mapping[str, Seat]
    states: Mapping[str, str]
    unplaced: Mapping[str, str]
    reserved: Mapping[str, str]
    numbers: Mapping[str, int]
    scaling: Mapping[str, ScalingRow]
    running: Mapping[str, int]
    config: str
    aimed: str | None
    changing: Collection[str]


async def take_survey(nodes: Nodes, now: Callable[[], Standing]) -> Survey:
    """The cluster as plans see it; every node is asked for its GPUs. Raises NotSurveyed where one cannot tell them.

    `now` is how the head stands, which may be another way when all have answered.
    """
    asked = now().nodes
    found = await asyncio.gather(*(_surveyed(nodes, node, frozen=frozen) for node, frozen in asked.items()))
    standing = now()
    slices = {slice_key(n.node, one.id) for n in found for gpu in n.gpus for one in slices_of(gpu)}
    return Survey(
        nodes=tuple(found),
        replicas={
            replica: ReplicaNow(seat=seat, state=standing.states.get(replica, ReplicaState.PENDING.value))
            for replica, seat in sorted(standing.seats.items())
        },
        unplaced=dict(standing.unplaced),
        reserved=kept(standing.reserved, slices, asked),
        numbers=dict(standing.numbers),
        arrivals={pool: row.arrivals_per_second for pool, row in standing.scaling.items()},
        short={pool: row.short for pool, row in standing.scaling.items() if row.short},
        running=standing.running,
        config=standing.config,
    )


async def _surveyed(nodes: Nodes, node: str, *, frozen: bool) -> SurveyedNode:
    try:
        async with asyncio.timeout(SURVEY_SECONDS):
            found = await nodes.gpus(node)
    except Exception as error:
        raise NotSurveyed(
            f"node {node!r} does not tell its GPUs: {error or type(error).__name__}",
            where=node,
            remedy="`sliceway node list` shows what is the matter with it. A node that runs another version may not know the "
            "question: upgrade it, or have it leave, and plan again.",
        ) from error
    return SurveyedNode(node=node, gpus=found.gpus, cordoned=found.cordoned, frozen=frozen)


def check_plan(transition: Transition, found: Survey, standing: Standing) -> None:
    """Raise StalePlan where anything that `transition` was made from is another by now, or anything else is being changed."""
    seats = {replica: now.seat for replica, now in found.replicas.items()}
    asked = digest(standing.aimed) if standing.aimed is not None else None
    if transition.fingerprint != found.fingerprint or seats != standing.seats or transition.wanted != asked:
        raise StalePlan(
            "GPUs, seats or configuration of the cluster are others since the plan was made",
            remedy="Plan again: sliceway plan CONFIG --ray; then apply.",
        )
    if busy := sorted(standing.changing):
        raise StalePlan(
            f"{', '.join(busy)}: being replaced or ended at this moment",
            remedy="Wait until `sliceway node list` shows nothing of it, and apply again.",
        )
