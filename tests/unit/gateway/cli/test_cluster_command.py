"""`sliceway up --ray` and `sliceway node join` where no cluster comes about. Ray itself is never started."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from gateway.admin.operations import Operations
from gateway.admin.overlay import OverlayStore, with_fields
from gateway.cli import app, cluster, leading, member
from gateway.cli.output import exit_code
from gateway.config import load_config
from model_registry.errors import ConfigError
from placement.cluster import processes
from placement.cluster.errors import (
    ClusterError,
    ClusterLed,
    ClusterLost,
    ClusterUnreachable,
    NoAddress,
    NodeMismatch,
    SliceHeld,
)
from placement.cluster.here import LocalNode
from placement.cluster.seats import this_process
from placement.errors import StateLocked
from placement.locks import exclusive

start = pytest.importorskip("placement.cluster.start", exc_type=ImportError)
ray = pytest.importorskip("ray")


class NeverJoins:
    """In the place of Ray on this machine."""

    made: list[NeverJoins]

    def __init__(self, *_: Any, **__: Any) -> None:
        self.address = "127.0.0.1:1"
        self.ended = self.stopped = False
        self.made.append(self)

    def wait_until_joined(self, node: str, _: threading.Event) -> bool:
        raise ClusterUnreachable(f"{node} could not join")

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def raylets(monkeypatch: pytest.MonkeyPatch) -> list[NeverJoins]:
    made = list[NeverJoins]()
    monkeypatch.setattr(NeverJoins, "made", made, raising=False)
    monkeypatch.setattr(start, "Raylet", NeverJoins)
    monkeypatch.setattr(cluster, "check_listen", lambda *_: None)  # somebody may serve on 8080 here
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # what the command sets is taken back
    return made


def configuration(tmp_path: Path) -> Path:
    path = tmp_path / "sliceway.yaml"
    path.write_text(
        f"version: v1\nstate_dir: {tmp_path}/state\nfleet: {{discover: cpu, cpu: {{slices: 1}}}}\n"
        "models: [{name: m, endpoints: ['http://127.0.0.1:9']}]\ntenants: [{name: acme, models: [m]}]\n",
        encoding="utf-8",
    )
    return path


def test_a_cluster_that_does_not_come_up_leaves_nothing_running(raylets: list[NeverJoins], tmp_path: Path) -> None:
    path = configuration(tmp_path)
    error = CliRunner().invoke(app, ["up", str(path), "--ray", "local"]).exception
    assert isinstance(error, ClusterUnreachable), error
    assert [one.stopped for one in raylets] == [True]


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:port"])
def test_a_wrong_address_is_wrong_input_and_starts_nothing(
    address: str, raylets: list[NeverJoins], tmp_path: Path
) -> None:
    error = CliRunner().invoke(app, ["node", "join", address, "--state-dir", str(tmp_path)]).exception
    assert isinstance(error, NoAddress), error
    assert exit_code(error) == 2
    assert raylets == []


@pytest.mark.parametrize(
    ("content", "said"), [(None, "no token here"), ("", "holds no token"), (" \n", "holds no token")]
)
def test_a_token_file_without_a_token_is_wrong_input(
    content: str | None, said: str, raylets: list[NeverJoins], tmp_path: Path
) -> None:
    path = tmp_path / "cluster.token"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    for command in (["list"], ["upgrade"], ["join", "--state-dir", str(tmp_path)]):
        words = ["node", *command, "127.0.0.1:1", "--token-file", str(path)]
        error = CliRunner().invoke(app, words).exception
        assert isinstance(error, ConfigError), error
        assert said in error.message
    assert raylets == []


def machine(tmp_path: Path) -> Any:
    return start.Machine("n1", "127.0.0.1", tmp_path / "n1", {}, (), None)


def test_one_process_is_a_node_at_a_time(tmp_path: Path) -> None:
    with member.alone(machine(tmp_path)):
        holder = os.open(tmp_path / "n1" / "member.lock", os.O_RDWR)
        try:
            with pytest.raises(BlockingIOError):
                fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(holder)
        with (
            pytest.raises(StateLocked, match=rf"'n1' is at work already \(pid {os.getpid()}\)"),
            member.alone(machine(tmp_path)),
        ):
            pass


def test_one_up_works_in_a_state_directory_with_a_cluster_or_without(raylets: list[NeverJoins], tmp_path: Path) -> None:
    path = configuration(tmp_path)
    with exclusive(tmp_path / "state" / "up.lock", what="`sliceway up`", remedy=""):
        error = CliRunner().invoke(app, ["up", str(path), "--ray", "local"]).exception
    assert isinstance(error, StateLocked), error
    assert "sliceway down CONFIG" in str(error.remedy)
    assert raylets == []


def listening(tmp_path: Path, listen: str | None) -> Any:
    return start.Machine("n1", "127.0.0.1", tmp_path / "n1", {}, (), listen)


def test_a_port_that_is_taken_is_told_before_anything_joins(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"no gateway can listen on {address}: Address already in use") as refused:
            member.check_listen(listening(tmp_path, address), "--listen")
        assert refused.value.where == "--listen"
        own = LocalNode("n1", listening(tmp_path, address).paths, None)
        own.paths.root.mkdir(parents=True)
        own.record("gateway").write_text(this_process().model_dump_json(), encoding="utf-8")
        member.check_listen(listening(tmp_path, address), "--listen")  # its own, which is replaced
    own.record("gateway").unlink()
    member.check_listen(listening(tmp_path, address), "--listen")
    member.check_listen(listening(tmp_path, None), "--listen")


@pytest.mark.parametrize("listen", ["rubbish", "127.0.0.1:port", "127.0.0.1:99999", "[::1:80"])
def test_an_address_that_no_gateway_can_have_is_wrong_input(listen: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        member.check_listen(listening(tmp_path, listen), "--listen")
    assert exit_code(refused.value) == 2
    assert listen in refused.value.message


def test_who_leaves_a_cluster_that_has_ended_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray would be waited for a minute, and then it would end this process."""

    def ended(_: str) -> None:
        raise ClusterUnreachable("nobody answers")

    def refuse(*_: str) -> None:
        pytest.fail("Ray was asked")

    stopped: list[float] = []
    monkeypatch.setattr(member, "knock", ended)
    monkeypatch.setattr(start, "connect", refuse)
    monkeypatch.setattr(processes.LocalProcesses, "stop", lambda _, *, seconds: stopped.append(seconds))
    member._leave(machine(tmp_path), "127.0.0.1:1")
    assert stopped == [member.STOP_SECONDS]
    assert "does not answer; leaving without it" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        NodeMismatch("another Ray"),
        ray.exceptions.RayTaskError("stop", "Traceback", OSError("no space left")),
        ValueError("no such actor"),
    ],
)
def test_who_leaves_ends_its_processes_whatever_the_cluster_says(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: str) -> None:
        raise error

    stopped: list[Any] = []
    monkeypatch.setattr(member, "knock", lambda _: None)
    monkeypatch.setattr(start, "connect", refuse)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(member, "stop_processes", stopped.append)
    one = machine(tmp_path)
    member._leave(one, "127.0.0.1:1")
    assert stopped == [one]
    assert "leaving without the cluster" in capsys.readouterr().out


