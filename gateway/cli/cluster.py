"""`sliceway up CONFIG --ray` and `sliceway node`: several machines as one fleet. Ray is imported only here, when it is used."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.cli.cluster_token import PORT_FILE, TOKEN_FILE, existing, own_token, states_here, token_for
from gateway.cli.leading import Leader, actors, claim, end, lead, lines_of, on_signal
from gateway.cli.member import STOP_SECONDS, alone, belong, check_listen, disconnect, inventory_of, say, stop_processes
from gateway.cli.output import Json, err, out, print_json
from gateway.config import Config
from model_registry.atomic import write_atomically
from model_registry.errors import ConfigError, SlicewayError
from placement.cluster.address import PATIENCE_SECONDS, wait_for_answer
from placement.cluster.errors import ClusterError, ClusterLost
from placement.cluster.ray_tls import encrypts, in_clear
from placement.errors import PlacementError
from placement.locks import exclusive
from placement.simulate import simulated_fleet
from placement.state import StatePaths

if TYPE_CHECKING:
    from placement.cluster.start import Machine

LOCAL = "local"

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
    prepare_ray(existing(token))
    from placement.cluster.start import own_address

    machine = _machine(
        name or socket.gethostname(),
        own_address(address),
        state_dir.absolute(),
        _fleet(cores or [], memory, simulate),
        listen,
    )
    _warn(address)
    with alone(machine), _stopping() as stop:
        check_listen(machine, "--listen")
        deadline = time.monotonic() + PATIENCE_SECONDS
        if wait_for_answer(address, pause=stop.wait, say=say):
            belong(machine, address, stop, deadline)


@node.command("list")
def list_nodes(
    address: Annotated[str, typer.Argument(help="The cluster's address.")], token: Token = None, as_json: Json = False
) -> None:
    """The cluster's nodes and replicas, and what waits for what."""
    prepare_ray(token_for(address, token, states_here()))
    import ray

    from placement.cluster.actors import HEAD, NAMESPACE
    from placement.cluster.asking import ANSWER_SECONDS, asking
    from placement.cluster.start import connect

    connect(address)
    try:
        with asking("the cluster's head", address):
            head: Any = ray.get_actor(HEAD, namespace=NAMESPACE)
            status: Any = ray.get(head.status.remote(), timeout=ANSWER_SECONDS)
    except ValueError as error:
        raise PlacementError(
            "this cluster has no head yet", where=address, remedy="Start one: sliceway up CONFIG --ray ADDRESS"
        ) from error
    if as_json:
        print_json(status)
        return
    for line in lines_of(status):
        out.print(line, highlight=False, markup=False)


@node.command()
def upgrade(
    address: Annotated[str, typer.Argument(help="The cluster's address.")], token: Token = None, as_json: Json = False
) -> None:
    """Replace every node's gateway and controller by the installed version, one node after another, without a request lost.

    Engines run on; they are replaced where the configuration or the installed engine asks for others.
    """
    prepare_ray(token_for(address, token, states_here()))
    from placement.cluster.actors import AGENT
    from placement.cluster.asking import asking
    from placement.cluster.start import connect

    connect(address)
    with asking("the cluster", address):
        nodes = [name.removeprefix(AGENT) for name in sorted(actors()) if name.startswith(AGENT)]
    done: list[str] = []
    for name in nodes:
        _renew(name, address, done)
        done.append(name)
        if not as_json:
            say(f"node {name}: another gateway and another controller")
    if as_json:
        print_json({"nodes": done})


def _renew(name: str, address: str, done: Sequence[str]) -> None:
    """Replace one node's gateway and controller. Raises ClusterError, which also says which nodes are `done`."""
    import ray

    from placement.cluster.actors import AGENT, NAMESPACE
    from placement.cluster.asking import asking

    try:
        with asking("its agent", address):
            agent: Any = ray.get_actor(AGENT + name, namespace=NAMESPACE)
            ray.get(agent.renew.remote(), timeout=STOP_SECONDS)
    except (SlicewayError, ValueError) as error:
        why = error.message if isinstance(error, SlicewayError) else "it has left the cluster meanwhile"
        far = f"Upgraded are {', '.join(done)}." if done else "No node is upgraded."
        raise ClusterError(
            f"node {name!r} was not upgraded, nor were those after it: {why}. {far}",
            where=address,
            remedy="Nothing of what serves has ended. Look at `sliceway node list`, and run the same command again: a node that is "
            "upgraded already is replaced once more, without a request lost.",
        ) from error


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
    prepare_ray(own_token(config.state) if local else None)
    from placement.cluster.start import Raylet, connect, own_address

    raylet = None
    machine = None
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_stopping())
        stack.enter_context(_only_up(config.state))
        endings = stack.enter_context(contextlib.ExitStack())  # not where the cluster is lost: what serves goes on then
        if local:
            fleet = config.fleet.model_dump(mode="json", exclude_unset=True)
            machine = _machine(
                socket.gethostname(), own_address(), config.state, fleet, listen or config.gateway.listen
            )
            stack.enter_context(alone(machine))
            check_listen(machine, "gateway.listen" if listen is None else "--listen")
            port = _port(config.state / PORT_FILE, machine.address)
            raylet = Raylet(machine, inventory_of(machine), address=None, port=port)
            address = raylet.address
        try:
            if raylet is not None and machine is not None:
                if not raylet.wait_until_joined(machine.name, stop):
                    return
            else:
                connect(address)
            head = claim(address)
            _warn(address)
            _say_where(address, config.state / TOKEN_FILE if local else None)
            if machine is not None:  # when Ray here has ended, also where another process leads the cluster
                endings.callback(stop_processes, machine)
            with contextlib.ExitStack() as before:
                before.callback(end, head, address)
                try:
                    lead(Leader(head, address, path, config, raylet), machine, stop)
                except ClusterLost:
                    before.pop_all()
                    endings.pop_all()
                    raise
        finally:
            disconnect()
            if raylet is not None:
                raylet.stop()


def _warn(address: str) -> None:
    """Say it where others may read what this machine tells the cluster."""
    if said := in_clear(address, os.environ):
        err.print(said, style="yellow", highlight=False, markup=False)


def _say_where(address: str, token: Path | None) -> None:
    option = f" --token-file {token}" if token is not None else ""
    out.print(f"cluster at {address}; other machines join with: sliceway node join {address}{option}", highlight=False)


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


@contextlib.contextmanager
def _only_up(state: Path) -> Iterator[None]:
    """No other `sliceway up` works in this state directory for as long as the block runs, with a cluster or without. Raises StateLocked."""
    lock = exclusive(
        StatePaths(state).up_lock,
        what="`sliceway up`",
        remedy="Stop it first: `sliceway down CONFIG`, or kill -INT {pid}.",
    )
    # What replaces the processes of an `up` without a cluster would end this one.
    with lock, on_signal(signal.SIGUSR1, threading.Event()):
        yield


@contextlib.contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set."""
    stop = threading.Event()
    with on_signal(signal.SIGINT, stop), on_signal(signal.SIGTERM, stop):
        yield stop


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


def prepare_ray(token: Path | None) -> None:
    """Set what Ray reads when it is imported: no usage reports, and the token that everybody in the cluster must show.

    Raises ConfigError where Ray is to encrypt and cannot, PlacementError where it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if token is not None:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token.absolute())}
    encrypts(os.environ)
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise PlacementError(
            "Ray is not installed here",
            remedy="Install it on every machine of the cluster: in the checkout: pip install '.[ray]'",
        ) from error
