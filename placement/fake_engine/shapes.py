"""The bodies that vLLM 0.32.0 answers with, around made-up text and vectors."""

from __future__ import annotations

import json
from typing import Any

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "while", "the", "band", "plays", "on")
EMBEDDING_DIMENSIONS = 8


class ChatShapes:
    """The shapes of /v1/chat/completions."""

    id_prefix = "chatcmpl-"

    def opening(self) -> list[dict[str, Any]]:
        """What comes before the first token."""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [{"object": "chat.completion.chunk", "choices": [choice]}]

    def part(self, text: str, finish: str | None) -> dict[str, Any]:
        """One token, with its finish reason if it is the last."""
        choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": finish, "token_ids": None}
        return {"object": "chat.completion.chunk", "choices": [choice]}

    def closing(self) -> dict[str, Any]:
        """The event that carries the usage."""
        return {"object": "chat.completion.chunk", "choices": []}

    def whole(self, text: str, finish: str = "length") -> dict[str, Any]:
        """The answer in one piece."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None, "tool_calls": []}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return {"object": "chat.completion", "choices": [choice]}

    def calling(self, call: dict[str, Any]) -> dict[str, Any]:
        """The answer that is a call of a tool."""
        answer = self.whole("")
        answer["choices"][0]["message"] |= {"content": None, "tool_calls": [call]}
        answer["choices"][0]["finish_reason"] = "tool_calls"
        return answer

    def call_part(self, call: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
        """A call of a tool in a stream, or the end after it."""
        delta = {"tool_calls": [{"index": 0} | call]} if call else {"content": ""}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish, "token_ids": None}
        return {"object": "chat.completion.chunk", "choices": [choice]}


class CompletionShapes:
    """The shapes of /v1/completions."""

    id_prefix = "cmpl-"

    def opening(self) -> list[dict[str, Any]]:
        """What comes before the first token."""
        return []

    def part(self, text: str, finish: str | None) -> dict[str, Any]:
        """One token, with its finish reason if it is the last."""
        return {
            "object": "text_completion",
            "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": None}],
        }

    def closing(self) -> dict[str, Any]:
        """The event that carries the usage."""
        return {"object": "text_completion", "choices": []}

    def whole(self, text: str, finish: str = "length") -> dict[str, Any]:
        """The answer in one piece."""
        return self.part(text, finish)

    def calling(self, call: dict[str, Any]) -> dict[str, Any]:
        """Completions call no tools; the arguments as text."""
        return self.whole(call["function"]["arguments"])

    def call_part(self, call: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
        """The same in a stream."""
        return self.part(call["function"]["arguments"] if call else "", finish)


def named_event(value: dict[str, Any]) -> bytes:
    """`value` as a server-sent event that has its type as its name, too."""
    return f"event: {value['type']}\n".encode() + event(value)


def event(value: dict[str, Any]) -> bytes:
    """`value` as a server-sent event."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def word(index: int) -> str:
    """The text of the token at `index`."""
    return ("" if index == 0 else " ") + WORDS[index % len(WORDS)]


def count_tokens(value: Any) -> int:
    """Tokens of a prompt; a word is a token here."""
    if isinstance(value, str):
        return len(value.split())
    if isinstance(value, list):
        return sum(1 if isinstance(item, int) else count_tokens(item) for item in value)
    if isinstance(value, dict):
        return count_tokens(value.get("content", value.get("text", "")))
    return 0


def prompt_tokens_of(body: dict[str, Any]) -> int:
    """Tokens of the prompt or the messages of a body."""
    return count_tokens(body.get("messages", body.get("prompt", "")))


def unit_vector(item: Any) -> list[float]:
    """A unit vector that depends on the text only."""
    text = item if isinstance(item, str) else json.dumps(item)
    raw = [1.0 + sum(ord(c) for c in text[i::EMBEDDING_DIMENSIONS]) % 97 for i in range(EMBEDDING_DIMENSIONS)]
    norm = sum(x * x for x in raw) ** 0.5
    return [x / norm for x in raw]
