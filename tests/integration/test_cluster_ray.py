"""A cluster of two Ray nodes on this machine: bring-up, gateways on both, loss of the head, loss of a node and its return.

Simulated engines: what is tried here is the cluster, and who serves when parts of it die. The tests share one cluster and stand in the
order in which they run.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from ruamel.yaml import YAML

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

SLICEWAY = str(Path(sys.executable).parent / "sliceway")
SENTINEL = Path(__file__).parents[2] / "scripts" / "sentinel.py"
READY_SECONDS = 150.0
# One request is enough for two replicas.
QUICKLY = {
    "window": "1s",
    "scale_up_after": "1s",
    "scale_down_after": "2s",
    "cool_down": "1s",
    "sleep_after": "1s",
    "target_busy": 0.04,
}
SMALL = {
    "name": "small",
    "source": "Qwen/Qwen3-0.6B",
    "metadata": str(Path(__file__).parents[2] / "configs" / "examples" / "models" / "Qwen--Qwen3-0.6B.json"),
    "max_model_len": 4096,
    "profiles": ["1g.6gb"],
}
SLOWER = ("--output-tokens", "4", "--ttft-seconds", "0.2")
# What Ray has in its books: every actor with its process and placement group, and what replicas' actors tell of themselves.
ACTORS = """
import json, sys, ray
from ray._private.state import state
from ray.core.generated.gcs_pb2 import ActorTableData
from placement.cluster.start import connect
connect(sys.argv[1])
groups = {key: group["name"] for key, group in ray.util.placement_group_table().items()}
alive = map(ActorTableData.FromString, state._connect_and_get_accessor().get_actor_table(None, "ALIVE"))
found = {a.name: {"pid": a.pid, "group": groups.get(a.placement_group_id.hex()), "shown": a.repr_name} for a in alive}
for name in found:
    if name.startswith("replica|"):
        found[name] |= ray.get(ray.get_actor(name).describe.remote())
