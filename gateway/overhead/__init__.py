"""What the gateway adds to a request: pairs of requests, one to the engine and one through the gateway, and their differences."""

from gateway.overhead.client import Target, run_pairs
from gateway.overhead.pairs import Pair, Timing, arrivals, summarize

__all__ = ["Pair", "Target", "Timing", "arrivals", "run_pairs", "summarize"]
