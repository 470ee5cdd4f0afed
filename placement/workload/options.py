"""One model against every place it could run in: where it fits, what it serves there within its latencies, and why not elsewhere.

Pure. Memory is decided by sizing (or by what an engine measured on a slice of that size), speed by the roofline estimate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Literal

from model_registry.model import EngineLimits, ModelSpec, SliceFit
from model_registry.schema import ModelConfig
from model_registry.sizing.calibration import CalibrationKey, calibrated
from model_registry.sizing.fit import fit
from model_registry.sizing.footprint import Sized, size_model
from model_registry.sizing.report import fp8_compute
from model_registry.sizing.speed import Demand, SpeedEstimate, best_batch, fastest
from model_registry.words import counted
from placement.planner.types import WHOLE_GPU, Option
from placement.workload.cards import Card, Place
from placement.workload.measured import Judged, Measured, Where

_SIZE_PENALTY = 0.4
"""Of a whole card; below 1, so that nothing that runs is moved for it."""
_MODE_CHANGE_PENALTY = 0.45
"""A whole card takes MIG off, which empties it: only where nothing else is as good."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model as it is to be placed: its configuration, what its files say, and the engine's limits."""

    config: ModelConfig
    spec: ModelSpec
    limits: EngineLimits
    sized: Sized = field(repr=False)

    @classmethod
    def of(cls, config: ModelConfig, spec: ModelSpec, limits: EngineLimits) -> Subject:
        """Weigh it. Raises ModelUnreadable and ConfigError as `size_model` does."""
        return cls(config, spec, limits, size_model(spec, limits))

    def limited(self, limits: EngineLimits) -> Subject:
        """The same model with an engine under other limits."""
        return replace(self, limits=limits, sized=size_model(self.spec, limits))

    @property
    def demand(self) -> Demand | None:
        """What it is to serve, and how fast; None where replicas are counted."""
        return demand_of(self.config)


def demand_of(config: ModelConfig) -> Demand | None:
    """What a model is to serve, and how fast; None where replicas are counted."""
    asked, slo = config.demand, config.slo
    if asked is None:
        return None
    plain = Demand(asked.requests_per_second, asked.prompt_tokens, asked.output_tokens)
    if slo is None:
        return plain
    return replace(plain, ttft_slo_seconds=slo.ttft, itl_slo_seconds=slo.itl, slo_attainment=slo.attainment)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One place for one model. `option` is None where it is out, and `reason` says why, or what it gets there.

    `measured` is whether what it serves there was measured instead of estimated. `breaks` is what is in the way: the place is not among those that are `accepted`, `memory` or `speed` is too small, or
    the card is `unknown` in one of the two; `mode` where only MIG off would offer it.
    """

    place: Place
    reason: str
    option: Option | None = None
    fit: SliceFit | None = field(default=None, repr=False)
    speed: SpeedEstimate | None = field(default=None, repr=False)
    breaks: Literal["accepted", "memory", "speed", "unknown", "mode"] | None = None
    measured: bool = False

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape."""
        return {
            "product": self.place.product,
            "profile": self.place.profile,
            "feasible": self.option is not None,
            "capacity_requests_per_second": self.option.capacity if self.option and self.speed else None,
            "capacity_source": ("measured" if self.measured else "estimated") if self.option and self.speed else None,
            "ttft_seconds": self.speed.ttft_seconds if self.option and self.speed else None,
            "itl_seconds": self.speed.itl_seconds if self.option and self.speed else None,
            "reason": self.reason,
        }


def candidates(subject: Subject, cards: Iterable[Card], measured: Measured | None = None) -> tuple[Candidate, ...]:
    """Every place of `cards`, feasible or not, in the cards' order and from small profiles to whole cards.

    A whole card is an option only where it is asked for (`profiles: [gpu]`), cannot be cut, or holds what its largest
    profile does not.
    """
    found: list[Candidate] = []
    for card in cards:
        here = [
            _candidate(subject, card, place, measured or Measured())
            for place in card.places(subject.config.accepted_profiles)
        ]
        cut = any(c.option and c.place.mig for c in here)
        found += [_cut_rather(c) if cut and _whole_unasked(subject, c) else c for c in here]
    return tuple(found)


def trusted(config: ModelConfig, cards: Iterable[Card]) -> tuple[Candidate, ...]:
    """A model that cannot be sized, in every place it accepts: `engine.command` runs an engine that knows for itself."""
    found: list[Candidate] = []
    for place in (place for card in cards for place in card.places(config.accepted_profiles)):
        if config.accepted_profiles and not _is_accepted(place, config.accepted_profiles):
            only = " and ".join(config.accepted_profiles)
            found.append(Candidate(place, f"the model accepts {only} only", breaks="accepted"))
        elif config.demand:
            reason = (
                "its files cannot be read, so nobody knows what one replica serves; name `replicas` instead of a demand"
            )
            found.append(Candidate(place, reason, breaks="unknown"))
        else:
            found.append(Candidate(place, "not sized: engine.command runs another engine", _option(place, 1.0)))
    return tuple(found)


def whole_card(subject: Subject, card: Card, measured: Measured | None = None) -> Candidate:
    """The model with the card to itself, whatever profiles it accepts: what slices are compared with."""
    place = card.places()[-1]
    free = replace(subject, config=subject.config.model_copy(update={"profile": None, "profiles": ()}))
    return _candidate(free, card, place, measured or Measured())


def _whole_unasked(subject: Subject, candidate: Candidate) -> bool:
    return candidate.place.profile == WHOLE_GPU and WHOLE_GPU not in subject.config.accepted_profiles


