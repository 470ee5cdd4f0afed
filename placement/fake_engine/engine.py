"""One simulated engine: its behaviour, its counters, its routes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from aiohttp import web

from placement.engine_guard import credential, shows
from placement.fake_engine.other_routes import OtherRoutes
from placement.fake_engine.samples import finish_of, logprobs_of, pieces_of, tool_call_of
from placement.fake_engine.shapes import (
    ChatShapes,
    CompletionShapes,
    count_tokens,
    event,
    prompt_tokens_of,
    unit_vector,
)

log = logging.getLogger("fake_engine")

FIRST_CREATED = 1_700_000_000  # a fixed time keeps the bytes of two runs equal
MAX_BODY_BYTES = 256 * 2**20

Shapes = ChatShapes | CompletionShapes


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How a simulated engine answers. Times in seconds, counts in requests or tokens.

    `max_concurrency` requests run at once, the others wait in order (0: no bound). `fail_after` completed requests the
    process ends in the middle of the next answer; `hang_after` completed requests nothing is answered any more while
    `/health` stays 200, as a hung engine does. `error_status` answers every inference request with that status, worded as
    `error_shape` says. `events_per_write` puts that many events into one TCP segment. `secret` is asked for on every path,
    as `placement.engine_guard` does it in vLLM. With `sleep_mode` the endpoints of vLLM's are there, and falling asleep and waking
    take so long; with `wake_fails` it never wakes. With
    `prefix_cache` a prompt that came before with the same `cache_salt` is a hit, which a real engine's time to a first token shows.
    """

    names: tuple[str, ...]
    task: Literal["generate", "embed"] = "generate"
    ttft_seconds: float = 0.0
    itl_seconds: float = 0.0
    output_tokens: int = 16
    max_concurrency: int = 0
    max_model_len: int = 8192
    fail_after: int | None = None
    hang_after: int | None = None
    error_status: int | None = None
    error_message: str = "simulated error"
    error_shape: Literal["vllm", "plain", "detail", "html"] = "vllm"
    events_per_write: int = 1
    prefix_cache: bool = False
    gpu_memory_utilization: float | None = None
    kv_cache_memory_bytes: int | None = None
    secret: str | None = field(default=None, repr=False)
    sleep_mode: bool = False
    sleep_seconds: float = 0.0
    wake_seconds: float = 0.0
    wake_fails: bool = False


@dataclass(slots=True)
class State:
    """What the engine counts; `/fake/state` shows it."""

    running: int = 0
    most_running: int = 0
    waiting: int = 0
    started: int = 0
    served: int = 0
    aborted: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_hits: int = 0
    asleep: bool = False
    last_request: dict[str, Any] = field(default_factory=dict)


