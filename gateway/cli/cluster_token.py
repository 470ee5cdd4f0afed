"""The token of a cluster, which everybody has to show: made on its first machine, found there, and copied to the others."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from gateway.config import load_config
from gateway.doctor import default_config_path
from model_registry.atomic import write_atomically
from model_registry.errors import ConfigError, SlicewayError

TOKEN_FILE, PORT_FILE = "cluster.token", "cluster.port"
_REMEDY = "Copy it from the cluster's first machine (cluster.token in its state directory)."
_RAYS_OWN = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def own_token(state: Path) -> Path:
    """The token of the cluster that begins here, kept in the state directory: who has it may run anything in the cluster."""
    path = state / TOKEN_FILE
    if not path.exists():
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(path, secrets.token_hex(32).encode(), mode=0o600)
    return path


def existing(token: Path | None) -> Path | None:
    """The token's file, if one is named. Raises ConfigError where there is none, or it is empty."""
    if token is not None and not token.is_file():
        raise ConfigError("there is no token here", where=str(token), remedy=_REMEDY)
    if token is not None and not token.read_bytes().strip():
        raise ConfigError("this file holds no token", where=str(token), remedy=_REMEDY)
    return token


def token_for(
    address: str, token: Path | None, states: Iterable[Path], environ: Mapping[str, str] = os.environ
) -> Path | None:
    """What to show the cluster at `address`: `token` if it is named, else, on the cluster's first machine, what is in that one's
    state directory, if it is among `states`. None where Ray's own variables say it, or nobody knows. Raises ConfigError as `existing`.

    Only of this machine, and of the port that the cluster has: it is shown to nobody else.
    """
    if token is not None:
        return existing(token)
    host, _, port = address.rpartition(":")
    if any(environ.get(name) for name in _RAYS_OWN) or not _is_here(host):
        return None
    return next((state / TOKEN_FILE for state in states if _leads_at(state, port)), None)


def states_here() -> Iterator[Path]:
    """State directories of which a command that names no configuration may be: of the one in the working directory."""
    path = default_config_path()
    if path is not None:
        with contextlib.suppress(SlicewayError):
            yield load_config(path).state
    yield Path(".sliceway")


def _leads_at(state: Path, port: str) -> bool:
    try:
        return (state / PORT_FILE).read_text(encoding="utf-8").strip() == port and (state / TOKEN_FILE).is_file()
    except (OSError, ValueError):
        return False


def _is_here(host: str) -> bool:
    """Whether that is an address of this machine."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_DGRAM)
        with socket.socket(found[0][0], socket.SOCK_DGRAM) as probe:
            probe.bind(found[0][4])
    except (OSError, UnicodeError, OverflowError):
        return False
    return True
