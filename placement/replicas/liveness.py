"""When an engine that was ready serves no longer. Pure.

`/health` of a hung vLLM says 200 (vllm#39863, vllm#36451), so its steps are watched as well: requests that run while no step
ends mean that it hangs.
"""

from __future__ import annotations

from placement.replicas.probe import Activity
from placement.schema import LivenessConfig


class Liveness:
    """Remembers what the checks of one engine found, `interval_seconds` apart. Times in seconds, all by the same clock."""

    def __init__(self, config: LivenessConfig, *, at: float, on_gpu: bool = False) -> None:
        self.interval_seconds, self._stall_seconds = config.times(on_gpu=on_gpu)
        self._config = config
        self._failures = 0
        self._failing_since = at
        self._steps = -1.0
        self._advanced_at = at

    def observe(self, at: float, *, healthy: bool, activity: Activity | None) -> float | None:
        """Take in one check. Returns for how long the engine has not served, if it is to be given up; None otherwise.

        `activity` is None where the engine does not tell, which is held against nobody.
        """
        if healthy:
            self._failures = 0
        else:
            self._failing_since = at if self._failures == 0 else self._failing_since
            self._failures += 1
        if self._failures >= self._config.failures:
            return at - self._failing_since
        return self._stalled_for(at, activity)

    def _stalled_for(self, at: float, activity: Activity | None) -> float | None:
        if activity is None or activity.running == 0 or activity.steps != self._steps:
            self._advanced_at = at
            self._steps = activity.steps if activity else -1.0
            return None
        stalled = at - self._advanced_at
        return stalled if self._stall_seconds and stalled >= self._stall_seconds else None
