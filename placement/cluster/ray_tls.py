"""Whether what nodes tell each other through Ray is encrypted. Ray does it where its own environment variables say so; this reads them."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path

from model_registry.errors import ConfigError

SWITCH = "RAY_USE_TLS"
FILES = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")


def encrypts(environ: Mapping[str, str]) -> bool:
    """Whether Ray encrypts. Raises ConfigError where it is to and has not all that it takes: it would end without a word."""
    if environ.get(SWITCH, "").lower() not in ("1", "true"):
        return False
    for name in FILES:
        path = environ.get(name, "")
        if not path or not Path(path).is_file():
            raise ConfigError(
                f"{SWITCH} is set, and this is no file: {path!r}" if path else f"{SWITCH} is set without {name}",
                where=name,
                remedy=f"Set {', '.join(FILES)} to PEM files: this machine's certificate for its own address, its key, and the "
                "authority of all machines; docs/cluster.md has the commands.",
            )
    return True


def in_clear(address: str, environ: Mapping[str, str]) -> str | None:
    """What is to be said to whoever makes a machine part of the cluster at `address` (HOST:PORT); None where all is well."""
    if encrypts(environ) or _is_loopback(address):
        return None
    return (
        "warning: what machines tell each other through Ray goes over the network in clear, the cluster's token and the engines' secrets "
        "with it, and who has the token may run anything here. Keep that network to yourself, or have Ray encrypt on every machine "
        f"({SWITCH}=1; docs/cluster.md, Encryption)"
    )


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
