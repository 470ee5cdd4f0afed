"""What is said where a cluster cannot be reached, or runs something else. Ray itself is never started."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest

from placement.cluster.errors import ClusterUnreachable, NodeMismatch

start = pytest.importorskip("placement.cluster.start", exc_type=ImportError)


@pytest.fixture
def answering() -> Iterator[str]:
    """An address where somebody accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def fails_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """Have Ray refuse."""

    def prepare(error: Exception) -> None:
        def init(**_: object) -> None:
            raise error

        monkeypatch.setattr(start.ray, "init", init)

    return prepare


def test_nobody_at_the_address() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # taken, and not listening
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(ClusterUnreachable, match="no cluster answers at") as refused:
            start.connect(address)
    assert "sliceway up CONFIG --ray" in str(refused.value.remedy)


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:", "127.0.0.1:port", ":"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ClusterUnreachable) as refused:
        start.connect(address)
    assert "HOST:PORT" in str(refused.value.remedy)


def test_another_ray_or_python(answering: str, fails_with: Callable[[Exception], None]) -> None:
    fails_with(RuntimeError("Version mismatch: The cluster was started with: Ray: 2.50.0 Python: 3.12.1"))
    with pytest.raises(NodeMismatch, match=r"Ray: 2\.50\.0 Python: 3\.12\.1") as refused:
        start.connect(answering)
    assert "same versions" in str(refused.value.remedy)


def test_somebody_who_is_no_cluster(answering: str, fails_with: Callable[[Exception], None]) -> None:
    fails_with(ConnectionError("ray client connection timeout"))
    with pytest.raises(ClusterUnreachable, match="ray client connection timeout"):
        start.connect(answering)
