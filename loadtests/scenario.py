"""The declaration of a load: who sends what to which model, how often, and for how long. Closed, frozen, bounded.

version: v1
base_url: http://127.0.0.1:8080
duration_seconds: 30
tenants:
  - {name: acme, api_key_env: ACME_KEY, model: chat, arrival: {kind: closed, users: 2}}
  - {name: noisy, api_key_env: NOISY_KEY, model: other, arrival: {kind: open, requests_per_second: 20}}
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError


class ScenarioError(Exception):
    """The scenario cannot be run as it is written; the message names the file, the field and what is allowed."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Closed(_Section):
    """A fixed number of users, each of whom waits for an answer before asking again."""

    kind: Literal["closed"] = "closed"
    users: int = Field(default=1, ge=1, le=10_000)
    think_seconds: float = Field(
        default=0.0, ge=0, le=3600, description="Pause between an answer and the next request."
    )


class Open(_Section):
    """Requests arrive at random (Poisson) at a rate that does not depend on how fast they are answered."""

    kind: Literal["open"] = "open"
    requests_per_second: float = Field(gt=0, le=10_000)
    max_in_flight: int = Field(
        default=1000,
        ge=1,
        le=100_000,
        description="Further requests wait in the client, and their latency counts the wait.",
    )


class TenantLoad(_Section):
    """What one tenant sends. Prompts are random words, no two alike, so that no prefix cache answers for the model."""

    name: str = Field(min_length=1)
    model: str = Field(min_length=1)
    api_key: SecretStr | None = Field(default=None, description="Prefer api_key_env in files.")
    api_key_env: str | None = Field(default=None, description="Environment variable that holds the key.")
    task: Literal["chat", "completion", "embedding"] = "chat"
    stream: bool = True
    prompt_words: int = Field(default=64, ge=1, le=1_000_000)
    output_tokens: int = Field(
        default=32, ge=1, le=1_000_000, description="Exactly so many: the end of sequence is ignored."
    )
    arrival: Annotated[Closed | Open, Field(discriminator="kind")] = Closed()
    background: bool = Field(default=False, description="Goes on until every request of the other tenants is answered.")

    @model_validator(mode="after")
    def _one_key(self) -> TenantLoad:
        if self.api_key is not None and self.api_key_env is not None:
            raise ValueError("give `api_key` or `api_key_env`, not both")
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
                f"tenant {self.name!r}: the environment variable {self.api_key_env} holds no key; make one with `sliceway keys create {self.name}`"
            )
        return environment[self.api_key_env]


class Scenario(_Section):
    """One run."""

    version: Literal["v1"] = "v1"
    base_url: str = Field(default="http://127.0.0.1:8080", description="The gateway, without /v1.")
    warmup_seconds: float = Field(
        default=2.0, ge=0, le=3600, description="Requests due in this time are sent and not counted."
    )
    duration_seconds: float = Field(
        default=20.0,
        gt=0,
        le=86_400,
        description="Requests due in this time, after the warm-up, are counted, however late their answers are.",
    )
    timeout_seconds: float = Field(
        default=120.0, gt=0, description="A connection on which nothing happens for so long has failed."
    )
    seed: int = 1
    tenants: tuple[TenantLoad, ...] = Field(min_length=1)

    @field_validator("base_url")
    @classmethod
    def _plain_http(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme != "http" or not parts.hostname or parts.path.strip("/"):
            raise ValueError(f"{value!r} is not of the form http://host:port")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _names_differ(self) -> Scenario:
        names = [tenant.name for tenant in self.tenants]
        if len(set(names)) != len(names):
            raise ValueError("two tenants share a name; their rows could not be told apart")
        return self


def parse_scenario(data: object, where: str) -> Scenario:
    """A Scenario from plain data. Raises ScenarioError that lists every fault with its field."""
    if not isinstance(data, dict):
        raise ScenarioError(f"{where}: a scenario is a mapping with `tenants:` in it")
    try:
        return Scenario.model_validate(data)
    except ValidationError as error:
        raise ScenarioError(faults(error, where)) from error


def faults(error: ValidationError, where: str) -> str:
    """Every fault that was found, a line each: where, which field, what is wrong."""
    return "\n".join(f"{where}: {'.'.join(map(str, e['loc'])) or 'scenario'}: {e['msg']}" for e in error.errors())


def load_scenario(path: Path) -> Scenario:
    """Read a scenario from YAML or JSON. Raises ScenarioError where there is none or it is wrong."""
    try:
        data: Any = YAML(typ="safe", pure=True).load(path.read_text())
    except OSError as error:
        raise ScenarioError(f"{path}: {error.strerror}") from error
    except YAMLError as error:
        raise ScenarioError(f"{path}: {error}") from error
    return parse_scenario(data, str(path))


def environment() -> Mapping[str, str]:
    """The process environment, read when it is asked for."""
    return dict(os.environ)
