"""What the gateway asks of the process that reads large bodies, and what that answers. Pure: bytes in, small values out.

The work is done by `gateway.request`'s own functions on the whole body, so that a large body is read, refused and rewritten as a small one
is. Of what they find only as much goes back as the gateway decides by, and every part of that is bounded.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET
from msgspec.structs import replace

from gateway.admission.affinity import beginning_of
from gateway.errors import MalformedRequest
from gateway.request import Body, Form, read_request, rest_of
from gateway.surface import ROUTES

_WORD_CHARS = 4096  # of a name or an id: longer ones are nobody's
_MOST_TOKENS = 2**53
_NOTHING_TO_COUNT = msgspec.Raw(b"null")


class Summary(Body, frozen=True):
    """What a JSON body's fields come to, for whoever decides about it: a Body whose fields are bounded. It says nothing of how to rewrite it."""

    counted: int = 1
    alone: bool = True

    @property
    def sequences(self) -> int:
        """As in the whole body."""
        return self.counted

    @property
    def single_choice(self) -> bool:
        """As in the whole body."""
        return self.alone


class ReadJob(msgspec.Struct, frozen=True, tag="read"):
    """Read the body of a request to `path`."""

    path: str
    content_type: str | None = None


class WriteJob(msgspec.Struct, frozen=True, tag="write"):
    """Write the body without its model and the fields `without`, which the gateway says in front of it (`gateway.request.rest_of`).

    `boundary` is what the reading of a form has told.
    """

    path: str
    content_type: str | None
    boundary: bytes
    without: tuple[str, ...]
    ask_usage: bool


Job = ReadJob | WriteJob


class Read(msgspec.Struct, frozen=True, tag="read"):
    """A good body. `fields` is a Summary, or for a form a Form without parts. `first` is where its `{` is; `beginning` is of its prompt."""

    fields: msgspec.Raw
    first: int
    beginning: bytes

    def body(self, *, form: bool) -> Body:
        """The fields as a value."""
        return msgspec.json.decode(self.fields, type=Form if form else Summary)


class Written(msgspec.Struct, frozen=True, tag="written"):
    """The body is written, into the file that comes with this."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The body is not what the route takes."""

    message: str
    param: str | None


class TooMuch(msgspec.Struct, frozen=True, tag="too much"):
    """The body takes more memory than a reader has."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """A fault of our own; the log has it."""


Answer = Read | Written | Refused | TooMuch | Failed

encode = msgspec.json.Encoder().encode
decode_job = msgspec.json.Decoder(Job).decode
decode_answer = msgspec.json.Decoder(Answer).decode


def carry_out(job: Job, raw: bytes) -> tuple[Answer, bytes]:
    """The answer, and for a WriteJob the body anew."""
    route = ROUTES[job.path]
    content_type = job.content_type.encode("latin-1") if job.content_type is not None else None
    try:
        body = read_request(route, raw, content_type)
        if isinstance(job, ReadJob):
            return Read(msgspec.Raw(encode(summary(body))), raw.find(b"{"), beginning_of(raw)), b""
        if isinstance(body, Form):
            body = replace(body, boundary=job.boundary)
        return Written(), rest_of(raw, body, without=job.without, ask_usage=job.ask_usage)
    except MalformedRequest as error:
        return Refused(error.message[:_WORD_CHARS], _bounded(error.param)), b""
    except MemoryError:
        return TooMuch(), b""


def summary(body: Body) -> Body:
    """`body` with every field bounded; its properties are the same, and so is which fields were sent."""
    if isinstance(body, Form):
        return replace(body, model=_bounded(body.model), parts=(), prompt=_NOTHING_TO_COUNT)
    return Summary(
        model=_bounded(body.model),
        stream=body.stream,
        stream_options=UNSET if body.stream_options is UNSET else {"include_usage": body.wants_usage},
        max_tokens=_amount(body.max_tokens),
        max_completion_tokens=_amount(body.max_completion_tokens),
        max_output_tokens=_amount(body.max_output_tokens),
        prompt=_NOTHING_TO_COUNT,
        previous_response_id=None if body.previous_response_id is None else _bounded(str(body.previous_response_id)),
        background=body.background is True or None,
        request_id=_sent(body.request_id),
        cache_salt=_sent(body.cache_salt),
        priority=_sent(body.priority),
        counted=body.sequences,
        alone=body.single_choice,
    )


def _bounded(word: str | None) -> str | None:
    return word[:_WORD_CHARS] if word is not None else None


def _amount(value: Any) -> Any:
    """Admission goes by whether it is there, whether it is a number, and how large that is."""
    if value is None or value is UNSET:
        return value
    return max(-1, min(int(value), _MOST_TOKENS)) if isinstance(value, int) else ""


def _sent(value: Any) -> Any:
    return UNSET if value is UNSET else None
