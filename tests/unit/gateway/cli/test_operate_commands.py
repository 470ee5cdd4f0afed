"""`sliceway keys rotate`, `tenants`, `audit` and `reload`, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from gateway.cli import app
from gateway.cli.operate import actor, parse_duration
from gateway.errors import ConflictingChange, OperatorError, UnknownTenant
from placement.errors import NotCarriedOut
from placement.locks import exclusive


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "sliceway.yaml"
    path.write_text(
        f"version: v1\nstate_dir: {tmp_path}/state\n"
        "models: [{name: m, endpoints: ['http://127.0.0.1:9']}]\n"
        "tenants: [{name: acme, models: [m]}]\n",
        encoding="utf-8",
    )
    return path


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=True)


def told(*words: Any) -> Any:
    done = run(*words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_key_is_handed_over(config: Path) -> None:
    first = told("keys", "create", "acme", config, "--name", "ci")
    second = told("keys", "rotate", first["id"], config, "--overlap", "1h")
    assert set(second) == set(first) | {"replaced"}
    assert (second["replaces"], second["name"], second["replaced"]["id"]) == (first["id"], "ci", first["id"])
    assert second["replaced"]["expires"] is not None
    assert second["replaced"]["state"] == "active"
    ended = told("keys", "rotate", second["id"], config, "--overlap", "0s")
    assert ended["replaced"]["state"] == "expired"
    assert isinstance(run("keys", "rotate", second["id"], config).exception, ConflictingChange)
    by_people = run("keys", "rotate", ended["id"], config)
    assert by_people.stdout.startswith("sk-sliceway-")
    assert len(by_people.stdout.splitlines()) == 1
    assert "counts until" in by_people.stderr


def test_replicas_of_a_cluster_are_not_ordered_about_on_one_of_its_machines(config: Path, tmp_path: Path) -> None:
    node = tmp_path / "state" / "nodes" / "n1"
    node.mkdir(parents=True)
    with exclusive(node / "member.lock", what="node", remedy=""):
        refused = run("replica", "drain", "m-0", "-c", config).exception
    assert isinstance(refused, NotCarriedOut)
    assert "node 'n1' of a cluster" in refused.message
    assert "sliceway reload" in str(refused.remedy)
    assert not list((tmp_path / "state").glob("orders*"))


@pytest.mark.parametrize(
    "words", [("tenants", "set", "acme", "weight=2"), ("keys", "create", "acme"), ("reload",)], ids=lambda w: w[0]
)
def test_a_nodes_gateway_takes_no_change_that_its_clusters_leader_would_undo(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    node = tmp_path / "nodes" / "n1"
    node.mkdir(parents=True)
    path = node / "gateway.yaml"
    path.write_text(
        f"version: v1\nstate_dir: {node}/gateway\nmodels: [{{name: m, endpoints: ['http://127.0.0.1:9']}}]\n"
        "tenants: [{name: acme, models: [m]}]\n",
        encoding="utf-8",
    )
    assert run(*words, "-c", path).exit_code == 0
    files = [p for p in (node / "gateway").rglob("*") if p.is_file()]
    kept = {path: path.read_bytes() for path in files}
    (node / "member.lock").touch()
    refused = run(*words, "-c", path).exception
    assert isinstance(refused, ConflictingChange)
    assert "node 'n1' of a cluster" in refused.message
    assert kept == {path: path.read_bytes() for path in files}


def test_tenants_are_listed_changed_and_changed_back(config: Path) -> None:
    changed = told("tenants", "set", "acme", "weight=2", 'limits={"tokens_per_minute": 9}', "-c", config)
    assert (changed["weight"], changed["limits"]["tokens_per_minute"], changed["changed"]) == (
        2,
        9,
        ["limits", "weight"],
    )
    assert told("tenants", "set", "acme", "weight=null", "-c", config)["changed"] == ["limits"]
    assert told("tenants", "add", "new", "isolation=shared", "-c", config)["source"] == "operator"
    assert [one["name"] for one in told("tenants", "list", "-c", config)["tenants"]] == ["acme", "new"]
    assert told("keys", "create", "new", config)["tenant"] == "new"
    assert told("tenants", "remove", "new", "-c", config) == {"name": "new", "removed": True}
    assert told("tenants", "reset", "acme", "-c", config)["changed"] == []
    assert 'models: ["m"]' in run("tenants", "show", "acme", "-c", config).stdout
    assert "acme" in run("tenants", "list", "-c", config).stdout


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("set", "acne", "weight=1"), UnknownTenant),
        (("set", "acme", "weight=0"), OperatorError),
        (("set", "acme", "models=nope"), OperatorError),
        (("add", "a b"), OperatorError),
        (("add", "acme"), ConflictingChange),
        (("remove", "acme"), ConflictingChange),
        (("remove", "acne"), UnknownTenant),
    ],
)
def test_what_does_not_fit_is_refused_and_not_written_down(config: Path, words: tuple[str, ...], error: type) -> None:
    assert isinstance(run("tenants", *words, "-c", config).exception, error)
    assert told("audit", "show", config)["entries"] == []


@pytest.mark.parametrize("field", ["weight", "=1", "name=x"])
def test_a_field_has_a_name_and_a_value(config: Path, field: str) -> None:
    done = run("tenants", "set", "acme", field, "-c", config)
    assert done.exit_code == 2
    assert "FIELD=VALUE" in done.stderr


def test_changes_are_shown_and_vouched_for(config: Path, tmp_path: Path) -> None:
    assert "Nothing was changed" in run("audit", "show", config).stdout
    key = told("keys", "create", "acme", config)
    told("keys", "revoke", key["id"], config)
    told("reload", config)
    entries = told("audit", "show", config)["entries"]
    assert [(one["action"], one["target"]) for one in entries] == [
        ("key.create", key["id"]),
        ("key.revoke", key["id"]),
        ("config.reload", "configuration"),
    ]
    assert {one["actor"] for one in entries} == {actor()}
    assert key["key"] not in json.dumps(entries)
    assert "key.create" in run("audit", "show", config).stdout
    verdict = told("audit", "verify", config)
    assert verdict == {"intact": True, "entries": 3, "head": f"3:{entries[-1]['mac']}", "problems": []}
    assert run("audit", "verify", config, "--head", verdict["head"]).exit_code == 0
    log = tmp_path / "state" / "audit" / "audit.jsonl"
    log.write_bytes(log.read_bytes().replace(b"key.revoke", b"key.retain"))
    done = run("audit", "verify", config, "--json")
    assert done.exit_code == 1
    assert not json.loads(done.stdout)["intact"]
    assert "not as it was written" in run("audit", "verify", config).stderr
    assert run("audit", "verify", config, "--head", "nonsense").exit_code == 2


def test_who_runs_a_command_is_told_even_without_a_name() -> None:
    def nobody(uid: int) -> str:
        raise KeyError(uid)

    assert actor(nobody).startswith("cli:uid=")
    assert actor(lambda _: "ann") == "cli:ann"


def test_a_duration_may_be_nothing_and_not_endless() -> None:
    assert parse_duration("0s", "--overlap") == 0
    with pytest.raises(typer.BadParameter, match="hundred years") as refused:
        parse_duration("99999w", "--overlap")
    assert refused.value.param_hint == "--overlap"


def test_the_configuration_is_named_as_everywhere_else(config: Path) -> None:
    assert told("tenants", "set", "acme", "weight=2", config)["changed"] == ["weight"]
    assert told("tenants", "add", "new", config)["source"] == "operator"
    assert [one["name"] for one in told("tenants", "list", config)["tenants"]] == ["acme", "new"]
    assert told("tenants", "show", "acme", config)["weight"] == 2
    assert told("tenants", "reset", "acme", config)["changed"] == []
    assert told("tenants", "remove", "new", config) == {"name": "new", "removed": True}


@pytest.mark.parametrize(
    ("words", "said"),
    [(("weight",), "'weight' is no FIELD=VALUE"), ((), "nothing is to be set"), (("name=b",), "no FIELD")],
)
def test_what_is_no_setting_is_refused(config: Path, words: tuple[str, ...], said: str) -> None:
    refused = run("tenants", "set", "acme", *words, config)
    assert refused.exit_code == 2
    assert said in " ".join(refused.output.replace("│", " ").split())
