from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest

from loadtests import bodies
from loadtests.scenario import Closed, Open, ScenarioError, load_scenario, parse_scenario

TENANT: dict[str, Any] = {"name": "acme", "model": "chat"}


def parse(**fields: Any) -> Any:
    return parse_scenario({"tenants": [TENANT]} | fields, "test.yaml")


def test_a_scenario_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "load.yaml"
    path.write_text(
        "version: v1\ntenants:\n"
        "  - {name: acme, model: chat}\n"
        "  - {name: noisy, model: chat, arrival: {kind: open, requests_per_second: 5}, background: true}\n"
    )
    scenario = load_scenario(path)
    assert scenario.tenants[0].arrival == Closed(users=1)
    assert scenario.tenants[1].arrival == Open(requests_per_second=5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"durations": 3}, "durations: Extra inputs"),
        ({"duration_seconds": 0}, "duration_seconds"),
        ({"duration_seconds": "20 minutes"}, "duration_seconds"),
        ({"base_url": "https://host"}, "http://host:port"),
        ({"base_url": "http://host/v1"}, "http://host:port"),
        ({"tenants": []}, "tenants"),
        ({"tenants": [TENANT, TENANT]}, "share a name"),
        ({"tenants": [TENANT | {"arrival": {"kind": "burst"}}]}, "tenants.0.arrival"),
        ({"tenants": [TENANT | {"arrival": {"kind": "open"}}]}, "requests_per_second"),
        ({"tenants": [TENANT | {"api_key": "a", "api_key_env": "B"}]}, "not both"),
        ({"version": "v2"}, "version"),
    ],
)
def test_faults_name_the_field(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ScenarioError, match=r"test\.yaml: ") as caught:
        parse(**fields)
    assert said in str(caught.value)


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(ScenarioError) as caught:
        parse(duration_seconds=-1, seeds=2)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("text", ["[1, 2]", "tenants: [", "just words"])
def test_files_that_are_no_scenario(tmp_path: Path, text: str) -> None:
    path = tmp_path / "load.yaml"
    path.write_text(text)
    with pytest.raises(ScenarioError, match=r"load\.yaml"):
        load_scenario(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"absent\.yaml: No such file"):
        load_scenario(tmp_path / "absent.yaml")


def test_keys_come_from_the_environment_and_are_never_shown() -> None:
    tenant = parse(tenants=[TENANT | {"api_key_env": "ACME_KEY"}]).tenants[0]
    assert tenant.key({"ACME_KEY": "sk-1"}) == "sk-1"
    with pytest.raises(ScenarioError, match="sliceway keys create acme"):
        tenant.key({})
    literal = parse(tenants=[TENANT | {"api_key": "sk-secret"}])
    assert "sk-secret" not in repr(literal)
    assert literal.tenants[0].key({}) == "sk-secret"
    assert parse().tenants[0].key({}) is None


def test_prompts_repeat_with_the_seed_and_only_then() -> None:
    tenant = parse().tenants[0]
    assert bodies.body(tenant, Random("a")) == bodies.body(tenant, Random("a"))
    assert bodies.body(tenant, Random("a")) != bodies.body(tenant, Random("b"))
    assert len(bodies.prompt(64, Random(1)).split()) == 64


def test_an_embedding_never_streams() -> None:
    embedding, chat = parse(tenants=[TENANT | {"task": "embedding"}, TENANT | {"name": "other"}]).tenants
    assert not embedding.streams
    assert b'"stream"' not in bodies.body(embedding, Random(1))
    assert b'"include_usage": true' in bodies.body(chat, Random(1))
