"""A cluster in lines, as `up --ray` and `node list` show it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.cli.leading import lines_of
from gateway.cli.member import LayoutsTold
from placement.cluster.node import NodePaths


def status(**more: Any) -> dict[str, Any]:
    return {"nodes": [], "replicas": [], "unplaced": {}} | more


def test_numbers_that_demand_decides_are_shown_without_what_changes_all_the_time() -> None:
    row = {"replicas": 3, "least": 1, "most": 4, "reason": "enough", "arrivals_per_second": 2.5}
    planned = {"replicas": 1, "reason": "one, since nobody knows what a replica bears"}
    assert lines_of(status(scaling={"chat@acme": row}, planned={"embed": planned})) == [
        "chat@acme: 3 replicas by demand, of 1 to 4",
        "embed: 1 replica for its demand (one, since nobody knows what a replica bears)",
    ]


def test_what_a_replica_is_counted_with_is_shown_with_whence_that_is_known() -> None:
    row = {"replicas": 1, "least": 1, "most": 4, "requests_per_replica": 2.5, "capacity_source": "measured"}
    assert lines_of(status(scaling={"chat": row})) == [
        "chat: 1 replica by demand, of 1 to 4, 2.5 requests/s each (measured)"
    ]


def test_who_starts_to_take_anothers_place_is_shown_with_whose() -> None:
    starts = {"replica": "chat-1", "slice": "n1/cpu-0", "state": "starting", "reason": None, "in_place_of": "chat-0"}
    assert lines_of(status(replicas=[starts])) == ["chat-1 on n1/cpu-0: starting, to take the place of chat-0"]


def test_one_that_did_not_start_in_anothers_place_is_told_with_who_serves_on() -> None:
    failed = {"replica": "chat-1", "of": "chat-0", "slice": "n1/cpu-0", "reason": "no memory", "count": 1}
    assert lines_of(status(failed_starts={"chat": failed | {"retry_at": "2026-01-01T14:05:10Z"}})) == [
        "chat-0 serves on by an earlier configuration: chat-1, which was to take its place, did not start on n1/cpu-0 (no memory); "
        "another one is tried at 14:05:10 UTC"
    ]


def test_a_plan_that_is_carried_out_is_shown_until_it_is_over_and_one_that_was_stopped_with_why() -> None:
    goes = {"done": 1, "steps": 3, "under_way": True, "error": None}
    assert lines_of(status(transition=goes)) == ["a plan is carried out: 1 of 3 steps done"]
    stopped = goes | {"under_way": False, "error": {"message": "small-0 failed"}}
    assert lines_of(status(transition=stopped)) == ["the last plan was stopped, 1 of 3 steps done: small-0 failed"]
    assert lines_of(status(transition=goes | {"done": 3, "under_way": False})) == []
    assert lines_of(status(transition=None)) == []
    assert lines_of(status(transition=goes | {"why": "demand"})) == ["GPUs are cut anew for demand: 1 of 3 steps done"]


@pytest.mark.parametrize(
    ("told", "line"),
    [
        ({"running": True}, "weighing it"),
        ({"running": True, "step": "create n1/GPU-0/1g.10gb@0"}, "create n1/GPU-0/1g.10gb@0"),
        ({"events": [{"result": "unchanged", "reason": "not worth it"}]}, "unchanged: not worth it"),
    ],
)
def test_cutting_gpus_anew_for_demand_is_shown_with_how_it_ended(told: dict[str, Any], line: str) -> None:
    known: dict[str, Any] = {"running": False, "step": None, "proposed": None, "events": []}
    assert lines_of(status(leader={"repartition": known | told})) == [f"cutting GPUs anew for demand: {line}"]
    assert lines_of(status(leader={"repartition": known})) == []


def test_what_is_only_proposed_is_shown_with_the_command_that_shows_it() -> None:
    told: dict[str, Any] = {"running": False, "step": None, "proposed": "2 requests/s more", "events": []}
    (line,) = lines_of(status(leader={"repartition": told}))
    assert "proposed: 2 requests/s more; sliceway plan CONFIG --ray" in line


def test_a_head_that_tells_no_numbers_is_shown_as_well() -> None:
    waits = {"replica": "chat-0", "slice": "n1/cpu-0", "state": "pending", "reason": "Ray to give it the slice"}
    assert lines_of(status(replicas=[waits], unplaced={"chat-1": "there is 1 slice"})) == [
        "chat-0 on n1/cpu-0: pending (Ray to give it the slice)",
        "chat-1 has no slice: there is 1 slice",
    ]


def test_what_is_not_cut_as_configured_is_shown_by_node_and_what_no_node_has_after_all() -> None:
    node = {"node": "n1", "address": "10.0.0.1", "problem": None, "slices": 2, "simulated": False}
    nodes = [node | {"layouts": ["GPU 0 is not cut as fleet.layouts[0] says"]}, node | {"node": "n2"}]
    shown = lines_of(status(nodes=nodes, layouts=["fleet.layouts[1].gpus: no node of the cluster has a GPU 9"]))
    assert shown[2:] == [
        "node n1: GPU 0 is not cut as fleet.layouts[0] says",
        "fleet.layouts[1].gpus: no node of the cluster has a GPU 9",
    ]


def test_what_came_of_a_plan_for_nodes_that_joined_is_shown() -> None:
    assert lines_of(status(leader={"planned": ["fleet.partition: 3 steps of the plan done"]})) == [
        "fleet.partition: 3 steps of the plan done"
    ]


def test_a_join_says_what_came_of_its_layouts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = SimpleNamespace(paths=NodePaths(tmp_path), join="this time")
    told = LayoutsTold(machine, why=True)  # type: ignore[arg-type]
    told.look()
    found = {"said": ["GPU 0 cut"], "why": {"GPU-1": "a replica is on it"}}
    machine.paths.layouts.write_text(json.dumps(found | {"join": "another time"}), encoding="utf-8")
    told.look()
    assert capsys.readouterr().out == ""
    machine.paths.layouts.write_text(json.dumps(found | {"join": machine.join}), encoding="utf-8")
    told.look()
    told.look()
    assert capsys.readouterr().out.splitlines() == ["GPU 0 cut", "fleet.layouts is not carried out: a replica is on it"]
