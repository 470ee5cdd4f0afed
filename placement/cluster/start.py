"""Starting Ray on this machine, and this machine's part in a cluster."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
from ray.exceptions import AuthenticationError, GetTimeoutError, RayError

from model_registry.atomic import write_atomically
from placement.cluster.actors import NAMESPACE, start_agent
from placement.cluster.address import PATIENCE_SECONDS, knock
from placement.cluster.asking import asking, token_refused
from placement.cluster.errors import ClusterUnreachable, NodeMismatch, SliceHeld
from placement.cluster.members import Owner, Versions
from placement.cluster.node import NodePaths
from placement.cluster.offers import JOIN_PREFIX, NODE_UNITS, node_resource, offered
from placement.cluster.processes import ends
from placement.cluster.ray_words import kept_from_terminal
from placement.cluster.seats import owner_lives
from placement.replicas.procfs import ProcessIdentity
from placement.slices import Inventory

log = logging.getLogger(__name__)

START_SECONDS = 60.0
NAME_SECONDS = 120.0  # Ray takes a machine that is off for lost after five looks of ten seconds
_STOP_SECONDS = 20.0
_LOOK_SECONDS = 0.5
_LOST_SECONDS = 15.0
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
_RAY_ENVIRONMENT = {
    # Ray looks at GPUs as whole cards, and would hide a slice from its engine.
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # What Ray starts gives way to everything else on the machine (nice 15), and so would the engines and gateways that agents start.
    "RAY_worker_niceness": "0",
}


@dataclass(frozen=True, slots=True)
class Machine:
    """What this machine brings into a cluster.

    `fleet` is its own `fleet:` section as data, `command` what `sliceway` is here, `listen` where its gateway listens (None: it
    has none). `join` is this time of joining, for which GPUs are cut once (`laying_out`).
    """

    name: str
    address: str
    directory: Path
    fleet: Mapping[str, Any]
    command: Sequence[str]
    listen: str | None
    usage_reporting: bool = False
    join: str = field(default_factory=lambda: uuid4().hex)

    def as_node(self) -> Mapping[str, Any]:
        """As an agent is told."""
        return {
            "name": self.name,
            "address": self.address,
            "directory": str(self.directory),
            "fleet": dict(self.fleet),
            "command": list(self.command),
            "listen": self.listen,
            "join": self.join,
            "versions": own_versions().model_dump(),
        }

    @property
    def paths(self) -> NodePaths:
        """Its files."""
        return NodePaths(self.directory)


def own_versions() -> Versions:
    """What runs here."""
    return Versions(
        sliceway=metadata.version("sliceway"),
        python=".".join(platform.python_version_tuple()[:2]),
        ray=ray.__version__,
    )


def own_address(towards: str | None = None) -> str:
    """The address that other machines reach this one by: of the interface towards `towards`, or of the default route."""
    host = towards.rpartition(":")[0] if towards else "192.0.2.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting sends nothing
        try:
            probe.connect((host, 9))
            found: str = probe.getsockname()[0]
        except OSError:
            found = "127.0.0.1"
    return found


class Raylet:
    """Ray on this machine, as a process of ours: it ends when we do."""

    def __init__(self, machine: Machine, inventory: Inventory, *, address: str | None, port: int | None = None) -> None:
        """Join the cluster at `address`, or be the first node of one that listens on `port`."""
        head = ["--head", f"--port={port}", "--include-dashboard=false", f"--ray-client-server-port={_free_port()}"]
        where = head if address is None else [f"--address={address}"]
        self.address = address or f"{machine.address}:{port}"
        self._own = JOIN_PREFIX + uuid4().hex
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *where),
            f"--node-ip-address={machine.address}",
            "--num-gpus=0",
            "--dashboard-agent-listen-port=0",  # else one that is the same on every machine, and for every node on it
            f"--resources={json.dumps({**offered(machine.name, inventory), self._own: 1.0})}",
        ]
        logs = machine.directory / "logs"
        logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (logs / "ray.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | _RAY_ENVIRONMENT,
                start_new_session=True,
            )
        self._log = logs / "ray.log"
        self.first = address is None
        self._record = _record(machine)
        if (identity := ProcessIdentity.of(self._process.pid)) is not None:
            owner = Owner(pid=identity.pid, start_ticks=identity.start_ticks, boot_id=identity.boot_id)
            write_atomically(self._record, owner.model_dump_json().encode(), mode=0o600)

    @property
    def log(self) -> Path:
        """Where Ray on this machine says what it has to say."""
        return self._log

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    def wait_until_joined(self, node: str, stop: threading.Event) -> bool:
        """True when this machine's slices are in the cluster's books; False if `stop` was set before.

        Raises ClusterUnreachable, NodeMismatch, TokenRefused; SliceHeld where another machine is in the books under this name and
        does not go.
        """
        began, there, away = time.monotonic(), 0.0, _Away(self.address)
        while time.monotonic() - began < (NAME_SECONDS if there else START_SECONDS) and not self.ended:
            if stop.is_set():
                return False
            if not ray.is_initialized():
                self._connect(stop)
            elif away.for_long():
                break
            elif (there := units_of(node, self._own, there)) == NODE_UNITS:
                return True
            stop.wait(0.2)
        if there and not self.ended and not away.for_long():
            raise SliceHeld(
                f"another machine has joined {self.address} as {node!r} already",
                where=node,
                remedy="Give this one another --name. One that has lost its power is forgotten after about a minute.",
            )
        if self.first:
            raise ClusterUnreachable(
                f"Ray on this machine is not at work: {self.last_words()}",
                where=str(self._log),
                remedy="The log says more. Where the machine has much else to do Ray gives up after half a minute: run this again then.",
            )
        raise ClusterUnreachable(
            f"this machine could not join the cluster at {self.address}: {self.last_words()}",
            where=str(self._log),
            remedy="Check the address, that its port can be reached from here, that both run the same Ray and Python, and that "
            "--token-file is a copy of this cluster's cluster.token.",
        )

    def _connect(self, stop: threading.Event) -> None:
        try:
            connect(self.address)
        except ClusterUnreachable:
            stop.wait(0.3)

    def last_words(self) -> str:
        """The last line that Ray on this machine has said."""
        text = _ESCAPES.sub("", self._log.read_text(errors="replace", encoding="utf-8"))
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else "Ray said nothing"

    def stop(self) -> None:
        """End it, and what Ray has started on this machine for it."""
        end_group(self._process)
        self._record.unlink(missing_ok=True)


class _Away:
    """Whether nobody answers at a cluster's address any more: a minute later Ray would end the process that was connected to it."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._since: float | None = None

    def for_long(self) -> bool:
        now = time.monotonic()
        try:
            knock(self._address)
        except ClusterUnreachable:
            self._since = now if self._since is None else self._since
        else:
            self._since = None
        return self._since is not None and now - self._since >= _LOST_SECONDS


