"""Laws of what the load tests compute: weighted percentiles, the capacity search, fairness, shares of a trace."""

from __future__ import annotations

from math import isclose

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from loadtests.capacity.search import Search
from loadtests.lab import bootstrap
from loadtests.lab.service import jain_index
from loadtests.run_result import Run, merged
from loadtests.samples import PERCENTILES, Sample, percentile, quantiles
from loadtests.units import parse_duration, show_duration

SECONDS = st.floats(1e-4, 1e3, allow_nan=False)


def sample(seconds: float, due: float, gaps: tuple[float, ...] = ()) -> Sample:
    return Sample("a", "m", None, due, due, due + seconds, ttft_seconds=seconds, itl_seconds=gaps, e2e_seconds=seconds)


@given(st.lists(st.lists(SECONDS, min_size=1, max_size=30), min_size=1, max_size=4))
def test_unweighted_percentiles_are_the_exact_ones(rounds: list[list[float]]) -> None:
    pool = bootstrap.pool_of([[sample(v, i) for i, v in enumerate(r)] for r in rounds], "e2e_seconds")
    ones = np.ones(sum(map(len, rounds)), dtype=np.int64)
    found = bootstrap._percentiles(pool, ones, np.asarray(list(PERCENTILES.values())))
    ordered = sorted(v for r in rounds for v in r)
    assert list(found) == [percentile(ordered, share) for share in PERCENTILES.values()]


@given(st.lists(SECONDS, min_size=2, max_size=40), st.floats(1.5, 4.0), st.integers(0, 99))
def test_the_interval_of_a_constant_factor_is_that_factor(values: list[float], factor: float, seed: int) -> None:
    """Both settings resample the same rounds; equal requests scaled by one factor leave no doubt at all."""
    alone = bootstrap.pool_of([[sample(values[0], i) for i in range(len(values))]], "e2e_seconds")
    beside = bootstrap.pool_of([[sample(values[0] * factor, i) for i in range(len(values))]], "e2e_seconds")
    found = bootstrap.compare(alone, beside, seed=seed, replicates=20)
    assert all(isclose(end, factor, rel_tol=1e-9) for interval in found.ratio.values() for end in interval)


@given(st.lists(st.tuples(SECONDS, SECONDS, SECONDS), min_size=3, max_size=20))
def test_gaps_stay_with_their_request(rows: list[tuple[float, float, float]]) -> None:
    pool = bootstrap.pool_of([[sample(1.0, i, gaps=row) for i, row in enumerate(rows)]], "itl_seconds")
    assert pool.round_sizes == (len(rows),)
    assert list(np.bincount(pool.owners)) == [3] * len(rows)


@given(st.floats(0.01, 500), st.floats(0.01, 500), st.floats(1.05, 1.5))
def test_the_search_closes_in_on_a_threshold(threshold: float, start: float, tolerance: float) -> None:
    search = Search(start, tolerance, most_probes=60)
    while (rate := search.next()) is not None:
        search.tell(rate, held=rate <= threshold)
    found = search.bracket
    assert found.holds <= threshold
    assert found.fails is not None
    assert found.fails > threshold
    assert found.fails / found.holds <= tolerance


@given(st.lists(st.booleans(), max_size=12), st.floats(0.1, 10))
def test_the_search_ends_whatever_it_is_told(answers: list[bool], start: float) -> None:
    search, asked = Search(start, most_probes=12), []
    for held in answers:
        if (rate := search.next()) is None:
            break
        asked.append(rate)
        search.tell(rate, held=held)
    found = search.bracket
    assert len(set(asked)) == len(asked)
    assert found.fails is None or found.holds < found.fails


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_jains_index_lies_between_one_over_n_and_one(shares: list[float]) -> None:
    index = jain_index(shares)
    if index is None:
        assert sum(x * x for x in shares) == 0
    else:
        assert 1 / len(shares) - 1e-9 <= index <= 1 + 1e-9


@given(st.lists(st.lists(SECONDS, max_size=30), min_size=1, max_size=4))
def test_merged_processes_are_the_pooled_samples(parts: list[list[float]]) -> None:
    runs = [Run(tuple(sample(v, i) for i, v in enumerate(p)), quantiles(p), lags=tuple(p)) for p in parts]
    whole = merged(runs)
    assert whole.client_lag == quantiles([v for p in parts for v in p])
    assert sorted(s.e2e_seconds or 0 for s in whole.samples) == sorted(v for p in parts for v in p)


@given(st.floats(1e-6, 1e5))
def test_durations_are_read_back_as_written(seconds: float) -> None:
    assert isclose(parse_duration(show_duration(seconds)), seconds, rel_tol=1e-4)
