"""Who may connect to whom: clients to gateways, gateways to engines, and nobody else. Pure."""

from __future__ import annotations

from gateway.export.kubernetes import engines, front
from gateway.export.kubernetes.objects import Manifest, Settings, labels, network_policy
from gateway.export.model import ENGINE_PORT, GatewayUnit


def policies(unit: GatewayUnit, settings: Settings) -> list[Manifest]:
    """Incoming connections. What goes out stays open: engines fetch models from the hub, gateways ask an issuer's keys or Redis."""
    to_engines = {
        "from": [{"podSelector": {"matchLabels": labels(front.COMPONENT)}}],
        "ports": [{"protocol": "TCP", "port": ENGINE_PORT}],
    }
    to_gateways = {"ports": [{"protocol": "TCP", "port": unit.port}]}
    return [
        network_policy("sliceway-engines", engines.COMPONENT, [to_engines], settings),
        network_policy("sliceway-gateways", front.COMPONENT, [to_gateways], settings),
    ]
