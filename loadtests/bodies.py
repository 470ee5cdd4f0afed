"""The bodies that a load is made of. Everything random comes from the generator handed in, so that a seed repeats a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from loadtests.scenario import TenantLoad
from loadtests.tokens import ANCHOR, Lexicon
from loadtests.traces import Row

PATHS = {"chat": "/v1/chat/completions", "completion": "/v1/completions", "embedding": "/v1/embeddings"}
SYLLABLES = ("ba", "co", "di", "fe", "gu", "ha", "je", "ki", "lo", "mu", "na", "pe", "ri", "so", "tu", "va", "we", "zi")

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Asked:
    """One request as it is sent, and the question in it, for the history of a conversation."""

    path: str
    body: bytes
    question: str


class Bodies:
    """Makes the requests of one tenant. `lexicon` is needed where the tenant counts its prompts in tokens.

    Two that differ in `wording` alone make prompts and answers of the same lengths, and no prompt of the same words.
    """

    def __init__(self, tenant: TenantLoad, *, seed: int, wording: int = 0, lexicon: Lexicon | None = None) -> None:
        if tenant.prompt_tokens is not None and lexicon is None:
            raise ValueError(f"tenant {tenant.name!r} counts tokens; without a lexicon nobody knows what one is")
        self._tenant = tenant
        self._lexicon = lexicon
        self._seed = seed
        self._wording = wording
        self._tools = _tools(tenant.tools.count) if tenant.tools else []

    def make(self, random: Random, row: Row | None = None, history: Sequence[Message] = ()) -> Asked:
        """The next request. A `row` of a trace decides its lengths; `history` comes before the question."""
        tenant = self._tenant
        texts = [self._text(random, row) for _ in range(tenant.inputs if tenant.task == "embedding" else 1)]
        if tenant.task == "embedding":
            fields: dict[str, Any] = {"input": texts if tenant.inputs > 1 else texts[0]}
        else:
            fields = self._question(texts[0], history) | self._limits(random, row)
        return Asked(PATHS[tenant.task], json.dumps({"model": tenant.model} | fields).encode(), texts[0])

    def _question(self, text: str, history: Sequence[Message]) -> dict[str, Any]:
        tenant = self._tenant
        if tenant.task == "completion":
            return {"prompt": text}
        tools = {"tools": self._tools, "tool_choice": tenant.tools.choice} if tenant.tools else {}
        return {"messages": [*history, {"role": "user", "content": text}]} | tools

    def _limits(self, random: Random, row: Row | None) -> dict[str, Any]:
        """Answers have exactly so many tokens where the engine honours `ignore_eos` (vLLM does)."""
        tokens = row.output_tokens if row else self._tenant.output_tokens.draw(random)
        streaming = {"stream": True, "stream_options": {"include_usage": True}} if self._tenant.streams else {}
        return {"max_tokens": tokens, "ignore_eos": True, "temperature": 0.0} | streaming

    def _text(self, random: Random, row: Row | None) -> str:
        wanted = self._tenant.prompt_tokens
        if self._lexicon is None or (wanted is None and row is None):
            return prompt(self._tenant.prompt_words, self._words_of(random.getrandbits(64)))
        tokens = row.prompt_tokens if row else wanted.draw(random) if wanted else 0
        words = self._lexicon.words_for(tokens)
        prefix = self._prefix(random, row, words)
        drawn = self._words_of(random.getrandbits(64))
        own = self._lexicon.text(words - len(prefix), drawn) if words > len(prefix) else ""
        return " ".join(filter(None, (ANCHOR, *prefix, own)))

    def _prefix(self, random: Random, row: Row | None, words: int) -> list[str]:
        """The words that this prompt shares with others, at most `words`."""
        shared = self._tenant.shared_prefix
        if row is not None and row.prefix is not None:
            name, tokens = row.prefix, row.prefix_tokens
        elif row is None and shared is not None:
            name, tokens = str(random.randrange(shared.groups)), shared.tokens
        else:
            return []
        assert self._lexicon is not None
        length = min(words, round(tokens / self._lexicon.tokens_per_word))
        # The same words for every process and user of this tenant, whatever they drew before.
        return self._lexicon.text(length, self._words_of(f"{self._seed}/{self._tenant.name}/prefix/{name}")).split()

    def _words_of(self, of: object) -> Random:
        """What words are drawn from, apart from all lengths: these stay the same in another wording."""
        return Random(f"{self._wording}/{of}")


def prompt(words: int, random: Random) -> str:
    """`words` made-up words; two prompts share a first word about once in six thousand, so prefixes do not repeat."""
    return " ".join("".join(random.choices(SYLLABLES, k=3)) for _ in range(words))


def _tools(count: int) -> list[dict[str, Any]]:
    parameters = {
        "type": "object",
        "properties": {
            "query": {"type": "string", "description": "What to look for."},
            "limit": {"type": "integer", "minimum": 1, "maximum": 50},
        },
        "required": ["query"],
    }
    return [
        {
            "type": "function",
            "function": {
                "name": f"look_up_{number}",
                "description": f"Looks something up in collection {number}.",
                "parameters": parameters,
            },
        }
        for number in range(count)
    ]
