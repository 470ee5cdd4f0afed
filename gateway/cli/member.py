"""This machine as a member of a cluster that another one leads. Ray is imported only here, when it is used."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gateway.cli.output import out
from gateway.config import GatewayConfig
from model_registry.errors import ConfigError
from placement.cluster.address import RETRY_SECONDS, knock
from placement.cluster.errors import ClusterError, ClusterUnreachable
from placement.cluster.here import MEMBER_LOCK, LocalNode
from placement.cluster.laying_out import read_laid_out
from placement.inventory import observe
from placement.locks import exclusive
from placement.schema import FleetConfig
from placement.simulate import enter
from placement.slices import Inventory

if TYPE_CHECKING:
    from placement.cluster.start import Machine

LOOK_SECONDS = 0.5
STOP_SECONDS = 90.0


class LayoutsTold:
    """What came of `fleet.layouts` on this machine, said when its agent has written it down, once for each time that it joins; also
    `why` it is not so, where nothing else says that.
    """

    def __init__(self, machine: Machine, *, why: bool) -> None:
        self._machine, self._why = machine, why
        self._told = False

    def look(self) -> None:
        """Say it, if there is something to say by now."""
        if self._told:
            return
        found = read_laid_out(self._machine.paths.layouts)
        if found is None or found.join != self._machine.join:
            return
        self._told = True
        for line in found.said:
            say(line)
        for why in found.why.values() if self._why else ():
            say(f"fleet.layouts is not carried out: {why}")


@contextlib.contextmanager
def alone(machine: Machine) -> Iterator[None]:
    """No other process is this node of a cluster for as long as the block runs, and none has left its Ray behind. Raises
    StateLocked.
    """
    from placement.cluster.start import end_leftover

    lock = exclusive(
        machine.directory / MEMBER_LOCK,
        what=f"part of a cluster named {machine.name!r}",
        remedy="Stop that one first (kill -INT {pid}), or give this one another --name and --state-dir.",
    )
    with lock:
        end_leftover(machine)
        yield


def check_listen(machine: Machine, where: str) -> None:
    """Raises ConfigError, which names `where`, if this machine's gateway could not listen where it is to. A gateway that was left here
    by a process that was killed may: it is replaced.
    """
    if machine.listen is None or LocalNode(machine.name, machine.paths, None).process("gateway") is not None:
        return
    host, _, port = machine.listen.rpartition(":")
    try:
        GatewayConfig.model_validate({"listen": machine.listen})
        if int(port) > 65535:
            raise ValueError(port)
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        with socket.socket(found[0][0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier gateway may linger
            probe.bind(found[0][4])
    except ValueError as error:
        raise ConfigError(
            f"{machine.listen!r} is no address to listen on", where=where, remedy="Write it like 127.0.0.1:8080."
        ) from error
    except OSError as error:
        raise ConfigError(
            f"no gateway can listen on {machine.listen}: {error.strerror or error}",
            where=where,
            remedy="Stop what listens there, which `ss -ltnp` shows, or choose an address and a port of this machine that are free.",
        ) from error


def belong(machine: Machine, address: str, stop: threading.Event, deadline: float) -> None:
    """Join, and join again, until `stop`. Raises ClusterUnreachable where the first time does not succeed until `deadline`
    (monotonic), and what else keeps it from succeeding at once; afterwards engines are at work here, and there is no end to trying.
    """
    joined = False
    while not stop.is_set():
        try:
            joined = _member(machine, address, stop) or joined
        except ClusterError as error:
            if not joined and (not isinstance(error, ClusterUnreachable) or time.monotonic() >= deadline):
                raise
            say(str(error))
            stop.wait(RETRY_SECONDS)
    if joined:
        stop_processes(machine)  # also where the cluster was lost, and nobody is left to ask for it


def _member(machine: Machine, address: str, stop: threading.Event) -> bool:
    """This machine's part in the cluster, until `stop` or until Ray here has ended. Whether it joined before `stop`. Raises
    ClusterError.

    This process talks to Ray only while it joins and leaves: Ray ends a process that is connected when its head is gone for a minute.
    """
    from placement.cluster.start import Raylet, offer

    raylet = Raylet(machine, inventory_of(machine), address=address)
    try:
        try:
            if not raylet.wait_until_joined(machine.name, stop):
                return False
            if offer(machine, address, stop):
                say(f"{machine.name} has joined {address}")
        finally:
            disconnect()
        layouts = LayoutsTold(machine, why=True)
        while not raylet.ended and not stop.wait(LOOK_SECONDS):
            layouts.look()
        if stop.is_set():
            _leave(machine, address)
        else:
            say("the cluster is lost; engines go on, joining again as soon as it is there")
        return True
    finally:
        raylet.stop()


def disconnect() -> None:
    """Before Ray here is ended: it would end this process with it."""
    import ray

    from placement.cluster.start import own_sigterm

    with own_sigterm(), contextlib.suppress(Exception):
        ray.shutdown()


def _leave(machine: Machine, address: str) -> None:
    """End this machine's agent, and its engines in order, also where the cluster has ended already."""
    try:
        knock(address)
    except ClusterUnreachable:
        say("the cluster does not answer; leaving without it")
        stop_processes(machine)
        return
    try:
        _take_leave(machine.name, address)
    finally:
        stop_processes(machine)


def stop_processes(machine: Machine) -> None:
    """End this machine's gateway, and its controller with its engines, if they run. What the head last said of demand holds no longer."""
    from placement.cluster.processes import LocalProcesses

    LocalProcesses(machine.paths, machine.command, {}).stop(seconds=STOP_SECONDS)
    machine.paths.gateway.cluster_scaling.unlink(missing_ok=True)


def _take_leave(name: str, address: str) -> None:
    """Have the agent end everything, and end it, so that the head seats nothing here again."""
    import ray

    from placement.cluster.actors import AGENT, NAMESPACE
    from placement.cluster.asking import asking
    from placement.cluster.start import connect

    try:
        with asking("this node's agent", address):
            connect(address)
            agent: Any = ray.get_actor(AGENT + name, namespace=NAMESPACE)
            ray.get(agent.stop.remote(STOP_SECONDS), timeout=2 * STOP_SECONDS)
            ray.kill(agent)
    except (ClusterError, ValueError) as error:
        say(f"leaving without the cluster: {error}")
    finally:
        disconnect()


def inventory_of(machine: Machine) -> Inventory:
    """What this machine has to offer."""
    fleet = FleetConfig.model_validate(machine.fleet)
    machine.paths.engines.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    enter(fleet, machine.paths.engines.root)
    return observe(fleet)


def say(text: str) -> None:
    """A line for whoever runs the command."""
    out.print(text, highlight=False, markup=False)
