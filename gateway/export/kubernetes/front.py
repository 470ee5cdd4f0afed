"""The gateway: its configuration, Deployment, Service and disruption budget. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from gateway.export.gateway_config import PRE_STOP_SECONDS
from gateway.export.kubernetes.objects import (
    CONFIG_MAP,
    GATEWAY,
    SECRET_FILES,
    STATE_CLAIM,
    TLS_SECRET,
    Manifest,
    Settings,
    container_security,
    environment,
    labels,
    manifest,
    pod_base,
)
from gateway.export.kubernetes.text import yaml_text
from gateway.export.model import (
    CONFIG_DIRECTORY,
    CONFIG_FILE,
    SECRETS_DIRECTORY,
    STATE_MOUNT,
    TLS_DIRECTORY,
    GatewayUnit,
)

COMPONENT = "gateway"


def config_map(unit: GatewayUnit, settings: Settings) -> Manifest:
    """The configuration."""
    return manifest(
        "v1",
        "ConfigMap",
        CONFIG_MAP,
        namespace=settings.namespace,
        component=COMPONENT,
        data={CONFIG_FILE: yaml_text(unit.config)},
    )


def gateway_objects(unit: GatewayUnit, settings: Settings) -> list[Manifest]:
    """Deployment, Service and PodDisruptionBudget of the gateways."""
    selector = {"matchLabels": labels(COMPONENT)}
    # On a volume of one node a second pod could not start before the first has ended.
    strategy: Manifest = (
        {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
        if settings.gateways > 1
        else {"type": "Recreate"}
    )
    # Another configuration is another template, so that applying it rolls the gateways, one after the other drained.
    metadata = {"labels": labels(COMPONENT), "annotations": {"sliceway/config": _digest(unit)}}
    spec = {
        "replicas": settings.gateways,
        "strategy": strategy,
        "selector": selector,
        "template": {"metadata": metadata, "spec": _pod(unit, settings)},
    }
    deployment = manifest(
        "apps/v1", "Deployment", GATEWAY, namespace=settings.namespace, component=COMPONENT, spec=spec
    )
    budget = manifest(
        "policy/v1",
        "PodDisruptionBudget",
        GATEWAY,
        namespace=settings.namespace,
        component=COMPONENT,
        spec={"maxUnavailable": 1, "selector": selector},
    )
    return [deployment, service(unit, settings, labels(COMPONENT)), budget]


def service(unit: GatewayUnit, settings: Settings, selector: Mapping[str, str]) -> Manifest:
    """The one address for clients."""
    port = {"name": "https" if unit.tls else "http", "port": 443 if unit.tls else 80, "targetPort": "public"}
    return manifest(
        "v1",
        "Service",
        GATEWAY,
        namespace=settings.namespace,
        component=COMPONENT,
        spec={"selector": dict(selector), "ports": [port]},
    )


def gateway_volumes(unit: GatewayUnit) -> tuple[list[Manifest], list[Manifest]]:
    """The configuration and the secrets that it names, and where they are mounted."""
    volumes: list[Manifest] = [{"name": "config", "configMap": {"name": CONFIG_MAP}}]
    mounts: list[Manifest] = [{"name": "config", "mountPath": CONFIG_DIRECTORY, "readOnly": True}]
    if unit.secret_files:
        volumes.append({"name": "secrets", "secret": {"secretName": SECRET_FILES, "defaultMode": 0o440}})
        mounts.append({"name": "secrets", "mountPath": SECRETS_DIRECTORY, "readOnly": True})
    if unit.tls:
        volumes.append({"name": "tls", "secret": {"secretName": TLS_SECRET, "defaultMode": 0o440}})
        mounts.append({"name": "tls", "mountPath": TLS_DIRECTORY, "readOnly": True})
    return volumes, mounts


def gateway_probes(unit: GatewayUnit) -> Manifest:
    """`/healthz` says that the process lives, `/readyz` that it can serve: 503 before any replica answers, and while it drains."""
    scheme = {"scheme": "HTTPS"} if unit.tls else {}
    live = {"httpGet": {"path": "/healthz", "port": "public", **scheme}, "timeoutSeconds": 5}
    ready = {"httpGet": {"path": "/readyz", "port": "public", **scheme}, "timeoutSeconds": 5}
    return {
        "startupProbe": live | {"periodSeconds": 2, "failureThreshold": 30},
        "readinessProbe": ready | {"periodSeconds": 2, "failureThreshold": 1},
        "livenessProbe": live | {"periodSeconds": 10, "failureThreshold": 3},
    }


def _digest(unit: GatewayUnit) -> str:
    return hashlib.sha256(yaml_text(unit.config).encode()).hexdigest()[:16]


def _pod(unit: GatewayUnit, settings: Settings) -> Manifest:
    volumes, mounts = gateway_volumes(unit)
    volumes += [
        {"name": "state", "persistentVolumeClaim": {"claimName": STATE_CLAIM}},
        {"name": "tmp", "emptyDir": {}},
    ]
    mounts += [{"name": "state", "mountPath": STATE_MOUNT}, {"name": "tmp", "mountPath": "/tmp"}]
    container = {
        "name": "gateway",
        "image": settings.gateway_image,
        "imagePullPolicy": "IfNotPresent",
        "args": ["gateway", f"{CONFIG_DIRECTORY}/{CONFIG_FILE}"],
        "env": environment({"HOME": "/tmp"}, unit.secret_variables),
        "ports": [{"name": "public", "containerPort": unit.port}],
        "resources": {"requests": {"cpu": "1", "memory": "512Mi"}, "limits": {"memory": "2Gi"}},
        # New requests are sent elsewhere before the gateway begins to refuse them.
        "lifecycle": {"preStop": {"sleep": {"seconds": PRE_STOP_SECONDS}}},
        "securityContext": container_security(read_only=True),
        "volumeMounts": mounts,
        **gateway_probes(unit),
    }
    apart = {"labelSelector": {"matchLabels": labels(COMPONENT)}, "topologyKey": "kubernetes.io/hostname"}
    return pod_base() | {
        "terminationGracePeriodSeconds": unit.grace_seconds,
        "affinity": {
            "podAntiAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": apart}]
            }
        },
        "containers": [container],
        "volumes": volumes,
    }