class RequestRefused(Exception):
    """An answer other than 200, worded the way vLLM words it."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


class FakeEngine:
    """One simulated engine. `app()` gives its HTTP application; `state` its counters."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self._prompts: set[str] = set()
        self.state = State()
        self._slots = asyncio.Semaphore(behaviour.max_concurrency) if behaviour.max_concurrency else None

    def app(self) -> web.Application:
        """A fresh application with all routes."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._errors])
        app.router.add_get("/health", self._health)
        app.router.add_get("/ping", self._health)
        app.router.add_get("/version", self._version)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/fake/state", self._show_state)
        app.router.add_post("/tokenize", self._tokenize)
        if self.behaviour.task == "generate":
            app.router.add_post("/v1/chat/completions", self._chat)
            app.router.add_post("/v1/completions", self._completions)
        else:
            app.router.add_post("/v1/embeddings", self._embeddings)
        if self.behaviour.sleep_mode:
            app.router.add_post("/sleep", self._sleep)
            app.router.add_post("/wake_up", self._wake_up)
            app.router.add_get("/is_sleeping", self._is_sleeping)
        OtherRoutes(self).add_to(app)
        return app

    # ---- routes that cost nothing

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "simulated", "simulated": True})

    async def _models(self, _: web.Request) -> web.Response:
        cards: list[dict[str, Any]] = [
            {
                "id": name,
                "object": "model",
                "created": FIRST_CREATED,
                "owned_by": "vllm",
                "root": self.behaviour.names[0],
                "parent": None,
                "max_model_len": self.behaviour.max_model_len,
                "permission": [],
            }
            for name in self.behaviour.names
        ]
        return web.json_response({"object": "list", "data": cards})

    async def _show_state(self, _: web.Request) -> web.Response:
        shown = {name: getattr(self.state, name) for name in State.__slots__}
        return web.json_response({"simulated": True, "pid": os.getpid()} | shown)

    async def _metrics(self, _: web.Request) -> web.Response:
        labels = f'{{model_name="{self.behaviour.names[0]}",engine="0"}}'
        rows = [
            ("num_requests_running", "gauge", self.state.running),
            ("num_requests_waiting", "gauge", self.state.waiting),
            ("kv_cache_usage_perc", "gauge", 0.0),
            ("prompt_tokens_total", "counter", self.state.prompt_tokens),
            ("generation_tokens_total", "counter", self.state.generation_tokens),
            ("iteration_tokens_total_count", "counter", self.state.generation_tokens),
        ]
        text = "".join(f"# TYPE vllm:{name} {kind}\nvllm:{name}{labels} {value}\n" for name, kind, value in rows)
        return web.Response(text=text + self._cache_config(), content_type="text/plain")

    def _cache_config(self) -> str:
        """The limits that vLLM tells of in the labels of one metric."""
        names = ("gpu_memory_utilization", "kv_cache_memory_bytes")
        labels = ",".join(f'{name}="{getattr(self.behaviour, name)}"' for name in names)
        return f'# TYPE vllm:cache_config_info gauge\nvllm:cache_config_info{{engine="0",{labels}}} 1.0\n'

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await self.body(request)
        count = prompt_tokens_of(body)
        return web.json_response(
            {"count": count, "max_model_len": self.behaviour.max_model_len, "tokens": list(range(count))}
        )

    # ---- sleep mode, with vLLM's VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode

    async def _sleep(self, request: web.Request) -> web.Response:
        level = request.query.get("level", "1")
        if level not in ("0", "1", "2"):
            return web.json_response({"detail": [{"loc": ["query", "level"], "type": "less_than_equal"}]}, status=422)
        await asyncio.sleep(self.behaviour.sleep_seconds)
        self.state.asleep = True
        return web.json_response({"status": "sleeping", "level": int(level)})

    async def _wake_up(self, _: web.Request) -> web.Response:
        await asyncio.sleep(self.behaviour.wake_seconds)
        if self.behaviour.wake_fails:
            raise RequestRefused(500, "simulated: CUDA out of memory while waking", "InternalServerError")
        self.state.asleep = False
        return web.json_response({"status": "awake", "tags": None})

    async def _is_sleeping(self, _: web.Request) -> web.Response:
        return web.json_response({"is_sleeping": self.state.asleep})

    # ---- inference

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, ChatShapes())

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, CompletionShapes())

    async def _generate(self, request: web.Request, shapes: Shapes) -> web.StreamResponse:
        body = await self.body(request)
        prompt_tokens = prompt_tokens_of(body)
        self._check_context(body, prompt_tokens)
        wanted = body.get("max_completion_tokens") or body.get("max_tokens") or self.behaviour.output_tokens
        pieces = pieces_of(body, min(int(wanted), self.behaviour.output_tokens))
        tokens = len(pieces)
        usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens + tokens, "completion_tokens": tokens}
        async with self.running(prompt_tokens):
            head = {
                "id": shapes.id_prefix + f"{self.state.started:016x}",
                "created": FIRST_CREATED,
                "model": body["model"],
            }
            if body.get("stream"):
                return await self._stream(request, body, shapes, head, usage, pieces)
            await self.think(self.behaviour.ttft_seconds)
            for _ in range(tokens - 1):
                await self.think(self.behaviour.itl_seconds)
            self.maybe_die()
            self.state.generation_tokens += tokens
            answer = shapes.whole("".join(pieces), finish_of(body))
            if body.get("logprobs") and isinstance(shapes, ChatShapes):
                answer["choices"][0]["logprobs"] = logprobs_of(pieces, int(body.get("top_logprobs") or 0))
            if (call := tool_call_of(body)) is not None:
                answer = shapes.calling(call)
            return web.json_response(head | answer | {"usage": usage})

    async def _stream(
        self,
        request: web.Request,
        body: dict[str, Any],
        shapes: Shapes,
        head: dict[str, Any],
        usage: dict[str, int],
        pieces: list[str],
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await self.think(self.behaviour.ttft_seconds)
        await response.prepare(request)
        tokens, held = usage["completion_tokens"], bytearray()
        for role in shapes.opening():
            held += event(head | role)
        if (call := tool_call_of(body)) is not None:
            held += event(head | shapes.call_part(call, None)) + event(head | shapes.call_part(None, "tool_calls"))
            tokens = 0
        for index in range(tokens):
            if index:
                await self.think(self.behaviour.itl_seconds)
            held += event(head | shapes.part(pieces[index], finish_of(body) if index == tokens - 1 else None))
            self.state.generation_tokens += 1
            if (index + 1) % self.behaviour.events_per_write == 0:
                await response.write(bytes(held))
                held.clear()
            if index >= tokens // 2:
                self.maybe_die()
        if (body.get("stream_options") or {}).get("include_usage"):
            held += event(head | shapes.closing() | {"usage": usage})
        await response.write(bytes(held) + b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _embeddings(self, request: web.Request) -> web.Response:
        body = await self.body(request)
        given = body.get("input")
        inputs = given if isinstance(given, list) else [given]
        prompt_tokens = sum(count_tokens(item) for item in inputs)
        self._check_context(body, max((count_tokens(item) for item in inputs), default=0))
        async with self.running(prompt_tokens):
            await self.think(self.behaviour.ttft_seconds)
            self.maybe_die()
            data = [
                {"object": "embedding", "index": i, "embedding": unit_vector(item)} for i, item in enumerate(inputs)
            ]
            usage = {
                "prompt_tokens": prompt_tokens,
                "total_tokens": prompt_tokens,
                "completion_tokens": 0,
                "prompt_tokens_details": None,
            }
            answer = {
                "id": f"embd-{self.state.served:016x}",
                "object": "list",
                "created": FIRST_CREATED,
                "model": body["model"],
            }
            return web.json_response(answer | {"data": data, "usage": usage})

    # ---- what inference shares

    async def body(self, request: web.Request) -> dict[str, Any]:
        """The JSON body of an inference request, remembered for `/fake/state`. Raises RequestRefused in vLLM's words."""
        raw = await request.read()
        try:
            body = json.loads(raw)
        except ValueError as error:
            raise RequestRefused(
                400,
                f"1 validation error:\n  {{'type': 'json_invalid', 'msg': 'JSON decode error: {error}'}}",
                "Bad Request",
            ) from error
        if not isinstance(body, dict):
            raise RequestRefused(
                400, "1 validation error:\n  {'type': 'model_attributes_type', 'loc': 'body'}", "Bad Request", "body"
            )
        self.state.last_request = {
            "path": request.path,
            "headers": dict(request.headers),
            "body": body if len(raw) < 65536 else None,
        }
        if self.behaviour.prefix_cache:
            prompt = json.dumps([body.get("cache_salt"), body.get("messages") or body.get("prompt")])
            self.state.prefix_hits += prompt in self._prompts
            self._prompts.add(prompt)
        if self.state.asleep:
            raise RequestRefused(503, "The engine sleeps.", "ServiceUnavailableError")
        if self.behaviour.error_status is not None:
            raise RequestRefused(self.behaviour.error_status, self.behaviour.error_message)
        name = body.setdefault("model", self.behaviour.names[0])
        if name not in self.behaviour.names:
            known = ", ".join(self.behaviour.names)
            raise RequestRefused(
                404, f"The model `{name}` does not exist. Valid aliases: {known}.", "NotFoundError", "model"
            )
        return body

    def _check_context(self, body: dict[str, Any], prompt_tokens: int) -> None:
        limit = self.behaviour.max_model_len
        wanted = body.get("max_completion_tokens") or body.get("max_tokens") or 0
        if prompt_tokens + wanted > limit:
            raise RequestRefused(
                400,
                f"This model's maximum context length is {limit} tokens. However, you requested {wanted} output tokens and your prompt contains "
                f"{prompt_tokens} input tokens, for a total of {prompt_tokens + wanted} tokens. Please reduce the length of the input prompt or "
                "the number of requested output tokens.",
                param="input_tokens",
            )

    @contextlib.asynccontextmanager
    async def running(self, prompt_tokens: int) -> AsyncIterator[None]:
        """Wait for a slot, be counted as running, and end as served, aborted (the client left) or failed."""
        state = self.state
        state.waiting += 1
        try:
            if self._slots is not None:
                await self._slots.acquire()
        except asyncio.CancelledError:
            state.aborted += 1
            raise
        finally:
            state.waiting -= 1
        state.running += 1
        state.most_running = max(state.most_running, state.running)
        state.started += 1
        state.prompt_tokens += prompt_tokens
        try:
            yield
            state.served += 1
        except (asyncio.CancelledError, ConnectionError):
            state.aborted += 1
            raise
        except BaseException:
            state.failed += 1
            raise
        finally:
            state.running -= 1
            if self._slots is not None:
                self._slots.release()

    async def think(self, seconds: float) -> None:
        """Take so long; for ever, once a hang was asked for."""
        if self.behaviour.hang_after is not None and self.state.served >= self.behaviour.hang_after:
            await asyncio.get_running_loop().create_future()
        await asyncio.sleep(seconds)

    def maybe_die(self) -> None:
        """End the process, once that was asked for."""
        if self.behaviour.fail_after is not None and self.state.served >= self.behaviour.fail_after:
            log.error("simulated engine: EngineCore encountered a fatal error (asked for by --fail-after)")
            os._exit(1)

    @web.middleware
    async def _errors(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if not self._may_ask(request):
            return web.json_response({"error": "Unauthorized"}, status=401)
        try:
            answer: web.StreamResponse = await handler(request)
            return answer
        except RequestRefused as refused:
            return self._worded(refused)
        except web.HTTPException as error:
            body = {"error": {"message": error.reason, "type": error.reason, "param": None, "code": error.status}}
            return web.json_response(
                body,
                status=error.status,
                headers={"allow": error.headers["allow"]} if "allow" in error.headers else None,
            )

    def _may_ask(self, request: web.Request) -> bool:
        if not self.behaviour.secret:
            return True
        told = request.headers.getall("authorization", [])
        return shows((value.encode(errors="surrogateescape") for value in told), credential(self.behaviour.secret))

    def _worded(self, refused: RequestRefused) -> web.Response:
        message = str(refused)
        match self.behaviour.error_shape:
            case "vllm":
                return web.json_response(refused.body, status=refused.status)
            case "plain":
                return web.json_response({"error": message}, status=refused.status)
            case "detail":
                return web.json_response(
                    {"detail": [{"loc": ["body", "messages"], "msg": message, "type": "value_error"}]},
                    status=refused.status,
                )
            case "html":
                page = f"<html><head><title>{message}</title></head><body><h1>{message}</h1></body></html>"
                return web.Response(text=page, status=refused.status, content_type="text/html")


@contextlib.asynccontextmanager
async def listening(
    engine: FakeEngine,
    *,
    uds: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    grace_seconds: float = 0.0,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[str]:
    """Serve `engine` on a Unix socket or a TCP port while the block runs; gives `unix:/path` or `http(s)://host:port`.

    `tls` is for TCP. Leaving aborts what is still running after `grace_seconds`. Raises OSError where it cannot listen.
    """
    runner = web.AppRunner(engine.app(), handler_cancellation=True, shutdown_timeout=grace_seconds, access_log=None)
    await runner.setup()
    try:
        if uds is not None:
            uds.unlink(missing_ok=True)
            await web.UnixSite(runner, uds).start()
            yield f"unix:{uds}"
        else:
            await web.TCPSite(runner, host, port, ssl_context=tls).start()
            yield f"http{'s' if tls else ''}://{host}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