class Joins:
    """In the place of `_member`: what comes of each try, the last of which is told to stop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *outcomes: bool | Exception) -> None:
        self.outcomes = list(outcomes)
        self.stop = threading.Event()
        self.stopped: list[Any] = []
        monkeypatch.setattr(member, "_member", self.join)
        monkeypatch.setattr(member, "RETRY_SECONDS", 0.0)
        monkeypatch.setattr(member, "stop_processes", self.stopped.append)

    def join(self, *_: Any) -> bool:
        outcome = self.outcomes.pop(0)
        if not self.outcomes:
            self.stop.set()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


@pytest.mark.parametrize("error", [ClusterUnreachable("nobody answers"), SliceHeld("n1 is there"), None])
def test_who_has_lost_its_cluster_ends_its_processes_when_told_to_stop(
    error: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joins = Joins(monkeypatch, True, *([error, error] if error else []))
    one = machine(tmp_path)
    member.belong(one, "127.0.0.1:1", joins.stop, deadline=0.0)
    assert joins.outcomes == []
    assert joins.stopped == [one]


def test_what_the_head_said_of_demand_is_forgotten_with_the_cluster(tmp_path: Path) -> None:
    """A gateway that serves there later would show figures that nobody keeps."""
    one = machine(tmp_path)
    told = one.paths.gateway.cluster_scaling
    told.parent.mkdir(parents=True)
    told.write_text("{}", encoding="utf-8")
    member.stop_processes(one)
    assert not told.exists()
    member.stop_processes(one)


def test_who_never_joined_has_nothing_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joins = Joins(monkeypatch, False)
    member.belong(machine(tmp_path), "127.0.0.1:1", joins.stop, deadline=0.0)
    assert joins.stopped == []


@pytest.mark.parametrize(("error", "deadline"), [(SliceHeld("n1 is there"), 1e9), (ClusterUnreachable("nobody"), 0.0)])
def test_who_cannot_join_the_first_time_is_told_why(
    error: Exception, deadline: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joins = Joins(monkeypatch, error, True)
    with pytest.raises(type(error)):
        member.belong(machine(tmp_path), "127.0.0.1:1", joins.stop, deadline)


def test_a_cluster_comes_back_where_its_members_look_for_it(tmp_path: Path) -> None:
    kept = tmp_path / "state" / "cluster.port"
    port = cluster._port(kept, "127.0.0.1")
    assert cluster._port(kept, "127.0.0.1") == port
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        other = cluster._port(kept, "127.0.0.1")
    assert other != port
    assert cluster._port(kept, "127.0.0.1") == other
    kept.write_text("99999999", encoding="utf-8")
    assert 0 < cluster._port(kept, "127.0.0.1") < 65536


class Asked:
    """A method of the head: gives its answers one after another, the last one for ever; raises those that are errors."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked = 0

    def remote(self, *_: Any) -> Callable[[], Any]:
        return self._answer

    def _answer(self) -> Any:
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


