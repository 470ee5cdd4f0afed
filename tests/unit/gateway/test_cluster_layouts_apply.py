"""`fleet.layouts` against a cluster that is at work: which cuts the head is told, who is refused, and in which order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gateway.cluster_layouts import layout_transition, outcomes
from gateway.cluster_planning import layouts_differ
from gateway.config import Config
from placement.cluster.members import Seat
from placement.cluster.survey import ReplicaNow, Survey, SurveyedNode, layouts_of
from placement.cluster.testing import made_gpu
from placement.errors import ModeChangeNeeded, SliceInUse
from placement.gpus import GpuProcess, GpuState
from placement.partition import LayoutRule
from placement.transition.steps import Transition

HALVES = ("3g.40gb@0", "3g.40gb@4")


def rule(layout: Any = HALVES, **more: Any) -> LayoutRule:
    return LayoutRule.model_validate({"layout": layout} | more)


def survey(*gpus: GpuState, **seats: str) -> Survey:
    """One node `a` with these GPUs; `chat_0="GPU-0/1g.10gb@0"`."""
    there = {
        name.replace("_", "-"): ReplicaNow(
            seat=Seat(replica=name.replace("_", "-"), model="chat", node="a", slice_id=slice_id), state="ready"
        )
        for name, slice_id in seats.items()
    }
    return Survey(nodes=(SurveyedNode(node="a", gpus=gpus),), replicas=there)


def told(found: Transition) -> list[str]:
    return [f"{step}" for step in found.steps]


def transition(seen: Survey, *rules: LayoutRule, **options: bool) -> Transition:
    return layout_transition(seen, layouts_of(seen, rules), **options)


def test_what_stays_is_not_touched_and_what_comes_waits_for_what_goes() -> None:
    seen = survey(made_gpu(0, holds=("1g.10gb@0", "3g.40gb@4")), chat_0="GPU-0/3g.40gb@4")
    found = transition(seen, rule())
    assert told(found) == ["destroy a/GPU-0/1g.10gb@0", "create a/GPU-0/3g.40gb@0"]
    assert found.steps[1].after == (0,)
    assert found.fingerprint == seen.fingerprint
    assert found.seats == {"chat-0": "a/GPU-0/3g.40gb@4"}
    assert not transition(survey(made_gpu(0, holds=HALVES)), rule())


def test_who_would_have_to_end_is_named_and_ends_where_that_is_allowed() -> None:
    seen = survey(made_gpu(0, holds=("4g.40gb@0",)), chat_0="GPU-0/4g.40gb@0")
    with pytest.raises(SliceInUse, match=r"chat-0 on a/GPU-0/4g\.40gb@0") as refused:
        transition(seen, rule())
    assert "--drain" in str(refused.value.remedy)
    found = transition(seen, rule(), drain=True)
    assert told(found) == [
        "drain chat-0 on a/GPU-0/4g.40gb@0",
        "stop chat-0 on a/GPU-0/4g.40gb@0",
        "destroy a/GPU-0/4g.40gb@0",
        "create a/GPU-0/3g.40gb@0",
        "create a/GPU-0/3g.40gb@4",
    ]
    assert [step.after for step in found.steps] == [(), (0,), (1,), (2,), (2,)]
    assert {step.demand for step in found.steps if step.replica} == {"chat"}


def test_what_is_in_use_by_another_process_stays_also_where_engines_are_drained() -> None:
    gpu = made_gpu(0, holds=("4g.40gb@0",))
    (instance,) = gpu.instances
    (compute,) = instance.compute
    busy = replace(instance, compute=(replace(compute, processes=(GpuProcess(7, "train.py"),)),))
    used = replace(gpu, instances=(busy,))
    with pytest.raises(SliceInUse, match=r"train\.py"):
        transition(survey(used), rule(), drain=True)
    assert transition(survey(used, chat_0="GPU-0/4g.40gb@0"), rule(), drain=True), "the process is the engine's"


def test_mig_mode_changes_where_it_is_allowed() -> None:
    off = survey(made_gpu(0, mig=False), chat_0="GPU-0")
    with pytest.raises(ModeChangeNeeded, match="MIG would have to be switched on"):
        transition(off, rule(), drain=True)
    found = transition(off, rule(), drain=True, allow_mode_change=True)
    assert told(found)[:3] == ["drain chat-0 on a/GPU-0", "stop chat-0 on a/GPU-0", "set a/GPU-0 to MIG on"]
    assert {step.after for step in found.steps[3:]} == {(2,)}
    on = survey(made_gpu(0, holds=("1g.10gb@0",)))
    back = transition(on, LayoutRule(mig=False), allow_mode_change=True)
    assert told(back) == ["destroy a/GPU-0/1g.10gb@0", "set a/GPU-0 to MIG off"]


def test_each_gpu_is_told_by_what_it_holds_afterwards() -> None:
    before = survey(made_gpu(0), made_gpu(1), made_gpu(2, holds=HALVES), made_gpu(3))
    rules = [rule(gpus=[0, 1, 2])]
    now = survey(made_gpu(0, holds=HALVES), made_gpu(1, holds=HALVES[:1]), made_gpu(2, holds=HALVES), made_gpu(3))
    found = outcomes(layouts_of(before, rules), now, rules)
    assert [one.result for one in found] == ["changed", "failed", "unchanged"]


def test_gpus_of_a_node_of_another_version_stay_as_they_are_and_keep_no_plan_from_the_others() -> None:
    one = made_gpu(0, holds=("1g.10gb@0",))
    old = SurveyedNode(node="b", gpus=(one,), frozen=True)
    seen = Survey(nodes=(SurveyedNode(node="a", gpus=(one,)), old))
    assert {step.place.gpu for step in transition(seen, rule()).steps} == {"a/GPU-0"}
    now = Survey(nodes=(SurveyedNode(node="a", gpus=(made_gpu(0, holds=HALVES),)), old))
    assert [(o.plan.gpu.uuid, o.result) for o in outcomes(layouts_of(seen, (rule(),)), now, (rule(),))] == [
        ("a/GPU-0", "changed")
    ]
    asked = Config.model_validate({"version": "v1", "models": [], "fleet": {"layouts": [{"layout": list(HALVES)}]}})
    assert layouts_differ(asked, seen) is not None
    assert layouts_differ(asked, now) is None


def test_a_rule_may_name_a_product_that_only_a_node_of_another_version_has() -> None:
    old = SurveyedNode(node="b", gpus=(made_gpu(0, holds=("1g.10gb@0",)),), frozen=True)
    named = rule(gpus=["h100-sxm"])
    (found,) = layouts_of(Survey(nodes=(old,)), (named,))
    assert (found.wanted, found.actions) == (None, ())
