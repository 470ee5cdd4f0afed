from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import BodyTooLarge, MalformedRequest
from gateway.request import check_head, credentials, outgoing_body, parse_body, request_id

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), inner, max_size=4)
    ),
    max_leaves=12,
)
others = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
        lambda k: k not in ("model", "stream", "stream_options", "n", "prompt")
    ),
    json_values,
    max_size=6,
)


@given(
    others,
    st.sampled_from(["m", "engine"]),
    st.none() | st.booleans(),
    st.sampled_from([..., None, {}, {"include_usage": False}, {"include_usage": True, "x": 1}]),
    st.integers(0, 3),
)
def test_only_the_model_and_the_usage_option_change(
    other: dict[str, Any], engine_model: str, stream: bool | None, options: Any, place: int
) -> None:
    """Whatever else a body holds arrives as it was sent, in order, for every combination of what is changed."""
    given_body: dict[str, Any] = other | {"model": "m", "stream": stream}
    if options is not ...:
        given_body["stream_options"] = options
    items = list(given_body.items())
    given_body = dict(items[place:] + items[:place])
    raw = b" " * place + json.dumps(given_body).encode()
    body = parse_body(raw)
    got = json.loads(outgoing_body(raw, body, engine_model=engine_model))
    expected = given_body | {"model": engine_model}
    if stream:
        expected["stream_options"] = (given_body.get("stream_options") or {}) | {"include_usage": True}
    assert got == expected
    if engine_model == "m" and not stream:
        assert outgoing_body(raw, body, engine_model="m") is raw


def test_two_of_the_same_key_mean_the_last_one_here_and_in_the_engine() -> None:
    raw = b'{"model": "first", "model": "second", "stream": true, "stream_options": null}'
    body = parse_body(raw)
    assert body.model == "second"
    assert json.loads(outgoing_body(raw, body, engine_model="second"))["model"] == "second"


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b'{"model":\n\n  "m",}', "line 3, column 7 (byte 17)"),
        (b'{"a": "\n"}', "line 1, column 8 (byte 7)"),
        (b"{", "it ends too early, at line 1, column 2 (byte 1)"),
        (b"  \n ", "no body"),
        (b"hello", "line 1, column 1 (byte 0)"),
        (b'{"model": "m"} trailing', "trailing characters"),
        (b"\xef\xbb\xbf{}", "byte 0"),
        (b"null", "must be a JSON object"),
        (b'{"model": ""}', "`model` is missing"),
        (b'{"model": "m", "stream_options": []}', "in `stream_options`"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(raw: bytes, said: str) -> None:
    with pytest.raises(MalformedRequest) as caught:
        parse_body(raw)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "single"),
    [
        ({}, True),
        ({"n": 1}, True),
        ({"n": None}, True),
        ({"n": 2}, False),
        ({"prompt": "a"}, True),
        ({"prompt": [1, 2]}, True),
        ({"prompt": ["a", "b"]}, False),
        ({"prompt": [[1], [2]]}, False),
    ],
)
def test_streams_of_one_sequence_are_told_from_others(fields: dict[str, Any], single: bool) -> None:
    assert parse_body(json.dumps({"model": "m"} | fields, indent=1).encode()).single_choice == single


@pytest.mark.parametrize(
    "good", [b"abc", b"req_1", b"550e8400-e29b-41d4-a716-446655440000", b"a" * 128, b"trace/1:2=3+4~5.6"]
)
def test_sane_ids_are_kept(good: bytes) -> None:
    assert request_id(good) is good


@pytest.mark.parametrize("bad", [None, b"", b"a" * 129, b"a b", b"a\r\nx: y", b"-a", b"\xc3\xa4", b'"'])
def test_other_ids_are_replaced_by_fresh_ones(bad: bytes | None) -> None:
    assert request_id(bad) != request_id(bad)
    assert request_id(bad).startswith(b"req_")


def test_a_length_that_is_too_large_is_refused_with_both_numbers() -> None:
    with pytest.raises(BodyTooLarge, match=r"11 bytes .* 10 bytes"):
        check_head({b"content-length": b"11"}, max_body_bytes=10)
    check_head({b"content-length": b"10", b"content-encoding": b"Identity"}, max_body_bytes=10)


@pytest.mark.parametrize(
    "sent",
    [
        '{"model": "m"}',
        '{"model": "m", "cache_salt": "theirs", "priority": 9}',
        '{"cache_salt": "theirs", "model": "m", "cache_salt": "theirs, again"}',
        '{"model": "m", "cache_s\\u0061lt": "theirs"}',
        '{"model": "m", "cache_salt": null, "stream": true, "stream_options": {"x": 1}}',
    ],
)
@pytest.mark.parametrize("engine_model", ["m", "engine"])
def test_what_the_gateway_sets_goes_before_what_the_client_sent(sent: str, engine_model: str) -> None:
    """Once, under one name: an engine that takes the first of two, or the last, must find the same."""
    sets = {"cache_salt": "ours", "priority": 1}
    raw = sent.encode()
    got = outgoing_body(raw, parse_body(raw), engine_model=engine_model, sets=sets)
    names = json.loads(got, object_pairs_hook=lambda pairs: [name for name, _ in pairs])
    assert len(names) == len(set(names))
    assert json.loads(got) == json.loads(sent) | sets | {"model": engine_model} | (
        {"stream_options": {"x": 1, "include_usage": True}} if "stream_options" in sent else {}
    )


def test_a_key_is_taken_from_either_header() -> None:
    assert credentials({b"x-api-key": b"sk-1"}) == b"Bearer sk-1"
    assert credentials({b"x-api-key": b"sk-1", b"authorization": b"Bearer sk-2"}) == b"Bearer sk-2"
    assert credentials({b"x-api-key": b""}) is None
    assert credentials({}) is None


def test_text_that_is_not_utf_8_is_the_clients_fault_wherever_it_is_found() -> None:
    with pytest.raises(MalformedRequest, match="UTF-8"):
        parse_body(b'{"model":"m","stream_options":{"\xce":1}}')
    raw = b'{"model":"m","\xce":1}'
    with pytest.raises(MalformedRequest, match="UTF-8"):
        outgoing_body(raw, parse_body(raw), engine_model="another")
