from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any

import pytest

from loadtests import yamlfile
from loadtests.__main__ import main
from loadtests.arrivals import Closed, Open
from loadtests.bodies import Bodies, prompt
from loadtests.problems import ScenarioError
from loadtests.scenario import load_scenario, parse_scenario
from model_registry.configfile import problems

TENANT: dict[str, Any] = {"name": "acme", "model": "chat"}


def parse(**fields: Any) -> Any:
    return parse_scenario({"tenants": [TENANT]} | fields, "test.yaml")


def test_a_scenario_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "load.yaml"
    path.write_text(
        "kind: load\nversion: v1\ntenants:\n"
        "  - {name: acme, model: chat}\n"
        "  - {name: noisy, model: chat, arrival: {kind: open, requests_per_second: 5}, background: true}\n",
        encoding="utf-8",
    )
    scenario = load_scenario(path)
    assert scenario.tenants[0].arrival == Closed(users=1)
    assert scenario.tenants[1].arrival == Open(kind="open", requests_per_second=5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"durations": 3}, "Did you mean 'duration_seconds'?"),
        ({"tenants": [TENANT | {"slo": {"ttft": 0.5}}]}, "has no unit"),
        ({"tenants": [TENANT | {"slo": {"ttft": "3 weeks"}}]}, "no unit of time"),
        ({"tenants": [TENANT | {"slo": {"attainment": 0.9}}]}, "an SLO without a limit"),
        (
            {"tenants": [TENANT | {"turns": {"count": 2}, "arrival": {"kind": "open", "requests_per_second": 1}}]},
            "closed",
        ),
        ({"tenants": [TENANT | {"task": "embedding", "tools": {"count": 1}}]}, "task chat"),
        ({"tenants": [TENANT | {"shared_prefix": {"tokens": 9}}]}, "prompt_tokens has to be set"),
        ({"tenants": [TENANT | {"prompt_tokens": {"kind": "zipf"}}]}, "zipf"),
        ({"duration_seconds": 0}, "duration_seconds"),
        ({"duration_seconds": "20 minutes"}, "duration_seconds"),
        ({"base_url": "https://host"}, "http://host:port"),
        ({"base_url": "http://host/v1"}, "http://host:port"),
        ({"base_url": "http://host:port"}, "http://host:port"),
        ({"base_url": "http://host:99999"}, "http://host:port"),
        ({"base_url": "http://[::1"}, "http://host:port"),
        ({"base_url": "http://user:secret@host:1"}, "http://host:port"),
        ({"base_url": "http://host:1?key=1"}, "http://host:port"),
        ({"tenants": [TENANT | {"slo": {"ttft": "9" * 400 + "h"}}]}, "must be a finite number"),
        ({"tenants": [TENANT | {"task": "embedding", "slo": {"ttft": "1s"}}]}, "in one piece has no ttft"),
        ({"tenants": [TENANT | {"stream": False, "slo": {"e2e": "1s", "itl": "1s"}}]}, "in one piece has no itl"),
        ({"tenants": [TENANT | {"prompt_tokens": {"kind": "exponential", "mean": float("inf")}}]}, "finite number"),
        ({"tenants": []}, "tenants"),
        ({"tenants": [TENANT, TENANT]}, "share a name"),
        ({"tenants": [TENANT | {"arrival": {"kind": "burst"}}]}, "tenants[0].arrival"),
        ({"tenants": [TENANT | {"arrival": {"kind": "open"}}]}, "requests_per_second"),
        ({"tenants": [TENANT | {"api_key": "a", "api_key_env": "B"}]}, "not both"),
        ({"version": "v2"}, "version"),
        ({"kind": "isolation"}, "kind: must be 'load'"),
    ],
)
def test_faults_name_the_field(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ScenarioError, match=r"test\.yaml: ") as caught:
        parse(**fields)
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(ScenarioError) as caught:
        parse(duration_seconds=-1, seeds=2)
    assert len(caught.value.problems) == 2