class HeadStandIn:
    """In the place of the head's handle."""

    def __init__(self, *, aim: Any = (None,), status: Any = (), lead: Any = (None,)) -> None:
        quiet: dict[str, Any] = {"nodes": [], "replicas": [], "unplaced": {"m-0": "no slice is free"}}
        self.aim, self.lead = Asked(*aim), Asked(*lead)
        self.status = Asked(*status, quiet)
        self.share = Asked(None)


QUIET = ["m-0 has no slice: no slice is free"]


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `ray.get` ask the stand-in."""

    def get(asked: Any, timeout: float | None = None) -> Any:
        return asked()

    monkeypatch.setattr(ray, "get", get)


ADDRESS = "127.0.0.1:1"


def leader(tmp_path: Path, head: HeadStandIn, raylet: Any = None) -> tuple[Any, threading.Event]:
    path = configuration(tmp_path)
    one = leading.Leader(head, ADDRESS, path, load_config(path), raylet)
    one.begin()
    return one, one.reload


def failed(cause: Exception) -> Exception:
    """As Ray raises what a method of an actor has raised."""
    error: Exception = ray.exceptions.RayTaskError("aim", "Traceback", cause).as_instanceof_cause()
    return error


@pytest.mark.parametrize("error", [ray.exceptions.ActorUnavailableError("gone", None), ray.exceptions.RpcError("gone")])
@pytest.mark.usefixtures("answered")
def test_a_configuration_that_the_head_did_not_hear_is_told_again(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = HeadStandIn(aim=(None, error, error, None))
    one, reload = leader(tmp_path, head)
    reload.set()
    for _ in range(2):
        assert one.look() != QUIET
        assert reload.is_set()
    assert one.look() == QUIET
    assert (head.aim.asked, reload.is_set()) == (4, False)
    assert capsys.readouterr().out.count("taken over the new configuration") == 1
    assert one.look() == QUIET
    assert head.aim.asked == 4


@pytest.mark.usefixtures("answered")
def test_a_configuration_that_the_head_refuses_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = HeadStandIn(aim=(None, failed(ConfigError("no such model"))))
    one, reload = leader(tmp_path, head)
    reload.set()
    assert one.look() == one.look() == QUIET
    assert (head.aim.asked, reload.is_set()) == (2, False)
    assert "refused, everything goes on as before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ray.exceptions.ActorUnavailableError("gone", None), "the head is being started again; everything serves on"),
        (ray.exceptions.GetTimeoutError(), "the head is being started again; everything serves on"),
        (ray.exceptions.RpcError("no route"), "the head does not answer, asking again: no route"),
        (failed(ValueError("no journal")), "the head does not answer, asking again: no journal"),
    ],
)
@pytest.mark.usefixtures("answered")
def test_a_head_that_does_not_say_how_it_is_is_asked_again(error: Exception, said: str, tmp_path: Path) -> None:
    one, _ = leader(tmp_path, HeadStandIn(status=(error,)))
    assert one.look() == [said]
    assert one.look() == QUIET


@pytest.mark.usefixtures("answered")
def test_who_is_not_heard_of_for_long_gives_way_and_tells_the_head_nothing(tmp_path: Path) -> None:
    head = HeadStandIn(lead=("`sliceway up` on b, pid 7",))
    one, reload = leader(tmp_path, head)
    reload.set()
    with pytest.raises(ClusterLed, match="the configuration of `sliceway up` on b, pid 7 by now"):
        one.look()
    assert head.aim.asked == 1


@pytest.mark.usefixtures("answered")
def test_who_has_the_clusters_first_machine_stays_and_leads_again_when_nobody_does(tmp_path: Path) -> None:
    one, _ = leader(tmp_path, HeadStandIn(lead=("`sliceway up` on b, pid 7", None)), object())
    (line,) = one.look()
    assert "on b, pid 7 by now; this process only keeps the cluster's first machine in it" in line
    assert one.look() == QUIET


@pytest.mark.parametrize(
    ("lead", "dissolved"), [(None, 1), (ray.exceptions.ActorUnavailableError("gone", None), 1), ("another", 0)]
)
@pytest.mark.usefixtures("answered")
def test_who_stops_ends_the_cluster_unless_it_is_another_ones(
    lead: Any, dissolved: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[None] = []
    monkeypatch.setattr(leading, "_dissolve", lambda: ended.append(None))
    leading.end(HeadStandIn(lead=(lead,)), ADDRESS)
    assert len(ended) == dissolved
    assert ("the cluster is left to another" in capsys.readouterr().out) == (not dissolved)


@pytest.mark.usefixtures("answered")
def test_what_operators_change_on_the_first_machine_is_shared_with_every_gateway(tmp_path: Path) -> None:
    head = HeadStandIn()
    one, _ = leader(tmp_path, head)
    assert (one.look(), head.share.asked) == (QUIET, 0)
    state = load_config(configuration(tmp_path)).state
    with OverlayStore(state).changing() as draft:
        draft[0] = with_fields(draft[0], "acme", {"weight": 3})
    assert "operator.json" in leading._shared(load_config(configuration(tmp_path)))
    assert (one.look(), one.look(), head.share.asked, head.aim.asked) == (QUIET, QUIET, 1, 1)


@pytest.mark.usefixtures("answered")
def test_a_configuration_that_operators_ask_to_read_again_reaches_the_head_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = HeadStandIn()
    one, _ = leader(tmp_path, head)
    Operations(lambda: load_config(configuration(tmp_path)), wall=lambda: 0.0).reload(actor="test")
    assert (one.look(), one.look(), head.aim.asked) == (QUIET, QUIET, 2)
    assert capsys.readouterr().out.count("taken over the new configuration") == 1
    OverlayStore(load_config(configuration(tmp_path)).state).path.write_text("{", encoding="utf-8")
    assert (one.look(), head.aim.asked) == (QUIET, 2)


class RayletStandIn:
    """In the place of Ray on the cluster's first machine."""

    def __init__(self, *, ended: bool) -> None:
        self.ended, self.log = ended, Path("/state/logs/ray.log")

    def last_words(self) -> str:
        return "gcs_server exited"


