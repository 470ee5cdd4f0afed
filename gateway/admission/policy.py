"""Admission's part of the configuration. Pure."""

from __future__ import annotations

from gateway.admission.admission import AdmissionPolicy
from gateway.config import Config


def admission_policy(config: Config) -> AdmissionPolicy:
    """Limits, dedicated tenants and the queue, as the configuration has them."""
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
    )
