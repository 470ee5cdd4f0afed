"""Who is measured against whom: from a configuration and what runs, the scenario that the load tests carry out. Pure.

A scenario is plain data in the shape that `python -m loadtests isolation -` reads; the load tests import nothing of ours,
and nothing here imports them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gateway.config import Config, TenantConfig
from model_registry.errors import ConfigError, SlicewayError
from placement.cores import format_cores
from placement.slices import Slice

FLOOD_USERS = 8
ON_HOST = ("cpu_hog", "weight_loading")
"""Aggressors that send no request."""


class BenchError(SlicewayError):
    """A measurement could not be made."""

    code = "bench_failed"


OPTIONS = {
    "aggressors": "--aggressor",
    "duration_seconds": "--duration",
    "warmup_seconds": "--warmup",
    "rounds": "--rounds",
    "seed": "--seed",
    "processes": "--processes",
    "victim": "--victim",
    "users": "--users",
    "prompt_words": "--prompt-words",
    "prompt_tokens": "--prompt-tokens",
    "output_tokens": "--output-tokens",
    "p99_ratio": "--p99-ratio",
    "p99_over_p50": "--p99-over-p50",
}
"""The options of `sliceway bench isolation CONFIG` that fields of the scenario are made from."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as it runs: what it is for, and the slices that its ready replicas are on."""

    name: str
    task: Literal["generate", "embed"]
    slices: frozenset[str]


@dataclass(frozen=True, slots=True)
class Party:
    """A tenant and the model that it sends its requests to."""

    tenant: str
    model: ServedModel

    def load(self, *, users: int, prompt_words: int, prompt_tokens: int | None, output_tokens: int) -> dict[str, Any]:
        """This party's part of a scenario: `users` of them, each waiting for its answer before it asks again."""
        return {
            "name": self.tenant,
            "model": self.model.name,
            "task": "embedding" if self.model.task == "embed" else "chat",
            "prompt_words": prompt_words,
            "prompt_tokens": prompt_tokens,
            "output_tokens": output_tokens,
            "arrival": {"kind": "closed", "users": users},
        }


def context(
    *,
    base_url: str,
    keys: Mapping[str, str | None],
    tenants: Sequence[str],
    slices: Sequence[Slice] = (),
    rows: Sequence[Mapping[str, Any]] = (),
    software: Mapping[str, str] | None = None,
    deployment: str | None = None,
    simulated: bool = False,
) -> dict[str, Any]:
    """What the load tests cannot find out by themselves, as data for them: keys, tenants, cores of slices, versions."""
    kinds = sorted({row["slice"]["kind"] for row in rows if row.get("model") and row["slice"].get("kind")})
    return {
        "base_url": base_url,
        "keys": dict(keys),
        "tenants": list(tenants) or None,
        "deployment": deployment,
        "simulated": simulated or any(one.simulated for one in slices),
        "slice_cores": {one.id: format_cores(one.cores) for one in slices if one.cores},
        "layout": {
            "kind": ", ".join(kinds),
            "models": {row["model"]: row["slice"]["id"] for row in rows if row.get("model")},
            "slices": [_described(one) for one in slices],
        },
        "software": dict(software or {}),
    }


def _described(one: Slice) -> str:
    parts = [one.id, one.kind.value, one.profile or "", f"cores {format_cores(one.cores)}" if one.cores else ""]
    return " ".join(filter(None, [*parts, one.gpu.product if one.gpu else "", f"({one.kind.isolation})"]))


@dataclass(frozen=True, slots=True)
class Cast:
    """The victim, and its neighbour on another slice and on the same one; None where there is no such thing."""

    victim: Party
    neighbour: Party | None
    contrast: Party | None
    notes: tuple[str, ...] = ()


def served_models(
    shown: Sequence[Mapping[str, Any]], tasks: Mapping[str, Literal["generate", "embed"]]
) -> tuple[ServedModel, ...]:
    """What runs, from the rows of `/slices`. Only ready replicas count; a model of unknown task is taken to generate."""
    slices: dict[str, set[str]] = {}
    for row in shown:
        if row.get("model") and row.get("state") == "ready":
            slices.setdefault(row["model"], set()).add(row["slice"]["id"])
    return tuple(ServedModel(name, tasks.get(name, "generate"), frozenset(ids)) for name, ids in slices.items())


def choose_cast(
    config: Config, served: Sequence[ServedModel], *, victim: str | None = None, neighbour: str | None = None
) -> Cast:
    """Pick victim and neighbour, each `TENANT` or `TENANT=MODEL`; the first two tenants of the configuration if unset.

    Left alone, the victim takes the first model that generates, and the neighbour one that shares no slice with it.
    Raises ConfigError for a tenant or model that is not there or not allowed, BenchError if nothing can be measured.
    """
    tenants = config.tenants or (TenantConfig(name="victim"), TenantConfig(name="neighbour"))
    first, first_model = _split(victim or tenants[0].name)
    second, second_model = _split(neighbour or _another(tenants, first))
    if first == second:
        raise ConfigError(
            f"{first!r} cannot be its own neighbour",
            where="tenants",
            remedy="Name two tenants, as in --victim acme --neighbour globex.",
        )
    its = _usable(_tenant(tenants, first), served)
    attacked = _named(its, first_model, first) if first_model else _preferred(its)
    others = _usable(_tenant(tenants, second), served)
    apart = [model for model in others if not model.slices & attacked.slices]
    if second_model:
        chosen = _named(others, second_model, second)
        elsewhere = chosen if chosen in apart else None
    else:
        elsewhere = _preferred(apart) if apart else None
    same = attacked if attacked in others else None
    return Cast(
        victim=Party(first, attacked),
        neighbour=Party(second, elsewhere) if elsewhere else None,
        contrast=Party(second, same) if same else None,
        notes=_notes(second, attacked, elsewhere, same),
    )


