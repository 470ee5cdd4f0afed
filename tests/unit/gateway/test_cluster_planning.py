"""A configuration against what the nodes of a cluster tell: one plan over all their GPUs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gateway.cli import app, cluster_plan
from gateway.cli.cluster import with_ray_address
from gateway.cluster_planning import ClusterPlan, config_text, plan_cluster
from gateway.config import Config
from model_registry.errors import ConfigError, SlicewayError
from placement.cluster.members import Seat
from placement.cluster.survey import NodeGpus, ReplicaNow, Survey, SurveyedNode, gpus_to_plan
from placement.cluster.testing import made_gpu
from placement.gpu_slices import slices_of
from placement.schema import FleetConfig
from placement.slices import Inventory, Slice, SliceKind

MODELS = Path(__file__).parents[3] / "configs" / "examples" / "models"
CHAT = {
    "name": "chat",
    "source": "Qwen/Qwen3-8B",
    "metadata": str(MODELS / "Qwen--Qwen3-8B.json"),
    "max_model_len": 8192,
    "max_num_seqs": 32,
}
SMALL = {
    "name": "small",
    "source": "Qwen/Qwen3-0.6B",
    "metadata": str(MODELS / "Qwen--Qwen3-0.6B.json"),
    "max_model_len": 4096,
}
TENANTS = [{"name": "acme", "models": "all"}]


def config(*models: Mapping[str, Any], tenants: Any = None, **fleet: Any) -> Config:
    content = {"version": "v1", "fleet": {"partition": "planned"} | fleet, "models": list(models)}
    return Config.model_validate(content | {"tenants": tenants or TENANTS})


def node(name: str, *gpus: tuple[str, ...], product: str = "h100-sxm", **more: Any) -> SurveyedNode:
    return SurveyedNode(node=name, gpus=tuple(made_gpu(i, product, holds) for i, holds in enumerate(gpus)), **more)


def seated(**seats: str) -> dict[str, ReplicaNow]:
    """`chat_0="a/GPU-0/2g.20gb@0"`."""
    found = {}
    for name, key in seats.items():
        where, _, slice_id = key.partition("/")
        replica = name.replace("_", "-")
        model = replica.rpartition("-")[0]
        found[replica] = ReplicaNow(
            seat=Seat(replica=replica, model=model, node=where, slice_id=slice_id), state="ready"
        )
    return found


def places(plan: ClusterPlan) -> dict[str, str]:
    return {str(s.replica): f"{g.gpu.id}/{s.placement}" for g in plan.answer.plan.gpus for s in g.slices if s.replica}


def test_one_plan_over_all_nodes_with_gpus_of_equal_uuids() -> None:
    survey = Survey(nodes=(node("a", ()), node("b", ())))
    plan = plan_cluster(config(SMALL | {"replicas": 2, "spread": "nodes"}), survey)
    assert plan.answer.met
    assert {key.partition("/")[0] for key in places(plan).values()} == {"a", "b"}
    assert plan.answer.transition is not None
    assert plan.answer.transition.fingerprint == survey.fingerprint
    kinds = [s.kind for s in plan.answer.transition.steps]
    assert sorted(kinds) == ["check", "check", "create", "create", "start", "start"]


def test_what_runs_as_it_should_leaves_nothing_to_do() -> None:
    runs = Survey(
        nodes=(node("a", ("1g.10gb@0",)), node("b", ("1g.10gb@0",))),
        replicas=seated(small_0="a/GPU-0/1g.10gb@0", small_1="b/GPU-0/1g.10gb@0"),
    )
    plan = plan_cluster(config(SMALL | {"replicas": 2, "spread": "nodes"}), runs)
    assert not plan.answer.plan.changed
    assert plan.as_public()["changes"] is False
    assert plan.replicas.same


def test_a_cordon_counts_by_uuid_by_index_and_as_a_node_says_itself() -> None:
    both = (node("a", ()), node("b", ()))
    one = config(SMALL | {"replicas": 1})
    closed = (node("a", (), cordoned=("GPU-0",)), node("b", ()))
    assert places(plan_cluster(one, Survey(nodes=closed)))["small-0"].startswith("b/")
    everywhere = plan_cluster(config(SMALL | {"replicas": 1}, cordon=[0]), Survey(nodes=both))
    assert [u.demand for u in everywhere.answer.plan.unmet] == ["small"]
    with pytest.raises(ConfigError, match="there is no GPU GPU-7"):
        plan_cluster(config(SMALL | {"replicas": 1}, cordon=["GPU-7"]), Survey(nodes=both))


def test_a_node_of_another_version_stays_as_it_is_and_so_do_models_that_run_there() -> None:
    survey = Survey(
        nodes=(node("a", ("1g.10gb@0", "1g.10gb@1", "3g.40gb@4"), frozen=True), node("b", ())),
        replicas=seated(small_0="a/GPU-0/1g.10gb@0"),
    )
    plan = plan_cluster(config(SMALL | {"replicas": 2}, CHAT | {"replicas": 1}), survey)
    assert plan.apart == ("small",)
    assert {key.partition("/")[0] for key in places(plan).values()} == {"b"}
    there = next(g for g in plan.answer.plan.gpus if g.gpu.node == "a")
    assert not there.changes
    assert [s.reserved for s in there.slices] == ["small-0, not planned", None, None]


def test_prices_decide_between_nodes() -> None:
    survey = Survey(nodes=(node("a", ()), node("b", (), product="a100-80gb")))
    for cheap, where in (("h100-sxm", "a/"), ("a100-80gb", "b/")):
        prices = {"h100-sxm": 5, "a100-80gb": 5} | {cheap: 1}
        found = places(plan_cluster(config(SMALL | {"replicas": 1}, prices=prices), survey))
        assert found["small-0"].startswith(where)


def test_slices_for_other_work_are_planned_once() -> None:
    rule = {"1g.10gb": 1, "note": "fine-tuning"}
    bare = plan_cluster(config(SMALL | {"replicas": 1}, reserve=rule), Survey(nodes=(node("a", ()),)))
    assert [s.reserved for g in bare.answer.plan.gpus for s in g.slices if s.reserved] == ["fine-tuning"]
    kept = Survey(
        nodes=(node("a", ("1g.10gb@0", "1g.10gb@1")),),
        replicas=seated(small_0="a/GPU-0/1g.10gb@0"),
        reserved={"a/GPU-0/1g.10gb@1": "fine-tuning"},
    )
    again = plan_cluster(config(SMALL | {"replicas": 1}, reserve=rule), kept)
    assert not again.answer.plan.changed
    assert [(r.slice_id, r.note) for r in again.reserved] == [("a/GPU-0/1g.10gb@1", "fine-tuning")]


def test_without_leave_to_cut_it_proposes_to() -> None:
    survey = Survey(nodes=(node("a", ("1g.10gb@0",)), node("b", ())), replicas=seated(small_0="a/GPU-0/1g.10gb@0"))
    plan = plan_cluster(config(SMALL | {"replicas": 2}, partition="layouts"), survey)
    assert [u.demand for u in plan.answer.plan.unmet] == ["small"]
    assert plan.answer.proposal is not None
    assert plan_cluster(
        config(SMALL | {"replicas": 2}, partition="layouts", max_layout_changes=0), survey
    ).answer.plan.unmet


def test_demand_decides_the_number_and_current_numbers_count_without() -> None:
    demand = {"requests_per_second": 4, "prompt_tokens": 800, "output_tokens": 200}
    survey = Survey(nodes=(node("a", ()), node("b", ())), numbers={"small": 3, "chat": 9})
    asked = CHAT | {"demand": demand, "slo": {"ttft": "1s", "itl": "40ms"}}
    plan = plan_cluster(config(asked, SMALL | {"replicas": {"min": 1, "max": 5}}), survey)
    assert plan.answer.demands["chat"].rate == 4
    assert plan.answer.demands["small"].replicas == 3


def test_tenants_have_replicas_of_their_own_only_where_the_head_gives_them_some() -> None:
    tenants = [{"name": "acme", "models": "all", "isolation": "dedicated"}, {"name": "else", "models": "all"}]
    models = (SMALL | {"replicas": {"min": 1, "max": 2}}, CHAT | {"replicas": 1})
    plan = plan_cluster(config(*models, tenants=tenants), Survey(nodes=(node("a", ()), node("b", ()))))
    assert set(plan.answer.demands) == {"small", "small@acme", "chat"}


def test_models_on_cores_are_left_to_the_head() -> None:
    survey = Survey(nodes=(node("a", ()),), replicas=seated(small_0="b/cpu-0"))
    plan = plan_cluster(config(SMALL | {"replicas": 1}, CHAT | {"replicas": 1}), survey)
    assert plan.apart == ("small",)
    assert set(plan.answer.demands) == {"chat"}


def test_what_is_left_to_the_head_is_shown_where_it_stays(capsys: pytest.CaptureFixture[str]) -> None:
    seats = seated(small_0="b/cpu-0", small_1="a/GPU-0/1g.10gb@0", chat_0="c/GPU-0/2g.20gb@0")
    seats["small-1"] = seats["small-1"].model_copy(update={"state": "starting"})
    old = node("c", ("2g.20gb@0",), frozen=True)
    survey = Survey(nodes=(node("a", ("1g.10gb@0",)), old), replicas=seats)
    plan = plan_cluster(config(SMALL | {"replicas": 2}, CHAT | {"replicas": 1}), survey)
    kept: Any = plan.as_public()["kept"]
    assert [(k["replica"], k["slice"], k["state"], k["why"]) for k in kept] == [
        ("chat-0", "c/GPU-0/2g.20gb@0", "ready", "node of another version"),
        ("small-0", "b/cpu-0", "ready", "slice of no GPU"),
        ("small-1", "a/GPU-0/1g.10gb@0", "starting", ""),
    ]
    cluster_plan.say_what_it_is(plan)
    shown = " ".join(capsys.readouterr().err.split())
    assert (
        "chat is kept as it is, and not planned, since chat-0 is on a node of another version: chat-0 on c/GPU-0/2g.20gb@0"
        in shown
    )
    assert (
        "small is kept as it is, and not planned, since small-0 is on a slice of no GPU: small-0 on b/cpu-0, "
        "small-1 on a/GPU-0/1g.10gb@0 (starting)" in shown
    )


def test_a_cluster_without_gpus_is_not_planned() -> None:
    with pytest.raises(ConfigError, match="no node of this cluster has one"):
        plan_cluster(config(SMALL), Survey(nodes=(SurveyedNode(node="a"),)))


def test_a_pin_is_a_nodes_slice() -> None:
    survey = Survey(nodes=(node("a", ("1g.10gb@0",)), node("b", ())))
    pinned = SMALL | {"replicas": 1, "slices": ["a/GPU-0/1g.10gb@0"]}
    plan = plan_cluster(config(pinned, CHAT | {"replicas": 1}), survey)
    assert set(plan.answer.demands) == {"chat"}
    gone = SMALL | {"replicas": 1, "slices": ["b/GPU-0/1g.10gb@0"]}
    with pytest.raises(ConfigError, match="no layout makes that slice"):
        plan_cluster(config(gone), survey)


def test_it_says_whether_the_head_works_by_this_configuration() -> None:
    mine = config(SMALL | {"replicas": 1})
    nodes = (node("a", ()),)
    assert plan_cluster(mine, Survey(nodes=nodes, config=config_text(mine))).worked_by
    other = config(SMALL | {"replicas": 2})
    assert not plan_cluster(mine, Survey(nodes=nodes, config=config_text(other))).worked_by
    assert not plan_cluster(mine, Survey(nodes=nodes, config="")).worked_by


def test_layouts_are_of_every_nodes_gpus() -> None:
    survey = Survey(nodes=(node("a", ("1g.10gb@0",)), node("b", ())))
    plan = plan_cluster(config(SMALL | {"replicas": 1}, layouts=[{"gpus": [0], "layout": ["1g.10gb"]}]), survey)
    assert [[str(a) for a in p.actions] for p in plan.layouts] == [[], ["create 1g.10gb@6"]]
    assert [p.gpu.label for p in plan.layouts] == ["a GPU 0 (H100-80GB-SXM)", "b GPU 0 (H100-80GB-SXM)"]
    assert plan.as_public()["changes"] is True


def test_the_fingerprint_is_of_gpus_and_seats_and_of_nothing_else() -> None:
    seats = seated(small_0="a/GPU-0/1g.10gb@0")
    first = Survey(nodes=(node("a", ("1g.10gb@0",)),), replicas=seats)
    same = Survey(nodes=first.nodes, replicas=seats, numbers={"small": 2}, running={"small": 3}, config="{}")
    assert first.fingerprint == same.fingerprint
    others = [
        Survey(nodes=(node("a", ("1g.10gb@1",)),), replicas=seats),
        Survey(nodes=(node("b", ("1g.10gb@0",)),), replicas=seats),
        Survey(nodes=first.nodes),
        Survey(nodes=first.nodes, replicas=seats, reserved={"a/GPU-0/1g.10gb@0": "x"}),
        Survey(nodes=(node("a", ("1g.10gb@0",), frozen=True),), replicas=seats),
    ]
    assert first.fingerprint not in {other.fingerprint for other in others}
    assert Survey.model_validate_json(first.model_dump_json()) == first


def test_what_a_node_lets_a_plan_count_on() -> None:
    gpus = (made_gpu(0, "h100-sxm", ("1g.10gb@0",)), made_gpu(1, mig=False))
    there = Inventory(tuple(s for gpu in gpus for s in slices_of(gpu)), gpus=gpus)
    assert gpus_to_plan(FleetConfig(), there) == NodeGpus(gpus=gpus)
    closed = FleetConfig.model_validate({"cordon": [1]})
    assert gpus_to_plan(closed, there).cordoned == ("GPU-1",)
    shared = FleetConfig.model_validate({"sharing": [{"gpus": [1], "kind": "mps", "slices": 2}]})
    assert [g.index for g in gpus_to_plan(shared, there).gpus] == [0]
    listed = FleetConfig.model_validate({"slices": [{"kind": "mig", "uuid": "MIG-1", "memory": "9GiB"}]})
    assert gpus_to_plan(listed, there) == NodeGpus()
    cores = Inventory((Slice("cpu-0", SliceKind.CPU, None, 2**30, cores=(0,)),), gpus=gpus)
    assert gpus_to_plan(FleetConfig(), cores) == NodeGpus()
    assert json.loads(NodeGpus(gpus=gpus).model_dump_json())["gpus"][0]["uuid"] == "GPU-0"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--ray",), "Give it as HOST:PORT"),
        (("--ray", "127.0.0.1:1", "--layouts-only"), "with what runs on them"),
        (("--ray", "127.0.0.1:1", "--simulate", "h100-sxm:2"), "sliceway node join"),
        (("--ray", "127.0.0.1:1", "--token-file", "nowhere"), "there is no token here"),
    ],
)
def test_the_command_says_what_a_cluster_needs(tmp_path: Path, words: tuple[str, ...], told: str) -> None:
    path = tmp_path / "sliceway.yaml"
    path.write_text(config_text(config(SMALL)), encoding="utf-8")
    with pytest.raises(SlicewayError) as refused:
        CliRunner().invoke(app, with_ray_address(["plan", str(path), *words]), catch_exceptions=False)
    assert told in str(refused.value)


def test_the_plan_is_shown_with_its_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sliceway.yaml"
    path.write_text(config_text(config(SMALL | {"replicas": 2, "spread": "nodes"})), encoding="utf-8")
    monkeypatch.setattr(cluster_plan, "survey_of", lambda *_: Survey(nodes=(node("a", ()), node("b", ()))))
    text = CliRunner().invoke(app, ["plan", str(path), "--ray", "h:1"], catch_exceptions=False).output
    assert "a GPU 0" in text
    assert "b GPU 0" in text
    assert "works by another configuration" in text
    found = json.loads(CliRunner().invoke(app, ["plan", str(path), "--ray", "h:1", "--json"]).stdout)
    assert found["changes"] is True
    assert {g["gpu"] for g in found["fleet"]["gpus"]} == {"a/GPU-0", "b/GPU-0"}
    why = CliRunner().invoke(app, ["plan", str(path), "--ray", "h:1", "--why", "small"]).output
    assert "add small-0" in why
