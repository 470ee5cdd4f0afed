"""One `sliceway up` as the leader of a cluster: it tells the head what to run, shows what comes of it, and ends it.

Ray is imported only here, when it is used.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway.admin.overlay import OverlayStore
from gateway.cli.led_head import RayLedHead
from gateway.cli.member import LOOK_SECONDS, STOP_SECONDS, LayoutsTold, say
from gateway.cli.output import out
from gateway.cluster_config import differences
from gateway.cluster_leader import LeaderPlanning, Reason, Seen
from gateway.cluster_planned import ForConfiguration
from gateway.cluster_repartitioning import ForDemand
from gateway.config import Config, load_config
from gateway.errors import OverlayError
from gateway.tenant_pools import tenant_pools
from model_registry.errors import SlicewayError
from model_registry.words import counted
from placement.clock import SystemClock
from placement.cluster.address import PATIENCE_SECONDS, knock
from placement.cluster.errors import ClusterError, ClusterLed, ClusterLost, ClusterUnreachable

if TYPE_CHECKING:
    from placement.cluster.start import Machine, Raylet

# Of the gateways' state directory: what a tenant's key is checked with, and what operators changed while all of it runs.
SHARED_FILES = ("keys.json", "keys.secret", "operator.json")
GONE_SECONDS = 30.0  # that nobody at all answers at the cluster's address
_LED_REMEDY = "Change that configuration and send its process SIGHUP, or stop it first."


def actors() -> list[str]:
    """The names of everything of ours in the cluster."""
    import ray

    from placement.cluster.actors import NAMESPACE

    everyone = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in everyone if actor["namespace"] == NAMESPACE]


def claim(address: str) -> Any:
    """The cluster's head, which from here on works for this process. Raises ClusterLed, before anything has changed."""
    import ray

    from placement.cluster.actors import start_head
    from placement.cluster.asking import asking
    from placement.cluster.start import own_versions

    with asking("the cluster's head", address):
        head: Any = start_head(own_versions(), secrets.token_urlsafe(32))
        other = ray.get(head.lead.remote(_me()), timeout=PATIENCE_SECONDS)
    if other:
        raise ClusterLed(
            f"the cluster at {address} already works by the configuration of {other}", where=address, remedy=_LED_REMEDY
        )
    return head


def _me() -> str:
    return f"`sliceway up` on {socket.gethostname()}, pid {os.getpid()}"


def lead(leader: Leader, machine: Machine | None, stop: threading.Event) -> None:
    """Have the head work by the leader's configuration, and show what comes of it, until `stop`. Raises ClusterError."""
    from placement.cluster.start import offer

    with on_signal(signal.SIGHUP, leader.reload):
        leader.begin()
        if machine is not None:
            offer(machine, leader.address, stop)
        shown: list[str] = []
        layouts = LayoutsTold(machine, why=False) if machine is not None else None
        try:
            while not stop.wait(LOOK_SECONDS):
                if layouts is not None:
                    layouts.look()
                lines = leader.look()
                for line in lines:
                    if line not in shown:
                        out.print(line, highlight=False, markup=False)
                shown = lines
        finally:
            leader.stop()


def reasons() -> tuple[Reason, ...]:
    """Why a leader plans, the most important first."""
    return (ForConfiguration(SystemClock()), ForDemand(SystemClock()))


