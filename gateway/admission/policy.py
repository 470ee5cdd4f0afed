"""Admission's part of the configuration. Pure."""

from __future__ import annotations

from gateway.admission.admission import AdmissionPolicy
from gateway.config import Config
from model_registry.schema import ReplicaRange


def admission_policy(config: Config) -> AdmissionPolicy:
    """Limits, dedicated tenants, the queue, and models that sleep, as the configuration has them."""
    dedicated = [tenant for tenant in config.tenants if tenant.isolation == "dedicated"]
    if config.gateway.authentication == "none":
        dedicated = []
    return AdmissionPolicy(
        limits={tenant.name: tenant.limits for tenant in config.tenants if tenant.limits is not None},
        dedicated={
            model.name: names
            for model in config.models
            if (names := tuple(tenant.name for tenant in dedicated if tenant.may_use(model.name)))
        },
        queue=config.gateway.queue,
        waking=frozenset(m.name for m in config.models if isinstance(m.replicas, ReplicaRange) and not m.replicas.min),
        named=frozenset(m.name for m in config.models if isinstance(m.replicas, ReplicaRange)),
        planned=config.planned,
    )
