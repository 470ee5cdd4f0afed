"""What is said where a cluster cannot be reached, or runs something else. Ray itself is never started."""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from placement.cluster.errors import ClusterUnreachable, NodeMismatch
from placement.cluster.members import Owner
from placement.replicas.procfs import ProcessIdentity

start = pytest.importorskip("placement.cluster.start", exc_type=ImportError)


@pytest.fixture
def answering() -> Iterator[str]:
    """An address where somebody accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def fails_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """Have Ray refuse."""

    def prepare(error: Exception) -> None:
        def init(**_: object) -> None:
            raise error

        monkeypatch.setattr(start.ray, "init", init)

    return prepare


def test_nobody_at_the_address() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # taken, and not listening
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(ClusterUnreachable, match="no cluster answers at") as refused:
            start.connect(address)
    assert "sliceway up CONFIG --ray" in str(refused.value.remedy)


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:", "127.0.0.1:port", ":"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ClusterUnreachable) as refused:
        start.connect(address)
    assert "HOST:PORT" in str(refused.value.remedy)


def test_another_ray_or_python(answering: str, fails_with: Callable[[Exception], None]) -> None:
    fails_with(RuntimeError("Version mismatch: The cluster was started with: Ray: 2.50.0 Python: 3.12.1"))
    with pytest.raises(NodeMismatch, match=r"Ray: 2\.50\.0 Python: 3\.12\.1") as refused:
        start.connect(answering)
    assert "same versions" in str(refused.value.remedy)


def test_somebody_who_is_no_cluster(answering: str, fails_with: Callable[[Exception], None]) -> None:
    fails_with(ConnectionError("ray client connection timeout"))
    with pytest.raises(ClusterUnreachable, match="ray client connection timeout"):
        start.connect(answering)


def in_a_group(script: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, start_new_session=True)


@pytest.mark.parametrize("ends_first", [True, False])
def test_what_ray_leaves_behind_ends_with_it(ends_first: bool) -> None:
    with in_a_group(f"sleep 600 & echo begun; {'exit 1' if ends_first else 'sleep 600'}") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        if ends_first:
            process.wait()
        start.end_group(process)
        assert process.stdout.read() == b""  # the end of the pipe: nobody is left who holds it


def test_what_does_not_end_in_time_is_killed() -> None:
    with in_a_group("trap '' TERM; echo begun; while :; do sleep 600; done") as process:
        assert process.stdout is not None
        process.stdout.readline()
        start.end_group(process, patience_seconds=0.05)
        assert process.returncode == -signal.SIGKILL


def a_machine(tmp_path: Path) -> Any:
    return start.Machine("n1", "127.0.0.1", tmp_path, {}, (), None)


def recorded(tmp_path: Path, process: subprocess.Popen[bytes], *, later: int = 0) -> Path:
    identity = ProcessIdentity.of(process.pid)
    assert identity is not None
    path = tmp_path / "raylet.json"
    owner = Owner(pid=identity.pid, start_ticks=identity.start_ticks + later, boot_id=identity.boot_id)
    path.write_text(owner.model_dump_json(), encoding="utf-8")
    return path


def test_ray_that_a_killed_process_has_left_is_ended(tmp_path: Path) -> None:
    with in_a_group("sleep 600 & echo begun; sleep 600") as process:
        assert process.stdout is not None
        process.stdout.readline()
        record = recorded(tmp_path, process)
        start.end_leftover(a_machine(tmp_path))
        assert process.stdout.read() == b""  # nobody of the group is left
        assert not record.exists()


def test_another_process_of_that_pid_is_left_alone(tmp_path: Path) -> None:
    with in_a_group("echo begun; exec sleep 600") as process:
        assert process.stdout is not None
        process.stdout.readline()
        recorded(tmp_path, process, later=1)
        start.end_leftover(a_machine(tmp_path))
        assert process.poll() is None
        start.end_group(process)


@pytest.mark.parametrize("content", ["", "{}", "[]"])
def test_a_record_of_ray_that_makes_no_sense_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "raylet.json").write_text(content, encoding="utf-8")
    start.end_leftover(a_machine(tmp_path))


def test_what_ray_said_last_is_told_without_colours(tmp_path: Path) -> None:
    log = tmp_path / "ray.log"
    log.write_text("first\n\x1b[36m\x1b[1m--block\x1b[22m\x1b[39m\n\x1b[0m\n", encoding="utf-8")
    left = SimpleNamespace(ended=True, address="127.0.0.1:1", _log=log)
    left._last_words = lambda: start.Raylet._last_words(left)
    with pytest.raises(ClusterUnreachable, match="this machine could not join") as refused:
        start.Raylet.wait_until_joined(left, "node", threading.Event())
    assert refused.value.message.endswith("127.0.0.1:1: --block")


def test_who_is_to_stop_waits_for_no_cluster() -> None:
    stop = threading.Event()
    left = SimpleNamespace(ended=False, address="127.0.0.1:1", _connect=lambda event: event.set())
    assert start.Raylet.wait_until_joined(left, "node", stop) is False
