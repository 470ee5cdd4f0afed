"""The composition root: every object of the gateway is made here and handed down."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import secrets
import signal
import sys
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import uvicorn
import uvloop

from gateway.admin import Operations, Overlay, OverlayStore
from gateway.admin.access import Access
from gateway.admin.listener import AdminListener, console_access
from gateway.admission import CacheSalts, Loads
from gateway.admission.sharing import LimitShares, LimitStore, RoomShares, Sharing
from gateway.admission.sharing.known_gateways import KnownGateways
from gateway.admission.sharing.local_store import LocalStore
from gateway.admission.sharing.taken import LeftBooks, TakenBook, taken_folder
from gateway.background import BackgroundResponses
from gateway.batches.service import BatchService
from gateway.batches.surroundings import surroundings
from gateway.config import Config, load_config
from gateway.console.app import add_console
from gateway.digests import LatencyBook
from gateway.engine_metrics import EngineMetrics
from gateway.error_map import Headers
from gateway.exchange import Clock, Exchanges
from gateway.figures import FiguresWriter
from gateway.health import HealthBook
from gateway.hotpath import BothEngines, HotEngines, HotPath, hot_protocol
from gateway.ingress import Ingress, cold_app
from gateway.ingress.app import AsgiApp, Lifecycles
from gateway.ingress.handover import Handover, handover_path, take_over
from gateway.ingress.protocol import HeadLimits, bounded_by
from gateway.ingress.server import BACKLOG, DrainingServer, listening_socket
from gateway.key_uses import KeyUses
from gateway.keys import Keyring, Keystore, WallClock
from gateway.metrics import GatewayCollector, MetricsPage
from gateway.relay import LAST_WORDS_SECONDS, AsgiRelay
from gateway.request import ROUTES
from gateway.router import Router
from gateway.secret_values import fetch
from gateway.service import Gateway, Parts
from gateway.slice_metrics import SliceMetrics
from gateway.stats import Stats
from gateway.stored_responses import ResponseIds, secret_in
from gateway.table_watch import Watched
from gateway.tls import ServerTls
from gateway.upstream import Engines
from placement import table
from placement.engine_tls import EngineTrust
from placement.errors import PlacementError
from placement.state import StatePaths
from placement.status import read_cluster_scaling, running_status

log = logging.getLogger("sliceway.gateway")

# How long a thread that computes keeps the loop waiting, at each of the loop's callbacks anew; Python's default is 5 ms.
HANDOVER_SECONDS = 0.0005


def wall_clock() -> float:
    """Seconds since 1970, UTC."""
    return time.time_ns() / 1e9


def create_gateway(
    config: Config,
    *,
    config_path: Path | None = None,
    clock: Clock = time.perf_counter,
    wall: WallClock = wall_clock,
    engines: Engines | None = None,
) -> tuple[Gateway, Ingress]:
    """The gateway and its ASGI application; nothing runs before the application's lifespan starts.

    `config_path` is read again on `Gateway.reload`. `clock` is monotonic, in seconds.
    Raises what `Gateway` raises.
    """
    state, keystore, overlay = StatePaths(config.state), Keystore.of(config), OverlayStore(config.state)
    connect_timeout_seconds = config.gateway.connect_timeout_seconds
    trust = EngineTrust(config.engine.tls)
    hot_engines = HotEngines(connect_timeout_seconds=connect_timeout_seconds, trust=trust)
    parts = Parts(
        table=Watched(state.routing_table, lambda: table.read(state.routing_table), None),
        keyring=Watched(keystore.path, keystore.load, Keyring({}, b"")),
        overlay=Watched(overlay.path, overlay.load, Overlay()),
        loads=Loads(bound=config.gateway.max_in_flight_per_replica),
        book=LatencyBook(),
        batch_book=LatencyBook(),
        stats=Stats(),
        health=HealthBook(),
        engines=engines or BothEngines(hot_engines, connect_timeout_seconds=connect_timeout_seconds),
        clock=clock,
        wall=wall,
        key_uses=KeyUses(config.state),
        trust=trust,
    )
    gateway = Gateway(config, parts, config_path=config_path)
    gateway.exchanges = Exchanges(
        policy=gateway.policy(),
        keyring=lambda: parts.keyring.value,
        router=Router(gateway.routes, parts.loads),
        admission=gateway.admission,
        book=parts.book,
        stats=parts.stats,
        clock=clock,
        wall=wall,
        on_unreachable=gateway.on_unreachable,
        on_served=gateway.on_served,
        response_ids=ResponseIds(lambda: secret_in(state.responses_secret)),
        salts=CacheSalts(lambda: secret_in(state.responses_secret)),
        look_again=gateway.look_again,
        batch_book=parts.batch_book,
        background=BackgroundResponses(parts.engines, gateway.admission, parts.stats),
    )
    gateway.metrics_page = MetricsPage(
        GatewayCollector(
            parts.stats,
            parts.book,
            parts.loads,
            gateway.routes,
            gateway.files,
            clock,
            gateway.admission,
            lambda: gateway.sharing,
            parts.batch_book,
            controller=lambda: running_status(state) or read_cluster_scaling(state.cluster_scaling),
        )
    )
    gateway.figures = FiguresWriter(config, gateway.routes, gateway.admission, parts.stats, parts.book, clock, wall)
    gateway.admin = _admin_listener(gateway, config_path, wall)
    process = secrets.token_hex(8)
    gateway.sharing = _shared_limits(config, gateway, process, clock, wall)
    gateway.rooms = _shared_rooms(config, gateway, process, clock, wall)
    relay = AsgiRelay(gateway.exchanges, parts.engines)
    hot = dict.fromkeys(ROUTES, relay)
    batches = BatchService(config.batches, state, surroundings(gateway, relay, config, wall))
    fast = HotPath.of(gateway.exchanges, hot_engines) if config.gateway.relay == "fast" else None
    console = partial(
        add_console, backstage=gateway, access=lambda: console_access(gateway.file_config()), state=state.root
    )
    engine_metrics = EngineMetrics(gateway.routes, parts.engines, clock, SliceMetrics(gateway.routes).families).render
    cold = cold_app(gateway, version=_version(), batches=batches, console=console, engine_metrics=engine_metrics)
    app = Ingress(
        hot=hot,
        cold=cold,
        lifecycle=Lifecycles((gateway, batches)),
        generation=lambda: gateway.exchanges.policy.generation_header,
        fast=fast,
    )
    return gateway, app


def _shared_limits(config: Config, gateway: Gateway, process: str, clock: Clock, wall: WallClock) -> Sharing:
    """The shares of limits that this process has. Raises SecretUnavailable where the store's address is not to be had."""
    shared, known = config.gateway.shared_limits, KnownGateways(config.state, clock)
    store: LimitStore
    book: TakenBook | None = None
    if shared.store == "redis":
        assert shared.url is not None
        url = fetch(shared.url, field_name="gateway.shared_limits.url").value.decode()
        from gateway.admission.sharing.redis_store import RedisStore  # its client is loaded by whoever uses it

        store = RedisStore(url)
    else:
        taken = _taken(config)
        store = LocalStore(StatePaths(config.state).limits, wall, LeftBooks(taken))
        book = TakenBook(taken, process, wall)
    return Sharing(
        LimitShares(gateway.admission),
        store,
        clock,
        process=process,
        lease_seconds=shared.lease_seconds,
        expected=max(shared.gateways, known.read()),
        remember=known.told,
        book=book,
    )


