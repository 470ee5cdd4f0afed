"""The host around a change of MIG mode: who holds a GPU's device file, and the reset that some GPUs need."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

from placement.errors import PartitionError
from placement.gpus import GpuProcess, GpuState

# comm is cut to 15 characters (proc(5)).
_DAEMONS = {
    "nv-hostengine": "DCGM",
    "dcgm-exporter": "DCGM exporter",
    "dcgm": "DCGM",
    "nvidia-persiste": "persistence daemon",
    "nvsm_core": "NVSM",
    "nv-fabricmanage": "fabric manager",
    "Xorg": "display server",
    "Xwayland": "display server",
    "gnome-shell": "display server",
    "gdm-x-session": "display server",
    "nvidia-mig-mana": "MIG manager",
}


def holders(gpu: GpuState, proc: Path = Path("/proc")) -> tuple[GpuProcess, ...]:
    """Processes that have the GPU's device file open, by pid, daemons named for what they are.

    Other users' processes are seen by root only. Empty for a simulated GPU, which has no device file.
    """
    if gpu.minor is None or gpu.simulated:
        return ()
    device = f"/dev/nvidia{gpu.minor}"
    found = (_holder(directory, device) for directory in _processes(proc))
    return tuple(sorted((p for p in found if p is not None), key=lambda p: p.pid))


def reset(gpu: GpuState, program: str = "nvidia-smi", timeout_seconds: float = 120.0) -> None:
    """Reset the GPU. NVML has no call for it; nvidia-smi refuses while anything holds the GPU.

    Raises PartitionError with nvidia-smi's own words.
    """
    command = [program, "--gpu-reset", "-i", gpu.uuid]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=timeout_seconds, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PartitionError(f"the GPU could not be reset: {error}", where=gpu.label, remedy=_by_hand(gpu)) from error
    if done.returncode:
        words = " ".join((done.stdout + done.stderr).split())
        raise PartitionError(f"the GPU could not be reset: {words}", where=gpu.label, remedy=_by_hand(gpu))


def _by_hand(gpu: GpuState) -> str:
    return (
        f"Stop whatever holds the GPU and run nvidia-smi --gpu-reset -i {gpu.index}, or reboot; then apply again. "
        "GPUs joined by NVLink are reset together (without -i)."
    )


def _processes(proc: Path) -> Iterator[Path]:
    return (d for d in proc.iterdir() if d.name.isdigit())


def _holder(directory: Path, device: str) -> GpuProcess | None:
    try:
        if not any(_leads_to(link, device) for link in (directory / "fd").iterdir()):
            return None
        name = (directory / "comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # it has ended, or is someone else's
        return None
    kind = _DAEMONS.get(name)
    return GpuProcess(int(directory.name), f"{name} [{kind}]" if kind else name, how="open")


def _leads_to(link: Path, device: str) -> bool:
    try:
        return str(link.readlink()) == device
    except OSError:
        return False
