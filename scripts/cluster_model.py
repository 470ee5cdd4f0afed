#!/usr/bin/env python3
"""What a cluster's head, agents and gateways have to do, from 4 nodes to 1,000, and what is too much first: `scripts/cluster_model.py`.

Every unit cost is measured here and now on the code that a cluster runs, in seconds of one core, on made-up nodes of eight GPUs
(one replica on each, or seven with `--slices 56`): whole rounds of a head whose nodes answer from memory, what it makes of a change,
what agents and gateways make of it. What they add up to is a model: a head is one thread, and everything that it
does in a second has to fit into a second, or a change reaches gateways later. Asking a node costs `--ask-seconds` of the head's
process, answering one that asks for the next table `--tell-seconds`; `--ray` measures both on actors on this machine.

Prints one row for each size: seconds of work, the part of a core that the head takes, the time until a
change is in every gateway at the latest, and what is sent to each; with `--json` the numbers alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gateway.routes import build_routes
from model_registry.model import SliceFit
from model_registry.schema import ModelConfig
from placement.cluster.change import broadcast_of
from placement.cluster.head import LOST_AFTER_SECONDS, PAUSE_SECONDS, STEP_SECONDS, ClusterGoal, Head
from placement.cluster.members import Broadcast, News, NodeOrder, NodeReport, Owner, Seat, Versions, Word
from placement.cluster.node import CHECK_SECONDS, POLL_SECONDS, RELAY_SECONDS
from placement.cluster.nodes import Hold
from placement.cluster.relays import relay_for, relays_of
from placement.cluster.seating import seat_replicas
from placement.cluster.survey import NodeGpus
from placement.cluster.watching import ALIVE_SECONDS
from placement.slices import Slice, SliceKind
from placement.table import ModelRow, ReplicaRow, ReplicaState, RoutingTable, SliceRow
from placement.testing import FakeClock

SIZES = (4, 10, 30, 100, 300, 1000)
GATEWAY_POLL_SECONDS = 0.25
GIB = 2**30


VERSIONS = Versions(sliceway="1", python="3.11", ray="2.60.0")


@dataclass(frozen=True)
class Costs:
    """Seconds of one core. `report` and `apply` are of one node, the others of the whole cluster at once."""

    nodes: int
    replicas: int
    table_bytes: int
    change_bytes: int  # what is told of one replica that is another
    report: float  # of one node: its JSON becomes values
    round: float  # of the head, whole: no node has told anything new
    round_changed: float  # one node has, and the table is another one
    change: float  # what is another in it, for who has the one before
    apply: float  # an agent makes the table of it, and the file's content
    seat_lost: float  # one node's replicas are seated anew
    seat_first: float  # none has a seat yet
    seat_short: float  # likewise, where there is not room for all and one model is spread over the nodes
    gateway_read: float  # a gateway reads the table
    gateway_routes: float  # and makes its routes of it


@dataclass(frozen=True)
class Prices:
    """Seconds of the head's process. Which nodes ask and are asked all the time costs that, however little they have to tell."""

    ask: float  # a node is asked, and answers that it lives
    tell: float  # a node asks for the next table, and is told what is another

    def standing(self, nodes: int) -> float:
        """The part of a core that this takes while nothing changes."""
        relays = len(_relays(nodes))
        asked, asking = nodes / (ALIVE_SECONDS + STEP_SECONDS / 2), relays / RELAY_SECONDS or nodes / POLL_SECONDS
        return asked * self.ask + asking * self.tell

    def telling(self, nodes: int) -> tuple[float, float]:
        """How long the head is busy with it, and after that a relay; 0 where there are none."""
        relays = _relays(nodes)
        if not relays:
            return nodes * self.tell, 0.0
        asked = Counter(relay_for(node, relays) for node in _names(nodes))
        return len(relays) * self.tell, max(asked[relay] for relay in relays) * self.tell


@dataclass(frozen=True)
class Load:
    """What the costs add up to. `head` and `gateway` are parts of a core, `head_still` where nothing changes."""

    head: float
    head_still: float
    change_seconds: float
    notice_seconds: float
    gateway: float


