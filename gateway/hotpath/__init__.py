"""The relay below ASGI: completions pass between two transports, without a task, a queue or a JSON object per event."""

from gateway.hotpath.client import HotPath, hot_protocol
from gateway.hotpath.engines import BothEngines, HotEngines

__all__ = ["BothEngines", "HotEngines", "HotPath", "hot_protocol"]
