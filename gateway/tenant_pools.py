"""Who has replicas of their own, of the models whose number of replicas follows demand. Pure."""

from __future__ import annotations

from gateway.config import Config
from model_registry.schema import ReplicaRange
from placement.assign import Pools


def tenant_pools(config: Config) -> Pools:
    """By model: dedicated tenants that may use it, and None for all others together. Models without one are left out."""
    apart: dict[str, tuple[str | None, ...]] = {}
    dedicated = [t for t in config.tenants if t.isolation == "dedicated"]
    for model in config.models:
        mine = sorted(t.name for t in dedicated if t.may_use(model.name))
        if mine and isinstance(model.replicas, ReplicaRange):
            shared = any(t.may_use(model.name) for t in config.tenants if t.isolation != "dedicated")
            apart[model.name] = (*([None] if shared else []), *mine)
    return apart
