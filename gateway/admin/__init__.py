"""What operators change while the gateway serves: keys, tenants and replicas, each change in the audit log."""

from gateway.admin.operations import Operations, TenantView
from gateway.admin.overlay import Overlay, OverlayStore, applied

__all__ = ["Operations", "Overlay", "OverlayStore", "TenantView", "applied"]
