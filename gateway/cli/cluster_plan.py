"""`sliceway plan CONFIG --ray`: the plan for all nodes of a cluster. Ray is imported only here, when it is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from gateway.cli.cluster import LOCAL, prepare_ray
from gateway.cli.cluster_token import existing, token_for
from gateway.cli.layout_view import show_plans, show_replicas
from gateway.cli.output import err, print_json
from gateway.cli.plan_view import show_fleet, show_why
from gateway.cluster_planning import ClusterPlan, KeptReplica, plan_cluster
from gateway.config import Config
from model_registry.errors import ConfigError
from placement.errors import PlacementError
from placement.table import ReplicaState

if TYPE_CHECKING:
    from placement.cluster.survey import Survey

_SURVEY_SECONDS = 30.0

OnRay = Annotated[
    str | None,
    typer.Option("--ray", metavar="HOST:PORT", help="For the cluster at this address: all GPUs of all its nodes."),
]
TokenFile = Annotated[
    Path | None,
    typer.Option("--token-file", help="A copy of the cluster's token, with --ray; see `sliceway node join --help`."),
]


def plan_on_ray(
    config: Config, address: str, token: Path | None, *, why: str | None, allow_dip: bool, as_json: bool
) -> None:
    """Show what the configuration makes of the cluster's GPUs. Raises ClusterError, and what planning raises."""
    token = token_for(address, token, [config.state])
    plan = plan_cluster(config, survey_of(address, token), allow_dip=allow_dip)
    if as_json:
        print_json(plan.as_public() | {"fleet": public_fleet(plan, why)})
        return
    say_what_it_is(plan)
    if why is not None:
        show_why(plan.answer, why, plan.gpus)
        return
    show_plans(plan.layouts)
    show_fleet(plan.answer, plan.gpus, plan.reserved)
    if not plan.replicas.same:
        show_replicas(plan.replicas)


def survey_of(address: str, token: Path | None) -> Survey:
    """What the cluster's head and nodes tell. Raises ClusterError, PlacementError where there is no head."""
    if address == LOCAL:
        raise ConfigError(
            "this needs the cluster's address",
            where="--ray",
            remedy="Give it as HOST:PORT; `sliceway up CONFIG --ray` prints it.",
        )
    prepare_ray(existing(token))
    from placement.cluster.start import connect

    connect(address)
    return survey_again(address)


def survey_again(address: str) -> Survey:
    """As `survey_of`, in a process that has asked before."""
    import ray

    from placement.cluster.asking import asking
    from placement.cluster.survey import Survey

    with asking("the cluster's head", address):
        found: Any = ray.get(head_of(address).survey.remote(), timeout=_SURVEY_SECONDS)
    return Survey.model_validate_json(found)


def head_of(address: str) -> Any:
    """The cluster's head. Raises PlacementError where there is none."""
    import ray

    from placement.cluster.actors import HEAD, NAMESPACE

    try:
        return ray.get_actor(HEAD, namespace=NAMESPACE)
    except ValueError as error:
        raise PlacementError(
            "this cluster has no head yet", where=address, remedy="Start one: sliceway up CONFIG --ray ADDRESS"
        ) from error


def public_fleet(plan: ClusterPlan, why: str | None = None) -> dict[str, object]:
    """The stable JSON shape: `fleet` in `sliceway plan --json`, as on one machine."""
    answer = plan.answer
    public = answer.as_public() | {"reserved": [r.as_public() for r in plan.reserved]}
    if why is not None:
        names = [d.name for d in answer.demands.values() if why in (d.name, d.model)] or [why]
        public["decisions"] = [d.as_public() for n in names for d in answer.plan.why(n)]
    return public


def say_what_it_is(plan: ClusterPlan) -> None:
    """What a reader has to know before the plan."""
    if plan.survey.simulated:
        err.print("[yellow]simulated[/]: every GPU of this cluster", highlight=False)
    if not plan.worked_by:
        err.print(
            "[yellow]![/] the cluster works by another configuration: its `sliceway up` takes this one over with SIGHUP",
            highlight=False,
        )
    for model in plan.apart:
        err.print(escape(_kept(model, [one for one in plan.kept if one.model == model])), highlight=False)
    for node in plan.survey.nodes:
        if node.frozen:
            err.print(f"node {escape(node.node)} runs another version: its GPUs stay as they are", highlight=False)


def _kept(model: str, replicas: Sequence[KeptReplica]) -> str:
    """`chat is kept as it is, and not planned, since chat-0 is on a slice of no GPU: chat-0 on n1/cpu-0`."""
    cause = next((one for one in replicas if one.of_no_gpu or one.frozen), None)
    why = "a slice of no GPU" if cause is None or cause.of_no_gpu else "a node of another version"
    told = ", ".join(
        f"{one.replica} on {one.slice}" + (f" ({one.state})" if one.state != ReplicaState.READY.value else "")
        for one in replicas
    )
    return f"{model} is kept as it is, and not planned, since {cause.replica if cause else 'a replica'} is on {why}: {told}"
