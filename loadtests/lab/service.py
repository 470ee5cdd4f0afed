"""What tenants got: goodput at their SLO, tokens per second, and how evenly it was shared. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from loadtests.samples import Sample
from loadtests.scenario import Slo


def is_good(sample: Sample, slo: Slo) -> bool:
    """Whether an answer met every limit of `slo`. A failed one meets none; a limit on what it does not have is met."""
    if sample.failure is not None:
        return False
    took = {
        "ttft": sample.ttft_seconds,
        "tpot": sample.tpot_seconds,
        "itl": max(sample.itl_seconds, default=None),
        "e2e": sample.e2e_seconds,
    }
    return all((value := took[name]) is None or value <= limit for name, limit in slo.limits.items())


def attainment(samples: Sequence[Sample], slo: Slo) -> float | None:
    """The share of requests that met `slo`; None where there was none."""
    return sum(is_good(s, slo) for s in samples) / len(samples) if samples else None


def kept(samples: Sequence[Sample], slo: Slo, seconds: float) -> dict[str, Any]:
    """How far `slo` was kept over so many seconds, in the JSON shape of reports."""
    share = attainment(samples, slo)
    return {
        "promised": str(slo),
        "attainment": share,
        "goodput_per_second": goodput_per_second(samples, slo, seconds),
        "met": None if share is None else share >= slo.attainment,
    }


def goodput_per_second(samples: Iterable[Sample], slo: Slo, seconds: float) -> float:
    """Requests per second that met `slo` (DistServe, OSDI 2024, 2.2; the same as `vllm bench serve --goodput`)."""
    return sum(is_good(s, slo) for s in samples) / seconds


def tokens_per_second(samples: Iterable[Sample], seconds: float) -> float:
    """Output tokens per second of the answers that count."""
    return sum(s.output_tokens for s in samples if s.failure is None) / seconds


def jain_index(shares: Iterable[float]) -> float | None:
    """Jain's fairness index, (sum x)^2 / (n sum x^2): 1 where all got the same, 1/n where one got everything.

    None where nobody got anything. Source: Jain, Chiu, Hawe, DEC-TR-301 (1984).
    """
    values = list(shares)
    squares = sum(x * x for x in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else None