def scenario(
    cast: Cast,
    *,
    aggressors: Sequence[str],
    budget: Mapping[str, float],
    duration_seconds: float,
    warmup_seconds: float,
    rounds: int,
    users: int,
    prompt_words: int,
    prompt_tokens: int | None,
    output_tokens: int,
    processes: int,
    seed: int,
) -> dict[str, Any]:
    """The isolation scenario, as data for the load tests. The victim is one user; a flood is `users` of them.

    `aggressors` are kinds that the load tests know; with none the neighbour sends what the victim sends, only more of it.
    Raises BenchError where there is no neighbour to speak of, ConfigError for a kind that no tenant can be.
    """
    if without_tenant := next((kind for kind in aggressors if kind in ON_HOST), None):
        raise ConfigError(
            f"{without_tenant} works on the machine and has no tenant",
            where="--aggressor",
            remedy="Write a scenario with it, as configs/bench/aggressors.yaml is one: docs/isolation.md.",
        )
    beside = cast.neighbour or cast.contrast
    if beside is None:
        raise BenchError(
            "no tenant can disturb another here",
            remedy=" ".join(cast.notes) or "Add a second tenant and a second model.",
        )
    sizes: dict[str, Any] = {
        "prompt_words": prompt_words,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
    }
    flood: dict[str, Any] = {"kind": "flood", "name": "neighbour", "tenant": beside.tenant, "users": users}
    if cast.neighbour is not None and cast.neighbour.model.task == "embed":
        flood["task"] = "embedding"
    return {
        "kind": "isolation",
        "duration_seconds": duration_seconds,
        "warmup_seconds": warmup_seconds,
        "rounds": rounds,
        "seed": seed,
        "processes": processes,
        "victim": cast.victim.load(users=1, **sizes),
        "aggressors": [{"kind": kind, "tenant": beside.tenant} for kind in aggressors] or [flood],
        "settings": [
            {"where": where, "model": party.model.name}
            for where, party in (("other_slice", cast.neighbour), ("same_slice", cast.contrast))
            if party is not None
        ],
        "budget": dict(budget) or None,
    }


def tenant_for(config: Config, model: str, wanted: str | None) -> str:
    """Who sends requests to `model`: `wanted`, or the first tenant that may. Raises ConfigError where nobody may."""
    tenants = config.tenants or (TenantConfig(name="bench"),)
    if wanted is not None:
        tenants = (_tenant(tenants, wanted),)
    allowed = [tenant.name for tenant in tenants if tenant.models == "all" or model in tenant.models]
    if not allowed:
        raise ConfigError(
            f"no tenant may use {model!r}" if wanted is None else f"tenant {wanted!r} may not use {model!r}",
            where="tenants",
            remedy="Add the model to a tenant's `models`.",
        )
    return allowed[0]


def check_asked(config: Config, model: str | None, tenant: str | None) -> None:
    """Raises ConfigError for a model or a tenant that the configuration does not have, or that do not go together."""
    named = [one.name for one in config.models]
    if model is not None and model not in named:
        known = ", ".join(map(repr, named)) or "none"
        raise ConfigError(f"there is no model {model!r}", where="--model", remedy=f"There are {known}.")
    if model is not None:
        tenant_for(config, model, tenant)
    elif tenant is not None:
        _tenant(config.tenants or (TenantConfig(name="bench"),), tenant)


def _split(party: str) -> tuple[str, str | None]:
    tenant, _, model = party.partition("=")
    return tenant, model or None


def _another(tenants: Sequence[TenantConfig], taken: str) -> str:
    for tenant in tenants:
        if tenant.name != taken:
            return tenant.name
    raise ConfigError(
        f"{taken!r} is the only tenant; nobody can disturb it", where="tenants", remedy="Add a second tenant."
    )


def _tenant(tenants: Sequence[TenantConfig], name: str) -> TenantConfig:
    for tenant in tenants:
        if tenant.name == name:
            return tenant
    known = ", ".join(repr(tenant.name) for tenant in tenants)
    raise ConfigError(f"there is no tenant {name!r}", where="tenants", remedy=f"There are {known}.")


def _usable(tenant: TenantConfig, served: Sequence[ServedModel]) -> list[ServedModel]:
    allowed = [model for model in served if tenant.models == "all" or model.name in tenant.models]
    if not allowed:
        raise BenchError(
            f"no model that tenant {tenant.name!r} may use is ready",
            remedy="`sliceway status` shows what runs; wait until a replica is ready.",
        )
    return allowed


def _named(models: Sequence[ServedModel], name: str, tenant: str) -> ServedModel:
    for model in models:
        if model.name == name:
            return model
    known = ", ".join(repr(model.name) for model in models)
    raise ConfigError(f"tenant {tenant!r} cannot use a model {name!r}", where="models", remedy=f"It can use {known}.")


def _preferred(models: Sequence[ServedModel]) -> ServedModel:
    """The first that generates: only there are TTFT and ITL to see, and a flood of tokens."""
    return next((model for model in models if model.task == "generate"), models[0])


def _notes(
    second: str, attacked: ServedModel, elsewhere: ServedModel | None, same: ServedModel | None
) -> tuple[str, ...]:
    found = []
    if elsewhere is None:
        found.append(
            f"No model that {second!r} may use runs on a slice that {attacked.name!r} does not use; that setting is left out."
        )
    if same is None:
        found.append(
            f"Tenant {second!r} may not use {attacked.name!r}, so it cannot flood the same slice; that setting is left out."
        )
    return tuple(found)