print(json.dumps(found))
"""


def until(condition: Callable[[], Any], *, what: str, seconds: float = READY_SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        threading.Event().wait(0.1)
    pytest.fail(f"not within {seconds:g} s: {what}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cluster:
    """`sliceway up --ray` and one `sliceway node join`, each in a session of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = directory / "config.yaml"
        self.state, self.other_state = directory / "first", directory / "second"
        self.ports = free_port(), free_port()
        self.words: tuple[str, ...] = ()
        self.configure()
        self.up: subprocess.Popen[bytes] | None = None
        self.member: subprocess.Popen[bytes] | None = None
        self._key = ""
        # Whatever carries the mark ends with this process, however that ends: controllers, engines and Ray outlive their starters.
        self._mark = uuid.uuid4().hex
        self._sentinel = subprocess.Popen(
            [sys.executable, "-S", str(SENTINEL), self._mark], stdin=subprocess.PIPE, start_new_session=True
        )

    def configure(
        self, *more: str, replicas: int | dict[str, int] = 2, actors: str = "replica", small: int = 0
    ) -> None:
        """Write the configuration, with engines that are started with these arguments as well, so many of them, and whose actors they
        belong to; and so many replicas of a model that only slices of one profile will do for.
        """
        self.words = more
        cores = sorted(os.sched_getaffinity(0))
        engine = [*("{python}", "-m", "placement.fake_engine"), *("--host", "{host}", "--port", "{port}")]
        YAML().dump(
            {
                "version": "v1",
                "state_dir": str(self.state),
                "fleet": {
                    "slices": [{"kind": "cpu", "id": "cpu-0", "cores": str(cores[0]), "memory": "2GiB"}],
                    "autoscale": QUICKLY,
                    "layouts": [{"gpus": [0], "layout": ["4g.24gb"]}],
                },
                "engine": {"command": [*engine, "--model", "{served_name}", *more], "transport": "tcp"},
                "cluster": {"actors": actors},
                "models": [
                    {
                        "name": "chat",
                        "source": "org/chat",
                        "task": "generate",
                        "replicas": replicas,
                        "max_model_len": 4096,
                    },
                    *([SMALL | {"replicas": small}] if small else []),
                ],
                "tenants": [{"name": "acme", "models": "all"}],
                "gateway": {"listen": f"127.0.0.1:{self.ports[0]}", "queue": {"max_wait_seconds": READY_SECONDS}},
            },
            self.config,
        )

    def _run(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.directory / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [SLICEWAY, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"DRILL_MARK": self._mark},
                start_new_session=True,
            )

    def said(self, name: str = "up") -> str:
        path = self.directory / f"{name}.log"
        return path.read_text(errors="replace", encoding="utf-8") if path.exists() else ""

    def start(self) -> None:
        self.up = self._run("up", "up", str(self.config), "--ray")
        until(
            lambda: self._alive("up") and "cluster at" in self.said(), what=f"a cluster; up said {self.said()[-2000:]}"
        )
        until(lambda: self.ready(0) == {"chat-0"}, what="the first node's replica")

    @property
    def address(self) -> str:
        return self.said().partition("cluster at ")[2].partition(";")[0]

    def join(self) -> None:
        self.member = self._run(
            "member",
            *("node", "join", self.address, "--token-file", str(self.state / "cluster.token")),
            *("--name", "second", "--simulate", "a30:2"),
            *("--state-dir", str(self.other_state), "--listen", f"127.0.0.1:{self.ports[1]}"),
        )
        until(
            lambda: self.ready(1) == {"chat-0", "chat-1"}, what=f"both replicas; it said {self.said('member')[-2000:]}"
        )

    def _alive(self, name: str) -> bool:
        process = self.up if name == "up" else self.member
        if process is not None and process.poll() is not None:
            pytest.fail(f"{name} ended with {process.returncode}: {self.said(name)[-3000:]}")
        return True

    # ---- what it shows

    def readyz(self, gateway: int) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[gateway]}/readyz", timeout=5) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            with error:
                unready: dict[str, Any] = json.load(error)
                return unready
        except OSError:
            return {}

    def ready(self, gateway: int, model: str = "chat") -> set[str]:
        rows = self.readyz(gateway).get("models", {}).get(model, {}).get("replicas", [])
        return {row["replica"] for row in rows if row["state"] == "ready"}

    def engines(self) -> dict[str, int]:
        found = [
            json.loads(path.read_text(encoding="utf-8"))
            for state in (self.state, self.other_state)
            for path in state.glob("nodes/*/engines/replicas/*/journal.json")
        ]
        return {entry["replica"]: entry["engine_pid"] for entry in found if psutil.pid_exists(entry["engine_pid"])}

    def actors(self) -> dict[str, dict[str, Any]]:
        """Ray's actors by name, as Ray tells them."""
        environ = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.state / "cluster.token")}
        command = [sys.executable, "-c", ACTORS, self.address]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, env=environ)
        assert done.returncode == 0, done.stderr[-3000:]
        found: dict[str, dict[str, Any]] = json.loads(done.stdout)
        return found

    def owner(self, replica: str) -> int | None:
        """The process that the replica's engine belongs to, as its node was told."""
        for path in [*self.state.glob("nodes/*/seats.json"), *self.other_state.glob("nodes/*/seats.json")]:
            seat = json.loads(path.read_text(encoding="utf-8"))["seats"].get(replica)
            if seat is not None:
                return int(seat["owner"]["pid"])
        return None

    def owners(self) -> list[psutil.Process]:
        """Of both replicas."""
        pids = [self.owner(replica) for replica in ("chat-0", "chat-1")]
        assert None not in pids
        return [psutil.Process(pid) for pid in pids]

    # ---- asking it

    def key(self) -> str:
        if not self._key:
            command = [SLICEWAY, "keys", "create", "acme", "--config", str(self.config), "--json"]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
            self._key = json.loads(done.stdout)["key"]
        return self._key

    def ask(self, gateway: int, model: str = "chat") -> tuple[int, str]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.ports[gateway]}/v1/chat/completions",
            data=json.dumps({"model": model, "max_tokens": 3, "messages": [{"role": "user", "content": "?"}]}).encode(),
            headers={"authorization": f"Bearer {self.key()}", "content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=READY_SECONDS + 30) as answer:
                answer.read()
                return answer.status, answer.headers["x-sliceway-replica"]
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    # ---- its ends

    def head_pid(self) -> int | None:
        """Ray's processes are named after their actors. It may have put the head on either node."""
        mine = {process.pid for process in (self.up, self.member) if process is not None}
        found = [p for p in psutil.process_iter() if _title(p).startswith("ray::HeadActor") and mine & _ancestors(p)]
        return found[0].pid if found else None

    def lose_second_node(self) -> None:
        """As if the machine had lost power: everything of it at once."""
        assert self.member is not None
        tree = [psutil.Process(self.member.pid), *psutil.Process(self.member.pid).children(recursive=True)]
        for process in [*tree, *self._of(self.other_state)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(tree, timeout=10)
        self.member.wait()

    def own_processes(self) -> set[int]:
        """Controllers and gateways, as the agents know them."""
        found = [path for state in (self.state, self.other_state) for path in state.glob("nodes/*/*.pid.json")]
        return {int(json.loads(path.read_text(encoding="utf-8"))["pid"]) for path in found}

    def everything(self) -> list[psutil.Process]:
        """What runs for both nodes. A gateway that comes back serves by the table it has before its node's engine is there."""
        return [process for state in (self.state, self.other_state) for process in self._of(state)]

    def _of(self, state: Path) -> list[psutil.Process]:
        """Controller, gateway, shims and engines that run in sessions of their own."""
        found = []
        for path in [*state.glob("nodes/*/*.pid.json"), *state.glob("nodes/*/engines/replicas/*/journal.json")]:
            entry = json.loads(path.read_text(encoding="utf-8"))
            for pid in filter(None, (entry.get("pid"), entry.get("shim_pid"), entry.get("engine_pid"))):
                with contextlib.suppress(psutil.NoSuchProcess):
                    found.append(psutil.Process(pid))
        return found

    def end(self) -> None:
        for process in (self.member, self.up):
            if process is not None and process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(60)
        assert self._sentinel.stdin is not None
        self._sentinel.stdin.close()
        assert self._sentinel.wait(60) == 0, "something that was started here could not be ended"
        for process in (self.member, self.up):
            if process is not None:
                process.wait()


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _all_titled(cluster: Cluster, title: str) -> bool:
    return all(_title(process).startswith(title) for process in cluster.owners())


def _ended(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() for process in processes)


def _ancestors(process: psutil.Process) -> set[int]:
    with contextlib.suppress(psutil.Error):
        return {parent.pid for parent in process.parents()}
    return set()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    one = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        one.start()
        one.join()
        yield one
    finally:
        one.end()


class Asking(threading.Thread):
    """Requests without a pause through one gateway, until told to stop; what came of each."""

    def __init__(self, cluster: Cluster, gateway: int) -> None:
        super().__init__()
        self._cluster, self._gateway = cluster, gateway
        self._stopped = threading.Event()
        self.answers: list[tuple[int, str]] = []

    def __enter__(self) -> Asking:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self.join(60)

    def run(self) -> None:
        while not self._stopped.wait(0.02):
            self.answers.append(self._cluster.ask(self._gateway))

    @property
    def failed(self) -> list[tuple[int, str]]:
        return [answer for answer in self.answers if answer[0] != 200]


def test_both_gateways_reach_both_nodes(cluster: Cluster) -> None:
    until(lambda: cluster.ask(1)[0] == 200, what="the keys on the second node", seconds=20)
    for gateway in (0, 1):
        answers = [cluster.ask(gateway) for _ in range(6)]
        assert {status for status, _ in answers} == {200}
        assert {replica for _, replica in answers} == {"chat-0", "chat-1"}


def test_engines_of_other_machines_want_to_be_shown_the_secret(cluster: Cluster) -> None:
    table = json.loads(next(cluster.other_state.glob("nodes/*/gateway/routing.json")).read_text(encoding="utf-8"))
    row = next(r for r in table["replicas"] if r["replica"] == "chat-0")
    request = urllib.request.Request(f"{row['endpoint']}/v1/models")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    with refused.value:
        assert refused.value.code == 401
    request.add_header("authorization", f"Bearer {row['secret']}")
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 200


def test_the_loss_of_the_head_is_noticed_by_nobody(cluster: Cluster) -> None:
    engines = cluster.engines()
    before = until(cluster.head_pid, what="the head's process")
    with Asking(cluster, 0) as first, Asking(cluster, 1) as second:
        os.kill(before, signal.SIGKILL)
        until(lambda: cluster.head_pid() not in (None, before), what="another head")
        until(lambda: cluster.ready(0) == cluster.ready(1) == {"chat-0", "chat-1"}, what="the table as before")
    assert first.failed == second.failed == []
    assert cluster.engines() == engines


def test_every_replica_is_an_actor_in_the_placement_group_of_its_slice(cluster: Cluster) -> None:
    found, engines = cluster.actors(), cluster.engines()
    assert {name for name in found if name.startswith(("replica|", "holder|"))} == {"replica|chat-0", "replica|chat-1"}
    for replica in ("chat-0", "chat-1"):
        its, key = found[f"replica|{replica}"], _slice_of(cluster, replica)
        assert (its["pid"], its["engine_pid"]) == (cluster.owner(replica), engines[replica])
        assert its["group"] == f"sliceway|{replica}|chat|{key.replace('/', '|', 1)}"
        assert its["shown"] == f"{replica} on {key}"


def test_a_replicas_lost_actor_is_replaced_and_its_engine_goes_on(cluster: Cluster) -> None:
    engines, before, other = cluster.engines(), cluster.owner("chat-0"), cluster.owner("chat-1")
    assert before is not None
    os.kill(before, signal.SIGKILL)
    until(lambda: cluster.owner("chat-0") not in (None, before), what="another actor, which its node was told of")
    assert cluster.owner("chat-1") == other
    assert cluster.ready(0) == cluster.ready(1) == {"chat-0", "chat-1"}
    assert cluster.engines() == engines


def test_engines_go_on_when_what_they_belong_to_is_changed(cluster: Cluster) -> None:
    assert cluster.up is not None
    engines = cluster.engines()
    for actors, title in (("node", "ray::SliceHolder"), ("replica", "ray::ReplicaActor")):
        before = cluster.owners()
        cluster.configure(actors=actors)
        cluster.up.send_signal(signal.SIGHUP)
        until(partial(_all_titled, cluster, title), what=title)
        until(partial(_ended, before), what="that the others have ended")
    assert cluster.ready(0) == cluster.ready(1) == {"chat-0", "chat-1"}
    assert cluster.engines() == engines


def test_an_engine_upgrade_replaces_one_node_after_another_and_no_request_fails(cluster: Cluster) -> None:
    before = cluster.engines()
    cluster.configure(*SLOWER)
    assert cluster.up is not None
    with Asking(cluster, 0) as first, Asking(cluster, 1) as second:
        cluster.up.send_signal(signal.SIGHUP)
        until(lambda: len(cluster.engines().items() - before.items()) == 2, what="two new engines")
        until(lambda: cluster.ready(0) == cluster.ready(1) == {"chat-0", "chat-1"}, what="both in both tables")
    assert first.failed == second.failed == []


def test_gateways_and_controllers_are_replaced_and_no_request_fails(cluster: Cluster) -> None:
    engines, before = cluster.engines(), cluster.own_processes()
    command = [
        SLICEWAY,
        "node",
        "upgrade",
        cluster.address,
        "--token-file",
        str(cluster.state / "cluster.token"),
        "--json",
    ]
    with Asking(cluster, 0) as first, Asking(cluster, 1) as second:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert len(json.loads(done.stdout)["nodes"]) == 2
        until(lambda: cluster.ready(0) == cluster.ready(1) == {"chat-0", "chat-1"}, what="the tables as before")
        counts = len(first.answers), len(second.answers)
        until(
            lambda: len(first.answers) > counts[0] + 5 and len(second.answers) > counts[1] + 5,
            what="answers of the new gateways",
        )
    assert first.failed == second.failed == []
    assert not cluster.own_processes() & before, "two gateways and two controllers"
    assert cluster.engines() == engines


def test_replicas_follow_demand_at_either_gateway_down_to_none_and_up_over_both_nodes(cluster: Cluster) -> None:
    assert cluster.up is not None
    actors = cluster.owners()
    cluster.configure(*SLOWER, replicas={"min": 0, "max": 2})
    cluster.up.send_signal(signal.SIGHUP)
    until(lambda: cluster.ready(0) == cluster.ready(1) == set(), what="a model that sleeps without requests")
    until(lambda: not cluster.engines(), what="its engines' end")
    until(partial(_ended, actors), what="the end of its replicas' actors")
    until(lambda: "chat: 0 replicas by demand, of 0 to 2" in cluster.said(), what="that it does", seconds=30)
    taken_over = cluster.said().count("taken over")
    with contextlib.ExitStack() as several:
        asking = [several.enter_context(Asking(cluster, gateway)) for gateway in (0, 0, 1, 1)]
        until(lambda: cluster.ready(0) == cluster.ready(1) == {"chat-0", "chat-1"}, what="a replica on each node")
        served = [len(one.answers) for one in asking]
        until(lambda: all(len(o.answers) > n for o, n in zip(asking, served, strict=True)), what="answers to everybody")
        cluster.configure(*SLOWER)
        cluster.up.send_signal(signal.SIGHUP)
        until(lambda: cluster.said().count("taken over") > taken_over, what="two again, whatever is asked", seconds=30)
    assert [one.failed for one in asking] == [[]] * 4, "who wakes it waits for it"
    until(lambda: cluster.ready(0) == cluster.ready(1) == {"chat-0", "chat-1"}, what="the tables as before")


def test_a_lost_node_is_told_and_served_around_and_taken_in_again(cluster: Cluster) -> None:
    on_second = "chat-1" if "second/" in _slice_of(cluster, "chat-1") else "chat-0"
    stays = {"chat-0", "chat-1"} - {on_second}
    with Asking(cluster, 0) as asking:
        cluster.lose_second_node()
        until(lambda: cluster.ready(0) == stays, what="the table without the lost node")
        served = len(asking.answers)
        until(lambda: len(asking.answers) > served + 5, what="requests after that", seconds=30)
    assert asking.failed == [], "a request whose engine is gone before a byte has come is asked again"
    until(lambda: f"{on_second} has no slice" in cluster.said(), what="why it does not run", seconds=30)
    cluster.join()


def _slice_of(cluster: Cluster, replica: str) -> str:
    rows = cluster.readyz(0)["models"]["chat"]["replicas"]
    return next(str(row["slice"]) for row in rows if row["replica"] == replica)


def test_a_gpu_of_a_node_is_cut_anew_as_reviewed_while_requests_run(cluster: Cluster) -> None:
    assert cluster.up is not None
    engines, taken_over = cluster.engines(), cluster.said().count("taken over")
    cluster.configure(*cluster.words, small=2)
    cluster.up.send_signal(signal.SIGHUP)
    until(lambda: cluster.said().count("taken over") > taken_over, what="the model that has no slice")
    content = YAML().load(cluster.config)
    content["fleet"]["partition"] = "planned"  # for the commands only: `up` is to cut nothing of itself
    YAML().dump(content, planned_by := cluster.directory / "planned.yaml")
    on_ray = [str(planned_by), "--ray", cluster.address, "--token-file", str(cluster.state / "cluster.token")]
    with Asking(cluster, 0) as first, Asking(cluster, 1) as second:
        planned = _run([SLICEWAY, "plan", *on_ray, "--json"])
        (reviewed := cluster.directory / "plan.json").write_text(planned, encoding="utf-8")
        steps = json.loads(planned)["fleet"]["transition"]["steps"]
        assert {s["action"] for s in steps} >= {"create", "start", "check"}
        assert {s["gpu"].partition("/")[0] for s in steps} == {"second"}
        applied = json.loads(_run([SLICEWAY, "apply", *on_ray, "--plan", str(reviewed), "--json"]))
        assert (applied["ok"], applied["fleet"]["done"]) == (True, steps)
        new = {"small-0", "small-1"}
        until(lambda: cluster.ready(0, "small") == cluster.ready(1, "small") == new, what="both at both")
        assert {cluster.ask(gateway, "small")[0] for gateway in (0, 1)} == {200}
    assert first.failed == second.failed == []
    assert engines.items() <= cluster.engines().items(), "nobody had to go for it"


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_ctrl_c_ends_everything(cluster: Cluster) -> None:
    assert cluster.up is not None
    assert cluster.member is not None
    everything: list[psutil.Process] = until(
        lambda: found if len(found := cluster.everything()) >= 8 else None,
        what="two controllers, two gateways, two shims, two engines",
    )
    cluster.up.send_signal(signal.SIGINT)
    assert cluster.up.wait(120) == 0, cluster.said()[-3000:]
    _, alive = psutil.wait_procs(everything, timeout=20)
    assert alive == []
    cluster.member.send_signal(signal.SIGINT)
    assert cluster.member.wait(150) == 0, (
        f"a member whose cluster has ended waits for nobody: {cluster.said('member')[-3000:]}"
    )
