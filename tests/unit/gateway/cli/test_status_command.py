from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from rich.console import Console

from gateway.cli.status import _without_slice, base_url, duration, look, render
from gateway.config import Config
from gateway.generations import Announcements
from placement.cluster.node import NodePaths
from placement.locks import exclusive
from placement.state import StatePaths
from placement.status import ClusterScaling, ControllerStatus, RepartitionStatus, write_status


def shown(seen: dict[str, Any], *, tenants: bool = False) -> str:
    console = Console(width=240, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    with console.file:
        console.print(render(seen, "5m", tenants))
        return console.export_text()


def windows(p50: float | None) -> dict[str, Any]:
    return {
        "5m": {
            m: {"p50": p50, "p99": p50, "count": 0 if p50 is None else 3}
            for m in ("ttft_seconds", "itl_seconds", "e2e_seconds", "queue_seconds")
        }
    }


def seen(**changes: Any) -> dict[str, Any]:
    row = {
        "slice": {"id": "cpu-0", "kind": "cpu"},
        "model": "m",
        "replica": "m-0",
        "state": "ready",
        "windows": windows(0.0123),
        "tenants": {"acme": {"windows": windows(1.5)}},
        "reason": None,
        "stage": None,
    }
    return {
        "gateway": {
            "running": True,
            "url": "http://h:1",
            "ready": True,
            "draining": False,
            "generation": 4,
            "problems": [],
        },
        "controller": {"running": True, "state": "running", "pid": 7, "generation": 4, "unplaced": {}, "refused": None},
        "slices": [row],
    } | changes


def test_everything_is_on_one_line_per_slice() -> None:
    line = next(line for line in shown(seen()).splitlines() if line.startswith("cpu-0"))
    assert line.split() == ["cpu-0", "cpu", "m", "m-0", "ready", *["12.3ms/12.3ms"] * 4, "3"]
    assert "tenant acme" not in shown(seen())
    assert "1.5s/1.5s" in shown(seen(), tenants=True)


def test_what_does_not_run_is_said_plainly() -> None:
    gateway = {"running": False, "url": "http://h:1", "problem": "http://h:1/readyz does not answer: refused"}
    controller = {
        "running": False,
        "state": None,
        "pid": None,
        "generation": None,
        "unplaced": {"m-1": {"message": "no [slice] fits"}},
        "refused": None,
    }
    text = shown(seen(gateway=gateway, controller=controller, slices=[]))
    assert "gateway    is not running" in text
    assert "controller is not running" in text
    assert "m-1: no [slice] fits" in text
    assert "no slices are known" in text


def test_what_demand_asks_for_is_told_with_what_finds_no_slice() -> None:
    row = {"replicas": 1, "least": 0, "most": 1, "reason": "a request wakes it", "short": 1}
    controller = seen()["controller"] | {"scaling": {"m": row}}
    text = shown(seen(controller=controller))
    assert "m: 1 replica of 0 to 1: a request wakes it; 1 finds no free slice" in text


def test_reasons_and_stages_are_shown_as_they_are() -> None:
    row = seen()["slices"][0] | {
        "state": "backoff",
        "reason": "ValueError: [x] too long\nsecond line",
        "stage": "loading weights",
        "windows": {},
    }
    text = shown(seen(slices=[row]))
    assert "backoff (loading weights)" in text
    assert "ValueError: [x] too long" in text
    assert "second line" not in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0.00085, "0.85ms"),
        (0.0123, "12.3ms"),
        (0.9994, "999ms"),
        (0.9999, "1s"),
        (1.5, "1.5s"),
        (75.04, "75s"),
    ],
)
def test_durations_have_three_figures(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


class Ready(BaseHTTPRequestHandler):
    """A gateway without a slice."""

    def do_GET(self) -> None:
        body = b'{"ready": true, "generation": 4}' if self.path == "/readyz" else b"[]"
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serving() -> Iterator[str]:
    """Where such a gateway listens."""
    with HTTPServer(("127.0.0.1", 0), Ready) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_gateway_that_runs_is_found_where_it_listens(
    tmp_path: Path, serving: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`up --listen` serves at another address than the configuration names."""
    monkeypatch.setattr(sys.modules[look.__module__], "HTTP_SECONDS", 60.0)  # however slow this machine is
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{deaf.getsockname()[1]}"
        config = Config.model_validate(
            {"version": "v1", "state_dir": str(tmp_path), "gateway": {"listen": listen}, "models": []}
        )
        announced = Announcements(StatePaths(config.state).gateways, listen=serving)
        announced.write(config, 0)
        found = look(config)["gateway"]
        assert (found["running"], found["url"], found["generation"]) == (True, f"http://{serving}", 4)
        announced.remove()
        found = look(config)["gateway"]
        assert (found["running"], found["url"]) == (False, f"http://{listen}")
        assert listen in found["problem"]


def test_a_node_of_a_cluster_shows_its_own_gateway_and_controller(
    tmp_path: Path, serving: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They work in the node's directory, not in the one of the configuration."""
    monkeypatch.setattr(sys.modules[look.__module__], "HTTP_SECONDS", 60.0)
    config = Config.model_validate(
        {"version": "v1", "state_dir": str(tmp_path), "gateway": {"listen": "127.0.0.1:1"}, "models": []}
    )
    paths = NodePaths(tmp_path / "nodes" / "n1")
    Path(paths.engines.root).mkdir(parents=True)
    Path(paths.gateway.root).mkdir()
    Announcements(paths.gateway.gateways, listen=serving).write(config, 0)
    at = datetime(2026, 1, 1, tzinfo=UTC)
    status = ControllerStatus(pid=os.getpid(), started_at=at, updated_at=at, state="running", config="c", generation=3)
    write_status(status, paths.engines.controller_status)
    told = ClusterScaling(repartition=RepartitionStatus(proposed="2 requests/s more"))
    paths.gateway.cluster_scaling.write_text(told.model_dump_json(), encoding="utf-8")
    with exclusive(paths.root / "member.lock", what="node", remedy=""):
        found = look(config)
    assert "GPUs anew for demand is proposed: 2 requests/s more" in shown(found)
    assert (found["node"], found["gateway"]["url"]) == ("n1", f"http://{serving}")
    assert (found["controller"]["running"], found["controller"]["generation"]) == (True, 3)
    assert "n1 of a cluster" in shown(found)
    assert look(config)["node"] is None


def test_what_has_no_slice_in_a_cluster_is_told_as_gateways_know_it() -> None:
    told = _without_slice({"models": {"m": {"unplaced": {"m-1": "no slice is free"}}, "n": {"unplaced": None}}})
    assert told == {"m-1": {"message": "no slice is free"}}
    assert _without_slice(None) == {}
    down = seen()["controller"] | {"running": False}
    assert "(the node's agent starts it)" in shown(seen(node="n1", controller=down))


@pytest.mark.parametrize(
    ("listen", "url"),
    [
        ("127.0.0.1:80", "http://127.0.0.1:80"),
        ("0.0.0.0:8080", "http://127.0.0.1:8080"),
        ("[::]:8080", "http://[::1]:8080"),
        ("host:1", "http://host:1"),
    ],
)
def test_a_wildcard_is_reached_on_this_machine(listen: str, url: str) -> None:
    assert base_url(listen) == url
