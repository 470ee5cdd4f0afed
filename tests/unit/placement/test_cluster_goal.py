"""A cluster's configuration as the head reads it: by which rules it scales, and what replicas are counted with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model_registry.errors import ConfigError
from placement.cluster.goal import read_goal
from placement.slices import Gpu, Slice, SliceKind
from placement.workload.measured import Measured

MODELS = Path(__file__).parents[3] / "configs" / "examples" / "models"
H100 = Gpu("GPU-0", 0, "h100-sxm", 80 * 2**30)
NOTHING = Measured()
CPU = Slice("cpu-0", SliceKind.CPU, None, 64 * 2**30, cores=(0, 1))


def mig(profile: str, gib: int) -> Slice:
    return Slice(f"GPU-0/{profile}@0", SliceKind.MIG, profile, gib * 2**30, uuid="MIG-0", gpu=H100)


def text(fleet: dict[str, Any] | None = None, **model: Any) -> str:
    told = {
        "name": "chat",
        "source": "org/chat",
        "metadata": str(MODELS / "Qwen--Qwen3-8B.json"),
        "max_model_len": 4096,
        "demand": {"requests_per_second": 6, "prompt_tokens": 800, "output_tokens": 200},
    }
    content = {"version": "v1", "fleet": fleet or {}, "models": [told | model], "tenants": [], "gateway": {}}
    return json.dumps(content)


def test_the_head_scales_by_the_configured_rules_for_the_tenants_it_is_told() -> None:
    goal = read_goal(text({"autoscale": {"cool_down": "7s"}, "head_room": 0.5}), 1, {"chat": (None, "acme")})
    assert goal.policy.cool_down == 7.0
    assert goal.head_room == 0.5
    assert goal.pools == {"chat": (None, "acme")}
    assert read_goal(text(), 1).pools == {}


def test_a_replica_is_counted_with_what_its_slice_is_estimated_to_bear() -> None:
    goal = read_goal(text(), 1)
    larger, smaller = (
        goal.capacity_on("chat", mig("4g.40gb", 40), NOTHING),
        goal.capacity_on("chat", mig("3g.40gb", 40), NOTHING),
    )
    assert larger is not None
    assert smaller is not None
    assert larger.origin == "estimated"
    assert (larger.requests_per_second or 0) >= (smaller.requests_per_second or 0) > 0
    assert goal.capacity_on("chat", mig("4g.40gb", 40), NOTHING) is larger, "worked out once"


def test_where_it_does_not_fit_or_may_not_be_it_bears_nothing() -> None:
    goal = read_goal(text(profile="3g.40gb"), 1)
    assert goal.capacity_on("chat", mig("1g.10gb", 9), NOTHING) is None
    assert goal.capacity_on("chat", mig("4g.40gb", 40), NOTHING) is None
    assert goal.capacity_on("chat", mig("3g.40gb", 40), NOTHING) is not None
    assert goal.capacity_on("another", mig("3g.40gb", 40), NOTHING) is None


def test_of_cores_nobody_knows_how_much_they_bear() -> None:
    found = read_goal(text(), 1).capacity_on("chat", CPU, NOTHING)
    assert found is not None
    assert (found.requests_per_second, found.origin) == (None, "unknown")


@pytest.mark.parametrize("wrong", ["{", '{"models": [{"name": "chat"}]}'])
def test_a_text_that_is_no_configuration_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="makes no sense"):
        read_goal(wrong, 1)


def test_engines_belong_to_actors_of_their_own_unless_the_configuration_says_otherwise() -> None:
    assert read_goal(text(), 1).actors == "replica"
    by_node = json.dumps(json.loads(text()) | {"cluster": {"actors": "node"}})
    assert read_goal(by_node, 1).actors == "node"
    with pytest.raises(ConfigError, match=r"cluster\.actors"):
        read_goal(by_node.replace("node", "gpu"), 1)
