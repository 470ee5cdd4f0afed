"""`sliceway up`, `down`, and the two processes that `up` starts: `controller` and `gateway`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from gateway.cli.cluster import up_on_ray
from gateway.cli.live import JsonView, PlainView, TerminalView, View
from gateway.cli.locate import ConfigArgument, config_path
from gateway.cli.output import Json, err, out, print_json
from gateway.cli.simulate import Simulate
from gateway.config import Config, load_config
from gateway.front import Front, Snapshot, read_last_good
from gateway.layouts import machine_of, one_at_a_time, placement_config, with_simulation
from gateway.repartitioning import repartitioner
from gateway.rooms import PlannedRooms
from gateway.shutdown import Stopped, stop_everything
from gateway.starting_layouts import cut_at_start
from model_registry.errors import ConfigError, SlicewayError
from placement.cluster.seats import run_seats
from placement.controller import Controller
from placement.goals import Goals, PlacementConfig, Workshop
from placement.locks import exclusive
from placement.replicas.ending import first_of
from placement.simulate import enter
from placement.sources import Sources, preflight
from placement.state import StatePaths

Listen = Annotated[
    str | None, typer.Option("--listen", help="Another address than `gateway.listen`, like 127.0.0.1:8081.")
]
StateDir = Annotated[
    Path | None,
    typer.Option(help="Where the last good configuration lies, to start with if this one is wrong.", hidden=True),
]

_LOOK_SECONDS = 0.2


def register(app: typer.Typer) -> None:
    """Add `up`, `down`, `controller` and `gateway`."""
    for command in (up, down, controller, gateway):
        app.command()(command)


def up(
    config: ConfigArgument = None,
    listen: Listen = None,
    once: Annotated[
        bool, typer.Option("--once", help="Stop again when everything is ready: a test of the configuration.")
    ] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="Serve what fits, even if not every replica has a slice.")
    ] = False,
    simulate: Simulate = None,
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="[ADDRESS]", help="On several machines: the cluster there, or a new one here."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Cut GPUs as configured, start an engine per replica and the gateway in front of them; serve until Ctrl-C.

    Everything is checked before anything starts. SIGHUP reads the configuration again; a wrong one changes nothing.
    If this process is killed, engines and gateway go on, and the next `up` finds them.
    """
    path = config_path(config)
    loaded = with_simulation(_with_listen(load_config(path), listen), simulate)
    if ray is not None:
        up_on_ray(path, loaded, ray, listen=listen)
        return
    view = _view(as_json=as_json)
    enter(loaded.fleet, loaded.state)
    workshop = _workshop(loaded)
    workshop.paths.prepare(workshop.environ)
    remedy = "Use that one, or stop it: `sliceway down CONFIG`, or kill {pid}."
    with exclusive(workshop.paths.up_lock, what="`sliceway up`", remedy=remedy):
        layouts = cut_at_start(loaded, path)
        for line in layouts.said:
            view.say(line)
        try:
            goals = preflight(placement_sources(path, simulate), workshop, partial=partial)
        except SlicewayError as error:
            raise layouts.explain(error) from None
        for line in _before(goals):
            view.say(line)
        code = asyncio.run(_serve(Front(loaded, path, listen=listen, simulate=simulate), view, once=once))
    raise typer.Exit(code)


def controller(
    config: ConfigArgument = None,
    simulate: Simulate = None,
    state_dir: StateDir = None,
    seats: Annotated[
        Path | None,
        typer.Option(help="Run these replicas on these slices, as a cluster's agent has them.", hidden=True),
    ] = None,
) -> None:
    """Run the placement controller alone: engines on slices, and the routing table."""
    path = config_path(config)
    try:
        loaded = with_simulation(load_config(path), simulate)
        enter(loaded.fleet, loaded.state)
        paths = StatePaths(loaded.state)
    except ConfigError:
        if state_dir is None:
            raise
        paths = StatePaths(state_dir)  # it goes on with the last good configuration if engines run, and says so
    _log_to_stderr()
    workshop = Workshop(paths, dict(os.environ))
    if seats is not None:
        asyncio.run(run_seats(seats, placement_sources(path, simulate), workshop))
        return
    asyncio.run(Controller(placement_sources(path, simulate), workshop).run())


def gateway(
    config: ConfigArgument = None,
    listen: Listen = None,
    state_dir: StateDir = None,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Replace the gateway that serves there, without a request lost.")
    ] = False,
) -> None:
    """Run the gateway alone: on the routing table, and on models that name `endpoints`."""
    from gateway.wiring import (
        serve_gateway,
    )  # the web stack takes half a second to import, which no other command needs

    path = config_path(config)
    try:
        loaded = load_config(path)
    except ConfigError as error:
        last = read_last_good(StatePaths(state_dir)) if state_dir else None
        if last is None:
            raise
        err.print(f"the configuration is wrong, going on with the last good one: {escape(str(error))}", highlight=False)
        loaded = last
    chosen = _with_listen(loaded, listen)
    raise typer.Exit(serve_gateway(chosen, config_path=path.absolute(), take_over_running=take_over))


