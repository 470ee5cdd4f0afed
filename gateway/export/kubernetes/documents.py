"""All objects of a flavour, in the order in which they are applied, and what is left for people to do. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, get_args

from gateway.export.kubernetes.devices import claim_templates
from gateway.export.kubernetes.engines import engine_objects, files_map
from gateway.export.kubernetes.front import config_map, gateway_objects
from gateway.export.kubernetes.kuberay import kuberay_objects
from gateway.export.kubernetes.mig import MIG_MAP, NODE_LABEL, mig_config_map
from gateway.export.kubernetes.network import policies
from gateway.export.kubernetes.objects import (
    HUB_SECRET,
    MODELS_CLAIM,
    SECRET_FILES,
    SECRET_VARIABLES,
    STATE_CLAIM,
    TLS_SECRET,
    Manifest,
    Settings,
    claim,
    manifest,
)
from gateway.export.model import Exported, GatewayUnit
from model_registry.words import counted

Flavour = Literal["deployments", "dra", "kuberay"]
FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
_STATE_GIB = 20
_LEAST_MODELS_GIB = 20
_GIB = 2**30


def documents(export: Exported, settings: Settings, flavour: Flavour) -> Mapping[str, list[Manifest]]:
    """The objects by the file that they belong into, the files in the order of their application."""
    files = {
        "00-namespace": [_namespace(settings)],
        "10-mig-layouts": [mig_config_map(export, settings)],
        "20-storage": _storage(export, settings, flavour),
    }
    if flavour == "kuberay":
        return files | {"30-cluster": [*files_map(export, settings), *kuberay_objects(export, settings)]}
    claims = claim_templates(export, settings) if flavour == "dra" else []
    engines = engine_objects(export, settings, claims=flavour == "dra")
    return files | {
        "30-engines": [*claims, *files_map(export, settings), *engines],
        "40-gateway": [config_map(export.gateway, settings), *gateway_objects(export.gateway, settings)],
        "50-network": policies(export.gateway, settings),
    }


def steps(export: Exported, settings: Settings, flavour: Flavour) -> Iterator[str]:
    """What manifests cannot do, one command or instruction a line."""
    yield f"MIG manager: helm upgrade gpu-operator ... --set mig.strategy=mixed --set migManager.config.name={MIG_MAP}"
    for layout in export.nodes:
        yield f"{counted(layout.count, 'node')} with {len(layout.gpus)} x {layout.product.name}: kubectl label node NODE {NODE_LABEL}={layout.name} --overwrite"
    unit = export.cluster if flavour == "kuberay" else export.gateway
    yield from _secrets(export, unit, settings)
    for name, path in export.directories.items():
        yield f"copy {path} to /models/{name} on the volume {MODELS_CLAIM}"
    pod = (
        "$(kubectl get pod -o name -l ray.io/node-type=head -n {0})"
        if flavour == "kuberay"
        else "deploy/sliceway-gateway"
    )
    where = pod.format(settings.namespace)
    yield f"keys: kubectl -n {settings.namespace} exec {where} -- sliceway keys create TENANT /etc/sliceway/sliceway.yaml"


def _secrets(export: Exported, unit: GatewayUnit, settings: Settings) -> Iterator[str]:
    create = f"kubectl -n {settings.namespace} create secret"
    engine = {name for e in export.engines for name in e.secret_environment if name != "HF_TOKEN"}
    if variables := sorted({*unit.secret_variables, *engine}):
        given = " ".join(f"--from-literal={name}=..." for name in variables)
        yield f"{create} generic {SECRET_VARIABLES} {given}"
    if unit.secret_files:
        yield f"{create} generic {SECRET_FILES} {' '.join(f'--from-file={name}=...' for name in unit.secret_files)}"
    if unit.tls:
        yield f"{create} tls {TLS_SECRET} --cert=... --key=..."
    yield f"only for models that the hub gives to some: {create} generic {HUB_SECRET} --from-literal=HF_TOKEN=..."


def _namespace(settings: Settings) -> Manifest:
    """Its pods need no privilege, and the namespace allows none."""
    found = manifest("v1", "Namespace", settings.namespace, namespace=None, component="namespace")
    found["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] = "restricted"
    return found


def _storage(export: Exported, settings: Settings, flavour: Flavour) -> list[Manifest]:
    """Models for every engine, with half as much again for what the hub's client keeps; keys, files and limits for gateways."""
    models = max(_LEAST_MODELS_GIB, -(-export.weights_bytes * 3 // (2 * _GIB)))
    shared = flavour != "kuberay" and settings.gateways > 1
    return [
        claim(MODELS_CLAIM, models, settings, shared=True),
        claim(STATE_CLAIM, _STATE_GIB, settings, shared=shared),
    ]
