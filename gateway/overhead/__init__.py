"""What the gateway adds to a request: pairs of requests, one to the engine and one through the gateway, and their differences."""

import enum

from gateway.overhead.client import Target, run_pairs
from gateway.overhead.pairs import Pair, Timing, arrivals, summarize

__all__ = ["Pair", "Part", "Target", "Timing", "arrivals", "run_pairs", "summarize"]


class Part(enum.StrEnum):
    """What `gateway.overhead.everything` can measure by itself; in its report they are `added`, `held`, `cost` and `neighbours`."""

    LATENCY = "latency"
    STREAMS = "streams"
    CPU = "cpu"
    NEIGHBOURS = "neighbours"
