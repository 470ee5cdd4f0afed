"""Neighbours that misbehave: each kind is one thing that a tenant, or a process beside the engines, can do to others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field

from loadtests.arrivals import Arrival, Closed
from loadtests.lengths import Fixed, Length
from loadtests.scenario import Cancel, HoldOpen, Manner, Patient, SlowReader, TenantLoad
from loadtests.units import Duration
from loadtests.yamlfile import Section

CONTEXT_GUESS_TOKENS = 2048
"""Taken where the gateway does not tell a model's context."""
MOST_CORES = 65_536
"""More than any Linux machine has; a longer list is a slip of the pen, and costs memory."""


def _cores(value: str) -> str:
    parse_cores(value)
    return value


Cores = Annotated[str, AfterValidator(_cores)]


class _Tenant(Section):
    """What aggressors that send requests have in common. Unset lengths and users are the kind's own."""

    name: str | None = Field(default=None, description="What it is called in reports; its kind if unset.")
    tenant: str = Field(min_length=1, description="Who sends it; with a key of its own.")
    api_key_env: str | None = None
    users: int | None = Field(default=None, ge=1, le=100_000)
    arrival: Arrival | None = Field(default=None, description="In place of `users` in a closed loop.")
    prompt_tokens: Length | None = None
    output_tokens: Length | None = None

    @property
    def label(self) -> str:
        """What reports call it."""
        return self.name or str(getattr(self, "kind", "aggressor"))

    @property
    def on_host(self) -> bool:
        """Whether it works beside the engines, without a request."""
        return False


class PrefillFlood(_Tenant):
    """Long prompts and one-token answers: the engine computes prompts, and others' tokens wait between them."""

    kind: Literal["prefill_flood"] = "prefill_flood"


class DecodeFlood(_Tenant):
    """Short prompts and long answers from many at once: every step carries a full batch."""

    kind: Literal["decode_flood"] = "decode_flood"


class LongContext(_Tenant):
    """Prompts of most of the context and long answers: the KV cache fills up, and requests are preempted."""

    kind: Literal["long_context"] = "long_context"


class CancelStorm(_Tenant):
    """Asks for long answers and leaves soon after."""

    kind: Literal["cancel_storm"] = "cancel_storm"
    after: Duration = 0.1


class ConnectionFlood(_Tenant):
    """Opens connections and sends half a request on each. It meets the gateway, never an engine."""

    kind: Literal["connection_flood"] = "connection_flood"
    hold: Duration = 5.0


class SlowReaders(_Tenant):
    """Asks for long answers and takes them off the socket by and by."""

    kind: Literal["slow_readers"] = "slow_readers"
    bytes_per_second: int = Field(default=64, ge=1, le=10_000_000)
    hold: Duration = 20.0


class Flood(_Tenant):
    """The victim's own kind of request, from many users at once."""

    kind: Literal["flood"] = "flood"
    prompt_words: int | None = Field(default=None, ge=1, le=1_000_000)
    task: Literal["chat", "completion", "embedding"] | None = None


class _OnHost(Section):
    name: str | None = None
    processes: int = Field(default=1, ge=1, le=1024)
    cores: Cores | None = Field(default=None, description="Cores that it runs on, as 0-3,8; by the setting if unset.")

    @property
    def label(self) -> str:
        """What reports call it."""
        return self.name or str(getattr(self, "kind", "aggressor"))

    @property
    def on_host(self) -> bool:
        """Whether it works beside the engines, without a request."""
        return True


class CpuHog(_OnHost):
    """Processes that compute and walk through memory beside the engine."""

    kind: Literal["cpu_hog"] = "cpu_hog"
    memory_mib: int = Field(default=64, ge=0, le=1_000_000, description="What each walks through; 0 only computes.")


