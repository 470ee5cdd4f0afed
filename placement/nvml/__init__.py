"""NVIDIA GPUs through NVML. No module outside this package imports `pynvml`.

Reading needs no privilege, with exceptions that are told where they matter: a GPU in MIG mode gives its own memory and
processes, its instances and where they lie only to root, or to whoever may read `mig/monitor` (nvml.h: "Requires
privileged user"). Its MIG devices, with their memory and processes, it gives to everyone.
"""

from __future__ import annotations

from placement.nvml.access import profile_name
from placement.nvml.activity import SliceActivity, read_activity
from placement.nvml.read import NvidiaState, read_nvidia
from placement.nvml.use import read_use

__all__ = ["NvidiaState", "SliceActivity", "profile_name", "read_activity", "read_nvidia", "read_use"]
