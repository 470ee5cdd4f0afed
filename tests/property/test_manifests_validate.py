"""Every configuration that is shipped as an example becomes manifests that Kubernetes' published schemas allow, in every flavour."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from gateway.config import load_config
from gateway.export.cluster import nodes_of
from gateway.export.kubernetes import FLAVOURS, Flavour, Manifest, Settings, documents, yaml_stream
from gateway.export.model import Exported
from gateway.export.planned import exported

EXAMPLES = sorted((Path(__file__).parents[2] / "configs" / "examples").glob("*.yaml"))
KUBERNETES = "1.37"
SETTINGS = Settings("sliceway", "sliceway-gateway:0.1.0", "sliceway-engine:0.1.0", storage_class="shared")


@cache
def of_example(path: Path) -> Exported:
    config = load_config(path)
    return exported(config, nodes_of(config, ()))


def as_read(path: Path, flavour: Flavour) -> list[Manifest]:
    """What a YAML parser of version 1.1, as Kubernetes has, makes of the text."""
    everything = [d for of_file in documents(of_example(path), SETTINGS, flavour).values() for d in of_file]
    read = list(yaml.safe_load_all(yaml_stream(everything, ["a note"])))
    assert read == everything
    return read


def shape(value: Any) -> Any:
    """What of a document the schemas look at: keys and types. Of a list each different shape once, of text that it is some."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in sorted(value.items())}
    if isinstance(value, list):
        return sorted({json.dumps(shape(inner)) for inner in value})
    return type(value).__name__


VALID: set[str] = set()


def validate(document: Manifest) -> None:
    """Raises ValidationError. A tenth of a second a document, so that one document of a shape stands for all of that shape."""
    key = json.dumps([document["apiVersion"], document["kind"], shape(document)])
    if key not in VALID:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        VALID.add(key)


def checkable(document: Manifest) -> Iterator[Manifest]:
    """The document, or where its kind is not Kubernetes' own the pods in it."""
    if document["kind"] != "RayService":
        yield document
        return
    cluster = document["spec"]["rayClusterConfig"]
    for template in (cluster["headGroupSpec"]["template"], *(g["template"] for g in cluster["workerGroupSpecs"])):
        yield {"apiVersion": "v1", "kind": "Pod", **template}


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_every_manifest_is_what_the_schemas_allow(path: Path, flavour: Flavour) -> None:
    found = as_read(path, flavour)
    for document in found:
        for one in checkable(document):
            validate(one)
    keys = [(d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]) for d in found]
    assert len(keys) == len(set(keys))
    for name in (name for _, _, name in keys):
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name)
        assert len(name) <= 63


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_the_slices_that_are_asked_for_are_those_that_the_layouts_make(path: Path) -> None:
    export = of_example(path)
    offered: dict[object, int] = {}
    for layout in export.nodes:
        for kind, number in layout.slices.items():
            offered[kind] = offered.get(kind, 0) + number * layout.count
    for engine in export.engines:
        offered[engine.slice_type] -= 1
    assert min(offered.values(), default=0) >= 0


def test_the_validator_refuses_what_is_wrong() -> None:
    deployment: dict[str, Any] = next(d for d in as_read(EXAMPLES[0], "deployments") if d["kind"] == "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["arguments"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(deployment)
