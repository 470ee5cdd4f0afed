"""The secret of an engine: how it is made and handed over, and that nothing is answered without it."""

from __future__ import annotations

import os
import runpy
import stat
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement import engine_guard
from placement.engine_guard import VARIABLE, Guard, credential, shows
from placement.guarding import MIDDLEWARE, guard_environment, install_guard, new_secret

SECRET = "0123456789abcdef" * 4
RIGHT = [(b"host", b"x"), (b"authorization", credential(SECRET))]
Message = MutableMapping[str, Any]


async def behind(scope: Message, receive: Callable[[], Awaitable[Message]], send: Any) -> None:
    await send({"type": "passed on"})


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Guard:
    monkeypatch.setenv(VARIABLE, SECRET)
    return Guard(behind)


async def answer(guard: Guard, headers: list[tuple[bytes, bytes]], kind: str = "http", **scope: Any) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("nothing of a request is read before its sender is known")

    await guard({"type": kind, "headers": headers, **scope}, receive, send)
    return sent


PATHS = ["/v1/models", "/health", "/metrics", "/tokenize", "/sleep", "/", "//", "/v1/../sleep", "*"]


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD", "DELETE", "BREW"])
async def test_without_the_secret_every_path_and_method_is_401(guard: Guard, method: str) -> None:
    for path in PATHS:
        for root in ("", "/v1"):
            start, body = await answer(guard, [(b"host", b"x")], path=path, method=method, root_path=root)
            assert start["status"] == 401
            assert body["body"] == engine_guard.UNAUTHORIZED


async def test_with_the_secret_everything_is_passed_on(guard: Guard) -> None:
    for path in PATHS:
        assert await answer(guard, RIGHT, path=path, method="GET") == [{"type": "passed on"}]
    assert await answer(guard, RIGHT, "websocket") == [{"type": "passed on"}]


async def test_a_websocket_without_the_secret_is_not_accepted(guard: Guard) -> None:
    assert await answer(guard, [], "websocket", path="/v1/realtime") == [{"type": "websocket.close", "code": 1008}]


async def test_the_servers_own_start_and_end_are_nobodys_request(guard: Guard) -> None:
    assert await answer(guard, [], "lifespan") == [{"type": "passed on"}]


WRONG = [
    b"",
    SECRET.encode(),
    b"Bearer",
    b"Bearer ",
    b"bearer " + SECRET.encode(),
    b"Bearer  " + SECRET.encode(),
    b"Bearer " + SECRET.encode() + b" ",
    b"Bearer " + SECRET.encode()[:-1],
    b"Bearer " + SECRET.upper().encode(),
    b"Basic " + SECRET.encode(),
    b"Bearer \xff\xfe",
]


@pytest.mark.parametrize("value", WRONG)
async def test_what_is_nearly_the_secret_is_not_it(guard: Guard, value: bytes) -> None:
    (start, _) = await answer(guard, [(b"authorization", value)])
    assert start["status"] == 401


async def test_two_credentials_are_none(guard: Guard) -> None:
    for headers in ([*RIGHT, (b"Authorization", b"Bearer x")], [*RIGHT, RIGHT[-1]]):
        (start, _) = await answer(guard, headers)
        assert start["status"] == 401


@given(st.lists(st.binary(max_size=80), max_size=3))
def test_only_the_secret_itself_opens(credentials: list[bytes]) -> None:
    wanted = credential(SECRET)
    assert shows(credentials, wanted) == (credentials == [wanted])


@pytest.mark.parametrize("secret", [None, "", "short"])
def test_an_engine_without_a_secret_does_not_start(monkeypatch: pytest.MonkeyPatch, secret: str | None) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if secret is not None:
        monkeypatch.setenv(VARIABLE, secret)
    with pytest.raises(RuntimeError, match=VARIABLE):
        Guard(behind)


def test_every_start_has_another_secret_of_256_bits() -> None:
    made = {new_secret() for _ in range(100)}
    assert len(made) == 100
    assert all(len(bytes.fromhex(secret)) == 32 for secret in made)


# ---- handed over


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "plugin"


def test_vllm_finds_the_middleware_and_its_own_check_is_off(directory: Path) -> None:
    found = guard_environment(["python", "--middleware", MIDDLEWARE], SECRET, directory, {"PYTHONPATH": "/plugin"})
    assert found[VARIABLE] == SECRET
    assert found["VLLM_API_KEY"] == ""
    first, second = found["PYTHONPATH"].split(os.pathsep)
    module, _, name = MIDDLEWARE.partition(".")
    assert name in runpy.run_path(f"{first}/{module}.py"), "it stands alone"
    assert second == "/plugin"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_the_file_is_made_once_and_under_the_name_of_its_content(directory: Path) -> None:
    first = install_guard(directory)
    before = first.stat().st_ino
    assert install_guard(directory) == first
    assert first.stat().st_ino == before


def test_another_engine_gets_the_secret_under_both_usual_names(directory: Path) -> None:
    found = guard_environment(["engine", "--port", "{port}"], SECRET, directory, {})
    assert found == {VARIABLE: SECRET, "VLLM_API_KEY": SECRET}
    assert not directory.exists()


def test_an_engine_on_a_socket_gets_none(directory: Path) -> None:
    assert guard_environment(["python"], "", directory, {}) == {}
