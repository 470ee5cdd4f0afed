"""Tenants' budgets: what is reserved when a request comes, settled when its usage is known, and refunded when it never ran.

A request is charged at the moment it is admitted, with the most it can use; when it ends, what it did not use comes back into the
same slot of the window. So a limit holds at every moment, whatever runs, and nothing is lost by refusals, errors and clients that leave.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import msgspec

from gateway.admission.schema import RateLimits, TenantLimits
from gateway.admission.windows import Level, Window
from gateway.errors import RateLimited

Kind = Literal["requests_per_minute", "tokens_per_minute", "tokens_per_day", "max_concurrent"]
KINDS: tuple[Kind, ...] = ("max_concurrent", "requests_per_minute", "tokens_per_minute", "tokens_per_day")

DAY_SLOTS = 144  # of ten minutes
OTHERS_SECONDS = 1.0  # when to come back for what other processes hold
NO_RETRY_SECONDS = 120.0  # clients do not wait longer than this by themselves

_PHRASES: Mapping[Kind, str] = {
    "requests_per_minute": "requests per minute",
    "tokens_per_minute": "tokens per minute",
    "tokens_per_day": "tokens per day",
    "max_concurrent": "concurrent requests",
}


class Need(msgspec.Struct, frozen=True):
    """What a request may use, in tokens of prompt and answer together. `bound` is the most, `likely` an estimate of it."""

    bound: int
    likely: int


class Subject(NamedTuple):
    """Whose limit it is; `model` is None for the one over all models."""

    tenant: str
    model: str | None = None

    def __str__(self) -> str:
        return f"tenant {self.tenant!r}" + (f" on model {self.model!r}" if self.model else "")


class Gauge:
    """One limit of one subject.

    `full` is the limit as configured; `window.limit` is what this process may use of it, which is less where other processes
    hold the rest. `since` is when it last began to refuse, None while it does not.
    """

    __slots__ = ("full", "kind", "per_token", "refused", "refused_at", "since", "spare", "subject", "wanted", "window")

    def __init__(self, subject: Subject, kind: Kind, full: int) -> None:
        self.subject = subject
        self.kind: Kind = kind
        self.full = full
        self.per_token = kind.startswith("tokens")
        self.window: Window | Level = _window(kind, full)
        self.refused = 0
        self.refused_at = 0.0
        self.since: float | None = None
        self.spare = 0  # what other processes or the store had left over when the store was last asked
        self.wanted = 0  # refused or put off since the store was last asked, for lack of a share

    @property
    def name(self) -> str:
        """What the limit is called where it is kept for several processes."""
        return f"{self.subject.tenant}\n{self.subject.model or ''}\n{self.kind}"

    def amount(self, need: Need) -> int:
        """What a request of this `need` takes of a limit on tokens; more than `full` if it can never be admitted.

        A bound above the limit is no reason to refuse a request that most likely fits: it takes all that is left, so that it runs alone.
        `window.used` has to be up to date.
        """
        if need.bound <= self.full:
            return need.bound
        return max(need.likely, self.window.limit - self.window.used) if need.likely <= self.full else need.likely

    def refusal(self, amount: int, now: float) -> RateLimited:
        """Why `amount` is not to be had, and when it will be."""
        never = amount > self.full
        wait = math.inf if never else max(self.window.wait_seconds(amount, now), 0.001)
        if wait == math.inf and not never:
            wait = OTHERS_SECONDS
        since = 0.0 if self.since is None else now - self.since
        what = _PHRASES[self.kind]
        said = f"Rate limit reached for {self.subject} on {what}: limit {self.full}, used {self.window.used}, requested {amount}"
        if not never:
            remedy = f"It has been exhausted for {since:.1f} s. Please try again in {duration(wait)}."
        else:
            remedy = f"It can never be admitted: ask for fewer than {self.full} tokens (prompt and `max_tokens`)."
        return RateLimited(
            f"{said}.",
            limit=self.kind,
            kind="tokens" if self.per_token else "requests",
            retry_after_seconds=wait if math.isfinite(wait) else None,
            should_retry=wait <= NO_RETRY_SECONDS,
            since_seconds=since,
            remedy=remedy,
        )


def _window(kind: Kind, limit: int) -> Window | Level:
    if kind == "max_concurrent":
        return Level(limit)
    return Window(limit, 86400.0, DAY_SLOTS) if kind == "tokens_per_day" else Window(limit, 60.0)


class Reservation:
    """What one request holds of its tenant's limits. Ended by `settle` or `refund`, once; later calls do nothing."""

    __slots__ = ("_taken",)

    def __init__(self, taken: list[tuple[Gauge, int, int]]) -> None:
        self._taken = taken

    @property
    def tokens(self) -> int | None:
        """The most tokens that it allows; None if no limit counts tokens."""
        return min((amount for gauge, amount, _ in self._taken if gauge.per_token), default=None)

    def settle(self, tokens: int, now: float) -> None:
        """The request is over and has used `tokens`; it counts as a request."""
        taken, self._taken = self._taken, []
        for gauge, amount, slot in taken:
            if gauge.per_token:
                gauge.window.give(amount - tokens, slot, now)
            elif gauge.kind == "max_concurrent":
                gauge.window.give(amount, slot, now)

    def refund(self, now: float) -> None:
        """The request never ran: as if it had not come."""
        taken, self._taken = self._taken, []
        for gauge, amount, slot in taken:
            gauge.window.give(amount, slot, now)


