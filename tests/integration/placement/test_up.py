"""`sliceway up` and `down` as an operator meets them, with simulated engines."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import urllib.request
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from gateway.cli import app
from gateway.cli.output import exit_code
from model_registry.errors import SlicewayError
from placement.locks import holder
from placement.table import ReplicaState

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

Site = Any
Eventually = Callable[..., Any]
A, B = {"name": "a"}, {"name": "b"}


def ask(port: int, path: str = "/v1/models") -> Any:
    """The gateway's answer; None while there is none."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as response:
            return json.load(response)
    except (OSError, ValueError):
        return None


def complete(port: int) -> str:
    body = json.dumps({"model": "a", "prompt": "hello", "max_tokens": 3}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return str(json.load(response)["choices"][0]["text"])


def gateway_pid(site: Site) -> int:
    return int(json.loads(site.paths.up_record.read_text(encoding="utf-8"))["processes"]["gateway"]["pid"])


def up(site: Site, eventually: Eventually, port: int, *more: str) -> Any:
    process = site.run("up", str(site.config), *more)
    eventually(
        lambda: "serving" in site.log.read_text(encoding="utf-8") or process.poll() is not None,
        "up serves",
        seconds=100,
    )
    assert process.poll() is None, site.said()
    return process


# ---- what is said before anything starts


def refused(site: Site, *more: str) -> SlicewayError:
    """What `sliceway up` says of a configuration that cannot work; nothing may have been started."""
    result = CliRunner().invoke(app, ["up", str(site.config), "--once", *more])
    assert isinstance(result.exception, SlicewayError), result.output
    assert holder(site.paths.controller_lock) is None
    assert not site.paths.up_record.exists()
    return result.exception


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"models": [{"name": "a", "source": "x", "replicas": 9}]}, 1, "no slice is left for 'a-"),
        ({"models": [{"name": "a", "source": "/no/such/directory"}], "engine": {}}, 2, "/no/such/directory"),
        ({"models": [{"name": "a", "source": "x", "slices": ["cpu-7"]}]}, 1, "there is no slice 'cpu-7'"),
        ({"engine": {"command": ["x"]}}, 2, "{uds}"),
        ({"fleet": {"cpu": {"memory": "10 apples"}}}, 2, "apples"),
        ({"fleet": {"slices": [{"kind": "cpu", "cores": "900"}]}}, 2, "cores 900 are not this process's to use"),
        ({"modles": []}, 2, "models"),
    ],
)
def test_what_cannot_work_is_said(site: Site, port: int, change: dict[str, Any], code: int, words: str) -> None:
    site.write(A, gateway={"listen": f"127.0.0.1:{port}"})
    site.config.write_text(json.dumps(json.loads(site.config.read_text(encoding="utf-8")) | change), encoding="utf-8")
    error = refused(site)
    assert words in str(error)
    assert error.remedy
    assert exit_code(error) == code


def test_a_port_in_use_is_said(site: Site) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        site.write(A, gateway={"listen": f"127.0.0.1:{taken.getsockname()[1]}"})
        assert "another process listens there" in refused(site).message
        assert "--listen" in refused(site, "--listen", "nonsense").where


# ---- its life


def test_it_serves_alone_takes_new_configurations_and_leaves_nothing(
    site: Site, eventually: Eventually, port: int
) -> None:
    site.write(A, gateway={"listen": f"127.0.0.1:{port}"})
    process = up(site, eventually, port)
    assert complete(port)

    second = site.run("up", str(site.config))
    assert second.wait(100) == 1
    assert f"pid {process.pid}" in site.log.read_text(encoding="utf-8")

    site.config.write_text("version: v1\nmodles: []\n", encoding="utf-8")
    process.send_signal(signal.SIGHUP)
    eventually(lambda: (s := site.status()) and s.refused, "the refusal")
    assert complete(port)

    site.write(A, B, gateway={"listen": f"127.0.0.1:{port}"})
    process.send_signal(signal.SIGHUP)
    site.wait_for("b-0", ReplicaState.READY)
    eventually(lambda: {m["id"] for m in ask(port)["data"]} == {"a", "b"}, "both models")

    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 6, "controller, gateway, and two shims with an engine each"
    process.send_signal(signal.SIGINT)
    assert process.wait(100) == 0
    assert not any(p.is_running() for p in family)
    assert ask(port) is None
    said = site.log.read_text(encoding="utf-8")
    for words in ("a-0 on cpu-0: ready", "serving a on http://127.0.0.1", "a-0 on cpu-0: draining", "stopped"):
        assert words in said


