from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loadtests.samples import percentile

SAMPLES = st.lists(st.floats(min_value=0, max_value=1e6), min_size=1, max_size=300)
SHARES = st.floats(min_value=0.001, max_value=1.0)


@given(SAMPLES, SHARES)
def test_a_percentile_is_the_smallest_sample_that_enough_samples_do_not_exceed(
    values: list[float], share: float
) -> None:
    found = percentile(sorted(values), share)
    assert found in values
    assert sum(v <= found for v in values) >= share * len(values) - 1e-9
    assert sum(v < found for v in values) < share * len(values) + 1e-9


@given(SAMPLES, SHARES, SHARES)
def test_percentiles_do_not_fall(values: list[float], one: float, other: float) -> None:
    ordered = sorted(values)
    assert percentile(ordered, min(one, other)) <= percentile(ordered, max(one, other))
