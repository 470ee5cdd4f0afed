"""What the manifests say: devices, probes, deadlines, secrets. That they are valid at all is a property (test_manifests_validate)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.config import Config
from gateway.export.kubernetes import Flavour, Manifest, Settings, documents, steps, yaml_stream
from gateway.export.kubernetes.devices import resource_of
from gateway.export.kubernetes.mig import mig_parted
from gateway.export.kubernetes.text import yaml_text
from gateway.export.model import Exported, SliceType
from model_registry.catalogue import load_catalogue
from model_registry.errors import ConfigError
from placement.exports import import_mig_parted

Export = Callable[..., Exported]
SETTINGS = Settings("serving", "registry/gateway:1", "registry/engine:1")


def written(export: Exported, flavour: Flavour = "deployments", settings: Settings = SETTINGS) -> list[Manifest]:
    return [document for of_file in documents(export, settings, flavour).values() for document in of_file]


def one(documents: Iterable[Manifest], kind: str, name: str | None = None) -> Manifest:
    [found] = [d for d in documents if d["kind"] == kind and name in (None, d["metadata"]["name"])]
    return found


def pod(document: Manifest) -> Manifest:
    spec: Manifest = document["spec"]["template"]["spec"]
    return spec


@pytest.mark.parametrize(
    ("profile", "resource"),
    [
        ("3g.40gb", "nvidia.com/mig-3g.40gb"),
        ("1g.10gb+me", "nvidia.com/mig-1g.10gb.me"),
        ("1g.24gb+gfx", "nvidia.com/mig-1g.24gb.gfx"),
        ("1g.24gb+me.all", "nvidia.com/mig-1g.24gb.me.all"),
        ("1g.24gb-me", "nvidia.com/mig-1g.24gb-me"),
        ("gpu", "nvidia.com/gpu"),
    ],
)
def test_slices_are_called_as_the_device_plugin_calls_them(profile: str, resource: str) -> None:
    assert resource_of(SliceType("any", profile)) == resource


def test_every_profile_of_the_catalogue_has_a_resource_name_that_kubernetes_takes() -> None:
    for product in load_catalogue().products:
        for profile in product.profiles:
            name = resource_of(SliceType(product.name, profile.name)).removeprefix("nvidia.com/")
            assert re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", name)


def test_a_deployment_asks_for_its_slice_on_nodes_of_its_product(export: Export) -> None:
    engine = pod(one(written(export()), "Deployment", "small-0"))
    [container] = engine["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/mig-1g.10gb": 1}
    [term] = engine["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    [label] = term["matchExpressions"]
    assert label["key"] == "nvidia.com/gpu.product"
    assert "NVIDIA-H100-80GB-HBM3" in label["values"]


def test_a_claim_selects_profile_and_product(export: Export) -> None:
    found = written(export(), "dra")
    template = one(found, "ResourceClaimTemplate")
    [request] = template["spec"]["spec"]["devices"]["requests"]
    assert request["exactly"]["deviceClassName"] == "mig.nvidia.com"
    [selector] = request["exactly"]["selectors"]
    assert 'device.attributes["gpu.nvidia.com"].profile == "1g.10gb"' in selector["cel"]["expression"]
    engine = pod(one(found, "Deployment", "small-0"))
    assert engine["resourceClaims"] == [{"name": "slice", "resourceClaimTemplateName": template["metadata"]["name"]}]
    assert engine["containers"][0]["resources"]["claims"] == [{"name": "slice"}]
    assert "limits" not in engine["containers"][0]["resources"]


def test_a_whole_card_is_claimed_from_the_class_of_cards(export: Export) -> None:
    model = {**small(), "profiles": ["gpu"]}
    [request] = one(written(export(models=[model]), "dra"), "ResourceClaimTemplate")["spec"]["spec"]["devices"][
        "requests"
    ]
    assert request["exactly"]["deviceClassName"] == "gpu.nvidia.com"
    assert "profile" not in request["exactly"]["selectors"][0]["cel"]["expression"]


def test_deadlines_are_those_of_the_configuration(export: Export) -> None:
    found = export(
        engine={"drain_timeout_seconds": 70, "stop_timeout_seconds": 12.5, "start_timeout_seconds": 301},
        gateway={"drain_timeout_seconds": 90},
    )
    engine = pod(one(written(found), "Deployment", "small-0"))
    container = engine["containers"][0]
    assert engine["terminationGracePeriodSeconds"] == 83
    assert container["args"][container["args"].index("--shutdown-timeout") + 1] == "70"
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 301
    front = pod(one(written(found), "Deployment", "sliceway-gateway"))
    wait = front["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert front["terminationGracePeriodSeconds"] > 90 + wait
    assert front["containers"][0]["readinessProbe"]["httpGet"]["path"] == "/readyz"


def test_arguments_are_taken_to_the_letter(export: Export) -> None:
    model = {**small(), "engine_args": ["--override", "$(HOME) $x"]}
    args = pod(one(written(export(models=[model])), "Deployment", "small-0"))["containers"][0]["args"]
    assert args[-1] == "$$(HOME) $x"


def test_every_endpoint_of_the_gateway_is_a_service_and_every_service_has_its_pod(export: Export) -> None:
    found = written(export(models=[{**small(), "replicas": 3}]))
    config = Config.model_validate(yaml.safe_load(one(found, "ConfigMap", "sliceway-config")["data"]["sliceway.yaml"]))
    services = {d["metadata"]["name"]: d["spec"] for d in found if d["kind"] == "Service"}
    assert {f"http://{name}:8000" for name in services if name != "sliceway-gateway"} == set(config.models[0].endpoints)
    pods = [d["spec"]["template"]["metadata"]["labels"] for d in found if d["kind"] == "Deployment"]
    for spec in services.values():
        assert sum(spec["selector"].items() <= labels.items() for labels in pods) == 1


def test_a_budget_guards_a_model_with_several_replicas_only(export: Export) -> None:
    found = written(export(models=[{**small(), "replicas": 2}, {**small(), "name": "alone"}]))
    budgets = {d["metadata"]["name"] for d in found if d["kind"] == "PodDisruptionBudget"}
    assert budgets == {"small", "sliceway-gateway"}


def test_replicas_that_are_spread_over_nodes_repel_each_other(export: Export) -> None:
    model = {**small(), "replicas": 2, "spread": "nodes"}
    engine = one(written(export(nodes=["2x h100-sxm:1"], models=[model])), "Deployment", "small-0")
    [term] = pod(engine)["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    labels = engine["spec"]["template"]["metadata"]["labels"]
    assert term["labelSelector"]["matchLabels"].items() <= labels.items()
    assert term["topologyKey"] == "kubernetes.io/hostname"
    assert "nodeAffinity" in pod(engine)["affinity"]


def test_one_gateway_does_with_a_volume_of_one_node_and_two_share_one(export: Export) -> None:
    for gateways, mode, strategy in ((1, "ReadWriteOnce", "Recreate"), (2, "ReadWriteMany", "RollingUpdate")):
        found = written(export(), settings=Settings("a", "g", "e", gateways=gateways, storage_class="fast"))
        state = one(found, "PersistentVolumeClaim", "sliceway-state")["spec"]
        assert state["accessModes"] == [mode]
        assert state["storageClassName"] == "fast"
        assert one(found, "Deployment", "sliceway-gateway")["spec"]["strategy"]["type"] == strategy


def test_another_configuration_is_another_gateway_template(export: Export) -> None:
    def annotation(**sections: Any) -> str:
        deployment = one(written(export(**sections)), "Deployment", "sliceway-gateway")
        text: str = deployment["spec"]["template"]["metadata"]["annotations"]["sliceway/config"]
        return text

    assert annotation() == annotation()
    assert annotation() != annotation(aliases={"gpt": "small"})


@pytest.mark.parametrize("flavour", ["deployments", "dra", "kuberay"])
def test_secrets_are_references_in_every_flavour(export: Export, flavour: Flavour) -> None:
    found = export(
        engine={"environment": {"MY_API_KEY": "planted-1", "HF_TOKEN": "planted-2"}},
        gateway={"keys_secret": "${ENV:PEPPER}"},
    )
    text = yaml_stream(written(found, flavour), [*found.notes, *steps(found, SETTINGS, flavour)])
    assert "planted" not in text
    for name, secret in (("MY_API_KEY", "sliceway-env"), ("PEPPER", "sliceway-env"), ("HF_TOKEN", "sliceway-hub")):
        assert {"name": secret, "key": name}.items() <= _reference(written(found, flavour), name).items()
    assert any("MY_API_KEY" in step and "PEPPER" in step for step in steps(found, SETTINGS, flavour))


def _reference(found: Iterable[Manifest], variable: str) -> dict[str, Any]:
    text = json.dumps(list(found))
    match = re.search(rf'{{"name": "{variable}", "valueFrom": {{"secretKeyRef": ({{[^}}]*}})', text)
    assert match, f"{variable} comes from no secret"
    reference: dict[str, Any] = json.loads(match[1])
    return reference


def test_tls_comes_from_a_secret_and_probes_speak_it(export: Export, tmp_path: Path) -> None:
    files = {"certificate": str(tmp_path / "a.pem"), "key": str(tmp_path / "b.pem")}
    found = export(gateway={"tls": files})
    front = pod(one(written(found), "Deployment", "sliceway-gateway"))
    assert front["containers"][0]["readinessProbe"]["httpGet"]["scheme"] == "HTTPS"
    assert {"secretName": "sliceway-tls", "defaultMode": 0o440} in [v.get("secret") for v in front["volumes"]]
    assert one(written(found), "Service", "sliceway-gateway")["spec"]["ports"][0]["port"] == 443
    with pytest.raises(ConfigError, match="no certificate"):
        written(found, "kuberay")


def test_no_pod_asks_for_a_privilege(export: Export) -> None:
    for deployment in (d for d in written(export()) if d["kind"] == "Deployment"):
        spec = pod(deployment)
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        for container in spec["containers"]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_engines_take_connections_from_gateways_only(export: Export) -> None:
    found = written(export())
    policy = one(found, "NetworkPolicy", "sliceway-engines")["spec"]
    [rule] = policy["ingress"]
    [peer] = rule["from"]
    gateway = one(found, "Deployment", "sliceway-gateway")["spec"]["template"]["metadata"]["labels"]
    engine = one(found, "Deployment", "small-0")["spec"]["template"]["metadata"]["labels"]
    assert peer["podSelector"]["matchLabels"].items() <= gateway.items()
    assert policy["podSelector"]["matchLabels"].items() <= engine.items()
    assert not policy["podSelector"]["matchLabels"].items() <= gateway.items()


def test_mig_parted_s_own_rules_read_what_is_written(export: Export, tmp_path: Path) -> None:
    found = export(
        models=[{**small(), "replicas": 2}, {**small(), "name": "whole", "profiles": ["gpu"]}], nodes=["h100-sxm:2"]
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml_text(mig_parted(found)), encoding="utf-8")
    [layout] = found.nodes
    rules = import_mig_parted(path, layout.name)
    assert [(r.mig, r.layout) for r in rules] == [(True, {"1g.10gb": 2}), (False, {})]
    assert import_mig_parted(path, "all-disabled")[0].mig is False


def test_a_ray_service_has_a_worker_for_each_node_with_all_of_its_slices(export: Export) -> None:
    model = {**small(), "replicas": 8}
    found = export(models=[model], nodes=["2x h100-sxm:1"])
    service = one(written(found, "kuberay"), "RayService")["spec"]
    groups = service["rayClusterConfig"]["workerGroupSpecs"]
    slices = sum(
        g["replicas"] * n
        for g in groups
        for n in g["template"]["spec"]["containers"][0]["resources"]["limits"].values()
    )
    assert slices == 8
    [application] = yaml.safe_load(service["serveConfigV2"])["applications"]
    module, _, attribute = application["import_path"].partition(":")
    assert callable(getattr(__import__(module, fromlist=[attribute]), attribute))
    head = service["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert "sliceway up /etc/sliceway/sliceway.yaml --ray" in head["args"][0]
    assert all("sliceway node join" in g["template"]["spec"]["containers"][0]["args"][0] for g in groups)


def test_yaml_reads_back_as_what_it_was_also_where_words_look_like_something_else() -> None:
    awkward = [
        "on",
        "No",
        "~",
        "1e3",
        "0o17",
        "017",
        "12:30:45",
        "2026-01-01",
        ".5",
        "-1",
        "=",
        "a: b",
        "",
        "x\ny\n",
        "- a",
    ]
    content = {"list": awkward, "text": "one\ntwo\n", "nested": {"n": 1, "b": True, "none": None}}
    assert yaml.safe_load(yaml_text(content)) == content


def small() -> dict[str, Any]:
    metadata = Path(__file__).parents[4] / "configs/examples/models/Qwen--Qwen3-0.6B.json"
    return {"name": "small", "source": "Qwen/Qwen3-0.6B", "metadata": str(metadata), "max_model_len": 2048}
