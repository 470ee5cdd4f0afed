"""The process that reads large bodies: `python -m gateway.large_bodies.reader FD MEMORY`, started by the gateway with one end of a socket.

It takes one job at a time, with the body as a file in memory, and ends when the gateway's end of the socket is closed, however the
gateway ended. It gives way to everything else on the machine, and a body that needs more than MEMORY bytes is refused instead of
taking them.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import socket
import sys
import traceback

from gateway.giving_way import give_way
from gateway.large_bodies.jobs import Answer, Failed, TooMuch, carry_out, decode_job, encode

JOB_BYTES = 64 * 2**10
NICE = 5


def serve(line: socket.socket) -> None:
    """Carry out what is asked on `line`, until nobody can ask any more."""
    while True:
        words, files, _, _ = socket.recv_fds(line, JOB_BYTES, 1)
        if not words:
            return
        answer, written = _answer(words, files[0])
        with contextlib.ExitStack() as opened:
            out = [opened.enter_context(_file_of(written)).fileno()] if written else []
            socket.send_fds(line, [encode(answer)], out)


def _answer(words: bytes, file: int) -> tuple[Answer, bytes]:
    try:
        return carry_out(decode_job(words), _contents(file))
    except MemoryError:
        return TooMuch(), b""
    except Exception:  # noqa: BLE001  # what one body does to it must not take the others along
        traceback.print_exc()
        return Failed(), b""
    finally:
        os.close(file)


def _contents(file: int) -> bytes:
    with open(file, "rb", buffering=0, closefd=False) as whole:
        whole.seek(0)  # where the gateway's writing left it
        return whole.read()


def _file_of(data: bytes) -> io.FileIO:
    file = io.FileIO(os.memfd_create("sliceway-body", os.MFD_CLOEXEC), "wb")
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
    return file


def main() -> None:
    """Serve the socket that was handed over."""
    descriptor, memory_bytes = int(sys.argv[1]), int(sys.argv[2])
    give_way(NICE)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    for ended_by_gateway in (signal.SIGINT, signal.SIGTERM):  # which drains first, and needs this process for that
        signal.signal(ended_by_gateway, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as line, contextlib.suppress(ConnectionError):
        serve(line)


if __name__ == "__main__":
    main()