UNAVAILABLE = ray.exceptions.ActorUnavailableError("gone", None)


@pytest.mark.usefixtures("answered")
def test_who_leads_a_cluster_whose_ray_has_ended_says_so_at_once(tmp_path: Path) -> None:
    one, _ = leader(tmp_path, HeadStandIn(status=(UNAVAILABLE,)), RayletStandIn(ended=True))
    with pytest.raises(ClusterLost, match="Ray on this machine has ended: gcs_server exited") as lost:
        one.look()
    assert lost.value.where == "/state/logs/ray.log"
    assert "Engines, controllers and gateways go on" in str(lost.value.remedy)


@pytest.mark.usefixtures("answered")
def test_who_leads_a_cluster_at_whose_address_nobody_answers_waits_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(address: str) -> None:
        raise ClusterUnreachable(f"no cluster answers at {address}")

    seconds = [100.0]
    monkeypatch.setattr(leading, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    monkeypatch.setattr(leading, "knock", nobody)
    error = ray.exceptions.RpcError("no route")
    one, _ = leader(tmp_path, HeadStandIn(status=(error, error, UNAVAILABLE, error)), RayletStandIn(ended=False))
    for _ in range(2):
        assert one.look() == ["the head does not answer, asking again: no route"]
        seconds[0] += leading.GONE_SECONDS - 1
    with pytest.raises(ClusterLost, match=r"no cluster answers at 127\.0\.0\.1:1, for 30 s by now"):
        one.look()
    monkeypatch.setattr(leading, "knock", lambda _: None)
    assert one.look() == ["the head does not answer, asking again: no route"]
    assert one.look() == QUIET


@pytest.mark.usefixtures("answered")
def test_who_stops_where_nobody_answers_says_what_was_not_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise ray.exceptions.RpcError("no route")

    monkeypatch.setattr(leading, "_dissolve", refuse)
    leading.end(HeadStandIn(), ADDRESS)
    assert "what other machines run could not be ended from here: 127.0.0.1:1: the cluster" in capsys.readouterr().out


@pytest.fixture
def connected(raylets: list[NeverJoins], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have every cluster be reached, with these actors in it."""

    def prepare(**actors: Any) -> None:
        def get_actor(name: str, *, namespace: str) -> Any:
            if actors[name] is None:
                raise ValueError("no such actor")
            return actors[name]

        monkeypatch.setattr(start, "connect", lambda _: None)
        monkeypatch.setattr(ray, "get_actor", get_actor)
        rows = [{"name": name, "namespace": "sliceway"} for name in actors]
        monkeypatch.setattr(ray.util, "list_named_actors", lambda *, all_namespaces: rows)

    return prepare


@pytest.mark.usefixtures("answered")
def test_a_head_that_does_not_answer_keeps_nobody_waiting(connected: Callable[..., None]) -> None:
    connected(head=HeadStandIn(status=(ray.exceptions.GetTimeoutError(),)))
    error = CliRunner().invoke(app, ["node", "list", ADDRESS]).exception
    assert isinstance(error, ClusterUnreachable), error
    assert "the cluster's head does not answer in time" in str(error)
    connected(head=None)
    error = CliRunner().invoke(app, ["node", "list", ADDRESS]).exception
    assert "this cluster has no head yet" in str(error)


@pytest.mark.parametrize(
    ("third", "why"),
    [
        (SimpleNamespace(renew=Asked(ray.exceptions.GetTimeoutError())), "its agent does not answer in time"),
        (SimpleNamespace(renew=Asked(failed(OSError("no space")))), "its agent could not do it: OSError: no space"),
        (None, "it has left the cluster meanwhile"),
    ],
)
@pytest.mark.usefixtures("answered")
def test_an_upgrade_that_stops_half_way_says_how_far_it_is(
    third: Any, why: str, connected: Callable[..., None]
) -> None:
    agents = [SimpleNamespace(renew=Asked(None)) for _ in range(3)]
    names = {"agent|a": agents[0], "agent|b": agents[1], "agent|c": third, "agent|d": agents[2]}
    connected(head=HeadStandIn(), **names)
    error = CliRunner().invoke(app, ["node", "upgrade", ADDRESS]).exception
    assert isinstance(error, ClusterError), error
    assert f"node 'c' was not upgraded, nor were those after it: {why}" in error.message
    assert "Upgraded are a, b." in error.message
    assert agents[2].renew.asked == 0
