"""What `sliceway up` shows: on a terminal, in a log, as JSON."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from gateway.cli.live import JsonView, PlainView, TerminalView
from gateway.front import Snapshot
from placement.status import ControllerStatus, ReplicaStatus
from placement.table import ReplicaState, SliceRow

START = datetime(2026, 11, 21, tzinfo=UTC)


class Watch:
    """A clock on the wall that is set by hand."""

    def __init__(self) -> None:
        self.time = START

    def __call__(self) -> datetime:
        return self.time


def replica(name: str = "chat-0", state: ReplicaState = ReplicaState.STARTING, **more: object) -> ReplicaStatus:
    row = {
        "replica": name,
        "model": "chat",
        "slice": SliceRow(id="cpu-0", kind="cpu"),
        "memory_bytes": 2**30,
        "state": state,
    }
    return ReplicaStatus.model_validate({**row, "since": START, "log": f"/state/logs/{name}.log", **more})


def snapshot(
    *replicas: ReplicaStatus, gateway: int | None = 1, notices: tuple[str, ...] = (), stopping: bool = False
) -> Snapshot:
    status = ControllerStatus(
        pid=1, started_at=START, updated_at=START, state="running", config="c.yaml", generation=1, replicas=replicas
    )
    return Snapshot(status, gateway, stopping, notices)


def plain() -> tuple[PlainView, io.StringIO, Watch]:
    written, watch = io.StringIO(), Watch()
    return PlainView(Console(file=written, soft_wrap=True), watch), written, watch


def test_a_log_has_a_line_per_change_and_none_per_percent() -> None:
    view, written, _ = plain()
    for stage in (None, "loading weights 10%", "loading weights 90%", "warming up"):
        view.show(snapshot(replica(stage=stage)))
    view.show(snapshot(replica(state=ReplicaState.READY, engine_pid=7)))
    view.show(snapshot(replica(state=ReplicaState.READY, engine_pid=7)))
    assert written.getvalue().splitlines() == [
        "chat-0 on cpu-0: starting",
        "chat-0 on cpu-0: starting (loading weights 10%)",
        "chat-0 on cpu-0: starting (warming up)",
        "chat-0 on cpu-0: ready (pid 7)",
    ]


def test_a_long_wait_shows_life() -> None:
    view, written, watch = plain()
    view.show(snapshot(replica(stage="loading")))
    watch.time += timedelta(seconds=14)
    view.show(snapshot(replica(stage="loading")))
    watch.time += timedelta(seconds=2)
    view.show(snapshot(replica(stage="loading")))
    assert written.getvalue().splitlines()[1:] == ["waiting for chat-0 (loading, 16 s)"]
    watch.time += timedelta(seconds=20)
    view.show(Snapshot(None, None, stopping=False))
    assert "waiting for the controller" in written.getvalue()


def test_a_failure_comes_with_its_reason_what_to_do_and_its_log() -> None:
    view, written, _ = plain()
    view.show(snapshot(replica(state=ReplicaState.FAILED, reason="exit code 1: [bad]", remedy="Mend it.")))
    assert written.getvalue().splitlines() == [
        "chat-0 on cpu-0: failed",
        "    exit code 1: [bad]",
        "    Mend it.",
        "    Its log: /state/logs/chat-0.log",
    ]


def test_a_restart_says_when() -> None:
    view, written, _ = plain()
    view.show(
        snapshot(replica(state=ReplicaState.BACKOFF, reason="killed by SIGKILL", retry_at=START + timedelta(seconds=2)))
    )
    assert "chat-0 on cpu-0: backoff (again in 2.0 s)" in written.getvalue()


def test_a_reason_is_told_once_for_every_end() -> None:
    view, written, _ = plain()
    for _ in range(2):
        view.show(snapshot(replica(state=ReplicaState.BACKOFF, reason="killed by SIGKILL")))
        view.show(snapshot(replica(reason="killed by SIGKILL", stage="importing vLLM")))
        view.show(snapshot(replica(reason="killed by SIGKILL", stage="setting up")))
        view.show(snapshot(replica(state=ReplicaState.READY)))
    assert written.getvalue().count("killed by SIGKILL") == 2


def test_a_terminal_shows_a_table_until_all_is_settled() -> None:
    written, watch = io.StringIO(), Watch()
    view = TerminalView(Console(file=written, force_terminal=True, width=120, color_system=None), watch)
    view.show(snapshot(replica(stage="loading weights 40%"), notices=("a notice",)))
    view.show(snapshot(replica(state=ReplicaState.READY, memory_used_bytes=2**29)))
    settled = written.getvalue()
    view.show(snapshot(replica(state=ReplicaState.BACKOFF, reason="killed by SIGKILL")))
    view.close()
    assert "a notice" in settled
    assert "loading weights 40%" in settled
    assert "0.5 of 1.0 GiB" in settled
    assert "killed by SIGKILL" in written.getvalue()[len(settled) :]


def test_json_lines_are_the_status_rows(capsys: pytest.CaptureFixture[str]) -> None:
    view = JsonView()
    view.show(snapshot(replica(), notices=("hello",)))
    view.show(snapshot(replica()))
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [e["event"] for e in events] == ["notice", "replica"]
    assert events[1]["slice"]["id"] == "cpu-0"
    assert events[1]["state"] == "starting"


@pytest.mark.parametrize(
    ("one", "settled"),
    [
        (snapshot(replica(state=ReplicaState.READY)), True),
        (snapshot(replica(state=ReplicaState.FAILED)), True),
        (snapshot(), True),
        (snapshot(replica()), False),
        (snapshot(replica(state=ReplicaState.READY), gateway=None), False),
        (snapshot(replica(state=ReplicaState.READY), gateway=0), False),
        (Snapshot(None, 1, stopping=False), False),
    ],
)
def test_settled_means_that_the_gateway_knows_too(one: Snapshot, settled: bool) -> None:
    assert one.settled is settled
