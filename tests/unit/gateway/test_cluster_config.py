"""What of a configuration does not count on a cluster is said with what to do, and what would do harm is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gateway.cli import app
from gateway.cluster_config import differences, led_elsewhere
from gateway.config import Config
from placement.errors import PlacementError
from placement.locks import exclusive

PATH = Path("/etc/my fleet.yaml")
DEMAND = {"requests_per_second": 6, "prompt_tokens": 800, "output_tokens": 200}


def config(*, fleet: dict[str, Any] | None = None, state_dir: Path | None = None, **model: Any) -> Config:
    content = {
        "version": "v1",
        "models": [{"name": "chat", "source": "org/x"} | model],
        "tenants": [{"name": "acme", "models": ["chat"]}],
    }
    more = {"fleet": fleet} if fleet is not None else {}
    return Config.model_validate(content | more | ({"state_dir": state_dir} if state_dir else {}))


@pytest.mark.parametrize(
    ("fleet", "model", "where", "remedy"),
    [
        (
            {"reserve": {"1g.10gb": 1, "note": "x"}},
            {},
            "fleet.reserve",
            "sliceway apply '/etc/my fleet.yaml' --ray HOST:PORT",
        ),
        ({"autoscale": {"sleep": "sleep-mode"}}, {}, "fleet.autoscale.sleep", "Set `min: 1`"),
    ],
)
def test_what_does_not_count_is_said_with_what_to_do(
    fleet: dict[str, Any], model: dict[str, Any], where: str, remedy: str
) -> None:
    (said,) = differences(config(fleet=fleet, **model), PATH, local=True)
    assert said.startswith(f"{where}: ")
    assert remedy in said


@pytest.mark.parametrize(
    ("fleet", "model"),
    [
        (None, {"replicas": 2}),
        (None, {"demand": DEMAND}),
        ({"layouts": [{"layout": ["1g.10gb"]}]}, {}),
        ({"partition": "planned", "reserve": {"1g.10gb": 1, "note": "x"}}, {}),
        ({"autoscale": {"repartition": "automatic"}}, {"replicas": {"min": 1, "max": 3}}),
        ({"discover": "cpu", "cordon": [0]}, {"replicas": {"min": 0, "max": 3}, "demand": DEMAND}),
        ({"autoscale": {"scale_up_after": "5s", "sleep": "auto", "repartition": "propose"}}, {"replicas": 1}),
    ],
)
def test_what_counts_as_on_one_machine_is_not_mentioned(fleet: dict[str, Any] | None, model: dict[str, Any]) -> None:
    made = config(fleet=fleet, **model)
    assert differences(made, PATH, local=True) == ()


def test_who_leads_a_cluster_from_outside_is_told_that_the_fleet_is_nobodys() -> None:
    made = config(fleet={"discover": "cpu", "autoscale": {"cool_down": "5s"}})
    (said,) = differences(made, PATH, local=False)
    assert "does not count here: discover" in said
    assert differences(config(fleet={"autoscale": {"cool_down": "5s"}}), PATH, local=False) == ()


def test_a_machine_whose_replicas_the_head_seats_is_not_planned_beside_it(tmp_path: Path) -> None:
    made = config(state_dir=tmp_path)
    assert led_elsewhere(made) is None
    node = tmp_path / "nodes" / "n1"
    node.mkdir(parents=True)
    with exclusive(node / "member.lock", what="part of a cluster", remedy="Stop it."):
        why = led_elsewhere(made)
    assert why is not None
    assert "node 'n1' of a cluster" in why.message
    assert f"state_dir: {node / 'engines'}" in str(why.remedy)
    assert led_elsewhere(made) is None


def test_on_a_node_of_a_cluster_apply_is_refused_and_plan_says_that_it_sees_nothing_of_what_runs(
    tmp_path: Path,
) -> None:
    path, node = tmp_path / "sliceway.yaml", tmp_path / "state" / "nodes" / "n1"
    path.write_text(f"version: v1\nstate_dir: {tmp_path}/state\nfleet: {{discover: cpu}}\n", encoding="utf-8")
    node.mkdir(parents=True)
    with exclusive(node / "member.lock", what="part of a cluster", remedy="Stop it."):
        refused = CliRunner().invoke(app, ["apply", str(path)]).exception
        planned = CliRunner().invoke(app, ["plan", str(path)])
    assert isinstance(refused, PlacementError)
    assert "whose head seats the replicas" in refused.message
    assert planned.exit_code == 0, planned.output
    assert "planned as if nothing ran here: this machine is node 'n1' of a cluster" in " ".join(planned.stderr.split())
