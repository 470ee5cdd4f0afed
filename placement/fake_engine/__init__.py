"""A simulated engine: vLLM's HTTP surface with a latency model and no model behind it.

    python -m placement.fake_engine --uds PATH --model NAME [--ttft-seconds 0.05] [--itl-seconds 0.01] ...

It serves tests, teaching and load tests of the gateway. Routes, bodies and error wordings follow vLLM 0.32.0
(`vllm/entrypoints/openai`, `vllm/entrypoints/serve/exception_handling`), so that what works against it meets the same bytes
there. Flags that only vLLM knows are accepted and ignored. Everything it says about itself says "simulated": its log,
`/version` and `/fake/state`.
"""

from placement.fake_engine.engine import Behaviour, FakeEngine, State, listening

__all__ = ["Behaviour", "FakeEngine", "State", "listening"]
