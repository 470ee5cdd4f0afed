from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from gateway.cli import app
from model_registry.errors import ConfigError, UnknownProduct

EXAMPLES = Path(__file__).parents[4] / "configs" / "examples"
WHOLE_CARD = str(EXAMPLES / "whole-card.yaml")


def run(*arguments: str) -> str:
    """Standard output. Raises what the command raises."""
    result = CliRunner().invoke(app, ["export", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_k8s_is_one_stream_with_what_is_left_to_do_as_comments() -> None:
    text = run("k8s", WHOLE_CARD, "--namespace", "serving", "--engine-image", "mine/engine:2")
    found = list(yaml.safe_load_all(text))
    assert {d["kind"] for d in found} >= {"Namespace", "Deployment", "Service", "NetworkPolicy", "PodDisruptionBudget"}
    assert {d["metadata"].get("namespace") for d in found} == {None, "serving", "gpu-operator"}
    assert "# to do: 1 node with 1 x H100-80GB-SXM: kubectl label node NODE nvidia.com/mig.config=" in text
    assert "image: mine/engine:2" in text


def test_k8s_into_a_directory_keeps_files_apart_and_replaces_its_own(tmp_path: Path) -> None:
    out = tmp_path / "manifests"
    for _ in range(2):
        told = run("k8s", WHOLE_CARD, "-o", str(out))
    assert sorted(p.name for p in out.iterdir())[0] == "00-namespace.yaml"
    assert f"kubectl apply -f {out}" in told
    with pytest.raises(ConfigError, match="does not write: 30-engines"):
        run("k8s", WHOLE_CARD, "-o", str(out), "--flavour", "kuberay")


def test_k8s_as_data() -> None:
    found = json.loads(run("k8s", WHOLE_CARD, "--flavour", "dra", "--json"))
    assert found["flavour"] == "dra"
    assert "ResourceClaimTemplate" in {m["kind"] for m in found["manifests"]}
    assert found["todo"]


@pytest.mark.parametrize(
    ("option", "value", "where"),
    [
        ("--flavour", "helm", "--flavour"),
        ("--namespace", "Prod", "--namespace"),
        ("--operator-namespace", "a_b", "--operator-namespace"),
        ("--node", ":", "--node"),
        ("--node", "h999:8", "--node"),
        ("--gateway-image", "", "--gateway-image"),
        ("--engine-image", "my engine", "--engine-image"),
        ("--storage-class", "Fast", "--storage-class"),
    ],
)
def test_wrong_options_are_told_with_what_to_do(option: str, value: str, where: str) -> None:
    with pytest.raises((ConfigError, UnknownProduct)) as caught:
        run("k8s", WHOLE_CARD, option, value)
    assert (caught.value.where, bool(caught.value.remedy)) == (where, True)


def test_a_fleet_of_cores_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="cores of one machine"):
        run("k8s", str(EXAMPLES.parent / "demo.yaml"))


def test_ansible_writes_a_playbook_and_says_how_to_run_it(tmp_path: Path) -> None:
    told = run("ansible", str(EXAMPLES.parent / "demo.yaml"), "-o", str(tmp_path / "play"), "--host", "gpu1")
    assert f"ansible-playbook -i {tmp_path}/play/inventory.yml {tmp_path}/play/site.yml" in told.replace("\n", "")
    assert (tmp_path / "play" / "roles" / "sliceway" / "tasks" / "main.yml").exists()


@pytest.mark.parametrize("arguments", [("mig-parted",), ("layouts", "mig-parted"), ("--format", "mig-parted")])
def test_what_is_no_kind_of_fleet_means_this_machines_layouts(arguments: tuple[str, ...], tmp_path: Path) -> None:
    config = tmp_path / "sliceway.yaml"
    config.write_text("version: v1\nstate_dir: state\nfleet: {discover: {simulate: {a30: 1}}}\n", encoding="utf-8")
    assert yaml.safe_load(run(*arguments, str(config)))["mig-configs"]
