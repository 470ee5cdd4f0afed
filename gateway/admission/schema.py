"""What the configuration says about admission: tenants' limits, the queue, and where limits are shared between gateways."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from model_registry.schema import Inconsistent, Name, Problem, SecretRef, Section, Size

_MOST = 10**12


class RateLimits(Section):
    """Limits of one tenant, or of one tenant on one model. Unset: no limit."""

    requests_per_minute: int | None = Field(
        default=None, ge=1, le=_MOST, description="Requests in any 60 seconds, by when they were admitted."
    )
    tokens_per_minute: int | None = Field(
        default=None,
        ge=1,
        le=_MOST,
        description="Tokens of prompts and answers in any 60 seconds, by when their requests were admitted.",
    )
    tokens_per_day: int | None = Field(
        default=None, ge=1, le=_MOST, description="Tokens of prompts and answers in any 24 hours."
    )
    max_concurrent: int | None = Field(
        default=None, ge=1, le=10**6, description="Requests at the same time, waiting ones included."
    )


class TenantLimits(RateLimits):
    """Limits over all models, and under `models` further ones for single models; a request has to keep both."""

    models: dict[Name, RateLimits] = Field(default={}, description="By the model's own name, not an alias.")


class QueueConfig(Section):
    """Where requests wait for a replica with room: one fair queue for each model, and for each dedicated tenant of it."""

    max_requests: int = Field(
        default=1024,
        ge=0,
        le=10**6,
        description="Requests in one queue. A tenant may fill half of what others leave free, so that room is left for them.",
    )
    max_bytes: Size = Field(
        default=256 * 2**20, description="Bodies that wait in one queue, in bytes; shared likewise."
    )
    max_wait_seconds: float = Field(default=60.0, gt=0, description="Who has waited this long is refused with 503.")
    ageing_seconds: float = Field(
        default=10.0, gt=0, description="Each time a request has waited this long, it counts one priority higher."
    )


class SharedLimitsConfig(Section):
    """How several gateway processes keep the same limits."""

    store: Literal["local", "redis"] = Field(
        default="local",
        description="`local`: a file in the state directory, for the gateways of one machine; `redis`: for those of many.",
    )
    url: SecretRef | None = Field(
        default=None,
        description="Of Redis or Valkey, as ${ENV:NAME} or file:PATH: redis://host:6379/0, rediss:// with TLS.",
    )
    sync_seconds: float = Field(
        default=0.25, gt=0, le=10, description="How often budget is fetched from the store and given back."
    )
    lease_seconds: float = Field(
        default=5.0, ge=1, le=600, description="How long budget stays with a gateway that says nothing more."
    )

    gateways: int = Field(
        default=1,
        ge=1,
        le=10_000,
        description="How many gateways share the limits, at least: what each reckons with while the store has never answered it.",
    )

    @model_validator(mode="after")
    def _url_fits(self) -> SharedLimitsConfig:
        if (self.store == "redis") is not (self.url is not None):
            raise Inconsistent(
                Problem(
                    "a store in Redis has a `url`, and a local one has none",
                    ("url",),
                    "Set url to ${ENV:NAME} or file:PATH with store: redis; remove it with store: local.",
                )
            )
        return self
