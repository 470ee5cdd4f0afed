"""What a machine's GPUs hold, in the formats that other tools and this one read."""

from __future__ import annotations

from placement.exports.config import export_config
from placement.exports.kubernetes import NodeLabels, export_labels
from placement.exports.mig_parted import export_mig_parted, import_mig_parted
from placement.exports.systemd import export_systemd

__all__ = [
    "NodeLabels",
    "export_config",
    "export_labels",
    "export_mig_parted",
    "export_systemd",
    "import_mig_parted",
]
