"""What would let a model run where it cannot: shorter requests, a smaller cache, weights quantised at load, a later SLO.

Each is computed by sizing the model again, so what is told here would really be feasible. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from model_registry.errors import RegistryError
from model_registry.model import EngineLimits
from placement.planner.types import Alternative, Option
from placement.workload.cards import Card
from placement.workload.measured import Measured
from placement.workload.options import Candidate, Subject, candidates

_STEP_TOKENS = 256
_SLACK = 1.05
"""A later SLO is told with this much to spare, rounded up to a whole millisecond."""


def alternatives(
    subject: Subject, cards: Sequence[Card], found: Sequence[Candidate], measured: Measured | None = None
) -> tuple[Alternative, ...]:
    """Changes of the model's settings that open places which are closed in `found`, the smallest place per card and change.

    Of later SLOs a card gets the least late one that opens anything on it.
    """
    closed = {(c.place.product, c.place.profile) for c in found if c.option is None}

    def opened(altered: Subject) -> dict[str, Option]:
        smallest: dict[str, Option] = {}
        for candidate in candidates(altered, cards, measured):
            place = candidate.place
            if candidate.option is not None and (place.product, place.profile) in closed:
                # Candidates of a card come from small to large.
                smallest.setdefault(place.product, candidate.option)
        return smallest

    told = [Alternative(change, o) for change, altered in _changes(subject, found) for o in opened(altered).values()]
    late: set[str] = set()
    for change, altered in _slower(subject, found):
        fresh = {product: o for product, o in opened(altered).items() if product not in late}
        told += [Alternative(change, o) for o in fresh.values()]
        late |= set(fresh)
    return tuple(told)


def _changes(subject: Subject, found: Sequence[Candidate]) -> Iterable[tuple[str, Subject]]:
    limits = subject.limits
    settings: list[tuple[str, EngineLimits]] = []
    for tokens in sorted({t for c in found if (t := _shorter(subject, c))}, reverse=True):
        settings.append((f"max_model_len: {tokens}", replace(limits, max_model_len=tokens)))
    if limits.kv_cache_dtype == "auto":
        settings.append(("kv_cache_dtype: fp8", replace(limits, kv_cache_dtype="fp8")))
    if limits.quantization is None and subject.spec.quant_config is None:
        settings.append(("quantization: fp8", replace(limits, quantization="fp8")))
    for change, altered in settings:
        try:
            yield change, subject.limited(altered)
        except RegistryError:  # a model that has no such setting
            continue


def _shorter(subject: Subject, candidate: Candidate) -> int | None:
    """The longest context that the place has a cache for, where the cache alone is too small, in steps of 256 tokens."""
    found = candidate.fit
    if found is None or found.fits or found.breaking_term != "kv_cache":
        return None
    # What the estimate may be off by has to be left over as well.
    margin = subject.sized.footprint.margin_bytes
    per_token = subject.sized.footprint.kv_bytes_per_request / subject.limits.max_model_len
    spare = int(margin / per_token) if per_token else 0
    tokens = (found.longest_context_tokens - spare) // _STEP_TOKENS * _STEP_TOKENS
    demand = subject.demand
    least = demand.prompt_tokens + demand.output_tokens if demand else _STEP_TOKENS
    return tokens if least <= tokens < subject.limits.max_model_len else None


def _slower(subject: Subject, found: Sequence[Candidate]) -> list[tuple[str, Subject]]:
    """SLOs at which some place that is too slow would do, both latencies if both are missed; the least late first."""
    slo, demand = subject.config.slo, subject.demand
    if slo is None or demand is None:
        return []
    relaxed = {
        (_later(slo.itl, c.speed.itl_seconds), _later(slo.ttft, c.speed.queued_ttft_seconds))
        for c in found
        if c.option is None and c.speed is not None and c.breaks == "speed"
    }
    told = []
    for itl, ttft in sorted(relaxed - {(slo.itl, slo.ttft)}, key=lambda pair: (pair[0] or 0.0, pair[1] or 0.0)):
        changed = (("ttft", ttft, slo.ttft), ("itl", itl, slo.itl))
        parts = [f"{name}: {value * 1e3:.0f}ms" for name, value, was in changed if value and value != was]
        config = subject.config.model_copy(update={"slo": slo.model_copy(update={"ttft": ttft, "itl": itl})})
        told.append((f"slo: {{{', '.join(parts)}}}", replace(subject, config=config)))
    return told


def _later(limit: float | None, best: float) -> float | None:
    if limit is None or best <= limit:
        return limit
    return -(-best * _SLACK * 1e3 // 1) / 1e3
