"""A fleet as Kubernetes manifests, in three flavours."""

from __future__ import annotations

from gateway.export.kubernetes.documents import FLAVOURS, Flavour, documents, steps
from gateway.export.kubernetes.objects import Manifest, Settings
from gateway.export.kubernetes.text import yaml_stream

__all__ = ["FLAVOURS", "Flavour", "Manifest", "Settings", "documents", "steps", "yaml_stream"]
