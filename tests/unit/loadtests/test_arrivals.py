from __future__ import annotations

import json
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from statistics import fmean, pvariance

import pytest

from loadtests.arrivals import Bursts, Constant, Gamma, Open, OpenArrival, Ramp, Trace, due_times, mean_rate, share_of
from loadtests.problems import ScenarioError
from loadtests.traces import Row, read_trace

ROWS = (Row(0.0, 10, 5), Row(1.0, 20, 6), Row(3.0, 30, 7, "p", 8))


def times(arrival: OpenArrival, count: int = 20_000, rows: tuple[Row, ...] = ()) -> list[float]:
    return [due for due, _ in islice(due_times(arrival, Random(7), rows), count)]


def gaps(due: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(due)]


def test_open_is_a_poisson_process() -> None:
    found = gaps(times(Open(requests_per_second=50)))
    assert fmean(found) == pytest.approx(1 / 50, rel=0.03)
    assert pvariance(found) == pytest.approx(fmean(found) ** 2, rel=0.06)


def test_constant_is_even() -> None:
    assert times(Constant(requests_per_second=4), 3) == pytest.approx([0.25, 0.5, 0.75])


@pytest.mark.parametrize(("burstiness", "squared_variation"), [(0.25, 4.0), (1.0, 1.0), (10.0, 0.1)])
def test_gamma_has_the_variation_that_was_asked_for(burstiness: float, squared_variation: float) -> None:
    found = gaps(times(Gamma(requests_per_second=20, burstiness=burstiness)))
    assert fmean(found) == pytest.approx(1 / 20, rel=0.05)
    assert pvariance(found) / fmean(found) ** 2 == pytest.approx(squared_variation, rel=0.12)


def test_bursts_come_together_at_the_mean_rate() -> None:
    due = times(Bursts(requests_per_second=30, size=5), 20_000)
    assert all(len(set(due[i : i + 5])) == 1 for i in range(0, 500, 5))
    assert len(due) / due[-1] == pytest.approx(30, rel=0.06)


@pytest.mark.parametrize(("start", "end"), [(0.0, 40.0), (40.0, 2.0), (10.0, 10.0)])
def test_a_ramp_follows_its_line_and_stays(start: float, end: float) -> None:
    ramp = Ramp(from_per_second=start, to_per_second=end, over_seconds=100)
    due = times(ramp, 30_000)
    halfway = sum(t < 50 for t in due)
    assert halfway == pytest.approx(50 * (start + (start + end) / 2) / 2, rel=0.1)
    later = sum(100 <= t < 400 for t in due if due[-1] > 400)
    assert due[-1] < 400 or later == pytest.approx(300 * end, rel=0.1)
    assert mean_rate(ramp, 100) == pytest.approx((start + end) / 2)


def test_a_trace_is_replayed_and_repeated() -> None:
    once = list(due_times(Trace(file=Path("t"), speed=2.0), Random(1), ROWS))
    assert [(due, row.output_tokens) for due, row in once if row] == [(0.0, 5), (0.5, 6), (1.5, 7)]
    again = times(Trace(file=Path("t"), repeat=True), 6, ROWS)
    assert again[:3] == [0.0, 1.0, 3.0]
    assert again[3] > 3.0
    assert gaps(again[3:]) == [1.0, 2.0]
    assert mean_rate(Trace(file=Path("t")), 10, ROWS) == pytest.approx(0.3)


def test_shares_are_the_whole() -> None:
    def sequence():  # type: ignore[no-untyped-def]
        return due_times(Open(requests_per_second=5), Random(3))

    parts = [list(islice(share_of(sequence(), i, 3), 10)) for i in range(3)]
    assert sorted(x for part in parts for x in part) == list(islice(enumerate(sequence()), 30))


def test_a_trace_is_read_in_both_formats(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    ours = {"at_seconds": 0.5, "prompt_tokens": 9, "output_tokens": 3, "prefix": "a", "prefix_tokens": 4}
    theirs = {"timestamp": 1500, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}
    path.write_text(json.dumps(ours) + "\n\n" + json.dumps(theirs) + "\n", encoding="utf-8")
    assert read_trace(path) == (Row(0.5, 9, 3, "a", 4), Row(1.5, 6758, 500))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "no JSON"),
        ("[1]", "JSON object"),
        ('{"at_seconds": 1, "prompt_tokens": 1}', "'output_tokens' is missing"),
        ('{"at_seconds": 1, "prompt_tokens": 0, "output_tokens": 1}', "at least 1"),
        ('{"at_seconds": -1, "prompt_tokens": 1, "output_tokens": 1}', "no time"),
        ('{"at_seconds": 1, "prompt_tokens": 1, "output_tokens": 1, "at": 2}', "unknown key 'at'"),
        (
            '{"at_seconds": 1, "prompt_tokens": 5, "output_tokens": 1, "prefix": "x", "prefix_tokens": 6}',
            "prefix_tokens",
        ),
        ('{"at_seconds": 0.1, "prompt_tokens": 5, "output_tokens": 1}', "goes back"),
        ('{"at_seconds": 1, "prompt_tokens": 1e400, "output_tokens": 1}', "infinity"),
        ('{"at_seconds": NaN, "prompt_tokens": 1, "output_tokens": 1}', "no time"),
        ('{"at_seconds": 1, "prompt_tokens": 99999999999, "output_tokens": 1}', "at most 10000000"),
    ],
)
def test_faults_of_a_trace_name_their_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"at_seconds": 0.5, "prompt_tokens": 9, "output_tokens": 3}\n' + line, encoding="utf-8")
    with pytest.raises(ScenarioError, match=r"t\.jsonl:2") as caught:
        read_trace(path)
    assert said in str(caught.value)


def test_an_empty_or_absent_trace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n", encoding="utf-8")
    for name, said in (("empty", "no row"), ("absent", "cannot be read")):
        with pytest.raises(ScenarioError, match=said):
            read_trace(tmp_path / name)
