"""One node's agent: offers its slices, has its controller run what the head gives it, and follows the head's table.

The controller is a process of its own, as under `sliceway up`, told through files that outlive both: so an agent that dies, and
Ray with it, takes no engine along. The agent only writes what was ordered, and reads what the controller publishes.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from model_registry.atomic import write_atomically
from model_registry.sizing.throughput import THROUGHPUT_FILE, Throughput
from placement.autoscale import Signals
from placement.cluster.bulletin import Bulletin
from placement.cluster.change import broadcast_of
from placement.cluster.cutting import CutOrder, cut
from placement.cluster.errors import NodeLost
from placement.cluster.laying_out import LayingOut
from placement.cluster.members import Broadcast, News, NodeOrder, NodeReport, Versions, Word
from placement.cluster.relays import relay_for
from placement.cluster.seats import SeatRow, SeatsFile, read_seats, write_seats
from placement.cluster.survey import NodeGpus, gpus_to_plan
from placement.demand_slices import barred
from placement.errors import CannotBeCut, TableUnreadable
from placement.figures import FRESH_SECONDS, fresh_for, read_figures
from placement.goals import PlacementConfig
from placement.partition import Driver
from placement.policy import AutoscalePolicy
from placement.replicas.journal import Journal
from placement.scaling import Stamp, ThroughputFile
from placement.slices import Inventory
from placement.state import StatePaths
from placement.status import ControllerStatus, ErrorRow, read_status
from placement.table import ReplicaState, RoutingTable, publish, read

log = logging.getLogger(__name__)

OBSERVE_SECONDS = 10.0
DRIVER_SECONDS = 1.0
POLL_SECONDS = 20.0
CHECK_SECONDS = 0.25
RELAY_SECONDS = 2.0
"""So long a relay waits for news, and so long after that its word still counts. Who is told by it notices before the head that it is
gone.
"""
_RETRY_SECONDS = 0.5

NextNews = Callable[[str | None, str, int, float], Awaitable[News | None]]
"""Who is asked (a relay's name; None: the head), head, sequence, timeout in seconds -> what is newer than that; see `Head.next_news`.
Raises when there is no head, or the relay does not hear from it.
"""


class Processes(Protocol):
    """The node's own processes, which outlive the agent."""

    def ensure_controller(self, config: Path, seats: Path) -> None:
        """Have one controller run on this configuration and these seats."""

    def reload_controller(self) -> None:
        """Have it read its configuration again."""

    def ensure_gateway(self, config: Path) -> None:
        """Have one gateway run on this configuration, if this node is to have one."""

    def reload_gateway(self) -> None:
        """Have it read its configuration again."""


@dataclass(frozen=True, slots=True)
class NodePaths:
    """Where a node keeps what it knows. `engines` is its controller's state directory, `gateway` its gateway's."""

    root: Path

    @property
    def throughput(self) -> Path:
        """What load tests have measured, in the state directory of which this is `nodes/NAME`."""
        return self.root.parents[1] / THROUGHPUT_FILE

    @property
    def layouts(self) -> Path:
        """What came of `fleet.layouts` when the machine joined."""
        return self.root / "layouts.json"

    @property
    def engines(self) -> StatePaths:
        """The controller's: journal, logs, sockets, its own table."""
        return StatePaths(self.root / "engines")

    @property
    def gateway(self) -> StatePaths:
        """The gateway's: the table of the whole cluster, and the keys."""
        return StatePaths(self.root / "gateway")

    @property
    def controller_config(self) -> Path:
        """What the controller reads."""
        return self.root / "controller.yaml"

    @property
    def gateway_config(self) -> Path:
        """What the gateway reads."""
        return self.root / "gateway.yaml"

    @property
    def seats(self) -> Path:
        """Which replica has which slice."""
        return self.root / "seats.json"

    @property
    def secret(self) -> Path:
        """What engines want to be shown that were started before each had a secret of its own."""
        return self.root / "engine.secret"


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """What makes this node itself.

    `fleet` replaces the configuration's: what a node offers is for the node to say. `address` is where its engines listen. `join` is
    another one each time that the machine joins, and none where GPUs are not cut for that.
    """

    name: str
    address: str
    paths: NodePaths
    versions: Versions
    fleet: Mapping[str, Any]
    simulated: bool = False
    listen: str | None = None
    join: str = ""
    boot: str = field(default_factory=lambda: uuid4().hex)


class NodeAgent:
    """See the module. All of it is idempotent, so that an agent that was killed goes on where it was."""

    def __init__(
        self,
        settings: NodeSettings,
        processes: Processes,
        observe: Callable[[], Inventory],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        driver: Driver | None = None,
    ) -> None:
        self.settings = settings
        self._driver = driver
        self._cutting = asyncio.Lock()
        self._cuts = 0
        self._cut_orders: list[CutOrder] = []
        self._layouts = LayingOut(settings.paths.layouts, settings.join, driver)
        self._laying_out: asyncio.Task[None] | None = None
        self._now = now
        self._fresh_seconds = FRESH_SECONDS
        self._paths = settings.paths
        self._processes = processes
        self._observe = observe
        self._inventory: Inventory | None = None
        self._looking: asyncio.Task[None] | None = None
        self._observed_at = 0.0
        self._own = PlacementConfig.model_validate({"fleet": settings.fleet})
        self._cordoned: tuple[str, ...] = ()
        self._throughput = ThroughputFile(settings.paths.throughput)
        self._measured: tuple[Stamp, tuple[Throughput, ...]] = (None, ())
        self._ending = False
        self._passing_on = Bulletin()
        self._heard_at = -math.inf
        self._table_file: tuple[int, int, int] | None = None
        self._generation = -1
        self._paths.root.mkdir(parents=True, exist_ok=True, mode=0o700)

    # ---- what the head asks

    async def report(self) -> NodeReport:
        """The node as it is. What should run beside the agent and does not is started again."""
        self._ensure()
        inventory = await self._seen()
        status = read_status(self._paths.engines.controller_status)
        running = self._running()
        self._lay_out_if_due(inventory, running)
        report = NodeReport(
            node=self.settings.name,
            address=self.settings.address,
            versions=self.settings.versions,
            boot=self.settings.boot,
            slices=inventory.slices,
            table=self._table(running),
            running=running,
            waiting=_waiting(status, read_seats(self._paths.seats)) if status else {},
            outdated=tuple(r.replica for r in status.replicas if r.outdated) if status else (),
            notes=inventory.notes,
            simulated=self.settings.simulated,
            generation=max(0, self._known_generation()),
            demand=self._demand(),
            cordoned=self._cordoned,
            cutting=tuple(sorted({order.step.place.slice_id for order in self._cut_orders})),
            engines={r.replica: r.engine_version for r in status.replicas if r.engine_version} if status else {},
            measured=self._capacities(),
            directory=str(self._paths.root),
            laid_out=self._layouts.done,
            layouts=self._layouts.told(inventory.gpus),
            layouts_missing=self._layouts.missing(inventory.gpus),
        )
        return report.model_copy(update={"digest": _digest(report)})

    async def _seen(self) -> Inventory:
        """What there is; what was seen last where the driver takes its time, as while it cuts a GPU: a node that says nothing for
        seconds is taken for lost.
        """
        due = self._inventory is None or time.monotonic() - self._observed_at > OBSERVE_SECONDS
        if self._looking is None and due:
            self._looking = asyncio.create_task(self._look())
        if (looking := self._looking) is not None:
            await asyncio.wait({looking}, timeout=None if self._inventory is None else DRIVER_SECONDS)
            if looking.done():
                self._looking = None if self._looking is looking else self._looking
                await looking
        assert self._inventory is not None
        return self._inventory

    async def _look(self) -> None:
        cuts = self._cuts
        inventory = await asyncio.to_thread(self._observe)
        self._cordoned = tuple(sorted(barred(self._own, inventory, self._paths.engines)))
        self._inventory = inventory
        # What was looked at while a GPU was cut is looked at again.
        self._observed_at = time.monotonic() if cuts == self._cuts else -OBSERVE_SECONDS

    async def word(self, known: str, wait_seconds: float) -> Word:
        """The report as soon as it is another than the one with the digest `known`, else in `wait_seconds` that it is not."""
        deadline = time.monotonic() + wait_seconds
        while (report := await self.report()).digest == known:
            left = deadline - time.monotonic()
            if left <= 0:
                return Word(demand=report.demand, generation=report.generation)
            await asyncio.sleep(min(CHECK_SECONDS, left))
        return Word(report=report)

    async def order(self, order: NodeOrder) -> None:
        """Run this and nothing else."""
        paths = self._paths
        write_atomically(paths.secret, order.secret.encode(), mode=0o600)
        seats = {r: SeatRow(slice_id=s, owner=order.owners[r]) for r, s in order.seats.items()}
        write_seats(paths.seats, SeatsFile(seats=seats, turns=order.turns, orphan_seconds=order.orphan_seconds))
        self._layouts.aim(order.config)
        if _replace(paths.controller_config, self._controller_config(order)):
            self._processes.reload_controller()
        if not self._ending:
            self._processes.ensure_controller(paths.controller_config, paths.seats)

    def belong(self, order: NodeOrder) -> None:
        """Engines that have the seats of `order` belong to its owners; everything else stays as it was ordered last, seats too."""
        known = read_seats(self._paths.seats)
        if known is None:
            return
        now = {
            replica: SeatRow(slice_id=row.slice_id, owner=order.owners[replica])
            for replica, row in known.seats.items()
            if replica in order.owners and order.seats.get(replica) == row.slice_id
        }
        write_seats(self._paths.seats, known.model_copy(update={"seats": {**known.seats, **now}}))

    async def gpus(self) -> NodeGpus:
        """The GPUs that a plan may count on, as the driver shows them at this moment, and not while they are being cut."""
        async with self._cutting:
            return gpus_to_plan(self._own.fleet, await asyncio.to_thread(self._observe))

    async def cut(self, order: CutOrder) -> None:
        """Cut a GPU, where no engine is or is to be; one instance at a time. Raises as `cutting.cut`."""
        if self._driver is None:
            raise CannotBeCut("this node has no driver to cut GPUs with", where=self.settings.name)
        self._cut_orders.append(order)
        try:
            async with self._cutting:
                try:
                    await cut(self._driver, order, self._taken(), self._paths.engines.root)
                finally:
                    self._cuts += 1
                    self._inventory = None
        finally:
            self._cut_orders.remove(order)

    def _taken(self) -> set[str]:
        """The slices that engines are on, or have a seat on."""
        seats = read_seats(self._paths.seats)
        seated = (row.slice_id for row in seats.seats.values()) if seats else ()
        return {*seated, *self._running().values()}

    def _lay_out_if_due(self, inventory: Inventory, running: Mapping[str, str]) -> None:
        """Cut what `fleet.layouts` says, when it is known, and what ran here before and has no seat any more has ended."""
        under_way = self._laying_out is not None and not self._laying_out.done()
        if under_way or self._ending or not self._layouts.due:
            return
        seats = read_seats(self._paths.seats)
        seated = {(replica, row.slice_id) for replica, row in seats.seats.items()} if seats else set()
        if set(running.items()) <= seated:
            self._laying_out = asyncio.create_task(self._lay_out(inventory))

    async def _lay_out(self, inventory: Inventory) -> None:
        async with self._cutting:
            try:
                await asyncio.to_thread(self._layouts.carry_out, inventory.gpus, self._taken())
            except Exception:  # the root of a task
                log.exception("what came of fleet.layouts could not be kept")
            finally:
                self._cuts += 1
                self._inventory = None

    def end(self) -> None:
        """Start nothing again from here on: this node's processes are being ended, and the head goes on asking meanwhile."""
        self._ending = True

    def _capacities(self) -> tuple[Throughput, ...]:
        stamp = self._throughput.stamp
        if stamp != self._measured[0]:
            self._measured = stamp, self._throughput.read()
        return self._measured[1]

    def _demand(self) -> Mapping[str, Signals] | None:
        now = self._now().timestamp()
        return read_figures(self._paths.gateway.figures, now, fresh_seconds=self._fresh_seconds)

    def _ensure(self) -> None:
        paths = self._paths
        if self._ending:
            return
        if paths.controller_config.exists():
            self._processes.ensure_controller(paths.controller_config, paths.seats)
        if self.settings.listen is not None and paths.gateway_config.exists():
            self._processes.ensure_gateway(paths.gateway_config)

    def _controller_config(self, order: NodeOrder) -> bytes:
        config = json.loads(order.config)
        config["fleet"] = dict(self.settings.fleet)
        config["state_dir"] = str(self._paths.engines.root)
        engine = config.setdefault("engine", {})
        engine["transport"] = "tcp"
        engine["network"] = {"address": self.settings.address, "secret_file": str(self._paths.secret)}
        return json.dumps(config, indent=1).encode()

    def _table(self, running: Collection[str]) -> RoutingTable:
        """What the controller publishes. A table that a dead controller has left speaks for engines that go on, and for no others."""
        try:
            table = read(self._paths.engines.routing_table)
        except TableUnreadable:
            return RoutingTable(generation=0)
        rows = tuple(r for r in table.replicas if r.state is not ReplicaState.READY or r.replica in running)
        return table.model_copy(update={"replicas": rows})

    def _running(self) -> Mapping[str, str]:
        entries = Journal(self._paths.engines).entries()
        return {entry.replica: entry.slice_id for entry in entries if entry.shim.alive}

    # ---- what it asks the head

    async def follow(self, next_news: NextNews) -> None:
        """Write every new table and the keys where this node's gateway looks for them. Without a head the last ones stay."""
        known: Broadcast | None = None
        trusted = False  # whether a relay may be asked, which is so until one fails and the head has answered since
        while True:
            head, sequence = (known.head, known.sequence) if known else ("", 0)
            relays = known.relays if known else ()
            relay = relay_for(self.settings.name, relays) if trusted else None
            seconds = RELAY_SECONDS if relay or self.settings.name in relays else POLL_SECONDS
            try:
                async with asyncio.timeout(seconds + RELAY_SECONDS if relay else None):
                    news = await next_news(relay, head, sequence, seconds)
            except Exception as error:  # noqa: BLE001 - whatever keeps it from answering, there may be a head again
                log.info("no word from %s: %s", relay or "the head", error)
                trusted = False
                if relay is None:
                    await asyncio.sleep(_RETRY_SECONDS)
                continue
            if relay is None:
                self._heard_at = time.monotonic()
            if news is None:
                continue
            try:
                latest = broadcast_of(news, known)
                if latest is not None:
                    await self._passing_on.pass_on(latest)
                    await asyncio.to_thread(self.take_over, latest)
                else:
                    log.warning("what has changed does not make the head's table: asking for the whole of it")
                known, trusted = latest, trusted or relay is None
            except Exception as error:  # noqa: BLE001 - a disk that is full has room again some time
                log.warning("what the head says could not be taken over, asking again: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)

    async def pass_on(self, head: str, after: int, timeout_seconds: float) -> News | None:
        """As `Head.next_news`, for the nodes that this one is a relay for. Raises NodeLost where it does not follow that head itself, or
        has not heard of it for too long.
        """
        silent = time.monotonic() - self._heard_at
        if head != self._passing_on.latest.head or silent > 2 * RELAY_SECONDS:
            raise NodeLost(f"node {self.settings.name!r} does not hear from that head itself", where=self.settings.name)
        return await self._passing_on.news(head, after, timeout_seconds=timeout_seconds)

    def take_over(self, news: Broadcast) -> None:
        """Have this node's gateway work by `news`. A table that is older than the one there is not taken."""
        paths = self._paths.gateway
        paths.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, text in news.files.items():
            _replace(paths.root / Path(name).name, base64.b64decode(text))
        _replace(paths.cluster_scaling, news.scaling.model_dump_json().encode())
        if news.table.generation > self._known_generation():
            publish(news.table, paths.routing_table)
        if self.settings.listen is not None and news.config:
            self._fresh_seconds = fresh_for(AutoscalePolicy.model_validate(_autoscale(news.config)))
            if _replace(self._paths.gateway_config, self._gateway_config(news.config)):
                self._processes.reload_gateway()
            if not self._ending:
                self._processes.ensure_gateway(self._paths.gateway_config)

    def _known_generation(self) -> int:
        """Of the table that gateways have; -1 for none. A large one is read only when it is another file than the last time."""
        path = self._paths.gateway.routing_table
        try:
            found = path.stat()
            file = (found.st_ino, found.st_mtime_ns, found.st_size)
            if file != self._table_file:
                self._generation, self._table_file = read(path).generation, file
            return self._generation
        except (OSError, TableUnreadable):
            return -1

    def _gateway_config(self, text: str) -> bytes:
        config = json.loads(text)
        config["state_dir"] = str(self._paths.gateway.root)
        config["fleet"] = {"discover": "none", "autoscale": _autoscale(text)}
        config.setdefault("gateway", {})["listen"] = self.settings.listen
        return json.dumps(config, indent=1).encode()


def _autoscale(text: str) -> Mapping[str, Any]:
    """The part of `fleet` that is the whole cluster's: gateways go by it too."""
    found: Mapping[str, Any] = json.loads(text).get("fleet", {}).get("autoscale", {})
    return found


def _digest(report: NodeReport) -> str:
    """Of all that the head acts upon at once. Of demand that is whether there is any: how much it is changes with every request, and
    is looked at now and then. Which table gateways have, their agent tells with its question for the next one.
    """
    asked = {model: not _idle(signals) for model, signals in (report.demand or {}).items()}
    text = report.model_dump_json(exclude={"digest", "demand", "generation"})
    return hashlib.sha256((text + json.dumps(asked, sort_keys=True)).encode()).hexdigest()


def _idle(signals: Signals) -> bool:
    return not (signals.queued or signals.running or signals.arrivals_per_second)


def _waiting(status: ControllerStatus, seats: SeatsFile | None) -> Mapping[str, str]:
    """Why replicas do not run, also those that a controller which refuses its configuration never took up."""
    waiting = {replica: _in_one_line(row) for replica, row in status.unplaced.items()}
    if status.refused is not None:
        known = [r.replica for r in status.replicas] + list(seats.seats if seats else ())
        waiting = dict.fromkeys(known, _in_one_line(status.refused.error)) | waiting
    return waiting


def _in_one_line(row: ErrorRow) -> str:
    return f"{row.message} {row.remedy or ''}".strip()


def _replace(path: Path, content: bytes) -> bool:
    """Write `content` if it is not there already. Whether it was written."""
    try:
        if path.read_bytes() == content:
            return False
    except OSError:
        pass
    write_atomically(path, content, mode=0o600)
    return True