def _shared_rooms(config: Config, gateway: Gateway, process: str, clock: Clock, wall: WallClock) -> Sharing:
    """The shares of replicas that this process has: their gateways are those that read the same routing table."""
    store = LocalStore(StatePaths(config.state).rooms, wall, LeftBooks(_taken(config)))
    lease_seconds = config.gateway.shared_limits.lease_seconds
    return Sharing(RoomShares(gateway.admission), store, clock, process=process, lease_seconds=lease_seconds)


def _taken(config: Config) -> Path:
    """Where each gateway process notes what it takes of limits."""
    return taken_folder(StatePaths(config.state).limits.with_suffix(".taken"))


def _admin_listener(gateway: Gateway, config_path: Path | None, wall: WallClock) -> AdminListener:
    def read() -> Config:
        return load_config(config_path) if config_path else gateway.file_config()

    operations = Operations(gateway.file_config, wall=wall, read=read)

    def make_app(access: Access) -> AsgiApp:
        from gateway.admin.app import admin_app  # a tenth of a second, for who administers only

        return admin_app(operations, gateway, access, wall=wall, version=_version())

    return AdminListener(gateway.file_config(), make_app)


def create_app(config: Config, *, config_path: Path | None = None) -> Ingress:
    """The ASGI application alone, for any ASGI server."""
    return create_gateway(config, config_path=config_path)[1]


