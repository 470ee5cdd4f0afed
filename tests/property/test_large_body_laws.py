"""A large body comes to the same as a small one: what is decided by, what an engine gets, and what is wrong with it, byte for byte."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from gateway.admission.affinity import beginning_of, key_of, prefix_key
from gateway.config import GatewayConfig
from gateway.errors import MalformedRequest
from gateway.forms import Part, write_form
from gateway.large_bodies import LargeBodies, LargeBody
from gateway.large_bodies.testing import InlineReader
from gateway.request import Body, Form, Route, outgoing_body, read_request
from gateway.surface import ROUTES

CHAT, RESPONSES = ROUTES["/v1/chat/completions"], ROUTES["/v1/responses"]
AUDIO = ROUTES["/v1/audio/transcriptions"]
LIMITS = GatewayConfig()

NAMES = (
    *("model", "stream", "stream_options", "n", "max_tokens", "max_completion_tokens", "max_output_tokens", "prompt"),
    *("messages", "input", "previous_response_id", "background", "request_id", "cache_salt", "priority", "more"),
)
SIMPLE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    2,
    -3,
    2**70,
    1.5,
    "",
    "m",
    "mm",
    "\u00e9\n",
    [],
    {},
    [1],
    ["a", "b"],
    [[1], [2]],
    {"include_usage": True},
)
LIKELY: Mapping[str, tuple[Any, ...]] = {
    "model": ("m", "m", "mm", ""),
    "stream": (True, False, None),
    "stream_options": (None, {}, {"include_usage": True}, {"include_usage": False, "more": 1}),
    "prompt": ("text", ["a", "b", "c"], [[1, 2], [3]], [1, 2], []),
    "n": (1, 2, 3, 0, None, "x", 1.0, True),
}


def written(chance: random.Random) -> str:
    """An object as it may stand in a body: members in any order, names twice or with escapes, and space in between."""
    members = ['"model":"m"'] if chance.random() < 0.7 else []
    for name in chance.choices(NAMES, k=chance.randrange(9)):
        value = chance.choice(LIKELY.get(name, SIMPLE) if chance.random() < 0.8 else SIMPLE)
        key = json.dumps(name) if chance.random() < 0.8 else '"' + "".join(f"\\u{ord(c):04x}" for c in name) + '"'
        before, middle, after = chance.choices(("", "", " ", "\n\t"), k=3)
        members.append(f"{before}{key}{middle}:{json.dumps(value)}{after}")
    chance.shuffle(members)
    start = chance.choice(("", "", "", " \r\n", "\ufeff"))
    return f"{start}{{{','.join(members)}}}{chance.choice(('', ' '))}"


def any_body(chance: random.Random) -> bytes:
    """Mostly a good one; else cut off, with a wrong byte, without an end to its depth, or nothing of the kind."""
    raw = written(chance).encode()
    kind = chance.random()
    if kind < 0.1:
        return raw[: chance.randrange(len(raw) + 1)]
    if kind < 0.2:
        at = chance.randrange(len(raw))
        return raw[:at] + chance.randbytes(1) + raw[at + 1 :]
    if kind < 0.22:
        return b'{"model":"m","more":' + b"[" * chance.choice((10, 100_000))
    return chance.choice((b"", b" ", b"[]", b"null", b"{}", b'"x"')) if kind < 0.25 else raw


def held(raw: bytes, route: Route, cuts: list[int]) -> LargeBody:
    """`raw` as a large body that came in parts."""
    body = LargeBodies(InlineReader()).open("a", route, LIMITS)
    edges = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    for start, end in itertools.pairwise(edges):
        body.append(raw[start:end])
    if not raw:
        body.append(b"")
    return body


def made_way(body: LargeBody, engine_model: str, names: Collection[str], *, asks: bool = True) -> bool:
    """Make the body one that an engine can have; whether it was written anew for that."""
    if body.fits(engine_model, names, ask_usage=asks):
        return False
    body.make_way(names, ask_usage=asks, on_done=lambda: None)
    body.way_made()
    assert body.fits(engine_model, names, ask_usage=asks)
    return True


def sent(body: LargeBody, engine_model: str, sets: Mapping[str, Any], *, asks: bool = True) -> bytes:
    pieces = body.pieces(engine_model, sets, ask_usage=asks)
    whole = b"".join(iter(lambda: pieces.take() or b"", b""))
    assert len(whole) == pieces.length
    return whole


def members(raw: bytes) -> list[tuple[str, str]]:
    """Name and value of every member of the object, also of those whose name is there twice. Text may be of bytes that are not UTF-8."""
    pairs: list[tuple[str, Any]] = json.loads(
        raw.decode("latin-1"), strict=False, object_pairs_hook=lambda pairs: pairs
    )
    return [(name, repr(value)) for name, value in pairs]


def decided(body: Body, route: Route) -> tuple[object, ...]:
    """All that the gateway goes by."""
    most = body.most_output(route.path)
    return (
        body.model,
        body.stream,
        body.wants_usage,
        body.sequences,
        body.single_choice,
        body.background is True,
        body.previous_response_id is None or str(body.previous_response_id),
        None if most is None else max(-1, min(int(most), 2**53)) if isinstance(most, int) else "",
    )


def refusal(ask: Callable[[], object]) -> tuple[str, str | None] | None:
    """What is wrong, if anything is."""
    try:
        ask()
    except MalformedRequest as error:
        return error.message, error.param
    return None


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_json_of_any_kind(seed: int) -> None:
    chance = random.Random(seed)
    raw, route = any_body(chance), chance.choice((CHAT, RESPONSES))
    large = held(raw, route, [chance.randrange(1000) for _ in range(chance.randrange(4))])
    large.read(None, lambda: None)
    wrong = refusal(lambda: read_request(route, raw, None))
    assert refusal(large.result) == wrong
    if wrong is None:
        small = read_request(route, raw, None)
        body, beginning = large.result()
        assert decided(body, route) == decided(small, route)
        assert beginning == beginning_of(raw)
        asks = chance.random() < 0.5
        sets = {name: value for name, value in (("cache_salt", "s"), ("max_tokens", 9)) if chance.random() < 0.5}
        for engine_model in (small.model or "", "another"):
            write = partial(outgoing_body, raw, small, engine_model=engine_model, sets=sets, ask_usage=asks)
            unwritable = refusal(write)
            assert refusal(partial(made_way, large, engine_model, sets, asks=asks)) == unwritable
            if unwritable is None:
                small_one, large_one = write(), sent(large, engine_model, sets, asks=asks)
                assert large_one == small_one or sorted(members(large_one)) == sorted(members(small_one))
    large.close()


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_forms(seed: int) -> None:
    chance = random.Random(seed)
    names = chance.choices(("file", "stream", "language", "model"), k=chance.randrange(4))
    values = [chance.choice((b"true", b"m", chance.randbytes(40))) for _ in names]
    parts = [Part(name, value, "a.wav" if name == "file" else None) for name, value in zip(names, values, strict=True)]
    raw, content_type = write_form((Part("model", b"m"), *parts), b"edge"), b"multipart/form-data; boundary=edge"
    large = held(raw, AUDIO, [7])
    large.read(content_type, lambda: None)
    wrong = refusal(lambda: read_request(AUDIO, raw, content_type))
    assert refusal(large.result) == wrong
    if wrong is None:
        small, (body, _) = read_request(AUDIO, raw, content_type), large.result()
        assert isinstance(body, Form)
        assert isinstance(small, Form)
        assert decided(body, AUDIO) == decided(small, AUDIO)
        assert made_way(large, "engine", ())
        assert sent(large, "engine", {}) == outgoing_body(
            raw, replace(small, boundary=body.boundary), engine_model="engine"
        )
    large.close()


@settings(deadline=None)
@given(st.binary(max_size=3000), st.sampled_from([b'"messages"', b'"prompt"', b'"input"', b""]), st.text(max_size=3))
def test_affinity_goes_by_the_same_beginning(noise: bytes, word: bytes, tenant: str) -> None:
    raw = noise[: len(noise) // 2] + word + noise[len(noise) // 2 :]
    assert key_of(tenant, beginning_of(raw)) == prefix_key(tenant, raw)