class Limits:
    """Every limit of every tenant. A tenant without limits costs a look-up."""

    def __init__(self, configured: Mapping[str, TenantLimits] | None = None) -> None:
        self._gauges: dict[tuple[Subject, Kind], Gauge] = {}
        self._by_request: dict[tuple[str, str], tuple[Gauge, ...]] = {}
        self._of: dict[Subject, tuple[Gauge, ...]] = {}
        self.refused: Counter[tuple[str, str, str]] = Counter()  # by (tenant, model, kind)
        self.fresh_share: Callable[[int], int] = lambda full: full  # what a new limit may use before the store is asked
        self.configure(configured or {})

    def configure(self, configured: Mapping[str, TenantLimits]) -> None:
        """Take these limits, by tenant. What was used under a limit stays used when its height changes."""
        before, self._gauges = self._gauges, {}
        for subject, limits in _subjects(configured):
            for kind in KINDS:
                full = getattr(limits, kind)
                if full is not None:
                    gauge = before.get((subject, kind)) or Gauge(subject, kind, full)
                    fresh = (subject, kind) not in before
                    gauge.window.limit = (
                        self.fresh_share(full) if fresh else min(gauge.window.limit * full // gauge.full, full)
                    )
                    gauge.full = full
                    self._gauges[subject, kind] = gauge
        self._by_request.clear()
        self._of = {}
        for gauge in self._gauges.values():
            self._of[gauge.subject] = (*self._of.get(gauge.subject, ()), gauge)

    def __iter__(self) -> Iterator[Gauge]:
        return iter(self._gauges.values())

    def of(self, tenant: str, model: str) -> tuple[Gauge, ...]:
        """The limits that a request of `tenant` to `model` has to keep."""
        gauges = self._by_request.get((tenant, model))
        if gauges is None:
            gauges = self._of.get(Subject(tenant), ()) + self._of.get(Subject(tenant, model), ())
            self._by_request[tenant, model] = gauges
        return gauges

    def reserve(self, gauges: Iterable[Gauge], need: Need, now: float) -> Reservation:
        """Take what a request needs of all `gauges`, or nothing. Raises RateLimited, which names the first that has not enough."""
        taken = []
        for gauge in gauges:
            window = gauge.window
            slot = window.advance(now)
            amount = gauge.amount(need) if gauge.per_token else 1
            if window.used + amount > window.limit:
                raise self._refuse(gauge, amount, now)
            taken.append((gauge, amount, slot))
        for gauge, amount, slot in taken:
            gauge.window.count(amount, slot)
            gauge.since = None
        return Reservation(taken)

    def _refuse(self, gauge: Gauge, amount: int, now: float) -> RateLimited:
        if gauge.since is None:
            gauge.since = now
        gauge.refused_at = now
        refusal = gauge.refusal(amount, now)
        if gauge.window.limit < gauge.full and amount <= gauge.full:
            gauge.wanted = max(gauge.wanted, amount)
            refusal.gauge = gauge
        return refusal

    def count_refusal(self, tenant: str, model: str, kind: str) -> None:
        """A client was told that this limit is exhausted."""
        self.refused[tenant, model, kind] += 1
        for subject in (Subject(tenant), Subject(tenant, model)):
            gauge = next((gauge for gauge in self._of.get(subject, ()) if gauge.kind == kind), None)
            if gauge is not None:
                gauge.refused += 1


def _subjects(configured: Mapping[str, TenantLimits]) -> Iterator[tuple[Subject, RateLimits]]:
    for tenant, limits in configured.items():
        yield Subject(tenant), limits
        for model, of_model in limits.models.items():
            yield Subject(tenant, model), of_model


@dataclass(frozen=True, slots=True)
class Standing:
    """How much of one limit is left: units, and seconds until all of it is back."""

    limit: int
    remaining: int
    reset_seconds: float

    @classmethod
    def of(cls, gauge: Gauge, now: float) -> Standing:
        """At this moment; what other processes have not used is as of the store's last answer."""
        gauge.window.advance(now)
        remaining = max(0, gauge.window.limit - gauge.window.used + gauge.spare)
        return cls(gauge.full, remaining, gauge.window.reset_seconds(now))


_HEADERS = tuple(
    (b"x-ratelimit-limit-" + unit, b"x-ratelimit-remaining-" + unit, b"x-ratelimit-reset-" + unit)
    for unit in (b"requests", b"tokens")
)


def rate_limit_headers(gauges: Iterable[Gauge], now: float) -> list[tuple[bytes, bytes]]:
    """OpenAI's `x-ratelimit-*` headers for the tightest limit on requests and the tightest on tokens."""
    tightest: list[tuple[int, Gauge] | None] = [None, None]  # by `per_token`
    for gauge in gauges:
        if gauge.kind == "max_concurrent":
            continue
        window = gauge.window
        window.advance(now)
        remaining = window.limit - window.used + gauge.spare
        known = tightest[gauge.per_token]
        if known is None or remaining < known[0]:
            tightest[gauge.per_token] = remaining, gauge
    headers: list[tuple[bytes, bytes]] = []
    for (limit, left, reset), found in zip(_HEADERS, tightest, strict=True):
        if found is not None:
            remaining, gauge = found
            headers += (
                (limit, b"%d" % gauge.full),
                (left, b"%d" % (remaining if remaining > 0 else 0)),
                (reset, _in_tenths(math.ceil(gauge.window.reset_seconds(now) * 10))),
            )
    return headers


@lru_cache(maxsize=4096)
def _in_tenths(tenths: int) -> bytes:
    """A span as `duration` writes it. A window's slots are seconds long, so that a finer figure would say nothing."""
    return duration(tenths / 10).encode()


def duration(seconds: float) -> str:
    """As OpenAI writes spans of time: `0s`, `12ms`, `6.5s`, `1m0s`, `23h59m59s`."""
    if seconds <= 0:
        return "0s"
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < 60:
        return f"{math.ceil(seconds * 1000) / 1000:g}s"
    whole = math.ceil(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}h{minutes}m{whole % 60}s" if hours else f"{minutes}m{whole % 60}s"
