"""The controller as a process, with engines that are processes: ends, restarts, adoption, new configurations."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from gateway.cli import app
from model_registry.errors import ConfigError
from placement.table import ReplicaState

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

Site = Any  # the fixture's class lives in conftest.py, which cannot be imported
SCRIPT = ["{python}", str(Path(__file__).with_name("script_engine.py")), "{uds}"]
A, B = {"name": "a"}, {"name": "b"}
Eventually = Callable[..., Any]


def test_engines_get_ready_on_slices_of_their_own_and_a_stop_leaves_nothing(site: Site, eventually: Eventually) -> None:
    site.write(A, B | {"task": "embed", "engine_args": ["--task", "embed"]})
    controller = site.controller()
    pids = [site.ready("a-0"), site.ready("b-0")]
    table = site.table()
    assert {r.replica: r.slice.id for r in table.replicas} == {"a-0": "cpu-0", "b-0": "cpu-1"}
    assert {m.name: m.task for m in table.models} == {"a": "generate", "b": "embed"}
    for replica in table.replicas:
        path = Path(replica.endpoint.removeprefix("unix:"))
        assert path.stat().st_mode & 0o777 == 0o600
    family = psutil.Process(controller.pid).children(recursive=True)
    assert len(family) >= 4
    controller.terminate()
    assert controller.wait(60) == 0
    eventually(lambda: not any(p.is_running() for p in family), "all of it has ended")
    assert not any(psutil.pid_exists(pid) for pid in pids)
    after = site.table()
    assert after.replicas == ()
    assert {s.id for s in after.idle} == {"cpu-0", "cpu-1"}
    assert after.generation > table.generation
    assert list(site.paths.runtime(os.environ).iterdir()) == []
    assert site.status() is None


def test_a_killed_engine_is_started_again_and_the_other_one_left_alone(site: Site) -> None:
    site.write(A, B)
    site.controller()
    first, other = site.ready("a-0"), site.ready("b-0")
    os.kill(first, signal.SIGKILL)
    assert site.ready("a-0", other_than=first) != first
    assert site.ready("b-0") == other
    assert site.replica("a-0").restarts == 1


def test_an_engine_that_keeps_dying_is_given_up_with_its_own_last_words(site: Site) -> None:
    site.write(A, B | {"engine_args": ["--die", "ValueError: the weights are upside down"]})
    site.controller()
    failed = site.wait_for("b-0", ReplicaState.FAILED)
    assert "ValueError: the weights are upside down" in failed.reason
    assert failed.restarts == 2, "three starts"
    site.ready("a-0")
    (row,) = [r for r in site.table().replicas if r.replica == "b-0"]
    assert (row.state, row.reason) == (ReplicaState.FAILED, failed.reason)


def test_a_killed_controller_loses_nothing(site: Site, eventually: Eventually) -> None:
    site.write(A, B)
    controller = site.controller()
    pids = [site.ready("a-0"), site.ready("b-0")]
    before = site.table()
    second = site.run("controller", str(site.config))
    assert second.wait(60) == 1
    assert f"pid {controller.pid}" in site.said(), "there is one already"

    controller.kill()
    controller.wait()
    assert all(psutil.pid_exists(pid) for pid in pids)
    assert site.table() == before, "what gateways read stays"
    successor = site.controller()
    eventually(lambda: (s := site.status()) and s.pid == successor.pid and s.settled, "the next controller is at work")
    assert [site.ready("a-0"), site.ready("b-0")] == pids
    assert all(site.replica(r).adopted for r in ("a-0", "b-0"))
    assert site.table().ready("a")
    assert site.table().generation >= before.generation

    successor.kill()
    successor.wait()
    os.kill(pids[0], signal.SIGKILL)
    third = site.controller()
    assert site.ready("a-0", other_than=pids[0])
    assert site.ready("b-0") == pids[1]
    assert "ended while no controller ran: killed by SIGKILL" in site.said()
    third.terminate()
    assert third.wait(60) == 0
    assert not psutil.pid_exists(pids[1])


# ---- new configurations


def test_models_are_added_changed_and_removed_while_others_run(site: Site, eventually: Eventually) -> None:
    site.write(A, B)
    controller = site.controller()
    a, b = site.ready("a-0"), site.ready("b-0")
    site.write(A, {"name": "c"})
    controller.send_signal(signal.SIGHUP)
    c = site.ready("c-0")
    assert site.ready("a-0") == a
    assert not psutil.pid_exists(b)
    assert not site.paths.replica("b-0").exists()
    site.write(A, {"name": "c", "engine_args": ["--itl-seconds", "0.01"]})
    controller.send_signal(signal.SIGHUP)
    assert site.ready("c-0", other_than=c)
    assert site.ready("a-0") == a, "nothing about it has changed"
    site.write()
    controller.send_signal(signal.SIGHUP)
    eventually(lambda: not site.table().replicas and not psutil.pid_exists(a), "everything was taken out")


def test_a_wrong_configuration_changes_nothing_and_says_so(site: Site, eventually: Eventually) -> None:
    site.write(A)
    controller = site.controller()
    pid = site.ready("a-0")
    generation = site.table().generation
    site.write(A | {"replicas": 40})
    too_many = site.config.read_text(encoding="utf-8")
    for wrong, words in (
        ("version: v1\nmodles: []\n", "models"),
        ("version: [", ""),
        (too_many, "no slice is left for 'a-"),
    ):
        before = site.status().refused
        site.config.write_text(wrong, encoding="utf-8")
        controller.send_signal(signal.SIGHUP)
        refused = eventually(
            lambda before=before: (s := site.status()) and s.refused != before and s.refused, "the refusal"
        )
        assert words in f"{refused.error.message} {refused.error.remedy}"
        assert site.ready("a-0") == pid
        assert site.table().generation == generation

    controller.kill()
    controller.wait()
    site.config.write_text("version: v7\n", encoding="utf-8")
    successor = site.controller()
    own = successor.pid
    refused = eventually(
        lambda: (s := site.status()) and s.pid == own and s.refused, "the refusal of one that starts with it"
    )
    assert "version" in f"{refused.error.where} {refused.error.message}"
    assert site.ready("a-0") == pid
    site.write(A)
    successor.send_signal(signal.SIGHUP)
    eventually(lambda: (s := site.status()) and s.refused is None, "a right one is taken over")
    assert site.ready("a-0") == pid


def test_a_first_configuration_that_is_wrong_is_refused(site: Site) -> None:
    site.config.write_text(f"version: v1\nstate_dir: {site.paths.root}\nmodles: []\n", encoding="utf-8")
    result = CliRunner().invoke(app, ["controller", str(site.config), "--state-dir", str(site.paths.root)])
    assert isinstance(result.exception, ConfigError)
    assert "modles" in str(result.exception)


def test_a_failed_replica_is_tried_again_when_the_operator_says_so(site: Site, tmp_path: Path) -> None:
    marker = tmp_path / "mended"
    shell = f'test -e {marker} || {{ echo "OSError: no such disk" >&2; exit 1; }}; exec "$@"'
    command = [
        "/bin/sh",
        "-c",
        shell,
        "sh",
        "{python}",
        "-m",
        "placement.fake_engine",
        "--uds",
        "{uds}",
        "--model",
        "{served_name}",
    ]
    site.write(A, command=command)
    controller = site.controller()
    assert "no such disk" in site.wait_for("a-0", ReplicaState.FAILED).reason
    marker.touch()
    controller.send_signal(signal.SIGHUP)
    site.ready("a-0")


# ---- memory, health


def test_more_memory_than_the_slice_has_is_out_of_memory(site: Site) -> None:
    site.write(A, memory="100MiB", command=[*SCRIPT, "--eat", "300"], restart={"max_fast_failures": 1})
    site.controller()
    failed = site.wait_for("a-0", ReplicaState.FAILED)
    assert "of memory; its slice has 0.10 GiB" in failed.reason
    assert "sliceway size" in failed.remedy


def test_a_frozen_engine_is_replaced(site: Site) -> None:
    site.write(A, liveness={"interval_seconds": 0.1, "timeout_seconds": 0.2, "failures": 2})
    site.controller()
    pid = site.ready("a-0")
    os.kill(pid, signal.SIGSTOP)
    assert site.ready("a-0", other_than=pid)


def test_an_engine_without_sockets_is_reached_on_loopback(site: Site) -> None:
    command = ["{python}", "-m", "placement.fake_engine", "--port", "{port}", "--model", "{served_name}"]
    site.write(A, transport="tcp", command=command)
    site.controller()
    pid = site.ready("a-0")
    assert site.table().replicas[0].endpoint.startswith("http://127.0.0.1:")
    assert {c.laddr.ip for c in psutil.Process(pid).net_connections("inet")} == {"127.0.0.1"}


# ---- one slice at a time


def test_a_new_way_to_start_replaces_one_replica_after_another(site: Site, eventually: Eventually) -> None:
    site.write(A | {"replicas": 2})
    controller = site.controller()
    before = [site.ready("a-0"), site.ready("a-1")]
    site.write(A | {"replicas": 2, "engine_args": ["--seed", "1"]})
    controller.send_signal(signal.SIGHUP)
    tables = []

    def replaced() -> bool:
        tables.append(site.table())
        rows = [site.replica(r) for r in ("a-0", "a-1")]
        return all(row and row.state is ReplicaState.READY and row.engine_pid not in before for row in rows)

    eventually(replaced, "two new engines")
    assert all(table.ready("a") for table in tables), "somebody served in every table"
    assert not any(row.outdated for row in site.status().replicas)


def test_a_replacement_that_does_not_start_leaves_the_others_as_they_are(site: Site, eventually: Eventually) -> None:
    site.write(A | {"replicas": 2})
    controller = site.controller()
    site.ready("a-0")
    other = site.ready("a-1")
    site.write(A | {"replicas": 2, "engine_args": ["--die", "no such flag"]})
    controller.send_signal(signal.SIGHUP)
    site.wait_for("a-0", ReplicaState.FAILED)
    row = site.replica("a-1")
    assert (row.state, row.engine_pid, row.outdated) == (ReplicaState.READY, other, True)
    eventually(lambda: "failed; the others go on by the last" in " ".join(site.status().notes), "why")

    # Another controller finds the engine of the earlier configuration, which goes on until the right one comes.
    controller.kill()
    controller.wait()
    successor = site.controller()
    eventually(lambda: (s := site.status()) and s.pid == successor.pid, "another controller")
    assert site.ready("a-1") == other
    site.write(A | {"replicas": 2, "engine_args": ["--seed", "2"]})
    successor.send_signal(signal.SIGHUP)
    assert site.ready("a-1", other_than=other)
    site.ready("a-0")


def told_of(site: Site, *arguments: str) -> tuple[subprocess.Popen[bytes], int]:
    """A controller that has `a-0` and was told to start it with these arguments from here on, and the engine that serves."""
    site.write(A)
    controller = site.controller()
    engine = site.ready("a-0")
    site.write(A | {"engine_args": list(arguments)})
    controller.send_signal(signal.SIGHUP)
    return controller, engine


def test_where_a_slice_is_free_the_new_one_serves_before_the_old_one_ends(site: Site, eventually: Eventually) -> None:
    controller, old = told_of(site, "--seed", "1")
    tables = []

    def replaced() -> bool:
        tables.append(site.table())
        return not site.replica("a-0") and not psutil.pid_exists(old)

    new = site.ready("a-1")
    eventually(replaced, "the old one has ended")
    assert all(table.ready("a") for table in tables)
    assert [(r.replica, r.slice.id) for r in site.table().replicas] == [("a-1", "cpu-1")]
    assert not site.paths.replica("a-0").exists()

    # The name is kept by whatever comes then: another controller, and the same configuration again.
    controller.kill()
    controller.wait()
    successor = site.controller()
    eventually(lambda: (s := site.status()) and s.pid == successor.pid and s.settled, "another controller")
    assert site.ready("a-1") == new
    successor.send_signal(signal.SIGHUP)
    site.write(A | {"engine_args": ["--seed", "2"]})
    successor.send_signal(signal.SIGHUP)
    site.ready("a-0")
    eventually(lambda: not site.replica("a-1"), "back and forth")


def test_a_successor_that_does_not_start_leaves_the_old_one_serving(site: Site, eventually: Eventually) -> None:
    controller, old = told_of(site, "--die", "no such flag")
    assert "no such flag" in site.wait_for("a-1", ReplicaState.FAILED).reason
    assert site.ready("a-0") == old
    assert site.table().ready("a")
    site.write(A)
    controller.send_signal(signal.SIGHUP)
    eventually(lambda: not site.replica("a-1"), "what is asked for runs already")
    assert site.ready("a-0") == old


def test_a_controller_killed_between_the_two_goes_on(site: Site, eventually: Eventually) -> None:
    controller, old = told_of(site, "--take", "1.5")
    site.wait_for("a-1", ReplicaState.STARTING)
    controller.kill()
    controller.wait()
    assert psutil.pid_exists(old)
    started = site.entry("a-1").engine_pid
    successor = site.controller()
    assert site.ready("a-1") == started, "the one that was begun"
    eventually(lambda: (s := site.status()) and s.pid == successor.pid and s.settled, "all of it")
    assert [r.replica for r in site.table().replicas] == ["a-1"]
