#!/usr/bin/env python3
"""What a cluster's head and gateways have to do, from 4 nodes to 1,000, and what is too much first: `scripts/cluster_model.py`.

Every unit cost is measured here and now on the functions that a cluster runs, in seconds of one core, on made-up nodes of eight GPUs
(one replica on each, or seven with `--slices 56`). What they add up to is a model: a head is one thread, and everything that it
does in a round has to fit into the round, or the round takes longer and a change reaches gateways later. Crossing the
network costs `--rpc-seconds` of the head's process for each call; `--ray` measures that on actors on this machine.

Prints one row for each size: seconds of work, the head's load (work in a round over the round's length), the time until a
change is in every gateway, and the table's size; with `--json` the numbers alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from gateway.routes import build_routes
from model_registry.model import SliceFit
from model_registry.schema import ModelConfig
from placement.cluster.head import LOST_AFTER_SECONDS, STEP_SECONDS
from placement.cluster.members import Broadcast, NodeReport, Seat, Versions
from placement.cluster.merge import merge_tables
from placement.cluster.seating import SeatingBook, seat_replicas
from placement.slices import Slice, SliceKind
from placement.table import ModelRow, ReplicaRow, ReplicaState, RoutingTable, SliceRow

SIZES = (4, 10, 30, 100, 300, 1000)
GATEWAY_POLL_SECONDS = 0.25
GIB = 2**30


@dataclass(frozen=True)
class Costs:
    """Seconds of one core. `report`, `fan_out` are per node, the others for the whole cluster at once."""

    nodes: int
    replicas: int
    table_bytes: int
    report: float  # of one node: its JSON becomes values
    seat: float  # nothing that counts has changed, which has to be found out
    seat_lost: float  # one node's replicas are seated anew
    seat_first: float  # none has a seat yet
    seat_short: float  # likewise, where there is not room for all and one model is spread over the nodes
    merge: float  # the table, and whether it is another one
    encode: float  # the table as JSON, once
    fan_out: float  # the same bytes for one more node
    gateway_read: float  # a gateway reads the table
    gateway_routes: float  # and makes its routes of it


@dataclass(frozen=True)
class Load:
    """What the costs add up to. `head` is the part of a core that steady rounds take at the length they should have."""

    round_seconds: float
    head: float
    change_seconds: float
    notice_seconds: float
    gateway: float


def reports(nodes: int, slices: int) -> dict[str, NodeReport]:
    """Nodes that run a replica on every slice."""
    versions = Versions(sliceway="1", python="3.11", ray="2.60.0")
    made = {}
    for number in range(nodes):
        name = f"node-{number:04}"
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
            versions=versions,
            boot="b",
            slices=own,
            table=RoutingTable(generation=7, replicas=rows),
            running={row.replica: row.slice.id for row in rows},
            generation=9,
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
    table = merge_tables(rows, known, seats, {}, RoutingTable(generation=1), secret="s")
    texts = [report.model_dump_json() for report in list(known.values())[:20]]
    broadcast = Broadcast(head="h", table=table, sequence=1)
    text = broadcast.model_dump_json().encode()
    file = table.model_dump_json().encode()
    book, again = SeatingBook(), reports(nodes, slices)
    book.seat(models, known, _fits, seats)
    left = dict(list(known.items())[1:])
    fewer = [ModelConfig(name="chat", source="org/x", replicas=(nodes - 1) * slices)]
    return Costs(
        nodes,
        nodes * slices,
        len(text),
        report=seconds(lambda: [NodeReport.model_validate_json(one) for one in texts]) / len(texts),
        seat=seconds(lambda: book.seat(models, again, _fits, dict(seats))),
        seat_lost=seconds(lambda: seat_replicas(fewer, left, _fits, seats)),
        seat_first=seconds(lambda: seat_replicas(models, known, _fits, {})),
        seat_short=seconds(lambda: seat_replicas(_more_than_fit(nodes, slices), known, _fits, {})),
        merge=seconds(lambda: merge_tables(rows, known, seats, {}, table, secret="s")),
        encode=seconds(broadcast.model_dump_json),
        fan_out=seconds(lambda: bytes(bytearray(text))),
        gateway_read=seconds(lambda: RoutingTable.model_validate_json(file)),
        gateway_routes=seconds(lambda: build_routes(table, models, {})),
    )


def _more_than_fit(nodes: int, slices: int) -> list[ModelConfig]:
    """Two replicas too many: one finds no slice, the other no node."""
    return [
        ModelConfig(name="chat", source="org/x", replicas=nodes * (slices - 1) + 1),
        ModelConfig(name="near", source="org/x", replicas=nodes + 1, spread="nodes"),
    ]


def _fits(_: str, target: Slice) -> SliceFit:
    return SliceFit(True, "fits", target.memory_bytes, 0, 0, 0, 8192, GIB)


def load(costs: Costs, *, rpc_seconds: float, changes_per_second: float) -> Load:
    """The model. A change is told when the round that sees it is over, encoded once, and sent to one node after another."""
    asked = costs.nodes * (rpc_seconds + costs.report)
    work = asked + costs.seat + costs.merge
    length = work + STEP_SECONDS
    told = costs.encode + costs.nodes * (rpc_seconds + costs.fan_out)
    change = length + told + GATEWAY_POLL_SECONDS + costs.gateway_read + costs.gateway_routes
    head = (work + min(1.0, changes_per_second * length) * told) / length
    gateway = min(changes_per_second, 1 / GATEWAY_POLL_SECONDS, 1 / length) * (
        costs.gateway_read + costs.gateway_routes
    )
    return Load(length, head, change, LOST_AFTER_SECONDS + length + costs.seat_lost + told, gateway)


def rpc_cost(calls: int = 300) -> tuple[float, float]:
    """Seconds of the caller's process for one call of an actor that answers with a node's report: by name, and by a kept handle."""
    import asyncio

    import ray

    text = next(iter(reports(1, 8).values())).model_dump_json()
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:

        class Agent:
            async def report(self) -> str:
                return text

        remote: Any = ray.remote
        agent = remote(Agent).options(name="agent", num_cpus=0).remote()
        ray.get(agent.report.remote())

        async def ask(named: bool) -> None:
            handle = await asyncio.to_thread(ray.get_actor, "agent") if named else agent
            await handle.report.remote()

        async def ask_all(named: bool) -> float:
            began = time.process_time()
            await asyncio.gather(*(ask(named) for _ in range(calls)))
            return (time.process_time() - began) / calls

        return asyncio.run(ask_all(True)), asyncio.run(ask_all(False))
    finally:
        ray.shutdown()


def main() -> int:
    """Measure every size and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--slices", type=int, default=8, help="slices of a node, with a replica on each")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of nodes")
    parser.add_argument("--rpc-seconds", type=float, default=0.0005, help="of the head's thread, for each call")
    parser.add_argument("--changes", type=float, default=0.2, help="changes of the table per second")
    parser.add_argument("--ray", action="store_true", help="measure the cost of a call, print it, and go by it")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    out = sys.stdout
    if chosen.ray:
        named, kept = rpc_cost()
        out.write(f"a call costs its caller {named * 1e3:.2f} ms by name, {kept * 1e3:.2f} ms by a kept handle\n")
        chosen.rpc_seconds = kept
    if not chosen.json:
        out.write(
            f"{'nodes':>6} {'replicas':>8} {'table':>9} | {'reports':>8} {'seat':>8} {'anew':>8} {'first':>8} {'short':>8} {'merge':>8} {'encode':>8} | "
            f"{'round':>7} {'head':>5} {'change':>7} {'lost':>6} {'gateway':>7}\n"
        )
    for size in chosen.sizes:
        costs = measure(size, chosen.slices)
        found = load(costs, rpc_seconds=chosen.rpc_seconds, changes_per_second=chosen.changes)
        if chosen.json:
            out.write(json.dumps(asdict(costs) | {"load": asdict(found)}) + "\n")
        else:
            out.write(
                f"{size:>6} {costs.replicas:>8} {costs.table_bytes / 2**20:>6.2f} MB | {size * costs.report:>8.3f} "
                f"{costs.seat:>8.3f} {costs.seat_lost:>8.3f} {costs.seat_first:>8.3f} {costs.seat_short:>8.3f} {costs.merge:>8.3f} {costs.encode:>8.3f} | {found.round_seconds:>6.2f}s "
                f"{found.head:>5.0%} {found.change_seconds:>6.2f}s {found.notice_seconds:>5.1f}s {found.gateway:>7.0%}\n"
            )
        out.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
