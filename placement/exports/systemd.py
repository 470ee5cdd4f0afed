"""A systemd unit that brings the layouts of a configuration back at boot: MIG instances never outlive a reboot.

On Hopper and later the mode does not either (it lasts while the driver is loaded), so the unit may switch it. It comes
before everything that opens GPUs, since an open GPU keeps its mode, and after the persistence daemon and the fabric
manager, as NVIDIA's own MIG manager does (mig-parted deployments/systemd/nvidia-mig-manager.service).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_AFTER = ("systemd-modules-load.service", "nvidia-persistenced.service", "nvidia-fabricmanager.service")
_BEFORE = (
    "nvidia-dcgm.service",
    "dcgm-exporter.service",
    "nvsm.service",
    "docker.service",
    "containerd.service",
    "kubelet.service",
    "slurmd.service",
    "display-manager.service",
)


def export_systemd(command: Sequence[str], config: Path) -> str:
    """The unit's text. `command` starts sliceway: its console script, or an interpreter with arguments."""
    words = [*command, "apply", str(config), "--layouts-only", "--allow-mode-change"]
    return f"""\
# /etc/systemd/system/sliceway-layouts.service
# systemctl daemon-reload && systemctl enable sliceway-layouts.service

[Unit]
Description=MIG layouts of {_escaped(str(config))} (sliceway)
After={" ".join(_AFTER)}
Before={" ".join(_BEFORE)}
Conflicts=nvidia-mig-manager.service
RequiresMountsFor={_quoted(str(config))}
AssertPathExists={_escaped(str(config))}

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={" ".join(_quoted(w).replace("$", "$$") for w in words)}
TimeoutStartSec=480

[Install]
WantedBy=multi-user.target
"""


def _escaped(text: str) -> str:
    """`%` starts a specifier in every value of a unit (systemd.unit(5))."""
    return text.replace("%", "%%")


def _quoted(word: str) -> str:
    """One word of a list (systemd.syntax(7))."""
    escaped = _escaped(word).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"' if not word or any(c in word for c in " \t'\"\\;") else escaped
