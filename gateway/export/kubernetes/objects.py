"""What every manifest shares: names, labels, and the parts of pods that are the same everywhere. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Manifest = dict[str, Any]
"""One object as the API server takes it."""

PART_OF = "sliceway"
USER = 10001
"""The user that both images run as; see docker/."""

CONFIG_MAP = "sliceway-config"
FILES_MAP = "sliceway-files"
STATE_CLAIM = "sliceway-state"
MODELS_CLAIM = "sliceway-models"
SECRET_VARIABLES = "sliceway-env"
SECRET_FILES = "sliceway-secret-files"
TLS_SECRET = "sliceway-tls"
HUB_SECRET = "sliceway-hub"
GATEWAY = "sliceway-gateway"


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator chooses beside the configuration. `storage_class` None takes the cluster's default."""

    namespace: str
    gateway_image: str
    engine_image: str
    gateways: int = 2
    storage_class: str | None = None
    operator_namespace: str = "gpu-operator"
    engine_cpus: int = 2
    engine_memory: str = "8Gi"


def manifest(api: str, kind: str, name: str, *, namespace: str | None, component: str, **content: Any) -> Manifest:
    """An object with the labels that everything of ours has; `namespace` None for what lies in none."""
    metadata: Manifest = {"name": name, "labels": labels(component)}
    if namespace is not None:
        metadata["namespace"] = namespace
    return {"apiVersion": api, "kind": kind, "metadata": metadata, **content}


def network_policy(name: str, component: str, ingress: list[Manifest], settings: Settings) -> Manifest:
    """Who may open connections to the pods of `component`; what they open themselves is free."""
    return manifest(
        "networking.k8s.io/v1",
        "NetworkPolicy",
        name,
        namespace=settings.namespace,
        component=component,
        spec={
            "podSelector": {"matchLabels": labels(component)},
            "policyTypes": ["Ingress"],
            "ingress": ingress,
        },
    )


def labels(component: str, **more: str) -> dict[str, str]:
    """`app.kubernetes.io/part-of` and `component`, and `sliceway/...` for the rest."""
    own = {f"sliceway/{name}": value for name, value in more.items()}
    return {"app.kubernetes.io/part-of": PART_OF, "app.kubernetes.io/component": component} | own


def pod_security() -> Manifest:
    """As the `restricted` Pod Security Standard asks."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security(*, read_only: bool) -> Manifest:
    """No privilege to gain; `read_only` closes the image's file system."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": read_only,
    }


def pod_base() -> Manifest:
    """No token of the API server, and no variables named after Services: one called `VLLM_PORT` would change an engine."""
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security(),
    }


def environment(values: Mapping[str, str], secrets: Sequence[str] = ()) -> list[Manifest]:
    """Variables with their values, and those that come from the Secret `sliceway-env`."""
    plain = [{"name": name, "value": literal(value)} for name, value in values.items()]
    return plain + [_from_secret(name, SECRET_VARIABLES) for name in secrets]


def hub_token() -> Manifest:
    """`HF_TOKEN`, for models that the hub gives to some only; the Secret may be missing."""
    return _from_secret("HF_TOKEN", HUB_SECRET, optional=True)


def literal(text: str) -> str:
    """`text` as it is: the kubelet would replace `$(NAME)` in arguments and values."""
    return text.replace("$(", "$$(")


def claim(name: str, gibibytes: int, settings: Settings, *, shared: bool) -> Manifest:
    """A volume claim; `shared` between pods on several nodes."""
    spec: Manifest = {
        "accessModes": ["ReadWriteMany" if shared else "ReadWriteOnce"],
        "resources": {"requests": {"storage": f"{gibibytes}Gi"}},
    }
    if settings.storage_class is not None:
        spec["storageClassName"] = settings.storage_class
    return manifest("v1", "PersistentVolumeClaim", name, namespace=settings.namespace, component="storage", spec=spec)


def _from_secret(name: str, secret: str, *, optional: bool = False) -> Manifest:
    reference: Manifest = {"name": secret, "key": name}
    if optional:
        reference["optional"] = True
    return {"name": name, "valueFrom": {"secretKeyRef": reference}}
