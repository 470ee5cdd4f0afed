"""From a configuration and nodes to what is exported: the plan, the engines' limits, the gateway's configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.config import Config
from gateway.export.cluster import nodes_of
from gateway.export.model import Exported, GpuContent, SliceType
from model_registry.catalogue import load_catalogue
from model_registry.errors import ConfigError, SlicewayError, UnknownProduct
from placement.engines import INSTALLED_VERSIONS
from placement.errors import PlanError
from placement.launch import build_launch
from placement.registry import ModelRegistry
from placement.schema import EngineConfig
from placement.slices import Gpu, Slice, SliceKind

SMALL: dict[str, Any] = {
    "name": "small",
    "source": "Qwen/Qwen3-0.6B",
    "metadata": str(Path(__file__).parents[4] / "configs/examples/models/Qwen--Qwen3-0.6B.json"),
    "max_model_len": 2048,
}
Export = Callable[..., Exported]
ConfigOf = Callable[..., Config]


def small(**changes: Any) -> dict[str, Any]:
    return SMALL | changes


def test_nodes_are_parsed_with_their_numbers(config_of: ConfigOf) -> None:
    shapes = nodes_of(config_of(), ["2x h100-sxm:8", "a30"])
    assert [(s.name, s.product.name, s.gpus) for s in shapes] == [
        ("node-0", "H100-80GB-SXM", 8),
        ("node-1", "H100-80GB-SXM", 8),
        ("node-2", "A30-24GB", 1),
    ]


def test_a_simulated_fleet_names_a_node_for_each_product(config_of: ConfigOf) -> None:
    config = config_of(fleet={"discover": {"simulate": {"a30": 2, "h200": 1}}})
    assert [(s.product.name, s.gpus) for s in nodes_of(config, ())] == [("A30-24GB", 2), ("H200-141GB", 1)]


@pytest.mark.parametrize(
    ("fleet", "nodes", "told"),
    [
        ({"discover": "cpu"}, (), "cores of one machine"),
        ({"discover": "auto"}, (), "does not say which GPU nodes"),
        ({}, ("h100-sxm:0",), "none that is planned for"),
        ({}, ("h100-sxm:17",), "none that is planned for"),
        ({}, ("0x h100-sxm:1",), "make no plan"),
        ({}, ("9999x h100-sxm:1",), "make no plan"),
        ({}, (":8",), "describes no node"),
    ],
)
def test_nodes_that_make_no_sense_are_told(
    config_of: ConfigOf, fleet: dict[str, Any], nodes: tuple[str, ...], told: str
) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        nodes_of(config_of(fleet=fleet), nodes)
    assert caught.value.remedy


@pytest.mark.parametrize("product", ["h1000", "plain"])
def test_a_product_that_the_catalogue_does_not_have_is_told(config_of: ConfigOf, product: str) -> None:
    with pytest.raises(UnknownProduct):
        nodes_of(config_of(), [f"{product}:1"])


def test_a_product_that_the_driver_has_no_name_for_is_refused(
    config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = load_catalogue()
    bare = type(catalogue)(tuple(_without_names(p) for p in catalogue.products))
    monkeypatch.setattr("gateway.export.cluster.load_catalogue", lambda: bare)
    with pytest.raises(ConfigError, match="what the device plugin calls"):
        nodes_of(config_of(), ["h100-sxm:1"])


def _without_names(product: Any) -> Any:
    from dataclasses import replace

    return replace(product, nvml_names=())


def test_an_engine_gets_exactly_what_a_local_replica_would(export: Export, config_of: ConfigOf) -> None:
    [engine] = export().engines
    config = config_of()
    registry = ModelRegistry(EngineConfig(), vllm_version=INSTALLED_VERSIONS["cuda"])
    sized = registry.describe(config.models[0])
    product = load_catalogue().product("h100-sxm")
    profile = product.profile(engine.slice_type.profile)
    assert profile.memory_bytes is not None
    target = Slice("any", SliceKind.MIG, profile.name, profile.memory_bytes, "MIG-1", Gpu("GPU-1", 0, product.name, 80))
    python = Path("python3")
    local = build_launch(
        "small-0",
        sized,
        target,
        registry.fit(sized, target),
        EngineConfig(),
        vllm_python=python,
        own_python=python,
        cache=Path("/cache"),
    )
    limits = ("--max-model-len", "--max-num-seqs", "--max-num-batched-tokens", "--gpu-memory-utilization")
    assert {f: _value(engine.argv, f) for f in limits} == {f: _value(local.argv, f) for f in limits}
    differing = {"--uds", "{uds}", "--host", "0.0.0.0", "--port", "8000", "{drain_seconds}", "30"}
    assert set(engine.argv) ^ set(local.argv) <= differing
    assert "CUDA_VISIBLE_DEVICES" not in engine.environment


def _value(argv: tuple[str, ...], flag: str) -> str:
    return argv[argv.index(flag) + 1]


def test_nodes_that_hold_the_same_share_a_layout(export: Export) -> None:
    found = export(
        nodes=("3x h100-sxm:1",),
        models=[small(replicas=2, spread="nodes", profile="3g.40gb")],
        fleet={"partition": "planned"},
    )
    used = [n for n in found.nodes if n.slices]
    assert [(n.count, n.gpus) for n in used] == [(2, (GpuContent(True, (("3g.40gb", 1),)),))]
    assert sum(n.count for n in found.nodes) == 3
    assert len({n.name for n in found.nodes}) == len(found.nodes)
    assert all(e.spread for e in found.engines)


def test_layouts_of_the_configuration_hold_on_every_node(export: Export) -> None:
    found = export(
        nodes=("2x h100-sxm:1",),
        models=[small(replicas=2, spread="nodes")],
        fleet={"layouts": [{"gpus": "all", "layout": {"1g.10gb": 7}}]},
    )
    assert [(n.count, dict(n.slices)) for n in found.nodes] == [(2, {SliceType("H100-80GB-SXM", "1g.10gb"): 7})]


def test_a_plan_that_does_not_fit_names_who_is_short_and_what_would_help(export: Export) -> None:
    with pytest.raises(PlanError, match="'small'") as caught:
        export(models=[small(replicas=9)])
    assert "the plan does not fit" in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"models": [small(slices=["GPU-1/1g.10gb@0"])]}, "pinned to slices of one machine"),
        ({"fleet": {"sharing": [{"gpus": "all", "kind": "mps", "slices": 2}]}}, "device plugin's own configuration"),
        ({"models": [small(engine_args=["--api-key=hunter2"])]}, "write a secret into a manifest"),
        (
            {"models": [small()], "gateway": {"admin_key": "file:/a/key", "keys_secret": "file:/b/key"}},
            "two secrets lie in files called 'key'",
        ),
    ],
)
def test_what_a_cluster_cannot_be_told_is_refused(export: Export, sections: dict[str, Any], told: str) -> None:
    with pytest.raises(SlicewayError, match=told) as caught:
        export(**sections)
    assert caught.value.remedy
    assert "hunter2" not in str(caught.value)


def test_secrets_are_named_and_never_carried(export: Export) -> None:
    found = export(
        engine={"environment": {"HF_TOKEN": "hf_planted", "MY_API_KEY": "planted", "VLLM_LOGGING_LEVEL": "INFO"}},
        gateway={"keys_secret": "${ENV:PEPPER}", "admin_listen": "127.0.0.1:9000", "admin_key": "file:/etc/mine/admin"},
    )
    assert "planted" not in repr(found)
    assert found.engines[0].secret_environment == ("HF_TOKEN", "MY_API_KEY")
    assert found.engines[0].environment["VLLM_LOGGING_LEVEL"] == "INFO"
    assert found.gateway.secret_variables == ("PEPPER",)
    assert found.gateway.secret_files == ("admin",)
    assert found.gateway.config["gateway"]["admin_key"] == "file:/run/secrets/sliceway/admin"  # type: ignore[index]


def test_a_dedicated_tenant_alone_reaches_its_replicas_under_the_models_name(export: Export) -> None:
    found = export(
        aliases={"gpt": "small"},
        tenants=[
            {"name": "acme", "isolation": "dedicated", "aliases": {"mine": "small"}},
            {"name": "globex"},
        ],
    )
    config = Config.model_validate(found.gateway.config)
    acme, globex = config.tenants
    assert {m.name for m in config.models} == {"small", "small--acme"}
    assert acme.models == ("small--acme",)
    assert acme.aliases == {"small": "small--acme", "mine": "small--acme", "gpt": "small--acme"}
    assert globex.models == ("small",)
    assert config.aliases == {"gpt": "small"}
    assert {e.route for e in found.engines} == {"small", "small--acme"}


def test_a_model_that_sleeps_is_left_out_with_a_note(export: Export) -> None:
    found = export(
        models=[small(), small(name="sleeper", replicas={"min": 0, "max": 1})],
        aliases={"nap": "sleeper"},
        tenants=[{"name": "acme", "models": ["small", "sleeper"]}],
    )
    config = Config.model_validate(found.gateway.config)
    assert [m.name for m in config.models] == ["small"]
    assert config.tenants[0].models == ("small",)
    assert config.aliases == {}
    assert any("sleeper has no replica" in note for note in found.notes)
    assert {m["name"] for m in found.cluster.config["models"]} == {"small", "sleeper"}  # type: ignore[attr-defined]


def test_what_engines_belong_to_is_carried_into_the_cluster_alone(export: Export) -> None:
    found = export(cluster={"actors": "node"})
    assert found.cluster.config["cluster"] == {"actors": "node"}
    assert "cluster" not in found.gateway.config
    assert "cluster" not in export().cluster.config


def test_models_elsewhere_stay_where_they_are(export: Export) -> None:
    found = export(models=[small(), {"name": "far", "endpoints": ["http://far:80"]}])
    assert {"name": "far", "endpoints": ["http://far:80"]} in found.gateway.config["models"]  # type: ignore[operator]


def test_a_local_model_and_its_template_are_named_as_they_lie_in_the_pod(export: Export, tmp_path: Path) -> None:
    directory = tmp_path / "weights"
    directory.mkdir()
    (directory / "config.json").write_text(Path(SMALL["metadata"]).read_text(encoding="utf-8"), encoding="utf-8")
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}", encoding="utf-8")
    model = {"name": "own", "source": str(directory), "max_model_len": 2048, "chat_template": str(template)}
    found = export(models=[model])
    [engine] = found.engines
    assert _value(engine.argv, "--model") == "/models/weights"
    assert _value(engine.argv, "--chat-template") == "/etc/sliceway-files/chat.jinja"
    assert engine.files == {"chat.jinja": "{{ messages }}"}
    assert found.directories == {"weights": str(directory)}
    [listed] = found.cluster.config["models"]  # type: ignore[misc]
    assert (listed["source"], listed["chat_template"]) == ("/models/weights", "/etc/sliceway-files/chat.jinja")
