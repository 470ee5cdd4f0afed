"""What the gateway reads of a request and changes in it. Pure: bytes in, values or RequestError out.

The body is scanned once by msgspec, which checks that it is JSON and builds only the few fields below; messages, prompts and
images stay bytes. (A body of 4.7 MB of token ids takes 8 ms this way, and 91 ms with `json`: other streams share the thread.)
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from gateway.errors import BodyTooLarge, MalformedRequest
from gateway.forms import Part, field, new_boundary, read_form, write_form, write_parts
from gateway.surface import ROUTES, Route, Task

__all__ = [
    "PASSED_ON",
    "ROUTES",
    "Body",
    "Form",
    "Route",
    "Task",
    "beginning_for",
    "check_head",
    "credentials",
    "front_of",
    "outgoing_body",
    "parse_body",
    "read_request",
    "request_id",
    "rest_of",
    "too_large",
    "wrong_value",
]

REQUEST_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:+/=~-]{0,127}")
# Client headers that engines get. A list of what passes, not of what does not: credentials and hop-by-hop headers stay out by themselves.
PASSED_ON = (b"traceparent", b"tracestate")

_SEVERAL_PROMPTS = re.compile(rb'\s*\[\s*[\["]')


class Body(msgspec.Struct, frozen=True):
    """The fields of a request body that the gateway cares for."""

    model: str | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | UnsetType | None = UNSET
    n: Any = 1
    max_tokens: Any = UNSET
    max_completion_tokens: Any = UNSET
    max_output_tokens: Any = UNSET
    prompt: msgspec.Raw = msgspec.Raw(b"")
    previous_response_id: Any = None
    background: Any = None
    request_id: Any = UNSET
    cache_salt: Any = UNSET
    priority: Any = UNSET

    @property
    def content_type(self) -> str:
        """What the engine is told of the body's type."""
        return "application/json"

    @property
    def wants_usage(self) -> bool:
        """Whether the client itself asked for the usage chunk."""
        return bool(self.stream_options and self.stream_options.get("include_usage"))

    def most_output(self, path: str) -> Any:
        """How long the client lets an answer be, by the name that the API at `path` has for it; None where it does not say."""
        told = self.max_output_tokens if path == "/v1/responses" else self.max_tokens
        if path == "/v1/chat/completions" and self.max_completion_tokens not in (None, UNSET):
            told = self.max_completion_tokens
        return None if told is UNSET else told

    @property
    def sequences(self) -> int:
        """How many sequences the engine runs for this request: `n` for each prompt."""
        each = self.n if isinstance(self.n, int) and self.n >= 1 else 1
        prompts = len(_decode_list(self.prompt)) if _SEVERAL_PROMPTS.match(self.prompt) else 1
        return max(1, each * prompts)

    @property
    def single_choice(self) -> bool:
        """Whether a stream holds one sequence, so that gaps between its events are gaps between its tokens."""
        return self.n in (1, None) and not _SEVERAL_PROMPTS.match(bytes(self.prompt)[:64])


_decode_body = msgspec.json.Decoder(Body).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_AT_BYTE = re.compile(r"^(?:JSON is malformed: )?(.*?)(?: \(byte (\d+)\))?$", re.DOTALL)
_AT_FIELD = re.compile(r"^(.*?)(?: - at `\$\.?([^`]*)`)?$", re.DOTALL)


def parse_body(raw: bytes) -> Body:
    """Read the body of a request.

    Raises MalformedRequest, with line and column where it is not JSON, or with the field that is of the wrong type or missing.
    """
    if not raw.strip():
        raise MalformedRequest("The request has no body; send a JSON object.")
    try:
        body = _decode_body(raw)
    except msgspec.ValidationError as error:
        what, where = _groups(_AT_FIELD, str(error))
        if not where:
            raise MalformedRequest(f"The body must be a JSON object: {what[:1].lower()}{what[1:]}.") from error
        raise MalformedRequest(f"{what}, in `{where}`.", param=where) from error
    except msgspec.DecodeError as error:
        raise MalformedRequest(_not_json(str(error), raw)) from error
    except UnicodeDecodeError as error:
        raise MalformedRequest("The body is not valid JSON: it has text that is not UTF-8.") from error
    except RecursionError as error:
        raise MalformedRequest("The body is nested too deeply.") from error
    if not body.model:
        raise MalformedRequest(
            "The field `model` is missing; GET /v1/models lists the models you may use.", param="model"
        )
    return body


