"""The declaration of a load: who sends what to which model, how often, and for how long. Closed, frozen, bounded.

version: v1
base_url: http://127.0.0.1:8080
duration_seconds: 30
tenants:
  - {name: acme, api_key_env: ACME_KEY, model: chat, prompt_tokens: 300, slo: {ttft: 500ms}}
  - {name: noisy, api_key_env: NOISY_KEY, model: other, arrival: {kind: poisson, requests_per_second: 20}}
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Discriminator, Field, SecretStr, model_validator

from loadtests.arrivals import Arrival, Closed, Trace
from loadtests.lengths import Fixed, Length, Tokens
from loadtests.problems import Problem, ScenarioError
from loadtests.traces import read_trace
from loadtests.units import Duration, show_duration
from loadtests.yamlfile import Section, Source, load


class SharedPrefix(Section):
    """A beginning that many prompts have in common, as system prompts are: `groups` different ones, drawn alike."""

    tokens: Tokens
    groups: int = Field(default=1, ge=1, le=100_000)


class Turns(Section):
    """Conversations: each request carries the questions and answers before it."""

    count: int = Field(ge=2, le=100, description="Questions per conversation.")
    think_seconds: float = Field(
        default=0.0, ge=0, le=3600, description="Pause between an answer and the next question."
    )


class Tools(Section):
    """Made-up function definitions sent along, as agents do. They are part of the prompt and come on top of its length."""

    count: int = Field(ge=1, le=128)
    choice: Literal["auto", "none", "required"] = "auto"


class Patient(Section):
    """Reads every answer to its end."""

    kind: Literal["patient"] = "patient"


class Cancel(Section):
    """Leaves so long after sending, whether the answer has begun or not."""

    kind: Literal["cancel"] = "cancel"
    after: Duration


class SlowReader(Section):
    """Takes the answer off the socket slowly, with a small receive buffer, and leaves after `hold`."""

    kind: Literal["slow_reader"] = "slow_reader"
    bytes_per_second: int = Field(default=64, ge=1, le=10_000_000)
    hold: Duration = 20.0


class HoldOpen(Section):
    """Opens a connection, sends half a request head, and keeps it so for `hold` or until the server closes it."""

    kind: Literal["hold_open"] = "hold_open"
    hold: Duration = 5.0


Manner = Annotated[Patient | Cancel | SlowReader | HoldOpen, Discriminator("kind")]


class Slo(Section):
    """What a tenant was promised, per request; each with a unit. A request that failed meets nothing.

    `tpot` is the mean gap between tokens, as elsewhere; `itl` is the longest one.
    """

    ttft: Duration | None = None
    tpot: Duration | None = None
    itl: Duration | None = None
    e2e: Duration | None = None
    attainment: float = Field(
        default=0.99, gt=0, le=1, description="The share of requests that has to meet all of them."
    )

    @model_validator(mode="after")
    def _promises_something(self) -> Slo:
        if not self.limits:
            raise ValueError("an SLO without a limit || Give ttft, tpot, itl or e2e, as in {ttft: 500ms}.")
        return self

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, in seconds, by name."""
        named = {"ttft": self.ttft, "tpot": self.tpot, "itl": self.itl, "e2e": self.e2e}
        return {name: seconds for name, seconds in named.items() if seconds is not None}

    def __str__(self) -> str:
        limits = ", ".join(f"{name} <= {show_duration(seconds)}" for name, seconds in self.limits.items())
        return f"{limits} for {self.attainment:.6g} of requests"


STREAMED = ("ttft", "tpot", "itl")
"""What only an answer that comes in events has."""