def test_whatever_is_killed_comes_back_without_the_engines_noticing(
    site: Site, eventually: Eventually, port: int
) -> None:
    site.write(A, gateway={"listen": f"127.0.0.1:{port}"})
    first = up(site, eventually, port)
    engine, gateway, controller = site.ready("a-0"), gateway_pid(site), holder(site.paths.controller_lock)
    first.kill()
    first.wait()
    assert complete(port), "nothing that serves needs `up`"
    site.log.write_text("", encoding="utf-8")
    second = up(site, eventually, port)
    assert (gateway_pid(site), holder(site.paths.controller_lock)) == (gateway, controller)
    assert "going on with it" in site.log.read_text(encoding="utf-8")

    site.config.write_text("version: v1\nmodles: []\n", encoding="utf-8")  # also while the configuration is wrong
    os.kill(gateway, signal.SIGKILL)
    eventually(lambda: gateway_pid(site) != gateway and ask(port), "another gateway")
    os.kill(controller or 0, signal.SIGKILL)
    eventually(lambda: holder(site.paths.controller_lock) not in (None, controller), "another controller")
    eventually(lambda: site.status() and complete(port), "it serves")
    assert site.ready("a-0") == engine
    said = site.log.read_text(encoding="utf-8")
    assert "the gateway ended" in said
    assert "the controller ended" in said

    site.write(A, gateway={"listen": f"127.0.0.1:{port}"})
    assert site.run("down", str(site.config), "--json").wait(100) == 0
    assert second.wait(100) == 0
    assert '"up"' in site.log.read_text(encoding="utf-8")
    assert not psutil.pid_exists(engine)


def test_down_stops_whatever_is_left(site: Site, eventually: Eventually, port: int) -> None:
    site.write(A, gateway={"listen": f"127.0.0.1:{port}"})
    process = up(site, eventually, port)
    engine, gateway = site.ready("a-0"), gateway_pid(site)
    controller = holder(site.paths.controller_lock) or 0
    for pid in (process.pid, controller):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    down = ["down", str(site.config)]
    assert json.loads(CliRunner().invoke(app, [*down, "--json"]).output) == {"stopped": ["gateway", "a-0"]}
    eventually(lambda: not any(psutil.pid_exists(p) for p in (engine, gateway)), "all of it has ended")
    assert "nothing was running" in CliRunner().invoke(app, down).output


def test_what_fits_is_served_if_the_operator_says_so_and_failures_fail_a_test_run(site: Site, port: int) -> None:
    site.write(
        A | {"engine_args": ["--die", "OSError: no weights"]},
        B,
        slices=1,
        gateway={"listen": f"127.0.0.1:{port}"},
    )
    assert "no slice is left" in refused(site).message
    assert site.run("up", str(site.config), "--once", "--partial").wait(100) == 1
    said = site.log.read_text(encoding="utf-8")
    for words in (
        "left out: b-0: no slice is left",
        "a-0 on cpu-0: failed",
        "OSError: no weights",
        "no replica serves",
        "Its log:",
    ):
        assert words in said


def test_once_is_a_test_of_the_configuration(site: Site, port: int) -> None:
    site.write(A, gateway={"listen": f"127.0.0.1:{port}"})
    assert site.run("up", str(site.config), "--once", "--json").wait(100) == 0
    events = [json.loads(line) for line in site.log.read_text(encoding="utf-8").splitlines()]
    states = [e["state"] for e in events if e["event"] == "replica"]
    assert {"starting", "ready"} <= set(states)


# ---- upgrades


def test_gateway_and_controller_are_replaced_while_requests_run(site: Site, eventually: Eventually, port: int) -> None:
    site.write(A, gateway={"listen": f"127.0.0.1:{port}", "keep_alive_seconds": 1})
    process = up(site, eventually, port)
    engine, before = site.ready("a-0"), json.loads(site.paths.up_record.read_text(encoding="utf-8"))["processes"]
    stop, answers = threading.Event(), []

    def ask_on() -> None:
        while not stop.is_set():
            try:
                answers.append(complete(port))
            except OSError as error:
                answers.append(repr(error))

    asking = threading.Thread(target=ask_on)
    asking.start()
    try:
        done = CliRunner().invoke(app, ["upgrade", str(site.config), "--json"], catch_exceptions=False)
    finally:
        stop.set()
        asking.join()
    replaced = json.loads(done.stdout)["replaced"]
    assert {name: old for name, (old, _) in replaced.items()} == {name: row["pid"] for name, row in before.items()}
    assert set(answers) == {"x"}, "no request has failed"
    assert site.ready("a-0") == engine, "engines run on"
    eventually(lambda: not psutil.pid_exists(before["gateway"]["pid"]), "the gateway before has ended")
    assert complete(port) == "x"
    process.send_signal(signal.SIGINT)
    assert process.wait(90) == 0
    assert not psutil.pid_exists(engine)


def test_what_is_not_up_is_not_upgraded(site: Site) -> None:
    site.write(A)
    with pytest.raises(SlicewayError, match="does not run here"):
        CliRunner().invoke(app, ["upgrade", str(site.config)], catch_exceptions=False, standalone_mode=False)
