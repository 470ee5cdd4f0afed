"""The bounds of latency histograms, shared by gateway and engines.

Two histograms with different bounds cannot be subtracted: a gateway on a finer grid than its engine's looks faster than the engine
(sglang#28717, aisix#870). So engines are given the gateway's.
"""

from __future__ import annotations

import json
import re

BUCKETS_SECONDS: tuple[float, ...] = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.075),
    *(
        0.1,
        0.15,
        0.2,
        0.25,
        0.3,
        0.4,
        0.5,
        0.75,
        1.0,
        1.5,
        2.0,
        3.0,
        5.0,
        7.5,
        10.0,
        15.0,
        20.0,
        30.0,
        60.0,
        120.0,
        300.0,
        600.0,
    ),
)
"""Upper bounds in seconds, without the last one, which is infinite."""

# Engines before this one are not given it: read in vLLM 0.32.0 (`config/observability.py`), not looked for in older ones.
_SINCE_VLLM = (0, 32)
_FAMILIES = ("request_latency", "time_to_first_token", "inter_token_latency")


def histogram_flags(vllm_version: str) -> dict[str, str]:
    """vLLM's flag and value that put its latency histograms on this grid; empty for a version without it."""
    if tuple(int(part) for part in re.findall(r"\d+", vllm_version)[:2]) < _SINCE_VLLM:
        return {}
    return {"--custom-histogram-buckets": json.dumps(dict.fromkeys(_FAMILIES, BUCKETS_SECONDS))}
