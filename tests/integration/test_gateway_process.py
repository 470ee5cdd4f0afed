"""The gateway as a process: signals, reloads, keys that come and go, and a port that is taken."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway.testing import FakeFleet, fake_fleet, wait_until
from tests.integration.gateway_harness import CHAT, chat_body, events

pytestmark = pytest.mark.integration

PROGRAM = """
import sys
from pathlib import Path
from gateway.cli.output import run
from gateway.config import load_config
from gateway.wiring import serve_gateway
path = Path(sys.argv[1])
run(lambda: sys.exit(serve_gateway(load_config(path), config_path=path)))
"""


class Served:
    """A gateway process, its configuration file and its engines."""

    def __init__(self, process: subprocess.Popen[str], config: Path, url: str, log: Path) -> None:
        self.process, self.config, self.url, self.log = process, config, url, log

    def get(self, path: str, key: str | None = None) -> httpx2.Response:
        return httpx2.get(self.url + path, headers={"authorization": f"Bearer {key}"} if key else {})

    def keys(self, *words: str) -> Any:
        done = sliceway("keys", *words, "--config", str(self.config), "--json")
        return json.loads(done.stdout)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)


def sliceway(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from gateway.cli import main; main()", *words],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def write_config(path: Path, port: int, **changes: Any) -> None:
    config = {
        "version": "v1",
        "state_dir": str(path.parent / "state"),
        "models": [{"name": "m", "source": "x"}, {"name": "n", "source": "x"}],
        "tenants": [{"name": "acme", "models": ["m"]}],
        "gateway": {"listen": f"127.0.0.1:{port}", "drain_timeout_seconds": 20},
    }
    config["gateway"] |= changes.pop("gateway", {})  # type: ignore[operator]
    path.write_text(json.dumps(config | changes), encoding="utf-8")  # JSON is YAML


@contextmanager
def gateway_process(directory: Path, **changes: Any) -> Iterator[Served]:
    config, port, log = directory / "sliceway.yaml", free_port(), directory / "gateway.log"
    write_config(config, port, **changes)
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(config)], stderr=errors, encoding="utf-8")
    served = Served(process, config, f"http://127.0.0.1:{port}", log)

    def answers() -> bool:
        try:
            return served.get("/healthz").status_code == 200
        except httpx2.TransportError:
            assert process.poll() is None, log.read_text(encoding="utf-8")
            return False

    try:
        wait_until(answers, what="the gateway answers")
        yield served
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def fleet_and_served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeFleet, Served]]:
    directory = tmp_path_factory.mktemp("gateway")
    with fake_fleet(directory / "state") as fleet:
        fleet.start("m-0", "m")
        fleet.start("n-0", "n")
        with gateway_process(directory) as served:
            yield fleet, served


@pytest.fixture
def served(fleet_and_served: tuple[FakeFleet, Served]) -> Served:
    return fleet_and_served[1]


def test_a_key_counts_and_stops_counting_while_the_gateway_runs(served: Served) -> None:
    made = served.keys("create", "acme", "--name", "laptop")
    assert made["key"].startswith("sk-sliceway-")
    wait_until(lambda: served.get("/v1/models", made["key"]).status_code == 200, what="the key counts")
    assert [card["id"] for card in served.get("/v1/models", made["key"]).json()["data"]] == ["m"]
    served.keys("revoke", made["id"])
    wait_until(lambda: served.get("/v1/models", made["key"]).status_code == 401, what="the key is void")
    assert "revoked" in served.get("/v1/models", made["key"]).json()["error"]["message"]
    assert made["key"] not in (served.config.parent / "state" / "keys.json").read_text(encoding="utf-8")


def test_a_damaged_keystore_leaves_the_keys_in_use(served: Served) -> None:
    key = served.keys("create", "acme")["key"]
    wait_until(lambda: served.get("/v1/models", key).status_code == 200, what="the key counts")
    store = served.config.parent / "state" / "keys.json"
    good = store.read_bytes()
    store.write_bytes(good[: len(good) // 2])
    wait_until(lambda: any("keys" in p for p in served.get("/readyz").json()["problems"]), what="the damage is told")
    assert served.get("/v1/models", key).status_code == 200
    store.write_bytes(good)
    wait_until(lambda: not served.get("/readyz").json()["problems"], what="the store is good again")


def test_a_new_configuration_counts_on_sighup_and_a_wrong_one_changes_nothing(served: Served) -> None:
    key = served.keys("create", "acme")["key"]
    wait_until(lambda: served.get("/v1/models", key).status_code == 200, what="the key counts")
    good = served.config.read_text(encoding="utf-8")
    try:
        served.config.write_text(good.replace('"tenants"', '"tenantz"'), encoding="utf-8")
        served.signal(signal.SIGHUP)
        wait_until(
            lambda: 'sliceway_config_reloads_total{result="refused"} 1.0' in served.get("/metrics").text,
            what="the file is refused",
        )
        assert "tenantz" in served.log.read_text(encoding="utf-8")
        assert served.get("/v1/models", key).status_code == 200
        served.config.write_text(good.replace('"models": ["m"]', '"models": ["m", "n"]'), encoding="utf-8")
        served.signal(signal.SIGHUP)
        wait_until(
            lambda: len(served.get("/v1/models", key).json()["data"]) == 2, what="the tenant may use both models"
        )
    finally:
        served.config.write_text(good, encoding="utf-8")
        served.signal(signal.SIGHUP)
    wait_until(lambda: len(served.get("/v1/models", key).json()["data"]) == 1, what="the first configuration is back")


def test_status_shows_the_running_gateway(served: Served) -> None:
    told = json.loads(sliceway("status", str(served.config), "--json").stdout)
    assert told["gateway"]["running"] is True
    assert told["gateway"]["ready"] is True
    assert told["controller"]["running"] is False
    assert {row["replica"]: row["state"] for row in told["slices"]} == {"m-0": "ready", "n-0": "ready"}
    shown = sliceway("status", str(served.config))
    assert shown.returncode == 0
    assert "slice-of-m-0" in shown.stdout
    assert "controller is not running" in shown.stdout


def test_a_taken_port_is_told_with_its_number_and_a_way_out(served: Served, tmp_path: Path) -> None:
    port = int(served.url.rpartition(":")[2])
    write_config(tmp_path / "second.yaml", port)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "second.yaml")],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert f"127.0.0.1:{port}" in done.stderr
    assert "another process listens there" in done.stderr
    assert "gateway.listen" in done.stderr
    assert "Traceback" not in done.stderr


def test_sigterm_lets_streams_end_and_takes_no_new_ones(tmp_path: Path) -> None:
    with fake_fleet(tmp_path / "state") as fleet:
        engine = fleet.start("m-0", "m", itl_seconds=0.05, output_tokens=40)
        with gateway_process(tmp_path, gateway={"authentication": "none"}) as served:
            with httpx2.stream("POST", served.url + CHAT, json=chat_body(), timeout=30) as stream:
                lines = stream.iter_lines()
                while '"content":"the"' not in next(lines):
                    pass
                served.signal(signal.SIGTERM)
                wait_until(lambda: served.get("/readyz").status_code == 503, what="it says that it is not ready")
                assert served.get("/readyz").json()["draining"] is True
                refused = httpx2.post(served.url + CHAT, json=chat_body())
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "gateway_draining")
                assert refused.headers["retry-after"]
                rest = events("\n".join(lines))
            assert rest[-1] == "[DONE]"
            assert not any("error" in e for e in rest[:-1])
            assert served.process.wait(45) == 0
        assert (engine.state.served, engine.state.aborted) == (1, 0)


@pytest.mark.parametrize("signals", [1, 2])
def test_a_drain_that_takes_too_long_ends_the_streams_in_words(tmp_path: Path, signals: int) -> None:
    """One signal waits for the timeout, a second one does not wait."""
    with fake_fleet(tmp_path / "state") as fleet:
        fleet.start("m-0", "m", itl_seconds=0.05, output_tokens=5000)
        seconds = 0.3 if signals == 1 else 600
        with gateway_process(tmp_path, gateway={"authentication": "none", "drain_timeout_seconds": seconds}) as served:
            with httpx2.stream("POST", served.url + CHAT, json=chat_body(), timeout=30) as stream:
                lines = stream.iter_lines()
                while '"content":"the"' not in next(lines):
                    pass
                served.signal(signal.SIGTERM)
                if signals == 2:
                    wait_until(lambda: served.get("/readyz").status_code == 503, what="the drain has begun")
                    served.signal(signal.SIGTERM)
                rest = events("\n".join(lines))
            assert rest[-1] == "[DONE]"
            assert rest[-2]["error"]["code"] == "gateway_draining"
            assert served.process.wait(45) == 0


def test_engines_that_something_else_runs_are_served_without_placement(tmp_path: Path) -> None:
    with fake_fleet(tmp_path / "engines") as fleet:
        fleet.start("a", "engine-name")
        models = [
            {"name": "m", "endpoints": [fleet.rows["a"].endpoint]},
            {"name": "lost", "endpoints": ["http://127.0.0.1:9"]},
        ]
        tenants = [{"name": "acme"}]
        with gateway_process(tmp_path, models=models, tenants=tenants, gateway={"authentication": "none"}) as served:
            wait_until(lambda: served.get("/readyz").status_code == 200, what="the engine was found")
            assert httpx2.post(served.url + CHAT, json=chat_body()).status_code == 200
            assert fleet.engines["a"].state.last_request["body"]["model"] == "engine-name"
            rows = {row["model"]: row for row in served.get("/slices").json()}
            assert rows["m"]["slice"] == {
                "id": "endpoint-0",
                "kind": "external",
                "profile": None,
                "uuid": None,
                "gpu": None,
                "product": None,
            }
            assert rows["m"]["state"] == "ready"
            assert wait_until(
                lambda: {r["model"]: r for r in served.get("/slices").json()}["lost"]["state"] == "backoff",
                what="the other is out",
            )
            refused = httpx2.post(served.url + CHAT, json=chat_body("lost"))
            assert refused.status_code == 503
            assert served.get("/v1/models/m").json()["max_model_len"] == 8192
            assert served.get("/readyz").json()["problems"] == []
