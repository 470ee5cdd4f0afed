"""A secret for every engine that listens on TCP, and the middleware that has vLLM ask for it.

Each start has a secret of its own, so that what was once known is worth nothing to the next engine, and a request that an old table
sends to another engine's port is refused there. It travels in the environment (which the kernel shows to its own user alone) and never
among the arguments, and is kept in the journal (0600), where the next controller finds it, and in the routing table (0600), where
gateways do. A Unix socket of mode 0600 needs none.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from placement import engine_guard
from placement.plugin import first_on_path, install_files

SECRET_BYTES = 32
MIDDLEWARE = "sliceway_guard.Guard"
"""As `--middleware` names it."""

_VLLMS_OWN = "VLLM_API_KEY"


def new_secret() -> str:
    """256 random bits in hexadecimal digits."""
    return secrets.token_hex(SECRET_BYTES)


def guard_environment(
    argv: Sequence[str], secret: str, directory: Path, environment: Mapping[str, str]
) -> dict[str, str]:
    """The variables that close an engine started with `argv` to whoever does not show `secret`; none without a secret.

    An engine of `engine.command` gets the secret under both usual names, and asks for it itself. With the middleware vLLM's own
    check is off: it would look for a key that nobody sends. The middleware's file is made below `directory`, in front of the
    `PYTHONPATH` of `environment`. Raises PlacementError if it cannot be written.
    """
    if not secret:
        return {}
    if MIDDLEWARE not in argv:
        return {engine_guard.VARIABLE: secret, _VLLMS_OWN: secret}
    path = first_on_path(install_guard(directory), environment.get("PYTHONPATH", ""))
    return {engine_guard.VARIABLE: secret, _VLLMS_OWN: "", "PYTHONPATH": path}


def install_guard(directory: Path) -> Path:
    """The middleware as a directory for `PYTHONPATH`, below `directory`. Raises PlacementError if it cannot be written."""
    source = Path(engine_guard.__file__).read_bytes()
    name = MIDDLEWARE.partition(".")[0]
    return install_files({f"{name}.py": source}, directory, "engine-guard", what="the engines' guard")
