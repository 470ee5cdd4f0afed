"""A table that is made anew only where a node is another says what one says that is made of everything."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from placement.cluster.members import NodeReport, Seat, Versions
from placement.cluster.merge import MergeBook
from placement.slices import Slice, SliceKind
from placement.table import ModelRow, ReplicaRow, ReplicaState, RoutingTable, SliceRow

VERSIONS = Versions(sliceway="1", python="3.11", ray="2")
REPLICAS = ("chat-0", "chat-1", "chat-2")
SLICES = ("cpu-0", "cpu-1")
NODES = ("n0", "n1")


def report(node: str, slices: int, rows: dict[str, tuple[str, ReplicaState]], waiting: dict[str, str]) -> NodeReport:
    table = tuple(
        ReplicaRow(
            replica=replica,
            model="chat",
            engine_model="m",
            endpoint="http://n:1",
            slice=SliceRow(id=place, kind="cpu"),
            state=state,
        )
        for replica, (place, state) in rows.items()
    )
    return NodeReport(
        node=node,
        address="10.0.0.1",
        versions=VERSIONS,
        boot="b",
        slices=tuple(Slice(one, SliceKind.CPU, None, 1, cores=(0,)) for one in SLICES[:slices]),
        table=RoutingTable(generation=1, replicas=table),
        waiting=waiting,
    )


def seat(replica: str, place: tuple[str, str]) -> Seat:
    return Seat(replica=replica, model="chat", node=place[0], slice_id=place[1])


why = st.dictionaries(st.sampled_from(REPLICAS), st.sampled_from(["a slice", "its holder"]))
running = st.dictionaries(
    st.sampled_from(REPLICAS),
    st.tuples(st.sampled_from(SLICES), st.sampled_from([ReplicaState.READY, ReplicaState.STARTING])),
)
reports = st.fixed_dictionaries(
    {},
    optional={node: st.builds(report, st.just(node), st.integers(0, 2), running, why) for node in NODES},
)
seats = st.dictionaries(st.sampled_from(REPLICAS), st.tuples(st.sampled_from(NODES), st.sampled_from(SLICES))).map(
    lambda places: {replica: seat(replica, place) for replica, place in places.items()}
)
leaving = st.frozensets(st.sampled_from(REPLICAS), max_size=1)
rounds = st.tuples(reports, seats, why, leaving, st.sampled_from(["", "s"]), why)


@given(st.lists(rounds, max_size=6))
def test_a_book_says_what_is_said_without_one(
    told: list[tuple[dict[str, NodeReport], dict[str, Seat], dict[str, str], frozenset[str], str, dict[str, str]]],
) -> None:
    book, table, models = MergeBook(), RoutingTable(generation=1), (ModelRow(name="chat"),)
    for nodes, places, waiting, going, secret, unplaced in told:
        found = book.merge(models, nodes, places, waiting, table, secret=secret, leaving=going, unplaced=unplaced)
        assert found == MergeBook().merge(
            models, nodes, places, waiting, table, secret=secret, leaving=going, unplaced=unplaced
        )
        table = found