class WeightLoading(_OnHost):
    """Reads weights from disk again and again, and copies them: to a GPU where `device` is set, else in memory.

    `interpreter` is one that has PyTorch, as the engines' own; it is needed for a GPU only.
    """

    kind: Literal["weight_loading"] = "weight_loading"
    path: Path = Field(description="A file of weights, or a directory of *.safetensors.")
    interpreter: Path | None = None
    device: str | None = Field(default=None, description="As CUDA_VISIBLE_DEVICES takes it: an index, or a MIG UUID.")


Requesting = PrefillFlood | DecodeFlood | LongContext | CancelStorm | ConnectionFlood | SlowReaders | Flood
OnHost = CpuHog | WeightLoading
Aggressor = Annotated[Requesting | OnHost, Discriminator("kind")]

_USERS = {
    "prefill_flood": 8,
    "decode_flood": 16,
    "long_context": 8,
    "cancel_storm": 16,
    "connection_flood": 200,
    "slow_readers": 16,
    "flood": 8,
}
_SHARES = {
    "prefill_flood": (0.75, None),
    "decode_flood": (None, 0.25),
    "long_context": (0.7, 0.25),
    "cancel_storm": (0.1, 0.25),
    "slow_readers": (None, 0.25),
}
"""Prompt and answer as shares of the model's context; None is a few words in, and one token out."""
_FEW_WORDS = 8


def load_of(aggressor: Requesting, victim: TenantLoad, model: str, context_tokens: int | None) -> TenantLoad:
    """What `aggressor` sends to `model`, whose context is `context_tokens`."""
    arrival = aggressor.arrival or Closed(users=aggressor.users or _USERS[aggressor.kind])
    common: dict[str, Any] = {
        "name": aggressor.tenant,
        "model": model,
        "api_key_env": aggressor.api_key_env,
        "arrival": arrival,
        "background": True,
        "manner": _manner(aggressor),
    }
    if isinstance(aggressor, Flood):
        return TenantLoad(**common | _as_the_victim(aggressor, victim))
    prompt, output = _lengths(aggressor.kind, context_tokens or CONTEXT_GUESS_TOKENS)
    if isinstance(aggressor, ConnectionFlood):
        return TenantLoad(**common)
    common["prompt_words"] = _FEW_WORDS
    common["prompt_tokens"] = aggressor.prompt_tokens or (Fixed(value=prompt) if prompt else None)
    common["output_tokens"] = aggressor.output_tokens or Fixed(value=output)
    return TenantLoad(**common)


def _as_the_victim(aggressor: Flood, victim: TenantLoad) -> dict[str, Any]:
    return {
        "task": aggressor.task or victim.task,
        "stream": victim.stream,
        "prompt_tokens": aggressor.prompt_tokens or victim.prompt_tokens,
        "prompt_words": aggressor.prompt_words or victim.prompt_words,
        "output_tokens": aggressor.output_tokens or victim.output_tokens,
    }


def _manner(aggressor: Requesting) -> Manner:
    match aggressor:
        case CancelStorm(after=after):
            return Cancel.model_construct(after=after)
        case SlowReaders(bytes_per_second=rate, hold=hold):
            return SlowReader.model_construct(bytes_per_second=rate, hold=hold)
        case ConnectionFlood(hold=hold):
            return HoldOpen.model_construct(hold=hold)
    return Patient()


def _lengths(kind: str, context_tokens: int) -> tuple[int | None, int]:
    prompt, output = _SHARES.get(kind, (None, None))
    return (
        max(1, int(context_tokens * prompt)) if prompt else None,
        max(1, int(context_tokens * output)) if output else 1,
    )


def parse_cores(text: str) -> tuple[int, ...]:
    """Core numbers from `0-3,8`, as Linux writes them. Raises ValueError for anything else."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise ValueError(f"{text!r} is no list of cores || Write it like 0-3,8.")
        if int(last or first) >= MOST_CORES:
            raise ValueError(f"no machine has a core {last or first} || Write it like 0-3,8.")
        found.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))
