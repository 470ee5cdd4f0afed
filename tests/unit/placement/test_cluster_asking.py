"""What Ray raises, in words: nothing of Ray's reaches whoever runs a command. Ray itself is never started."""

from __future__ import annotations

import pytest

from model_registry.errors import ConfigError, SlicewayError
from placement.cluster.errors import ClusterError, ClusterUnreachable, TokenRefused

asking = pytest.importorskip("placement.cluster.asking", exc_type=ImportError)
errors = pytest.importorskip("ray.exceptions")

TASK = errors.RayTaskError("aim", "Traceback\n  File x", OSError("no space left"))
IN_INIT = errors.ActorDiedError(errors.RayTaskError("__init__", "Traceback\nWrongFleet: no GPU", ValueError()))


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (errors.AuthenticationError("InvalidAuthToken"), TokenRefused, "does not take the token"),
        (TASK, ClusterError, "the head could not do it: OSError: no space left"),
        (TASK.as_instanceof_cause(), ClusterError, "the head could not do it: OSError: no space left"),
        (errors.RayTaskError("aim", "Traceback", AssertionError()), ClusterError, "could not do it: AssertionError"),
        (IN_INIT, ClusterError, "the head could not start: WrongFleet: no GPU"),
        (errors.ActorDiedError(), ClusterUnreachable, "the head does not answer: The actor died unexpectedly"),
        (errors.ActorUnavailableError("gone", None), ClusterUnreachable, "the head does not answer: The actor None"),
        (errors.GetTimeoutError(), ClusterUnreachable, "the head does not answer in time"),
        (errors.RpcError("no route\nto host"), ClusterUnreachable, "the head does not answer: no route"),
        (errors.RaySystemError("broken"), ClusterUnreachable, "the head does not answer: "),
        (errors.LocalRayletDiedError(), ClusterUnreachable, "the head does not answer: "),
        (errors.RayError(), ClusterUnreachable, "the head does not answer: RayError"),
    ],
)
def test_what_keeps_a_cluster_from_answering_is_told_with_what_to_do(
    error: Exception, kind: type[SlicewayError], said: str
) -> None:
    with pytest.raises(SlicewayError) as told, asking.asking("the head", "10.0.0.1:6379"):
        raise error
    assert type(told.value) is kind
    assert said in told.value.message
    assert "\n" not in told.value.message
    assert told.value.where == "10.0.0.1:6379"
    assert told.value.remedy


def test_what_the_head_refuses_on_purpose_is_told_as_the_head_said_it() -> None:
    refused = ConfigError("no such model", where="models.m", remedy="Name one.")
    with pytest.raises(ConfigError) as told, asking.asking("the head", "10.0.0.1:6379"):
        raise errors.RayTaskError("aim", "Traceback", refused).as_instanceof_cause()
    assert told.value is refused


def test_nothing_else_is_touched() -> None:
    with pytest.raises(ValueError, match="no actor"), asking.asking("the head", "10.0.0.1:6379"):
        raise ValueError("no actor")
    with asking.asking("the head", "10.0.0.1:6379"):
        pass
