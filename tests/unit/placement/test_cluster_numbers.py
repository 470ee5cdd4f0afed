"""How many replicas demand asks for in a cluster: what a replica is counted with, and what is told about it."""

from __future__ import annotations

import pytest

from model_registry.schema import ModelConfig, ReplicaRange
from model_registry.sizing.speed import Demand
from model_registry.sizing.throughput import Throughput, ThroughputKey
from placement.autoscale import Signals
from placement.autoscale.capacity import Capacity, where_of
from placement.cluster.borne import CapacityOn, nobody_knows
from placement.cluster.members import NodeReport, Seat, Versions
from placement.cluster.numbers import ClusterNumbers
from placement.cluster.retiring import PATIENCE_SECONDS, Retiring
from placement.figures import add_up
from placement.policy import AutoscalePolicy
from placement.slices import Gpu, Slice, SliceKind
from placement.status import ScalingRow
from placement.workload.measured import Measured

POLICY = AutoscalePolicy.model_validate({"look_every": "2s", "scale_up_after": "2s", "cool_down": "1s"})
VERSIONS = Versions(sliceway="1", python="3.11", ray="2")


def model(least: int = 1, most: int = 9) -> ModelConfig:
    return ModelConfig(name="chat", source="org/x", replicas=ReplicaRange(min=least, max=most))


def slice_of(gib: int) -> Slice:
    return Slice(f"cpu-{gib}", SliceKind.CPU, None, gib * 2**30, cores=(gib,))


def report(node: str = "a", *gib: int, **more: object) -> NodeReport:
    slices = tuple(map(slice_of, gib))
    values = {"node": node, "address": "10.0.0.1", "versions": VERSIONS, "boot": "b", "slices": slices}
    return NodeReport.model_validate(values | more)


def seat(number: int, gib: int) -> Seat:
    return Seat(replica=f"chat-{number}", model="chat", node="a", slice_id=f"cpu-{gib}")


def numbers(capacity_on: CapacityOn = nobody_knows, **bounds: int) -> ClusterNumbers:
    made = ClusterNumbers()
    made.aim([model(**bounds)], {}, POLICY, capacity_on)
    return made


def by_size(_: str, one: Slice, _measured: Measured) -> Capacity | None:
    """A gibibyte bears a request per second; four are the least."""
    gib = one.memory_bytes / 2**30
    return Capacity(gib, "estimated", f"estimated for {gib:g} GiB") if gib >= 4 else None


def test_arrivals_count_by_what_a_replica_bears_on_the_slices_that_it_has() -> None:
    made, reports = numbers(by_size), {"a": report("a", 2, 4, 8)}
    seats = {"chat-0": seat(0, 4), "chat-1": seat(1, 8)}
    for at in (0.0, 2.0, 4.0):
        made.look(reports, [{"chat": Signals(arrivals_per_second=20.0)}], seats, at)
    row = made.rows(seats)["chat"]
    assert (row.requests_per_replica, row.capacity_source) == (6.0, "estimated")
    assert row.replicas > 2
    assert row.short == row.replicas - 2
    assert row.arrivals_per_second == 20.0


def test_without_a_replica_the_smallest_slice_that_it_fits_counts() -> None:
    made = numbers(by_size, least=0)
    made.look({"a": report("a", 8, 2, 4)}, [], {}, 0.0)
    assert made.rows({})["chat"].requests_per_replica == 4.0


@pytest.mark.parametrize("offered", [(), (2,)])
def test_where_it_fits_nowhere_nobody_knows_what_a_replica_bears(offered: tuple[int, ...]) -> None:
    made = numbers(by_size)
    made.look({"a": report("a", *offered)}, [{"chat": Signals(running=1)}], {}, 0.0)
    row = made.rows({})["chat"]
    assert (row.requests_per_replica, row.capacity_source) == (None, "unknown")


def test_figures_are_looked_at_as_often_as_the_configuration_says() -> None:
    made = numbers()
    busy = [{"chat": Signals(running=100)}]
    for at in (0.0, 0.5, 1.0, 1.5):
        made.look({"a": report()}, busy, {}, at)
    assert made.replicas == {"chat": 1}
    for at in (2.0, 4.0):
        made.look({"a": report()}, busy, {}, at)
    assert made.replicas["chat"] > 1


def test_what_gateways_tell_is_added_up() -> None:
    one = Signals(arrivals_per_second=1.0, queued=2, running=3, ttft_seconds=0.5, idle_seconds=9.0)
    other = Signals(arrivals_per_second=2.0, running=1, ttft_seconds=0.7, itl_seconds=0.1, idle_seconds=0.0)
    assert add_up([{"chat": one}, {}, {"chat": other, "embed": other}]) == {
        "chat": Signals(3.0, 2, 4, ttft_seconds=0.7, itl_seconds=0.1, idle_seconds=0.0),
        "embed": other,
    }


def test_a_report_travels_with_what_its_gateways_see() -> None:
    told = report(demand={"chat": Signals(arrivals_per_second=0.5, running=2)}, cordoned=("cpu-1",))
    assert NodeReport.model_validate_json(told.model_dump_json()) == told
    assert report().demand is None


# ---- on the way out


def running(*numbers_of: int, generation: int = 0) -> dict[str, NodeReport]:
    return {"a": report("a", 4, 8, running={f"chat-{n}": "cpu-4" for n in numbers_of}, generation=generation)}


BEFORE = {"chat-0": seat(0, 4)}


