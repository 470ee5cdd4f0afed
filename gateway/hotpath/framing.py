"""HTTP/1.1 as the fast relay writes it. Pure: values in, bytes out.

What is read goes through llhttp; here are only the bytes that are written, and the one form of bytes that may be passed on unread.
"""

from __future__ import annotations

from functools import cache, lru_cache
from http import HTTPStatus

from gateway.error_map import Headers

LAST_CHUNK = b"0\r\n\r\n"
EVENTS_END = b"\n\n\r\n"  # the end of the last event of a chunk, and of the chunk
_LONGEST_PASSED = 16 * 2**10
_NEVER = b"\n"  # no chunk begins like this


@cache
def status_line(status: int) -> bytes:
    """`HTTP/1.1 200 OK` with its line end; an unknown status has no phrase."""
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


def chunk(data: bytes) -> bytes:
    """`data` as one chunk of a chunked body; nothing is no chunk, since an empty one would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def response_head(status: int, headers: Headers, *, keep_alive: bool) -> bytes:
    """Status line and headers, with the empty line. `headers` say how the body is framed."""
    lines = b"\r\n".join([b": ".join(header) for header in headers])
    return b"%b%b%b\r\n" % (status_line(status), lines, b"\r\n" if keep_alive else b"\r\nconnection: close\r\n")


@lru_cache(maxsize=256)
def request_prefix(host: str, path: str, secret: str | None) -> bytes:
    """The head of every request to `path` up to the id of the request. `secret` is what the engine wants to be shown."""
    shown = f"authorization: Bearer {secret}\r\n" if secret else ""
    return f"POST {path} HTTP/1.1\r\nhost: {host}\r\n{shown}content-type: application/json\r\nx-request-id: ".encode()


def request_head(prefix: bytes, request_id: bytes, further: Headers, body_bytes: int) -> bytes:
    """A request's head. Names and values of `further` come from a parsed head, so that no line end can be in them."""
    lines = b"".join([b"\r\n%b: %b" % header for header in further]) if further else b""
    return b"%b%b%b\r\ncontent-length: %d\r\n\r\n" % (prefix, request_id, lines, body_bytes)


def _prefix_of(length: int) -> bytes:
    for digits in range(1, 5):
        size = length - digits - 4
        if size > 0 and len(b"%x" % size) == digits:
            return b"%x\r\ndata: " % size
    return _NEVER


_PREFIXES: tuple[bytes, ...] = tuple(_prefix_of(length) for length in range(_LONGEST_PASSED))


def is_one_chunk_of_events(data: bytes) -> bool:
    """Whether `data`, read where a chunk begins, is exactly one chunk that begins and ends with an event.

    The length of `data` tells what its size line has to be, in the one way that we write sizes ourselves; such bytes can
    be passed on as they are, and a parser that is not shown them is where it was.
    """
    length = len(data)
    return length < _LONGEST_PASSED and data.startswith(_PREFIXES[length]) and data.endswith(EVENTS_END)
