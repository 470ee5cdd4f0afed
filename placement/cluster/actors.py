"""The cluster's parts as Ray actors. With `owners` and `start` the only module that knows Ray; what the parts do is in `head` and `node`.

All of them are detached and named, so that whoever started them may go. Ray restarts the head and the agents; the actors that engines
belong to are in `owners`.

That a slice is a replica's is a placement group of the slice's resource, named after both: a line in Ray's books, of which it never
grants two.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.util.placement_group import (
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from model_registry.errors import ConfigError, SlicewayError
from placement.assign import Pools
from placement.clock import SystemClock
from placement.cluster.cutting import CutOrder
from placement.cluster.errors import NodeLost
from placement.cluster.goal import read_goal
from placement.cluster.head import Head, HeadJournal
from placement.cluster.leading import Lead
from placement.cluster.members import Broadcast, News, NodeOrder, NodeReport, Seat, Versions, Word
from placement.cluster.node import NodeAgent, NodePaths, NodeSettings
from placement.cluster.nodes import Hold
from placement.cluster.offers import node_resource, resource_of
from placement.cluster.owners import NAMESPACE as NAMESPACE
from placement.cluster.owners import Owners, as_remote, detached, names_of_actors
from placement.cluster.processes import LocalProcesses
from placement.cluster.survey import NodeGpus
from placement.cluster.transitions import Why
from placement.errors import PartitionError, StalePlan
from placement.inventory import observe
from placement.nvml.partition import NvmlPartitioner
from placement.schema import FleetConfig
from placement.simulate import enter
from placement.slices import Inventory
from placement.status import LeaderStatus
from placement.transition.journal import record_of

log = logging.getLogger(__name__)

HEAD = "head"
AGENT = "agent|"
_SLICE = "sliceway|"
BOOKS_SECONDS = 10.0
MOST_AT_ONCE = 4000
"""Questions that the head has open at a time: one of every node, which waits for the next table, and all others."""
_JOURNAL = b"head-journal"


class RayStore:
    """The head's journal in the cluster's own store. It lives as long as the cluster, and longer where Ray's store is kept in Redis."""

    async def load(self) -> bytes | None:
        """The last journal."""
        found: bytes | None = await asyncio.to_thread(_internal_kv_get, _JOURNAL, namespace=NAMESPACE.encode())
        return found

    async def save(self, journal: bytes) -> None:
        """Replace it."""
        await asyncio.to_thread(_internal_kv_put, _JOURNAL, journal, True, namespace=NAMESPACE.encode())


@dataclass(frozen=True, slots=True)
class _Booked:
    """A slice in Ray's books, or the wish for it: a placement group of that one resource. `granted` says which."""

    seat: Seat
    granted: bool = False