class Leader:
    """What the head is told: the file at `path`, once more when `reload` is set, and the tenants' keys when they change."""

    def __init__(self, head: Any, address: str, path: Path, config: Config, raylet: Raylet | None) -> None:
        """Of the cluster at `address`, which would end with `raylet`, where that is this process's."""
        self.address, self.reload = address, threading.Event()
        self._head, self._path, self._config, self._raylet = head, path, config, raylet
        self._files = _shared(config)
        self._reloads = _reloads(config)
        self._gone_since: float | None = None
        self._planning = LeaderPlanning(RayLedHead(head, address, _me()), reasons())

    def stop(self) -> None:
        """Plan nothing any more. What the head carries out goes on."""
        self._planning.stop()

    def begin(self) -> None:
        """Have the head begin with the configuration. Raises ClusterError, ConfigError."""
        import ray

        from placement.cluster.asking import asking

        with asking("the cluster's head", self.address):
            told = _as_text(self._config), self._files, tenant_pools(self._config)
            ray.get(self._head.aim.remote(*told), timeout=PATIENCE_SECONDS)
        self._say_differences()

    def look(self) -> list[str]:
        """One round: tell what is new, and say how the cluster is. Nothing that keeps the head from answering ends this.

        Raises ClusterLed where another process leads by now, because this one was silent for too long: suspended, for example.
        ClusterLost where Ray has ended.
        """
        from ray.exceptions import GetTimeoutError, RayActorError, RayError

        try:
            lines = self._round()
        except (RayActorError, GetTimeoutError):
            lines = ["the head is being started again; everything serves on"]
            self._see_that_ray_is_there()
        except RayError as error:
            lines = [f"the head does not answer, asking again: {getattr(error, 'cause', None) or error}"]
            self._see_that_ray_is_there()
        else:
            self._gone_since = None
        return lines

    def _see_that_ray_is_there(self) -> None:
        """Raises ClusterLost where it is not: a minute later Ray would end this process without a word."""
        if self._raylet is not None and self._raylet.ended:
            raise _lost(f"Ray on this machine has ended: {self._raylet.last_words()}", str(self._raylet.log))
        try:
            knock(self.address)
        except ClusterUnreachable as error:
            now = time.monotonic()
            self._gone_since = self._gone_since or now
            if now - self._gone_since >= GONE_SECONDS:
                raise _lost(f"{error.message}, for {GONE_SECONDS:g} s by now", self.address) from error
        else:
            self._gone_since = None

    def _round(self) -> list[str]:
        import ray

        if other := ray.get(self._head.lead.remote(_me()), timeout=10.0):
            return self._give_way(other)
        asked = _reloads(self._config, self._reloads)
        if asked != self._reloads:  # `sliceway reload`, which knows nothing of clusters
            self._reloads = asked
            self.reload.set()
        if self.reload.is_set():
            self.reload.clear()
            self._take_over()
        if (now := _shared(self._config)) != self._files:
            ray.get(self._head.share.remote(now), timeout=10.0)
            self._files = now
        status = ray.get(self._head.status.remote(), timeout=10.0)
        self._planning.look(Seen(self._config, status))
        return lines_of(status)

    def _give_way(self, other: str) -> list[str]:
        led = f"the cluster works by the configuration of {other} by now"
        if self._raylet is not None:
            return [f"{led}; this process only keeps the cluster's first machine in it, until Ctrl-C"]
        raise ClusterLed(led, where=_me(), remedy=_LED_REMEDY)

    def _take_over(self) -> None:
        """The file as it is, if it is right; a wrong one changes nothing."""
        import ray
        from ray.exceptions import RayError

        try:
            new = load_config(self._path)
            ray.get(self._head.aim.remote(_as_text(new), _shared(new), tenant_pools(new)), timeout=PATIENCE_SECONDS)
        except SlicewayError as error:  # Ray's own kind of it would print a traceback
            say(f"the new configuration is refused, everything goes on as before: {getattr(error, 'cause', error)}")
        except RayError:
            self.reload.set()  # it is told again in the next round
            raise
        else:
            self._config = new
            say("taken over the new configuration")
            self._say_differences()

    def _say_differences(self) -> None:
        for line in differences(self._config, self._path, local=self._raylet is not None):
            say(line)


def _lost(message: str, where: str) -> ClusterLost:
    return ClusterLost(
        message,
        where=where,
        remedy="Engines, controllers and gateways go on, for ten minutes without a cluster. Start it again where it began, with the "
        "same configuration and state directory: the others join it by themselves.",
    )


def end(head: Any, address: str) -> None:
    """End everything of ours in the cluster, unless it is another process's by now."""
    import ray
    from ray.exceptions import RayError

    from placement.cluster.asking import asking

    other = None
    with contextlib.suppress(RayError):  # no head: then nobody leads
        other = ray.get(head.lead.remote(_me()), timeout=10.0)
    if other is not None:
        say(f"stopping; the cluster is left to {other}")
        return
    say("stopping; requests may finish")
    try:
        with asking("the cluster", address):
            _dissolve()
    except ClusterError as error:
        say(f"what other machines run could not be ended from here: {error}")


def _dissolve() -> None:
    """End everything of ours in the cluster: the head first, so that it seats nothing again."""
    import ray

    from placement.cluster.actors import AGENT, HEAD, NAMESPACE, give_all_back

    agents: list[Any] = []
    for name in sorted(actors(), key=lambda n: n != HEAD):
        with contextlib.suppress(ValueError):
            actor: Any = ray.get_actor(name, namespace=NAMESPACE)
            if name.startswith(AGENT):
                agents.append(actor)
            else:
                ray.kill(actor)
    stopping = [agent.stop.remote(STOP_SECONDS) for agent in agents]
    if stopping:  # one that does not answer keeps nobody waiting for the others
        ray.wait(stopping, num_returns=len(stopping), timeout=2 * STOP_SECONDS)
    for agent in agents:
        ray.kill(agent)
    give_all_back()


