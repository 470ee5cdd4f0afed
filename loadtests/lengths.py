"""How long prompts and answers are: distributions over whole numbers of tokens. Pure; the generator is handed in.

prompt_tokens: 256
prompt_tokens: {kind: uniform, min: 100, max: 900}
prompt_tokens: {kind: normal, mean: 512, std: 128, max: 2000}
prompt_tokens: {kind: lognormal, median: 300, p95: 1800, max: 8000}
prompt_tokens: {kind: exponential, mean: 200, max: 2000}
prompt_tokens: {kind: choice, values: [128, 2048], weights: [9, 1]}
"""

from __future__ import annotations

from math import log
from random import Random
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from loadtests.traces import MOST_TOKENS
from loadtests.yamlfile import Section

_P95 = 1.6448536269514722
"""The standard normal distribution's 95th percentile."""

Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]


class _Bounded(Section):
    min: Tokens = 1
    max: Tokens = MOST_TOKENS

    @model_validator(mode="after")
    def _ordered(self) -> Any:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self

    def _clip(self, value: float) -> int:
        return max(self.min, min(self.max, round(value)))


class Fixed(Section):
    """Always the same."""

    kind: Literal["fixed"] = "fixed"
    value: Tokens

    def draw(self, random: Random) -> int:
        """The length of the next one."""
        return self.value


class Uniform(_Bounded):
    """Every length from `min` to `max` alike."""

    kind: Literal["uniform"] = "uniform"
    max: Tokens = Field()

    def draw(self, random: Random) -> int:
        """The length of the next one."""
        return random.randint(self.min, self.max)


class Normal(_Bounded):
    """A normal distribution; what falls outside `min` to `max` counts as the bound."""

    kind: Literal["normal"] = "normal"
    mean: float = Field(gt=0)
    std: float = Field(ge=0)

    def draw(self, random: Random) -> int:
        """The length of the next one."""
        return self._clip(random.gauss(self.mean, self.std))


class Lognormal(_Bounded):
    """A lognormal distribution, by its median and 95th percentile: what lengths of real chats look like."""

    kind: Literal["lognormal"] = "lognormal"
    median: float = Field(gt=0)
    p95: float = Field(gt=0)

    @model_validator(mode="after")
    def _skewed(self) -> Lognormal:
        if self.p95 < self.median:
            raise ValueError(f"p95 {self.p95} is below the median {self.median}")
        return self

    def draw(self, random: Random) -> int:
        """The length of the next one."""
        return self._clip(random.lognormvariate(log(self.median), log(self.p95 / self.median) / _P95))


class Exponential(_Bounded):
    """An exponential distribution."""

    kind: Literal["exponential"] = "exponential"
    mean: float = Field(gt=0)

    def draw(self, random: Random) -> int:
        """The length of the next one."""
        return self._clip(random.expovariate(1 / self.mean))


class Choice(Section):
    """One of several lengths, by weight."""

    kind: Literal["choice"] = "choice"
    values: tuple[Tokens, ...] = Field(min_length=1)
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None

    @model_validator(mode="after")
    def _paired(self) -> Choice:
        if self.weights is not None and len(self.weights) != len(self.values):
            raise ValueError(
                f"{len(self.values)} values and {len(self.weights)} weights || Give each value its weight."
            )
        return self

    def draw(self, random: Random) -> int:
        """The length of the next one."""
        return random.choices(self.values, self.weights)[0]


def _number_is_fixed(value: Any) -> Any:
    return {"kind": "fixed", "value": value} if isinstance(value, int) and not isinstance(value, bool) else value


def _kind(value: Any) -> str | None:
    return value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)


Length = Annotated[
    Annotated[Fixed, Tag("fixed")]
    | Annotated[Uniform, Tag("uniform")]
    | Annotated[Normal, Tag("normal")]
    | Annotated[Lognormal, Tag("lognormal")]
    | Annotated[Exponential, Tag("exponential")]
    | Annotated[Choice, Tag("choice")],
    Discriminator(_kind),
    BeforeValidator(_number_is_fixed),
]
"""A whole number, or a distribution by its `kind`."""


def longest(length: Length) -> int:
    """The longest that can be drawn."""
    match length:
        case Fixed(value=value):
            return value
        case Choice(values=values):
            return max(values)
    return length.max
