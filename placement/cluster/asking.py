"""What Ray raises where a cluster is asked something, in words: what happened, where, and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ray.exceptions import AuthenticationError, GetTimeoutError, RayActorError, RayError, RayTaskError

from model_registry.errors import SlicewayError
from placement.cluster.errors import ClusterError, ClusterUnreachable, TokenRefused

ANSWER_SECONDS = 10.0
_AGAIN = (
    "What serves goes on. Ray starts the cluster's head and agents again by itself: ask again in a few seconds, and if it "
    "stays so, see that the cluster's first machine is up and reachable from here."
)
_LOGS = "The whole of it is in Ray's logs on the machine where that runs: /tmp/ray/session_latest/logs."


@contextlib.contextmanager
def asking(whom: str, address: str) -> Iterator[None]:
    """For questions to `whom`, a part of the cluster at `address`. Raises ClusterError for what keeps it from answering, and
    what it has refused on purpose as if it had been raised here.
    """
    try:
        yield
    except RayError as error:
        raise in_words(error, whom, address) from error


def in_words(error: RayError, whom: str, address: str) -> SlicewayError:
    """What kept `whom` from answering. ClusterUnreachable where trying again may help."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, SlicewayError):
        return cause
    if isinstance(error, AuthenticationError):
        return token_refused(address)
    if isinstance(error, RayTaskError):
        return ClusterError(
            f"{whom} could not do it: {type(cause).__name__}: {cause}".rstrip(": "), where=address, remedy=_LOGS
        )
    if isinstance(error, RayActorError) and error.actor_init_failed:
        return ClusterError(f"{whom} could not start: {_last_line(error)}", where=address, remedy=_LOGS)
    if isinstance(error, GetTimeoutError):
        return ClusterUnreachable(f"{whom} does not answer in time", where=address, remedy=_AGAIN)
    said = _last_line(error) if isinstance(error, RayActorError) else _first_line(error)
    return ClusterUnreachable(f"{whom} does not answer: {said}", where=address, remedy=_AGAIN)


def token_refused(address: str) -> TokenRefused:
    """The cluster asks for a token, and was shown another one or none."""
    return TokenRefused(
        f"the cluster at {address} does not take the token that it was shown, or was shown none",
        where=address,
        remedy="Give --token-file a copy of that cluster's cluster.token, which is in its first machine's state directory. A cluster "
        "that Ray runs by itself has the token of whoever started it: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN.",
    )


def _first_line(error: RayError) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _last_line(error: RayError) -> str:
    return str(error).strip().rpartition("\n")[2] or type(error).__name__
