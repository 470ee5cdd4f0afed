"""`sliceway apply CONFIG --ray`: the head of a cluster carries a plan out, and this shows how far it is. Ray is imported only here, when it is
used.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer

from gateway.applying import AppliedPlan
from gateway.cli.cluster_plan import head_of, say_what_it_is, survey_of
from gateway.cli.output import print_json
from gateway.cli.plan_view import labels_of, show_applied, show_step
from gateway.cluster_following import LOOK_SECONDS, follow
from gateway.cluster_planning import ClusterPlan, plan_cluster
from gateway.config import Config
from gateway.reviewed import ReviewedPlan
from model_registry.errors import ConfigError
from placement.cluster.survey import Survey
from placement.errors import PlacementError, StalePlan
from placement.transition import Outcome, Record, Step
from placement.transition.journal import public_record

_ANSWER_SECONDS = 30.0


def apply_on_ray(
    config: Config,
    address: str,
    token: Path | None,
    *,
    allow_dip: bool,
    allow_mode_change: bool,
    as_json: bool,
    plan_file: Path | None = None,
) -> None:
    """Have the cluster's head carry the plan out, and wait until it is over. Raises typer.Exit with 1 where not all of it could be done.

    Raises StalePlan where the head works by another configuration, where the plan in `plan_file` is not the one that would be carried
    out, or anything changes meanwhile, TransitionBlocked, and what planning and `survey_of` raise.
    """
    reviewed = ReviewedPlan.read(plan_file) if plan_file is not None else None
    plan = _planned(config, survey_of(address, token), reviewed, allow_dip=allow_dip)
    if not as_json:
        say_what_it_is(plan)
    steps = _steps(plan)
    if steps:
        _begin(plan, address, allow_mode_change=allow_mode_change)
        labels = {} if as_json else labels_of(plan.gpus)
        outcome = follow(_told(address), lambda step, what: None if as_json else show_step(step, what, labels))
    else:
        outcome = Outcome((), ())
    applied = AppliedPlan(outcome, plan.answer)
    if as_json:
        changed = bool(outcome.done)
        print_json(
            {"ok": applied.ok, "changed": changed, "simulated": plan.survey.simulated, "controller_told": changed}
            | {"gateways_told": 0, "gpus": [], "fleet": applied.as_public()}
        )
    else:
        show_applied(applied)
    raise typer.Exit(0 if applied.ok else 1)


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


def _steps(plan: ClusterPlan) -> tuple[Step, ...]:
    """What there is to do. Raises where that is not for now."""
    if not plan.worked_by:
        raise StalePlan(
            "the cluster works by another configuration than this one",
            remedy="Have its `sliceway up` take the file over, with SIGHUP; then apply again.",
        )
    if differ := [p for p in plan.layouts if p.actions]:
        raise ConfigError(
            f"{differ[0].gpu.label} is not cut as `fleet.layouts` says",
            where=differ[0].wanted.where if differ[0].wanted else "fleet.layouts",
            remedy="Cut it on its machine, before that joins: sliceway apply CONFIG --layouts-only; or leave it to the plan, without a rule.",
        )
    if plan.answer.transition is None:
        assert plan.answer.blocked is not None
        raise plan.answer.blocked
    return plan.answer.transition.steps


def _begin(plan: ClusterPlan, address: str, *, allow_mode_change: bool) -> None:
    import ray

    from placement.cluster.asking import asking
    from placement.cluster.transitions import digest

    assert plan.answer.transition is not None
    transition = replace(plan.answer.transition, wanted=digest(plan.survey.config))
    record = json.dumps(public_record(Record(transition, datetime.now(UTC))))
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