class RayNodes:
    """The nodes and their books, as Ray keeps them."""

    def __init__(self) -> None:
        self.owners = Owners()
        self._agents: dict[str, ActorHandle[Any]] = {}
        # As last looked at, all but the last only where it is needed: the head does, once in every round.
        self._books: dict[str, _Booked] = {}
        self._looked_at = -BOOKS_SECONDS
        self._offered: Collection[str] | None = None
        self._directories: dict[str, str] = {}

    async def names(self) -> Sequence[str]:
        """Every agent that is not known to be dead."""
        actors = await names_of_actors()
        self.owners.look(actors)
        return sorted(name.removeprefix(AGENT) for name in actors if name.startswith(AGENT))

    async def report(self, node: str, known: str, wait_seconds: float) -> Word:
        """As `NodeAgent.word`. An agent of an earlier version tells what it is at the moment. Raises NodeLost."""

        async def ask(agent: ActorHandle[Any]) -> Word:
            if not hasattr(agent, "word"):
                return Word(report=NodeReport.model_validate_json(await agent.report.remote()))
            return Word.model_validate_json(await agent.word.remote(known, wait_seconds))

        word: Word = await self._agent(node, ask)
        if word.report is not None:
            self._directories[node] = word.report.directory
        return word

    async def order(self, node: str, order: NodeOrder) -> None:
        """Tell it what to run. Raises NodeLost."""
        self.owners.told(node, None)  # an order without an answer may have been taken over
        await self._agent(node, lambda agent: agent.order.remote(order.model_dump_json()))
        self.owners.told(node, order.owners)

    async def belong(self, node: str, order: NodeOrder) -> None:
        """Tell it to whom its engines belong; not an agent that cannot be told. Raises NodeLost."""

        async def tell(agent: ActorHandle[Any]) -> bool:
            if not hasattr(agent, "belong"):
                return False
            await agent.belong.remote(order.model_dump_json())
            return True

        self.owners.told(node, None)
        if await self._agent(node, tell):
            self.owners.told(node, order.owners)

    async def gpus(self, node: str) -> NodeGpus:
        """What its driver shows. Raises NodeLost."""
        return NodeGpus.model_validate_json(await self._agent(node, lambda agent: agent.gpus.remote()))

    async def cut(self, node: str, order: CutOrder) -> None:
        """Have one of its GPUs cut. Raises PartitionError with the node's reason, NodeLost."""
        refused = await self._agent(node, lambda agent: agent.cut.remote(order.model_dump_json()))
        if refused:
            why = json.loads(refused)
            raise PartitionError(str(why["message"]), where=f"{node}: {why['where'] or ''}", remedy=why["remedy"])

    async def hold(self, seat: Seat) -> Hold:
        """The slice for this replica, and the process on its node that the engine is to belong to; how far that is."""
        booked = self._books.get(seat.replica)
        if booked is None:
            await self.owners.end(seat.replica)  # one that the last booking left: it could not start in this one
            booked = self._books[seat.replica] = _Booked(seat)
            await asyncio.to_thread(_book, seat)
        if not booked.granted:
            return Hold(seat, waits_for=await self._why_pending(seat))
        owner = await self.owners.of(seat, _booking(seat), self._journal(seat))
        return Hold(seat, owner=owner, waits_for=self.owners.waits_for(seat))

    def _journal(self, seat: Seat) -> str:
        """Where the seat's node writes down which engine runs there; empty where its agent does not tell."""
        directory = self._directories.get(seat.node)
        return str(NodePaths(Path(directory)).engines.journal(seat.replica)) if directory else ""

    async def let_go(self, replica: str) -> None:
        """Give the replica's slice back, and end its actor."""
        booked = self._books.get(replica)
        if booked is not None:
            await self.owners.end(replica)
            await asyncio.to_thread(_give_back, _booking(booked.seat))
            self._books.pop(replica, None)  # only then: what Ray did not take back is given back in the next round

    async def held(self) -> Mapping[str, Seat]:
        """Every slice that is held or asked for. Only this head changes Ray's books, so they are read where something
        waits in them, and seldom otherwise.
        """
        self._offered = None
        now = time.monotonic()
        if now - self._looked_at >= BOOKS_SECONDS or not all(booked.granted for booked in self._books.values()):
            self._books = {b.seat.replica: b for b in await asyncio.to_thread(_bookings)}
            self._looked_at = now
        await self.owners.end_needless(self._seats)
        return self._seats

    def actors(self) -> dict[str, dict[str, object]]:
        """Which actor each replica's engine belongs to, and that one's process on the seat's node, as far as it is known."""
        return {r: {"actor": name, "pid": owner.pid} for r, (name, owner) in self.owners.known(self._seats).items()}

    @property
    def _seats(self) -> dict[str, Seat]:
        return {replica: booked.seat for replica, booked in self._books.items()}

    async def _why_pending(self, seat: Seat) -> str:
        """What Ray waits for, in terms of slices."""
        if self._offered is None:
            cluster: Any = ray
            self._offered = frozenset(await asyncio.to_thread(cluster.cluster_resources))
        if resource_of(seat.key) not in self._offered:
            return f"a node that offers slice {seat.key}: none in the cluster does"
        others = (booked.seat for booked in self._books.values())
        rivals = [s for s in others if s.key == seat.key and s.replica != seat.replica]
        if rivals:
            return f"slice {seat.key}, which is still held for {rivals[0].replica}"
        return f"Ray to give it slice {seat.key}"

    async def _agent(self, node: str, call: Callable[[ActorHandle[Any]], Any]) -> Any:
        """Ask it by the handle that is known: looking one up by name is a question to Ray's own head each time."""
        try:
            if node not in self._agents:
                self._agents[node] = await asyncio.to_thread(ray.get_actor, AGENT + node, namespace=NAMESPACE)
            return await call(self._agents[node])
        except (ValueError, RayActorError) as error:
            self._agents.pop(node, None)  # another one of its name may be there already
            raise NodeLost(f"node {node!r} does not answer: {error}", where=node) from error


def _booking(seat: Seat) -> str:
    return f"{_SLICE}{seat.replica}|{seat.model}|{seat.node}|{seat.slice_id}"


def _seat_of(name: str) -> Seat:
    replica, model, node, slice_id = name.removeprefix(_SLICE).split("|", 3)
    return Seat(replica=replica, model=model, node=node, slice_id=slice_id)


def _book(seat: Seat) -> None:
    placement_group([{resource_of(seat.key): 1.0}], name=_booking(seat), lifetime="detached")


def _bookings() -> list[_Booked]:
    """Every slice that is held or asked for, also from before this head."""
    groups = [g for g in placement_group_table().values() if g["name"].startswith(_SLICE) and g["state"] != "REMOVED"]
    return [_Booked(_seat_of(group["name"]), group["state"] == "CREATED") for group in groups]