class MadeUp:
    """Nodes that answer from memory, and only when they have something new; Ray's books, in which every slice is free."""

    def __init__(self, known: Mapping[str, NodeReport]) -> None:
        self._known = dict(known)
        self._another = {node: asyncio.Event() for node in known}
        self._held: dict[str, Seat] = {}
        self._owner = Owner(pid=1, start_ticks=1, boot_id="b")

    async def names(self) -> Sequence[str]:
        """Every node."""
        return list(self._known)

    async def report(self, node: str, known: str, wait_seconds: float) -> Word:
        """As `Nodes.report`; answers when the node is changed, without a time."""
        if self._known[node].digest == known:
            await self._another[node].wait()
        self._another[node].clear()
        return Word(report=self._known[node])

    def change(self, number: int) -> None:
        """One replica of one node starts, or serves again."""
        node = list(self._known)[number % len(self._known)]
        report = self._known[node]
        first, *others = report.table.replicas
        serves = first.state is ReplicaState.READY
        row = first.model_copy(update={"state": ReplicaState.STARTING if serves else ReplicaState.READY})
        table = report.table.model_copy(update={"replicas": (row, *others)})
        self._known[node] = report.model_copy(update={"table": table, "digest": f"{number}"})
        self._another[node].set()

    async def order(self, node: str, order: NodeOrder) -> None:
        """Obeyed already."""

    async def belong(self, node: str, order: NodeOrder) -> None:
        """Obeyed already."""

    async def gpus(self, node: str) -> NodeGpus:
        """None that could be cut."""
        return NodeGpus()

    async def hold(self, seat: Seat) -> Hold:
        """Granted."""
        self._held[seat.replica] = seat
        return Hold(seat, owner=self._owner)

    async def let_go(self, replica: str) -> None:
        """Taken back."""
        self._held.pop(replica, None)

    async def held(self) -> Mapping[str, Seat]:
        """What was granted."""
        return dict(self._held)

    async def load(self) -> bytes | None:
        """None."""
        return None

    async def save(self, journal: bytes) -> None:
        """Kept nowhere."""


@dataclass(frozen=True)
class Rounds:
    """What a head's rounds took, and the last thing that it told."""

    round: float
    round_changed: float
    change: float
    before: Broadcast
    news: News


async def rounds(known: Mapping[str, NodeReport], goal: ClusterGoal, count: int = 7) -> Rounds:
    """Rounds of a head that knows all its nodes, without and with something new."""
    nodes = MadeUp(known)
    head = Head(nodes, nodes, FakeClock(), VERSIONS, secret="s")
    await head.restore()
    head.aim(goal)
    for _ in range(3):
        await head.step()
    still, changed, telling = [], [], []
    before = news = None
    for number in range(count):
        still.append(await _spent(head))
        before = await head.next_broadcast("", 0, timeout_seconds=0.1)
        nodes.change(number)
        changed.append(await _spent(head))
        assert before is not None
        while (
            await head.next_broadcast(before.head, before.sequence, timeout_seconds=0.01) is None
        ):  # where this process had to wait for so long that a question was given up
            changed[-1] = await _spent(head)
        began = time.process_time()
        news = await head.next_news(before.head, before.sequence, timeout_seconds=0.1)
        assert news is not None
        news.model_dump_json()
        telling.append(time.process_time() - began)
    assert before is not None
    assert news is not None
    head.stop()
    return Rounds(statistics.median(still), statistics.median(changed), statistics.median(telling), before, news)


async def _spent(head: Head) -> float:
    began = time.process_time()
    await head.step()
    return time.process_time() - began


def _names(nodes: int) -> list[str]:
    return [f"node-{number:04}" for number in range(nodes)]


def _relays(nodes: int) -> tuple[str, ...]:
    return relays_of(_names(nodes))


def reports(nodes: int, slices: int) -> dict[str, NodeReport]:
    """Nodes that run a replica on every slice."""
    made = {}
    for number, name in enumerate(_names(nodes)):
        own = tuple(
            Slice(
                f"GPU-{number:04}-{i // 7}/1g.10gb@{i % 7}",
                SliceKind.MIG,
                "1g.10gb",
                10 * GIB,
                uuid=f"MIG-{number}-{i}",
            )
            for i in range(slices)
        )
        rows = tuple(_row(number * slices + i, one, number) for i, one in enumerate(own))
        made[name] = NodeReport(
            node=name,
            address=f"10.0.{number // 250}.{number % 250}",
            versions=VERSIONS,
            boot="b",
            slices=own,
            table=RoutingTable(generation=7, replicas=rows),
            running={row.replica: row.slice.id for row in rows},
            generation=9,
            digest=name,
        )
    return made


