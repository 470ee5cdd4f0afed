"""Run by vLLM's own interpreter: its HTTP application with every route there is, and no engine behind it.

    ENGINE_API_KEY=... VLLM_SERVER_DEV_MODE=1 PYTHONPATH=GUARD PYTHON vllm_guard_probe.py MIDDLEWARE

The last line of output is JSON: `refused` and `allowed` are the statuses by method and path without the secret and with it, `sockets`
how a WebSocket without it ended. Routes that want an engine fail with the secret; that they are reached is what counts.
"""

from __future__ import annotations

import json
import os
import sys

from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

TASKS = ("generate", "embed", "score", "classify", "token_embed", "transcription", "realtime")
CHEAP = ("/version", "/openapi.json", "/ping")  # answered without an engine

arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", "none", "--middleware", sys.argv[1]])
app = build_app(arguments, TASKS, None)
client = TestClient(app, raise_server_exceptions=False)
routes = {(method, route.path) for route in app.routes for method in getattr(route, "methods", None) or ("GET",)}
routes |= {("OPTIONS", "/v1/models"), ("GET", "/no/such/path"), ("GET", "/metrics/"), ("POST", "/v1/../sleep")}
shown = {"authorization": f"Bearer {os.environ['ENGINE_API_KEY']}"}
try:
    with client.websocket_connect("/v1/realtime"):
        ended = "accepted"
except WebSocketDisconnect as error:
    ended = str(error.code)
told = {
    "refused": {f"{m} {p}": client.request(m, p, headers={"authorization": "Bearer x"}).status_code for m, p in routes},
    "allowed": {path: client.get(path, headers=shown).status_code for path in CHEAP},
    "socket": ended,
}
sys.stdout.write(json.dumps(told) + "\n")
