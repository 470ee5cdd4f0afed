"""An engine of fifty lines, standard library only: answers on a Unix socket, and misbehaves when told to.

    script_engine.py SOCKET [--eat MIB] [--child] [--stubborn] [--die WORDS] [--take SECONDS]

`--eat` takes that much memory with the first real request, `--child` starts a process that would outlive it, `--stubborn`
ignores SIGTERM, `--die` writes WORDS to standard error and ends with code 3,
`--take` lets every answer take so long.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socketserver
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler

parser = argparse.ArgumentParser()
parser.add_argument("socket")
parser.add_argument("--eat", type=int, default=0)
parser.add_argument("--child", action="store_true")
parser.add_argument("--stubborn", action="store_true")
parser.add_argument("--die", default="")
parser.add_argument("--take", type=float, default=0.0)
options, _ = parser.parse_known_args()
eaten: list[bytearray] = []


class Handler(BaseHTTPRequestHandler):
    def address_string(self) -> str:
        return "unix"

    def answer(self, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer({})
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        if options.eat and not eaten:
            eaten.append(bytearray(os.urandom(1) * (options.eat * 2**20)))
        threading.Event().wait(options.take)
        self.answer({"choices": [{"text": "x"}]})


if options.die:
    sys.stderr.write(options.die + "\n")
    sys.exit(3)
if options.stubborn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if options.child:
    script = "import os, sys, time; print('child', os.getpid(), sorted(os.sched_getaffinity(0)), flush=True); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", script])
sys.stdout.write(f"engine {os.getpid()} {sorted(os.sched_getaffinity(0))}\n")
sys.stdout.flush()
with socketserver.ThreadingUnixStreamServer(options.socket, Handler) as server:  # type: ignore[arg-type]
    server.serve_forever()
