"""Who may connect to whom: clients to gateways, gateways to engines, and nobody else. Pure."""

from __future__ import annotations

from gateway.export.kubernetes import engines, front
from gateway.export.kubernetes.objects import Manifest, Settings, labels, manifest
from gateway.export.model import ENGINE_PORT, GatewayUnit


def policies(unit: GatewayUnit, settings: Settings) -> list[Manifest]:
    """Incoming connections. What goes out stays open: engines fetch models from the hub, gateways ask an issuer's keys or Redis."""
    to_engines = {
        "from": [{"podSelector": {"matchLabels": labels(front.COMPONENT)}}],
        "ports": [{"protocol": "TCP", "port": ENGINE_PORT}],
    }
    to_gateways = {"ports": [{"protocol": "TCP", "port": unit.port}]}
    return [
        _policy("sliceway-engines", engines.COMPONENT, to_engines, settings),
        _policy("sliceway-gateways", front.COMPONENT, to_gateways, settings),
    ]


def _policy(name: str, component: str, ingress: Manifest, settings: Settings) -> Manifest:
    return manifest(
        "networking.k8s.io/v1",
        "NetworkPolicy",
        name,
        namespace=settings.namespace,
        component=component,
        spec={
            "podSelector": {"matchLabels": labels(component)},
            "policyTypes": ["Ingress"],
            "ingress": [ingress],
        },
    )
