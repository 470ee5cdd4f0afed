"""Secrets as the configuration names them: where they lie, never what they are.

`${ENV:NAME}` is an environment variable, `file:PATH` a file, whose first line counts. A configuration holds the reference (`SecretRef`)
only, so no plan, log, error or copy of it can hold the secret. `Secret` is the value once it was fetched; it prints as stars.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gateway.errors import SecretUnavailable
from model_registry.schema import SECRET_REFERENCE

MAX_SECRET_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True)
class Secret:
    """A secret's bytes. Neither `str` nor `repr` nor an error shows them."""

    value: bytes = field(repr=False)

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__


def fetch(reference: str, environ: Mapping[str, str] | None = None, *, field_name: str) -> Secret:
    """What `reference` leads to; `field_name` is the configuration's field, for errors. `environ` is the process's own if None.

    Raises SecretUnavailable where there is nothing, it is empty, or it is too large to be a secret.
    """
    match = SECRET_REFERENCE.fullmatch(reference)
    assert match is not None, "checked when the configuration was read"
    name, path = match.groups()
    if name is not None:
        value = (os.environ if environ is None else environ).get(name, "").encode("utf-8", "surrogateescape")
        where = f"the environment variable {name}"
    else:
        value, where = _read(Path(path).expanduser(), field_name), path
    if not value:
        raise SecretUnavailable(
            f"the secret for {field_name} is empty or not there",
            where=where,
            remedy="Set it for the process that runs the gateway, and for `sliceway keys` as well.",
        )
    return Secret(value)


def _read(path: Path, field_name: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SECRET_BYTES + 1)
    except OSError as error:
        raise SecretUnavailable(
            f"the secret for {field_name} cannot be read: {error.strerror}",
            where=str(path),
            remedy="Check the path, and that the user who runs sliceway may read it.",
        ) from error
    if len(data) > MAX_SECRET_BYTES:
        raise SecretUnavailable(
            f"the file named for {field_name} is larger than {MAX_SECRET_BYTES} bytes; that is no secret",
            where=str(path),
        )
    return data.split(b"\n", 1)[0].strip()
