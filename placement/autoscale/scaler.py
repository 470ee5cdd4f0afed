"""The numbers of replicas that autoscaling has decided on, model by model, and what each decision depended on.

`Scaler` remembers; `decide` decides. Time and figures are handed in. Numbers outlive the controller that decided on them:
they are read from and given as a plain mapping, so that a controller that starts anew stops nothing that is needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from model_registry.schema import ModelConfig, ReplicaRange
from model_registry.words import counted
from placement.assign import Pools, stem, stem_of
from placement.autoscale.policy import Scaled, ScaledModel, Signals, decide
from placement.policy import AutoscalePolicy


@dataclass(frozen=True, slots=True)
class Change:
    """One model gets another number of replicas."""

    model: str
    before: int
    after: int
    reason: str

    def __str__(self) -> str:
        return f"{self.model}: {self.before} -> {counted(self.after, 'replica')} ({self.reason})"


def scaled_models(
    models: Iterable[ModelConfig],
    seats: Collection[str] | None = None,
    pools: Pools | None = None,
    capacities: Mapping[str, float | None] | None = None,
) -> tuple[ScaledModel, ...]:
    """The models whose replicas follow demand: those that name a range with room in it, each of their `pools` by itself.

    `seats` are the replicas that a plan has made room for: a pool has no fewer than these. `capacities` is what one replica
    of each pool bears, in requests per second.
    """
    planned = Counter(stem_of(replica) for replica in seats or ())
    return tuple(
        ScaledModel(
            name=(pool := stem(model.name, tenant)),
            capacity_per_second=(capacities or {}).get(pool),
            least=min(model.replicas.max, max(model.replicas.min, planned[pool])),
            most=model.replicas.max,
            max_num_seqs=model.max_num_seqs,
            ttft_slo_seconds=model.slo.ttft if model.slo else None,
            itl_slo_seconds=model.slo.itl if model.slo else None,
        )
        for model in models
        if model.source and isinstance(model.replicas, ReplicaRange) and model.replicas.min < model.replicas.max
        for tenant in (pools or {}).get(model.name, (None,))
    )


class Scaler:
    """See the module. `known` are the numbers that a controller before this one had decided on."""

    def __init__(self, known: Mapping[str, int] | None = None) -> None:
        self._scaled: dict[str, Scaled] = {name: Scaled(number) for name, number in (known or {}).items()}

    def follow(self, models: Iterable[ScaledModel]) -> None:
        """These are the models now: new ones begin with their least, known ones stay within their bounds."""
        scaled: dict[str, Scaled] = {}
        for model in models:
            last = self._scaled.get(model.name)
            if last is None:
                last = Scaled(model.least)
            elif model.bounded(last.replicas) != last.replicas:
                last = Scaled(model.bounded(last.replicas), f"between {model.least} and {model.most} are allowed")
            scaled[model.name] = last
        self._scaled = scaled

    def begin(self, numbers: Mapping[str, int]) -> None:
        """Models that nothing was decided about yet have these numbers."""
        for name, number in numbers.items():
            self._scaled.setdefault(name, Scaled(number))

    def look(
        self,
        policy: AutoscalePolicy,
        models: Iterable[ScaledModel],
        signals: Mapping[str, Signals],
        now_seconds: float,
    ) -> tuple[Change, ...]:
        """Decide on every model that `signals` tell of, and say what changes. `now_seconds` is monotonic."""
        changes: list[Change] = []
        for model in models:
            seen, last = signals.get(model.name), self._scaled.get(model.name)
            if seen is None or last is None:
                continue
            scaled = self._scaled[model.name] = decide(policy, model, seen, last, now_seconds)
            if scaled.replicas != last.replicas:
                changes.append(Change(model.name, last.replicas, scaled.replicas, scaled.reason))
        return tuple(changes)

    @property
    def replicas(self) -> Mapping[str, int]:
        """The numbers decided on, by model."""
        return {name: scaled.replicas for name, scaled in self._scaled.items()}

    def reason(self, model: str) -> str:
        """Why the number is what it is."""
        scaled = self._scaled.get(model)
        return scaled.reason if scaled else "as configured"
