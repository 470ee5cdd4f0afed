"""`sliceway up CONFIG --ray` and `sliceway node`: several machines as one fleet. Ray is imported only here, when it is used."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.cli.member import LOOK_SECONDS, STOP_SECONDS, alone, belong, disconnect, inventory_of, say, stop_processes
from gateway.cli.output import Json, out, print_json
from gateway.config import Config, load_config
from model_registry.atomic import write_atomically
from model_registry.errors import ConfigError, SlicewayError
from model_registry.words import counted
from placement.cluster.address import PATIENCE_SECONDS, wait_for_answer
from placement.cluster.errors import ClusterLed
from placement.errors import PlacementError
from placement.simulate import simulated_fleet

if TYPE_CHECKING:
    from placement.cluster.start import Machine

LOCAL = "local"
TOKEN_FILE, PORT_FILE = "cluster.token", "cluster.port"
# Of the gateways' state directory: what a tenant's key is checked with.
SHARED_FILES = ("keys.json", "keys.secret")
_LED_REMEDY = "Change that configuration and send its process SIGHUP, or stop it first."

node = typer.Typer(help="This machine as a part of a cluster.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add `node`."""
    app.add_typer(node, name="node")


Name = Annotated[str | None, typer.Option("--name", help="This machine's name in the cluster; its host name if unset.")]
Token = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        help="A copy of the cluster's token. Ray's own RAY_AUTH_MODE and RAY_AUTH_TOKEN count without it.",
    ),
]
Directory = Annotated[Path, typer.Option("--state-dir", help="Where this machine keeps journals, logs and sockets.")]


@node.command()
def join(
    address: Annotated[str, typer.Argument(help="The cluster's address, as `sliceway up CONFIG --ray` prints it.")],
    name: Name = None,
    cores: Annotated[
        list[str] | None, typer.Option(help="Offer a cpu slice of these cores, like 0-3; may be given several times.")
    ] = None,
    memory: Annotated[str, typer.Option(help="Memory of each cpu slice that --cores makes.")] = "4GiB",
    simulate: Annotated[
        str | None, typer.Option(metavar="FLEET", help="Offer simulated GPUs, like h100-sxm:8.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option(help="Run a gateway here too, on this address, like 0.0.0.0:8080.")
    ] = None,
    token: Token = None,
    state_dir: Directory = Path(".sliceway"),
) -> None:
    """Offer this machine's slices to a cluster, until Ctrl-C.

    A cluster that does not answer is waited for, five minutes the first time. If its head is lost later, engines go on, and this
    machine joins again as soon as there is one.
    """
    _prepare_ray(_existing(token))
    from placement.cluster.start import own_address

    machine = _machine(
        name or socket.gethostname(),
        own_address(address),
        state_dir.absolute(),
        _fleet(cores or [], memory, simulate),
        listen,
    )
    with alone(machine), _stopping() as stop:
        deadline = time.monotonic() + PATIENCE_SECONDS
        if wait_for_answer(address, pause=stop.wait, say=say):
            belong(machine, address, stop, deadline)


@node.command("list")
def list_nodes(
    address: Annotated[str, typer.Argument(help="The cluster's address.")], token: Token = None, as_json: Json = False
) -> None:
    """The cluster's nodes and replicas, and what waits for what."""
    _prepare_ray(_existing(token))
    import ray

    from placement.cluster.actors import HEAD, NAMESPACE
    from placement.cluster.start import connect

    connect(address)
    try:
        status: Any = ray.get(ray.get_actor(HEAD, namespace=NAMESPACE).status.remote())
    except ValueError as error:
        raise PlacementError(
            "this cluster has no head yet", where=address, remedy="Start one: sliceway up CONFIG --ray ADDRESS"
        ) from error
    if as_json:
        print_json(status)
        return
    for line in _lines(status):
        out.print(line, highlight=False, markup=False)


@node.command()
def upgrade(
    address: Annotated[str, typer.Argument(help="The cluster's address.")], token: Token = None, as_json: Json = False
) -> None:
    """Replace every node's gateway and controller by the installed version, one node after another, without a request lost.

    Engines run on; they are replaced where the configuration or the installed engine asks for others.
    """
    _prepare_ray(_existing(token))
    import ray

    from placement.cluster.actors import AGENT, NAMESPACE
    from placement.cluster.start import connect

    connect(address)
    names = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE]
    done = []
    for name in sorted(n for n in names if n.startswith(AGENT)):
        agent: Any = ray.get_actor(name, namespace=NAMESPACE)
        ray.get(agent.renew.remote(), timeout=STOP_SECONDS)
        done.append(name.removeprefix(AGENT))
        if not as_json:
            out.print(f"node {done[-1]}: another gateway and another controller", highlight=False)
    if as_json:
        print_json({"nodes": done})


