"""The `batches:` section of the configuration."""

from __future__ import annotations

from pydantic import Field

from model_registry.schema import Section, Size


class BatchesConfig(Section):
    """`/v1/files` and `/v1/batches`. Changes count after a restart of the gateway."""

    max_file: Size = Field(default=200 * 2**20, description="Larger uploads are refused with 413.")
    max_kept_per_tenant: Size = Field(
        default=4 * 2**30, description="What a tenant may keep in files; uploads beyond it are refused."
    )
    max_requests: int = Field(default=50_000, ge=1, le=1_000_000, description="Lines of one batch.")
    max_concurrent: int = Field(
        default=8, ge=1, le=1024, description="Requests of batches that are with engines at once, over all batches."
    )
    reserve_ratio: float = Field(
        default=0.25, ge=0, le=1, description="Part of each replica's sequences that batches leave free for others."
    )
    attempts: int = Field(
        default=3,
        ge=1,
        le=20,
        description="How often a request is tried whose engine fails; waiting for room is no attempt.",
    )
    file_lifetime_seconds: float = Field(
        default=30 * 86_400.0, ge=3600, description="How long files of batches are kept, unless their owner says so."
    )
