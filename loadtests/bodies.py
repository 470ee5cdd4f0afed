"""The bodies that a load is made of. Everything random comes from the generator handed in, so that a seed repeats a run."""

from __future__ import annotations

import json
from random import Random

from loadtests.scenario import TenantLoad

PATHS = {"chat": "/v1/chat/completions", "completion": "/v1/completions", "embedding": "/v1/embeddings"}
SYLLABLES = ("ba", "co", "di", "fe", "gu", "ha", "je", "ki", "lo", "mu", "na", "pe", "ri", "so", "tu", "va", "we", "zi")


def prompt(words: int, random: Random) -> str:
    """`words` made-up words; two prompts share a first word about once in six thousand, so prefixes do not repeat."""
    return " ".join("".join(random.choices(SYLLABLES, k=3)) for _ in range(words))


def body(tenant: TenantLoad, random: Random) -> bytes:
    """One request's JSON. Answers have exactly `output_tokens` tokens where the engine honours `ignore_eos` (vLLM does)."""
    text = prompt(tenant.prompt_words, random)
    if tenant.task == "embedding":
        return json.dumps({"model": tenant.model, "input": text}).encode()
    content: dict[str, object] = (
        {"messages": [{"role": "user", "content": text}]} if tenant.task == "chat" else {"prompt": text}
    )
    limits = {"max_tokens": tenant.output_tokens, "ignore_eos": True, "temperature": 0.0}
    streaming = {"stream": True, "stream_options": {"include_usage": True}} if tenant.streams else {}
    return json.dumps({"model": tenant.model} | content | limits | streaming).encode()
