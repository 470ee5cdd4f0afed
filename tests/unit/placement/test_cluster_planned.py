"""How many replicas a configured demand takes in a cluster: enough, bounded by the slices, and the same number from then on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_registry.model import SliceFit
from model_registry.schema import DemandConfig, ModelConfig
from placement.autoscale.capacity import Capacity
from placement.cluster.members import NodeReport, Seat, Versions
from placement.cluster.numbers import ClusterNumbers
from placement.cluster.planned import replicas_for
from placement.cluster.seating import seat_replicas
from placement.policy import AutoscalePolicy
from placement.slices import Slice, SliceKind
from placement.workload.measured import Measured


def bears(*rates: float | None) -> list[Capacity]:
    return [Capacity(rate, "unknown" if rate is None else "estimated", "for this test") for rate in rates]


@pytest.mark.parametrize(
    ("rate", "here", "could", "expected"),
    [
        (6.0, (), (2.0,) * 9, 3),
        (6.1, (), (2.0,) * 9, 4),
        (0.1, (), (2.0,) * 9, 1),
        (6.0, (2.0, 2.0), (2.0,) * 9, 3),
        (6.0, (4.0, 2.0, 2.0), (2.0, 4.0, 4.0), 2),
        (6.0, (None, 2.0), (2.0,) * 9, 4),
        (6.0, (), (2.0, 4.0), 2),
        (6.0, (2.0, 2.0), (None, None), 1),
        (6.0, (), (), 1),
    ],
    ids=[
        "exactly",
        "and a little more",
        "less than one",
        "one more than there are",
        "fewer, because one has a larger slice",
        "one of which nobody knows bears nothing",
        "no more than there are slices",
        "nobody knows",
        "it fits nowhere",
    ],
)
def test_as_many_as_bear_it(
    rate: float, here: tuple[float | None, ...], could: tuple[float | None, ...], expected: int
) -> None:
    found = replicas_for(rate, bears(*here), bears(*could))
    assert found.replicas == expected
    assert found.reason


def test_what_there_are_too_few_slices_for_is_told() -> None:
    assert "that takes 3, and 2 is every slice that it fits" in replicas_for(6.0, [], bears(2.0, 2.0)).reason


def model(rate: float) -> ModelConfig:
    asked = DemandConfig(requests_per_second=rate, prompt_tokens=100, output_tokens=10)
    return ModelConfig(name="chat", source="org/x", demand=asked)


def report(*gib: int) -> NodeReport:
    slices = tuple(Slice(f"s-{i}", SliceKind.CPU, None, g * 2**30, cores=(i,)) for i, g in enumerate(gib))
    versions = Versions(sliceway="1", python="3.11", ray="2")
    return NodeReport(node="a", address="10.0.0.1", versions=versions, boot="b", slices=slices)


def by_size(_: str, one: Slice, __: Measured) -> Capacity | None:
    return Capacity(one.memory_bytes / 2**30, "estimated", "a gibibyte bears a request per second")


def anywhere(_: str, target: Slice) -> SliceFit:
    return SliceFit(True, "fits", target.memory_bytes, 0, 0, 0, 1, 0)


@given(st.floats(0.1, 40), st.lists(st.integers(1, 8), min_size=1, max_size=8), st.floats(0, 1))
def test_the_number_settles_and_then_bears_the_demand_or_has_every_slice(
    rate: float, sizes: list[int], head_room: float
) -> None:
    numbers, reports, seats = ClusterNumbers(), {"a": report(*sizes)}, dict[str, Seat]()
    asked = model(rate)
    numbers.aim([asked], {}, AutoscalePolicy(), by_size, head_room)
    history = []
    for second in range(6):
        numbers.look(reports, [], seats, float(second))
        seats = dict(seat_replicas([asked], reports, anywhere, seats, numbers=numbers.replicas).seats)
        history.append(sorted(seats))
    assert history[2:] == [history[2]] * 4, "replicas would come and go"
    borne = sum(sizes[int(seat.slice_id.removeprefix("s-"))] for seat in seats.values())
    assert borne >= rate * (1 + head_room) - 1e-6 or len(seats) == len(sizes)
