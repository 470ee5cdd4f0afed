from __future__ import annotations

import pytest

from loadtests.samples import Sample, grouped, percentile, quantiles, summarize


def sample(tenant: str = "acme", **fields: object) -> Sample:
    values: dict[str, object] = {
        "model": "chat",
        "slice": "cpu-0",
        "due_seconds": 1.0,
        "sent_seconds": 1.0,
        "ended_seconds": 2.0,
    }
    return Sample(tenant=tenant, **(values | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(("share", "value"), [(0.5, 20), (0.51, 30), (0.75, 30), (0.76, 40), (1.0, 40), (0.001, 10)])
def test_nearest_rank_by_hand(share: float, value: float) -> None:
    assert percentile([10, 20, 30, 40], share) == value


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="no percentile"):
        percentile([1.0], share)


def test_p99_of_few_samples_says_that_it_is_their_maximum() -> None:
    assert quantiles(range(99)).p99_is_maximum
    assert quantiles(range(99)).p99 == 98
    hundred = quantiles(range(100))
    assert not hundred.p99_is_maximum
    assert hundred.p99 == 98
    assert hundred.maximum == 99


def test_nothing_measured_is_none_and_not_zero() -> None:
    empty = quantiles([])
    assert (empty.count, empty.p50, empty.p99) == (0, None, None)
    assert not empty.p99_is_maximum


def test_failures_are_counted_by_kind_and_are_in_no_latency() -> None:
    rows = [
        sample(ttft_seconds=0.1, itl_seconds=(0.02, 0.03), e2e_seconds=0.5, output_tokens=3),
        sample(failure="http_429", status=429),
        sample(failure="http_429", status=429),
        sample(failure="truncated", status=200, output_tokens=9),
    ]
    summary = summarize(rows)
    assert summary.failures == {"http_429": 2, "truncated": 1}
    assert (summary.requests, summary.succeeded, summary.output_tokens) == (4, 1, 3)
    assert (summary.e2e_seconds.count, summary.ttft_seconds.count, summary.itl_seconds.count) == (1, 1, 2)
    assert summary.as_dict()["e2e_seconds"]["p99"] == 0.5


def test_groups_keep_every_sample() -> None:
    rows = [sample("b"), sample("a"), sample("b")]
    assert grouped(rows, lambda s: (s.tenant,)) == {("b",): [rows[0], rows[2]], ("a",): [rows[1]]}
