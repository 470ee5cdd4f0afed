"""What engines of others are shown: the keys that models with `endpoints` name, fetched."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from gateway.errors import SecretUnavailable
from gateway.secret_values import Secret, fetch
from model_registry.schema import ModelConfig

NO_KEYS: Mapping[str, Secret] = {}
_OF_A_HEADER = re.compile(rb"[!-~]+")


def endpoint_keys(models: Iterable[ModelConfig], environ: Mapping[str, str] | None = None) -> Mapping[str, Secret]:
    """By model, for those that name one. `environ` is the process's own if None.

    Raises SecretUnavailable where a key is not to be had, or cannot stand in a header.
    """
    return {model.name: _key(model.name, model.endpoint_key, environ) for model in models if model.endpoint_key}


def _key(model: str, reference: str, environ: Mapping[str, str] | None) -> Secret:
    field_name = f"endpoint_key of model {model!r}"
    key = fetch(reference, environ, field_name=field_name)
    if not _OF_A_HEADER.fullmatch(key.value):
        raise SecretUnavailable(
            f"the secret for {field_name} holds something else than visible ASCII characters",
            where=reference,
            remedy="It goes into a header: no spaces, no control characters, no letters with accents.",
        )
    return key
