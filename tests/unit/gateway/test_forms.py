from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import MalformedRequest
from gateway.forms import MAX_PARTS, Part, field, read_form, write_form
from gateway.request import Form, outgoing_body, read_request
from gateway.surface import ROUTES

AUDIO = ROUTES["/v1/audio/transcriptions"]
TYPE = b"multipart/form-data; boundary=b"

names = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=8)
parts = st.lists(
    st.builds(
        Part,
        name=names,
        value=st.binary(max_size=200).filter(lambda v: b"\r\n--b" not in v and not v.startswith(b"--b")),
        filename=st.none() | names,
        content_type=st.none() | st.just("audio/wav"),
    ),
    min_size=1,
    max_size=6,
).map(tuple)


@given(parts)
def test_what_is_written_is_read_again(written: tuple[Part, ...]) -> None:
    assert read_form(write_form(written, b"b"), TYPE) == written


@given(st.binary(max_size=300))
def test_bytes_of_any_kind_are_a_form_or_refused(raw: bytes) -> None:
    for body in (
        raw,
        b"--b\r\n" + raw,
        b'--b\r\ncontent-disposition: form-data; name="x"\r\n\r\n' + raw + b"\r\n--b--",
    ):
        try:
            read_form(body, TYPE)
        except MalformedRequest:
            continue


@pytest.mark.parametrize(
    "content_type",
    [None, b"", b"application/json", b"multipart/form-data", b"multipart/form-data; boundary=" + b"x" * 71],
)
def test_what_is_no_form_by_its_type_is_refused(content_type: bytes | None) -> None:
    with pytest.raises(MalformedRequest):
        read_form(b"--b--\r\n", content_type)


def test_a_form_that_stops_in_the_middle_is_refused() -> None:
    whole = write_form((Part("model", b"m"), Part("file", b"x" * 100, "a.wav")), b"b")
    for end in range(len(whole) - 4):
        with pytest.raises(MalformedRequest):
            read_form(whole[:end], TYPE)


def test_the_number_of_parts_is_bounded() -> None:
    many = tuple(Part(f"n{i}", b"") for i in range(MAX_PARTS + 1))
    with pytest.raises(MalformedRequest, match=str(MAX_PARTS)):
        read_form(write_form(many, b"b"), TYPE)


def test_names_cannot_break_out_of_their_header() -> None:
    part = Part("file", b"x", 'a"\r\nx-evil: 1\\', "audio/wav\r\nx: y")
    (read,) = read_form(write_form((part,), b"b"), TYPE)
    assert read.filename == "a___x-evil: 1_"
    assert read.content_type == "audio/wav__x: y"


def test_a_field_that_comes_twice_or_is_a_file_is_refused() -> None:
    for given_parts in (
        (Part("model", b"a"), Part("model", b"b")),
        (Part("model", b"a", "a.txt"),),
        (Part("model", b"\xff"),),
    ):
        with pytest.raises(MalformedRequest):
            field(given_parts, "model")


@pytest.mark.parametrize("stream", [True, False])
def test_the_engine_gets_its_own_name_for_the_model_and_is_asked_for_usage(stream: bool) -> None:
    sent = (Part("file", b"sound", "a.wav"), Part("model", b"m"), Part("stream", b"true" if stream else b"false"))
    raw = write_form(sent, b"b")
    body = read_request(AUDIO, raw, TYPE)
    assert isinstance(body, Form)
    assert (body.model, body.stream, body.wants_usage) == ("m", stream, False)
    got = read_form(outgoing_body(raw, body, engine_model="engine"), body.content_type.encode())
    assert [p.name for p in got] == ["model", *(["stream_include_usage"] if stream else []), "file", "stream"]
    assert got[0].value == b"engine"