def units_of(node: str, own: str, before: float) -> float:
    """What the cluster's books have of this node's name once this machine, which offers `own`, is in them: until then another one
    would be taken for it. As `before` where nobody reads them out at the moment.
    """
    cluster: Any = ray
    try:
        books: Mapping[str, float] = cluster.cluster_resources()
    except RayError:
        return before
    return float(books.get(node_resource(node), 0.0)) if own in books else before


def _record(machine: Machine) -> Path:
    return machine.directory / "raylet.json"


def end_leftover(machine: Machine) -> None:
    """End Ray on this machine where it was left behind by a process that was killed: this machine is in the cluster's books with it,
    and could not join again.
    """
    record = _record(machine)
    try:
        owner = Owner.model_validate_json(record.read_bytes())
    except (OSError, ValueError):
        return
    if owner_lives(owner):
        with contextlib.suppress(ProcessLookupError):
            os.kill(owner.pid, signal.SIGTERM)
            ends(owner, _STOP_SECONDS)
            os.killpg(owner.pid, signal.SIGKILL)
    record.unlink(missing_ok=True)


def _free_port() -> int:
    """For Ray's client server: it takes 10001 unless it is told another one, and cannot be told to have none."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def end_group(process: subprocess.Popen[bytes], patience_seconds: float = _STOP_SECONDS) -> None:
    """End `process`, the leader of its own process group, and whatever of the group it leaves behind, or has left already.

    Ray ends its servers when it is asked to, but not when it fails, or is asked before it is at work. Engines, controllers
    and gateways are in groups of their own.
    """
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def connect(address: str) -> None:
    """Have this process talk to the cluster at `address`. Raises ClusterUnreachable, NodeMismatch, TokenRefused."""
    os.environ.update(_RAY_ENVIRONMENT)
    knock(address)
    try:
        _introduce(address)
        with own_sigterm():
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    except RuntimeError as error:
        if "version mismatch" in str(error).lower():
            raise NodeMismatch(
                f"this machine runs another Ray or Python than the cluster at {address}: {error}",
                remedy="Install the same versions on every node.",
            ) from error
        raise ClusterUnreachable(f"no cluster answers at {address}: {error}", remedy="Check the address.") from error
    except AuthenticationError as error:
        raise token_refused(address) from error
    except (RayError, ConnectionError, ValueError, OSError) as error:
        raise ClusterUnreachable(
            f"no cluster answers at {address}: {error}",
            remedy="Start one with `sliceway up CONFIG --ray`, which prints its address. What answers there is no Ray, is not "
            "at work yet, or encrypts (RAY_USE_TLS) where this machine does not, or the other way round.",
        ) from error


@contextlib.contextmanager
def own_sigterm() -> Iterator[None]:
    """What SIGTERM does stays what it was: after `ray.init`, and after `ray.shutdown`, it would end the process at once, with engines and
    Ray left behind.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _introduce(address: str) -> None:
    """Ask whether this process is let in. `ray.init` would take a wrong token for a cluster that is not at work yet, and try for
    half a minute. Raises RayError.
    """
    ensure_token_if_auth_enabled(create_token_if_missing=False)  # without one the client would abort
    with kept_from_terminal(log.info):  # it is raised as well
        GcsClient(address=address)


def offer(machine: Machine, address: str, stop: threading.Event) -> bool:
    """Have an agent offer this machine's slices. False if `stop` was set before it did. Raises ClusterError."""
    whom = f"the agent of node {machine.name!r}"
    cluster: Any = ray
    with asking(whom, address):
        report: Any = start_agent(machine.as_node()).report.remote()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not stop.is_set():
            if cluster.wait([report], timeout=_LOOK_SECONDS)[0]:
                cluster.get(report)
                return True
            if time.monotonic() >= deadline:
                raise GetTimeoutError
    return False
