"""`sliceway up` and `down` as an operator meets them, with simulated engines."""

from __future__ import annotations

import json
import os
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from placement.locks import holder
from placement.table import ReplicaState

pytestmark = pytest.mark.integration

Site = Any
Eventually = Callable[..., Any]
A, B = {"name": "a"}, {"name": "b"}


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(port: int, path: str = "/v1/models") -> Any:
    """The gateway's answer; None while there is none."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return json.load(response)
    except (OSError, ValueError):
        return None


def complete(port: int) -> str:
    body = json.dumps({"model": "a", "prompt": "hello", "max_tokens": 3}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        return str(json.load(response)["choices"][0]["text"])


def gateway_pid(site: Site) -> int:
    return int(json.loads(site.paths.up_record.read_text())["processes"]["gateway"]["pid"])


def up(site: Site, eventually: Eventually, port: int, *more: str) -> Any:
    process = site.run("up", str(site.config), *more)
    eventually(lambda: "serving" in site.log.read_text() or process.poll() is not None, "up serves", seconds=30)
    assert process.poll() is None, site.said()
    return process


def test_it_serves_until_it_is_asked_to_stop_and_leaves_nothing(site: Site, eventually: Eventually, port: int) -> None:
    site.write(A, B, gateway={"listen": f"127.0.0.1:{port}"})
    process = up(site, eventually, port)
    assert complete(port)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 6, "controller, gateway, and two shims with an engine each"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert not any(p.is_running() for p in family)
    assert ask(port) is None
    said = site.log.read_text()
    for words in ("a-0 on cpu-0: ready", "serving a, b on http://127.0.0.1", "a-0 on cpu-0: draining", "stopped"):
        assert words in said


def test_once_is_a_test_of_the_configuration(site: Site, port: int) -> None:
    site.write(A, gateway={"listen": f"127.0.0.1:{port}"})
    assert site.run("up", str(site.config), "--once", "--json").wait(30) == 0
    events = [json.loads(line) for line in site.log.read_text().splitlines()]
    assert [e["state"] for e in events if e["event"] == "replica"][-2:] != []
    assert {e["state"] for e in events if e["event"] == "replica"} >= {"starting", "ready"}


def test_a_replica_that_cannot_serve_is_told_and_fails_a_test_run(site: Site, port: int) -> None:
    site.write(
        A | {"engine_args": ["--fail-at-start", "OSError: no such weights"]}, gateway={"listen": f"127.0.0.1:{port}"}
    )
    assert site.run("up", str(site.config), "--once").wait(30) == 1
    said = site.log.read_text()
    assert "no such weights" in said
    assert "no replica serves" in said
    assert "Its log:" in said


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"models": [{"name": "a", "source": "x", "replicas": 9}]}, 1, "no slice is left for 'a-"),
        ({"models": [{"name": "a", "source": "/no/such/directory"}], "engine": {}}, 1, "/no/such/directory"),
        ({"engine": {"python": "/no/such/python"}, "models": []}, 0, ""),
        ({"engine": {"command": ["x"]}}, 2, "{uds}"),
        ({"fleet": {"cpu": {"memory": "10 apples"}}}, 2, "apples"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(
    site: Site, port: int, change: dict[str, Any], code: int, words: str
) -> None:
    site.write(A, gateway={"listen": f"127.0.0.1:{port}"})
    whole = json.loads(site.config.read_text()) | change
    site.config.write_text(json.dumps(whole))
    assert site.run("up", str(site.config), "--once").wait(30) == code
    assert words in site.log.read_text()
    if code:
        assert holder(site.paths.controller_lock) is None
        assert not list(site.paths.replicas.iterdir() if site.paths.replicas.exists() else [])


def test_a_port_in_use_is_said_before_anything_starts(site: Site) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        site.write(A, gateway={"listen": f"127.0.0.1:{taken.getsockname()[1]}"})
        assert site.run("up", str(site.config)).wait(30) == 1
    assert "another process listens there" in site.log.read_text()
    assert not site.paths.controller_lock.exists()


def test_what_fits_is_served_if_the_operator_says_so(site: Site, eventually: Eventually, port: int) -> None:
    site.write(A, B, slices=1, gateway={"listen": f"127.0.0.1:{port}"})
    assert site.run("up", str(site.config)).wait(30) == 1
    process = up(site, eventually, port, "--partial")
    assert "left out: b-0: no slice is left" in site.log.read_text()
    assert complete(port)
    process.terminate()
    assert process.wait(30) == 0


def test_a_second_one_is_refused_while_the_first_runs_and_takes_over_when_it_was_killed(
    site: Site, eventually: Eventually, port: int
) -> None:
    site.write(A, gateway={"listen": f"127.0.0.1:{port}"})
    first = up(site, eventually, port)
    second = site.run("up", str(site.config))
    assert second.wait(30) == 1
    assert f"pid {first.pid}" in site.log.read_text()
    engine, gateway, controller = site.ready("a-0"), gateway_pid(site), holder(site.paths.controller_lock)
    first.kill()
    first.wait()
    assert complete(port), "nothing that serves needs `up`"
    site.log.write_text("")
    third = up(site, eventually, port)
    assert (site.ready("a-0"), gateway_pid(site), holder(site.paths.controller_lock)) == (engine, gateway, controller)
    assert "going on with it" in site.log.read_text()
    third.terminate()
    assert third.wait(30) == 0
    eventually(lambda: not any(psutil.pid_exists(p) for p in (engine, gateway, controller)), "all of it has ended")


def test_a_controller_or_gateway_that_ends_is_started_again(site: Site, eventually: Eventually, port: int) -> None:
    site.write(A, gateway={"listen": f"127.0.0.1:{port}"})
    process = up(site, eventually, port)
    engine, gateway, controller = site.ready("a-0"), gateway_pid(site), holder(site.paths.controller_lock)
    site.config.write_text("version: v1\nmodles: []\n")  # also while the configuration is wrong
    os.kill(gateway, signal.SIGKILL)
    eventually(lambda: gateway_pid(site) != gateway and ask(port), "another gateway")
    os.kill(controller or 0, signal.SIGKILL)
    eventually(lambda: holder(site.paths.controller_lock) not in (None, controller), "another controller")
    assert site.ready("a-0") == engine
    assert complete(port)
    said = site.log.read_text()
    assert "the gateway ended (killed by SIGKILL)" in said
    assert "the controller ended (killed by SIGKILL)" in said
    process.terminate()
    assert process.wait(30) == 0


def test_down_stops_whatever_is_left(site: Site, eventually: Eventually, port: int) -> None:
    site.write(A, gateway={"listen": f"127.0.0.1:{port}"})
    process = up(site, eventually, port)
    engine, gateway = site.ready("a-0"), gateway_pid(site)
    controller = holder(site.paths.controller_lock) or 0
    for pid in (process.pid, controller):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    site.log.write_text("")
    assert site.run("down", str(site.config), "--json").wait(30) == 0
    assert json.loads(site.log.read_text()) == {"stopped": ["gateway", "a-0"]}
    eventually(lambda: not any(psutil.pid_exists(p) for p in (engine, gateway)), "all of it has ended")
    site.log.write_text("")
    assert site.run("down", str(site.config)).wait(30) == 0
    assert "nothing was running" in site.log.read_text()


def test_down_asks_up_itself_where_it_runs(site: Site, eventually: Eventually, port: int) -> None:
    site.write(A, gateway={"listen": f"127.0.0.1:{port}"})
    process = up(site, eventually, port)
    assert site.run("down", str(site.config), "--json").wait(30) == 0
    assert process.wait(30) == 0
    assert '"up"' in site.log.read_text()


def test_a_new_configuration_reaches_both_and_a_wrong_one_neither(
    site: Site, eventually: Eventually, port: int
) -> None:
    site.write(A, gateway={"listen": f"127.0.0.1:{port}"})
    process = up(site, eventually, port)
    site.config.write_text("version: v1\nmodles: []\n")
    process.send_signal(signal.SIGHUP)
    eventually(lambda: (s := site.status()) and s.refused, "the refusal")
    assert complete(port)
    site.write(A, B, gateway={"listen": f"127.0.0.1:{port}"})
    process.send_signal(signal.SIGHUP)
    site.wait_for("b-0", ReplicaState.READY)
    eventually(lambda: {m["id"] for m in ask(port)["data"]} == {"a", "b"}, "both models")
    process.terminate()
    assert process.wait(30) == 0
