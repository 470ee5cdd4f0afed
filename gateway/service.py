"""The gateway as a whole: it follows its files, keeps an eye on engines, reloads, drains; requests pass it by.

Everything here happens beside the requests, a few times a second. What it finds out becomes immutable values (`Routes`,
`Policy`, `Keyring`) that requests read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec

from gateway.admin.overlay import Overlay, applied
from gateway.admission import Admission, Loads
from gateway.admission.policy import admission_policy
from gateway.admission.sharing import Sharing
from gateway.admission.view import limits
from gateway.auth.jwks import Tokens
from gateway.background import ASK_SECONDS
from gateway.config import Config, load_config
from gateway.digests import LatencyBook
from gateway.endpoint_keys import endpoint_keys
from gateway.errors import Draining, EngineError, OperatorError, SecretUnavailable
from gateway.exchange import Clock, Exchanges, Policy
from gateway.figures import FiguresWriter
from gateway.generations import Announcements, Generations, generation_header
from gateway.health import HealthBook
from gateway.key_uses import KeyUses
from gateway.keys import Keyring, WallClock
from gateway.metrics import Files, MetricsPage
from gateway.routes import EXTERNAL, Routes, build_routes, external_replicas, without_drained
from gateway.slices_view import SlicesView
from gateway.stats import Stats
from gateway.table_watch import POLL_SECONDS, Watched
from gateway.tenants import Directory, Tenant
from gateway.tls import ServerTls
from gateway.upstream import Engines
from model_registry.errors import ConfigError
from placement.engine_tls import EngineTrust
from placement.state import StatePaths
from placement.table import ReplicaRow, ReplicaState, RoutingTable

log = logging.getLogger("sliceway.gateway")

PROBE_SECONDS = 1.0  # a replica that does not answer is asked this often
STEADY_PROBE_SECONDS = 5.0  # an external one that answers, this often
PROBE_TIMEOUT_SECONDS = 2.0
HOUSEKEEPING_SECONDS = 60.0
GLANCE_SECONDS = 0.01  # keys that are not known have the key file looked at no oftener than this
ERRAND_SECONDS = 1.0  # the issuer's keys, and who serves administrators


@dataclass(slots=True)
class Parts:
    """What `gateway.wiring` makes and hands in."""

    table: Watched[RoutingTable | None]
    keyring: Watched[Keyring]
    overlay: Watched[Overlay]
    loads: Loads
    book: LatencyBook
    batch_book: LatencyBook
    stats: Stats
    health: HealthBook
    engines: Engines
    clock: Clock
    wall: WallClock
    key_uses: KeyUses
    trust: EngineTrust = field(default_factory=EngineTrust)


class Errand(Protocol):
    """Something that has to be looked after now and then while the gateway serves."""

    async def tick(self) -> None:
        """About once a second."""
        ...

    async def stop(self) -> None:
        """At the end."""
        ...


class Gateway:
    """The running gateway. `exchanges`, `metrics_page`, `figures` and, where there are any, `admin`, `sharing` (of limits) and `rooms` (of replicas) are set once by the wiring, before `start`.

    Its making raises OverlayError or OperatorError where the configuration and what operators changed do not go together, and
    TlsError where the certificate cannot be used, or SecretUnavailable where the key of a model with `endpoints` cannot be had.
    """

    exchanges: Exchanges
    metrics_page: MetricsPage
    figures: FiguresWriter
    admin: Errand | None = None
    sharing: Sharing | None = None
    rooms: Sharing | None = None

    def __init__(self, config: Config, parts: Parts, *, config_path: Path | None) -> None:
        parts.overlay.poll()
        if parts.overlay.problem is not None:
            raise parts.overlay.problem
        self._file_config = config
        self._config = config = applied(config, parts.overlay.value)
        self._endpoint_keys = endpoint_keys(config.models)
        self._parts = parts
        self._config_path = config_path
        self._generations = Generations(StatePaths(config.state).generation)
        self._announcements = Announcements(StatePaths(config.state).gateways, listen=config.gateway.listen)
        self._generation = self._generations.of(config)
        self._reloads = parts.overlay.value.reloads
        self._tokens = self._made_tokens()
        self.tls = ServerTls(config.gateway.tls) if config.gateway.tls else None
        self._routes = Routes()
        self._tasks: list[asyncio.Task[None]] = []
        self._next_probe: dict[str, float] = {}
        self._glanced_at = float("-inf")
        self.admission = Admission(self.routes, parts.loads, parts.clock, admission_policy(config))
        self._slices = SlicesView(self.routes, parts.book, parts.clock, self.admission, parts.batch_book)
        self._drained_by: float | None = None
        self._told: set[str] = set()
        parts.table.poll()
        self._rebuild()

    # ---- what requests and cold routes read

    def routes(self) -> Routes:
        """The routes at this moment."""
        return self._routes

    def file_config(self) -> Config:
        """The last good configuration, without what operators changed."""
        return self._file_config

    def policy(self) -> Policy:
        """What requests are decided by, from the configuration as it counts."""
        directory = Directory.of(self._config, self._tokens, self._parts.key_uses.note)
        return Policy(directory, self._config.gateway, generation_header(self._generation))

    def authenticate(self, authorization: bytes | None) -> Tenant:
        """The tenant behind an Authorization header. Raises MissingKey, InvalidKey."""
        return self.exchanges.authenticate(authorization)

    def look_again(self) -> bool:
        """Whether keys or tenants have changed since they were last looked at. Asked before a key that is not known is refused.

        Costs two `stat`s, once in GLANCE_SECONDS however many ask, and reads only what has changed.
        """
        now = self._parts.clock()
        if now - self._glanced_at < GLANCE_SECONDS:
            return False
        self._glanced_at = now
        keys, tenants = self._parts.keyring.glance(), self._parts.overlay.glance()
        if tenants:
            self._operators_decided()
        return keys or tenants

    async def slices(self) -> list[dict[str, Any]]:
        """The list of `/slices`."""
        return await self._slices.rows()

    def replicas(self) -> list[ReplicaRow]:
        """Every replica at this moment."""
        return list(self._routes.replicas())

    def limits(self) -> list[dict[str, Any]]:
        """Every limit and what this process counts as used of it. May be called from another thread."""
        return [
            {
                "tenant": gauge.subject.tenant,
                "model": gauge.subject.model,
                "limit": gauge.kind,
                "full": gauge.full,
                "used": gauge.window.used,
                "refused": gauge.refused,
            }
            for gauge in list(self.admission.limits)
        ]

    def limits_in_force(self) -> list[dict[str, Any]]:
        """`limits`, with since when each one refuses and for how long yet. Only on the gateway's own loop."""
        return limits(self.admission)

    def metrics(self) -> tuple[bytes, str]:
        """Text and content type of `/metrics`."""
        return self.metrics_page.render(), self.metrics_page.content_type

    def files(self) -> Files:
        """Which followed files can be read."""
        needed = any(model.source for model in self._config.models)
        return Files(
            {
                "routing_table": self._parts.table.problem is None or not needed,
                "keystore": self._parts.keyring.problem is None,
            }
        )

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Ready while at least one model has a replica that takes requests, or is woken by one, and the gateway is not stopping."""
        routes = self._routes
        models = {
            name: {
                "ready": len(model.ready),
                "replicas": [
                    {"replica": r.replica, "slice": r.slice.id, "state": r.state.value, "reason": r.reason}
                    for r in model.replicas
                ],
            }
            | ({"unplaced": dict(model.card.unplaced)} if model.card.unplaced else {})
            for name, model in sorted(routes.models.items())
        }
        served = any(model.ready or self.admission.wakes(name, model) for name, model in routes.models.items())
        ready = not self.draining and served
        problems = [str(watched.problem) for watched in self._watched() if watched.problem is not None]
        problems += [sharing.problem for sharing in self._shared() if sharing.problem is not None]
        return ready, {
            "ready": ready,
            "draining": self.draining,
            "generation": routes.generation,
            "config_generation": self._generation,
            "models": models,
            "problems": problems,
        }

    # ---- life

    async def start(self) -> None:
        """Begin to follow files and engines. Raises KeystoreError if there are keys that cannot be read."""
        self._parts.keyring.poll()
        if self._parts.keyring.problem is not None and self._config.gateway.authentication == "keys":
            raise self._parts.keyring.problem
        self.follow_files()
        self._announcements.write(self._file_config, self._reloads)
        self._tasks = [asyncio.create_task(self._every(seconds, step)) for seconds, step in self._chores()]
        self._tasks.append(asyncio.create_task(self._tell_figures()))
        for sharing in self._shared():
            await sharing.sync()
            self._tasks.append(asyncio.create_task(sharing.run(self._config.gateway.shared_limits.sync_seconds)))

    async def stop(self) -> None:
        """End what `start` began, and close the connections to engines."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.admin is not None:
            await self.admin.stop()
        await self._parts.key_uses.write()
        self.figures.stop()
        if self.exchanges.background is not None:
            self.exchanges.background.stop()
        await self.exchanges.large_bodies.close()
        self._announcements.remove()
        for sharing in self._shared():
            await sharing.leave()
        await self._parts.engines.close()

    def _shared(self) -> tuple[Sharing, ...]:
        """What this process has shares of, with other gateways."""
        return tuple(sharing for sharing in (self.sharing, self.rooms) if sharing is not None)

    def _chores(self) -> tuple[tuple[float, Callable[[], Awaitable[None]]], ...]:
        return (
            (POLL_SECONDS, self._look),
            (PROBE_SECONDS, self._probe_all),
            (ASK_SECONDS, self._follow_background),
            (HOUSEKEEPING_SECONDS, self._keep_house),
            (ERRAND_SECONDS, self._run_errands),
        )

    async def _every(self, seconds: float, step: Callable[[], Awaitable[None]]) -> None:
        """Run `step` for ever; one that fails is logged and tried again."""
        while True:
            try:
                await step()
            except Exception:
                log.exception("a background step failed; it is tried again")
            await asyncio.sleep(seconds)

    @property
    def draining(self) -> bool:
        """Whether a stop was asked for."""
        return self.exchanges.draining

    def begin_drain(self) -> None:
        """Take no new requests; let those there are end, up to the drain timeout."""
        if not self.draining:
            self.exchanges.draining = True
            seconds = self._config.gateway.drain_timeout_seconds
            self._drained_by = self._parts.clock() + seconds
            log.info("stopping: %d requests may go on for up to %g s", len(self.exchanges.active), seconds)

    def hurry(self) -> None:
        """End the drain now."""
        self._drained_by = self._parts.clock()

    def drained(self) -> bool:
        """Whether a drain is over. Requests that outlive the timeout are ended with an error they can read."""
        if self._drained_by is None:
            return False
        if self.exchanges.active and self._parts.clock() >= self._drained_by:
            log.warning("stopping: ending %d requests", len(self.exchanges.active))
            self.exchanges.interrupt_all(
                Draining("The gateway stopped before this answer was complete.", retry_after_seconds=1.0)
            )
            return True
        return not self.exchanges.active

    # ---- files

    def reload(self) -> None:
        """Read the configuration again: models, tenants and limits count at once, a wrong file changes nothing."""
        if self._config_path is None:
            return
        try:
            file_config = load_config(self._config_path)
            config = applied(file_config, self._parts.overlay.value)
            keys = endpoint_keys(config.models)
        except (ConfigError, OperatorError, SecretUnavailable) as error:
            self._parts.stats.config_reloads["refused"] += 1
            problems = error.problems if isinstance(error, ConfigError) else (error,)
            log.error("the configuration is wrong, the one before stays in use:\n%s", "\n".join(map(str, problems)))
            return
        self._parts.stats.config_reloads["taken"] += 1
        self._file_config, self._endpoint_keys = file_config, keys
        self._adopt(config)
        self._announcements.write(file_config, self._reloads)
        told = (self._generation, len(config.models), len(config.tenants))
        log.info("configuration read again, generation %d: %d models, %d tenants", *told)

    def _adopt(self, config: Config) -> None:
        """Go by another configuration from here on."""
        for name in (
            "listen",
            "tls",
            "admin_listen",
            "admin_key",
            "keys_secret",
            "max_header",
            "header_timeout_seconds",
            "keep_alive_seconds",
            "connect_timeout_seconds",
            "max_in_flight_per_replica",
        ):
            if getattr(config.gateway, name) != getattr(self._config.gateway, name):
                log.warning("gateway.%s counts after a restart", name)
        issuer_before, self._config = self._config.auth.oidc, config
        self._generation = self._generations.of(config)
        self.figures.configure(config)
        self._parts.trust.configure(config.engine.tls)
        if config.auth.oidc != issuer_before:
            self._tokens = self._made_tokens()
        self.exchanges.policy = self.policy()
        self.admission.configure(admission_policy(config))
        self._rebuild()

    def _made_tokens(self) -> Tokens | None:
        oidc = self._config.auth.oidc
        return Tokens(oidc, clock=self._parts.clock) if oidc else None

    def _operators_decided(self) -> None:
        """The overlay is another one: a reload was asked for, or tenants or replicas were changed."""
        overlay = self._parts.overlay.value
        if overlay.reloads != self._reloads:
            self._reloads = overlay.reloads
            self.reload()
        try:
            self._adopt(applied(self._file_config, overlay))
        except OperatorError as error:
            log.error("what operators changed does not go with the configuration and does not count: %s", error)
        self._announcements.write(self._file_config, self._reloads)

    def _watched(self) -> tuple[Watched[Any], ...]:
        keyring: tuple[Watched[Any], ...] = (
            (self._parts.keyring,) if self._config.gateway.authentication == "keys" else ()
        )
        followed = (self._parts.overlay, *keyring)
        return (self._parts.table, *followed) if any(model.source for model in self._config.models) else followed

    async def _tell_figures(self) -> None:
        while True:
            try:
                await self.figures.tick()
            except Exception:
                log.exception("what this gateway sees of demand could not be told; it is tried again")
            await asyncio.sleep(self.figures.interval_seconds)

    async def _look(self) -> None:
        self.exchanges.expire()
        self.admission.tick()
        if self.follow_files():
            await self._parts.engines.retain(
                {row.endpoint for row in self._routes.replicas()}
                | {e.replica.endpoint for e in self.exchanges.active if e.replica}
            )

    def follow_files(self) -> bool:
        """Look at the files; True if the routes changed."""
        self._parts.keyring.poll()
        if self._parts.overlay.poll():
            self._operators_decided()
        if self.tls is not None:
            self.tls.poll()
        changed = self._parts.table.poll()
        if changed:
            self._rebuild()
        for watched in self._watched():
            self._tell_once(watched)
        return changed

    def _tell_once(self, watched: Watched[Any]) -> None:
        """Log a problem when it comes and when it goes, not four times a second."""
        name = watched.path.name
        if watched.problem is not None and name not in self._told:
            self._told.add(name)
            log.warning("%s", watched.problem)
        elif watched.problem is None and name in self._told:
            self._told.discard(name)
            log.info("%s can be read again", watched.path)

    def _rebuild(self) -> None:
        table, health = self._parts.table.value, self._parts.health
        external = {row.replica for row in external_replicas(self._config.models)}
        # A replica that the controller takes through a restart starts with a clean record.
        ready = {row.replica for row in table.replicas if row.state is ReplicaState.READY} if table else set()
        health.retain(external | ready)
        self._routes = without_drained(
            build_routes(table, self._config.models, health.standings(), self._endpoint_keys),
            frozenset(self._parts.overlay.value.drained),
        )
        self.admission.follow_routes()

    # ---- engines

    def on_unreachable(self, replica: ReplicaRow, reason: str) -> None:
        """A request could not connect."""
        if self._parts.health.failed(replica.replica, reason):
            told = (replica.replica, replica.slice.id, reason)
            log.warning("replica %s on %s is out until it answers again: %s", *told)
            self._rebuild()

    def on_served(self, replica: str) -> None:
        """A replica answered a request."""
        if self._parts.health.served(replica):
            log.info("replica %s serves again", replica)
            self._rebuild()

    async def _probe_all(self) -> None:
        now = self._parts.clock()
        due = [
            row
            for row in self._routes.replicas()
            if self._to_be_probed(row) and self._next_probe.get(row.replica, 0.0) <= now
        ]
        await asyncio.gather(*(self._probe(row) for row in due))
        for row in due:
            steady = self._parts.health.standing(row.replica).reachable
            self._next_probe[row.replica] = now + (STEADY_PROBE_SECONDS if steady else 0.0)

    def _to_be_probed(self, row: ReplicaRow) -> bool:
        return row.slice.kind == EXTERNAL or self._parts.health.standing(row.replica).reachable is False

    async def _probe(self, row: ReplicaRow) -> None:
        health, external = self._parts.health, row.slice.kind == EXTERNAL
        before = health.standing(row.replica)
        try:
            status, _ = await self._parts.engines.get(row, "/health", timeout_seconds=PROBE_TIMEOUT_SECONDS)
            if status >= 500:
                raise EngineError(f"/health answers {status}", replica=row.replica)
            # vLLM's /health asks for no key: whether an engine takes ours shows elsewhere.
            ask = external and (row.secret is not None or not before.reachable)
            name, length = await self._identity(row) if ask else (None, None)
            changed = health.answered(row.replica, engine_model=name, max_model_len=length)
        except EngineError as error:
            changed = health.failed(row.replica, error.message, first_contact=external)
        if changed:
            after = health.standing(row.replica)
            log.info("replica %s %s", row.replica, "answers" if after.reachable else f"does not answer: {after.reason}")
            self._rebuild()

    async def _identity(self, row: ReplicaRow) -> tuple[str | None, int | None]:
        """Under which name an external engine serves this model, and its longest context, where it says so. Raises EngineError."""
        status, body = await self._parts.engines.get(row, "/v1/models", timeout_seconds=PROBE_TIMEOUT_SECONDS)
        if status in (401, 403):
            refused = (
                "does not accept the model's endpoint_key"
                if row.secret
                else "asks for a key; set the model's endpoint_key"
            )
            raise EngineError(f"it {refused} (/v1/models answers {status})", replica=row.replica)
        cards: list[_Card] = []
        if status == 200:
            with contextlib.suppress(msgspec.MsgspecError):
                cards = msgspec.json.decode(body, type=_Cards).data
        card = next((card for card in cards if card.id == row.model), cards[0] if cards else None)
        return (card.id, card.max_model_len) if card else (None, None)

    async def _run_errands(self) -> None:
        await self._parts.key_uses.tick(self._parts.clock())
        if self._tokens is not None:
            await self._tokens.tick()
        if self.admin is not None:
            await self.admin.tick()

    async def _follow_background(self) -> None:
        if self.exchanges.background is not None:
            await self.exchanges.background.tick()

    async def _keep_house(self) -> None:
        slices = frozenset(row.slice.id for row in self._routes.replicas()) | {row.id for row in self._routes.idle}
        for book in (self._parts.book, self._parts.batch_book):
            book.forget(slices, self._parts.clock())


class _Card(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: list[_Card] = []
