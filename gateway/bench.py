"""Who is measured against whom: from a configuration and what runs, the plan that the load tests carry out. Pure.

The plan is plain data in the shape that `python -m loadtests isolation -` reads; the load tests import nothing of ours, and
nothing here imports them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gateway.config import Config, TenantConfig
from model_registry.errors import ConfigError, SlicewayError

FLOOD_USERS = 8


class BenchError(SlicewayError):
    """A measurement could not be made."""

    code = "bench_failed"


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

    def load(self, *, key: str | None, users: int, prompt_words: int, output_tokens: int) -> dict[str, Any]:
        """This party's part of the plan: `users` of them, each waiting for its answer before it asks again."""
        return {
            "name": self.tenant,
            "model": self.model.name,
            "api_key": key,
            "task": "embedding" if self.model.task == "embed" else "chat",
            "prompt_words": prompt_words,
            "output_tokens": output_tokens,
            "arrival": {"kind": "closed", "users": users},
        }


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


def plan(
    cast: Cast,
    *,
    base_url: str,
    keys: Mapping[str, str | None],
    duration_seconds: float,
    warmup_seconds: float,
    rounds: int,
    users: int,
    prompt_words: int,
    output_tokens: int,
    seed: int,
) -> dict[str, Any]:
    """The whole plan, as data for the load tests. The victim is one user; the neighbour is `users` of them.

    Raises BenchError where there is no neighbour to speak of.
    """
    if cast.neighbour is None and cast.contrast is None:
        raise BenchError(
            "no tenant can disturb another here",
            remedy=" ".join(cast.notes) or "Add a second tenant and a second model.",
        )

    def load(party: Party | None, count: int) -> dict[str, Any] | None:
        if party is None:
            return None
        return party.load(
            key=keys.get(party.tenant), users=count, prompt_words=prompt_words, output_tokens=output_tokens
        )

    return {
        "base": {
            "base_url": base_url,
            "duration_seconds": duration_seconds,
            "warmup_seconds": warmup_seconds,
            "seed": seed,
            "tenants": [load(cast.victim, 1)],
        },
        "neighbour": load(cast.neighbour, users),
        "contrast": load(cast.contrast, users),
        "rounds": rounds,
    }


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