def down(config: ConfigArgument = None, as_json: Json = False) -> None:
    """Stop whatever runs for this configuration: `up`, gateway, controller and engines. Requests may finish."""
    loaded = load_config(config_path(config))
    status = contextlib.nullcontext() if as_json else err.status("stopping; requests may finish")
    with status:
        stopped = asyncio.run(stop_everything(loaded))
    if as_json:
        print_json(stopped.as_dict())
        return
    out.print(_summary(stopped), highlight=False)


def placement_sources(path: Path, simulate: str | None = None) -> Sources:
    """How the controller reads the sections it acts on, anew at every call; on simulated GPUs if `simulate` names some."""

    def load() -> PlacementConfig:
        return placement_config(with_simulation(load_config(path), simulate))

    def whole() -> Config:
        return with_simulation(load_config(path), simulate)

    @contextlib.contextmanager
    def alone() -> Iterator[None]:
        config = whole()
        with one_at_a_time(config, machine_of(config)):
            yield

    return Sources(
        load=load,
        name=str(path.absolute()),
        repartitioner=repartitioner(whole),
        alone=alone,
        rooms=PlannedRooms(whole),
    )


async def _serve(front: Front, view: View, *, once: bool) -> int:
    """Until a signal asks to stop, or nothing can ever be served. The exit status."""
    stop = asyncio.Event()
    with _signals(stop, front):
        front.begin()
        try:
            code = await _watch(front, view, stop, once=once)
        finally:
            await _stop(front, view, stop)
    view.say("stopped")
    return code


async def _watch(front: Front, view: View, stop: asyncio.Event, *, once: bool) -> int:
    announced = False
    while not stop.is_set():
        snapshot = front.snapshot()
        view.show(snapshot)
        if snapshot.settled and not announced:
            announced = True
            view.say(_announcement(front, snapshot))
            if once or (snapshot.failed and not snapshot.ready):
                return 1 if snapshot.failed else 0
        await first_of(asyncio.sleep(_LOOK_SECONDS), stop.wait())
    return 0


async def _stop(front: Front, view: View, stop: asyncio.Event) -> None:
    stop.clear()
    stopping = asyncio.create_task(front.stop())
    await asyncio.sleep(0)  # from here on snapshots look at what stops, not at what should run
    hurried = False
    while not stopping.done():
        view.show(front.snapshot())
        await asyncio.wait({stopping}, timeout=_LOOK_SECONDS)
        if stop.is_set() and not hurried:
            hurried = True
            view.say("asked again: ending everything now")
            front.hurry()
    view.close()
    await stopping


def _announcement(front: Front, snapshot: Snapshot) -> str:
    if snapshot.status is None or (snapshot.failed and not snapshot.ready):
        return "no replica serves; see above for each one's reason"
    models = sorted({r.model for r in snapshot.status.replicas if r.state == "ready"})
    what = ", ".join(models) or "no model of its own"
    short = f"; {snapshot.failed} of the replicas cannot serve" if snapshot.failed else ""
    return f"serving {what} on {front.url}/v1{short}. Ctrl-C stops."


@contextlib.contextmanager
def _signals(stop: asyncio.Event, front: Front) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    renewals: list[asyncio.Task[None]] = []
    handlers = {
        signal.SIGINT: stop.set,
        signal.SIGTERM: stop.set,
        signal.SIGHUP: front.reload,
        signal.SIGUSR1: lambda: renewals.append(loop.create_task(front.renew())),
    }
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)
        for renewal in renewals:
            renewal.cancel()


def _before(goals: Goals) -> Iterator[str]:
    yield from (f"note: {note}" for note in goals.inventory.notes)
    yield from (f"left out: {replica}: {error.message}" for replica, error in goals.unplaced.items())


def _summary(stopped: Stopped) -> str:
    if not stopped.names:
        return "nothing was running"
    return f"stopped: {', '.join(stopped.names)}"


def _with_listen(config: Config, listen: str | None) -> Config:
    if listen is None:
        return config
    try:
        changed = type(config.gateway).model_validate(config.gateway.model_dump() | {"listen": listen})
    except ValueError as error:
        raise ConfigError(
            f"{listen!r} is no address to listen on", where="--listen", remedy="Write it like 127.0.0.1:8080."
        ) from error
    return config.model_copy(update={"gateway": changed})


def _workshop(config: Config) -> Workshop:
    return Workshop(StatePaths(config.state), dict(os.environ))


def _view(*, as_json: bool) -> View:
    if as_json:
        return JsonView()
    return TerminalView(out) if out.is_terminal else PlainView(out)


def _log_to_stderr() -> None:
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S%z",
    )
