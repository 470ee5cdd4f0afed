"""A cluster's address: what is none is told at once, and one where nobody answers yet is waited for, with words and a bound."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from placement.cluster.address import knock, wait_for_answer
from placement.cluster.errors import ClusterUnreachable, NoAddress


@pytest.mark.parametrize(
    "address", ["nonsense", "", ":", ":6379", "127.0.0.1:", "127.0.0.1:port", "127.0.0.1:0", "127.0.0.1:70000", "a:-1"]
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(NoAddress, match="no address of a cluster") as refused:
        knock(address)
    assert "HOST:PORT" in str(refused.value.remedy)


def test_a_name_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unknown)
    with pytest.raises(NoAddress, match="'haed' cannot be resolved"):
        knock("haed:6379")


def test_a_name_that_no_dns_can_hold() -> None:
    with pytest.raises(NoAddress, match="cannot be resolved"):
        knock(f"{'x' * 64}.test:6379")


def test_somebody_and_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        knock(f"127.0.0.1:{server.getsockname()[1]}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and not listening
        with pytest.raises(ClusterUnreachable, match="no cluster answers") as refused:
            knock(f"127.0.0.1:{taken.getsockname()[1]}")
    assert not isinstance(refused.value, NoAddress)


class Time:
    """Passes by pauses alone."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def pause(self, seconds: float) -> bool:
        self.now += seconds
        return False


def answers_after(looks: int) -> Callable[[str], None]:
    left = iter(range(looks))

    def look(address: str) -> None:
        if next(left, None) is not None:
            raise ClusterUnreachable("nobody", where=address)

    return look


def test_it_is_waited_for_and_the_reason_is_said_once() -> None:
    time, said = Time(), list[str]()
    assert wait_for_answer("h:1", pause=time.pause, say=said.append, monotonic=time.monotonic, look=answers_after(3))
    assert time.now == 15.0
    assert said == ["nobody; trying again every 5 s, for 300 s in all"]


def test_there_is_an_end_to_waiting() -> None:
    time, said = Time(), list[str]()
    with pytest.raises(ClusterUnreachable, match="nobody; it was waited for 20 s"):
        wait_for_answer(
            "h:1",
            pause=time.pause,
            say=said.append,
            patience_seconds=20.0,
            monotonic=time.monotonic,
            look=answers_after(100),
        )
    assert time.now == 20.0


def test_what_is_no_address_is_not_waited_for() -> None:
    said = list[str]()
    with pytest.raises(NoAddress):
        wait_for_answer("nonsense", pause=lambda _: pytest.fail("it paused"), say=said.append)
    assert said == []


def test_it_can_be_told_to_end() -> None:
    assert not wait_for_answer("h:1", pause=lambda _: True, say=lambda _: None, look=answers_after(100))
