"""Does it hold? The budget against the measured figures and their intervals, and when to refuse an answer. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from loadtests.lab.report import Check, Client, Interval, Outcome, Row, Setting, Verdict
from loadtests.lab.scenario import APART, Budget, metric_seconds
from loadtests.samples import METRICS, percentile, samples_needed, show_percentile

DRIFT_RATIO = 1.15
"""How far the victim's median, alone, may differ between rounds: beyond, the machine was not the same one."""
LAG_SHARE = 0.1
LAG_FLOOR_SECONDS = 0.002
"""The client may wake up so late (p99), or by so much of the smallest figure that is judged, whichever is more."""
BUSY_CLIENT_RATIO = 0.9

Settings = Mapping[str, Setting]
Judgement = Literal["pass", "fail", "undecided", "refused"]


def judge(settings: Settings, budget: Budget | None, client: Client) -> Verdict:
    """The verdict over every setting that the budget is about, and beside it what each setting alone comes to.

    Refused where the client was overloaded, requests were left without an answer, the victim alone drifted, or there are too
    few samples for a percentile that the budget names; those are reasons not to believe the figures, whichever way they point.
    """
    if budget is None:
        return Verdict(status="none", sentence="Measured, with no budget to judge by.", refusals=[], checks=[])
    judged = {key: s for key, s in settings.items() if s.where in budget.settings}
    checks = [check for key, setting in judged.items() for check in _checks(key, setting, budget)]
    refusals = _refusals(settings, judged, budget, client)
    if not judged:
        refusals.append(f"no setting was measured that the budget is about ({', '.join(budget.settings)})")
    status = _status(checks, refusals)
    return Verdict(
        status=status,
        sentence=_sentence(status, checks, refusals),
        refusals=refusals,
        checks=checks,
        settings={k: _outcome(k, settings, budget, client) for k, s in settings.items() if k != s.baseline},
    )


def _outcome(key: str, settings: Settings, budget: Budget, client: Client) -> Outcome:
    """One setting by itself, by the rules of the verdict."""
    setting = settings[key]
    checks = list(_checks(key, setting, budget))
    refusals = _refusals(settings, {key: setting}, budget, client)
    status = _status(checks, refusals)
    decides = setting.where in budget.settings
    expected = not decides and setting.where not in APART
    return Outcome(
        status=status,
        decides=decides,
        sentence=_told_of_one(status, checks, refusals, expected=expected),
        refusals=refusals,
        checks=checks,
    )


def _refusals(settings: Settings, judged: Settings, budget: Budget, client: Client) -> list[str]:
    """Why the figures of `judged` are not to be believed, if they are not."""
    compared = dict(judged) | {s.baseline: settings[s.baseline] for s in judged.values()}
    return [
        *overloaded(compared, budget, client),
        *unanswered(settings, compared, client),
        *drifted(compared, budget),
        *_unseen(judged, budget),
        *_few(compared, budget),
    ]


def overloaded(settings: Settings, budget: Budget | None, client: Client) -> list[str]:
    """Why the client itself is in the figures, if it is."""
    found = []
    metrics = [metric_seconds(m) for m in budget.metrics] if budget else list(METRICS)
    medians = [p50 for s in _baselines(settings) for m in metrics if (p50 := getattr(s.victim, m).p50)]
    allowed = max(LAG_FLOOR_SECONDS, LAG_SHARE * min(medians, default=0.0))
    if client.lag_p99_seconds is not None and client.lag_p99_seconds > allowed:
        found.append(
            f"the client woke up to {_ms(client.lag_p99_seconds)} late (p99; {_ms(allowed)} would do): it was short of CPU, and latencies contain that"
        )
    if client.busy_ratio > BUSY_CLIENT_RATIO:
        found.append(
            f"a client process was busy {client.busy_ratio:.0%} of the time: it could not send as it was asked to; raise `processes`"
        )
    return found


def unanswered(settings: Settings, compared: Settings, client: Client) -> list[str]:
    """What was due in `compared` and is in no figure, as the slowest of all would be.

    What `client` counted and no setting did, as in reports whose settings do not tell, may have been anywhere.
    """
    nowhere = client.unfinished - sum(setting.unfinished or 0 for setting in settings.values())
    lost = nowhere + sum(setting.unfinished or 0 for setting in compared.values())
    return [f"requests still unanswered when the run was given up: {lost}; they are in no figure"] if lost else []


def drifted(settings: Settings, budget: Budget | None) -> list[str]:
    """Where the victim alone was not the same from round to round."""
    metrics = [metric_seconds(m) for m in budget.metrics] if budget else ["e2e_seconds"]
    found = []
    for setting in _baselines(settings):
        for metric in metrics:
            medians = sorted(p50 for p50 in setting.round_p50[metric] if p50)  # type: ignore[index]
            if len(medians) > 1 and medians[-1] > DRIFT_RATIO * medians[0]:
                found.append(
                    f"{setting.label}, the victim's median {_short(metric)} went from {_ms(medians[0])} to {_ms(medians[-1])} between rounds "
                    f"(middle: {_ms(percentile(medians, 0.5))}): something else used this machine; ratios closer to 1 than that mean nothing"
                )
    return found