def _not_json(problem: str, raw: bytes) -> str:
    what, at = _groups(_AT_BYTE, problem)
    position = int(at) if at else len(raw)
    line = raw.count(b"\n", 0, position) + 1
    column = position - (raw.rfind(b"\n", 0, position) + 1) + 1
    what = "it ends too early" if "truncated" in what else what
    return f"The body is not valid JSON: {what}, at line {line}, column {column} (byte {position})."


def _groups(pattern: re.Pattern[str], text: str) -> tuple[str, str | None]:
    match = pattern.match(text)
    return (match.group(1), match.group(2)) if match else (text, None)


class Form(Body, frozen=True):
    """A multipart form, with what a JSON body has in fields of its own."""

    parts: tuple[Part, ...] = ()
    boundary: bytes = b""

    @property
    def content_type(self) -> str:
        """Its boundary is the gateway's own."""
        return f"multipart/form-data; boundary={self.boundary.decode()}"


_TRUE = frozenset(("true", "1", "yes", "on"))  # as pydantic, which reads it in the engine, has it
_FORM_USAGE = "stream_include_usage"  # vLLM's flat form of stream_options (0.32.0, speech_to_text/*/protocol.py)


def read_request(route: Route, raw: bytes, content_type: bytes | None) -> Body:
    """Read the body of a request to `route`. Raises MalformedRequest."""
    if route.body == "json":
        return parse_body(raw)
    if route.body == "none":
        return Body()
    parts = read_form(raw, content_type)
    if not (model := field(parts, "model")):
        raise MalformedRequest(
            "The field `model` is missing; GET /v1/models lists the models you may use.", param="model"
        )
    asked = (field(parts, _FORM_USAGE) or "").lower() in _TRUE
    streams = (field(parts, "stream") or "").lower() in _TRUE
    return Form(
        model=model, stream=streams, stream_options={"include_usage": asked}, parts=parts, boundary=new_boundary()
    )


_USAGE_FIRST = b'{"stream_options":{"include_usage":true},'
_encode = msgspec.json.Encoder().encode
_NOTHING: Mapping[str, Any] = {}


def outgoing_body(
    raw: bytes, body: Body, *, engine_model: str, sets: Mapping[str, Any] = _NOTHING, ask_usage: bool = True
) -> bytes:
    """The body as the engine gets it: its own name for the model, and for streams the usage chunk that metering needs.

    `sets` are further fields, whatever the client sent under these names. `ask_usage` is false for streams whose usage comes by itself.
    Everything else passes byte for byte, unless a field that the client sent has to be replaced.
    """
    if not raw:
        return raw  # the route takes no body
    if isinstance(body, Form):
        return _outgoing_form(body, engine_model)
    begin = beginning_for(body, engine_model=engine_model, sets=sets, ask_usage=ask_usage)
    if begin is None:
        return _rewritten(raw, body, engine_model, sets, ask_usage=ask_usage)
    return raw if begin == b"{" else begin + raw[raw.index(b"{") + 1 :]


def beginning_for(
    body: Body, *, engine_model: str, sets: Mapping[str, Any] = _NOTHING, ask_usage: bool = True
) -> bytes | None:
    """What the engine's body has in the place of the first `{`; None where something that the client sent has to give way."""
    usage = ask_usage and body.stream and not body.wants_usage
    if body.model != engine_model or (usage and body.stream_options is not UNSET):
        return None
    for name in sets:
        if getattr(body, name, None) is not UNSET:
            return None
    front = _USAGE_FIRST if usage else b"{"
    return front + _encode(sets)[1:-1] + b"," if sets else front


def rest_of(raw: bytes, body: Body, *, without: Collection[str], ask_usage: bool = True) -> bytes:
    """A body that stands behind `front_of`: all but the model and the fields `without`, which the gateway will say itself.

    With `front_of` it says what `outgoing_body` does; the order of members may be another. Raises MalformedRequest for names that are not UTF-8.
    """
    if isinstance(body, Form):
        return write_form(_passed(body), body.boundary)
    fields = {name: value for name, value in _fields(raw).items() if name != "model" and name not in without}
    _ask_usage(fields, body, ask_usage=ask_usage)
    return b"," + _encode(fields)[1:] if fields else b"}"


def front_of(body: Body, *, engine_model: str, sets: Mapping[str, Any] = _NOTHING) -> bytes:
    """What stands before `rest_of`. The names of `sets` have to be among those that it is without."""
    if isinstance(body, Form):
        return write_parts(_own(body, engine_model), body.boundary)
    return _encode({"model": engine_model} | dict(sets))[:-1]


