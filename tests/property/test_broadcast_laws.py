"""Whatever a head tells, and whatever is lost on the way: nodes end with the head's table, their keys and configuration."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from placement.cluster.bulletin import Bulletin
from placement.cluster.change import broadcast_of, change_between, changed, digest_of
from placement.cluster.members import Broadcast, News
from placement.table import ModelRow, ReplicaRow, ReplicaState, RoutingTable, SliceRow

NAMES = tuple(f"chat-{i}" for i in range(6))
STATES = (ReplicaState.READY, ReplicaState.STARTING, ReplicaState.PENDING)


def replica(name: str, state: ReplicaState) -> ReplicaRow:
    place = SliceRow(id=f"n/{name}", kind="cpu")
    return ReplicaRow(replica=name, model="chat", engine_model="m", endpoint="http://n:1", slice=place, state=state)


replicas = st.lists(st.builds(replica, st.sampled_from(NAMES), st.sampled_from(STATES)), unique_by=lambda r: r.replica)
idle = st.lists(
    st.builds(lambda i, kind: SliceRow(id=f"n/{i}", kind=kind), st.integers(0, 4), st.sampled_from(["cpu", "mig"])),
    unique_by=lambda row: row.id,
)
models = st.lists(st.builds(lambda n: ModelRow(name="chat", created=n), st.integers(0, 2)), max_size=1)
tables = st.builds(
    lambda r, i, m: RoutingTable(generation=0, replicas=tuple(r), idle=tuple(i), models=tuple(m)),
    replicas,
    idle,
    models,
)
moves = st.one_of(
    st.tuples(st.just("tell"), tables),
    st.tuples(st.just("keys"), st.sampled_from(["1", "2"])),
    st.tuples(st.sampled_from(["head", "hear", "lose", "late", "restart"]), st.integers(0, 1)),
)


@given(tables, tables)
def test_a_change_makes_the_one_table_of_the_other(before: RoutingTable, after: RoutingTable) -> None:
    change = change_between(before, after, digest_of(after))
    assert changed(before, change) == after
    told = {row.replica for _, row in change.replicas}
    again = {r.replica for r in after.replicas if r in before.replicas}
    in_order = [r for r in before.replicas if r.replica in again] == [r for r in after.replicas if r.replica in again]
    assert not told & again or not in_order, "what is as it was is not told"


@given(tables, tables, tables)
def test_a_change_of_another_table_is_not_taken(before: RoutingTable, other: RoutingTable, after: RoutingTable) -> None:
    made = changed(other, change_between(before, after, digest_of(after)))
    assert made in (None, after)


@dataclass
class Agent:
    known: Broadcast | None = None
    late: list[News] = field(default_factory=list)

    async def ask(self, bulletin: Bulletin) -> News | None:
        head, sequence = (self.known.head, self.known.sequence) if self.known else ("", 0)
        news = await bulletin.news(head, sequence, timeout_seconds=0)
        return News.model_validate_json(news.model_dump_json()) if news else None

    def take_in(self, news: News | None) -> None:
        if news is not None:
            self.known = broadcast_of(news, self.known)


async def play(steps: Sequence[tuple[str, object]]) -> None:
    bulletin, agents, generation, keys = Bulletin(), (Agent(), Agent()), 0, "0"
    for step, value in steps:
        if step in ("tell", "keys"):
            generation += 1
            keys = str(value) if step == "keys" else keys
            table = value if isinstance(value, RoutingTable) else bulletin.latest.table
            await bulletin.tell(table.model_copy(update={"generation": generation}), keys, files={"keys.json": keys})
        elif step == "head":
            bulletin = Bulletin()
        else:
            agent = agents[int(str(value))]
            news = await agent.ask(bulletin)
            if step == "restart":
                agent.known = None
            if step == "lose" and news is not None:
                agent.late.append(news)
            if step == "late" and agent.late:
                agent.take_in(agent.late.pop())
            if step == "hear":
                agent.take_in(news)
    await bulletin.tell(RoutingTable(generation=generation + 1, replicas=(replica("last", STATES[0]),)), keys)
    for agent in agents:
        for _ in range(2):  # the second time where the first news made no sense to it
            agent.take_in(await agent.ask(bulletin))
        assert agent.known == bulletin.latest
        assert await agent.ask(bulletin) is None


@given(st.lists(moves, max_size=20))
def test_every_node_ends_with_the_heads_table(steps: list[tuple[str, object]]) -> None:
    asyncio.run(play(steps))
