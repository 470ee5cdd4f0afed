"""How a pod asks for its slice: by the device plugin's resource, or by a claim on the DRA driver. Pure.

Sources: NVIDIA/k8s-device-plugin internal/rm (resource names under `mig.strategy=mixed`) and internal/lm/mig-strategy.go
(`nvidia.com/gpu.product` is the card's own product there, cut or not); NVIDIA/k8s-dra-driver-gpu
cmd/gpu-kubelet-plugin/deviceinfo.go (attributes `type`, `profile`, `productName`) and its Helm chart (device classes
`gpu.nvidia.com` and `mig.nvidia.com`).
"""

from __future__ import annotations

import json

from gateway.export.kubernetes.objects import Manifest, Settings, manifest
from gateway.export.model import Exported, SliceType
from gateway.export.names import dns_label
from model_registry.catalogue import Product
from placement.exports.kubernetes import label_value, resource_name

DRIVER = "gpu.nvidia.com"
MIG_CLASS = "mig.nvidia.com"
WHOLE_RESOURCE = "nvidia.com/gpu"
PRODUCT_LABEL = "nvidia.com/gpu.product"
_CLAIM = "slice"


def resource_of(slice_type: SliceType) -> str:
    """`nvidia.com/mig-3g.40gb`, `nvidia.com/mig-1g.10gb.me` for `1g.10gb+me`, or `nvidia.com/gpu` for a whole card."""
    return WHOLE_RESOURCE if slice_type.whole else resource_name(slice_type.profile)


def on_product(product: Product) -> Manifest:
    """Node affinity for the product, under every name that NVML has for it: profiles of one name differ between products."""
    names = [label_value(name) for name in product.nvml_names]
    term = {"matchExpressions": [{"key": PRODUCT_LABEL, "operator": "In", "values": names}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}}


def claim_template_name(slice_type: SliceType) -> str:
    """One claim template for each type of slice."""
    return dns_label(f"sliceway-{slice_type.product.lower()}-{slice_type.profile}")


def claim_templates(export: Exported, settings: Settings) -> list[Manifest]:
    """A ResourceClaimTemplate for each type of slice that a replica is on. The device classes come with NVIDIA's driver."""
    types = sorted({engine.slice_type for engine in export.engines})
    return [_claim_template(t, export.products[t.product], settings) for t in types]


def with_claim(pod: Manifest, slice_type: SliceType) -> None:
    """Have the pod's first container use a slice of this type through a claim of the pod's own."""
    pod["resourceClaims"] = [{"name": _CLAIM, "resourceClaimTemplateName": claim_template_name(slice_type)}]
    pod["containers"][0].setdefault("resources", {})["claims"] = [{"name": _CLAIM}]


def with_limit(pod: Manifest, slice_type: SliceType, product: Product) -> None:
    """Have the pod's first container use a slice of this type through the device plugin, on a node with the product."""
    pod["containers"][0].setdefault("resources", {}).setdefault("limits", {})[resource_of(slice_type)] = 1
    pod["affinity"] = pod.get("affinity", {}) | on_product(product)


def _claim_template(slice_type: SliceType, product: Product, settings: Settings) -> Manifest:
    request = {
        "name": _CLAIM,
        "exactly": {
            "deviceClassName": DRIVER if slice_type.whole else MIG_CLASS,
            "allocationMode": "ExactCount",
            "count": 1,
            "selectors": [{"cel": {"expression": _expression(slice_type, product)}}],
        },
    }
    return manifest(
        "resource.k8s.io/v1",
        "ResourceClaimTemplate",
        claim_template_name(slice_type),
        namespace=settings.namespace,
        component="engine",
        spec={"spec": {"devices": {"requests": [request]}}},
    )


def _expression(slice_type: SliceType, product: Product) -> str:
    attributes = f'device.attributes["{DRIVER}"]'
    names = json.dumps(list(product.nvml_names))
    terms = [f"{attributes}.productName in {names}"]
    if not slice_type.whole:
        terms.append(f"{attributes}.profile == {json.dumps(slice_type.profile)}")
    return " && ".join(terms)
