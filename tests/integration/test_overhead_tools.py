"""The compiled engine and client of `sliceway bench overhead --full`, with each other."""

from __future__ import annotations

import random
import shutil
import socket
from collections.abc import Iterator
from typing import BinaryIO

import pytest

from gateway.bench import BenchError
from gateway.overhead.pairs import arrivals
from gateway.overhead.tools import Tools, request

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler"),
]


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Tools:
    return Tools.compiled(tmp_path_factory.mktemp("tools"))


@pytest.fixture(scope="module")
def engine(tools: Tools) -> Iterator[int]:
    with tools.engine(event_seconds=0.005) as port:
        yield port


def test_pairs_are_answered_with_their_gaps(tools: Tools, engine: int) -> None:
    asked = request(engine, stream=True, tokens=5)
    run = tools.opened((engine, engine), (asked, asked), arrivals(10, 200.0, random.Random(1)))
    assert not run.errors
    assert len(run.pairs) == 10
    for timing in (half for pair in run.pairs for half in (pair.direct, pair.through)):
        assert 0 < timing.first <= timing.whole
        assert len(timing.gaps) <= 4  # events that come in one read are one arrival
        assert timing.gateway_says is None
    assert any(half.gaps for pair in run.pairs for half in (pair.direct, pair.through))


def test_a_closed_loop_counts_answers_and_events(tools: Tools, engine: int) -> None:
    plain = tools.closed(engine, request(engine, stream=False, tokens=1), connections=2, seconds=1.0)
    assert plain.requests > 0
    assert (plain.events, plain.errors) == (0, 0)
    stream = tools.closed(engine, request(engine, stream=True, tokens=3), connections=2, seconds=1.0)
    assert stream.errors == 0
    assert stream.events >= 6 * stream.requests > 0  # three of content; the end, usage and [DONE]


def test_where_nobody_listens_the_load_says_so(tools: Tools) -> None:
    with pytest.raises(BenchError, match="could not be carried out"):
        tools.closed(1, request(1, stream=False, tokens=1), connections=1, seconds=0.1)


@pytest.mark.parametrize("size", [200_000, 256 * 2**10, 300_000, 5_000_000])
def test_a_body_of_any_size_is_answered_by_its_beginning_and_the_next_one_too(engine: int, size: int) -> None:
    def asked(fields: bytes, length: int) -> bytes:
        body = b'{"model":"bench",' + fields + b',"messages":["'
        body += b"x" * (length - len(body) - 3) + b'"]}'
        return b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body

    with socket.create_connection(("127.0.0.1", engine), timeout=60) as client, client.makefile("rb") as answers:
        for length in (size, 5000):
            client.sendall(asked(b'"max_tokens":2,"stream":true', length))
            assert _read(answers).count(b"sieve") == 2
        client.sendall(asked(b'"max_tokens":2', size) + asked(b'"max_tokens":3', 5000))
        assert all(b'"usage"' in _read(answers) for _ in range(2))


def _read(answers: BinaryIO) -> bytes:
    """The body of the next answer."""
    head = b"".join(iter(answers.readline, b"\r\n"))
    if b"content-length: " in head:
        return answers.read(int(head.partition(b"content-length: ")[2].split(b"\r\n")[0]))
    body = b""
    while size := int(answers.readline(), 16):
        body += answers.read(size + 2)
    answers.readline()
    return body
