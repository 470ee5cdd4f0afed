"""What a head tells to whom: the rows that differ to those who have a table that it remembers, else the whole."""

from __future__ import annotations

from placement.cluster.bulletin import REMEMBERED, Bulletin
from placement.cluster.change import broadcast_of, changed
from placement.cluster.members import Broadcast, News, TableChange
from placement.status import ClusterScaling, ScalingRow
from placement.table import ReplicaRow, ReplicaState, RoutingTable, SliceRow


def table(generation: int, replicas: int = 3, **states: str) -> RoutingTable:
    return RoutingTable(
        generation=generation,
        replicas=tuple(
            ReplicaRow(
                replica=f"chat-{i}",
                model="chat",
                engine_model="m",
                endpoint="http://n:1",
                slice=SliceRow(id=f"n/cpu-{i}", kind="cpu"),
                state=ReplicaState(states.get(f"r{i}", "ready")),
            )
            for i in range(replicas)
        ),
    )


async def told(*tables: RoutingTable) -> Bulletin:
    bulletin = Bulletin()
    for one in tables:
        await bulletin.tell(one, "{}", files={"keys.json": "k"})
    return bulletin


async def since(bulletin: Bulletin, sequence: int, head: str | None = None) -> News:
    news = await bulletin.news(head or bulletin.latest.head, sequence, timeout_seconds=0)
    assert news is not None
    return news


async def test_who_has_the_last_table_is_told_the_row_that_is_another() -> None:
    bulletin = await told(table(1), table(2, r1="draining"))
    news = await since(bulletin, 1)
    assert news.whole is None
    assert news.change is not None
    assert [(last, row.replica) for last, row in news.change.table.replicas] == [("chat-0", "chat-1")]
    assert (news.change.files, news.change.config) == (None, None)
    assert await since(bulletin, 1) is news, "it is the same for every node"


async def test_what_is_made_of_demand_is_told_without_the_table() -> None:
    bulletin = await told(table(1))
    row = ScalingRow(replicas=2, placed=1, least=1, most=3, reason="")
    await bulletin.tell(table(1), "{}", scaling=ClusterScaling(scaling={"chat": row}))
    news = await since(bulletin, 1)
    assert news.change is not None
    assert news.change.table.replicas == ()
    known = Broadcast(head=bulletin.latest.head, table=table(1), config="{}", files={"keys.json": "k"}, sequence=1)
    assert broadcast_of(news, known) == bulletin.latest
    await bulletin.tell(table(2), "{}")
    assert bulletin.latest.scaling.scaling == {"chat": row}
    assert (await since(bulletin, 2)).change.scaling is None  # type: ignore[union-attr]


async def test_who_is_behind_by_several_is_told_all_that_happened() -> None:
    bulletin = await told(table(1), table(2, r1="draining"), table(3, 2, r0="failed", r1="draining"))
    known = Broadcast(head=bulletin.latest.head, table=table(1), config="{}", files={"keys.json": "k"}, sequence=1)
    assert broadcast_of(await since(bulletin, 1), known) == bulletin.latest


async def test_who_has_a_table_that_nobody_remembers_is_told_the_whole() -> None:
    bulletin = await told(*(table(i) for i in range(1, REMEMBERED + 2)))
    assert (await since(bulletin, 1)).whole == bulletin.latest
    assert (await since(bulletin, 2)).whole is None
    assert (await since(bulletin, REMEMBERED, "another head")).whole == bulletin.latest
    later = await bulletin.news(bulletin.latest.head, 10 * REMEMBERED, timeout_seconds=0)
    assert later is None, "who has a newer one than a relay is told nothing older"
    assert await bulletin.news(bulletin.latest.head, REMEMBERED + 1, timeout_seconds=0) is None


async def test_a_change_for_somebody_else_is_not_taken() -> None:
    bulletin = await told(table(1), table(2, r1="draining"))
    news = await since(bulletin, 1)
    other = Broadcast(head=bulletin.latest.head, table=table(1, 2), sequence=1)
    assert broadcast_of(news, other) is None, "its table is another one"
    assert broadcast_of(news, other.model_copy(update={"table": table(1), "sequence": 2})) is None
    assert broadcast_of(news, other.model_copy(update={"table": table(1), "head": "x"})) is None
    assert broadcast_of(news, None) is None


def test_a_digest_that_is_not_the_results_is_found() -> None:
    assert changed(table(1), TableChange(generation=2, digest="0")) is None
