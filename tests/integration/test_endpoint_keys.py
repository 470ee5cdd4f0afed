"""Engines of others that ask for a key: they are shown the configured one at every request, and it is found nowhere else."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

from gateway.cli import app
from gateway.config import load_config
from gateway.errors import SecretUnavailable
from gateway.keys import Keystore
from gateway.testing import RELAYS, fake_fleet, running_gateway, wait_until
from gateway.wiring import create_gateway, wall_clock
from tests.integration.gateway_harness import CHAT, chat_body

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

KEY = "sk-elsewhere-4f1c0d"
OTHER = "sk-elsewhere-9b77aa"


def written(state: Path, endpoint: str, **gateway: Any) -> Path:
    """A configuration whose key lies beside it."""
    models = [{"name": "m", "endpoints": [endpoint], "endpoint_key": "file:engine.key"}]
    path = state / "sliceway.yaml"
    settings = {"listen": "127.0.0.1:0", "admin_listen": "none"} | gateway
    path.write_text(
        json.dumps(
            {
                "version": "v1",
                "state_dir": str(state),
                "models": models,
                "tenants": [{"name": "a"}],
                "gateway": settings,
            }
        )
    )
    return path


@pytest.mark.parametrize("relay", RELAYS)
def test_an_engine_that_asks_for_a_key_is_shown_it_and_another_after_a_reload(
    relay: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "engine.key").write_text(KEY + "\n")
    own, _ = Keystore(tmp_path).create("a", now=wall_clock())
    mine = {"authorization": f"Bearer {own}"}
    with fake_fleet(tmp_path / "elsewhere") as fleet:
        engine = fleet.start("engine", "m", secret=KEY)
        config = written(tmp_path, fleet.rows["engine"].endpoint)
        with running_gateway(load_config(config), config_path=config, relay=relay) as running:

            def ready() -> bool:
                """Whether it is, after another probe."""
                running.on_loop(running.gateway._next_probe.clear)
                running.thread.call(running.gateway._probe_all())
                return httpx2.get(running.url + "/readyz", timeout=30).status_code == 200

            def ask(**options: Any) -> httpx2.Response:
                return httpx2.post(running.url + CHAT, headers=mine, timeout=30, **options)

            wait_until(ready, what="the engine has taken the key at a probe")
            for stream in (True, False):
                answer = ask(json=chat_body("m", stream=stream))
                assert answer.status_code == 200, answer.text
                shown = engine.state.last_request["headers"]
                assert [value for name, value in shown.items() if name.lower() == "authorization"] == [f"Bearer {KEY}"]
            long = chat_body("m", stream=False, cache_salt="x", padding="x" * 400_000)
            assert ask(json=long).status_code == 200
            assert "sliceway_engine_up" in httpx2.get(running.url + "/metrics/engines", headers=mine, timeout=30).text

            engine.behaviour = replace(engine.behaviour, secret=OTHER)
            wait_until(lambda: not ready(), what="the engine does not take the key any longer")
            why = httpx2.get(running.url + "/readyz", timeout=30).text
            assert "does not accept the model's endpoint_key" in why
            (tmp_path / "engine.key").write_text(OTHER)
            running.on_loop(running.gateway.reload)
            wait_until(ready, what="the new key counts")
            refused = ask(json={"model": "m", "messages": "wrong"})
            seen = why + refused.text + str(refused.headers) + caplog.text + repr(running.gateway.replicas())
            seen += httpx2.get(running.url + "/slices", headers=mine, timeout=30).text
            assert KEY not in seen
            assert OTHER not in seen


def test_a_key_that_is_not_there_stops_a_start_and_a_reload_but_not_what_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = written(tmp_path, "http://127.0.0.1:9", authentication="none")
    with pytest.raises(SecretUnavailable, match="endpoint_key of model 'm'"):
        create_gateway(load_config(config))
    (tmp_path / "engine.key").write_text(KEY)
    with running_gateway(load_config(config), config_path=config) as running:
        (tmp_path / "engine.key").write_text("")
        running.on_loop(running.gateway.reload)
        assert "endpoint_key of model 'm' is empty" in caplog.text
        assert next(iter(running.gateway.replicas())).secret == KEY


@pytest.mark.parametrize("key", ["with space", "line\x0bbreak", "tst\u00e9"])
def test_a_key_that_cannot_stand_in_a_header_is_refused_without_being_told(key: str, tmp_path: Path) -> None:
    config = written(tmp_path, "http://127.0.0.1:9", authentication="none")
    (tmp_path / "engine.key").write_text(key, encoding="utf-8")
    with pytest.raises(SecretUnavailable, match="visible ASCII") as refused:
        create_gateway(load_config(config))
    assert key not in str(refused.value)


def test_doctor_and_config_tell_where_the_key_lies_and_never_what_it_is(tmp_path: Path) -> None:
    config = written(tmp_path, "http://127.0.0.1:9")
    found = CliRunner().invoke(app, ["doctor", str(config)])
    assert "endpoint_key of model 'm'" in found.output.replace("\n", " ")
    (tmp_path / "engine.key").write_text(KEY)
    for command in (["doctor", str(config)], ["config", "show", str(config)], ["plan", str(config), "--json"]):
        assert KEY not in CliRunner().invoke(app, command).output
