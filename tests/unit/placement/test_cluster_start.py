"""What is said where a cluster cannot be reached, or runs something else. Ray itself is never started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from placement.cluster.errors import ClusterUnreachable, NodeMismatch, SliceHeld, TokenRefused
from placement.cluster.members import Owner
from placement.cluster.ray_words import kept_from_terminal
from placement.replicas.procfs import ProcessIdentity

start = pytest.importorskip("placement.cluster.start", exc_type=ImportError)
ray = pytest.importorskip("ray")


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
        monkeypatch.setattr(start, "_introduce", lambda _: None)

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


def test_a_wrong_token_is_told_at_once(answering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> None:
        raise ray.exceptions.AuthenticationError("InvalidAuthToken")

    monkeypatch.setattr(start, "_introduce", refuse)
    monkeypatch.setattr(start.ray, "init", lambda **_: pytest.fail("Ray would try for half a minute"))
    with pytest.raises(TokenRefused, match="does not take the token") as refused:
        start.connect(answering)
    assert refused.value.where == answering
    assert "cluster.token" in str(refused.value.remedy)


def test_what_sigterm_does_is_left_as_it_was(answering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own handler would end the process before its engines."""
    stop = threading.Event()

    def connected(**_: object) -> None:
        signal.signal(signal.SIGTERM, lambda *_: None)

    monkeypatch.setattr(start, "_introduce", lambda _: None)
    monkeypatch.setattr(start.ray, "init", connected)
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        start.connect(answering)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(60)
    finally:
        signal.signal(signal.SIGTERM, before)


class Joining:
    """In the place of a raylet that runs, before whose node's name the books say `units`, one after another; or the books themselves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *units: float | dict[str, float] | Exception) -> None:
        self.ended, self.first, self.address, self.left = False, False, "127.0.0.1:1", list(units)
        self.answers = True
        self._own = "sliceway-join:me"
        self.log = self._log = Path("ray.log")
        self.seconds = 0.0
        monkeypatch.setattr(start.ray, "is_initialized", lambda: True)
        monkeypatch.setattr(start.ray, "cluster_resources", self._resources)
        monkeypatch.setattr(start, "knock", self._knock)
        monkeypatch.setattr(start, "time", SimpleNamespace(monotonic=lambda: self.seconds))

    def _resources(self) -> dict[str, float]:
        found = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        if isinstance(found, Exception):
            raise found
        if isinstance(found, dict):
            return found
        return {"sliceway-node:n1": found, self._own: 1.0} if found else {}

    def _knock(self, address: str) -> None:
        if not self.answers:
            raise ClusterUnreachable(f"no cluster answers at {address}")

    def _connect(self, _: object) -> None:
        pytest.fail("it is connected")

    def last_words(self) -> str:
        return "Ray runtime started."

    def is_set(self) -> bool:
        return False

    def wait(self, seconds: float) -> bool:
        self.seconds += seconds
        return False

    def join(self) -> bool:
        return bool(start.Raylet.wait_until_joined(self, "n1", self))


def test_a_machine_under_the_name_of_one_that_is_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Joining(monkeypatch, 0.0, 1000.0 + 1000.0)
    with pytest.raises(SliceHeld, match="as 'n1' already") as refused:
        one.join()
    assert "--name" in str(refused.value.remedy)
    assert one.seconds >= start.NAME_SECONDS, "one that has lost its power would have been forgotten by then"


def test_a_machine_that_is_not_in_the_books_yet_takes_no_other_one_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"sliceway-node:n1": 1000.0, "sliceway-join:other": 1.0}
    with pytest.raises(SliceHeld, match="as 'n1' already"):
        Joining(monkeypatch, other, other, 1000.0 + 1000.0).join()
    with pytest.raises(ClusterUnreachable, match="could not join"):
        Joining(monkeypatch, other).join()


def test_a_cluster_that_ends_while_a_machine_waits_for_its_name_is_left_before_ray_ends_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = Joining(monkeypatch, 2000.0)
    one.answers = False
    with pytest.raises(ClusterUnreachable, match="could not join the cluster at"):
        one.join()
    assert one.seconds < 60, "so long Ray waits"


def test_a_first_machine_whose_ray_does_not_start_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Joining(monkeypatch, 0.0)
    one.ended = one.first = True
    with pytest.raises(ClusterUnreachable, match="Ray on this machine is not at work: Ray runtime") as refused:
        one.join()
    assert "--token-file" not in str(refused.value.remedy)


def test_what_rays_own_parts_write_is_noted_and_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    with kept_from_terminal(said.append):
        os.write(2, b"gcs_client.cc:210: Unauthenticated\n")
    os.write(2, b"error: in our words\n")
    with kept_from_terminal(said.append):
        pass
    assert said == ["gcs_client.cc:210: Unauthenticated"]
    assert capfd.readouterr().err == "error: in our words\n"


def test_a_machine_whose_earlier_self_is_forgotten_in_time_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Joining(monkeypatch, *[2000.0] * 400, 1000.0)
    assert one.join()
    assert start.START_SECONDS < one.seconds < start.NAME_SECONDS


def test_books_that_nobody_reads_out_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = ray.exceptions.RpcError("no route")
    assert Joining(monkeypatch, gone, 0.0, gone, 1000.0).join()
    with pytest.raises(ClusterUnreachable, match="could not join"):
        Joining(monkeypatch, gone).join()
    with pytest.raises(SliceHeld):
        Joining(monkeypatch, 2000.0, gone).join()


class Agent:
    """In the place of a new agent and of Ray's answers: ready after so many looks, and then this."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, outcome: Any = "{}", *, looks: int = 1) -> None:
        self.looks, self.outcome, self.seconds = looks, outcome, 0.0
        self.report = SimpleNamespace(remote=lambda: self)
        monkeypatch.setattr(start, "start_agent", lambda _: self)
        monkeypatch.setattr(start.ray, "wait", self._wait)
        monkeypatch.setattr(start.ray, "get", self._get)
        monkeypatch.setattr(start, "time", SimpleNamespace(monotonic=lambda: self.seconds))

    def _wait(self, asked: list[Any], *, timeout: float) -> tuple[list[Any], list[Any]]:
        self.looks -= 1
        self.seconds += timeout
        return (asked, []) if self.looks <= 0 else ([], asked)

    def _get(self, _: Any) -> Any:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