def _unseen(judged: Settings, budget: Budget) -> list[str]:
    """Settings of which not one figure of the budget was measured, though requests were answered: they hold any limit."""
    if not budget.percentiles:
        return []
    return [
        f"of {', '.join(m.upper() for m in budget.metrics)} nothing was measured in {setting.label!r}: its answers have none"
        for setting in judged.values()
        if setting.victim.succeeded
        and not any(getattr(setting.victim, metric_seconds(m)).count for m in budget.metrics)
    ]


def _few(compared: Settings, budget: Budget) -> list[str]:
    for name in budget.percentiles:
        needed = samples_needed(name)
        counts = {
            key: getattr(s.victim, metric_seconds(m)).count for key, s in compared.items() for m in budget.metrics
        }
        thin = {key: count for key, count in counts.items() if 0 < count < needed}
        if thin:
            key = min(thin, key=lambda k: thin[k])
            return [
                f"{show_percentile(name)} takes {needed} samples, and {compared[key].label!r} has {thin[key]}: measure {needed / thin[key]:.1f} times as long"
            ]
    return []


def _checks(key: str, setting: Setting, budget: Budget) -> Iterator[Check]:
    for metric in map(metric_seconds, budget.metrics):
        row = getattr(setting.victim, metric)
        if row.count == 0:
            continue
        for name, limit in budget.ratios.items():
            measured = setting.ratio_to_alone[metric].get(name)  # type: ignore[index]
            interval = setting.ratio_confidence.get(metric, {}).get(name)  # type: ignore[call-overload]
            yield _check(key, metric, f"{show_percentile(name)} ratio", measured, interval, limit)
        if budget.p99_over_p50 is not None:
            measured = setting.p99_over_p50[metric]  # type: ignore[index]
            interval = setting.p99_over_p50_confidence.get(metric)  # type: ignore[call-overload]
            yield _check(key, metric, "p99 / p50", measured, interval, budget.p99_over_p50)
    failed = _failed_ratio(setting.victim)
    yield Check(
        setting=key,
        metric="requests",
        figure="failed ratio",
        measured=failed,
        interval=None,
        limit=budget.failed_ratio,
        outcome="pass" if failed is not None and failed <= budget.failed_ratio else "fail",
    )


def _check(
    key: str, metric: str, figure: str, measured: float | None, interval: Interval | None, limit: float
) -> Check:
    if measured is None:
        outcome = "undecided"
    elif measured > limit:
        outcome = "fail"
    else:
        outcome = "pass" if interval is not None and interval[1] <= limit else "undecided"
    return Check(
        setting=key,
        metric=_short(metric),
        figure=figure,
        measured=measured,
        interval=interval,
        limit=limit,
        outcome=outcome,
    )


def _status(checks: Sequence[Check], refusals: Sequence[str]) -> Judgement:
    outcomes = {check.outcome for check in checks}
    if refusals:
        return "refused"
    if "fail" in outcomes:
        return "fail"
    return "undecided" if "undecided" in outcomes else "pass"


def _sentence(status: Judgement, checks: Sequence[Check], refusals: Sequence[str]) -> str:
    match status:
        case "refused":
            return f"No certificate: {refusals[0]}."
        case "fail":
            worst = _worst(checks)
            return f"Not isolated: {worst.setting}: {_told(worst)}."
        case "undecided":
            open_one = _first_open(checks)
            return f"Not certain: {open_one.setting}: {_told(open_one)}; measure longer or more rounds."
        case "pass":
            return f"Isolated within the budget: {len(checks)} of {len(checks)} figures hold, with their intervals."


def _told_of_one(status: Judgement, checks: Sequence[Check], refusals: Sequence[str], *, expected: bool) -> str:
    match status:
        case "refused":
            return f"not judged: {refusals[0]}"
        case "fail":
            what = "not isolated, as expected" if expected else "not isolated"
            return f"fails the budget ({what}): {_told(_worst(checks))}"
        case "undecided":
            return f"not certain: {_told(_first_open(checks))}; measure longer or more rounds"
        case "pass":
            return f"holds the budget: {len(checks)} of {len(checks)} figures, with their intervals"


def _worst(checks: Sequence[Check]) -> Check:
    failed = [check for check in checks if check.outcome == "fail"]
    return max(failed, key=lambda c: (c.measured or 0) / c.limit if c.limit else 0.0)


def _first_open(checks: Sequence[Check]) -> Check:
    return next(check for check in checks if check.outcome == "undecided")


def _told(check: Check) -> str:
    shown = "was not measured" if check.measured is None else f"is {check.measured:.3g}"
    reach = f" (95%: {check.interval[0]:.3g} to {check.interval[1]:.3g})" if check.interval else ""
    return f"{check.metric} {check.figure} {shown}{reach}, allowed {check.limit:g}"


def _baselines(settings: Settings) -> list[Setting]:
    return [setting for key, setting in settings.items() if setting.baseline == key]


def _failed_ratio(row: Row) -> float | None:
    return sum(row.failures.values()) / row.requests if row.requests else None


def _short(metric: str) -> str:
    return metric.removesuffix("_seconds").upper()


def _ms(seconds: float) -> str:
    value = seconds * 1000
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"
