"""What is another in one table of the cluster than in the one before, and the one made of the other. Pure.

Rows are known by their names and told with the row that they come after, so that whoever adds them up has the same order.
That the result is the same table is for the digest to say: rows of one name, or a reader that knows fewer fields, would not be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypeVar

from placement.cluster.members import Broadcast, News, TableChange
from placement.table import ReplicaRow, RoutingTable, SliceRow

Row = TypeVar("Row", ReplicaRow, SliceRow)

_FIRST = ""


def digest_of(table: RoutingTable) -> str:
    """Equal for equal tables, on every node whose rows have the same fields."""
    return hashlib.sha256(table.model_dump_json().encode()).hexdigest()


def change_between(before: RoutingTable, after: RoutingTable, digest: str) -> TableChange:
    """What makes `after` of `before`; `digest` is that of `after`."""
    replicas, replicas_gone = _difference(before.replicas, after.replicas, _replica)
    idle, idle_gone = _difference(before.idle, after.idle, _slice)
    return TableChange(
        generation=after.generation,
        models=None if before.models == after.models else after.models,
        replicas=replicas,
        replicas_gone=replicas_gone,
        idle=idle,
        idle_gone=idle_gone,
        digest=digest,
    )


def changed(before: RoutingTable, change: TableChange) -> RoutingTable | None:
    """The table after `before`; None where that is not what it should be, and the whole of it has to be asked for."""
    table = RoutingTable(
        generation=change.generation,
        models=before.models if change.models is None else change.models,
        replicas=_applied(before.replicas, change.replicas, change.replicas_gone, _replica),
        idle=_applied(before.idle, change.idle, change.idle_gone, _slice),
    )
    return table if digest_of(table) == change.digest else None


def broadcast_of(news: News, known: Broadcast | None) -> Broadcast | None:
    """The whole broadcast for who has `known`; None where `news` is not about that, or does not make what it should."""
    change = news.change
    if change is None:
        return news.whole
    if known is None or (known.head, known.sequence) != (change.head, change.after):
        return None
    table = changed(known.table, change.table)
    if table is None:
        return None
    return Broadcast(
        head=change.head,
        table=table,
        files=known.files if change.files is None else change.files,
        config=known.config if change.config is None else change.config,
        sequence=change.sequence,
        scaling=known.scaling if change.scaling is None else change.scaling,
        relays=known.relays if change.relays is None else change.relays,
    )


def _replica(row: ReplicaRow) -> str:
    return row.replica


def _slice(row: SliceRow) -> str:
    return row.id


def _difference(
    before: Sequence[Row], after: Sequence[Row], name: Callable[[Row], str]
) -> tuple[tuple[tuple[str, Row], ...], tuple[str, ...]]:
    """The rows that are new or another, each with the name of the one that it follows, and the names that are gone."""
    there, names = {name(row): row for row in before}, {name(row) for row in after}
    same = {name(row) for row in after if (old := there.get(name(row))) is row or old == row}
    if [name(row) for row in before if name(row) in same] != [name(row) for row in after if name(row) in same]:
        same = set()
    told: list[tuple[str, Row]] = []
    last = _FIRST
    for row in after:
        if name(row) not in same:
            told.append((last, row))
        last = name(row)
    return tuple(told), tuple(one for one in there if one not in names)


def _applied(
    before: Iterable[Row], told: Sequence[tuple[str, Row]], gone: Collection[str], name: Callable[[Row], str]
) -> tuple[Row, ...]:
    away = {*gone, *(name(row) for _, row in told)}
    following = dict(told)
    rows: list[Row] = []

    def follow(last: str) -> None:
        while (row := following.pop(last, None)) is not None:
            rows.append(row)
            last = name(row)

    follow(_FIRST)
    for row in before:
        if name(row) not in away:
            rows.append(row)
            follow(name(row))
    return tuple(rows)