def with_ray_address(arguments: list[str]) -> list[str]:
    """`--ray` may stand alone: then this machine is the first of a new cluster. What follows is its value if it is an address."""
    if "--ray" not in arguments:
        return arguments
    after = arguments.index("--ray") + 1
    if after < len(arguments) and re.fullmatch(r"local|auto|\S+:\d+", arguments[after]):
        return arguments
    return [*arguments[:after], LOCAL, *arguments[after:]]


def up_on_ray(path: Path, config: Config, address: str, *, listen: str | None) -> None:
    """Serve `config` on a cluster: the one at `address`, or a new one whose first node is this machine (`local`)."""
    local = address == LOCAL
    _prepare_ray(_own_token(config.state) if local else None)
    from placement.cluster.start import Raylet, connect, own_address

    raylet = None
    machine = None
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_stopping())
        if local:
            fleet = config.fleet.model_dump(mode="json", exclude_unset=True)
            machine = _machine(
                socket.gethostname(), own_address(), config.state, fleet, listen or config.gateway.listen
            )
            stack.enter_context(alone(machine))
            port = _port(config.state / PORT_FILE, machine.address)
            raylet = Raylet(machine, inventory_of(machine), address=None, port=port)
            address = raylet.address
        try:
            if raylet is not None and machine is not None:
                if not raylet.wait_until_joined(machine.name, stop):
                    return
            else:
                connect(address)
            head = _claim(address)
            _say_where(address, config.state / TOKEN_FILE if local else None)
            if machine is not None:  # when Ray here has ended, also where another process leads the cluster
                stack.callback(stop_processes, machine)
            try:
                _lead(head, path, config, machine, stop)
            finally:
                _end(head)
        finally:
            disconnect()
            if raylet is not None:
                raylet.stop()


def _say_where(address: str, token: Path | None) -> None:
    option = f" --token-file {token}" if token is not None else ""
    out.print(f"cluster at {address}; other machines join with: sliceway node join {address}{option}", highlight=False)


def _claim(address: str) -> Any:
    """The cluster's head, which from here on works for this process. Raises ClusterLed, before anything has changed."""
    import ray

    from placement.cluster.actors import start_head
    from placement.cluster.start import own_versions

    head: Any = start_head(own_versions(), secrets.token_urlsafe(32))
    if other := ray.get(head.lead.remote(_me())):
        raise ClusterLed(
            f"the cluster at {address} already works by the configuration of {other}", where=address, remedy=_LED_REMEDY
        )
    return head


def _me() -> str:
    return f"`sliceway up` on {socket.gethostname()}, pid {os.getpid()}"


def _lead(head: Any, path: Path, config: Config, machine: Machine | None, stop: threading.Event) -> None:
    """Have the head work by the file at `path`, and show what comes of it, until `stop`."""
    from placement.cluster.start import offer

    reload = threading.Event()
    with _on(signal.SIGHUP, reload):
        leader = _Leader(head, path, config, reload, stays=machine is not None)
        if machine is not None:
            offer(machine)
        shown: list[str] = []
        while not stop.wait(LOOK_SECONDS):
            lines = leader.look()
            for line in lines:
                if line not in shown:
                    out.print(line, highlight=False, markup=False)
            shown = lines


class _Leader:
    """What the head is told: the file at `path`, once more when `reload` is set, and the tenants' keys when they change."""

    def __init__(self, head: Any, path: Path, config: Config, reload: threading.Event, *, stays: bool) -> None:
        """Have the head begin with `config`. `stays` where the cluster would end with this process."""
        import ray

        self._head, self._path, self._config, self._reload, self._stays = head, path, config, reload, stays
        self._files = _shared(config)
        ray.get(head.aim.remote(_as_text(config), self._files))

    def look(self) -> list[str]:
        """One round: tell what is new, and say how the cluster is. Nothing that keeps the head from answering ends this.

        Raises ClusterLed where another process leads by now, because this one was silent for too long: suspended, for example.
        """
        from ray.exceptions import GetTimeoutError, RayActorError, RayError

        try:
            return self._round()
        except (RayActorError, GetTimeoutError):
            return ["the head is being started again; everything serves on"]
        except RayError as error:
            return [f"the head does not answer, asking again: {getattr(error, 'cause', None) or error}"]

    def _round(self) -> list[str]:
        import ray

        if other := ray.get(self._head.lead.remote(_me()), timeout=10.0):
            return self._give_way(other)
        if self._reload.is_set():
            self._reload.clear()
            self._take_over()
        if (now := _shared(self._config)) != self._files:
            ray.get(self._head.share.remote(now))
            self._files = now
        return _lines(ray.get(self._head.status.remote(), timeout=10.0))

    def _give_way(self, other: str) -> list[str]:
        led = f"the cluster works by the configuration of {other} by now"
        if self._stays:
            return [f"{led}; this process only keeps the cluster's first machine in it, until Ctrl-C"]
        raise ClusterLed(led, where=_me(), remedy=_LED_REMEDY)

    def _take_over(self) -> None:
        """The file as it is, if it is right; a wrong one changes nothing."""
        import ray
        from ray.exceptions import RayError

        try:
            new = load_config(self._path)
            ray.get(self._head.aim.remote(_as_text(new), _shared(new)))
        except SlicewayError as error:
            say(f"the new configuration is refused, everything goes on as before: {error}")
        except RayError:
            self._reload.set()  # it is told again in the next round
            raise
        else:
            self._config = new
            say("taken over the new configuration")