class TenantLoad(Section):
    """What one tenant sends. Prompts are made-up words, no two alike, so that no prefix cache answers for the model."""

    name: str = Field(min_length=1)
    model: str = Field(min_length=1)
    api_key: SecretStr | None = Field(default=None, description="Prefer api_key_env in files.")
    api_key_env: str | None = Field(default=None, description="Environment variable that holds the key.")
    task: Literal["chat", "completion", "embedding"] = "chat"
    stream: bool = True
    prompt_tokens: Length | None = Field(
        default=None, description="Prompt length as the model's tokenizer counts it, chat template included."
    )
    prompt_words: int = Field(
        default=64, ge=1, le=1_000_000, description="Prompt length in words, where prompt_tokens is unset."
    )
    output_tokens: Length = Field(
        default=Fixed(value=32), description="Exactly so many: the end of sequence is ignored.", validate_default=True
    )
    inputs: int = Field(default=1, ge=1, le=2048, description="Texts per embedding request.")
    shared_prefix: SharedPrefix | None = None
    turns: Turns | None = None
    tools: Tools | None = None
    arrival: Arrival = Closed()
    manner: Manner = Patient()
    slo: Slo | None = None
    background: bool = Field(default=False, description="Goes on until every request of the other tenants is answered.")

    @model_validator(mode="after")
    def _makes_sense(self) -> TenantLoad:
        if self.api_key is not None and self.api_key_env is not None:
            raise ValueError("give `api_key` or `api_key_env`, not both")
        if self.turns is not None and not isinstance(self.arrival, Closed):
            raise ValueError(
                "a conversation waits for its answers, so `turns` needs a closed loop || Use arrival: {kind: closed, users: N}."
            )
        if self.task != "chat" and (self.turns or self.tools):
            raise ValueError(f"`turns` and `tools` belong to task chat, not {self.task}")
        if self.shared_prefix is not None and self.prompt_tokens is None:
            raise ValueError("shared_prefix counts tokens, so prompt_tokens has to be set || Add prompt_tokens: N.")
        return self

    @model_validator(mode="after")
    def _promises_what_can_be_seen(self) -> TenantLoad:
        unseen = [name for name in STREAMED if self.slo is not None and name in self.slo.limits]
        if unseen and not self.streams:
            raise ValueError(
                f"an answer in one piece has no {unseen[0]}, so any would do || Promise e2e: slo: {{e2e: 1s}}."
            )
        return self

    @property
    def streams(self) -> bool:
        """Whether answers come as events; an embedding never does."""
        return self.stream and self.task != "embedding"

    def key(self, environment: Mapping[str, str]) -> str | None:
        """The API key, or None where the gateway wants none. Raises ScenarioError if the named variable is not set."""
        if self.api_key_env is None:
            return self.api_key.get_secret_value() if self.api_key else None
        if not environment.get(self.api_key_env):
            raise ScenarioError(
                Problem(
                    f"the environment variable {self.api_key_env} holds no key",
                    f"tenant {self.name!r}",
                    f"Make one: sliceway keys create {self.name}",
                )
            )
        return environment[self.api_key_env]

    def described(self) -> dict[str, Any]:
        """The load as plain data for reports, without keys."""
        shown = self.model_dump(mode="json", exclude={"api_key", "api_key_env", "background"}, exclude_none=True)
        return {key: value["value"] if _is_fixed(value) else value for key, value in shown.items()}


def _is_fixed(value: Any) -> bool:
    return isinstance(value, dict) and value.get("kind") == "fixed"


def _plain_http(value: str) -> str:
    try:
        parts = urlsplit(value)
        is_plain = parts.scheme == "http" and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number or too high, or half an IPv6 address
        is_plain = False
    # `rest` has credentials, path, query and fragment: none of them would be sent, and reports show the address.
    rest = value.partition("//")[2].rstrip("/")
    if not is_plain or any(sign in rest for sign in "/?#@"):
        raise ValueError("this is not of the form http://host:port || Keys have a field of their own: api_key_env.")
    return value.rstrip("/")


BaseUrl = Annotated[str, AfterValidator(_plain_http)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Seed = Annotated[int, Field(ge=0, description="The same seed asks the same, at the same times.")]


class Scenario(Section):
    """One run."""

    kind: Literal["load"] = "load"
    version: Literal["v1"] = "v1"
    base_url: BaseUrl = Field(default="http://127.0.0.1:8080", description="The gateway, without /v1.")
    warmup_seconds: float = Field(
        default=2.0, ge=0, le=3600, description="Requests due in this time are sent and not counted."
    )
    duration_seconds: Seconds = Field(
        default=20.0,
        description="Requests due in this time, after the warm-up, are counted, however late their answers are.",
    )
    timeout_seconds: float = Field(
        default=120.0, gt=0, description="A connection on which nothing happens for so long has failed."
    )
    seed: Seed = 1
    wording: int = Field(
        default=0,
        description="Another number asks at the same times, in the same lengths, with other words: nothing of it is in a prefix cache.",
    )
    tenants: tuple[TenantLoad, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> Scenario:
        names = [tenant.name for tenant in self.tenants]
        if len(set(names)) != len(names):
            raise ValueError("two tenants share a name; their rows could not be told apart")
        return self


def parse_scenario(data: object, where: str) -> Scenario:
    """A Scenario from plain data. Raises ScenarioError that lists every fault with its field."""
    return settle(Source(data, where))


def load_scenario(path: Path) -> Scenario:
    """Read a scenario from YAML or JSON. Raises ScenarioError where there is none or it is wrong."""
    return settle(load(path))


def settle(source: Source) -> Scenario:
    """The scenario in `source`, with the paths of its traces made absolute, and the traces looked at."""
    scenario = source.parse(Scenario)
    return scenario.model_copy(update={"tenants": settled(scenario.tenants, source.directory)})


def settled(tenants: Sequence[TenantLoad], directory: Path) -> tuple[TenantLoad, ...]:
    """The tenants with the paths of their traces made absolute. Raises ScenarioError for a trace that cannot be read."""
    return tuple(_settled(tenant, directory) for tenant in tenants)


def _settled(tenant: TenantLoad, directory: Path) -> TenantLoad:
    if not isinstance(tenant.arrival, Trace):
        return tenant
    path = (directory / tenant.arrival.file).absolute()
    read_trace(path)
    return tenant.model_copy(update={"arrival": tenant.arrival.model_copy(update={"file": path})})


def environment() -> Mapping[str, str]:
    """The process environment, read when it is asked for."""
    return dict(os.environ)
