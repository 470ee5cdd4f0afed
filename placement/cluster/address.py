"""A cluster's address: whether it is one, and whether anybody answers there. Ray would try for minutes and then end the process."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from placement.cluster.errors import ClusterUnreachable, NoAddress

PATIENCE_SECONDS = 300.0
RETRY_SECONDS = 5.0
_KNOCK_SECONDS = 5.0
_REMEDY = "Write HOST:PORT as `sliceway up CONFIG --ray` prints it, and check that it runs."


def knock(address: str) -> None:
    """Return if somebody accepts connections at `address` (HOST:PORT). Raises NoAddress, ClusterUnreachable."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise NoAddress(f"{address!r} is no address of a cluster", where=address, remedy=_REMEDY)
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS):
            return
    except (socket.gaierror, UnicodeError) as error:  # a name that no DNS can hold is a UnicodeError
        raise NoAddress(f"the name {host!r} cannot be resolved: {error}", where=address, remedy=_REMEDY) from error
    except OSError as error:
        raise ClusterUnreachable(f"no cluster answers at {address}: {error}", where=address, remedy=_REMEDY) from error


def wait_for_answer(
    address: str,
    *,
    pause: Callable[[float], bool],
    say: Callable[[str], None],
    patience_seconds: float = PATIENCE_SECONDS,
    monotonic: Callable[[], float] = time.monotonic,
    look: Callable[[str], None] = knock,
) -> bool:
    """True as soon as somebody answers at `address`; False if `pause`, which takes seconds, says that this is to end.

    What is waited for is said once for each reason. Raises NoAddress at once, ClusterUnreachable after `patience_seconds`.
    """
    deadline, said = monotonic() + patience_seconds, ""
    while True:
        try:
            look(address)
        except NoAddress:
            raise
        except ClusterUnreachable as error:
            if monotonic() >= deadline:
                raise ClusterUnreachable(
                    f"{error.message}; it was waited for {patience_seconds:g} s", where=error.where, remedy=error.remedy
                ) from error
            if error.message != said:
                said = error.message
                say(f"{said}; trying again every {RETRY_SECONDS:g} s, for {patience_seconds:g} s in all")
        else:
            return True
        if pause(RETRY_SECONDS):
            return False