def _end(head: Any) -> None:
    """End everything of ours in the cluster, unless it is another process's by now."""
    import ray
    from ray.exceptions import RayError

    other = None
    with contextlib.suppress(RayError):  # no head: then nobody leads
        other = ray.get(head.lead.remote(_me()), timeout=10.0)
    if other is not None:
        say(f"stopping; the cluster is left to {other}")
        return
    say("stopping; requests may finish")
    _dissolve()


def _dissolve() -> None:
    """End everything of ours in the cluster: the head first, so that it seats nothing again."""
    import ray

    from placement.cluster.actors import AGENT, HEAD, NAMESPACE, give_all_back

    names = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE]
    agents: list[Any] = []
    for name in sorted(names, key=lambda n: n != HEAD):
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


def _lines(status: Mapping[str, Any]) -> list[str]:
    lines = [
        f"node {n['node']} ({n['address']}): {n['problem'] or counted(n['slices'], 'slice')}"
        + (", simulated" if n["simulated"] else "")
        for n in status["nodes"]
    ]
    lines += [
        f"{r['replica']} on {r['slice']}: {r['state']}" + (f" ({r['reason']})" if r["reason"] else "")
        for r in status["replicas"]
    ]
    return lines + [f"{replica} has no slice: {reason}" for replica, reason in status["unplaced"].items()]


def _own_token(state: Path) -> Path:
    """The token of the cluster that begins here, kept in the state directory: who has it may run anything in the cluster."""
    path = state / TOKEN_FILE
    if not path.exists():
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(path, secrets.token_hex(32).encode(), mode=0o600)
    return path


def _existing(token: Path | None) -> Path | None:
    if token is not None and not token.is_file():
        raise ConfigError(
            "there is no token here",
            where=str(token),
            remedy="Copy it from the cluster's first machine (cluster.token).",
        )
    return token


def _machine(name: str, address: str, state: Path, fleet: Mapping[str, Any], listen: str | None) -> Machine:
    from placement.cluster.start import Machine

    return Machine(
        name=name,
        address=address,
        directory=state / "nodes" / name,
        fleet=fleet,
        command=(sys.executable, "-m", "gateway.cli"),
        listen=listen,
    )


def _fleet(cores: list[str], memory: str, simulate: str | None) -> dict[str, Any]:
    if cores and simulate:
        raise ConfigError("a node offers cores or simulated GPUs", where="--cores", remedy="Give one of the two.")
    if simulate:
        return simulated_fleet(simulate).model_dump(mode="json", exclude_unset=True)
    slices = [{"kind": "cpu", "id": f"cpu-{i}", "cores": c, "memory": memory} for i, c in enumerate(cores)]
    return {"slices": slices} if slices else {"discover": "auto"}


def _as_text(config: Config) -> str:
    return json.dumps(config.model_dump(mode="json", exclude_unset=True))


def _shared(config: Config) -> dict[str, str]:
    """The files that gateways need beside the configuration, as they are, in base64."""
    found = {}
    for name in SHARED_FILES:
        with contextlib.suppress(OSError):
            found[name] = base64.b64encode((config.state / name).read_bytes()).decode()
    return found


@contextlib.contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set."""
    stop = threading.Event()
    with _on(signal.SIGINT, stop), _on(signal.SIGTERM, stop):
        yield stop


@contextlib.contextmanager
def _on(number: signal.Signals, event: threading.Event) -> Iterator[None]:
    before = signal.signal(number, lambda *_: event.set())
    try:
        yield
    finally:
        signal.signal(number, before)


def _port(kept: Path, address: str) -> int:
    """The port of this cluster: the one of its last start where it is free, so that its members find it again."""
    with contextlib.suppress(OSError, ValueError, OverflowError):
        return _free_port(address, int(kept.read_text(encoding="utf-8")))
    port = _free_port(address)
    kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomically(kept, str(port).encode(), mode=0o600)
    return port


def _free_port(address: str, port: int = 0) -> int:
    """Raises OSError if it is not free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the last start may linger
        probe.bind((address, port))
        return int(probe.getsockname()[1])


def _prepare_ray(token: Path | None) -> None:
    """Set what Ray reads when it is imported: no usage reports, and the token that everybody in the cluster must show."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if token is not None:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token.absolute())}
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise PlacementError(
            "Ray is not installed here",
            remedy="Install it on every machine of the cluster: in the checkout: pip install '.[ray]'",
        ) from error
