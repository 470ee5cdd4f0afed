"""The replicas that demand asks for beyond what is configured: what they are called, and where they may not be. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count, islice

from model_registry.schema import ModelConfig
from placement.assign import Apart, Fits, Pools, Wanted, natural, stem, stem_of


def model_of(replica: str) -> str:
    """The model of a replica, also of a dedicated tenant's."""
    return stem_of(replica).partition("@")[0]


def more_replicas(
    models: Iterable[ModelConfig],
    pools: Pools,
    wanted: Sequence[Wanted],
    demanded: Mapping[str, int],
    current: Mapping[str, str],
) -> tuple[Wanted, ...]:
    """The replicas beyond `wanted` that demand asks for, within the models' bounds: those that run, then the lowest numbers
    that are free.
    """
    more: list[Wanted] = []
    seats = {w.replica for w in wanted}
    for model in sorted(models, key=lambda m: m.name):
        for tenant in pools.get(model.name, (None,)):
            pool = stem(model.name, tenant)
            taken = sum(stem_of(replica) == pool for replica in seats)
            asked, most = demanded.get(pool, 0), model.most_replicas
            number = asked if most is None else min(asked, most)
            run = sorted((r for r in current if stem_of(r) == pool and r not in seats), key=natural)
            free = (f"{pool}-{n}" for n in count() if f"{pool}-{n}" not in seats and f"{pool}-{n}" not in run)
            more += [
                Wanted(name, model.name, int(name.rpartition("-")[2]), profiles=model.accepted_profiles)
                for name in islice(chain(run, free), max(0, number - taken))
            ]
    return tuple(more)


def fits_apart(fits: Fits, seated: Mapping[str, str], apart: Mapping[str, Apart]) -> Fits:
    """`fits` without the slices that share what those who are `seated` (slice ids by replica) must not share."""
    held = {(model_of(r), apart[model_of(r)].group_of.get(s)) for r, s in seated.items() if model_of(r) in apart}
    return {
        (model, there): replace(fit, fits=False, reason=f"a replica of {model!r} is too near ({apart[model].setting})")
        if model in apart and (model, apart[model].group_of.get(there, there)) in held
        else fit
        for (model, there), fit in fits.items()
    }
