"""`sliceway apply CONFIG --ray`: the head of a cluster carries a plan out, and this shows how far it is. Ray is imported only here, when it is
used.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer

from gateway.applying import AppliedPlan
from gateway.cli.cluster_plan import head_of, say_what_it_is, survey_again, survey_of
from gateway.cli.cluster_token import token_for
from gateway.cli.layout_view import show_outcomes
from gateway.cli.output import exit_code, print_json
from gateway.cli.plan_view import labels_of, show_applied, show_step
from gateway.cluster_following import LOOK_SECONDS, follow
from gateway.cluster_layouts import layout_transition, outcomes
from gateway.cluster_planning import ClusterPlan, plan_cluster
from gateway.config import Config
from gateway.reviewed import ReviewedPlan
from model_registry.errors import SlicewayError
from placement.cluster.survey import Survey
from placement.errors import PlacementError, StalePlan
from placement.partition import GpuOutcome
from placement.transition import Outcome, Record
from placement.transition.journal import public_record
from placement.transition.steps import Transition

_ANSWER_SECONDS = 30.0
_TRIES = 6


def apply_on_ray(
    config: Config,
    address: str,
    token: Path | None,
    *,
    allow_dip: bool,
    allow_mode_change: bool,
    as_json: bool,
    plan_file: Path | None = None,
    drain: bool = False,
) -> None:
    """Have the cluster's head cut GPUs as `fleet.layouts` says, then carry the plan out, and wait until it is over. Raises typer.Exit with
    1 where not all of it could be done.

    Raises what `layout_transition` does, StalePlan where the head works by another configuration, where the plan in `plan_file` is not the one
    that would be carried out, or anything changes meanwhile, TransitionBlocked, and what planning and `survey_of` raise. Once GPUs are cut
    what became of them is shown before; `as_json` it is typer.Exit then, with the error in what is shown.
    """
    reviewed = ReviewedPlan.read(plan_file) if plan_file is not None else None
    token = token_for(address, token, [config.state])
    plan = _planned(config, survey_of(address, token), reviewed, allow_dip=allow_dip)
    if not as_json:
        say_what_it_is(plan)
    _refuse(plan)
    go = _Go(address, quiet=as_json, allow_mode_change=allow_mode_change)
    gpus: tuple[GpuOutcome, ...] = ()
    if any(p.actions for p in plan.layouts):
        cut = go.carry_out(
            plan.survey, layout_transition(plan.survey, plan.layouts, drain=drain, allow_mode_change=allow_mode_change)
        )
        now = survey_again(address)
        gpus = outcomes(plan.layouts, now, config.fleet.layouts)
        if not cut.ok:
            _show(AppliedPlan(cut), gpus, plan, as_json=as_json)
            raise typer.Exit(1)

    def anew() -> ClusterPlan:
        return _planned_anew(config, survey_again(address), reviewed, allow_dip=allow_dip)

    try:
        plan, outcome = _after_layouts(go, anew) if gpus else (plan, _carried_out(go, plan))
    except SlicewayError as error:
        if not gpus:
            raise
        _show_stopped(error, gpus, plan, as_json=as_json)
        raise
    applied = AppliedPlan(outcome, plan.answer)
    _show(applied, gpus, plan, as_json=as_json)
    raise typer.Exit(0 if applied.ok else 1)


def _show_stopped(error: SlicewayError, gpus: Sequence[GpuOutcome], plan: ClusterPlan, *, as_json: bool) -> None:
    """GPUs are cut, which is told also where no plan follows. As JSON `error` is in it, and the command ends here."""
    if not as_json:
        show_outcomes(gpus)
        return
    _show(AppliedPlan(Outcome((), (), error=error)), gpus, plan, as_json=True)
    raise typer.Exit(exit_code(error)) from error


def _show(applied: AppliedPlan, gpus: Sequence[GpuOutcome], plan: ClusterPlan, *, as_json: bool) -> None:
    if not as_json:
        show_outcomes(gpus)
        show_applied(applied)
        return
    changed = bool(applied.outcome.done) or any(gpu.result == "changed" for gpu in gpus)
    print_json(
        {"ok": applied.ok, "changed": changed, "simulated": plan.survey.simulated, "controller_told": changed}
        | {"gateways_told": 0, "gpus": [g.as_public() for g in gpus], "fleet": applied.as_public()}
    )


def _after_layouts(go: _Go, anew: Callable[[], ClusterPlan]) -> tuple[ClusterPlan, Outcome]:
    """Where GPUs were cut the head seats whom it can, so a plan may be stale when it is made. Raises StalePlan where each one is."""
    for _ in range(_TRIES - 1):
        with contextlib.suppress(StalePlan):
            plan = anew()
            return plan, _carried_out(go, plan)
        time.sleep(LOOK_SECONDS)
    plan = anew()
    return plan, _carried_out(go, plan)


def _carried_out(go: _Go, plan: ClusterPlan) -> Outcome:
    """Raises TransitionBlocked where no order of steps keeps every promise."""
    if plan.answer.transition is None:
        assert plan.answer.blocked is not None
        raise plan.answer.blocked
    return go.carry_out(plan.survey, plan.answer.transition)


def _planned(config: Config, survey: Survey, reviewed: ReviewedPlan | None, *, allow_dip: bool) -> ClusterPlan:
    """What would be carried out by now; raises StalePlan where that is not the plan that somebody has reviewed."""
    if reviewed is None:
        return plan_cluster(config, survey, allow_dip=allow_dip)
    survey = survey.model_copy(
        update={"running": reviewed.requests}
    )  # or no plan would hold where requests come and go
    plan = plan_cluster(config, survey, allow_dip=allow_dip)
    reviewed.check_demand(plan.desired)
    reviewed.check(plan.layouts, plan.answer)
    return plan


def _planned_anew(config: Config, survey: Survey, reviewed: ReviewedPlan | None, *, allow_dip: bool) -> ClusterPlan:
    """After the layouts, for the demand of the plan that somebody has reviewed. The head has seated whom it can by then, so the fleet is another one
    and so are the steps; raises StalePlan where they lead to other numbers of replicas, or the head works by another configuration.
    """
    if reviewed is not None:
        numbers = {**survey.numbers, **reviewed.numbers}
        survey = survey.model_copy(update={"running": reviewed.requests, "numbers": numbers})
    plan = plan_cluster(config, survey, allow_dip=allow_dip)
    _refuse(plan)
    if reviewed is not None:
        reviewed.check_target(plan.answer)
    return plan


def _refuse(plan: ClusterPlan) -> None:
    if not plan.worked_by:
        raise StalePlan(
            "the cluster works by another configuration than this one",
            remedy="Have its `sliceway up` take the file over, with SIGHUP; then apply again.",
        )


@dataclass(frozen=True, slots=True)
class _Go:
    """How the head is told to take steps, and is followed."""

    address: str
    quiet: bool
    allow_mode_change: bool

    def carry_out(self, survey: Survey, transition: Transition) -> Outcome:
        """Have the head take the steps, and show each as it begins. Raises StalePlan, ClusterUnreachable."""
        if not transition.steps:
            return Outcome((), ())
        _begin(self.address, survey, transition, allow_mode_change=self.allow_mode_change)
        labels = {} if self.quiet else labels_of(survey.gpus)
        return follow(_told(self.address), lambda step, what: None if self.quiet else show_step(step, what, labels))


def _begin(address: str, survey: Survey, transition: Transition, *, allow_mode_change: bool) -> None:
    import ray

    from placement.cluster.asking import asking
    from placement.cluster.transitions import digest

    record = json.dumps(public_record(Record(replace(transition, wanted=digest(survey.config)), datetime.now(UTC))))
    with asking("the cluster's head", address):
        begun: Any = head_of(address).carry_out.remote(record, allow_mode_change=allow_mode_change)
        ray.get(begun, timeout=_ANSWER_SECONDS)


def _told(address: str) -> Iterator[Mapping[str, Any] | None]:
    """What the head tells of its transition, again and again; None where there is no head at the moment."""
    import ray
    from ray.exceptions import RayError

    while True:
        try:
            told: Any = ray.get(head_of(address).transition.remote(), timeout=_ANSWER_SECONDS)
        except (RayError, PlacementError):
            yield None
        else:
            yield told
        time.sleep(LOOK_SECONDS)