def lines_of(status: Mapping[str, Any]) -> list[str]:
    """The cluster's nodes and replicas, and what waits for what, a line each."""
    lines = [
        f"node {n['node']} ({n['address']}): {n['problem'] or counted(n['slices'], 'slice')}"
        + (", simulated" if n["simulated"] else "")
        for n in status["nodes"]
    ]
    lines += [f"node {n['node']}: {line}" for n in status["nodes"] for line in n.get("layouts", ())]
    lines += status.get("layouts", ())
    lines += [
        f"{r['replica']} on {r['slice']}: {r['state']}"
        + (f" ({r['reason']})" if r["reason"] else "")
        + (f", to take the place of {r['in_place_of']}" if r.get("in_place_of") else "")
        for r in status["replicas"]
    ]
    lines += [
        f"{f['of']} serves on by an earlier configuration: {f['replica']}, which was to take its place, did not start on "
        f"{f['slice']} ({f['reason']}); another one is tried at {_time(f['retry_at'])}"
        for f in status.get("failed_starts", {}).values()
    ]
    lines += [
        f"{pool}: {counted(row['replicas'], 'replica')} by demand, of {row['least']} to {row['most']}"
        + (
            f", {rate:.3g} requests/s each ({row['capacity_source']})"
            if (rate := row.get("requests_per_replica"))
            else ""
        )
        for pool, row in status.get("scaling", {}).items()
    ]
    lines += [
        f"{model}: {counted(row['replicas'], 'replica')} for its demand ({row['reason']})"
        for model, row in status.get("planned", {}).items()
    ]
    if transition := status.get("transition"):
        lines += _plan_line(transition)
    lines += (status.get("leader") or {}).get("planned", ())
    lines += repartition_lines(status)
    return lines + [f"{replica} has no slice: {reason}" for replica, reason in status["unplaced"].items()]


def _time(text: str) -> str:
    """`14:05:10 UTC`."""
    return f"{datetime.fromisoformat(text).astimezone(UTC):%H:%M:%S} UTC"


def _plan_line(transition: Mapping[str, Any]) -> list[str]:
    far = f"{transition['done']} of {counted(transition['steps'], 'step')} done"
    if transition["under_way"]:
        what = "GPUs are cut anew for demand" if transition.get("why") == "demand" else "a plan is carried out"
        return [f"{what}: {far}"]
    if transition["error"] is None:
        return []
    return [f"the last plan was stopped, {far}: {transition['error']['message']}"]


def repartition_lines(status: Mapping[str, Any]) -> list[str]:
    """Cutting GPUs anew for demand, as its leader tells: what is weighed or proposed, or how the last attempt ended."""
    told = (status.get("leader") or {}).get("repartition")
    if told is None:
        return []
    if told["running"]:
        return [f"cutting GPUs anew for demand: {told['step'] or 'weighing it'}"]
    if told["proposed"]:
        return [
            f"cutting GPUs anew for demand is proposed: {told['proposed']}; sliceway plan CONFIG --ray HOST:PORT shows it"
        ]
    last = told["events"][-1] if told["events"] else None
    return [f"cutting GPUs anew for demand: {last['result']}: {last['reason']}"] if last else []


def _as_text(config: Config) -> str:
    return json.dumps(config.model_dump(mode="json", exclude_unset=True))


def _shared(config: Config) -> dict[str, str]:
    """The files that gateways need beside the configuration, as they are, in base64."""
    found = {}
    for name in SHARED_FILES:
        with contextlib.suppress(OSError):
            found[name] = base64.b64encode((config.state / name).read_bytes()).decode()
    return found


def _reloads(config: Config, known: int = 0) -> int:
    """How often operators have asked for the configuration to be read again; `known` where what they left cannot be read."""
    try:
        return OverlayStore(config.state).load().reloads
    except OverlayError:
        return known


@contextlib.contextmanager
def on_signal(number: signal.Signals, event: threading.Event) -> Iterator[None]:
    """Have the signal set `event` for as long as the block runs."""
    before = signal.signal(number, lambda *_: event.set())
    try:
        yield
    finally:
        signal.signal(number, before)
