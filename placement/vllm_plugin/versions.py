"""Which vLLM versions the plugin was tested with.

Tested means: vLLM's own platform code of that version, driven on the NVML simulator for slice indices 0 to 6 on one and
two GPUs, fails or misreports without the plugin and is right with it (tests/integration/test_vllm_plugin.py). On another
version the plugin registers all the same, and the proof of placement decides (docs/pinning.md).
"""

from __future__ import annotations

TESTED_VERSIONS: tuple[str, ...] = (
    "0.20.2",
    "0.23.0",
    "0.24.0",
    "0.26.0",
    "0.28.0",
    "0.30.0",
    "0.31.0",
    "0.32.0",
    "0.33.0",
)


def is_tested(version: str) -> bool:
    """Whether `version` (`0.32.0`, or a local build of it such as `0.32.0+cu129`) is among them."""
    return version.partition("+")[0] in TESTED_VERSIONS
