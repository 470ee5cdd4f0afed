"""How many tokens a request may take, from its bytes: no tokenizer runs in the gateway. Pure.

A token of a byte-level vocabulary stands for at least one byte, so a body never holds more tokens of text than bytes: that is the
bound that limits reserve by. How many bytes a token has on average is learnt from the engines' own counts: that is the
likely figure that capacity, fairness and waiting times go by.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

TEMPLATE_TOKENS = 64  # what a chat template adds to a short conversation, beyond the JSON that is in the body anyway
UNKNOWN_MODEL_LEN = 1 << 20
_COMPLETIONS_DEFAULT = 16  # tokens that `/v1/completions` answers with where the request does not say

_FIRST_RATIO = (
    0.5  # tokens per byte before anything was learnt: text has about 0.25, program code and Chinese up to 0.4
)
_MARGIN = 1.15
_FORGETTING = 0.01

_INPUTS = (b"input_image", b"input_audio", b"input_file")
# The same words as one expression. It looks for underscores, which prose has hardly any of, at a quarter of the cost of searching for each
# word; a body of nothing but underscores takes long, so that it is for short ones.
_OUTSIDE = re.compile(rb"_(?:url|(?<=file_)id|(?<=input_)(?:image|audio|file))")
_SHORT_BYTES = 16 * 2**10


class Estimate(msgspec.Struct, frozen=True):
    """Tokens of one request. `prompt` is likely, `prompt_bound` the most; `output` is the most for all its sequences together."""

    prompt: int
    prompt_bound: int
    output: int
    sequences: int = 1

    @property
    def likely(self) -> int:
        """Prompt and answer, as is likely for the prompt and at most for the answer."""
        return self.prompt + self.output

    @property
    def bound(self) -> int:
        """The most that the request can use."""
        return self.prompt_bound + self.output


_SEARCHED_BYTES = 256 * 2**10  # more hold as many tokens as most models take anyway


class TokenRatio:
    """Tokens per byte of request bodies of one model: quick to rise, slow to fall."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = _FIRST_RATIO

    def learn(self, body_bytes: int, prompt_tokens: int) -> None:
        """A body of `body_bytes` turned out to hold `prompt_tokens`."""
        if body_bytes < 256:
            return  # mostly template and JSON
        seen = min(1.0, prompt_tokens / body_bytes)
        self.value = seen if seen > self.value else self.value + _FORGETTING * (seen - self.value)

    def likely(self, body_bytes: int) -> int:
        """Tokens of a prompt in `body_bytes`."""
        each = self.value * _MARGIN
        return int(body_bytes * each if each < 1 else body_bytes) + 1


def estimate(
    body_bytes: int,
    ratio: TokenRatio,
    *,
    max_model_len: int | None,
    max_tokens: Any,
    sequences: int,
    generates: bool,
    is_completion: bool = False,
    by_reference: bool = False,
) -> Estimate:
    """What a request may use.

    `max_tokens` is what the client sent, of whatever type: what is no number is the engine's to refuse. `by_reference`: the prompt
    holds images or files that are not in the body, so only the model's length bounds it. Without `max_model_len` a
    million tokens are assumed.
    """
    longest = max_model_len or UNKNOWN_MODEL_LEN
    bound = longest if by_reference else min(body_bytes + TEMPLATE_TOKENS, longest)
    likely = ratio.likely(body_bytes)
    prompt = likely if likely < bound else bound
    if not generates:
        return Estimate(prompt, bound, 0, 1)
    if isinstance(max_tokens, int) and max_tokens > 0:
        output = min(max_tokens, longest)
    elif is_completion:
        output = min(_COMPLETIONS_DEFAULT, longest)
    elif max_model_len is None:
        output = 4096
    else:
        output = max(1, longest - prompt)
    return Estimate(prompt, min(bound, max(longest - output, prompt)), output * sequences, sequences)


def refers_outside(raw: bytes) -> bool:
    """Whether a body may hold images, sounds or files by their address. A large one is not searched: it may."""
    if len(raw) <= _SHORT_BYTES:
        return _OUTSIDE.search(raw) is not None
    return (
        len(raw) > _SEARCHED_BYTES
        or b"_url" in raw
        or b"file_id" in raw
        or (b"input_" in raw and any(word in raw for word in _INPUTS))
    )