def _cut_rather(candidate: Candidate) -> Candidate:
    if candidate.option is None:
        return candidate
    return replace(candidate, option=None, reason="a slice of this card does as well, and MIG stays on", breaks="mode")


def _candidate(subject: Subject, card: Card, place: Place, measured: Measured) -> Candidate:
    accepted = subject.config.accepted_profiles
    if accepted and not _is_accepted(place, accepted):
        return Candidate(place, f"the model accepts {' and '.join(accepted)} only", breaks="accepted")
    if place.memory_bytes is None:
        return Candidate(place, "nobody has published its memory; the driver of such a card tells it", breaks="unknown")
    found = fitted(subject, place, measured)
    if not found.fits:
        return Candidate(place, found.reason, fit=found, breaks="memory")
    if subject.demand is None:
        return Candidate(place, found.reason, _option(place, 1.0), found)
    told = measured.judged(str(subject.config.source), Where.of(place), subject.demand)
    return _at_speed(subject, card, place, found, subject.demand, told)


def _is_accepted(place: Place, accepted: tuple[str, ...]) -> bool:
    names = (place.profile, *(place.info.alternate_names if place.info else ()))
    return any(name in accepted for name in names)


def fitted(subject: Subject, place: Place, measured: Measured) -> SliceFit:
    """The fit by sizing, or by what an engine with these flags measured in a place of that memory."""
    memory = place.memory_bytes or 0
    footprint = subject.sized.footprint
    names = [str(subject.config.source), subject.spec.source]
    if subject.config.revision:
        names.insert(0, f"{subject.config.source}@{subject.config.revision}")
    for name in names:
        record = measured.memory.get(CalibrationKey.of(name, memory, subject.limits))
        if record is not None:
            footprint = calibrated(footprint, record)
            break
    profile = place.profile if place.mig else None
    return fit(subject.spec, footprint, subject.limits, memory_bytes=memory, product=place.product, profile=profile)


def _at_speed(subject: Subject, card: Card, place: Place, found: SliceFit, demand: Demand, told: Judged) -> Candidate:
    """`told` is what was measured in such a place; the roofline is asked without."""
    rate = told.requests_per_second
    asked = demand.prompt_tokens + demand.output_tokens
    if asked > subject.limits.max_model_len:
        reason = f"requests have {asked:,} tokens, max_model_len is {subject.limits.max_model_len:,}"
        return Candidate(place, reason, fit=found, breaks="memory")
    roof = card.roof(place, fp8=fp8_compute(subject.limits, subject.spec))
    speed = best_batch(subject.sized, subject.limits, found, roof, demand) if roof else None
    if rate is not None:
        return _enough(
            subject.config,
            Candidate(place, f"{rate:.2f} requests/s (measured)", fit=found, speed=speed, measured=True),
            rate,
        )
    if roof is None:
        reason = (
            f"it fits, but nobody has published how fast a {place.product} is; name `replicas` instead of a demand, "
            "or measure it with `sliceway bench capacity`"
        )
        return Candidate(place, reason, fit=found, breaks="unknown")
    if speed is None:
        best = fastest(subject.sized, subject.limits, roof, demand)
        return Candidate(place, _too_slow(best, demand), fit=found, speed=best, breaks="speed")
    reason = _gets(speed) + "".join(
        f"; not counted: {why}" for why in told.ignored if f"not on {Where.of(place)}" not in why
    )
    return _enough(subject.config, Candidate(place, reason, fit=found, speed=speed), speed.requests_per_second)


def _enough(config: ModelConfig, candidate: Candidate, rate: float) -> Candidate:
    """The candidate as an option, if a fixed number of replicas with `rate` each bears the demand."""
    fixed = config.replicas if isinstance(config.replicas, int) else None
    share = config.demand.requests_per_second / fixed if fixed and config.demand else 0.0
    if fixed and share > rate:
        reason = f"{counted(fixed, 'replica')} would have to serve {share:.2f} requests per second each, and one serves {rate:.2f}"
        return replace(candidate, reason=reason, breaks="speed")
    return replace(candidate, option=_option(candidate.place, rate))


def _option(place: Place, capacity: float) -> Option:
    """At equal price the smaller slice: what is left of the card may serve somebody else later."""
    return Option(
        place.product, place.profile, capacity, _SIZE_PENALTY * place.share if place.mig else _MODE_CHANGE_PENALTY
    )


def _gets(speed: SpeedEstimate) -> str:
    latency = f"TTFT {speed.ttft_seconds * 1e3:.0f} ms"
    if speed.itl_seconds:
        latency += f", ITL {speed.itl_seconds * 1e3:.1f} ms"
    return f"{speed.requests_per_second:.2f} requests/s with {speed.batch} at once, {latency} (estimate)"


def _too_slow(best: SpeedEstimate, demand: Demand) -> str:
    """Which latency cannot be kept even by one sequence at a time."""
    parts = []
    itl, ttft = demand.itl_slo_seconds, demand.ttft_slo_seconds
    if itl is not None and best.itl_seconds > itl:
        parts.append(f"ITL {best.itl_seconds * 1e3:.1f} ms at best, {itl * 1e3:g} ms allowed")
    if ttft is not None and best.queued_ttft_seconds > ttft:
        parts.append(
            f"TTFT {best.ttft_seconds * 1e3:.0f} ms on an idle replica, {best.queued_ttft_seconds * 1e3:.0f} ms with "
            f"others before it, {ttft * 1e3:g} ms allowed"
        )
    return f"too slow: {'; '.join(parts) or 'prefills of other requests leave too little time to decode in'} (estimate)"


def needed(rate: float, capacity: float) -> int:
    """Replicas of `capacity` that serve `rate`."""
    return max(1, ceil(rate / capacity - 1e-9))