def serve_gateway(config: Config, *, config_path: Path | None, take_over_running: bool = False) -> int:
    """Serve until SIGTERM or SIGINT, then drain; SIGHUP reads `config_path` again. The exit status.

    With `take_over_running` the process that serves on this address, if there is one, is replaced without a connection being refused.
    Raises AddressInUse before anything else is done, and KeystoreError.
    """
    door = _door(config)
    before = take_over(door) if door and take_over_running else None
    sock = before.sock if before else listening_socket(config.gateway.listen)
    _log_to_stderr()
    _raise_file_limit()
    gateway, app = create_gateway(config, config_path=config_path)
    successor = Handover(door, sock, lambda: server.retire()) if door else None

    def started() -> None:
        if successor is not None:
            successor.open()
        if before is not None:
            before.serving()

    server = DrainingServer(server_config(config, app, gateway.tls), gateway, on_started=started)

    async def serve() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, gateway.reload)
        host, port = sock.getsockname()[:2]
        log.info("listening on %s://%s:%d", config.gateway.scheme, f"[{host}]" if ":" in host else host, port)
        _favour_the_loop()
        try:
            await server.serve(sockets=[sock])
        finally:
            if successor is not None:
                successor.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())
    return 0


def _favour_the_loop() -> None:
    """What else happens in this process, collections of garbage and threads that compute, is to hold the event loop up as briefly as can be."""
    gc.freeze()  # what is there now stays; collections need not look at it again
    sys.setswitchinterval(HANDOVER_SECONDS)


def _door(config: Config) -> Path | None:
    """Where another process can ask for the listening socket; None where the state directory can only be read."""
    state = StatePaths(config.state)
    try:
        state.prepare(os.environ)
    except PlacementError as error:
        log.warning("no other gateway can take over from this one: %s", error)
        return None
    return handover_path(state.runtime(os.environ), config.gateway.listen)


def server_config(config: Config, app: Ingress, tls: ServerTls | None = None) -> uvicorn.Config:
    """uvicorn's settings for `app`."""
    limits = HeadLimits(config.gateway.max_header, config.gateway.header_timeout_seconds)

    def on_refusals() -> Headers:
        return [app.generation()]

    return uvicorn.Config(
        app,
        loop="none",
        http=hot_protocol(limits, app.fast, on_refusals) if app.fast else bounded_by(limits, on_refusals),
        ws="none",
        lifespan="on",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        ssl_context_factory=(lambda *_: tls.context) if tls else None,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=int(config.gateway.keep_alive_seconds),
        timeout_graceful_shutdown=int(LAST_WORDS_SECONDS) + 1,
    )


def _version() -> str:
    try:
        return version("sliceway")
    except PackageNotFoundError:  # run from a source tree
        return "0+source"


def _log_to_stderr() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for noisy in ("uvicorn.error", "uvicorn.access", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _raise_file_limit() -> None:
    """A stream takes two descriptors; the usual soft limit of 1024 ends at 500 streams."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
