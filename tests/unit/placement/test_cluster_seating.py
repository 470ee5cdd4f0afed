"""Seats over many nodes: the short way gives what the long way gives, and nothing is worked out twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from model_registry.model import SliceFit
from model_registry.schema import ModelConfig
from placement.assign import Wanted, assign
from placement.cluster.members import NodeReport, Seat, Versions
from placement.cluster.seating import SeatingBook, _seated, seat_replicas
from placement.slices import Inventory, Slice, SliceKind

GIB = 2**30
SIZES = (4, 8, 16)


def one(number: int, gib: int) -> Slice:
    return Slice(f"cpu-{number}", SliceKind.CPU, None, gib * GIB, cores=(number,))


def fit(model: str, target: Slice) -> SliceFit:
    least = {"a": 4, "b": 8, "c": 16}[model] * GIB
    return SliceFit(target.memory_bytes >= least, "", target.memory_bytes, 0, 0, 0, 8192, 0)


@given(
    sizes=st.lists(st.sampled_from(SIZES), max_size=7),
    asked=st.lists(st.tuples(st.sampled_from("abc"), st.none() | st.integers(0, 6)), max_size=7),
    here=st.lists(st.integers(0, 6), max_size=7),
)
def test_keeping_who_runs_and_seating_the_rest_is_what_assigning_all_gives(
    sizes: list[int], asked: list[tuple[str, int | None]], here: list[int]
) -> None:
    inventory = Inventory(tuple(one(i, gib) for i, gib in enumerate(sizes)))
    wanted = [Wanted(f"{m}-{i}", m, i, pin=None if pin is None else f"cpu-{pin}") for i, (m, pin) in enumerate(asked)]
    current = {w.replica: f"cpu-{at}" for w, at in zip(wanted, here, strict=False) if at < len(sizes)}
    fits = {(m, s.id): fit(m, s) for m in "abc" for s in inventory.slices}
    short, long = _seated(wanted, fits, inventory, current), assign(wanted, fits, inventory, current=current)
    assert dict(short.slices) == dict(long.slices)
    assert set(short.unplaced) == set(long.unplaced)


def report(node: str, slices: int) -> NodeReport:
    versions = Versions(sliceway="1", python="3.11", ray="2")
    own = tuple(one(i, 8) for i in range(slices))
    return NodeReport(node=node, address="10.0.0.1", versions=versions, boot="b", slices=own)


def test_seats_are_worked_out_again_only_where_something_counts() -> None:
    looked: list[str] = []

    def fit_on(model: str, target: Slice) -> SliceFit:
        looked.append(target.id)
        return fit("a", target)

    models = [ModelConfig(name="chat", source="org/x", replicas=2)]
    book = SeatingBook()
    first = book.seat(models, {"n": report("n", 2)}, fit_on, {})
    assert set(first.seats) == {"chat-0", "chat-1"}
    count = len(looked)
    assert book.seat(models, {"n": report("n", 2)}, fit_on, {}) is first
    assert len(looked) == count
    fewer = book.seat(models, {"n": report("n", 1)}, fit_on, {})
    assert set(fewer.unplaced) == {"chat-1"}
    assert book.seat(models, {"n": report("n", 2)}, fit_on, {}).seats == first.seats


def test_a_fleet_of_thousands_keeps_its_seats() -> None:
    """What would take minutes if every replica were compared with every slice."""
    reports = {f"n{i}": report(f"n{i}", 8) for i in range(250)}
    models = [ModelConfig(name="chat", source="org/x", replicas=2000)]
    seats = {
        f"chat-{8 * n + i}": Seat(replica=f"chat-{8 * n + i}", model="chat", node=f"n{n}", slice_id=f"cpu-{i}")
        for n in range(250)
        for i in range(8)
    }
    assert seat_replicas(models, reports, lambda _, s: fit("a", s), seats).seats == seats