def _fields(raw: bytes) -> dict[str, Any]:
    try:
        return dict(_decode_fields(raw))
    except UnicodeDecodeError as error:  # names that nobody asked for were skipped until here
        raise MalformedRequest("The body is not valid JSON: the name of a field is not UTF-8.") from error


def _ask_usage(fields: dict[str, Any], body: Body, *, ask_usage: bool) -> None:
    if ask_usage and body.stream and not body.wants_usage:
        fields["stream_options"] = (body.stream_options or {}) | {"include_usage": True}


def _rewritten(raw: bytes, body: Body, engine_model: str, sets: Mapping[str, Any], *, ask_usage: bool) -> bytes:
    """The body as an object anew: something that the client sent has to give way. Raises MalformedRequest for names that are not UTF-8."""
    fields = _fields(raw)
    fields["model"] = engine_model
    _ask_usage(fields, body, ask_usage=ask_usage)
    return _encode(fields | dict(sets))


def _outgoing_form(form: Form, engine_model: str) -> bytes:
    """The form anew, with the engine's name for the model."""
    return write_form((*_own(form, engine_model), *_passed(form)), form.boundary)


def _own(form: Form, engine_model: str) -> tuple[Part, ...]:
    """The parts that the gateway writes."""
    usage = (Part(_FORM_USAGE, b"true"),) if form.stream else ()
    return (Part("model", engine_model.encode()), *usage)


def _passed(form: Form) -> tuple[Part, ...]:
    """The parts that the client wrote, as far as they stay."""
    own = {part.name for part in _own(form, "")}
    return tuple(part for part in form.parts if part.name not in own)


def credentials(headers: Mapping[bytes, bytes]) -> bytes | None:
    """The value of `Authorization`, or what stands for it: Anthropic's clients send the key as `x-api-key`."""
    if (given := headers.get(b"authorization")) is not None:
        return given
    key = headers.get(b"x-api-key")
    return b"Bearer " + key if key else None


def request_id(offered: bytes | None) -> bytes:
    """The client's own id where it is a sane one, else a fresh one."""
    if offered is not None and REQUEST_ID.fullmatch(offered):
        return offered
    return b"req_" + secrets.token_hex(12).encode()


def check_head(headers: Mapping[bytes, bytes], *, max_body_bytes: int) -> int:
    """Refuse what can be refused before the body is read; the body's length, 0 where the head does not say.

    Names of headers are lower case, as ASGI has them. Raises BodyTooLarge or MalformedRequest.
    """
    length = int(headers.get(b"content-length", 0))
    if length > max_body_bytes:
        raise too_large(max_body_bytes, length)
    encoding = headers.get(b"content-encoding", b"identity")
    if encoding.lower() != b"identity":
        raise MalformedRequest(
            f"Request bodies must not be compressed (content-encoding {encoding[:40].decode('latin-1')!r})."
        )
    return length


def wrong_value(problems: Sequence[Mapping[str, Any]], *, skip: int = 0) -> MalformedRequest:
    """What pydantic found wrong, as clients are told: the first of it, with the field. `skip` leading parts of its place are not the field's."""
    first, *more = problems
    param = ".".join(str(part) for part in first["loc"][skip:]) or None
    also = f" (and {len(more)} more)" if more else ""
    return MalformedRequest(f"{first['msg']}{also}{f', in `{param}`' if param else ''}.", param=param)


def too_large(max_body_bytes: int, size: int | None = None) -> BodyTooLarge:
    """The refusal of a body, with the limit in it."""
    is_of = f"of {size} bytes " if size is not None else ""
    return BodyTooLarge(f"The body {is_of}is larger than the limit of {max_body_bytes} bytes (gateway.max_body).")


class RequestIds:
    """Ids as `request_id` gives them; the random bytes of many are drawn at once, since each draw is a system call."""

    def __init__(self, drawn_at_once: int = 256) -> None:
        self._drawn_at_once = drawn_at_once
        self._fresh: list[bytes] = []

    def of(self, offered: bytes | None) -> bytes:
        """The client's own id where it is a sane one, else a fresh one."""
        if offered is not None and REQUEST_ID.fullmatch(offered):
            return offered
        if not self._fresh:
            drawn = secrets.token_hex(12 * self._drawn_at_once)
            self._fresh = [b"req_" + drawn[at : at + 24].encode() for at in range(0, len(drawn), 24)]
        return self._fresh.pop()