def _row(number: int, one: Slice, node: int) -> ReplicaRow:
    return ReplicaRow(
        replica=f"chat-{number}",
        model="chat",
        engine_model="chat",
        endpoint=f"http://10.0.{node // 250}.{node % 250}:{20_000 + number % 1000}",
        slice=SliceRow(id=one.id, kind="mig", profile=one.profile, uuid=one.uuid),
        state=ReplicaState.READY,
        max_num_seqs=16,
        kv_cache_tokens=200_000,
    )


def seconds(work: Callable[[], Any], *, least: float = 0.2, most: int = 25) -> float:
    """The median over as many runs as fit into a moment, in seconds of this process."""
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < least and len(taken) < most):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
        if taken[-1] > 20:
            break
    return statistics.median(taken)


def measure(nodes: int, slices: int) -> Costs:
    """The unit costs at one size."""
    known = reports(nodes, slices)
    models = [ModelConfig(name="chat", source="org/x", replicas=nodes * slices)]
    rows = (ModelRow(name="chat", task="generate"),)
    seats = {
        replica: Seat(replica=replica, model="chat", node=name, slice_id=slice_id)
        for name, report in known.items()
        for replica, slice_id in report.running.items()
    }
    texts = [report.model_dump_json() for report in list(known.values())[:20]]
    of_head = asyncio.run(rounds(known, ClusterGoal("{}", models, rows, _fits)))
    table, told = of_head.before.table, of_head.news.model_dump_json()
    file = table.model_dump_json().encode()
    left = dict(list(known.items())[1:])
    fewer = [ModelConfig(name="chat", source="org/x", replicas=(nodes - 1) * slices)]
    return Costs(
        nodes,
        nodes * slices,
        len(of_head.before.model_dump_json()),
        len(told),
        report=seconds(lambda: [NodeReport.model_validate_json(one) for one in texts]) / len(texts),
        round=of_head.round,
        round_changed=of_head.round_changed,
        change=of_head.change,
        apply=seconds(lambda: _applied(told, of_head.before)),
        seat_lost=seconds(lambda: seat_replicas(fewer, left, _fits, seats)),
        seat_first=seconds(lambda: seat_replicas(models, known, _fits, {})),
        seat_short=seconds(lambda: seat_replicas(_more_than_fit(nodes, slices), known, _fits, {})),
        gateway_read=seconds(lambda: RoutingTable.model_validate_json(file)),
        gateway_routes=seconds(lambda: build_routes(table, models, {})),
    )


def _applied(text: str, before: Broadcast) -> str:
    made = broadcast_of(News.model_validate_json(text), before)
    assert made is not None
    return made.table.model_dump_json(indent=1)


def _more_than_fit(nodes: int, slices: int) -> list[ModelConfig]:
    """Two replicas too many: one finds no slice, the other no node."""
    return [
        ModelConfig(name="chat", source="org/x", replicas=nodes * (slices - 1) + 1),
        ModelConfig(name="near", source="org/x", replicas=nodes + 1, spread="nodes"),
    ]


def _fits(_: str, target: Slice) -> SliceFit:
    return SliceFit(True, "fits", target.memory_bytes, 0, 0, 0, 8192, GIB)


def load(costs: Costs, prices: Prices, *, changes_per_second: float) -> Load:
    """The model. A node sees its change at the next look, the head when its pause ends; it makes the change of the table once, tells one
    node after another, or the relays, and each of those its own. A change is of one node, and each has a round of its own.
    """
    telling, passing_on = prices.telling(costs.nodes)
    told = costs.change + telling
    of_change = prices.ask + costs.report + costs.round_changed + told
    if passing_on:
        passing_on += costs.apply + costs.change
    still = prices.standing(costs.nodes) + costs.round / (STEP_SECONDS + costs.round)
    reading = costs.gateway_read + costs.gateway_routes
    change = CHECK_SECONDS + PAUSE_SECONDS + of_change + passing_on + costs.apply + GATEWAY_POLL_SECONDS + reading
    notice = LOST_AFTER_SECONDS + STEP_SECONDS + costs.round_changed + costs.seat_lost + told + passing_on
    gateway = min(changes_per_second, 1 / GATEWAY_POLL_SECONDS) * reading
    return Load(still + changes_per_second * of_change, still, change, notice, gateway)