def _give_back(name: str) -> None:
    with contextlib.suppress(ValueError):  # it has gone already
        remove_placement_group(get_placement_group(name))


def give_all_back() -> None:
    """Let go of every slice, when a cluster ends whose Ray goes on."""
    for booked in _bookings():
        _give_back(_booking(booked.seat))


class _Texts:
    """The JSON of what is told, made once for all who are told the same."""

    def __init__(self) -> None:
        self._made: deque[tuple[Broadcast | News, str]] = deque(maxlen=8)

    def of(self, news: Broadcast | News) -> str:
        """As JSON."""
        for known, text in self._made:
            if known is news:
                return text
        text = news.model_dump_json()
        self._made.append((news, text))
        return text


class HeadActor:
    """The head, in the cluster."""

    def __init__(self, versions: str, secret: str, created: int) -> None:
        logging.basicConfig(level=logging.INFO)
        self._nodes = RayNodes()
        self._head = Head(self._nodes, RayStore(), SystemClock(), Versions.model_validate_json(versions), secret=secret)
        self._created = created
        self._texts = _Texts()
        self._lead = Lead()
        self._begin = asyncio.Lock()
        self._rounds: asyncio.Task[None] | None = None

    async def lead(self, who: str) -> str | None:
        """As `Lead.claim`."""
        return self._lead.claim(who, time.monotonic())

    async def aim(self, config: str, files: Mapping[str, str], pools: Pools | None = None) -> None:
        """Work towards this configuration; `pools` are the tenants with replicas of their own. Raises ConfigError for one that makes
        no sense; the last one stays.
        """
        await self._begun()
        goal = await asyncio.to_thread(read_goal, config, self._created, pools)
        await self._head.take_over(goal)
        self._nodes.owners.each = goal.actors
        await self._head.share(files)

    async def share(self, files: Mapping[str, str]) -> None:
        """Have every gateway hold these files."""
        await self._head.share(files)

    async def next_broadcast(self, head: str, after: int, timeout_seconds: float) -> str | None:
        """As `Head.next_broadcast`, as JSON: what agents of earlier versions ask for."""
        await self._begun()
        news = await self._head.next_broadcast(head, after, timeout_seconds=timeout_seconds)
        return self._texts.of(news) if news else None

    async def next_news(self, head: str, after: int, timeout_seconds: float, boot: str) -> str | None:
        """As `Head.next_news`, as JSON."""
        await self._begun()
        news = await self._head.next_news(head, after, timeout_seconds=timeout_seconds, boot=boot)
        return self._texts.of(news) if news else None

    async def status(self) -> dict[str, object]:
        """As `Head.status`, with this process, and the actors that engines belong to."""
        await self._begun()
        return {**self._head.status(), "pid": os.getpid(), "actors": self._nodes.actors()}

    async def survey(self) -> str:
        """As `Head.survey`, as JSON."""
        await self._begun()
        return (await self._head.survey()).model_dump_json()

    async def transition(self) -> dict[str, object] | None:
        """As `Head.transition`."""
        await self._begun()
        return self._head.transition()

    async def carry_out_for(self, who: str, why: Why, record: str) -> None:
        """As `Head.carry_out`, for a leader's plan. Raises StalePlan, also where another process leads; NotSurveyed."""
        await self._begun()
        if not self._lead.leads(who, time.monotonic()):
            raise StalePlan(f"{who} does not lead this cluster any more")
        await self._head.carry_out(record_of(json.loads(record)).transition, why=why)

    async def tell(self, who: str, told: str) -> None:
        """As `Head.tell`, where `who` leads; nothing else counts."""
        if self._lead.leads(who, time.monotonic()):
            self._head.tell(LeaderStatus.model_validate_json(told))

    async def carry_out(self, record: str, *, allow_mode_change: bool) -> None:
        """As `Head.carry_out`. Raises StalePlan, NotSurveyed."""
        await self._begun()
        await self._head.carry_out(record_of(json.loads(record)).transition, allow_mode_change=allow_mode_change)

    async def _begun(self) -> None:
        """Rounds begin with the first word from anybody: Ray restarts this actor without telling it anything."""
        async with self._begin:
            if self._rounds is None:
                kept = await self._head.restore()
                if kept.config:
                    await self._aim_as_before(kept)
                self._rounds = asyncio.create_task(self._head.run())

    async def _aim_as_before(self, kept: HeadJournal) -> None:
        """Towards what the head before this one was told, unless this program does not take it: then everything stays until
        somebody tells another configuration.
        """
        try:
            goal = await asyncio.to_thread(read_goal, kept.config, self._created, kept.pools)
            self._head.aim(goal)
            self._nodes.owners.each = goal.actors
        except ConfigError as error:
            log.error("the last configuration is not taken, waiting for another one: %s", error)