def test_who_goes_keeps_its_seat_until_every_gateway_has_the_table_that_says_so() -> None:
    retiring = Retiring()
    assert retiring.keep({}, BEFORE, {"chat"}, running(0, generation=5), 0.0) == BEFORE
    assert retiring.leaving == {"chat-0"}
    retiring.told(6)
    both = running(0, generation=6) | {"b": report("b", generation=5)}
    assert retiring.keep({}, BEFORE, {"chat"}, both, 0.5) == BEFORE
    assert retiring.keep({}, BEFORE, {"chat"}, running(0, generation=6), 1.0) == {}
    assert retiring.leaving == frozenset()


def test_nobody_is_waited_for_longer_than_the_patience() -> None:
    retiring = Retiring()
    retiring.keep({}, BEFORE, {"chat"}, running(0), 10.0)
    retiring.told(6)
    assert retiring.keep({}, BEFORE, {"chat"}, running(0), 9.9 + PATIENCE_SECONDS) == BEFORE
    assert retiring.keep({}, BEFORE, {"chat"}, running(0), 10.0 + PATIENCE_SECONDS) == {}


def test_who_is_needed_again_stays_and_is_told_anew_the_next_time() -> None:
    retiring = Retiring()
    retiring.keep({}, BEFORE, {"chat"}, running(0), 0.0)
    retiring.told(6)
    assert retiring.keep(BEFORE, BEFORE, {"chat"}, running(0, generation=9), 1.0) == {}
    assert retiring.leaving == frozenset()
    assert retiring.keep({}, BEFORE, {"chat"}, running(0, generation=9), 2.0) == BEFORE


@pytest.mark.parametrize(
    ("seats", "models", "reports"),
    [
        ({"code-0": Seat(replica="code-0", model="code", node="a", slice_id="cpu-4")}, {"chat"}, running(0)),
        ({}, {"code"}, running(0)),
        ({}, {"chat"}, running()),
        ({}, {"chat"}, {}),
    ],
    ids=["another one has its slice", "no such model any more", "it does not run", "its node is lost"],
)
def test_nothing_keeps_a_seat_that_is_wanted_or_empty(
    seats: dict[str, Seat], models: set[str], reports: dict[str, NodeReport]
) -> None:
    retiring = Retiring()
    assert retiring.keep(seats, BEFORE, models, reports, 0.0) == {}
    assert retiring.leaving == frozenset()


# ---- what was measured


H100 = Gpu("GPU-0", 0, "h100-sxm", 80 * 2**30)


def record(product: str | None, profile: str | None, cores: int | None, rate: float, **more: object) -> Throughput:
    kind = "cpu" if cores else "mig"
    key = ThroughputKey("org/x", kind, profile, product, cores, 100, 10, {}, engine_version="0.32.0 (cuda)")
    values: dict[str, object] = {"measured_at": "2026-11-20T00:00:00+00:00", "simulated": False} | more
    return Throughput(key, "chat", rate, None, 0.0, 0.0, 1.0, None, None, **values)  # type: ignore[arg-type]


def as_measured(_: str, one: Slice, measured: Measured) -> Capacity:
    """By the best record for such a slice."""
    demand = Demand(1.0, 100, 10)
    told = measured.judged("org/x", where_of(one), demand)
    if told.requests_per_second is None:
        return Capacity(1.0, "estimated", "for a test", told.ignored)
    return Capacity(told.requests_per_second, "measured", "for a test")


def cards(node: str, *measured: Throughput, **more: object) -> NodeReport:
    mig = Slice("GPU-0/1g.10gb@0", SliceKind.MIG, "1g.10gb", 10 * 2**30, uuid="MIG-0", gpu=H100)
    core = Slice("cpu-0", SliceKind.CPU, None, 4 * 2**30, cores=(0, 1))
    return report(node, **({"slices": (mig, core), "measured": measured} | more))


def counted(reports: dict[str, NodeReport], there: str, node: str = "a") -> ScalingRow:
    made = numbers(as_measured)
    seats = {"chat-0": Seat(replica="chat-0", model="chat", node=node, slice_id=there)}
    made.look(reports, [{"chat": Signals()}], seats, 0.0)
    return made.rows(seats)["chat"]


def test_what_one_node_has_measured_counts_on_every_card_of_the_kind() -> None:
    reports = {"a": cards("a"), "b": cards("b", record("h100-sxm", "1g.10gb", None, 7.0))}
    row = counted(reports, "GPU-0/1g.10gb@0")
    assert (row.requests_per_replica, row.capacity_source) == (7.0, "measured")
    assert counted({"a": reports["a"]}, "GPU-0/1g.10gb@0").capacity_source == "estimated"


def test_what_was_measured_on_cores_counts_on_their_own_node() -> None:
    reports = {"a": cards("a"), "b": cards("b", record(None, None, 2, 3.0))}
    assert counted(reports, "cpu-0").capacity_source == "estimated"
    assert counted(reports, "cpu-0", node="b").requests_per_replica == 3.0


def test_what_was_measured_with_another_engine_or_simulated_does_not_count_and_says_so() -> None:
    there = "GPU-0/1g.10gb@0"
    measured = record("h100-sxm", "1g.10gb", None, 7.0)
    row = counted({"a": cards("a", measured, engines={"chat-0": "0.33.0 (cuda)"})}, there)
    assert row.capacity_source == "estimated"
    assert "0.32.0" in row.ignored[0]
    assert counted({"a": cards("a", measured, engines={"chat-0": "0.32.0"})}, there).capacity_source == "measured"
    simulated = record("h100-sxm", "1g.10gb", None, 7.0, simulated=True)
    assert counted({"a": cards("a", simulated)}, there).capacity_source == "estimated"


def test_a_report_travels_with_what_was_measured() -> None:
    told = cards("a", record("h100-sxm", "1g.10gb", None, 7.0), engines={"chat-0": "0.32.0"})
    assert NodeReport.model_validate_json(told.model_dump_json()) == told
