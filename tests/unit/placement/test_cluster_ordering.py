"""What a node is told, and when it is told nothing."""

from __future__ import annotations

from placement.cluster.members import NodeOrder, NodeReport, Owner, Seat, Versions
from placement.cluster.ordering import Orders

OWNER = Owner(pid=1, start_ticks=1, boot_id="b")
SEATS = {
    replica: Seat(replica=replica, model="chat", node=node, slice_id="cpu-0")
    for replica, node in (("chat-0", "a"), ("chat-1", "b"))
}


def orders(
    generation: int = 1,
    config: str = "{}",
    owners: tuple[str, ...] = ("chat-0", "chat-1"),
    turns: tuple[str, ...] = (),
    secret: str = "s",
) -> Orders:
    return Orders(generation, config, SEATS, dict.fromkeys(owners, OWNER), turns, secret)


def report(**running: str) -> NodeReport:
    versions = Versions(sliceway="1", python="3.11", ray="2")
    return NodeReport(node="a", address="10.0.0.1", versions=versions, boot="b", running=running)


def test_a_node_is_told_of_its_own_replicas() -> None:
    order = orders(turns=("chat-0", "chat-1")).to("a", report(), None)
    assert order == NodeOrder(
        generation=1, config="{}", seats={"chat-0": "cpu-0"}, owners={"chat-0": OWNER}, turns=("chat-0",), secret="s"
    )
    nothing = orders().to("c", report(), None)
    assert nothing is not None
    assert (nothing.seats, nothing.owners) == ({}, {}), "one without a seat ends what it runs"


def test_the_generation_alone_is_no_reason_and_everything_else_is() -> None:
    before = orders().to("a", report(), None)
    assert orders(generation=2).to("a", report(), before) is None
    assert orders(turns=("chat-1",)).to("a", report(), before) is None, "it is another node's turn"
    for other in (orders(config="{ }"), orders(owners=()), orders(turns=("chat-0",)), orders(secret="t")):
        assert other.to("a", report(), before) is not None


def test_an_engine_whose_holder_has_only_not_answered_is_not_ended() -> None:
    unheld = orders(owners=("chat-1",))
    assert unheld.to("a", report(**{"chat-0": "cpu-0"}), None) is None
    order = unheld.to("a", report(**{"chat-0": "cpu-1"}), None)
    assert order is not None
    assert order.seats == {}, "it does not run in its seat"