class AgentActor:
    """A node's agent, in the cluster."""

    def __init__(self, node: Mapping[str, Any]) -> None:
        logging.basicConfig(level=logging.INFO)
        fleet = FleetConfig.model_validate(node["fleet"])
        paths = NodePaths(Path(node["directory"]))
        self._fleet, self._paths = fleet, paths
        machine = enter(fleet, paths.engines.root)
        # Ray sets variables of its own for its workers; the node's processes are not among those.
        environ = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "CUDA_VISIBLE_DEVICES"}
        self._processes = LocalProcesses(paths, node["command"], environ)
        settings = NodeSettings(
            name=node["name"],
            address=node["address"],
            paths=paths,
            versions=Versions.model_validate(node["versions"]),
            fleet=node["fleet"],
            simulated=machine is not None,
            listen=node["listen"],
            join=node.get("join", ""),
        )
        self._agent = NodeAgent(settings, self._processes, self._observe, driver=NvmlPartitioner())
        self._following: asyncio.Task[None] | None = None
        self._texts = _Texts()

    def _observe(self) -> Inventory:
        return observe(self._fleet)

    async def report(self) -> str:
        """The node as it is: what heads of earlier versions ask for. The first question also has the agent follow the head's table."""
        self._follow()
        return (await self._agent.report()).model_dump_json()

    async def word(self, known: str, wait_seconds: float) -> str:
        """As `NodeAgent.word`, as JSON; else as `report`."""
        self._follow()
        return (await self._agent.word(known, wait_seconds)).model_dump_json()

    def _follow(self) -> None:
        if self._following is None:
            boot = self._agent.settings.boot
            self._following = asyncio.create_task(self._agent.follow(partial(_next_news, boot)))

    async def pass_on(self, head: str, after: int, timeout_seconds: float) -> str | None:
        """As `NodeAgent.pass_on`, as JSON."""
        news = await self._agent.pass_on(head, after, timeout_seconds)
        return self._texts.of(news) if news else None

    async def order(self, order: str) -> None:
        """Run this and nothing else."""
        await self._agent.order(NodeOrder.model_validate_json(order))

    async def belong(self, order: str) -> None:
        """As `NodeAgent.belong`."""
        self._agent.belong(NodeOrder.model_validate_json(order))

    async def gpus(self) -> str:
        """As `NodeAgent.gpus`, as JSON."""
        return (await self._agent.gpus()).model_dump_json()

    async def cut(self, order: str) -> str | None:
        """As `NodeAgent.cut`. Why not, as JSON, where that is not done."""
        try:
            await self._agent.cut(CutOrder.model_validate_json(order))
        except SlicewayError as error:
            return json.dumps(error.as_dict())
        return None

    async def renew(self) -> None:
        """Replace this node's gateway and controller by the installed version's."""
        await asyncio.to_thread(self._processes.renew)

    async def stop(self, seconds: float) -> None:
        """End this node's gateway, controller and engines. Whoever asks for it ends this actor afterwards."""
        self._agent.end()
        await asyncio.to_thread(self._processes.stop, seconds=seconds)


async def _next_news(boot: str, relay: str | None, head: str, after: int, timeout_seconds: float) -> News | None:
    if relay is not None:
        agent = await asyncio.to_thread(ray.get_actor, AGENT + relay, namespace=NAMESPACE)
        text = await agent.pass_on.remote(head, after, timeout_seconds)
        return News.model_validate_json(text) if text else None
    actor = await asyncio.to_thread(ray.get_actor, HEAD, namespace=NAMESPACE)
    if not hasattr(actor, "next_news"):  # a head of an earlier version
        text = await actor.next_broadcast.remote(head, after, timeout_seconds)
        return News(whole=Broadcast.model_validate_json(text)) if text else None
    text = await actor.next_news.remote(head, after, timeout_seconds, boot)
    return News.model_validate_json(text) if text else None


def start_head(versions: Versions, secret: str) -> ActorHandle[Any]:
    """The cluster's head; the one that is there, if there is one."""
    created = int(time.time())  # noqa: TID251 - shown as the models' age
    options = detached(as_remote(HeadActor), HEAD, get_if_exists=True, max_restarts=-1, max_concurrency=MOST_AT_ONCE)
    head: ActorHandle[Any] = options.remote(versions.model_dump_json(), secret, created)
    return head


def start_agent(node: Mapping[str, Any]) -> ActorHandle[Any]:
    """The agent of a node that has joined; one that is there already is replaced, because it may be of an older start."""
    name = AGENT + node["name"]
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(name, namespace=NAMESPACE))
        _until_gone(name)
    options = detached(
        as_remote(AgentActor), name, max_restarts=-1, max_concurrency=100, resources={node_resource(node["name"]): 1.0}
    )
    agent: ActorHandle[Any] = options.remote(dict(node))
    return agent


def _until_gone(name: str, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            return
        time.sleep(0.05)
