"""The routes beside chat, completions and embeddings, in the shapes of vLLM 0.32.0."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from aiohttp import web

from placement.fake_engine.samples import pieces_of, tool_call_of
from placement.fake_engine.shapes import count_tokens, event, named_event, unit_vector, word

if TYPE_CHECKING:
    from placement.fake_engine.engine import FakeEngine

CREATED = 1_700_000_000


class OtherRoutes:
    """What `engine` serves beside its main routes. Stored responses lie here, as vLLM has them in one engine's memory."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._stored: dict[str, dict[str, Any]] = {}
        self._background: dict[str, asyncio.Task[None]] = {}

    def add_to(self, app: web.Application) -> None:
        """Add them, as far as the engine's task has them."""
        app.router.add_post("/detokenize", self._detokenize)
        if self._engine.behaviour.task == "generate":
            app.router.add_post("/v1/messages", self._messages)
            app.router.add_post("/v1/messages/count_tokens", self._count_tokens)
            app.router.add_post("/v1/responses", self._responses)
            app.router.add_get("/v1/responses/{id}", self._get_response)
            app.router.add_post("/v1/responses/{id}/cancel", self._cancel_response)
            app.router.add_post("/v1/audio/transcriptions", self._transcribe)
            app.router.add_post("/v1/audio/translations", self._transcribe)
        else:
            for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
                app.router.add_post(path, self._rerank)
            for path in ("/score", "/v1/score"):
                app.router.add_post(path, self._score)
            app.router.add_post("/classify", self._classify)
            app.router.add_post("/pooling", self._pooling)
        app.on_cleanup.append(self._end)

    async def _end(self, _: web.Application) -> None:
        for task in self._background.values():
            task.cancel()
        await asyncio.gather(*self._background.values(), return_exceptions=True)

    # ---- pooling

    async def _detokenize(self, request: web.Request) -> web.Response:
        body = await self._engine.body(request)
        return web.json_response({"prompt": "".join(word(index) for index in range(len(body.get("tokens", []))))})

    async def _pooled(
        self, request: web.Request, items: Callable[[dict[str, Any]], list[Any]], shape: Callable[..., dict[str, Any]]
    ) -> web.Response:
        """Answer with `shape(body, items)` and the usage."""
        body = await self._engine.body(request)
        found = items(body)
        tokens = sum(count_tokens(item) for item in found)
        async with self._engine.running(tokens):
            await self._engine.think(self._engine.behaviour.ttft_seconds)
            answer = {"id": f"pool-{self._engine.state.served:016x}", "model": body["model"]}
            usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
            return web.json_response(answer | shape(body, found) | {"usage": usage})

    async def _rerank(self, request: web.Request) -> web.Response:
        def shape(body: dict[str, Any], documents: list[Any]) -> dict[str, Any]:
            query = set(str(body.get("query")).lower().split())
            scored: list[dict[str, Any]] = [
                {
                    "index": i,
                    "document": {"text": text, "multi_modal": None},
                    "relevance_score": len(query & set(str(text).lower().split())) / max(1, len(query)),
                }
                for i, text in enumerate(documents)
            ]
            scored.sort(key=lambda row: -row["relevance_score"])
            return {"results": scored[: body.get("top_n") or None]}

        return await self._pooled(request, lambda body: _listed(body.get("documents")), shape)

    async def _score(self, request: web.Request) -> web.Response:
        def shape(_: dict[str, Any], texts: list[Any]) -> dict[str, Any]:
            rows = [{"index": i, "object": "score", "score": 0.5} for i in range(len(texts))]
            return {"object": "list", "created": CREATED, "data": rows}

        return await self._pooled(
            request, lambda body: _listed(body.get("text_2", body.get("documents", body.get("data_2")))), shape
        )

    async def _classify(self, request: web.Request) -> web.Response:
        def shape(_: dict[str, Any], texts: list[Any]) -> dict[str, Any]:
            rows = [
                {"index": i, "label": "LABEL_0", "probs": [0.75, 0.25], "num_classes": 2} for i in range(len(texts))
            ]
            return {"object": "list", "created": CREATED, "data": rows}

        return await self._pooled(request, lambda body: _listed(body.get("input")), shape)

    async def _pooling(self, request: web.Request) -> web.Response:
        def shape(_: dict[str, Any], texts: list[Any]) -> dict[str, Any]:
            rows = [{"index": i, "object": "pooling", "data": unit_vector(text)} for i, text in enumerate(texts)]
            return {"object": "list", "created": CREATED, "data": rows}

        return await self._pooled(request, lambda body: _listed(body.get("input")), shape)

    # ---- Anthropic's messages

    async def _count_tokens(self, request: web.Request) -> web.Response:
        body = await self._engine.body(request)
        return web.json_response({"input_tokens": count_tokens(body.get("messages", []))})

    async def _messages(self, request: web.Request) -> web.StreamResponse:
        body = await self._engine.body(request)
        tokens = min(int(body.get("max_tokens") or 16), self._engine.behaviour.output_tokens)
        prompt = count_tokens(body.get("messages", []))
        async with self._engine.running(prompt):
            self._engine.state.generation_tokens += tokens
            message = {
                "id": f"chatcmpl-{self._engine.state.started:016x}",
                "type": "message",
                "role": "assistant",
                "model": body["model"],
                "stop_sequence": None,
            }
            usage = {"input_tokens": prompt, "output_tokens": tokens}
            if body.get("stream"):
                return await self._stream_message(request, message, usage)
            await self._engine.think(self._engine.behaviour.ttft_seconds)
            call = tool_call_of(body)
            content: dict[str, Any] = {"type": "text", "text": "".join(pieces_of({}, tokens))}
            if call is not None:
                content = {
                    "type": "tool_use",
                    "id": call["id"],
                    "name": call["function"]["name"],
                    "input": json.loads(call["function"]["arguments"]),
                }
            ending = {"stop_reason": "tool_use" if call else "max_tokens", "content": [content], "usage": usage}
            return web.json_response(message | ending)

    async def _stream_message(
        self, request: web.Request, message: dict[str, Any], usage: dict[str, int]
    ) -> web.StreamResponse:
        async with self._streaming(request) as (response, pause):
            opening = message | {"content": [], "stop_reason": None, "usage": usage | {"output_tokens": 0}}
            await response.write(named_event({"type": "message_start", "message": opening}))
            block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
            await response.write(named_event(block))
            for index in range(usage["output_tokens"]):
                await pause(index)
                delta = {"type": "text_delta", "text": word(index)}
                await response.write(named_event({"type": "content_block_delta", "index": 0, "delta": delta}))
            await response.write(named_event({"type": "content_block_stop", "index": 0}))
            ending = {"stop_reason": "max_tokens", "stop_sequence": None}
            await response.write(named_event({"type": "message_delta", "delta": ending, "usage": usage}))
            await response.write(named_event({"type": "message_stop"}))
            return response

    # ---- responses

    async def _responses(self, request: web.Request) -> web.StreamResponse:
        body = await self._engine.body(request)
        previous = body.get("previous_response_id")
        if previous is not None and previous not in self._stored:
            return _no_response(previous)
        tokens = min(int(body.get("max_output_tokens") or 16), self._engine.behaviour.output_tokens)
        before = (self._stored[previous]["usage"] or {"total_tokens": 0})["total_tokens"] if previous else 0
        prompt = count_tokens(body.get("input")) + before
        response = _response(body, prompt, tokens)
        if body.get("store", True):
            self._stored[response["id"]] = response
        if body.get("background"):
            usage, response["usage"], response["status"] = response["usage"], None, "in_progress"
            self._background[response["id"]] = asyncio.create_task(self._finish(response, prompt, tokens, usage))
            return web.json_response(response | {"status": "queued"})
        async with self._engine.running(prompt):
            self._engine.state.generation_tokens += tokens
            if body.get("stream"):
                return await self._stream_response(request, response, tokens)
            await self._engine.think(self._engine.behaviour.ttft_seconds)
            return web.json_response(response)

    async def _finish(self, response: dict[str, Any], prompt: int, tokens: int, usage: dict[str, Any]) -> None:
        async with self._engine.running(prompt):
            await asyncio.sleep(self._engine.behaviour.ttft_seconds + tokens * self._engine.behaviour.itl_seconds)
            self._engine.state.generation_tokens += tokens
        response |= {"status": "completed", "usage": usage}

    async def _get_response(self, request: web.Request) -> web.StreamResponse:
        self._engine.state.last_request = {"path": request.path, "query": dict(request.query), "body": None}
        found = self._stored.get(request.match_info["id"])
        return web.json_response(found) if found else _no_response(request.match_info["id"])

    async def _cancel_response(self, request: web.Request) -> web.StreamResponse:
        found = self._stored.get(request.match_info["id"])
        if found is None:
            return _no_response(request.match_info["id"])
        if (task := self._background.get(found["id"])) is None or found["status"] != "in_progress":
            return _error(400, "Cannot cancel a synchronous response.", "response_id")
        task.cancel()
        found["status"] = "cancelled"
        return web.json_response(found)

    async def _stream_response(self, request: web.Request, response: dict[str, Any], tokens: int) -> web.StreamResponse:
        number = iter(range(10**6))

        def told(kind: str, **fields: Any) -> bytes:
            return named_event({"type": kind, "sequence_number": next(number)} | fields)

        begun = response | {"status": "in_progress", "output": [], "usage": None}
        item = response["output"][0]
        at = {"item_id": item["id"], "output_index": 0, "content_index": 0}
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        async with self._streaming(request) as (answer, pause):
            await answer.write(told("response.created", response=begun) + told("response.in_progress", response=begun))
            opened = item | {"content": [], "status": "in_progress"}
            await answer.write(told("response.output_item.added", output_index=0, item=opened))
            await answer.write(told("response.content_part.added", part=part, **at))
            for index in range(tokens):
                await pause(index)
                await answer.write(told("response.output_text.delta", delta=word(index), logprobs=[], **at))
            text = item["content"][0]["text"]
            await answer.write(told("response.output_text.done", text=text, logprobs=[], **at))
            await answer.write(told("response.content_part.done", part=part | {"text": text}, **at))
            await answer.write(told("response.output_item.done", output_index=0, item=item))
            await answer.write(told("response.completed", response=response))
            return answer

    # ---- audio

    async def _transcribe(self, request: web.Request) -> web.StreamResponse:
        form = await request.post()
        upload = form.get("file")
        told = {name: value for name, value in form.items() if isinstance(value, str)}
        self._engine.state.last_request = {"path": request.path, "headers": dict(request.headers), "body": told}
        if not isinstance(upload, web.FileField):
            return _error(422, "Field required", "file")
        size = len(upload.file.read())
        tokens = self._engine.behaviour.output_tokens
        text = "".join(pieces_of({}, tokens))
        async with self._engine.running(0):
            if told.get("stream") == "true":
                return await self._stream_transcription(request, told, tokens)
            await self._engine.think(self._engine.behaviour.ttft_seconds)
            if told.get("response_format") == "text":
                return web.Response(text=text)
            return web.json_response({"text": text, "usage": {"type": "duration", "seconds": size // 32_000}})

    async def _stream_transcription(
        self, request: web.Request, told: dict[str, str], tokens: int
    ) -> web.StreamResponse:
        head = {"id": "trsc-0", "object": "transcription.chunk", "created": CREATED, "model": told["model"]}
        async with self._streaming(request) as (response, pause):
            for index in range(tokens):
                await pause(index)
                finish = "stop" if index == tokens - 1 else None
                choice = {"delta": {"content": word(index)}, "finish_reason": finish, "stop_reason": None}
                await response.write(event(head | {"choices": [choice]}))
            if told.get("stream_include_usage") == "true":
                usage = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1}
                await response.write(event(head | {"choices": [], "usage": usage}))
            await response.write(b"data: [DONE]\n\n")
            return response

    # ---- what streams share

    @contextlib.asynccontextmanager
    async def _streaming(self, request: web.Request) -> AsyncIterator[tuple[web.StreamResponse, Any]]:
        """A stream that has begun after the time to first token, and a pause that waits before every token but the first."""
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await self._engine.think(self._engine.behaviour.ttft_seconds)
        await response.prepare(request)

        async def pause(index: int) -> None:
            if index:
                await self._engine.think(self._engine.behaviour.itl_seconds)
            self._engine.maybe_die()

        yield response, pause
        await response.write_eof()


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _error(status: int, message: str, param: str) -> web.Response:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": status}
    return web.json_response({"error": error}, status=status)


def _no_response(response_id: str) -> web.Response:
    return _error(404, f"Response with id '{response_id}' not found.", "response_id")


def _response(body: dict[str, Any], prompt: int, tokens: int) -> dict[str, Any]:
    """A completed response; its id is the request's, as in vLLM."""
    text = "".join(pieces_of(body, tokens))
    part: dict[str, Any] = {"type": "output_text", "text": text, "annotations": [], "logprobs": None}
    item = {"id": "msg_0", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    details = {"cached_tokens": 0}
    return {
        "id": body.get("request_id") or "resp_unnamed",
        "object": "response",
        "created_at": CREATED,
        "status": "completed",
        "model": body["model"],
        "output": [item],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "background": bool(body.get("background")),
        "max_output_tokens": tokens,
        "previous_response_id": body.get("previous_response_id"),
        "service_tier": "auto",
        "truncation": "disabled",
        "usage": {
            "input_tokens": prompt,
            "input_tokens_details": details,
            "output_tokens": tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + tokens,
        },
    }