def ray_prices(calls: int = 300) -> Prices:
    """Seconds of the head's process for each question, on actors: what asking takes of who asks, and telling of who is asked."""
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        remote: Any = ray.remote
        agent = remote(_Agent).options(num_cpus=0, max_concurrency=calls + 10).remote()
        ray.get(agent.word.remote())

        async def ask_all() -> float:
            began = time.process_time()
            await asyncio.gather(*(agent.word.remote() for _ in range(calls)))
            return (time.process_time() - began) / calls

        def tell_all() -> float:
            began = ray.get(agent.spent.remote())
            asked = [agent.next_news.remote("h", 1, POLL_SECONDS, "b") for _ in range(calls)]
            while ray.get(agent.waiting.remote()) < calls:
                pass
            ray.get(agent.tell.remote())
            ray.get(asked)
            return float(ray.get(agent.spent.remote()) - began) / calls

        return Prices(
            ask=statistics.median(asyncio.run(ask_all()) for _ in range(5)),
            tell=statistics.median(tell_all() for _ in range(5)),
        )
    finally:
        ray.shutdown()


class _Agent:
    """Answers as agents and heads do: with a word of few bytes, and when there is something new."""

    def __init__(self) -> None:
        self._another = asyncio.Condition()
        self._asking = 0
        self._told = 0
        self._text = "x" * 700

    async def word(self) -> str:
        return Word().model_dump_json()

    async def next_news(self, _head: str, _after: int, _timeout_seconds: float, _boot: str) -> str:
        told = self._told
        self._asking += 1
        async with self._another:
            await self._another.wait_for(lambda: self._told != told)
        self._asking -= 1
        return self._text

    async def tell(self) -> None:
        async with self._another:
            self._told += 1
            self._another.notify_all()

    async def waiting(self) -> int:
        await asyncio.sleep(0.05)
        return self._asking

    async def spent(self) -> float:
        return time.process_time()


def main() -> int:
    """Measure every size and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--slices", type=int, default=8, help="slices of a node, with a replica on each")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of nodes")
    parser.add_argument("--ask-seconds", type=float, default=0.0005, help="of the head's process, for asking a node")
    parser.add_argument("--tell-seconds", type=float, default=0.0005, help="of the head's process, for each node told")
    parser.add_argument("--changes", type=float, default=0.2, help="changes of the table per second")
    parser.add_argument("--ray", action="store_true", help="measure what calls cost, print it, and go by it")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    prices, out = Prices(chosen.ask_seconds, chosen.tell_seconds), sys.stdout
    if chosen.ray:
        prices = ray_prices()
        if not chosen.json:
            out.write(
                f"asking a node takes {prices.ask * 1e3:.2f} ms of the head, telling one {prices.tell * 1e3:.2f} ms\n"
            )
    if not chosen.json:
        out.write(
            f"{'nodes':>6} {'replicas':>8} {'table':>9} {'change':>7} | {'round':>7} {'changed':>7} {'telling':>7} {'apply':>7} | "
            f"{'anew':>7} {'first':>7} {'short':>7} | {'head':>5} {'still':>5} {'everywhere':>10} {'lost':>6} {'gateway':>7}\n"
        )
    for size in chosen.sizes:
        costs = measure(size, chosen.slices)
        found = load(costs, prices, changes_per_second=chosen.changes)
        if chosen.json:
            out.write(json.dumps(asdict(costs) | {"prices": asdict(prices), "load": asdict(found)}) + "\n")
        else:
            out.write(
                f"{size:>6} {costs.replicas:>8} {costs.table_bytes / 2**20:>6.2f} MB {costs.change_bytes:>5} B | "
                f"{costs.round:>7.3f} {costs.round_changed:>7.3f} {costs.change + sum(prices.telling(size)):>7.3f} {costs.apply:>7.3f} | "
                f"{costs.seat_lost:>7.3f} {costs.seat_first:>7.3f} {costs.seat_short:>7.3f} | "
                f"{found.head:>5.0%} {found.head_still:>5.0%} {found.change_seconds:>9.2f}s {found.notice_seconds:>5.1f}s "
                f"{found.gateway:>7.0%}\n"
            )
        out.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