def test_an_agent_that_answers_offers_the_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Agent(monkeypatch, looks=3)
    assert start.offer(a_machine(tmp_path), "127.0.0.1:1", threading.Event())


def test_an_agent_that_ray_does_not_start_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = Agent(monkeypatch, looks=10**9)
    with pytest.raises(ClusterUnreachable, match="the agent of node 'n1' does not answer in time"):
        start.offer(a_machine(tmp_path), "127.0.0.1:1", threading.Event())
    assert agent.seconds >= start.PATIENCE_SECONDS
    stop = threading.Event()
    stop.set()
    assert not start.offer(a_machine(tmp_path), "127.0.0.1:1", stop)


@pytest.mark.parametrize(
    "error", [ray.exceptions.RpcError("no route"), ray.exceptions.ActorUnavailableError("gone", None)]
)
def test_what_ray_says_of_an_agent_is_told_in_words(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Agent(monkeypatch, error)
    with pytest.raises(ClusterUnreachable, match="the agent of node 'n1' does not answer: ") as refused:
        start.offer(a_machine(tmp_path), "127.0.0.1:1", threading.Event())
    assert refused.value.where == "127.0.0.1:1"


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
    left = SimpleNamespace(ended=True, first=False, address="127.0.0.1:1", _log=log)
    left.last_words = lambda: start.Raylet.last_words(left)
    with pytest.raises(ClusterUnreachable, match="this machine could not join") as refused:
        start.Raylet.wait_until_joined(left, "node", threading.Event())
    assert refused.value.message.endswith("127.0.0.1:1: --block")


def test_who_is_to_stop_waits_for_no_cluster() -> None:
    stop = threading.Event()
    left = SimpleNamespace(ended=False, address="127.0.0.1:1", _connect=lambda event: event.set())
    assert start.Raylet.wait_until_joined(left, "node", stop) is False
