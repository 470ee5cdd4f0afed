"""Sleep mode with the real processes: a model without requests sleeps in its place, and the first request wakes it."""

from __future__ import annotations

import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from placement.table import ReplicaState

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

Site = Any  # the fixture's class lives in conftest.py, which cannot be imported
Eventually = Callable[..., Any]

ENGINE = ["{python}", "-m", "placement.fake_engine", "--uds", "{uds}", "--model", "{served_name}"]
SLEEPER = [*ENGINE, "--enable-sleep-mode", "--sleep-seconds", "0.05", "--wake-seconds", "0.1"]


def serve(site: Site, eventually: Eventually, port: int, *flags: str) -> None:
    site.write(
        {"name": "a", "replicas": {"min": 0, "max": 2}},
        gateway={"listen": f"127.0.0.1:{port}"},
        drain_timeout_seconds=1,
        command=[*SLEEPER, *flags],
        environment={"VLLM_SERVER_DEV_MODE": "1"},
        liveness={"interval_seconds": 0.2},
    )
    site.scale_hastily(sleep="sleep-mode")
    site.run("up", str(site.config))
    eventually(
        lambda: ask(port, "/readyz") == 200, f"a model that can be woken counts as ready: {site.said()}", seconds=60
    )


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> int:
    """The status; 0 where nobody answers."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            response.read()
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


def complete(port: int) -> int:
    return ask(port, "/v1/completions", {"model": "a", "prompt": "hello", "max_tokens": 3})


def asleep(site: Site) -> int:
    """Wait until the replica sleeps; its engine's pid."""
    pid = site.wait_for("a-0", ReplicaState.ASLEEP, seconds=60).engine_pid
    assert pid is not None
    return int(pid)


def test_it_sleeps_in_its_place_over_a_killed_controller_and_wakes(
    site: Site, eventually: Eventually, port: int
) -> None:
    serve(site, eventually, port)
    assert complete(port) == 200
    engine = asleep(site)
    assert [r.state for r in site.table().replicas] == [ReplicaState.ASLEEP]
    assert "a-0" not in {row.id for row in site.table().idle}
    eventually(lambda: site.status().scaling["a"].sleep == "sleep-mode: autoscale.sleep asks for it", "why it does so")

    for path in ("/sleep?level=1", "/wake_up", "/collective_rpc", "/reset_prefix_cache"):
        assert ask(port, path, {}) == 404, "what engines offer to their owner is nothing for clients"
    assert ask(port, "/is_sleeping") == 404
    assert asleep(site) == engine

    os.kill(site.status().pid, signal.SIGKILL)
    eventually(lambda: (r := site.replica("a-0")) and r.adopted and r.state is ReplicaState.ASLEEP, "adopted asleep")
    assert complete(port) == 200
    assert site.replica("a-0").engine_pid == engine, "the same process, which may sleep again by now"


def test_an_engine_that_does_not_wake_is_started_anew(site: Site, eventually: Eventually, port: int) -> None:
    serve(site, eventually, port, "--wake-fails")
    assert complete(port) == 200
    engine = asleep(site)
    assert complete(port) == 200, "whoever woke it waits for the restart"
    again = site.replica("a-0")
    assert again is None or again.engine_pid != engine, "it may have been stopped by now"
    eventually(lambda: site.table().replicas == (), f"stopped the next time: {site.said()}", seconds=60)
    assert "did not wake" in site.status().scaling["a"].sleep or "no sleep mode" in site.status().scaling["a"].sleep
