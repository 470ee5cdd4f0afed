"""One large body from its first part to an engine: what it may hold is counted, comes back, and goes out in pieces."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest

from gateway.config import GatewayConfig
from gateway.errors import BodiesFull, BodyTooLarge, MalformedRequest, RateLimited
from gateway.large_bodies import LARGE_BYTES, LargeBodies, LargeBody
from gateway.large_bodies.held import PIECE_BYTES
from gateway.large_bodies.room import Room
from gateway.large_bodies.testing import InlineReader
from gateway.surface import GET_RESPONSE, ROUTES

CHAT = ROUTES["/v1/chat/completions"]
LIMITS = GatewayConfig(max_body=1000, max_body_memory=3000, max_body_memory_per_tenant=2000)


def test_a_tenant_has_so_much_and_all_together_so_much() -> None:
    room = Room()
    room.take("a", 2000, LIMITS)
    with pytest.raises(RateLimited, match="max_body_memory_per_tenant") as own:
        room.take("a", 1, LIMITS)
    assert own.value.retry_after_seconds
    with pytest.raises(BodiesFull, match="max_body_memory") as of_all:
        room.take("b", 1001, LIMITS)
    assert of_all.value.retry_after_seconds
    room.take("b", 1000, LIMITS)
    assert (room.held, room.of("a"), room.of("b")) == (3000, 2000, 1000)
    room.give_back("a", 2000)
    room.give_back("b", 1000)
    assert (room.held, room.of("a"), room.of("b")) == (0, 0, 0)


def test_without_settings_the_bounds_follow_the_largest_body() -> None:
    limits = GatewayConfig(max_body=1000)
    assert (limits.most_body_bytes, limits.most_body_bytes_of_a_tenant) == (8000, 2000)


def test_what_is_announced_is_taken_at_once_and_what_is_not_as_it_comes() -> None:
    bodies = LargeBodies()
    announced, chunked = bodies.open("a", CHAT, LIMITS, 700), bodies.open("a", CHAT, LIMITS)
    assert bodies.room.held == 700
    chunked.append(b"x" * 300)
    announced.append(b"x" * 700)
    assert bodies.room.held == 1000
    for body in (announced, chunked, announced):
        body.close()
    assert bodies.room.held == 0


def test_a_part_too_many_is_refused_and_nothing_of_it_is_kept() -> None:
    bodies = LargeBodies()
    body = bodies.open("a", CHAT, LIMITS)
    body.append(b"x" * 999)
    with pytest.raises(BodyTooLarge, match="1000"):
        body.append(b"xx")
    assert (body.size, bodies.room.held) == (999, 999)
    body.close()
    assert bodies.room.held == 0


def test_a_path_that_takes_no_body_takes_no_large_one() -> None:
    with pytest.raises(MalformedRequest):
        LargeBodies().open("a", GET_RESPONSE, LIMITS, 500)


def read_body(raw: bytes) -> LargeBody:
    """One whose fields have been read."""
    body = LargeBodies(InlineReader()).open("a", CHAT, GatewayConfig())
    for at in range(0, len(raw), LARGE_BYTES):
        body.append(raw[at : at + LARGE_BYTES])
    body.read(None, lambda: None)
    body.result()
    return body


@pytest.mark.parametrize("engine_model", ["m", "another"])
def test_no_step_handles_more_than_a_part_however_large_the_body(engine_model: str) -> None:
    raw = json.dumps(
        {"model": "m", "stream": True, "messages": [{"role": "user", "content": "x" * 3_000_000}]}
    ).encode()
    body = read_body(raw)
    if not body.fits(engine_model, ("cache_salt",), ask_usage=True):
        body.make_way(("cache_salt",), ask_usage=True, on_done=lambda: None)
        body.way_made()
    pieces = body.pieces(engine_model, {"cache_salt": "s"}, ask_usage=True)
    told, sent = pieces.length, []
    while piece := pieces.take():
        sent.append(piece)
    whole = b"".join(sent)
    assert len(whole) == told > 3_000_000
    assert json.loads(whole)["model"] == engine_model
    assert body.sent
    assert body.largest_step <= LARGE_BYTES
    assert max(map(len, sent)) <= PIECE_BYTES + 1024
    body.close()


def test_what_was_given_back_is_not_sent() -> None:
    body = read_body(b'{"model":"m"}' + b" " * 300_000)
    pieces = body.pieces("m", {}, ask_usage=True)
    assert pieces.take()
    body.close()
    assert pieces.take() is None


def test_what_was_sent_to_its_end_is_at_its_end_also_when_it_is_given_back() -> None:
    body = read_body(b'{"model":"m"}' + b" " * 300_000)
    pieces = body.pieces("m", {}, ask_usage=True)
    while not body.sent:
        assert pieces.take()
    body.close()
    assert pieces.take() == b""


def test_one_that_is_closed_while_it_is_read_is_told_nothing() -> None:
    reader, told = InlineReader(at_once=False), []
    body = LargeBodies(reader).open("a", CHAT, GatewayConfig())
    body.append(b'{"model":"m"}')
    body.read(None, lambda: told.append("read"))
    body.close()
    reader.work()
    assert told == []


def test_another_engine_gets_the_body_from_its_beginning_and_under_its_own_name() -> None:
    body = read_body(b'{"model":"m","messages":[]}')
    assert not body.fits("first", (), ask_usage=True)
    body.make_way((), ask_usage=True, on_done=lambda: None)
    body.way_made()
    for name in ("first", "second", "m"):
        assert body.fits(name, (), ask_usage=True), "written once, for all of them"
        first = body.pieces(name, {}, ask_usage=True).take()
        assert first is not None
        assert json.loads(first) == {"model": name, "messages": []}
    body.close()


def open_files() -> set[int]:
    """The inodes of this process's open files."""
    inodes = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of the listing itself
            inodes.add(link.stat().st_ino)
    return inodes


@pytest.mark.parametrize("taken", [True, False])
def test_a_body_that_was_written_anew_is_held_once_and_not_kept(taken: bool) -> None:
    reader = InlineReader(at_once=False)
    body = LargeBodies(reader).open("a", CHAT, GatewayConfig())
    body.append(b'{"model":"m","messages":[]}')
    body.read(None, lambda: None)
    (ticket,) = reader.tickets
    came = os.fstat(ticket.file).st_ino
    reader.work()
    body.result()
    body.make_way((), ask_usage=True, on_done=lambda: None)
    (ticket,) = reader.tickets
    reader.work()
    assert ticket.written is not None
    written = os.fstat(ticket.written).st_ino
    if taken:
        body.way_made()
        assert open_files() & {came, written} == {written}
    body.close()
    assert not open_files() & {came, written}


def test_a_body_without_other_fields_is_an_object_still() -> None:
    body = read_body(b'{"model":"m","cache_salt":"mine"}')
    body.make_way(("cache_salt",), ask_usage=True, on_done=lambda: None)
    body.way_made()
    whole = body.pieces("m", {}, ask_usage=True).take()
    assert whole is not None
    assert json.loads(whole) == {"model": "m"}
    body.close()
