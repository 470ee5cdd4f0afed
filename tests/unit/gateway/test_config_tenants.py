"""What the configuration says about tenants, secrets and tokens, and how it is told where that does not go together."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.admin.overlay import Overlay, applied
from gateway.config import Config, load_config
from gateway.errors import OperatorError, SecretUnavailable
from gateway.secret_values import Secret, fetch
from model_registry.errors import ConfigError

BASE = """\
version: v1
models: [{name: small, source: x}, {name: large, source: x}]
tenants:
  - name: acme
    models: [small]
"""


def load(folder: Path, text: str) -> Config:
    path = folder / "sliceway.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (
            "aliases: {gpt: smal}",
            r"sliceway.yaml:\d+: aliases.gpt: alias 'gpt' names the unknown model 'smal'\nDid you mean 'small'",
        ),
        ("aliases: {small: large}", "is the name of a model, which it would hide"),
        ("    aliases: {gpt: nope}", r"tenants\[0\].aliases.gpt: alias 'gpt' names the unknown model"),
        ("    aliases: {gpt: large}", "which tenant 'acme' may not use"),
        ("    isolation: dedicated\ngateway: {authentication: none}", "nobody is told apart"),
        ("    weight: 0", "more than 0"),
        ("    priority: 11", "at most 10"),
        ("    default_deadline_seconds: -1", "more than 0"),
        ("gateway: {admin_listen: '0.0.0.0:9'}", "admin_listen"),
        ("auth: {oidc: {issuer: 'http://a.test', audience: x}}", "not encrypted"),
        ("auth: {oidc: {issuer: 'https://a.test', audience: x, algorithms: [HS256]}}", "'RS256'"),
        ("auth: {oidc: {issuer: 'https://a.test', audience: x, tenant_map: {a: acne}}}", "Did you mean 'acme'"),
        (
            "auth: {oidc: {issuer: 'https://a.test', audience: x, max_stale_seconds: 60}}",
            "shorter than refresh_seconds",
        ),
    ],
)
def test_what_does_not_go_together_is_told(tmp_path: Path, lines: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(tmp_path, BASE + lines + "\n")


# ---- secrets


@pytest.mark.parametrize(
    "written", ["planted-secret", "'12345678'", "12345678", "[planted-secret]", "'${ENV:}'", "'file:'", "true"]
)
@pytest.mark.parametrize("field", ["admin_key", "keys_secret"])
def test_a_secret_written_out_is_refused_and_not_repeated(tmp_path: Path, field: str, written: str) -> None:
    with pytest.raises(ConfigError, match=r"name where it lies, as \$\{ENV:NAME\} or file:PATH") as caught:
        load(tmp_path, f"{BASE}gateway: {{{field}: {written}}}\n")
    for problem in (str(caught.value), str(caught.value.as_dict())):
        assert "planted" not in problem
        assert "12345678" not in problem


def test_a_file_with_a_secret_lies_beside_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "admin.txt").write_text("  the-secret-of-admins  \nsecond line\n", encoding="utf-8")
    config = load(tmp_path, BASE + "gateway: {admin_key: 'file:admin.txt', keys_secret: '${ENV:PEPPER}'}\n")
    assert config.gateway.admin_key == f"file:{tmp_path}/admin.txt"
    secret = fetch(config.gateway.admin_key, field_name="x")
    assert secret.value == b"the-secret-of-admins"
    assert "admins" not in f"{secret!r} {secret} {[secret]} {config!r} {config.model_dump_json()}"
    monkeypatch.setenv("PEPPER", "from the environment")
    assert fetch("${ENV:PEPPER}", field_name="x") == Secret(b"from the environment")


@pytest.mark.parametrize("reference", ["${ENV:NOT_SET}", "file:/nowhere", "file:/", "file:/dev/zero", "file:/dev/null"])
def test_a_secret_that_is_not_there_is_told(reference: str) -> None:
    with pytest.raises(SecretUnavailable, match=r"gateway\.x"):
        fetch(reference, {}, field_name="gateway.x")


# ---- what operators change over it


def test_fields_of_operators_go_before_those_of_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, BASE + "    weight: 2\n    priority: 1\n")
    overlay = Overlay(tenants={"acme": {"weight": 5}, "new": {"models": ["large"]}})
    tenants = {tenant.name: tenant for tenant in applied(config, overlay).tenants}
    assert (tenants["acme"].weight, tenants["acme"].priority, tenants["acme"].models) == (5, 1, ("small",))
    assert tenants["new"].models == ("large",)
    assert applied(config, Overlay()) is config


def test_faults_name_the_tenant_and_the_field(tmp_path: Path) -> None:
    config = load(tmp_path, BASE)
    overlay = Overlay(tenants={"acme": {"models": ["nope"], "weight": "planted"}, "new": {"wieght": 1}})
    with pytest.raises(OperatorError) as caught:
        applied(config, overlay)
    said = str(caught.value)
    assert "tenants.acme.weight: " in said
    assert "tenants.new.wieght: there is no such field; did you mean 'weight'?" in said
    assert "planted" not in said


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from(
    ["models", "aliases", "limits", "weight", "priority", "isolation", "demand", "default_deadline_seconds"]
)


@settings(max_examples=80, deadline=None)
@given(
    st.dictionaries(st.text(max_size=10), st.dictionaries(fields | st.text(max_size=5), values, max_size=4), max_size=3)
)
def test_no_overlay_is_more_than_refused(tenants: dict[str, dict[str, Any]]) -> None:
    config = Config.model_validate(
        {"version": "v1", "models": [{"name": "small", "source": "x"}], "tenants": [{"name": "acme"}]}
    )
    with contextlib.suppress(OperatorError):  # anything else fails the test
        made = applied(config, Overlay(tenants=tenants))
        assert {tenant.name for tenant in made.tenants} == {"acme", *tenants}


@settings(max_examples=100, deadline=None)
@given(values)
def test_no_value_is_taken_for_a_reference_that_is_none(value: Any) -> None:
    config = {"version": "v1", "gateway": {"admin_key": value}}
    if value is None:
        assert Config.model_validate(config).gateway.admin_key is None
        return
    try:
        taken = Config.model_validate(config).gateway.admin_key
    except ValueError as error:
        assert "name where it lies" in str(error)  # noqa: PT017  # the value may also be one
    else:
        assert str(taken).startswith(("${ENV:", "file:"))
