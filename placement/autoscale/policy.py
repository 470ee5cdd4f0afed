"""How many replicas a model should have: from what its gateway sees, between its bounds, without flapping. Pure.

Demand becomes two numbers at every look: how many replicas would be too few to live with, and how many would be more than
enough. Between them nothing happens (hysteresis). Replicas come when the least of the first, over `scale_up_after`, is
above what there is, and go when the greatest of the second, over `scale_down_after`, is below: one quiet moment in a busy
time, or one burst in a quiet one, moves nothing. After a change the model rests for `cool_down`. Only waking does not
wait, since somebody does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from model_registry.sizing.speed import PLANNED_BUSY_RATIO
from placement.policy import AutoscalePolicy

_CLOSE = 1e-9


@dataclass(frozen=True, slots=True)
class ScaledModel:
    """One demand's bounds, and what one replica bears. `name` is the model's, or `model@tenant` for a dedicated tenant's part.

    `capacity_per_second` is what the planner counts a replica with (requests per second within its latencies, measured or
    estimated); None where nobody knows. `max_num_seqs` are the requests that run in it at once.
    """

    name: str
    least: int
    most: int
    capacity_per_second: float | None = None
    max_num_seqs: int = 16
    ttft_slo_seconds: float | None = None
    itl_slo_seconds: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most:
            raise ValueError(f"{self.name!r}: between {self.least} and {self.most} replicas")
        if self.capacity_per_second is not None and self.capacity_per_second <= 0:
            raise ValueError(f"{self.name!r}: a capacity of {self.capacity_per_second}")

    def bounded(self, replicas: int) -> int:
        """`replicas` within the bounds."""
        return max(self.least, min(self.most, replicas))


@dataclass(frozen=True, slots=True)
class Signals:
    """What the gateway saw of one model: rates and latencies over the policy's window, the rest at this moment.

    `ttft_seconds` and `itl_seconds` are the 95th percentiles; None where nothing was answered.
    `idle_seconds` is the time since the last request came or ended.
    """

    arrivals_per_second: float = 0.0
    queued: int = 0
    running: int = 0
    ttft_seconds: float | None = None
    itl_seconds: float | None = None
    idle_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Look:
    """One look at a model: at which time, the fewest replicas that will do, and the number beyond which they are too many."""

    at_seconds: float
    too_few_below: int
    enough_at: int


@dataclass(frozen=True, slots=True)
class Scaled:
    """What was decided last, and what that depended on. `changed_seconds` is when the number last changed."""

    replicas: int
    reason: str = "as configured"
    changed_seconds: float | None = None
    looks: tuple[Look, ...] = ()


def decide(policy: AutoscalePolicy, model: ScaledModel, signals: Signals, last: Scaled, now_seconds: float) -> Scaled:
    """The number of replicas from now on, and why; `replicas` is that of `last` where nothing changes.

    `now_seconds` is monotonic. Time that runs backwards starts over.
    """
    look = _look(policy, model, signals, last.replicas, now_seconds)
    looks = _kept(policy, last.looks, look)
    here = replace(last, looks=looks)
    bounded = model.bounded(last.replicas)
    if bounded != last.replicas:
        return _changed(here, bounded, now_seconds, f"between {model.least} and {model.most} replicas are allowed")
    if last.replicas == 0:
        return _woken(here, model, signals, look, now_seconds)
    if last.changed_seconds is not None and now_seconds - last.changed_seconds < policy.cool_down:
        return replace(here, reason="it was changed a moment ago")
    return _steady(policy, model, signals, here, now_seconds)


def _woken(here: Scaled, model: ScaledModel, signals: Signals, look: Look, now_seconds: float) -> Scaled:
    if not (signals.queued or signals.running or signals.arrivals_per_second > 0) or model.most == 0:
        return replace(here, reason="asleep until a request comes")
    wanted = model.bounded(max(1, look.too_few_below))
    return _changed(here, wanted, now_seconds, "a request wakes it")


def _steady(policy: AutoscalePolicy, model: ScaledModel, signals: Signals, here: Scaled, now_seconds: float) -> Scaled:
    up = _over(here.looks, policy.scale_up_after, now_seconds)
    if up and (least := min(look.too_few_below for look in up)) > here.replicas:
        return _changed(here, least, now_seconds, _why_up(model, signals, policy.scale_up_after))
    down = _over(here.looks, policy.scale_down_after, now_seconds)
    if down and (enough := max(look.enough_at for look in down)) < here.replicas:
        asleep = enough == 0
        reason = (
            "no request came for a while" if asleep else f"{enough} would do for {policy.scale_down_after:g} s already"
        )
        return _changed(here, enough, now_seconds, reason)
    return replace(here, reason="enough, and not too many")


def _look(policy: AutoscalePolicy, model: ScaledModel, signals: Signals, replicas: int, now_seconds: float) -> Look:
    need = needed_replicas(policy, model, signals)
    few = ceil(need / (1 + policy.tolerance) - _CLOSE)
    enough = ceil(need / (1 - policy.tolerance) - _CLOSE)
    if _too_slow(model, signals):
        # Nothing is taken from a model whose answers are late: it would only be missed, and come again.
        enough = max(enough, replicas)
        if need > replicas / 2:
            # The estimate of a replica's capacity is too kind: what runs is late, and not for want of work to do.
            few, enough = max(few, replicas + 1), max(enough, replicas + 1)
    if model.least == 0:
        busy = signals.queued > 0 or signals.running > 0 or signals.arrivals_per_second > 0
        awake = busy or signals.idle_seconds < policy.sleep_after
        enough = max(enough, 1 if awake else 0)
    return Look(now_seconds, model.bounded(few), model.bounded(enough))


def needed_replicas(policy: AutoscalePolicy, model: ScaledModel, signals: Signals) -> float:
    """Replicas that would be used to `target_busy`, by arrivals or by what is there at once, whichever asks for more.

    A queue counts as arrivals that have to be made up for within the window.
    """
    at_once = (signals.running + signals.queued) / (model.max_num_seqs * policy.target_busy)
    if model.capacity_per_second is None:
        return at_once
    rate = signals.arrivals_per_second + signals.queued / policy.window
    by_rate = rate * PLANNED_BUSY_RATIO / (model.capacity_per_second * policy.target_busy)
    return max(by_rate, at_once)


def _too_slow(model: ScaledModel, signals: Signals) -> bool:
    measured = ((signals.ttft_seconds, model.ttft_slo_seconds), (signals.itl_seconds, model.itl_slo_seconds))
    return any(seen is not None and slo is not None and seen > slo for seen, slo in measured)


def _kept(policy: AutoscalePolicy, looks: tuple[Look, ...], look: Look) -> tuple[Look, ...]:
    """Looks that still count: one older than the longest time asked about is enough to know that it is covered."""
    if looks and look.at_seconds < looks[-1].at_seconds:
        return (look,)
    since = look.at_seconds - policy.scale_down_after
    old = sum(known.at_seconds <= since for known in looks)
    return (*looks[max(0, old - 1) :], look)


def _over(looks: tuple[Look, ...], seconds: float, now_seconds: float) -> tuple[Look, ...]:
    """The looks of the last `seconds`; none where they do not reach back so far."""
    since = now_seconds - seconds
    if not looks or looks[0].at_seconds > since:
        return ()
    inside = [look for look in looks if look.at_seconds >= since]
    # The last look before holds until the next one.
    before = [look for look in looks if look.at_seconds < since][-1:]
    return (*before, *inside)


def _changed(here: Scaled, replicas: int, now_seconds: float, reason: str) -> Scaled:
    return replace(here, replicas=replicas, reason=reason, changed_seconds=now_seconds)


def _why_up(model: ScaledModel, signals: Signals, seconds: float) -> str:
    parts = [f"{signals.arrivals_per_second:.2f} requests/s arrive"] if signals.arrivals_per_second else []
    parts += [f"{signals.queued} wait"] if signals.queued else []
    parts += ["answers are later than the slo"] if _too_slow(model, signals) else []
    return f"{', '.join(parts) or f'{signals.running} run at once'}, for {seconds:g} s already"