def test_faults_in_a_file_name_their_line(tmp_path: Path) -> None:
    path = tmp_path / "load.yaml"
    path.write_text(
        "version: v1\ntenants:\n  - name: acme\n    model: chat\n    slo:\n      ttft: 0.5\n    promt_tokens: 3\n",
        encoding="utf-8",
    )
    with pytest.raises(ScenarioError) as caught:
        load_scenario(path)
    first, second = (str(problem) for problem in caught.value.problems)
    assert first.startswith(f"{path}:6: tenants[0].slo.ttft: 0.5 has no unit")
    assert second.startswith(f"{path}:7: tenants[0].promt_tokens: unknown key")
    assert "Did you mean 'prompt_tokens'?" in second


def test_faults_of_what_options_say_name_the_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {"aggressors": [{"kind": "nosuch"}], "rounds": 0, "options": {"aggressors": "--aggressor"}}
    victim = {"name": "a", "model": "m"}
    monkeypatch.setattr("sys.stdin", StringIO(json.dumps({"kind": "isolation", "victim": victim} | said)))
    assert main(["check", "-"]) == 2
    told = capsys.readouterr().err
    assert "--aggressor: there is no kind 'nosuch'" in told
    assert "standard input: rounds: must be at least 1" in told


@pytest.mark.parametrize("text", ["[1, 2]", "tenants: [", "just words"])
def test_files_that_are_no_scenario(tmp_path: Path, text: str) -> None:
    path = tmp_path / "load.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ScenarioError, match=r"load\.yaml"):
        load_scenario(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"absent\.yaml: cannot be read: No such file"):
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
    bodies = Bodies(tenant, seed=1)
    assert bodies.make(Random("a")) == bodies.make(Random("a"))
    assert bodies.make(Random("a")) != bodies.make(Random("b"))
    assert len(prompt(64, Random(1)).split()) == 64


def test_an_embedding_never_streams() -> None:
    embedding, chat = parse(tenants=[TENANT | {"task": "embedding"}, TENANT | {"name": "other"}]).tenants
    assert not embedding.streams
    assert b'"stream"' not in Bodies(embedding, seed=1).make(Random(1)).body
    assert b'"include_usage": true' in Bodies(chat, seed=1).make(Random(1)).body


@pytest.mark.parametrize(
    ("fields", "said", "remedy"),
    [
        ({"duration_seconds": "5 s"}, "must be a number, not '5 s'", ""),
        ({"seed": 1.5}, "must be a whole number, not 1.5", ""),
        ({"duration_seconds": -3}, "must be more than 0, not -3", ""),
        ({"warmup_seconds": "x" * 200}, f"must be a number, not '{'x' * 79}...", ""),
        ({"tenants": []}, "must not be empty", "Give at least one."),
        (
            {"tenants": [TENANT | {"task": "embeding"}]},
            "must be 'chat', 'completion' or 'embedding', not 'embeding'",
            "Did you mean 'embedding'?",
        ),
        (
            {"tenants": [TENANT | {"prompt_tokens": "many"}]},
            "must be a whole number, or a mapping with a 'kind', not 'many'",
            "There are fixed, uniform,",
        ),
        (
            {"tenants": [TENANT | {"arrival": {"users": 3}}]},
            "'kind' is missing",
            "There are closed, open, poisson, constant,",
        ),
        (
            {"tenants": [TENANT | {"arrival": {"kind": "poison", "requests_per_second": 2}}]},
            "there is no kind 'poison'",
            "Did you mean 'poisson'? There are closed, open, poisson,",
        ),
    ],
)
def test_a_wrong_value_is_told_in_words(fields: dict[str, Any], said: str, remedy: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        parse(**fields)
    (problem,) = caught.value.problems
    assert problem.message == said
    assert (problem.remedy or "").startswith(remedy)


def test_wrong_values_are_told_in_the_words_of_the_configuration() -> None:
    """The load tests import nothing of the others, so they have a table of their own; what both know they say alike."""
    assert {kind: yamlfile.EXPECTED[kind] for kind in yamlfile.EXPECTED.keys() & problems.EXPECTED.keys()} == {
        kind: problems.EXPECTED[kind] for kind in yamlfile.EXPECTED
    }
